"""The W&B segments of a run directory, and the copies of them that `make sync` sends.

A run has a segment for each of its starts: `wandb/[offline-]run-TIME-ID/run-ID.wandb` and the folder `files`
beside it. A resumed run repeats the rows that it keeps, and moves the segments before it to `wandb/earlier`:
of those, artifacts and system metrics are still to be sent.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster import runs
from cluster.record import wandb_log
from cluster.record.wandb_mirror import EARLIER

_FOLDER = re.compile(r"(offline-)?run-\d{8}_\d{6}-.+")
_STATE = ".syncstate"  # of W&B, beside a log: where its rows begin
STAGING = Path("artifacts/staging")  # under WANDB_DATA_DIR: files of artifacts, until they are uploaded


@dataclass(frozen=True)
class Segment:
    """What one start of a run left for W&B.

    Attributes:
        run: the run directory.
        log: W&B's transaction log.
        id, entity, project: of the W&B run; the entity is "" if it is the user's default.
        started: Unix time in seconds.
    """

    run: Path
    log: Path
    id: str
    entity: str
    project: str
    started: float

    @property
    def name(self) -> str:
        """For people: where the run directory lies."""
        return name_of(self.run)

    @property
    def online(self) -> bool:
        """Whether the run sent its rows itself, as far as its connection held."""
        return not self.log.parent.name.startswith("offline-")

    @property
    def marker(self) -> Path:
        """W&B's own marker of a log that was sent."""
        return self.log.with_name(f"{self.log.name}.synced")

    @property
    def sent(self) -> bool:
        """Whether the log is in W&B as it is now."""
        return self.marker.exists() and self.marker.stat().st_mtime_ns >= self.log.stat().st_mtime_ns

    @cached_property
    def first_step(self) -> int | None:
        """The first step that this start logged. A resumed run repeats the steps after its checkpoint."""
        rows = filter(None, map(wandb_log.row_of, wandb_log.read(self.log)))
        return next((row["step"] for row in rows if _is_of_record(row)), None)


def name_of(run: Path) -> str:
    """The path of a run directory in outputs/, or as it is."""
    outputs = runs.OUTPUTS.absolute()
    return str(run.relative_to(outputs) if run.is_relative_to(outputs) else run)


def find(run: Path) -> list[Segment]:
    """The segments of a run directory, the oldest first. A log that ends before it names its run is left out.

    Raises:
        ValueError: a log is not one that this version of wandb writes.
    """
    segments, run = [], run.absolute()
    logs = [*run.glob("wandb/*run-*/run-*.wandb"), *run.glob(f"wandb/{EARLIER}/*run-*/run-*.wandb")]
    for log in logs:
        if _FOLDER.fullmatch(log.parent.name) and not log.parent.is_symlink():
            records = (record.run for record in wandb_log.read(log) if record.HasField("run"))
            if about := next(records, None):
                started = about.start_time.seconds + about.start_time.nanos / 1e9
                segments.append(Segment(run, log, about.run_id, about.entity, about.project, started))
    return sorted(segments, key=lambda segment: segment.started)


