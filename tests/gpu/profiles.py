"""Block 7: the kernels that take the most time, of a decoding step and of a training step."""

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from serving.engine.decoder import TorchDecoder
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler
from tests.gpu.block import Run
from training.model.llama import Llama, initialize

LIMIT = 12  # kernels that are named


def measure(run: Run) -> None:
    decoding(run)


def decoding(run: Run) -> None:
    """Batch 8, contexts of 512: launched step by step, because a graph's kernels have no operator's name."""
    batch, context = (8, 512) if run.gpu else (2, 40)
    with run.device:
        model = Llama(run.shape)
    initialize(model, seed=0)
    if run.gpu:
        model.bfloat16()
    blocks = batch * (context // BLOCK_TOKENS + 2)
    draw = random.Random(0)
    for name, graphs in (("decoding", False), ("decoding by graphs", True)):
        if graphs and not run.gpu:
            continue
        decoder = TorchDecoder(model, num_blocks=blocks, slots=batch, graphs=graphs)
        scheduler = Scheduler(
            slots=batch, cache_tokens=blocks * BLOCK_TOKENS, step_tokens=batch * context + 1
        )
        for _ in range(batch):
            prompt = [draw.randrange(run.shape.vocab_size) for _ in range(context)]
            scheduler.add(ScheduledRequest(prompt, context + 10))

        def step(decoder: TorchDecoder = decoder, scheduler: Scheduler = scheduler) -> None:
            spans = scheduler.next_step()
            decoder.forward(spans)
            for span in spans:
                span.request.done = span.stop
                span.request.tokens.append(0)

        for _ in range(3):  # the prompts, then two steps that decode
            step()
        top(run, name, step)


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
