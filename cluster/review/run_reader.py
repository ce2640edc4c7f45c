"""The one reader of a run directory, for whoever looks at a run: pages, comparisons, `make status`.

    run = Run(directory)
    run.state       finished, running, stopped or failed, and why
    run.latest      the newest value of every key of metrics.jsonl
    run.columns     all values of every key, for curves
    run.config, run.changes, run.provenance, run.summary, run.events, run.checkpoints

Everything is read when it is first asked for. A file that is missing or damaged is an empty value and a line
of `run.problems`, never an error: a crashed run, a run that is still going and a run of an older version
can all be looked at. No torch; importing it needs the standard library only.
"""

import json
import os
import platform
import re
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster import files
from cluster.display import duration
from cluster.record import events, row_format
from cluster.review import columns
from cluster.review.columns import Column

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
STATE_OF_END = {"failed": FAILED, "killed": FAILED, "stopped": STOPPED}  # kinds of events
TAIL_BYTES = 1 << 16  # of metrics.jsonl, for the newest rows
PATIENCE_SECONDS = 60.0  # a silent run counts as running for this long, and for three intervals of its rows


@dataclass(frozen=True)
class State:
    """`name` is RUNNING, FINISHED, STOPPED (by a user) or FAILED; `reason`: a sentence, "" if finished."""

    name: str
    reason: str = ""


