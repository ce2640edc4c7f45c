"""Every seed that a user may give draws its own stream, also beside its negative; others are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError
from optim.noise import Noise
from serving.bench.inputs import draw_requests, from_trace, read_conversations
from serving.bench.workload import arrivals, lengths, synthetic
from serving.checkpoints import Served
from serving.config import EngineConfig, ModelConfig, ServeConfig
from serving.engine.protocol import Sampling
from serving.engine.torch_engine import TorchEngine, make_torch_engine
from tests.commands import ROOT
from tests.lab.paced_engine import Pace
from tests.reader import Reader
from training import config as training_config
from training.data.dataset import SampleOrder
from training.model.llama import Llama, initialize
from training.model.shapes import LlamaShape
from training.study.config import load as load_study

SHAPE = LlamaShape(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32, ffn_size=32
)
SEEDS = (0, 1, 3, 1000, 2**62, -1, -3, -(2**62))
SIZE = {"vocab_size": 1000, "context_tokens": 100}


def weights(seed: int) -> Any:
    model = Llama(SHAPE)
    initialize(model, seed=seed)
    return model.lm_head.weight.flatten().tolist()


def prompts(seed: int) -> Any:
    draw = lengths("uniform(4,9)", key="x")
    return synthetic(5, prompt_tokens=draw, output_tokens=draw, seed=seed, vocab_size=1000)


def from_a_trace(folder: Path) -> Callable[[int], Any]:
    file = folder / "trace.jsonl"
    file.write_text('{"at_seconds": 0, "prompt_tokens": 9, "output_tokens": 4}\n')
    return lambda seed: from_trace(file, seed=seed, **SIZE)


def chosen(folder: Path) -> Callable[[int], Any]:
    file = folder / "chats.jsonl"
    file.write_text("".join(f'{{"prompt": "{i}", "completion": "a"}}\n' for i in range(1000)))
    read = read_conversations(file, count_tokens=len, context_tokens=9)
    return lambda seed: draw_requests(read, 9, seed=seed)


def sampled(engine: TorchEngine, seed: int | None) -> list[int]:
    return Reader(engine, [1, 2, 3], Sampling(max_tokens=12, seed=seed, ignore_eos=True)).wait()


@pytest.fixture(scope="module")
def engine():
    config = ServeConfig(
        model=ModelConfig(shape="llama-5m", weights="random"),
        engine=EngineConfig(device="cpu", slots=4, cache_tokens=1024),
    )
    made = make_torch_engine(config, Served(None, "m"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "what",
    [
        *("prompts", "arrivals", "a trace's prompts", "conversations", "paced tokens"),
        *("a request's draws", "weights", "noise", "order of samples"),
    ],
)
def test_two_seeds_draw_two_streams_and_one_seed_one(what: str, engine, tmp_path):
    noise = Noise("gaussian", moment=2.0, scale=1.0)
    draw = {
        "prompts": prompts,
        "arrivals": lambda seed: arrivals("poisson", rate=1.0, number=4, seed=seed),
        "a trace's prompts": from_a_trace(tmp_path),
        "conversations": chosen(tmp_path),
        "a request's draws": lambda seed: sampled(engine, seed),
        "weights": weights,
        "paced tokens": lambda seed: Pace(seed=seed).due(0, 4),
        "noise": lambda seed: noise.sample("w", start=0, stop=8, seed=seed, step=0).tolist(),
        "order of samples": lambda seed: SampleOrder(100, seed=seed).ids(0, count=100).tolist(),
    }[what]
    drawn = [repr(draw(seed)) for seed in SEEDS]
    assert len(set(drawn)) == len(SEEDS)
    assert drawn == [repr(draw(seed)) for seed in SEEDS]


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_that_no_generator_takes_is_refused_with_its_key(seed: int):
    study = ROOT / "training/configs/study.yaml"
    with pytest.raises(ConfigError, match=rf"^run.seed: must lie in .*, not {seed}$"):
        training_config.load(dotlist=[f"run.seed={seed}"])
    for key, value in (("seeds", f"[1,{seed}]"), ("tuning_seed", seed)):
        with pytest.raises(ConfigError, match=rf"^{key}: {seed} must lie in"):
            load_study(file=study, dotlist=[f"{key}={value}"])
