"""The heartbeat of each rank of a run, and the end of a run that hangs.

    outputs/<run>/ranks/00003.json      how far rank 3 is, every BEAT_SECONDS
    outputs/<run>/ranks/00003.stacks    where its threads stood when the run hung

A rank that makes no progress for longer than it may is hung. Its own watching thread sees that; if the rank
is stopped altogether, the threads of the ranks that wait for it do. They write the stacks of all ranks, name
the one that the others wait for, and end their processes: a thread that waits in a collective cannot be
interrupted. Then the launcher restarts the run, or ends it.

The readers need the standard library only.
"""

import faulthandler
import json
import os
import platform
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

FOLDER = "ranks"  # in the run directory
BEAT_SECONDS = 5.0
GRACE_SECONDS = 5.0  # in which the other ranks write where they stand, before the run is ended
STEP_PARTS = ("data", "forward", "backward", "optimizer", "row")
FIRST_STEPS = 3  # of a start: they may compile, or fill caches
# A part that has not been seen yet may take so many times `hang_seconds`; parts that are no steps, such as a
# checkpoint on slow storage, may take so many times `hang_seconds` longer than the longest one before.
FIRST_TIMES, OTHER_TIMES = 30.0, 10.0
FORWARDS = 3  # forward passes that take as long as a forward and a backward pass
SILENT_SECONDS = 30.0  # without a heartbeat, or without progress, after which a person is told
STRAGGLER_FRACTION = 0.25  # that a rank's forward pass takes longer than the median, for `describe`
COLLECTIVES = "distributed_c10d.py"  # of torch: a rank that stands there waits for another


@dataclass(frozen=True)
class Beat:
    """How far a rank is.

    Attributes:
        start: the same for all ranks of one start, another for the next.
        num_marks: beginnings of parts that it has seen; the rank with the fewest is behind the others.
        part: of STEP_PARTS, or of a run's (`training.run.spent`).
        quiet_seconds: how long it has been there.
        forward_seconds: of its last steps, each; None: not known.
        where: file, line and function in which its main thread stands; only once it hangs.
        waits: that is a collective, or the wait for one.
        stopped_seconds: for how long no thread of it ran; only once it hangs.
    """

    rank: int
    world_size: int
    start: str
    host: str
    process: int
    step: int
    part: str
    num_marks: int
    quiet_seconds: float
    forward_seconds: float | None = None
    where: str = ""
    waits: bool = False
    stopped_seconds: float = 0.0
    written: float = 0.0  # when, by the clock of the storage

    @property
    def place(self) -> str:
        """What it does, for people."""
        return f"the {self.part} of step {self.step}" if self.part in STEP_PARTS else f"the part {self.part}"


def read(directory: Path) -> list[Beat]:
    """The newest beat of each rank of the newest start of a run, by rank; empty without any."""
    found = []
    for file in sorted((directory / FOLDER).glob("*.json")):
        with suppress(OSError, ValueError, TypeError):  # being replaced, or of another version
            found.append(Beat(**{**json.loads(file.read_text()), "written": file.stat().st_mtime}))
    newest = max(found, key=lambda beat: beat.written, default=None)
    return [beat for beat in found if newest and beat.start == newest.start]


def describe_hang(directory: Path, beats: list[Beat], *, world_size: int) -> str:
    """One sentence: which rank the others wait for, and where it stands."""
    silent = [beat for beat in beats if not beat.where]
    longest = max((beat.quiet_seconds for beat in beats), default=0.0)
    stopped = [beat for beat in beats if beat.stopped_seconds > longest / 2]
    missing = set(range(world_size)) - {beat.rank for beat in beats}
    if missing:
        names = ", ".join(map(str, sorted(missing)))
        text = f"rank {names} has never written a heartbeat"
    elif silent:
        newest = max(beat.written for beat in beats)
        age = max(newest - beat.written for beat in silent)
        text = f"{_names(silent)} stands still: no heartbeat for {age:.0f} s, the last in {silent[0].place}"
    elif stopped:
        seconds = stopped[0].stopped_seconds
        where = stopped[0].place
        text = f"{_names(stopped)} stood still: no thread of it ran for {seconds:.0f} s, in {where}"
    else:
        behind = [beat for beat in beats if beat.num_marks == min(each.num_marks for each in beats)]
        behind = [beat for beat in behind if not beat.waits] or behind
        first = behind[0]
        text = (
            f"{_names(behind)} hangs: no progress for {first.quiet_seconds:.0f} s in {first.place} "
            f"({first.where})"
        )
    return (
        f"{text}; the stacks of the ranks are in {directory / FOLDER}; the same command resumes the run "
        "from its newest checkpoint (workers.hang_seconds)"
    )


