"""Watches a rank from outside: a small process that ends it if none of its Python threads runs any more.

    python -IS cluster/heart/watcher.py ...        what `Watcher` starts, beside each rank, on its node

A rank that is stopped (SIGSTOP), or stuck in native code that holds the interpreter's lock, cannot find that
itself. Its heartbeat thread sends this process a byte every second or so, through a pipe. Nor can a rank
that the kernel kills for want of memory say so.
"""

import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster.process import beside
from cluster.record import events, heartbeat

STACKS_SIGNAL = signal.SIGUSR2  # on which a rank writes its stacks, even while native code holds the lock
ENDS_SECONDS = heartbeat.GRACE_SECONDS + 3.0  # in which a rank that was stopped, and runs again, ends itself
STUCK_SECONDS = 2.0  # the same of one that was not stopped
STACKS_SECONDS = 0.5  # in which one that is stuck writes its stacks
GOOD_BYE = b"x"  # before a rank closes its pipe
MEMORY = (
    "lower batch.micro_sequences, set model.activation_checkpointing=true, raise zero.stage, set "
    "checkpoint.background=false (no copy of the state), or give the machine or container more memory"
)


class Watcher:
    """The process that watches this one. `close` ends it; so does the end of this process.

    Args:
        about: arguments of `_Rank`.
    """

    def __init__(self, **about: Any) -> None:
        self._stacks = (
            os.memfd_create("stacks") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
        )
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        command = [sys.executable, "-IS", __file__, json.dumps({"stacks": self._stacks, **about})]
        # in this process's group: Ctrl-Z must stop both
        self._process = beside(command, pass_fds=[self._stacks])
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def beat(self) -> None:
        """A thread of this process runs."""
        with suppress(OSError):
            os.write(self._pipe, b".")

    def close(self) -> None:
        """End the watching."""
        with suppress(OSError):
            os.write(self._pipe, GOOD_BYE)
        self._process.communicate()
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._stacks)


def report(directory: Path, text: str, *, final: bool, step: int, kind: str = "hung") -> None:
    """Append the events that a worker hangs, or another `kind` of end. One process reports it.

    final: that ends the run, and not only this worker, which may be started again.
    """
    since = (*events.STARTS, *events.WORKERS)
    events.append_first(directory, kind, text, among=(kind,), since=since, step=step)
    if final:
        events.end(directory, "failed", text, step=step)
    else:
        events.append_first(directory, "worker_failed", text, among=("worker_failed",), since=since)


class _Rank:
    """The watcher's side."""

    def __init__(
        self, *, directory: str, rank: int, start: str, seconds: float, final: bool, stacks: int
    ) -> None:
        self._directory, self._rank, self._start = Path(directory), rank, start
        self._seconds, self._final, self._stacks = seconds, final, stacks
        self._process, self._kills = os.getppid(), _kills()

    def watch(self) -> None:
        """Until the rank closes its pipe or has ended; or end it."""
        poll_seconds = min(1.0, self._seconds / 4)
        quiet, before = 0.0, time.monotonic()
        while True:
            ready, _, _ = select.select([0], [], [], poll_seconds)
            read = os.read(0, 4096) if ready else b""
            if GOOD_BYE in read:
                return
            if (ready and not read) or not self._lives():
                self._died()
                return
            now = time.monotonic()
            # the whole machine may have stood still: only the time in which this process looked counts
            quiet = 0.0 if ready else quiet + min(now - before, 2 * poll_seconds)
            before = now
            if quiet > self._seconds:
                self._end(quiet)
                return

    def _died(self) -> None:
        """Report the end of the rank if the kernel has just killed a process for its memory."""
        if _kills() == self._kills:
            return
        beats = [beat for beat in heartbeat.read(self._directory) if beat.rank == self._rank]
        text = heartbeat.describe_killed(beats, rank=self._rank, remedy=MEMORY)
        step = beats[0].step if beats else 0
        report(self._directory, text, final=self._final, step=step, kind="out_of_memory")
        os.write(2, f"error: {text}\n".encode())

    def _lives(self) -> bool:
        return os.getppid() == self._process

    def _end(self, quiet: float) -> None:
        """Let the rank end itself if it can be continued; else kill it, and report that in its place."""
        killer = threading.Timer(ENDS_SECONDS + 1, self._kill)  # the storage below may stand still too
        killer.daemon = True
        killer.start()
        with suppress(OSError):
            heartbeat.flag_of(self._directory, self._start).touch()
        was_stopped = heartbeat.continue_stopped(self._process)
        until = time.monotonic() + (ENDS_SECONDS if was_stopped else STUCK_SECONDS)
        while time.monotonic() < until:
            if not self._lives():
                return
            time.sleep(0.1)
        # Only now: while threads run, it may crash in the middle of writing where they stand.
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(self._process, STACKS_SIGNAL)
        time.sleep(STACKS_SECONDS)
        self._kill()
        stacks = os.pread(self._stacks, 1 << 20, 0).decode(errors="replace")
        heartbeat.write_stacks(self._directory, self._rank, f"no thread ran for {quiet:.0f} s\n{stacks}")
        beats = [beat for beat in heartbeat.read(self._directory) if beat.rank == self._rank]
        text = heartbeat.describe_stuck(self._directory, beats, rank=self._rank, seconds=quiet)
        report(self._directory, text, final=self._final, step=beats[0].step if beats else 0)
        os.write(2, f"error: {text}\n".encode())

    def _kill(self) -> None:
        if self._lives():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self._process, signal.SIGKILL)


def _kills() -> int:
    """How many processes the kernel here has killed for want of memory; 0 where that is not known."""
    with suppress(OSError, ValueError):
        words = Path("/proc/vmstat").read_text().split()
        return int(words[words.index("oom_kill") + 1])
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _Rank(**json.loads(sys.argv[1])).watch()
