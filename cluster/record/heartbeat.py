"""The heartbeats of a run's ranks, for those who read them: the standard library alone.

    outputs/<run>/ranks/00003.json      how far rank 3 is, every BEAT_SECONDS
    outputs/<run>/ranks/00003.stacks    where its threads stood when the run hung

`cluster.heart.hang` writes them.
"""

import json
import os
import signal
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER = "ranks"  # in the run directory
BEAT_SECONDS = 5.0
GRACE_SECONDS = 5.0  # in which the other ranks write where they stand, before the run is ended
FORMING = "process group"  # the part in which the ranks meet
STEP_PARTS = ("data", "forward", "backward", "optimizer", "row")
FORWARDS = 3  # forward passes that take as long as a forward and a backward pass
SILENT_SECONDS = 30.0  # without a heartbeat, or without progress, after which a person is told
STRAGGLER_FRACTION = 0.25  # that a rank's forward pass takes longer than the median, for `describe`


@dataclass(frozen=True)
class Beat:
    """How far a rank is.

    Attributes:
        start: the same for all ranks of one start, another for the next.
        num_marks: beginnings of parts that it has seen; the rank with the fewest is behind the others.
        part: of STEP_PARTS, or of a run's (`training.run.spent`).
        quiet_seconds: for how long it has made no progress there.
        write_quiet_seconds: for how long its checkpoint on the way to the disk has not grown; None: there is
            none.
        forward_seconds: of its last steps, each; None: not known.
        where: file, line and function in which its main thread stands; only once it hangs.
        waits: that is a collective, or the wait for one.
        stopped_seconds: for how long no thread of it ran; only once it hangs.
        gpus: its CUDA_VISIBLE_DEVICES: indices or UUIDs with commas; under Ray Train those of all ranks of
            its run on its node. Empty: any.
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
    write_quiet_seconds: float | None = None
    forward_seconds: float | None = None
    where: str = ""
    waits: bool = False
    stopped_seconds: float = 0.0
    gpus: str = ""
    written: float = 0.0  # when, by the clock of the storage

    @property
    def place(self) -> str:
        """What it does, for people."""
        if self.part == FORMING:
            return "the forming of the process group"
        return f"the {self.part} of step {self.step}" if self.part in STEP_PARTS else f"the part {self.part}"

    def may_use(self, host: str, gpu: int, uuid: str) -> bool:
        """Whether this GPU (its index there, and NVML's UUID or "") may be one of its run's."""
        names = [name for name in self.gpus.split(",") if name]
        named = any(name == str(gpu) or (name.startswith("GPU-") and uuid.startswith(name)) for name in names)
        return host == self.host and (named or not names)


def read(directory: Path, *, start: str | None = None) -> list[Beat]:
    """The newest beat of each rank of a start of a run (None: the newest), by rank; empty without any."""
    found = []
    for file in sorted((directory / FOLDER).glob("*.json")):
        with suppress(OSError, ValueError, TypeError):  # being replaced, or of another version
            found.append(Beat(**{**json.loads(file.read_text()), "written": file.stat().st_mtime}))
    newest = max(found, key=lambda beat: beat.written, default=None)
    return [beat for beat in found if newest and beat.start == (start or newest.start)]


def describe_hang(directory: Path, beats: list[Beat], *, world_size: int, hang_seconds: float) -> str:
    """One sentence: which rank the others wait for, and where it stands.

    beats: of one start; those without `where` did not answer.
    """
    silent = [beat for beat in beats if not beat.where]
    longest = max((beat.quiet_seconds for beat in beats), default=0.0)
    stopped = [beat for beat in beats if beat.stopped_seconds > max(longest, hang_seconds) / 2]
    writing = [beat for beat in beats if (beat.write_quiet_seconds or 0.0) > hang_seconds / 2]
    missing = set(range(world_size)) - {beat.rank for beat in beats}
    if missing:
        names = "rank " if len(missing) == 1 else "ranks "
        text = f"{names}{', '.join(map(str, sorted(missing)))}: no heartbeat in this start"
    elif silent:
        newest = max(beat.written for beat in beats)
        age = max(newest - beat.written for beat in silent)
        text = f"{_names(silent)} stands still: no heartbeat for {age:.0f} s, the last in {silent[0].place}"
    elif stopped:
        seconds = stopped[0].stopped_seconds
        where = stopped[0].place
        text = f"{_names(stopped)} stood still: no thread of it ran for {seconds:.0f} s, in {where}"
    elif writing:
        seconds = max(beat.write_quiet_seconds or 0.0 for beat in writing)
        text = (
            f"{_names(writing)} hangs: its checkpoint has not grown for {seconds:.0f} s "
            f"({writing[0].where}); look at the storage"
        )
    else:
        behind = [beat for beat in beats if beat.num_marks == min(each.num_marks for each in beats)]
        behind = [beat for beat in behind if not beat.waits] or behind
        first = behind[0]
        text = (
            f"{_names(behind)} hangs: no progress for {first.quiet_seconds:.0f} s in {first.place} "
            f"({first.where})"
        )
    return text + _remedy(directory)


def describe_stuck(directory: Path, beats: list[Beat], *, rank: int, seconds: float) -> str:
    """One sentence about a rank that was killed. beats: its own, if it has one."""
    name, place = (_names(beats), f", in {beats[0].place}") if beats else (f"rank {rank}", "")
    return f"{name} stood still: no Python thread of it ran for {seconds:.0f} s{place}{_remedy(directory)}"


def describe_killed(beats: list[Beat], *, rank: int, remedy: str) -> str:
    """One sentence about a rank that the kernel killed. beats: its own, if it has one."""
    name, place = (_names(beats), f", in {beats[0].place}") if beats else (f"rank {rank}", "")
    return (
        f"{name} was killed by the kernel: out of memory{place}; {remedy}; the same command resumes the run "
        "from its newest checkpoint"
    )


def _remedy(directory: Path) -> str:
    return (
        f"; the stacks of the ranks are in {directory / FOLDER}; the same command resumes the run "
        "from its newest checkpoint (workers.hang_seconds)"
    )


def stragglers(beats: list[Beat], *, fraction: float) -> dict[int, str]:
    """Rank -> a sentence, for ranks whose forward pass is slower than the median by `fraction` (0: none)."""
    return {
        beat.rank: f"{_names([beat])} is slow: its forward passes take {seconds:.3g} s of a step, "
        f"{seconds / median - 1:.0%} longer than the median; each step waits for it, about "
        f"{FORWARDS * (seconds - median):.2g} s"
        for beat, seconds, median in _slow(beats, fraction)
    }


def straggler_seconds(beats: list[Beat], *, fraction: float) -> float:
    """What the slowest of the `stragglers` costs each step; 0 without any."""
    return max((FORWARDS * (seconds - median) for _, seconds, median in _slow(beats, fraction)), default=0.0)


def _slow(beats: list[Beat], fraction: float) -> list[tuple[Beat, float, float]]:
    """(straggler, seconds of its forward passes, the median of all ranks).

    The others wait for it in the backward pass, which takes about twice as long as the forward pass.
    """
    times = [(beat, beat.forward_seconds) for beat in beats if beat.forward_seconds]
    if len(times) < 2 or not fraction:
        return []
    median = statistics.median_low(seconds for _, seconds in times)
    return [(beat, seconds, median) for beat, seconds in times if seconds > (1 + fraction) * median]


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
        lines[0] += f"; {_names([oldest])} has been silent for {ages[oldest.rank]:.0f} s, in {oldest.place}"
    return lines + list(stragglers(beats, fraction=STRAGGLER_FRACTION).values())[:1]


def _names(beats: list[Beat]) -> str:
    if len(beats) == 1:
        return f"rank {beats[0].rank} ({beats[0].host}, process {beats[0].process})"
    return "each of the ranks " + ", ".join(str(beat.rank) for beat in beats)


def flag_of(directory: Path, start: str) -> Path:
    """The file that tells all ranks of a start to write where they stand, and to end."""
    return directory / FOLDER / f"hang-{start}"


def write_stacks(directory: Path, rank: int, text: str) -> None:
    """Write a rank's stacks, which its owner alone may read; what a full disk loses is lost."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with suppress(OSError), open(os.open(stacks_of(directory, rank), flags, 0o600), "w") as file:
        file.write(text)


def stacks_of(directory: Path, rank: int) -> Path:
    """Where the stacks of a rank are."""
    return directory / FOLDER / f"{rank:05d}.stacks"


def continue_stopped(process: int) -> bool:
    """SIGCONT to a process of this machine if it is stopped. Returns whether it was."""
    with suppress(OSError):
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            os.kill(process, signal.SIGCONT)
            return True
    return False