def stragglers(beats: list[Beat], *, fraction: float) -> dict[int, str]:
    """Rank -> a sentence, for ranks whose forward pass is slower than the median by `fraction` (0: none).

    The others wait for it in the backward pass, which takes about twice as long as the forward pass.
    """
    times = [(beat.forward_seconds, beat) for beat in beats if beat.forward_seconds]
    if len(times) < 2 or not fraction:
        return {}
    median = statistics.median_low(seconds for seconds, _ in times)
    return {
        beat.rank: f"{_names([beat])} is slow: its forward passes take {seconds:.3g} s of a step, "
        f"{seconds / median - 1:.0%} longer than the median; each step waits for it, about "
        f"{FORWARDS * (seconds - median):.2g} s"
        for seconds, beat in times
        if seconds > (1 + fraction) * median
    }


def describe(directory: Path) -> list[str]:
    """Lines about the ranks of a run that is going; empty if they have no heartbeat."""
    beats = read(directory)
    if not beats:
        return []
    ages = {beat.rank: time.time() - beat.written for beat in beats}
    silent = [beat for beat in beats if ages[beat.rank] > SILENT_SECONDS]
    lines = [f"{len(beats) - len(silent)} of {beats[0].world_size} ranks have a heartbeat"]
    quiet = max(beats, key=lambda beat: beat.quiet_seconds)
    if quiet.quiet_seconds > SILENT_SECONDS:
        lines[0] += f"; rank {quiet.rank} has spent {quiet.quiet_seconds:.0f} s in {quiet.place}"
    if silent:
        oldest = max(silent, key=lambda beat: ages[beat.rank])
        lines[0] += f"; {_names([oldest])} is silent since {ages[oldest.rank]:.0f} s, in {oldest.place}"
    return lines + list(stragglers(beats, fraction=STRAGGLER_FRACTION).values())[:1]


def _names(beats: list[Beat]) -> str:
    if len(beats) == 1:
        return f"rank {beats[0].rank} ({beats[0].host}, process {beats[0].process})"
    return "each of the ranks " + ", ".join(str(beat.rank) for beat in beats)


