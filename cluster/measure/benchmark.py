"""What every bench shares: medians with spreads, their table, the options, the baseline file, the last line.

A comparison's key is `speedup_<peer>_<case>`, the median over the rounds of the peer's time / ours within one
round, so above 1 where ours is faster; beside it stands `spread_<peer>_<case>`, [min, max].
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import display, files
from cluster.cli import RunError, UserError
from cluster.machine.host import describe_host
from cluster.record import provenance
from cluster.record.record import WANDB_MODES
from cluster.record.result import record_result
from cluster.session import ROOT

MAX_LOAD = 0.25  # per core: two threads that wait for each other on a busy core take many times as long


def add_options(parser: argparse.ArgumentParser, *, what: str, rounds: int, rounds_help: str) -> None:
    """Add --rounds and --output to the command line of the bench `what`."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help=f"{rounds_help} (default: {rounds})"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: tests/baselines/<hardware>_{what}.json"
    )
    parser.add_argument("--wandb", choices=WANDB_MODES, default="auto", help="W&B mode (default: auto)")


def measure_and_publish(
    options: argparse.Namespace,
    *,
    what: str,
    plan: str,
    measure: Callable[[], Mapping[str, Any]],
    shown: Callable[[Mapping[str, Any]], display.Table] | None = None,
) -> None:
    """The body of a bench of the launcher: check, measure, print the table, publish.

    Args:
        options: of `add_options`, and --dry-run, which prints `plan` alone.
        shown: makes the table of a result; by default `table`.
    """
    require_rounds(options.rounds)
    if options.dry_run:
        print(plan)
        return
    output = prepare_output(options.output, what)
    result = {"bench": what, "load_average_before": load_average()}
    result |= measure()
    display.show((shown or table)(result))
    publish(result, output, job_type="launcher-bench", wandb_mode=options.wandb, data_fingerprint=None)


def busy(load_average: float, *, cores: int | None) -> str | None:
    """That a machine was too busy to measure, by its load average before, or None.

    cores: of the machine; None: of this one.
    """
    cores = cores or os.cpu_count() or 1
    if load_average <= MAX_LOAD * cores:
        return None
    return f"busy before it was measured (load average {load_average:.1f} on {cores} cores)"


def load_average() -> float:
    """This machine's load over the last minute, for `load_average_before`. Warns on stderr if it is busy."""
    load = os.getloadavg()[0]
    if found := busy(load, cores=None):
        print(f"this machine was {found}: times will say little", file=sys.stderr)
    return load


def require_rounds(num_rounds: int) -> None:
    """Refuse a number of rounds below 1: there would be no median."""
    if num_rounds < 1:
        raise UserError(f"--rounds: {num_rounds} must be at least 1")


def require_free(overrides: Sequence[str], own_keys: Sequence[str]) -> None:
    """Refuse a key=value whose key the command itself sets."""
    for argument in overrides:
        if argument.partition("=")[0] in own_keys:
            raise UserError(f"{argument}: leave it out; this command itself sets {', '.join(own_keys)}")


def ratios(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
    """The peer's seconds / ours of each round. Raises `RunError` if ours is not above 0 in every round."""
    if min(ours) <= 0:
        raise RunError(
            f"a time of ours came out as {display.number(min(ours))} s, the difference of two measurements: "
            "this machine is too busy to measure it; stop what else runs, or use more --rounds"
        )
    return [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]


def medians(samples: Mapping[str, Sequence[float] | None]) -> dict[str, Any]:
    """The median of each key, and its spread [min, max]; both None if nothing was measured."""
    found: dict[str, Any] = {}
    for key, values in samples.items():
        found[key] = statistics.median(values) if values else None
        found[spread_of(key)] = [min(values), max(values)] if values else None
    return found


def spread_of(key: str) -> str:
    """The key of the spread that belongs to the median under `key`."""
    return f"spread_{key.removeprefix('speedup_')}"


def table(result: Mapping[str, Any]) -> display.Table:
    """A table of every median in `result` with its spread; a dash where nothing was measured."""
    rows = [
        (key, *(None if value is None else f"{value:.3f}" for value in values))
        for key, *values in _medians(result)
    ]
    return display.table(("", "median", "min", "max"), rows)


def _medians(result: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Key, median, min and max of every median in `result`."""
    keys = [key for key in result if spread_of(key) in result]
    return [(key, result[key], *(result[spread_of(key)] or (None, None))) for key in keys]


def baseline_path(host: Mapping[str, Any], what: str) -> Path:
    """tests/baselines/<CPU model>-<number>-cores[-held-to-<tier>][-<GPU model>-<number>-gpus]_<what>.json."""
    name = f"{host['cpu']} {host['cpu_cores']} cores"
    if tier := host.get("cpu_held_to"):
        name += f" held to {tier}"
    if gpus := host.get("gpus"):
        name += f" {gpus[0]} {len(gpus)} gpus"
    return ROOT / "tests" / "baselines" / f"{files.slug(name)}_{what}.json"


def prepare_output(output: Path | None, what: str) -> Path:
    """The file to write, `output` or the baseline of this machine, in a folder that exists."""
    path = output or baseline_path(describe_host(), what)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def publish(
    result: Mapping[str, Any],
    output: Path,
    *,
    job_type: str,
    wandb_mode: str,
    data_fingerprint: str | None,
    config: Mapping[str, Any] | None = None,
    project: str = "asuncion",
) -> None:
    """Write `result` and where it comes from to `output`; the last line on stdout is `result` as JSON.

    Args:
        job_type: of `cluster.record.wandb_keys`. The record lies in `record_directory(output)`; W&B shows all
            medians and spreads as a table.
        config: the resolved keys, for W&B.
    """
    about = provenance.collect(command=sys.argv, data_fingerprint=data_fingerprint)
    files.write_json(output, {**result, "provenance": about})
    status = record_result(
        record_directory(output),
        job_type=job_type,
        name=output.stem,
        config=config or {},
        provenance=about,
        summary=result,
        wandb_mode=wandb_mode,
        project=project,
        tables={"medians": (("quantity", "median", "min", "max"), _medians(result))},
        attachments=[output],
    )
    print(f"written to {output}")
    print(f"W&B: {status}")
    print(json.dumps(result))


def record_directory(output: Path) -> Path:
    """The run directory of a result: beside its file; in outputs/ if the file is a committed baseline."""
    is_baseline = output.parent.absolute() == ROOT / "tests" / "baselines"
    return ROOT / "outputs" / output.stem if is_baseline else output.with_suffix("")