class Run:
    """A run directory of training, serving or any other command that keeps a record."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metrics = directory / "metrics.jsonl"
        self.requests = directory / "requests.jsonl"
        self.problems: list[str] = []

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.name

    @property
    def serving(self) -> bool:
        """Whether it is a run of the load generator, whose rows are loads and not steps."""
        return self.requests.exists()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, flat: {"optim.matrix.lr": 0.02}; {} if there is none."""
        from cluster import config as layered  # needs omegaconf
        from cluster import runs

        return flat(self._read(self.directory / runs.CONFIG_FILE, layered.read_yaml))

    @property
    def changes(self) -> dict[str, list[Any]] | None:
        """Key -> [default, value] of what differs from the defaults; None if the run did not record it."""
        return self.provenance.get("config_changes")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """provenance.json, or {}."""
        return self._read(self.directory / "provenance.json", files.read_json)

    @property
    def commit(self) -> str | None:
        """The commit of its code, with "+dirty" if there were uncommitted changes."""
        found = self.provenance.get("commit")
        return found and found + "+dirty" * bool(self.provenance.get("dirty"))

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None: the run has not finished."""
        path = self.directory / "summary.json"
        return row_format.decode(self._read(path, files.read_json)) if path.exists() else None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The rows of events.jsonl, oldest first."""
        return events.read(self.directory)

    @cached_property
    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        from cluster import runs  # needs omegaconf

        complete = runs.complete_checkpoints(self.directory / "checkpoints")
        steps = [path.name.removeprefix("step-") for path in complete]
        return [int(step) for step in steps if step.isdigit()]

    @cached_property
    def latest(self) -> dict[str, Any]:
        """The newest value of every key in the last TAIL_BYTES of metrics.jsonl. Fast for any length."""
        merged: dict[str, Any] = {}
        for row in self._tail:
            merged |= row
        return merged

    @cached_property
    def columns(self) -> dict[str, Column]:
        """All numbers of metrics.jsonl by key. True and False are 1 and 0."""
        return columns.of_rows(self.iterate(self.metrics))

    def curve(self, key: str, *, over: str = "step") -> tuple[array, array]:
        """(x, y) of the rows that hold both, in the order of the file; empty without any.

        Args:
            over: "step", "tokens" or "seconds" (of wall time; of the steps alone in a run without that key).
        """
        axis = self.columns.get(over)
        if over == "seconds" and axis is None:
            axis = self._seconds_of_steps
        return columns.curve(self.columns.get(key), axis)

    @cached_property
    def _seconds_of_steps(self) -> Column | None:
        return columns.seconds_of_steps(self.columns)

    @cached_property
    def written(self) -> float | None:
        """When the newest of metrics.jsonl, events.jsonl and provenance.json was written, as a Unix time."""
        names = ("metrics.jsonl", events.FILE, "provenance.json")
        times = [file.stat().st_mtime for name in names if (file := self.directory / name).exists()]
        return max(times, default=None)

    @property
    def last_step(self) -> int | None:
        """The step of the newest row; None before the first."""
        return self.latest.get("step")

    @cached_property
    def planned_steps(self) -> int | None:
        """The steps that the configuration asks for; None if it is no training run."""
        tokens, batch = self.config.get("schedule.tokens"), self.config.get("batch.tokens")
        return tokens // batch if isinstance(tokens, int) and isinstance(batch, int) and batch else None

    @cached_property
    def state(self) -> State:
        """Whether the run has finished, is running or has failed."""
        if self.summary is not None:
            return State(FINISHED)
        if self.written is None:
            return State(FAILED, "the directory holds no row and no provenance.json: no run began here")
        silent = max(0.0, time.time() - self.written)
        since = f"its last row is {duration(silent)} old"
        held = row_format.is_being_written(self.metrics)
        if held:
            due = f", and one was due every {duration(self._interval)}" if silent > self._patience else ""
            return State(RUNNING, since + due)
        if ended := self._end():
            return ended
        if silent <= self._patience and not (held is False and _died_here(self.directory, self.provenance)):
            return State(RUNNING, since)
        return State(FAILED, f"it ended without a summary (killed, or its node was lost); {since}")

    def _end(self) -> State | None:
        """How the newest start of the run ended, if an event or failure.log says so."""
        started = (self.directory / "provenance.json").stat().st_mtime if self.provenance else 0.0
        for event in reversed(self.events):
            if (kind := str(event["kind"])) in STATE_OF_END and _unix(event.get("time")) >= started - 1:
                return State(STATE_OF_END[kind], str(event["text"]))
        log = self.directory / "failure.log"
        if log.exists() and log.stat().st_mtime >= started:
            return State(FAILED, f"{log} has the traceback")
        return None

    @cached_property
    def _tail(self) -> list[dict[str, Any]]:
        return list(self.iterate(self.metrics, last_bytes=TAIL_BYTES))

    @cached_property
    def _interval(self) -> float:
        """Seconds between the newest rows, by the steps' own time; 0 if there are none."""
        timed = [
            row for row in self._tail if all(_is_number(row.get(key)) for key in ("step", "step_seconds"))
        ]
        gaps = [(row["step"] - before["step"]) * row["step_seconds"] for before, row in pairwise(timed)]
        return statistics.median(gaps) if gaps else 0.0

    @property
    def _patience(self) -> float:
        return max(PATIENCE_SECONDS, 3 * self._interval)

    def iterate(self, path: Path, *, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
        """The objects of a JSON lines file. Damaged lines and a torn last one are left out and counted.

        Args:
            last_bytes: read the end only, from the first whole line in it.
        """
        if not path.exists():
            return
        damaged = 0
        with path.open("rb") as file:
            if last_bytes is not None and os.fstat(file.fileno()).st_size > last_bytes:
                file.seek(-last_bytes, os.SEEK_END)
                file.readline()
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written, or torn by a crash
                try:
                    row = json.loads(line)
                    yield row_format.decode(row)
                except (ValueError, TypeError, AttributeError, OverflowError):  # not JSON, or no row
                    damaged += 1
        if damaged:
            self._note(f"{path.name}: {damaged:,} damaged line{'s' * (damaged > 1)} left out")

    def _read(self, path: Path, reader: Callable[[Path], Any]) -> dict[str, Any]:
        try:
            content = reader(path)
        except FileNotFoundError:
            self._note(f"{path.name}: missing")
            return {}
        except (ValueError, OSError) as error:
            self._note(f"{path.name}: cannot be read: {error}")
            return {}
        return content if isinstance(content, dict) else {}

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def _died_here(directory: Path, provenance: dict[str, Any]) -> bool:
    """Whether a run whose lock is free ran on this host, and its launcher has ended too."""
    host, file = provenance.get("host"), directory / row_format.LAUNCHER_LOCK
    if not isinstance(host, dict) or host.get("hostname") != platform.node():
        return False  # a lock of another host may not be seen here
    owner = re.match(r"process (\d+) on ", file.read_text()) if file.exists() else None
    return owner is None or not _is_alive(int(owner[1]))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e15


def _unix(text: Any) -> float:
    """An ISO time as seconds since the epoch; 0 if it is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested mappings; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
