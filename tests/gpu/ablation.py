"""Block 8: each technique off in turn, all others on: how many times as long the same work takes then.

Training: whole optimizer steps by the real trainer, of a model of the 1.4B's width with fewer layers.
Decoding: steps of the 1.4B model with random weights.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from tests.gpu.block import Run
from tests.gpu.train_step import corpus_and_ranks, trainer_of

LAYERS = {"cuda": 4, "cpu": 1}
STEPS = {"cuda": 6, "cpu": 2}  # timed
WARM_UP = 2


@dataclass(frozen=True)
class Technique:
    """What is off in one variant.

    Attributes:
        keys: of the configuration.
        without: names in modules, and what stands in their place.
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def off(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for name, instead in self.without.items():
            stack.enter_context(patch(name, instead))
        return stack


TRAINING = (
    Technique("layers and loss compiled", {"model.compile": False}),
    Technique("loss a chunk of tokens at a time", {"model.loss_tokens": 0}),
    Technique("accumulation in one pass", without={"training.run.engine.accumulate_in_fp32": lambda *a, **k: None}),
    Technique("the optimizer's kernels", without={"optim.kernels.gpu.unsupported": lambda *a: "switched off"}),
)


def measure(run: Run) -> None:
    run.attempt(training, decoding)


def training(run: Run) -> None:
    shared = {"model.num_layers": LAYERS[run.device.type]}
    with corpus_and_ranks(run) as (folder, context):

        def seconds(technique: Technique) -> float:
            gc.collect()
            run.reset_peak_memory()
            with technique.off():
                trainer = trainer_of(run, {**shared, **technique.keys}, folder, context)
                for _ in range(WARM_UP):
                    trainer.take_step()
                return timed(run, trainer.take_step)

        compare(run, "training", TRAINING, seconds)


def decoding(run: Run) -> None:
    pass


def compare(run: Run, what: str, techniques: tuple[Technique, ...], seconds: Callable[[Technique], float]) -> None:
    """One row for everything on, and one for each technique off. What fails is a row's problem."""
    whole = seconds(Technique("all"))
    run.row(f"{what}: all techniques", ms=1e3 * whole, peak_allocated_gb=run.peak_memory_gb())
    for technique in techniques:
        taken = seconds(technique)
        run.row(
            f"{what}: without: {technique.name}", ms=1e3 * taken, times_as_long=taken / whole,
            peak_allocated_gb=run.peak_memory_gb(),
        )  # fmt: skip


def timed(run: Run, step: Callable[[], Any]) -> float:
    """Median seconds of a step, each waited for."""
    taken = []
    for _ in range(STEPS[run.device.type]):
        started = time.perf_counter()
        step()
        if run.gpu:
            torch.cuda.synchronize(run.device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
