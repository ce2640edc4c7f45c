"""A rank's own heartbeat, and the end of a run that hangs.

A run hangs if none of its ranks makes progress any more. Progress is the beginning of a part of a step or of
a batch of the evaluation; in other parts, and in the first steps, which may compile, it is also computing
and reading. A checkpoint on its way to the disk has to grow, whatever the training does meanwhile.

The heartbeat threads see that. They write the stacks of all ranks, name the one that the others wait for, and
end their processes: a thread that waits in a collective cannot be interrupted. If no thread of a rank runs,
a process beside it (`cluster.heart.watcher`) sees that. Then the launcher restarts the run, or ends it.
"""

import faulthandler
import json
import linecache
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from cluster.heart import watcher
from cluster.record import heartbeat
from cluster.record.heartbeat import BEAT_SECONDS, FOLDER, GRACE_SECONDS, STEP_PARTS, Beat

CHECKPOINT, EVALUATION = "checkpoint", "evaluation"  # parts whose progress is known more closely
FIRST = 3  # steps, or batches of the evaluation: they may compile, or fill caches
MOST_TIMES = 30.0  # times `hang_seconds`: for longer, computing alone is no progress (a thread may spin)
IMPORT_SECONDS = 5.0  # beyond `hang_seconds`, in which a rank without a heartbeat may still import modules
BUSY = 0.01  # of a core: less is no computing
READING = 100_000  # bytes per second from the storage: less is no reading
COLLECTIVES = "distributed_c10d.py"  # of torch: a rank that stands there waits for another


