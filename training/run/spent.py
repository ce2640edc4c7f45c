"""Where a run's time went: seconds of named parts, in the record and in lines of the command."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIX = "_seconds"
# A run's parts on rank 0, in the order of its summary's keys.
PARTS = ("start", "compile", "training", "evaluation", "noise", "checkpoint", "sample")


class Spent:
    """Adds up the seconds of parts that do not overlap. The total starts when it is made.

    on_part: called with the name of each part that begins.
    """

    def __init__(self, *, on_part: Callable[[str], None] = lambda name: None) -> None:
        self._on_part = on_part
        self._started = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block's time belongs to this part."""
        self._on_part(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def summary(self) -> dict[str, float]:
        """`<part>_seconds` of all `PARTS`, for summary.json; training is the time that no other part took."""
        seconds = {name: self.seconds.get(name, 0.0) for name in PARTS}
        seconds["training"] = time.monotonic() - self._started - sum(seconds.values())
        return {f"{name}{SUFFIX}": value for name, value in seconds.items()}

    def describe(self, run: Mapping[str, Any], *, rest: str) -> str:
        """One line: all seconds until now, and the parts that took one or more.

        Args:
            run: the summary of the run, whose parts come after those of this process.
            rest: the name for the time that is in neither.
        """
        total = time.monotonic() - self._started
        parts = {**self.seconds, **{name: run[f"{name}{SUFFIX}"] for name in PARTS}}
        parts[rest] = total - sum(parts.values())
        return f"time: {total:.0f} s, " + ", ".join(
            f"{name} {seconds:.0f}" for name, seconds in parts.items() if seconds >= 0.5
        )


class Startup:
    """How long each part of a start took, from the command's process to the first step.

    The launcher begins it, and the workers continue it. It uses the wall clock, so if they are on different
    nodes, it is off by the difference of the nodes' clocks.
    """

    def __init__(self) -> None:
        self._last = _begin_of_process()
        self.seconds: dict[str, float] = {}

    def end(self, part: str, **within: float) -> None:
        """End a part: it has the time since the last end, less the seconds of the parts `within` it."""
        before, self._last = self._last, time.time()
        self.seconds |= {**within, part: self._last - before - sum(within.values())}

    def describe(self) -> str:
        """One line: all seconds until now, and each part's."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if seconds)
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"


def _begin_of_process() -> float:
    """When this process was started, as `time.time`. From field 22 of Linux's /proc/self/stat, in ticks."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age
