"""Contenders take turns on one machine, and a turn that other processes disturb is taken again.

for number in range(rounds):
    for name in turns(names, number):
        turn = quietest(take)       # `take` measures with a `Bystanders` and returns its others_cores
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

MOST_TAKES = 3  # of a turn that others disturb
DISTURBING_CORES = 0.1


class Disturbed(Protocol):
    """What `quietest` chooses by: how many cores everything else kept busy meanwhile, on average."""

    @property
    def others_cores(self) -> float: ...


AnyTurn = TypeVar("AnyTurn", bound=Disturbed)


def turns(names: Sequence[str], round_number: int) -> list[str]:
    """The order of a round: another contender goes first in each."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


def quietest(take: Callable[[], AnyTurn]) -> AnyTurn:
    """A turn while nothing else uses the cores; after MOST_TAKES, that in which others did least.

    A thread at a barrier waits long for one that has lost its core: one busy core elsewhere has taken nine
    tenths of a contender's speed. That speed has no part in the choice.
    """
    takes: list[AnyTurn] = []
    while len(takes) < MOST_TAKES and (not takes or takes[-1].others_cores > DISTURBING_CORES):
        takes.append(take())
    return min(takes, key=lambda turn: turn.others_cores)


class Bystanders:
    """All other processes of this machine, from now on."""

    def __init__(self) -> None:
        self._started, self._busy = time.monotonic(), busy_seconds()

    def cores(self, own_seconds: float) -> float:
        """Cores that they kept busy on average, where the contender itself used `own_seconds` of CPU time."""
        others = busy_seconds() - self._busy - own_seconds
        return max(0.0, others) / (time.monotonic() - self._started)


def busy_seconds() -> float:
    """CPU time that all cores of this machine have been busy, since it started: all but idle and waiting.

    /proc/stat (https://www.kernel.org/doc/html/latest/filesystems/proc.html): user, nice, system, idle,
    iowait, irq, softirq, steal; then guests, whom user and nice contain.
    """
    cells = [int(cell) for cell in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return (sum(cells) - cells[3] - cells[4]) / os.sysconf("SC_CLK_TCK")
