"""The time of a training step of the loop, by part, without evaluation or checkpoints.

    python -m training.baseline.steps [--steps N] [--warm-up N] [key=value ...]                     one worker
    torchrun --nproc-per-node=W -m training.baseline.steps workers.count=W [key=value ...]          W workers
    python -m training.baseline.steps --ray session.address=auto workers.count=W [key=value ...]   a cluster's

The first pass times a step as the loop runs it. The second times its parts (data, compute, optimizer) and
waits for the device after each. A profiled step then shows how long collectives ran alone in each part. The
last line on stdout is one JSON object.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from cluster import cli
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.display import show
from cluster.measure import benchmark, hardware
from cluster.measure.usage import joules_of, out_of_memory, peak_memory_bytes
from cluster.record import origins
from training import config as training_config
from training.config import TrainConfig
from training.data.prepare import prepare
from training.plan import Plan, make_plan
from training.projection import traffic
from training.run import workers

PARTS = ("data", "compute", "optimizer")
NUM_PHASED = 3  # steps of the second pass
COLLECTIVES = ("gloo:", "nccl")  # beginnings of the names of the profiler's events
OWN_KEYS = ("launcher", "run.directory", "run.name", "schedule.tokens", "record.wandb")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, of each rank. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser(
        "training.baseline.steps", description=__doc__.splitlines()[0], keys=TrainConfig()
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps (default: 10)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before them (default: 3)")
    parser.add_argument("--ray", action="store_true", help="on workers of Ray Train, in all nodes of its Ray")
    options = parser.parse_args(arguments)

    def body() -> None:
        if options.steps < 1 or options.warm_up < 1:
            raise UserError("--steps and --warm-up: must be at least 1")
        benchmark.require_free(options.overrides, OWN_KEYS)
        launcher = "ray" if options.ray else "torch"
        size = {"num_steps": options.steps, "num_warm_up": options.warm_up}
        with tempfile.TemporaryDirectory() as folder:
            keys = [*options.overrides, f"run.directory={folder}", f"launcher={launcher}"]
            asked = training_config.load(file=options.config, dotlist=keys)
            num_steps = options.warm_up + options.steps + NUM_PHASED + 1
            keys.append(f"schedule.tokens={num_steps * asked.batch.tokens}")
            config = training_config.load(file=options.config, dotlist=keys)
            plan = make_plan(config)
            if options.dry_run:
                show(layered.to_yaml(config), plan.table())
                return
            measured = (run_ray if options.ray else run)(config, plan, **size)
        if measured is not None:
            print(json.dumps(measured))

    return cli.run(body)


def run(config: TrainConfig, plan: Plan, **size: int) -> dict[str, Any] | None:
    """Measure on this rank of torchrun, or alone; the result on rank 0, None on the others.

    Raises:
        UserError: torchrun started another number of processes than `workers.count`.
        RunError: out of memory; the message begins with these words.
    """
    ranks = workers.torch_ranks(config.workers)
    from training.run.context import torch_context
    from training.run.start import Start

    start = ranks.on_main(lambda: Start.of(config, plan, prepare(config.data, report=_to_stderr).absolute()))
    with torch_context(ranks, gpu=config.workers.gpu) as context:
        return _on_rank(start, context, **size)


def run_ray(config: TrainConfig, plan: Plan, **size: int) -> dict[str, Any]:
    """Measure on workers of Ray Train. The prepared data lie where all of their nodes see them.

    Raises:
        RunError: a worker failed; its own message.
    """
    from training.run.start import Start

    config = replace(
        config, data=replace(config.data, directory=str(Path(config.data.directory).expanduser().absolute()))
    )
    start = Start.of(config, plan, prepare(config.data, report=_to_stderr).absolute())
    with (
        tempfile.TemporaryDirectory(prefix=".steps-", dir=config.data.directory) as folder,
        workers.session(config),
    ):
        arguments = {"start": start, "size": size}
        return workers.run(_ray_worker, arguments, workers=config.workers, directory=Path(folder))


def _ray_worker(arguments: dict[str, Any]) -> dict[str, Any] | None:
    import ray

    from training.run.context import RayContext

    start = arguments["start"]
    context = RayContext.create(gpu=start.config.workers.gpu)
    nodes = set(context.gather(ray.get_runtime_context().get_node_id()))
    return _on_rank(start.on_ranks(context), context, num_nodes=len(nodes), **arguments["size"])


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _on_rank(start: Any, context: Any, *, num_nodes: int = 1, **size: int) -> dict[str, Any] | None:
    """`measure` on every rank; the result of all on rank 0, None on the others."""
    import torch

    from training.run.loop import Trainer

    try:
        trainer = Trainer(start, context)
        found = measure(trainer, **size)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and so are those of other allocators
        if not isinstance(error, torch.OutOfMemoryError) and not out_of_memory(str(error)):
            raise
        raise RunError(f"out of memory: {str(error).splitlines()[0]}") from error
    every = context.gather(found)
    if not context.is_main:
        return None
    data = start.train_set
    origin = origins.of_dataset(data.directory, data.manifest.fingerprint)
    return _over_ranks(every) | _about(trainer, num_nodes=num_nodes) | {"input": origin}


def measure(trainer: Any, *, num_steps: int, num_warm_up: int) -> dict[str, Any]:
    """On this rank: `step_seconds`, a list; `joules` of them or None; seconds by part; peak memory."""
    context = trainer.context
    for _ in range(num_warm_up):
        trainer.take_step()
    context.synchronize()
    taken: list[float] = []
    with joules_of(context.device) as energy:
        for _ in range(num_steps):
            start = time.perf_counter()
            trainer.take_step()
            context.synchronize()
            taken.append(time.perf_counter() - start)
    parts = {part: [0.0] * NUM_PHASED for part in PARTS}
    whole = []
    for number in range(NUM_PHASED):
        start = time.perf_counter()
        trainer.take_step(phase=lambda part, number=number: _timed(parts[part], number, context))
        whole.append(time.perf_counter() - start)
    middle = sorted(range(NUM_PHASED), key=whole.__getitem__)[NUM_PHASED // 2]  # its parts add up to it
    return {
        "step_seconds": taken,
        "joules": energy.joules,
        "joules_reason": energy.reason,
        "phased_step_seconds": whole[middle],
        **{part: seconds[middle] for part, seconds in parts.items()},
        "collectives": _collective_shares(trainer),
        "peak_memory_bytes": peak_memory_bytes(context.device),
    }


@contextmanager
def _timed(into: list[float], number: int, context: Any) -> Iterator[None]:
    start = time.perf_counter()
    yield
    context.synchronize()
    into[number] += time.perf_counter() - start


def _collective_shares(trainer: Any) -> dict[str, float]:
    """Part -> share of its time in one step in which collectives ran and, on a GPU, no other kernel did.

    Of a step of its own, which something may hold up: seconds of it could not be taken from another step's.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    gpu = trainer.context.device.type == "cuda"
    if trainer.context.world_size == 1:
        return {}

    @contextmanager
    def marked(part: str) -> Iterator[None]:
        with record_function(f"part:{part}"):
            yield
            trainer.context.synchronize()

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        trainer.take_step(phase=marked)
    seconds: dict[str, float] = {}
    for event in (events := profiler.events()):
        if event.name.startswith("part:") and event.device_type.name != "CUDA":
            part, span = event.name.removeprefix("part:"), event.time_range
            seconds[part] = seconds.get(part, 0.0) + (span.end - span.start) / 1e6
    alone = exposed(events, gpu=gpu)
    return {part: min(1.0, alone[part] / whole) for part, whole in seconds.items() if whole > 0}


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
    sent = {
        part: statistics.mean(rank["collectives"].get(part, 0.0) * rank[part] for rank in ranks)
        for part in PARTS
    }
    return found | {
        "phased_step_seconds": mean["phased_step_seconds"],
        "seconds_data": mean["data"] - sent["data"],
        "seconds_compute": mean["compute"] - sent["compute"],
        "seconds_optimizer": mean["optimizer"] - sent["optimizer"],
        "seconds_communication": sum(sent.values()),
    }


