"""One way to take turns and to choose the quiet one."""

import os
import time
from dataclasses import dataclass

import pytest

from cluster.measure.turns import Bystanders, busy_seconds, quietest, turns


def test_another_contender_goes_first_in_each_round():
    orders = [turns(["a", "b", "c"], number) for number in (-1, 0, 1, 2, 3)]
    assert ["".join(order) for order in orders] == ["cab", "abc", "bca", "cab", "abc"]


@dataclass
class Turn:
    others_cores: float


@pytest.mark.parametrize(
    ("others", "taken", "kept"),
    [
        ([0.1, 0.0], 1, 0.1),
        ([0.05], 1, 0.05),
        ([0.9, 0.05, 0.0], 2, 0.05),
        ([0.9, 0.5, 0.7, 0.0], 3, 0.5),
        ([0.5, 0.2, 0.3], 3, 0.2),
    ],
)
def test_a_disturbed_turn_is_taken_again_and_the_quietest_counts(others, taken, kept):
    left = iter(map(Turn, others))
    assert quietest(lambda: next(left)).others_cores == kept
    assert len(list(left)) == len(others) - taken


def test_busy_seconds_grow_with_work_and_not_beyond_the_cores():
    started = time.monotonic()
    before, bystanders, worked = busy_seconds(), Bystanders(), time.process_time()
    while (own := time.process_time() - worked) < 0.3:
        pass
    grown, cores = busy_seconds() - before, os.cpu_count() or 1
    tick = cores / os.sysconf("SC_CLK_TCK")  # the kernel counts whole ones, on each core
    assert own - 3 * tick < grown < cores * (time.monotonic() - started) + 3 * tick
    assert bystanders.cores(0.0) > 0 and bystanders.cores(1e9) == 0.0