class Heartbeat:
    """This rank's own. As a context manager it beats, and watches whether the rank makes progress.

    Made by the thread that trains.

    Args:
        directory: the run directory.
        start: see `Beat`.
        hang_seconds: how much longer than the longest part of a step the next may take, and how long
            anything else may make no progress; 0: for ever.
        final: a hang ends the run, and not only this start of its workers.

    Attributes:
        written: of the checkpoint in flight, what grows while it moves (`training.run.state.writer`).
    """

    def __init__(
        self, directory: Path, *, rank: int = 0, world_size: int = 1, start: str = "",
        hang_seconds: float = 0.0, final: bool = True,
    ) -> None:  # fmt: skip
        self._directory, self._folder = directory, directory / FOLDER
        self._about: dict[str, Any] = {
            "rank": rank, "world_size": world_size, "start": start, "host": platform.node(),
            "process": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }  # fmt: skip
        self._hang_seconds, self.final = hang_seconds, final
        self._poll_seconds = min(1.0, hang_seconds / 4) if hang_seconds else 1.0
        self._file = self._folder / f"{rank:05d}.json"
        self._flag = heartbeat.flag_of(directory, start)
        self._longest: dict[str, float] = {}  # seconds of a kind of part
        self._num_steps = self._num_batches = 0  # that have begun
        self.step, self.part = 0, "start"
        self._num_marks, self._marked = 0, time.monotonic()
        self.forward_seconds: float | None = None
        self.written: Callable[[], int | None] = lambda: None
        self._quiet, self._stopped, self._there = 0.0, 0.0, 0.0  # seconds; the last: since the last mark
        self._seen, self._before, self._worked = -1, time.monotonic(), _Work()
        self._growth: int | None = None
        self._write_quiet: float | None = None
        self._main = threading.get_ident()
        self._stop, self._ends = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._watcher: watcher.Watcher | None = None

    def mark(self, part: str, step: int | None = None) -> None:
        """The rank begins a part. Called by the thread that trains; writes nothing.

        A rank that is being ended goes no further: the others could else end the run without it.
        """
        if self._ends:
            time.sleep(2 * GRACE_SECONDS)
        now = time.monotonic()
        kind = self._kind
        self._longest[kind] = max(self._longest.get(kind, 0.0), now - self._marked)
        if step is not None and step != self.step:
            self.step, self._num_steps = step, self._num_steps + 1
        self._num_batches += part == EVALUATION
        self.part, self._marked, self._num_marks = part, now, self._num_marks + 1

    @property
    def place(self) -> str:
        """What the rank does, for people."""
        return self._beat().place

    @property
    def _kind(self) -> str:
        if self.part in STEP_PARTS:
            return "step" if self._num_steps > FIRST else "first steps"
        return self.part if self.part != EVALUATION or self._num_batches > FIRST else "first batches"

    @property
    def _is_known(self) -> bool:
        """Whether earlier parts of this kind say how long this one may take."""
        return self._kind in ("step", EVALUATION)

    @property
    def _limit(self) -> float:
        return self._hang_seconds + (self._longest.get(self._kind, 0.0) if self._is_known else 0.0)

    def __enter__(self) -> Self:
        self._folder.mkdir(exist_ok=True)
        if self._about["rank"] == 0:
            for old in self._folder.glob("hang-*"):
                if old != self._flag:
                    old.unlink(missing_ok=True)
        if self._hang_seconds:
            self._watcher = watcher.Watcher(
                directory=str(self._directory), rank=self._about["rank"], start=self._about["start"],
                seconds=self._hang_seconds, final=self.final,
            )  # fmt: skip
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the heartbeat."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        if self._watcher:
            self._watcher.close()

    def _run(self) -> None:
        beaten = 0.0
        while True:
            if self._watcher:
                self._watcher.beat()
            now = time.monotonic()
            self._look(now)
            if now >= beaten + min(BEAT_SECONDS, max(self._hang_seconds / 2, 0.5)) or not beaten:
                _write(self._file, self._beat())
                beaten = now
            if self._hang_seconds and (self._flag.exists() or self._hangs()):
                self._end()
            if self._stop.wait(self._poll_seconds):
                return

    def _look(self, now: float) -> None:
        """Take in what has happened since the last look."""
        # the whole machine may have stood still: only the time in which this thread looked counts
        looked = min(now - self._before, 2 * self._poll_seconds)
        missed, self._before = now - self._before - looked, now
        growth = self.written()
        grows, self._growth = growth != self._growth, growth
        self._write_quiet = None if growth is None else 0.0 if grows else (self._write_quiet or 0.0) + looked
        if self._seen != self._num_marks:
            self._seen, self._quiet, self._stopped, self._there = self._num_marks, 0.0, missed, 0.0
            return
        self._there, self._stopped = self._there + looked, self._stopped + missed
        moves = grows and self.part == CHECKPOINT
        if self._hang_seconds and not self._is_known and not moves:
            moves = self._worked.since(looked) and self._there < MOST_TIMES * self._hang_seconds
        self._quiet = 0.0 if moves else self._quiet + looked

    def _hangs(self) -> bool:
        """Whether this rank and all others make no progress. A rank that waits for a slow one does not."""
        mine, writing = self._quiet > self._limit, (self._write_quiet or 0.0) > self._hang_seconds
        if not mine and not writing:
            return False
        _write(self._file, self._beat())
        beats = heartbeat.read(self._directory, start=self._about["start"])
        if len(beats) < self._about["world_size"] and self._there < self._hang_seconds + IMPORT_SECONDS:
            return False
        newest = max((beat.written for beat in beats), default=0.0)
        ages = {beat.rank: newest - beat.written for beat in beats}
        quiet = [beat.quiet_seconds + ages[beat.rank] for beat in beats]
        writes = [
            beat.write_quiet_seconds + ages[beat.rank]
            for beat in beats
            if beat.write_quiet_seconds is not None
        ]
        least = self._hang_seconds / 2  # it came there later
        all_wait, none_grows = (min(each, default=least) >= least for each in (quiet, writes))
        return (mine and all_wait) or (writing and none_grows)

    def _beat(self, **more: Any) -> Beat:
        return Beat(
            **self._about, step=self.step, part=self.part, num_marks=self._num_marks,
            quiet_seconds=self._quiet, write_quiet_seconds=self._write_quiet,
            forward_seconds=self.forward_seconds, **more,
        )  # fmt: skip

    def _end(self) -> None:
        """End this process, once the other ranks have written where they stand."""
        self._ends = True
        rank, num = self._about["rank"], self._about["world_size"]
        where, waits = _place(sys._current_frames().get(self._standing))
        heartbeat.write_stacks(self._directory, rank, f"{self._quiet:.0f} s in {self.place}\n{_stacks()}")
        _write(self._file, self._beat(where=where or "?", waits=waits, stopped_seconds=self._stopped))
        with suppress(OSError):
            self._flag.touch()
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            beats = heartbeat.read(self._directory, start=self._about["start"])
            if sum(bool(beat.where) for beat in beats) == num:
                break
            for beat in beats:
                if not beat.where and beat.host == self._about["host"]:
                    heartbeat.continue_stopped(beat.process)  # it writes its stacks once it goes on
            time.sleep(0.2)
        text = heartbeat.describe_hang(
            self._directory, beats, world_size=num, hang_seconds=self._hang_seconds
        )
        with suppress(Exception):
            watcher.report(self._directory, text, final=self.final, step=self.step)
        os.write(2, f"error: {text}\n".encode())
        os._exit(1)

    @property
    def _standing(self) -> int:
        """The thread that makes no progress: the one that trains, or the one that writes a checkpoint."""
        if (self._write_quiet or 0.0) > self._hang_seconds / 2:
            names = {thread.name: thread.ident or 0 for thread in threading.enumerate()}
            return next((names[name] for name in names if name.startswith("write-")), self._main)
        return self._main