def _about(trainer: Any, *, num_nodes: int) -> dict[str, Any]:
    from training.run.engine import attention_kernel

    config, plan = trainer.config, trainer.plan
    device = trainer.context.device_name
    return {
        "device": device,
        "datasheet": hardware.lookup(device) is not None,
        "num_workers": plan.num_workers,
        "num_nodes": num_nodes,
        "on_gpu": config.workers.gpu,
        "num_parameters": plan.shape.num_parameters,
        "flops_per_token": plan.flops_per_token,
        "tokens_per_step": plan.tokens_per_step,
        **_sent_bytes(config, plan, num_nodes=num_nodes),
        "sequence_length": config.batch.sequence_length,
        "micro_sequences": config.batch.micro_sequences,
        "accumulation": plan.accumulation,
        "zero_stage": config.zero.stage,
        "precision": config.precision,
        "rule": config.optim.matrix.rule,
        "attention_kernel": attention_kernel(config, device=trainer.context.device),
    }


def _sent_bytes(config: TrainConfig, plan: Plan, *, num_nodes: int) -> dict[str, float | None]:
    """Of a step, by the busiest rank and over the border of the busiest node; None where not counted."""
    names = ("sent_bytes_per_step", "node_bytes_per_step")
    if plan.num_workers == 1:
        return dict.fromkeys(names, 0.0)
    job = traffic.job_of(config, plan.shape, num_ranks=plan.num_workers, accumulation=plan.accumulation)
    if job is None:
        return dict.fromkeys(names)
    on_node = ceil(plan.num_workers / num_nodes)
    found = (max(traffic.sent_bytes(job)), traffic.node_bytes(job, ranks_per_node=on_node))
    return dict(zip(names, found, strict=True))


if __name__ == "__main__":
    sys.exit(main())
