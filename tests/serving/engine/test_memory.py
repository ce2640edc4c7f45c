"""An engine that does not fit its device is refused in one message that names the keys."""

import pytest
import torch

from cluster.cli import BAD_INPUT, UserError
from serving.bench import steps
from serving.checkpoints import Served
from serving.config import load
from serving.engine import memory, torch_engine
from serving.engine.gpu import decoder as gpu_decoder
from serving.engine.torch_engine import make_torch_engine

RANDOM = ("model.weights=random", "model.shape=llama-5m", "engine.device=cpu")


def refusal(*keys: str) -> str:
    with pytest.raises(UserError) as raised:
        make_torch_engine(load(dotlist=[*RANDOM, *keys]), Served(None, "tiny"))
    return str(raised.value)


def test_a_cache_above_all_memory_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(torch_engine, "_load", lambda *_, **__: pytest.fail("it began to load the model"))
    message = refusal(f"engine.cache_tokens={10**15}", "engine.dtype=float32")
    assert message.startswith("out of memory: model.shape=llama-5m needs 0.02 GB of weights")
    _, cache, *_ = memory._needed(load(dotlist=[*RANDOM, "engine.dtype=float32"]), None)
    stated = f"engine.cache_tokens={10**15} needs {cache / 32_768 * 10**15 / 1e9:,.2f} GB of cache"
    assert stated in message and "float32 (engine.dtype=float32)" in message
    assert "GB free of" in message and "lower engine.cache_tokens" in message


def test_on_a_gpu_the_largest_step_and_the_largest_graph_are_counted(monkeypatch):
    keys = ["model.weights=random", "model.shape=llama-1b4", "engine.dtype=bfloat16"]
    config = load(dotlist=[*keys, "engine.step_tokens=8192"])
    assert memory._needed(config, None)[2] == 0
    monkeypatch.setattr(memory, "_device", lambda _: torch.device("cuda"))
    assert memory._needed(config, None)[2] == 8192 * (4 * 2048 + 3 * 5504) * 2  # without Triton kernels
    monkeypatch.setattr(gpu_decoder, "unsupported", lambda *_: None)
    assert memory._needed(config, None)[2] == (8192 + 2048) * (4 * 2048 + 3 * 5504) * 2
    # No step and no graph is larger than `step_tokens`, or than the cache.
    for step, cache, rows in ((512, 32_768, 512), (8192, 1024, 1024)):
        config = load(dotlist=[*keys, f"engine.step_tokens={step}", f"engine.cache_tokens={cache}"])
        assert memory._needed(config, None)[2] == 2 * rows * (4 * 2048 + 3 * 5504) * 2


@pytest.mark.parametrize("kind", ["of torch on a CPU", "of CUDA", "of Python"])
def test_an_allocation_that_fails_says_the_same(kind, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        if kind == "of torch on a CPU":
            torch.empty(10**16)
        if kind == "of CUDA":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has")
        raise MemoryError("cannot fit")

    monkeypatch.setattr(torch_engine, "TorchDecoder", fail)
    message = refusal("engine.compiled=false")
    assert message.startswith("out of memory: model.shape=llama-5m needs")
    said = {"of torch on a CPU": "you tried to allocate", "of CUDA": "Tried to allocate 20.00 GiB.)"}
    assert said.get(kind, "cannot fit") in message and "\n" not in message


def test_an_engine_that_fits_is_made_and_another_error_is_not_taken_for_memory(monkeypatch):
    config = load(dotlist=[*RANDOM, "engine.cache_tokens=512"])
    make_torch_engine(config, Served(None, "tiny")).close()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch_engine, "Scheduler", fail)
    with pytest.raises(RuntimeError, match="something else"):
        make_torch_engine(config, Served(None, "tiny"))


def test_a_missing_checkpoint_is_still_what_is_said(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        make_torch_engine(load(dotlist=["engine.device=cpu"]), Served(tmp_path, "tiny"))


def test_a_command_ends_without_a_traceback(capsys):
    keys = [*RANDOM, f"engine.cache_tokens={10**15}", f"engine.context_tokens={1024}"]
    assert steps.main([*keys, "--batches", "1"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: model.shape=llama-5m") and "Traceback" not in error
