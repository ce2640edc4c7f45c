"""End what a cluster runs on this node, and print what is left. Runs alone, on any Python 3.8 or later.

    python3 reap.py NAME      one JSON object: {"ended": number, "left": [...]}; exit code 1 if any is left

A process belongs to the cluster if it or a parent has ASUNCION_CLUSTER=NAME in its environment. Another
user's Ray, or another cluster's, is not touched.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Set, Tuple  # noqa: UP035 (nodes may have an old Python)

PATIENCE_SECONDS = 8.0  # between SIGTERM and SIGKILL


class Process(NamedTuple):
    """A row of the process table."""

    parent: int
    command: str
    environment: bytes


def processes() -> Dict[int, Process]:  # noqa: UP006
    """pid -> process, of this user's live processes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if folder.stat().st_uid != os.getuid():
                continue
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state != "Z":
                process = Process(int(parent), command.strip(), (folder / "environ").read_bytes())
                found[int(folder.name)] = process
    return found


def descendants(pid: int) -> Set[int]:  # noqa: UP006
    """Children of a process, their children, and so on, without the process itself."""
    table = processes()
    found = {pid}
    while more := {child for child, row in table.items() if row.parent in found} - found:
        found |= more
    return found - {pid}


def of_cluster(name: str) -> Dict[int, str]:  # noqa: UP006
    """pid -> command of the cluster's processes, except this process and its parents."""
    table = processes()
    marker = b"\0ASUNCION_CLUSTER=" + name.encode() + b"\0"
    mine = {pid for pid, row in table.items() if marker in b"\0" + row.environment + b"\0"}
    while more := {pid for pid, row in table.items() if row.parent in mine} - mine:
        mine |= more
    # a worker of Ray overwrites its environment with its title; if its raylet is gone, so are its parents
    mine |= {pid for pid, row in table.items() if row.parent == 1 and row.command.startswith("ray::")}
    pid = os.getpid()
    while pid in table:
        mine.discard(pid)
        pid = table[pid].parent
    return {pid: table[pid].command for pid in sorted(mine)}


def reap(name: str) -> Tuple[int, List[str]]:  # noqa: UP006
    """End them all: SIGTERM, then SIGKILL. Returns (number ended, what is left)."""
    first = of_cluster(name)
    begin = time.monotonic()
    while left := of_cluster(name):
        elapsed = time.monotonic() - begin
        if elapsed > 2 * PATIENCE_SECONDS:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if elapsed > PATIENCE_SECONDS else signal.SIGTERM)
        time.sleep(0.3)
    return len(first) - len(left), [f"{pid} {command}" for pid, command in left.items()]


if __name__ == "__main__":
    ended, left = reap(sys.argv[1])
    print(json.dumps({"ended": ended, "left": left}))
    sys.exit(1 if left else 0)
