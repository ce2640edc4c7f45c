"""Peaks of memory on a CPU at each point of a step, from the profiler's record of every allocation."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from training import config as training_config
from training.model.llama import Llama, initialize
from training.plan import resolve_shape
from training.planner.memory import loss_tokens
from training.run.context import Context
from training.run.engine import build_deepspeed_engine

MARK = "point: "


@contextmanager
def peaks(into: dict[str, int]) -> Iterator[None]:
    """A block whose parts inside `point` get their peaks: bytes of this thread's tensors that are alive.

    Only what is allocated inside the block counts.
    """
    gc.collect()  # so that nothing from before is freed inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    marks = [e for e in events if e.name().startswith(MARK)]
    for mark in marks:
        alive = most = 0
        for at, change in changes:
            if at > mark.start_ns() + mark.duration_ns():
                break
            most = max(most, alive) if at >= mark.start_ns() else 0
            alive += change
            most = max(most, alive) if at >= mark.start_ns() else 0
        name = mark.name().removeprefix(MARK)
        into[name] = max(into.get(name, 0), most)


def point(name: str) -> record_function:
    return record_function(MARK + name)


def peaks_of_steps(
    context: Context, keys: Sequence[tuple[str, ...]], accumulation: int
) -> list[dict[str, int]]:
    """By configuration: peaks of one step."""
    return [_peaks_of_steps(training_config.load(dotlist=each), accumulation) for each in keys]


def _peaks_of_steps(config: training_config.TrainConfig, accumulation: int) -> dict[str, int]:
    found: dict[str, int] = {}
    shape, batch = resolve_shape(config), config.batch
    tokens = torch.randint(shape.vocab_size, (batch.micro_sequences, batch.sequence_length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with peaks(found):
        model = Llama(shape, activation_checkpointing=config.model.recomputed_every)
        model.lm_head.loss_tokens = loss_tokens(config)
        initialize(model, seed=1)
        engine, _, _ = build_deepspeed_engine(
            model, config, micro_batch=batch.micro_sequences, accumulation=accumulation
        )
        del model
        for _ in range(accumulation):
            with point("forward"):
                loss = engine(inputs, targets)
            with point("backward"):
                engine.backward(loss)
            with point("optimizer step"):
                engine.step()
    return found
