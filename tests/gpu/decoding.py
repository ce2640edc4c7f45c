"""Block 6: the engine that serves, on random weights: decoding by batch and context, and prefilling."""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from serving import config as serving_config
from serving.bench.steps import answer, batch_figures
from serving.checkpoints import Served
from serving.engine.torch_engine import TorchEngine, make_torch_engine
from tests.gpu.block import Run
from training.model.shapes import to_hf_config

BATCHES = {"cuda": (1, 8, 32), "cpu": (1, 4)}
PROMPTS = {"cuda": (512, 2000), "cpu": (24, 100)}  # tokens
NEW_TOKENS = {"cuda": 48, "cpu": 16}
STEP_TOKENS = {"cuda": (8192 + 32, 2048), "cpu": (128, 32)}  # of a prefill; the first is a GPU's default


def measure(run: Run) -> None:
    kind = run.device.type
    default, small = STEP_TOKENS[kind]
    started = time.perf_counter()
    with engine_of(run, step_tokens=default) as engine:
        run.row("engine", seconds_to_build=time.perf_counter() - started, **engine.info.details)
        for prompt in PROMPTS[kind]:
            for batch in BATCHES[kind]:
                point(run, engine, batch=batch, prompt=prompt, step_tokens=default)
    with engine_of(run, step_tokens=small) as engine:
        point(run, engine, batch=BATCHES[kind][1], prompt=PROMPTS[kind][0], step_tokens=small)


@contextmanager
def engine_of(run: Run, *, step_tokens: int) -> Iterator[TorchEngine]:
    """The engine as `engine.*` configures it. A rehearsal takes the decoder that a GPU has."""
    kind = run.device.type
    length = max(PROMPTS[kind]) + NEW_TOKENS[kind]
    keys = {
        "model.weights": "random",
        "engine.device": kind,
        "engine.dtype": "bfloat16" if run.gpu else "float32",
        "engine.threads": 0 if run.gpu else 1,
        "engine.compiled": str(run.gpu).lower(),
        "engine.slots": max(BATCHES[kind]),
        "engine.context_tokens": length,
        "engine.cache_tokens": max(BATCHES[kind]) * (length + 32),
        "engine.step_tokens": step_tokens,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as shape:
        json.dump(to_hf_config(run.shape, dtype=keys["engine.dtype"]), shape)
        shape.flush()
        keys["model.shape"] = shape.name
        config = serving_config.load(dotlist=[f"{name}={value}" for name, value in keys.items()])
        engine = make_torch_engine(config, Served(None, "kit"))
    try:
        yield engine
    finally:
        engine.close()


def point(run: Run, engine: TorchEngine, *, batch: int, prompt: int, step_tokens: int) -> None:
    """One batch of equal requests, after the same once, in which graphs are captured."""
    kind, shape = run.device.type, run.shape
    size = {"num_prompt": prompt, "num_new": NEW_TOKENS[kind]}
    answer(engine, batch, seed=0, **size)
    found = batch_figures(answer(engine, batch, seed=1, **size), num_prompt=prompt)
    seconds, rate = found["itl_ms"] / 1e3, found["prefill_tokens_per_second"]
    moved = shape.decode_bytes(
        batch=batch, context_tokens=found["mean_context"], width_bytes=2 if run.gpu else 4
    )
    gb_per_s = moved / seconds / 1e9
    tflops = rate * shape.prefill_flops(prompt) / prompt / 1e12
    run.row(
        f"batch {batch}, context {prompt}, steps of {step_tokens}",
        decode_tokens_per_second=found["decode_tokens_per_second"], decode_step_ms=found["itl_ms"],
        p10_ms=found["itl_ms_p10"], p90_ms=found["itl_ms_p90"], decode_gb_per_s=gb_per_s,
        **run.of_memory(gb_per_s, measured="read"), prefill_tokens_per_second=rate, ttft_ms=found["ttft_ms"],
        prefill_tflops=tflops, **run.of_products(tflops),
    )  # fmt: skip
