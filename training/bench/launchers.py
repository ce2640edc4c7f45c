"""The launcher's cost: the same loop under Ray Train and under torchrun, in turns, on CPU workers.

Measured: the steady optimizer step by the loop's own clock, without evaluation, checkpoints and the report to
Ray after each checkpoint; and the wall time from the start of the command to the row of step 1 in
`metrics.jsonl`, data prepared and W&B off.

Ray's own processes need CPU time too. If the workers use all cores, the step slows down by as much; with
workers.count=1 on two cores, Ray has a core of its own.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.display import Table, show
from cluster.measure import benchmark, probe
from cluster.measure.turns import turns
from cluster.process import Child
from cluster.progress import Progress
from cluster.record.record import follow
from cluster.session import free_ports
from training import config as training_config
from training.config import TrainConfig
from training.data.dataset import Manifest
from training.data.prepare import prepare
from training.plan import Plan, make_plan

WHAT = "train_launcher"  # in the baseline's name
LAUNCHERS = {"ray": "ray", "torchrun": "torch"}  # name here -> value of the key `launcher`
DEFAULTS = (  # replace those of training.config and those of a --config file
    "evaluation.every_steps=1000000",  # so only before the first step and after the last
    "evaluation.sequences=16",
    "evaluation.sample_tokens=0",
    "checkpoint.every_steps=1000000",
    "record.every_steps=1",
    "record.wandb=disabled",
    "workers.gpu=false",
)
OWN_KEYS = ("launcher", "run.name", "run.directory", "record.every_steps", "workers.gpu")
NUM_STEPS = 14  # of a run, unless schedule.tokens is given
SETTLING_STEPS = 4  # left out of the steady state: first allocations, rising clocks
POLL_SECONDS = 0.1  # resolution of the time to the first step
STOP_SECONDS = 40.0  # torchrun gives its ranks 30 s to end before it kills them


@dataclass(frozen=True)
class LaunchTimes:
    """Seconds of a run: from the start of the command to the row of step 1, and of the median steady step."""

    first_step_seconds: float
    step_seconds: float


def compare_launchers(options: argparse.Namespace) -> None:
    """The body of `python -m training.bench` without --peers. Raises `UserError` before anything runs."""
    benchmark.require_free(options.overrides, OWN_KEYS)
    keys = run_keys(options.overrides, file=options.config)
    config = training_config.load(file=options.config, dotlist=keys)
    plan = make_plan(config)
    if plan.num_steps <= SETTLING_STEPS:
        raise UserError(f"schedule.tokens: makes {plan.num_steps} steps; use over {SETTLING_STEPS}")
    given = ["--config", str(options.config), *keys] if options.config else keys
    if options.dry_run:
        show(layered.to_yaml(config), plan.table())
        for name in LAUNCHERS:
            print(*command_line(name, given, num_workers=plan.num_workers, folder=Path("FOLDER")))
        return
    output = benchmark.prepare_output(options.output, WHAT)
    result, fingerprint = bench(config, plan, given, num_rounds=options.rounds)
    benchmark.publish(
        result, output, job_type="launcher-bench", wandb_mode=options.wandb,
        config=layered.to_dict(config), data_fingerprint=fingerprint,
    )  # fmt: skip


def run_keys(overrides: Sequence[str] = (), *, file: Path | None = None) -> list[str]:
    """The key=value pairs of every run: NUM_STEPS of the batch that is asked for, DEFAULTS, `overrides`."""
    batch = training_config.load(file=file, dotlist=overrides).batch
    return [f"schedule.tokens={NUM_STEPS * batch.tokens}", *DEFAULTS, *overrides]


def bench(
    config: TrainConfig, plan: Plan, given: list[str], *, num_rounds: int
) -> tuple[dict[str, Any], str]:
    """Prepare the data, print the ceiling, measure, print the table.

    Returns the result, and the fingerprint of the data.
    """
    result: dict[str, Any] = {
        "bench": WHAT,
        "arguments": given,
        "rounds": num_rounds,
        "num_workers": plan.num_workers,
        "num_parameters": plan.shape.num_parameters,
        "tokens_per_step": plan.tokens_per_step,
        "steps_per_run": plan.num_steps,
        "load_average_before": benchmark.load_average(),
    }
    data = prepare(config.data, report=lambda line: print(line, file=sys.stderr))
    gflops, dtype = gemm_gflops(config, plan)
    floor = plan.flops_per_token * plan.tokens_per_step / (plan.num_workers * gflops * 1e9)
    result |= {"gemm_dtype": dtype, "gemm_gflops_per_worker": gflops, "floor_step_seconds": floor}
    print(f"ceiling: {gflops:.1f} GFLOP/s per worker in this model's {dtype} products, all workers at once")
    print(
        f"floor:   {floor:.3f} s per step = {plan.flops_per_token:,} FLOPs per token x "
        f"{plan.tokens_per_step:,} tokens / ({plan.num_workers} x {gflops:.1f} GFLOP/s), optimizer excluded",
        flush=True,
    )
    result |= compare(measure(plan, given, num_rounds=num_rounds))
    show(*table(result))
    return result, Manifest.read(data).fingerprint


def measure(plan: Plan, given: list[str], *, num_rounds: int) -> list[dict[str, LaunchTimes]]:
    """One run under each launcher per round; who goes first changes from round to round."""
    rounds: list[dict[str, LaunchTimes]] = [{} for _ in range(num_rounds)]
    order = [(i, name) for i in range(num_rounds) for name in turns(list(LAUNCHERS), i)]
    with Progress(len(order) * plan.num_steps) as progress:
        for num_done, (i, name) in enumerate(order):
            steps_before = num_done * plan.num_steps
            run = one_run(name, given, plan=plan, progress=progress, steps_before=steps_before)
            times = f"first step after {run.first_step_seconds:.1f} s, then {run.step_seconds:.3f} s per step"
            progress.note(f"round {i + 1}/{num_rounds} {name}: {times}")
            rounds[i][name] = run
    return rounds


def one_run(name: str, given: list[str], *, plan: Plan, progress: Progress, steps_before: int) -> LaunchTimes:
    """Run the launch command to its end in a folder of its own. Raises `RunError` if it fails."""
    # In /tmp, because a path of Ray's sockets must stay below 108 characters.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp", ignore_cleanup_errors=True) as place:
        folder, rows, first_step_seconds = Path(place), [], 0.0
        command = command_line(name, given, num_workers=plan.num_workers, folder=folder)
        metrics, log = folder / "outputs" / name / "metrics.jsonl", folder / "log"
        started = time.monotonic()
        with child(command, log=log, ray_folder=folder) as process:
            for row in follow(metrics, stop=lambda: process.poll() is not None, poll_seconds=POLL_SECONDS):
                if row["step"] == 1:
                    first_step_seconds = time.monotonic() - started
                rows.append(row)
                progress.update({**row, "step": steps_before + row["step"]})
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            raise RunError(f"the run under {name} ended with exit code {process.returncode}:\n{tail}")
        return LaunchTimes(first_step_seconds, steady_step_seconds(rows))


def command_line(name: str, given: Sequence[str], *, num_workers: int, folder: Path) -> list[str]:
    """The command of a run under the launcher `name`, which keeps its run directory in `folder`."""
    launcher = [sys.executable, "-m"]
    if name == "torchrun":
        num_processes, port = f"--nproc-per-node={num_workers}", f"--master-port={free_ports(1)[0]}"
        launcher += ["torch.distributed.run", num_processes, port, "-m"]
    own = [f"launcher={LAUNCHERS[name]}", f"run.name={name}", f"run.directory={folder / 'outputs'}"]
    return [*launcher, "training.launch", *given, *own]


@contextmanager
def child(command: Sequence[str], *, log: Path, ray_folder: Path) -> Iterator[Child]:
    """The running command, which is ended if the block is left before it is done."""
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder)}
    with log.open("wb") as stream, Child(command, stdout=stream, stderr=stream, env=environment) as process:
        try:
            yield process
        finally:
            process.end(STOP_SECONDS)  # on SIGTERM both launchers end their workers


def steady_step_seconds(rows: Iterable[dict[str, Any]]) -> float:
    """The median step of a run, from its rows, without the first SETTLING_STEPS."""
    return statistics.median(row["step_seconds"] for row in rows if row["step"] > SETTLING_STEPS)


def compare(rounds: Sequence[dict[str, LaunchTimes]]) -> dict[str, Any]:
    """Medians with spreads [min, max] over the rounds: seconds under each launcher, and their ratio.

    A speed-up is torchrun's seconds / Ray's of the same round. `overhead_ray_percent` is what a steady step
    takes longer under Ray, by the median ratio.
    """
    samples: dict[str, list[float]] = {}
    for case in ("step", "first_step"):
        ray, torchrun = ([getattr(runs[name], f"{case}_seconds") for runs in rounds] for name in LAUNCHERS)
        samples |= {
            f"speedup_torchrun_{case}": benchmark.ratios(torchrun, ray),
            f"{case}_seconds_ray": ray,
            f"{case}_seconds_torchrun": torchrun,
        }
    medians = benchmark.medians(samples)
    return {**medians, "overhead_ray_percent": 100 * (1 / medians["speedup_torchrun_step"] - 1)}


def table(result: dict[str, Any]) -> tuple[Table, str]:
    """The result of `compare`, for people."""
    return benchmark.table(result), f"overhead_ray_percent {result['overhead_ray_percent']:+.2f}"


def gemm_gflops(config: TrainConfig, plan: Plan) -> tuple[float, str]:
    """GFLOP/s per worker, and the dtype, of the model's matrix products: one micro-batch, there and back.

    All workers measure at once (`cluster.measure.probe`), on `workers.cpus` threads each, because they share
    caches and clocks.
    """
    import torch

    from optim.precision import product_dtype

    wanted = torch.bfloat16 if config.is_bf16 else torch.float32
    dtype = str(product_dtype(wanted, torch.device("cpu"))).removeprefix("torch.")
    counts = plan.shape.products()
    tokens = config.batch.micro_sequences * config.batch.sequence_length

    def tflops(num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        return probe.measure_products(counts, num_rows=tokens, device="cpu", dtype=dtype).best

    with ThreadPoolExecutor(plan.num_workers) as pool:
        threads = [max(1, int(config.workers.cpus))] * plan.num_workers
        return 1e3 * statistics.harmonic_mean(pool.map(tflops, threads)), dtype
