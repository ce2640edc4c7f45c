"""How long `make serve` takes to its first answer, by part, and which process uses the CPU meanwhile.

    python -m tests.lab.serve_startup [--rounds 5] [--output FILE] [--dry-run] [key=value ...]

Each round is one start of the command with a model of 5M parameters and random weights. It ends with the
answer to a request for one token; then the command is stopped. An unmeasured round goes first and compiles
the engine. The parts are the time until each line that the command prints, and the request. The aim is 15 s
on two cores. Seconds of wall time need an idle machine; seconds of CPU time, `cpu_..._seconds`, do not.
"""

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from cluster.cli import RunError
from cluster.process import Child
from tests.lab import starts

WHAT = "serve_startup"
AIM_SECONDS = 15.0
KEYS = ("model.weights=random", "model.shape=llama-5m", "deployment.port=0")
MODEL = "llama-5m-random"
PATIENCE_SECONDS = 300.0
# The part that a line ends, by its beginning.
PARTS = {"starting Ray for": "command", "starting Ray Serve": "Ray", "serving at ": "Serve_and_engine"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    return starts.command(
        arguments, start, about=__doc__, what=WHAT, module="serving.app", keys=KEYS, aim_seconds=AIM_SECONDS
    )


def start(_folder: Path, _name: str, keys: Sequence[str]) -> dict[str, float]:
    """One start and stop. Raises `RunError`: the command ended, or printed no line that ends a part."""
    began = time.monotonic()
    command = [sys.executable, "-m", "serving.app", *KEYS, *keys]
    found: dict[str, float] = {}
    with Child(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        lines, last = [], began
        for line in iter(child.stdout.readline, ""):
            lines.append(line)
            if part := part_of(line):
                now = time.monotonic()
                found[f"{part}_seconds"], last = now - last, now
            if part == "Serve_and_engine":
                break
        if len(found) < len(PARTS):
            raise RunError(f"{' '.join(command[1:])} did not start:\n{''.join(lines)}")
        request = {"model": MODEL, "prompt": [1], "max_tokens": 1}
        url = f"{lines[-1].split()[2]}/completions"
        httpx.post(url, json=request, timeout=PATIENCE_SECONDS).raise_for_status()
        found["request_seconds"] = time.monotonic() - last
        found = {"first_answer_seconds": sum(found.values()), **found, **cpu_seconds(child.pid)}
        child.send_signal(signal.SIGINT)  # to its process group, of which Ray's own processes ignore this one
        child.communicate(timeout=PATIENCE_SECONDS)
    return found


def part_of(line: str) -> str | None:
    """The part of a start that ends when the command prints this line, if any."""
    return next((part for beginning, part in PARTS.items() if line.startswith(beginning)), None)


def cpu_seconds(root: int) -> dict[str, float]:
    """Seconds of CPU time of each process below `root`, by its name, and of all."""
    found = Counter[str]()
    for each in psutil.Process(root).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            used = each.cpu_times()
            if words := each.cmdline():
                found[name_of(words)] += used.user + used.system
    rows = {f"cpu_{name}_seconds": found[name] for name in sorted(found) if found[name] > 0}
    return {"cpu_seconds": sum(found.values()), **rows}


def name_of(command: Sequence[str]) -> str:
    """A process's name: the class of an actor of Ray, else the module, script or program."""
    first = command[0]
    if first.startswith("ray::"):
        return re.split(r"\W", first.removeprefix("ray::"))[0]
    if "-m" in command:
        return command[command.index("-m") + 1]
    return Path(next((word for word in command[1:] if word.endswith(".py")), first)).stem


if __name__ == "__main__":
    sys.exit(main())
