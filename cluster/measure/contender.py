"""A contender of a race in a process of its own: it is stopped between its turns, and ends with the race.

It may run in another environment's interpreter. It reads one JSON command per line, answers each with one
JSON line, and ends with its input.
"""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.cli import RunError
from cluster.process import Child
from cluster.session import ROOT, worker_environment

STOP_SECONDS = 10.0
END_SECONDS = 60.0
LOG_LINES = 12


def environment(own: Mapping[str, str], *, threads: int, sees_our_code: bool) -> dict[str, str]:
    """The environment of a contender: this process's, without GPUs, `threads` compute threads, and `own`."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    ours = {"PYTHONPATH": str(ROOT)} if sees_our_code else {}
    return {
        **kept, **worker_environment(gpu=False, threads=threads), "CUDA_VISIBLE_DEVICES": "", **ours, **own
    }  # fmt: skip


@contextmanager
def running(
    name: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path, hint: str
) -> "Iterator[Contender]":
    """A contender in a process group of its own, stopped between its turns; it ends with the block.

    Args:
        log: the file for its standard error.
        hint: added to the message of a failure because a module is missing.
    """
    with log.open("wb") as stream:
        child = Child(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, env=dict(environment)
        )
    try:
        yield Contender(name, child, log, hint)
    finally:
        child.send_signal(signal.SIGCONT)
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.close()  # then it ends, and its own children with it
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        child.end()
        child.stdout.close()


class Contender:
    """The process of a contender: what is sent to it, and its answers."""

    def __init__(self, name: str, child: Child, log: Path, hint: str) -> None:
        self.name, self._child, self._log, self._hint = name, child, log, hint

    def ask(self, command: Mapping[str, Any], *, within_seconds: float) -> dict[str, Any]:
        """Continue the process group, send the command, wait for the line of its answer, stop the group.

        Args:
            command: "do" says what.

        Raises:
            RunError: no answer in time, or the process has ended. The message ends with the log's last lines.
        """
        assert self._child.stdin is not None
        try:
            self._child.send_signal(signal.SIGCONT)
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            self._child.stdin.flush()
            line = self._line(time.monotonic() + within_seconds)
        except BrokenPipeError:
            line = b""
        if line is None or not line.endswith(b"\n"):
            raise self._failure(command["do"], within_seconds, ends=line is not None)
        self._child.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def _line(self, deadline: float) -> bytes | None:
        """What it writes until a line or its output ends. None: the deadline has passed."""
        assert self._child.stdout is not None
        output, parts = self._child.stdout.fileno(), [b""]
        while not parts[-1].endswith(b"\n"):
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            parts.append(os.read(output, 1 << 20))
            if not parts[-1]:
                break
        return b"".join(parts)

    def _failure(self, what: str, within_seconds: float, *, ends: bool) -> RunError:
        """`ends`: it has closed its output, so it is about to end, however slow the machine."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(END_SECONDS if ends else 0.0)
        code = self._child.returncode
        how = f"gave no answer in {within_seconds:.0f} s" if code is None else f"ended with exit code {code}"
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        if "No module named '" in tail:
            tail += f"\n{self._hint}"
        return RunError(f"{self.name} {how} at {what!r}; its log ends:\n{tail}")
