"""What a training step takes, and where its time goes: the loop's own, without evaluation or checkpoints.

    python -m training.steps [--steps N] [--warm-up N] [key=value ...]                     one worker
    torchrun --nproc-per-node=W -m training.steps workers.count=W [key=value ...]          W workers

Two passes: in the first a step is timed as the loop runs it; in the second, with the device waited for after
each part, its data, compute and optimizer; and a profiled step says how long of each part collectives took
that nothing else covered. The last line on stdout is one JSON object.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cluster import cli, hardware
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.session import set_defaults, worker_environment
from cluster.usage import joules_of, out_of_memory, peak_memory_bytes
from training import config as training_config
from training import traffic
from training.config import TrainConfig
from training.plan import Plan, make_plan
from training.prepare import prepare

PARTS = ("data", "compute", "optimizer")
NUM_PHASED = 3  # steps of the second pass
COLLECTIVES = ("gloo:", "nccl")  # beginnings of the names of the profiler's events
OWN_KEYS = ("launcher", "run.directory", "run.name", "schedule.tokens", "record.wandb")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, of each rank. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.steps", description=__doc__.splitlines()[0], keys=TrainConfig())
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps (default: 10)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before them (default: 3)")
    options = parser.parse_args(arguments)

    def body() -> None:
        if options.steps < 1 or options.warm_up < 1:
            raise UserError("--steps and --warm-up: must be at least 1")
        for argument in options.overrides:
            if argument.partition("=")[0] in OWN_KEYS:
                raise UserError(f"{argument}: leave it out; this command sets {', '.join(OWN_KEYS)}")
        with tempfile.TemporaryDirectory() as folder:
            keys = [*options.overrides, f"run.directory={folder}"]
            asked = training_config.load(file=options.config, dotlist=keys)
            num_steps = options.warm_up + options.steps + NUM_PHASED + 1
            keys += [f"schedule.tokens={num_steps * asked.batch.tokens}", "launcher=torch"]
            config = training_config.load(file=options.config, dotlist=keys)
            if options.dry_run:
                print(f"{layered.to_yaml(config)}\n{make_plan(config).describe()}")
                return
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            if world_size != config.workers.count:
                raise UserError(
                    f"workers.count: {config.workers.count}, but there are {world_size} processes; start "
                    f"as many with `torchrun --nproc-per-node={config.workers.count}`"
                )
            measured = run(config, num_steps=options.steps, num_warm_up=options.warm_up)
            if measured is not None:
                print(json.dumps(measured))

    return cli.run(body)


def run(config: TrainConfig, *, num_steps: int, num_warm_up: int) -> dict[str, Any] | None:
    """Measure on this rank; the result on rank 0, None on the others.

    Raises:
        RunError: out of memory; the message begins with these words.
    """
    make_plan(config)
    threads = max(1, int(config.workers.cpus))
    set_defaults(worker_environment(gpu=config.workers.gpu, threads=threads))
    import torch

    from training.context import torch_context
    from training.loop import Trainer

    if not config.workers.gpu:
        torch.set_num_threads(threads)
    with torch_context(gpu=config.workers.gpu) as context:
        data = None
        if context.is_main:
            data = prepare(config.data, report=lambda line: print(line, file=sys.stderr)).absolute()
        data = context.gather(data)[0]
        try:
            trainer = Trainer(config, data=data, context=context)
            found = measure(trainer, num_steps=num_steps, num_warm_up=num_warm_up)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and so are those of other allocators
            if not isinstance(error, torch.OutOfMemoryError) and not out_of_memory(str(error)):
                raise
            raise RunError(f"out of memory: {str(error).splitlines()[0]}") from error
        every = context.gather(found)
    return _over_ranks(every) | _about(trainer) if context.is_main else None


def measure(trainer: Any, *, num_steps: int, num_warm_up: int) -> dict[str, Any]:
    """On this rank: `step_seconds`, a list; `joules` of them or None; seconds by part; peak memory."""
    device = trainer.context.device
    for _ in range(num_warm_up):
        trainer.take_step()
    _wait(device)
    taken: list[float] = []
    with joules_of(device) as energy:
        for _ in range(num_steps):
            start = time.perf_counter()
            trainer.take_step()
            _wait(device)
            taken.append(time.perf_counter() - start)
    parts = {part: [0.0] * NUM_PHASED for part in PARTS}
    whole = []
    for number in range(NUM_PHASED):
        start = time.perf_counter()
        trainer.take_step(phase=lambda part, number=number: _timed(parts[part], number, device))
        whole.append(time.perf_counter() - start)
    return {
        "step_seconds": taken,
        "joules": energy.joules,
        "joules_reason": energy.reason,
        "phased_step_seconds": statistics.median(whole),
        **{part: statistics.median(seconds) for part, seconds in parts.items()},
        "collectives": _collective_seconds(trainer),
        "peak_memory_bytes": peak_memory_bytes(device),
    }


@contextmanager
def _timed(into: list[float], number: int, device: Any) -> Iterator[None]:
    start = time.perf_counter()
    yield
    _wait(device)
    into[number] += time.perf_counter() - start


def _collective_seconds(trainer: Any) -> dict[str, float]:
    """Part -> seconds of one step in which collectives ran and, on a GPU, no other kernel did."""
    from torch.profiler import ProfilerActivity, profile, record_function

    gpu = trainer.context.device.type == "cuda"
    if trainer.context.world_size == 1:
        return {}

    @contextmanager
    def marked(part: str) -> Iterator[None]:
        with record_function(f"part:{part}"):
            yield
            _wait(trainer.context.device)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        trainer.take_step(phase=marked)
    return exposed(profiler.events(), gpu=gpu)


def exposed(events: Iterable[Any], *, gpu: bool) -> dict[str, float]:
    """Part -> seconds in which collectives ran alone, from the profiler's events.

    On a GPU a `record_function` shows up twice, on the host and as an annotation on the device; the latter
    spans the kernels below it and is no work.
    """
    sending, computing = [], []
    marks: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        on_device = event.device_type.name == "CUDA"
        if event.name.startswith("part:") and not on_device:
            marks.setdefault(event.name.removeprefix("part:"), []).append(span)
        elif on_device and event.is_user_annotation:
            continue
        elif event.name.startswith(COLLECTIVES) and on_device == gpu:
            sending.append(span)
        elif on_device:
            computing.append(span)
    return {
        part: covered([(max(a, begin), min(b, end)) for begin, end in spans for a, b in sending], computing)
        for part, spans in marks.items()
    }


def covered(spans: Sequence[tuple[float, float]], apart_from: Sequence[tuple[float, float]] = ()) -> float:
    """Length of the union of the spans, less what of it lies in the union of `apart_from`."""
    edges = [(a, 1, 0) for a, b in spans if b > a] + [(b, -1, 0) for a, b in spans if b > a]
    edges += [(a, 0, 1) for a, b in apart_from if b > a] + [(b, 0, -1) for a, b in apart_from if b > a]
    total, inside, hidden, last = 0.0, 0, 0, 0.0
    for at, ours, others in sorted(edges):
        if inside and not hidden:
            total += at - last
        inside, hidden, last = inside + ours, hidden + others, at
    return total


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _over_ranks(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks together: a step ends with its slowest rank; parts are means; energy is the sum."""
    steps = [max(seconds) for seconds in zip(*(rank["step_seconds"] for rank in ranks), strict=True)]
    low, high = np.percentile(steps, [10, 90]).tolist()
    joules = [rank["joules"] for rank in ranks]
    found = {
        "step_seconds": statistics.median(steps),
        "step_seconds_p10": low,
        "step_seconds_p90": high,
        "steps": len(steps),
        "joules_per_step": None if None in joules else sum(joules) / len(steps),
        "joules_reason": ranks[0]["joules_reason"],
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
    }
    mean = {name: statistics.mean(rank[name] for rank in ranks) for name in (*PARTS, "phased_step_seconds")}
    sent = {part: statistics.mean(rank["collectives"].get(part, 0.0) for rank in ranks) for part in PARTS}
    sent = {part: min(seconds, mean[part]) for part, seconds in sent.items()}
    return found | {
        "phased_step_seconds": mean["phased_step_seconds"],
        "seconds_data": mean["data"] - sent["data"],
        "seconds_compute": mean["compute"] - sent["compute"],
        "seconds_optimizer": mean["optimizer"] - sent["optimizer"],
        "seconds_communication": sum(sent.values()),
    }


def _about(trainer: Any) -> dict[str, Any]:
    config, plan = trainer.config, trainer.plan
    device = trainer.context.device_name
    return {
        "device": device,
        "datasheet": hardware.lookup(device) is not None,
        "num_workers": plan.num_workers,
        "on_gpu": config.workers.gpu,
        "num_parameters": plan.shape.num_parameters,
        "flops_per_token": plan.flops_per_token,
        "tokens_per_step": plan.tokens_per_step,
        "sent_bytes_per_step": _sent_bytes(config, plan),
        "sequence_length": config.batch.sequence_length,
        "micro_sequences": config.batch.micro_sequences,
        "accumulation": plan.accumulation,
        "zero_stage": config.zero.stage,
        "precision": config.precision,
        "rule": config.optim.matrix.rule,
    }


def _sent_bytes(config: TrainConfig, plan: Plan) -> float | None:
    """That the busiest rank sends in a step (training/traffic.py); None where they are not counted."""
    if plan.num_workers == 1:
        return 0.0
    job = traffic.job_of(config, plan.shape, num_ranks=plan.num_workers, accumulation=plan.accumulation)
    return None if job is None else max(traffic.sent_bytes(job))


if __name__ == "__main__":
    sys.exit(main())