@dataclass
class Staged:
    """The copy of a segment without the rows that W&B has, or that a later start of the run repeats.

    Attributes:
        log: the copy.
        num_rows: rows in the copy.
        num_there: rows that W&B has already.
        num_superseded: rows left out because a later segment holds their steps.
        expected: the rows that W&B must show after the copy is sent.
        live: the run still writes to the segment, so it is not marked as sent.
        problem: why the segment is not in W&B; "" if it is.
    """

    segment: Segment
    log: Path
    live: bool
    num_rows: int = 0
    num_there: int = 0
    num_superseded: int = 0
    expected: Counter[Any] = field(default_factory=Counter)
    problem: str = ""

    @classmethod
    def make(
        cls,
        segment: Segment,
        *,
        folder: Path,
        there: Sequence[dict[str, Any]] | None,
        later: Sequence[Segment],
        live: bool,
    ) -> "Staged":
        """Copy a segment to `folder`, which is replaced.

        Args:
            there: the rows that W&B has of this run; None if the server cannot tell.
            later: the later segments of the run. Those that are sent own its summary; of the others, the
                steps are left out here. The last segment alone ends the run in W&B.
            live: the run goes on, so leave it unfinished in W&B.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "files").symlink_to(segment.log.parent / "files")
        staged = cls(segment, folder / segment.log.name, live)
        staged._write_state(there)
        repeated = [each.first_step for each in later if not each.sent and each.first_step is not None]
        records = staged._kept(identities(there or ()), superseded_from=min(repeated, default=None))
        if any(each.sent for each in later):
            records = (record for record in records if not record.HasField("summary"))
        records = _ended_once(records, finished=not (live or later))
        wandb_log.write(staged.log, records)
        return staged

    def settle(self) -> None:
        """Mark the segment as sent, or keep what the next attempt needs; remove the copy."""
        state = self.log.with_name(self.log.name + _STATE)
        if state.exists():
            shutil.copy(state, self.segment.log.parent)
        if not self.problem and not self.live:
            written = self.segment.log.stat()
            self.segment.marker.touch()
            if self.segment.marker.stat().st_mtime_ns < written.st_mtime_ns:  # a clock that went back
                os.utime(self.segment.marker, ns=(written.st_mtime_ns, written.st_mtime_ns))
        shutil.rmtree(self.log.parent)
        with suppress(OSError):  # it holds another copy
            self.log.parent.parent.rmdir()

    def _kept(self, there: Counter[Any], *, superseded_from: int | None) -> Iterator[Any]:
        there = there.copy()
        statistics: list[Any] = []
        for record in wandb_log.read(self.segment.log):
            row = wandb_log.row_of(record)
            if row is not None:
                identity = identify(row)
                self.expected[identity] += 1
                if there[identity]:
                    there[identity] -= 1
                    self.num_there += 1
                    statistics.clear()  # system metrics go the same way as rows, and are there too
                    continue
                if superseded_from is not None and _is_of_record(row) and row["step"] >= superseded_from:
                    self.expected[identity] -= 1
                    self.num_superseded += 1
                    continue
                self.num_rows += 1
            elif record.HasField("artifact"):
                self._find_files(record.artifact)
            elif record.HasField("stats"):
                statistics.append(record)
                continue
            yield from statistics
            statistics.clear()
            yield record
        yield from statistics

    def _find_files(self, artifact: Any) -> None:
        """Let the artifact's files be where they are after `make pull`, on a machine that did not run.

        A log that came from elsewhere cannot name other files of this machine: they would be uploaded.
        """
        folder = self.segment.run / "wandb"
        for entry in artifact.manifest.contents:
            path = Path(entry.local_path)
            if entry.local_path and not (path.exists() and path.resolve().is_relative_to(folder.resolve())):
                # wandb removes a file that it uploaded, and asks for it only if the server lacks it
                entry.local_path = str(folder / STAGING / path.name)

    def _write_state(self, there: Sequence[dict[str, Any]] | None) -> None:
        """Say where the rows of the copy begin: after those of the server, in W&B's own step and time.

        wandb would ask the server's summary, which lags behind by seconds, and overwrite rows.
        """
        if there is None:
            state = self.segment.log.with_name(self.segment.log.name + _STATE)
            if state.exists():
                shutil.copy(state, self.log.parent)
            return
        step = max((row["_step"] for row in there), default=-1) + 1
        milliseconds = round(1000 * max((row.get("_runtime", 0.0) for row in there), default=0.0))
        content = json.dumps({"starting_step": step, "starting_runtime": milliseconds})
        self.log.with_name(self.log.name + _STATE).write_text(content)


def _ended_once(records: Iterable[Any], *, finished: bool) -> Iterator[Any]:
    """The records with a single end, in last place. A run that timed out may have two, with rows between.

    Without an end, wandb ends the run as failed. With one that is not `finished`, the run goes on in W&B.
    """
    record = end = None
    for record in records:
        if record.HasField("exit"):
            end = record
        else:
            yield record
    if not finished and record is not None:
        end = type(record)()
        end.exit.not_complete = True
    if end is not None:
        yield end


def identify(row: dict[str, Any]) -> Any:
    """What makes a row the same row: the step of a row of the record; the content of tables and images."""
    if _is_of_record(row):
        return row["step"]
    media = {key: value.get("sha256") or value.get("path") if isinstance(value, dict) else value
             for key, value in row.items()}  # fmt: skip
    return json.dumps(media, sort_keys=True)


def identities(rows: Sequence[dict[str, Any]]) -> Counter[Any]:
    """How often each row is there. W&B's own keys, `_step` and others, do not matter."""
    return Counter(identify({k: v for k, v in row.items() if not k.startswith("_")}) for row in rows)


def _is_of_record(row: dict[str, Any]) -> bool:
    """Whether it came through `Record.log`. A table alone carries the step too, by `define_metric`."""
    return isinstance(row.get("step"), int) and any(
        not isinstance(value, dict) for key, value in row.items() if key != "step"
    )
