"""Block 7: the kernels that take the most time of a decoding step, and where the host waits for the GPU.

`top` and `host_waits` also serve block 3.
"""

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from serving.engine.decoder import StepDecoder, TorchDecoder
from serving.engine.gpu.decoder import GpuDecoder
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, Span
from tests.gpu.block import Run
from training.model.llama import Llama, initialize
from training.model.shapes import LlamaShape

LIMIT = 12  # kernels that are named
STEP_TOKENS = 8192  # of a prefill


def measure(run: Run) -> None:
    decoding(run)


def decoding(run: Run) -> None:
    """Batch 8, contexts of 512: launched step by step, because a graph's kernels have no operator's name."""
    batch, prompt = (8, 512) if run.gpu else (2, 40)
    with run.device:
        model = Llama(run.shape)
    initialize(model, seed=0)
    if run.gpu:
        model.bfloat16()
    size = {"num_blocks": batch * (prompt // BLOCK_TOKENS + 2), "slots": batch}
    for name, graphs in (("decoding", False), ("decoding by graphs", True)):
        if graphs and not run.gpu:
            continue
        make = GpuDecoder if run.gpu else TorchDecoder
        step = decoding_step(
            make(model, graphs=graphs, **size), model.shape, batch=batch, prompt=prompt, **size
        )
        step()
        top(run, name, step)
        host_waits(run, name, step)


def decoding_step(
    decoder: StepDecoder, shape: LlamaShape, *, batch: int, prompt: int, slots: int, num_blocks: int
) -> Callable[[], list[Span]]:
    """A step in which this many requests decode, after their prompts. It may be called BLOCK_TOKENS times."""
    scheduler = Scheduler(
        slots=slots, cache_tokens=num_blocks * BLOCK_TOKENS, step_tokens=max(STEP_TOKENS, slots + 1)
    )
    draw = random.Random(0)
    for _ in range(batch):
        tokens = [draw.randrange(shape.vocab_size) for _ in range(prompt)]
        scheduler.add(ScheduledRequest(tokens, prompt + BLOCK_TOKENS + 2))

    def step() -> list[Span]:
        spans = scheduler.next_step()
        decoder.forward(spans)
        for span in spans:
            span.request.done = span.stop
            if span.samples:
                span.request.tokens.append(0)
        return spans

    while any(span.stop - span.start > 1 for span in step()):
        pass
    return step


def top(run: Run, name: str, step: Callable[[], Any]) -> None:
    """Profile one step: time on the device, its share of the step, and the kernels that took most of it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.gpu else [])]
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        if run.gpu:
            torch.cuda.synchronize(run.device)
        wall = time.perf_counter() - started
    kernels = sorted(_kernels(profiler, gpu=run.gpu), key=lambda kernel: -kernel[1])
    total = sum(seconds for _, seconds, _ in kernels)
    problem = None if total > 0 else "the profiler saw no kernel"
    run.row(
        f"{name}: the step, profiled", problem=problem, wall_ms=1e3 * wall, kernels_ms=1e3 * total,
        launches=sum(count for _, _, count in kernels),
    )  # fmt: skip
    for kernel, seconds, count in kernels[:LIMIT]:
        run.row(
            f"{name}: {kernel[:90]}",
            ms=1e3 * seconds,
            percent_of_kernels=100 * seconds / total,
            launches=count,
        )


def host_waits(run: Run, name: str, step: Callable[[], Any]) -> None:
    """How often one step makes the host wait for the GPU, by torch's own count, and in which lines.

    Waits for CUDA events, and collectives, are not in it (`torch.cuda.set_sync_debug_mode`).
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if run.gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if run.gpu:
                torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}"
        for each in caught
        if "synchronizing CUDA operation" in str(each.message)
    )
    where = ", ".join(f"{line} ({count})" for line, count in lines.most_common())
    run.row(f"{name}: waits of the host in a step", waits=lines.total(), where=where or "nowhere")


def _kernels(profiler: profile, *, gpu: bool) -> list[tuple[str, float, int]]:
    """(name, seconds, launches) of each kernel on a GPU, or of each operator on a CPU."""
    averages = profiler.key_averages()
    if not gpu:
        return [(event.key, event.self_cpu_time_total / 1e6, event.count) for event in averages]
    return [
        (event.key, event.self_device_time_total / 1e6, event.count)
        for event in averages
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