class Heartbeat:
    """This rank's own. As a context manager it beats, and watches whether the rank makes progress.

    Args:
        directory: the run directory.
        start: see `Beat`.
        hang_seconds: how much longer than the longest step a step may take; 0: for ever.
        fail: called with the sentence about a hang, before this process ends with exit code 1.
    """

    def __init__(
        self, directory: Path, *, rank: int = 0, world_size: int = 1, start: str = "",
        hang_seconds: float = 0.0, fail: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self._directory, self._folder = directory, directory / FOLDER
        self._about: dict[str, Any] = {
            "rank": rank, "world_size": world_size, "start": start,
            "host": platform.node(), "process": os.getpid(),
        }  # fmt: skip
        self._hang_seconds, self._fail = hang_seconds, fail
        self._poll_seconds = min(1.0, hang_seconds / 4) if hang_seconds else 1.0
        self._file = self._folder / f"{rank:05d}.json"
        self._flag = self._folder / f"hang-{start}"
        self._longest: dict[str, float] = {}  # seconds of a kind of part
        self._num_steps = 0  # that have begun
        self.step, self.part = 0, "start"
        self._num_marks, self._marked = 0, time.monotonic()
        self.forward_seconds: float | None = None
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def mark(self, part: str, step: int | None = None) -> None:
        """The rank begins a part. Called by its main thread; writes nothing."""
        now = time.monotonic()
        kind = self._kind
        self._longest[kind] = max(self._longest.get(kind, 0.0), now - self._marked)
        if step is not None and step != self.step:
            self.step, self._num_steps = step, self._num_steps + 1
        self.part, self._marked, self._num_marks = part, now, self._num_marks + 1

    @property
    def place(self) -> str:
        """What the rank does, for people."""
        return self._beat(quiet=0.0).place

    @property
    def _kind(self) -> str:
        if self.part not in STEP_PARTS:
            return self.part
        return "step" if self._num_steps > FIRST_STEPS else "first steps"

    @property
    def _limit(self) -> float:
        longest = self._longest.get(self._kind)
        if longest is None or self._kind == "first steps":
            return FIRST_TIMES * self._hang_seconds
        return longest + self._hang_seconds * (1.0 if self._kind == "step" else OTHER_TIMES)

    def __enter__(self) -> Self:
        self._folder.mkdir(exist_ok=True)
        if self._about["rank"] == 0:
            for old in self._folder.glob("hang-*"):
                if old != self._flag:
                    old.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the heartbeat."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        seen, quiet, stopped, before, beaten = -1, 0.0, 0.0, time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            # the whole machine may have stood still: only the time in which this thread looked counts
            looked = min(now - before, 2 * self._poll_seconds)
            if seen != self._num_marks:
                quiet = stopped = looked = 0.0
            quiet, stopped = quiet + looked, stopped + now - before - looked
            seen, before = self._num_marks, now
            if now >= beaten + min(BEAT_SECONDS, max(self._hang_seconds / 2, 0.5)) or not beaten:
                self._write(self._beat(quiet=quiet))
                beaten = now
            if self._hang_seconds and (quiet > self._limit or self._flag.exists()):
                self._end(quiet, stopped=stopped)
            if self._stop.wait(self._poll_seconds):
                return

    def _beat(self, *, quiet: float, **more: Any) -> Beat:
        return Beat(
            **self._about, step=self.step, part=self.part, num_marks=self._num_marks, quiet_seconds=quiet,
            forward_seconds=self.forward_seconds, **more,
        )  # fmt: skip

    def _write(self, beat: Beat) -> None:
        """Replace the file: no reader sees half of it. A disk that is full loses a beat."""
        temporary = self._file.with_suffix(".tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps({k: v for k, v in asdict(beat).items() if k != "written"}))
            temporary.rename(self._file)

    def _end(self, quiet: float, *, stopped: float) -> None:
        """End this process, once the other ranks have written where they stand."""
        where, waits = _place(sys._current_frames().get(self._main))
        stacks = self._file.with_suffix(".stacks")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with suppress(OSError), open(os.open(stacks, flags, 0o600), "w") as file:
            file.write(f"rank {self._about['rank']}, after {quiet:.0f} s in {self.place}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self._write(self._beat(quiet=quiet, where=where or "?", waits=waits, stopped_seconds=stopped))
        with suppress(OSError):
            self._flag.touch()
        until, num = time.monotonic() + GRACE_SECONDS, self._about["world_size"]
        while time.monotonic() < until:
            beats = [beat for beat in read(self._directory) if beat.start == self._about["start"]]
            if sum(bool(beat.where) for beat in beats) == num:
                break
            for beat in beats:
                if not beat.where and beat.host == self._about["host"]:
                    _continue(beat.process)  # a stopped process writes its stacks once it goes on
            time.sleep(0.2)
        text = describe_hang(self._directory, beats, world_size=num)
        with suppress(Exception):
            self._fail(text)
        os.write(2, f"error: {text}\n".encode())
        os._exit(1)


def _place(frame: Any) -> tuple[str, bool]:
    """(file, line and function in which a thread stands; whether it waits in a collective, or for one)."""
    inside, waits, ours = "", False, ""
    while frame is not None:
        code = frame.f_code
        text = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"
        is_handle = not inside and code.co_name == "wait" and not code.co_filename.endswith("threading.py")
        inside = inside or text
        waits = waits or is_handle or code.co_filename.endswith(COLLECTIVES)
        if not ours and not any(part in code.co_filename for part in ("site-packages", "/lib/python")):
            ours = text
        frame = frame.f_back
    return (inside if inside == ours or not ours else f"{inside}, from {ours}"), waits


def _continue(process: int) -> None:
    """SIGCONT to a process that is stopped."""
    with suppress(OSError):
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            os.kill(process, signal.SIGCONT)