def _write(file: Path, beat: Beat) -> None:
    """Replace the file: no reader sees half of it. A disk that is full loses a beat."""
    temporary = file.with_suffix(".tmp")
    with suppress(OSError):
        temporary.write_text(json.dumps({k: v for k, v in asdict(beat).items() if k != "written"}))
        temporary.rename(file)


class _Work:
    """Whether the thread that made this computes or reads, or a process that it has started computes."""

    def __init__(self) -> None:
        self._clock = time.CLOCK_PROCESS_CPUTIME_ID
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._before = (0.0, 0)

    def since(self, seconds: float) -> bool:
        """Whether it did since the last call, which was `seconds` ago."""
        (cpu, read), before = self._now(), self._before
        self._before = cpu, read
        return cpu - before[0] > BUSY * seconds or read - before[1] > READING * seconds

    def _now(self) -> tuple[float, int]:
        times, read = os.times(), 0
        cpu = times.children_user + times.children_system + _cpu_of_children(os.getpid())
        with suppress(OSError):  # the thread has ended
            cpu += time.clock_gettime(self._clock)
        with suppress(OSError, ValueError):
            lines = Path("/proc/self/io").read_text().split()
            read = int(lines[lines.index("read_bytes:") + 1])
        return cpu, read


def _cpu_of_children(process: int) -> float:
    """Seconds of CPU time of all processes below this one that live, on Linux."""
    total = 0.0
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        children: list[str] = []
        with suppress(OSError):  # the thread has ended
            children = file.read_text().split()
        for child in children:
            with suppress(OSError):  # it has ended: its siblings count nevertheless
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                total += _cpu_of_children(int(child))
    return total


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _place(frame: Any) -> tuple[str, bool]:
    """(file, line and function in which a thread stands; whether it waits in a collective, or for one)."""
    inside, waits, ours = "", False, ""
    while frame is not None:
        code = frame.f_code
        text = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"
        if not inside:  # a handle's method has a frame of its own only if it is Python
            line = linecache.getline(code.co_filename, frame.f_lineno)
            is_handle = code.co_name == "wait" and not code.co_filename.endswith("threading.py")
            inside, waits = text, is_handle or ".wait(" in line
        waits = waits or code.co_filename.endswith(COLLECTIVES)
        if not ours and not any(part in code.co_filename for part in ("site-packages", "/lib/python")):
            ours = text
        frame = frame.f_back
    return (inside if inside == ours or not ours else f"{inside}, from {ours}"), waits
