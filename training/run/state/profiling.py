"""Files about chosen steps of a run, for viewers: where the time of a step went, and what held memory.

profiles/step-0000012-rank0.json.gz    a trace for https://ui.perfetto.dev
profiles/step-0000012-rank0.pickle     on GPUs: allocations, for https://docs.pytorch.org/memory_viz
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from training.config import TrainConfig
from training.run.context import Context

MOST_ALLOCATIONS = 200_000  # that a snapshot keeps


@contextmanager
def profiled(config: TrainConfig, context: Context, *, step: int) -> Iterator[None]:
    """The block is the step of this number, which every rank profiles if `record.profile_steps` names it."""
    if step not in config.record.profile_steps:
        yield
        return
    path = profile_path(config.run_directory, step=step, rank=context.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    gpu = context.device.type == "cuda"
    context.synchronize()  # nothing of the step before
    if gpu:
        torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
    try:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as trace:
            yield
            context.synchronize()
        if gpu:
            torch.cuda.memory._dump_snapshot(str(path.with_suffix("").with_suffix(".pickle")))
    finally:
        if gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
    trace.export_chrome_trace(str(path))


def profile_path(run_directory: Path, *, step: int, rank: int) -> Path:
    """The trace of a step on a rank."""
    return run_directory / "profiles" / f"step-{step:07d}-rank{rank}.json.gz"
