"""`make status` without a cluster: the newest runs here, how far they are, and their newest alarms.

    python -m cluster.review.status [RUN ...]

`cluster.head.answers` shows the same lines of a cluster's runs, with a Python that has no packages.
"""

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.display import duration
from cluster.heart import drained
from cluster.record import events, heartbeat, row_format
from cluster.review.run_reader import RUNNING, Run

NEWEST_RUNS = 3
HEALTH_FILE = "health.json"  # in a run directory (`training.run.state.health`)
NEWEST_ALARMS = 3  # of each run


def report(outputs: Path, *, most: int = NEWEST_RUNS) -> list[str]:
    """Lines about the newest runs in a folder, and about all that wait for workers, the newest first."""
    runs = [Run(path) for path in outputs.glob("*/") if not path.name.startswith(".")]
    begun = sorted(
        ((written, run) for run in runs if (written := _written(run))), key=lambda pair: pair[0], reverse=True
    )
    shown = [run for place, (_, run) in enumerate(begun) if place < most or _waits(run)]
    return [*_drained(outputs), *(line for run in shown for line in lines_of(run))]


def _drained(outputs: Path) -> list[str]:
    """The GPUs that no run uses until a user clears them."""
    try:
        found = drained.read(outputs)
    except (OSError, ValueError) as error:  # which hides no run
        return [f"  {error}"]
    return [f"  GPU {each}; mended? `make clear ARGS={each.name}`" for each in found]


def lines_of(run: Run) -> list[str]:
    """How far a run is, and its newest warnings and errors. Needs the standard library only."""
    try:
        return _lines_of(run)
    except (OSError, ValueError, TypeError) as error:  # which hides no other run
        return [f"  run {run.name:<24}cannot be read: {error}"]


def _waits(run: Run) -> dict[str, Any] | None:
    """The event that it waits for its workers, if that is the newest and its launcher lives."""
    if not row_format.is_being_written(run.directory / row_format.LAUNCHER_LOCK) or not run.events:
        return None
    newest = run.events[-1]
    return newest if newest["kind"] == "waiting" else None


def _written(run: Run) -> float | None:
    try:
        return (run.directory / events.FILE).stat().st_mtime if _waits(run) else run.written
    except OSError:  # deleted at this moment, or another user's
        return None


def _lines_of(run: Run) -> list[str]:
    if waits := _waits(run):
        return [f"  run {run.name:<24}{'waiting':<10}{waits['text']}"]
    state = run.state
    planned = next((event["num_steps"] for event in reversed(run.events) if "num_steps" in event), None)
    step = "no step yet" if run.last_step is None else f"step {run.last_step:,}"
    if planned and run.last_step is not None:
        step += f" of {planned:,}"
    if run.serving and run.last_step is not None:
        step = f"{run.last_step:,} load{'s' * (run.last_step != 1)}"
    lines = [f"  run {run.name:<24}{state.name:<10}{step}{f'; {state.reason}' if state.reason else ''}"]
    if state.name == RUNNING:
        shown = (*heartbeat.describe(run.directory), *_progress(run), *_health(run))
        lines += [f"      {line}" for line in shown]
    alarms = events.alarms(run.events)
    if len(alarms) > NEWEST_ALARMS:
        lines.append(f"      {len(alarms) - NEWEST_ALARMS} earlier warnings and errors in {events.FILE}")
    return lines + [f"      {events.describe(event)}" for event in alarms[-NEWEST_ALARMS:]]


def _progress(run: Run) -> list[str]:
    """How old the newest checkpoint is, and how long a step waits for its data."""
    marks = sorted(run.directory.glob("checkpoints/step-*/COMPLETE"))
    if run.serving or not (marks or "data_wait_seconds" in run.latest):
        return []
    text = "no checkpoint yet"
    if marks:
        text = (
            f"checkpoint {marks[-1].parent.name} is {duration(time.time() - marks[-1].stat().st_mtime)} old"
        )
    if {"data_wait_seconds", "step_seconds"} <= run.latest.keys():
        share = run.latest["data_wait_seconds"] / (run.latest["step_seconds"] or 1)
        text += f"; {share:.0%} of a step waits for data"
    return [text]


def _health(run: Run) -> list[str]:
    """What the last look at the nodes found, if it found anything."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((run.directory / HEALTH_FILE).read_text())
        if number := found["health_problems"]:
            hot = f", GPUs throttled: {each}" if (each := found["health_throttled_gpus"]) else ""
            ago = duration(time.time() - found["time"])
            return [f"nodes: {number} open problem{'s' * (number != 1)}{hot}, {ago} ago"]
    return []


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    from cluster import cli, runs  # needs packages

    parser = argparse.ArgumentParser(
        prog="python -m cluster.review.status", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's name or directory")
    named = parser.parse_args().runs

    def body() -> None:
        lines = [line for name in named for line in lines_of(Run(runs.directory_of(name)))]
        lines = lines or report(runs.OUTPUTS)
        print("\n".join(lines or [f"no runs in {runs.OUTPUTS.absolute()}; `make train` makes one"]))

    return cli.run(body)


if __name__ == "__main__":
    raise SystemExit(main())
