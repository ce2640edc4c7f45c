"""Is the projection right? Steps of 2 and 3 workers, predicted from a step of one worker, and measured.

    python -m tests.lab.projection_check [--rounds N] [--steps N] [--output FILE] [--dry-run] [key=value ...]

Each worker takes the same tokens, on one thread. A prediction uses two measurements: the parts of a step of
one worker (training/baseline/steps.py), and the rates of GEMMs, of passes over memory and of gloo's
collectives with all workers running (tests/lab/projection_ranks.py). The rates are needed because workers
share cores, memory and clocks. A prediction never sees a step of several workers. Runs take turns within a
round; a round takes about five minutes on two quiet cores."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from cluster import cli, display, process
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.measure import benchmark
from tests.lab.projection_ranks import COLLECTIVES
from training import config as training_config
from training.config import TrainConfig
from training.optim_config import SCION_RULES
from training.plan import make_plan
from training.projection.step_model import PARTS, Interconnect, Step, basis_from_row, step_seconds
from training.projection.traffic import job_of

WHAT = "projection"  # in the baseline's name
AIM_PERCENT = 15  # error of a prediction
STAGES = (1, 2, 3)
WORKERS = (1, 2, 3)
DEFAULTS = (  # a step of about a second, a sixth of it in collectives
    *("model.shape=llama-60m", "model.num_layers=4", "model.vocab_size=8192"),
    *("batch.tokens=1024", "batch.sequence_length=256", "batch.micro_sequences=2"),
)
OWN_KEYS = ("launcher", "workers.count", "workers.gpu", "workers.cpus", "zero.stage")
LIMIT_SECONDS, STOP_SECONDS = 600.0, 40.0  # of a command; torchrun gives its ranks 30 s to end
PROBE_BYTES = 1 << 25  # of a collective's buffer; ZeRO's are of the model's size


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    defaults = training_config.load(dotlist=DEFAULTS)
    parser = cli.make_parser("tests.lab.projection_check", description=__doc__.splitlines()[0], keys=defaults)
    benchmark.add_options(parser, what=WHAT, rounds=3, rounds_help="runs of each stage and number of workers")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="timed steps of a run (default: 8)")
    options = parser.parse_args(arguments)

    def body() -> None:
        benchmark.require_rounds(options.rounds)
        if options.steps < 1:
            raise UserError(f"--steps: {options.steps} must be at least 1")
        benchmark.require_free(options.overrides, OWN_KEYS)
        given = [*DEFAULTS, *options.overrides]
        config = training_config.load(file=options.config, dotlist=given)
        make_plan(config, num_workers=1)
        if (rule := config.optim.matrix.rule) in SCION_RULES:
            raise UserError(f"optim.matrix.rule: what {rule} computes is not modelled; use muon")
        prefix = ["--config", str(options.config)] if options.config else []
        if options.dry_run:
            print(layered.to_yaml(config))
            for stage, workers in itertools.product(STAGES, WORKERS):
                print(
                    *steps_command(
                        config, [*prefix, *given], stage=stage, workers=workers, steps=options.steps
                    )
                )
            return
        output = benchmark.prepare_output(options.output, WHAT)
        result = check(config, [*prefix, *given], num_rounds=options.rounds, steps=options.steps)
        print(table(result))
        benchmark.publish(
            result, output, job_type="projection", wandb_mode=options.wandb, config=layered.to_dict(config),
            data_fingerprint=None,
        )  # fmt: skip

    return cli.run(body)


def check(config: TrainConfig, given: Sequence[str], *, num_rounds: int, steps: int) -> dict[str, Any]:
    """Measure and predict: medians with spreads over the rounds, by stage and number of workers."""
    result: dict[str, Any] = {
        "bench": WHAT,
        "arguments": list(given),
        "rounds": num_rounds,
        "steps": steps,
        "cores": os.cpu_count(),
        "tokens_per_worker": config.batch.tokens,
        "load_average_before": benchmark.load_average(),
        "aim_percent": AIM_PERCENT,
    }
    samples: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    for number, stage in itertools.product(range(num_rounds), STAGES):
        probes, measured = {}, {}
        for workers in WORKERS if number % 2 == 0 else WORKERS[::-1]:
            probes[workers] = _last_line(probe_command(given, workers=workers))
            command = steps_command(config, given, stage=stage, workers=workers, steps=steps)
            measured[workers] = _last_line(command)
        rows += measured.values()
        found = {f"measured_seconds_zero{stage}_1_worker": measured[1]["step_seconds"]}
        for workers, probe in probes.items():
            found |= {f"{name}_{workers}": value for name, value in probe.items() if name != "num_ranks"}
        for workers in WORKERS[1:]:
            step = predict(
                config, measured[1], stage=stage, workers=workers, alone=probes[1], together=probes[workers]
            )
            pair = compare(step, measured[workers])
            found |= {f"{name}_zero{stage}_{workers}_workers": value for name, value in pair.items()}
            print(
                f"round {number + 1}/{num_rounds} ZeRO-{stage}, {workers} workers: predicted "
                f"{pair['predicted_seconds']:.3f} s, measured {pair['measured_seconds']:.3f} s, "
                f"{pair['error_percent']:+.1f}%",
                file=sys.stderr,
                flush=True,
            )
        for name, value in found.items():
            samples.setdefault(name, []).append(value)
    medians = benchmark.medians(samples)
    errors = [abs(medians[name]) for name in medians if name.startswith("error_percent_")]
    return result | {"largest_error_percent": max(errors)} | medians | {"runs": rows}


def compare(step: Step, row: Mapping[str, Any]) -> dict[str, float]:
    """Prediction and measurement: seconds of each, and of their parts in the phased pass."""
    links = sum(step.seconds[part] for part in PARTS if part not in ("compute", "optimizer"))
    return {
        "predicted_seconds": step.longest,
        "measured_seconds": row["step_seconds"],
        "error_percent": 100 * (step.longest / row["step_seconds"] - 1),
        "predicted_compute_seconds": step.seconds["compute"],
        "predicted_optimizer_seconds": step.seconds["optimizer"],
        "predicted_communication_seconds": links,
        **{
            f"phased_{name}_seconds": row[f"seconds_{name}"]
            for name in ("compute", "optimizer", "communication")
        },
    }


def predict(
    config: TrainConfig,
    row: Mapping[str, Any],
    *,
    stage: int,
    workers: int,
    alone: Mapping[str, float],
    together: Mapping[str, float],
) -> Step:
    """A step of `workers` workers from `row`, that of one (`training.baseline.steps`).

    Args:
        alone, together: rates of tests/lab/projection_ranks.py with one worker and with `workers`.
    """
    plan = make_plan(config, num_workers=1)
    job = job_of(config, plan.shape, num_ranks=1, accumulation=plan.accumulation)
    assert job is not None, "`main` refuses what is not modelled"
    one = replace(job, stage=stage)
    ceilings = {
        "product_tflops": {"best": alone["products_tflops"]},
        "copy_gb_per_s": {"best": alone["passes_gb_per_s"]},
    }
    basis = basis_from_row([row], ceilings, job=one, source="one worker")
    slowdown = alone["products_tflops"] / together["products_tflops"]
    basis = replace(
        basis,
        compute_seconds_per_token=basis.compute_seconds_per_token * slowdown,
        product_flops=together["products_tflops"] * 1e12,
        memory_bytes_per_s=together["passes_gb_per_s"] * 1e9,
    )
    hop = together["all_reduce_latency_us"] * 1e-6 / (2 * (workers - 1))
    links = Interconnect(
        name="gloo",
        bytes_per_s={kind: together[f"{kind}_gb_per_s"] * 1e9 for kind in COLLECTIVES},
        node_bytes_per_s=inf,
        protocols=((hop, hop, 1.0),),
    )
    return step_seconds(
        replace(one, num_ranks=workers),
        tokens_per_rank=config.batch.tokens,
        ranks_per_node=workers,
        basis=basis,
        links=links,
    )


def table(result: Mapping[str, Any]) -> str:
    """Rates of the workers, and predicted against measured seconds, for people."""
    rates = [
        [
            workers,
            f"{result[f'products_tflops_{workers}']:.3f}",
            f"{result[f'passes_gb_per_s_{workers}']:.1f}",
            *(_shown(result.get(f"{kind}_gb_per_s_{workers}")) for kind in COLLECTIVES),
        ]
        for workers in WORKERS
    ]
    errors = []
    for stage, workers in itertools.product(STAGES, WORKERS[1:]):
        case = f"zero{stage}_{workers}_workers"
        error, spread = result[f"error_percent_{case}"], result[f"spread_error_percent_{case}"]
        seconds = (f"{result[f'{kind}_seconds_{case}']:.3f}" for kind in ("predicted", "measured"))
        percent = (f"{value:+.1f}%" for value in (error, *spread))
        verdict = f"{'within' if abs(error) <= AIM_PERCENT else 'NOT within'} {AIM_PERCENT}%"
        errors.append([stage, workers, *seconds, *percent, verdict])
    heads = ("ZeRO", "workers", "predicted s", "measured s", "error", "[min", "max]", "")
    return "\n\n".join(
        [
            str(display.table(("workers", "TFLOP/s each", "copy GB/s each", *COLLECTIVES), rates)),
            str(display.table(heads, errors, left=(0, -1))),
        ]
    )


def _shown(rate: float | None) -> str | None:
    return None if rate is None else f"{rate:.2f}"


# --- commands ---------------------------------------------------------------------------------------------


def steps_command(
    config: TrainConfig, given: Sequence[str], *, stage: int, workers: int, steps: int
) -> list[str]:
    """`training.baseline.steps` of as many workers, each with the tokens that `config` gives to one."""
    own = [f"workers.count={workers}", f"zero.stage={stage}", f"batch.tokens={workers * config.batch.tokens}"]
    return [*_launcher(workers), "training.baseline.steps", "--steps", str(steps), *given, *own]


def probe_command(given: Sequence[str], *, workers: int) -> list[str]:
    """`tests.lab.projection_ranks` of as many workers."""
    return [*_launcher(workers), "tests.lab.projection_ranks", "--bytes", str(PROBE_BYTES), *given]


def _launcher(workers: int) -> list[str]:
    python = [sys.executable, "-m"]
    many = ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m"]
    return python if workers == 1 else [*python, *many]


def _last_line(command: Sequence[str]) -> dict[str, Any]:
    """The JSON that a command prints last. Raises `RunError` with the end of its output."""
    try:
        done = process.run(command, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(f"{' '.join(command)}: did not end within {LIMIT_SECONDS:.0f} s") from None
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RunError(f"{' '.join(command)}: ended with exit code {done.returncode}:\n{tail}")
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise RunError(f"{' '.join(command)}: its last line is not JSON:\n{done.stdout[-500:]}") from None


if __name__ == "__main__":
    sys.exit(main())
