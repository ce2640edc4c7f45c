"""When a run raises an alarm: the rules behind the warnings and errors in `events.jsonl`.

Rank 0 feeds `LossAlarms`. A thread of another process, if there is one, asks `ProgressAlarm` and `DiskAlarm`
now and then: a process that is stuck cannot report it.
"""

import math
import os
import shutil
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import runs
from cluster.display import number
from cluster.files import size_text
from cluster.record import events, heartbeat

WINDOW = 50  # logged losses that a spike is compared with
LEAST_HISTORY = 20  # logged losses before the first alarm
LEAST_RISE = 0.1  # nats: where the loss is nearly constant, a smaller rise is no spike
CALM = 10  # logged losses below the limit, after which another spike is an event of its own
NORMAL = 1.4826  # standard deviation of a normal distribution / its median absolute deviation
CHECKPOINTS = 2  # that must fit: the next is written before the oldest is deleted, and another may be larger
ENOUGH = 1.1  # free space, as a share of the limit, above which the disk is no longer nearly full


class LossAlarms:
    """Watches the lines of `metrics.jsonl`: loss_not_finite, loss_spike, skipped_steps.

    A loss is a spike if it lies `deviations` standard deviations, and LEAST_RISE, above the median of the
    last WINDOW. Seven deviations are those of OLMo 2's spike score (arXiv 2501.00656, 3.2). There they
    are counted from the mean of the last 1000. Here median and median absolute deviation stand for mean and
    standard deviation, because a spike does not move them; if the loss stays high they follow it after
    WINDOW / 2 lines. While the loss falls fast its deviation is large, and a small spike is missed.

    A spike, a series of skipped steps or of losses that are not finite is one event, however long it lasts.
    """

    def __init__(self, directory: Path, *, deviations: float) -> None:
        """`deviations`: 0 turns loss_spike off."""
        self._directory = directory
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._num_calm = CALM  # losses since the last one above the limit
        self._not_finite: set[str] = set()
        self._num_skipped = 0
        self._skipping = False
        self._reported = {(event["kind"], event["step"]) for event in events.read(directory)}
        self._silent = False
        self.spiked = False  # whether a spike began in the newest line

    def replay(self, rows: list[dict[str, Any]]) -> None:
        """Take in the lines of earlier starts, without events."""
        self._silent = True
        for row in rows[-2 * WINDOW :]:
            self.see(row)
        self._silent = False

    def see(self, row: dict[str, Any]) -> None:
        """Take in a line, as `Record.log` was given it."""
        self.spiked = False
        for key in ("loss", "validation_loss"):
            if key in row:
                self._see_finite(row, key)
        if "skipped_steps" in row:
            self._see_skips(row)
        if math.isfinite(row.get("loss", math.nan)):
            self._see_loss(row)

    def _see_finite(self, row: dict[str, Any], key: str) -> None:
        if math.isfinite(row[key]):
            self._not_finite.discard(key)
        elif key not in self._not_finite:
            self._not_finite.add(key)
            self._report("loss_not_finite", f"the {key.replace('_', ' ')} is {row[key]}", row)

    def _see_skips(self, row: dict[str, Any]) -> None:
        skipped = row["skipped_steps"] - self._num_skipped
        self._num_skipped = row["skipped_steps"]
        if skipped > 0 and not self._skipping:
            what = "1 step was" if skipped == 1 else f"{skipped} steps were"
            self._report("skipped_steps", f"{what} skipped up to here: the gradient was not finite", row)
        self._skipping = skipped > 0

    def _see_loss(self, row: dict[str, Any]) -> None:
        loss, norm = row["loss"], row.get("gradient_norm")
        if self._deviations and len(self._losses) >= LEAST_HISTORY:
            median = statistics.median(self._losses)
            deviation = NORMAL * statistics.median(abs(each - median) for each in self._losses)
            limit = median + max(self._deviations * deviation, LEAST_RISE)
            self.spiked = loss > limit and self._num_calm >= CALM
            if self.spiked:
                now, before, most = (number(value, digits=4) for value in (loss, median, limit))
                text = f"the loss is {now}; the median before is {before}, the limit {most}"
                if norm is not None and self._norms:
                    usual = number(statistics.median(self._norms))
                    text += f"; the gradient norm is {number(norm)}, usually {usual}"
                if "lr" in row:
                    text += f"; the learning rate is {number(row['lr'])}"
                self._report("loss_spike", text, row, loss=loss, median=median, limit=limit)
            self._num_calm = 0 if loss > limit else self._num_calm + 1
        self._losses.append(loss)
        if norm is not None and math.isfinite(norm):
            self._norms.append(norm)

    def _report(self, kind: str, text: str, row: dict[str, Any], **more: Any) -> None:
        """Append the event, unless an earlier start reported it for the same step."""
        if not self._silent and (kind, row["step"]) not in self._reported:
            about = {name: row[name] for name in ("gradient_norm", "lr", "tokens") if name in row}
            events.append(self._directory, kind, text, step=row["step"], **about, **more)


class ProgressAlarm:
    """Raises no_progress when neither `metrics.jsonl` nor a checkpoint has changed for some minutes."""

    def __init__(self, directory: Path, *, minutes: float, observer: str) -> None:
        """`minutes`: 0 turns it off. `observer`: who watches, for the event."""
        self._directory = directory
        self._limit = 60 * minutes
        self._observer = observer
        self._seen = self._state()
        self._quiet_seconds = 0.0
        self._reported = False

    def check(self, *, seconds: float) -> None:
        """Look again. seconds: since the last call, without time in which this process itself stood still."""
        state = self._state()
        if state != self._seen:
            if self._reported:
                text = f"the run moves again, after {self._quiet_seconds / 60:.1f} minutes"
                self._report("progress", text, since=("no_progress",))
            self._seen, self._quiet_seconds, self._reported = state, 0.0, False
            return
        self._quiet_seconds += seconds
        if self._limit and self._quiet_seconds >= self._limit and not self._reported:
            self._reported = True
            text = (
                f"no new line in metrics.jsonl for {self._quiet_seconds / 60:.1f} minutes, seen from "
                f"{self._observer}; a worker may hang: look at the processes, or stop the run and run the "
                "same command again, which resumes it (record.stalled_minutes)"
            )
            self._report("no_progress", text, since=("progress", *events.STARTS, *events.WORKERS))

    def _report(self, kind: str, text: str, *, since: Sequence[str]) -> None:
        """Append the event, unless another observer has."""
        events.append_first(self._directory, kind, text, among=(kind,), since=since)

    def _state(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stat, (self._directory / "metrics.jsonl", self._directory / "checkpoints")))


class StragglerAlarm:
    """Raises straggler for a rank that is slow (`heartbeat.stragglers`) at each of LOOKS looks in a row."""

    LOOKS, LOOK_SECONDS = 6, 10.0

    def __init__(self, directory: Path, *, fraction: float) -> None:
        self._directory, self._fraction = directory, fraction
        self._times: Counter[int] = Counter()  # rank -> looks in a row
        self._seconds = 0.0  # since the last look

    def check(self, *, seconds: float) -> None:
        """Look again, if it is time. seconds: since the last call."""
        self._seconds += seconds
        if self._seconds < self.LOOK_SECONDS:
            return
        self._seconds = 0.0
        slow = heartbeat.stragglers(heartbeat.read(self._directory), fraction=self._fraction)
        self._times = Counter({rank: self._times[rank] + 1 for rank in slow})
        for rank, text in slow.items():
            if self._times[rank] == self.LOOKS:
                events.append(self._directory, "straggler", f"{text} (record.straggler_fraction)", rank=rank)


class DiskAlarm:
    """Raises disk_nearly_full when less than `gigabytes`, or than CHECKPOINTS checkpoints, is free."""

    def __init__(self, directory: Path, *, gigabytes: float) -> None:
        self._directory = directory
        self._bytes = gigabytes * 1e9
        self._reported = False

    def check(self) -> None:
        """Look again. Raises `OSError`: the file system does not answer."""
        free = shutil.disk_usage(self._directory).free
        newest = runs.complete_checkpoints(self._directory / "checkpoints")[-1:]
        checkpoint = sum(file.stat().st_size for folder in newest for file in folder.iterdir())
        limit = max(self._bytes, CHECKPOINTS * checkpoint)
        if free < limit and not self._reported:
            self._reported = True
            why = f"a checkpoint takes {size_text(checkpoint)}" if checkpoint else "record.disk_free_gb"
            text = f"{size_text(free)} free at {self._directory}, less than {size_text(limit)} ({why})"
            events.append(self._directory, "disk_nearly_full", f"{text}; free some space", free_bytes=free)
        elif free > ENOUGH * limit:
            self._reported = False


def _stat(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file is appended to or replaced; None if it does not exist."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
