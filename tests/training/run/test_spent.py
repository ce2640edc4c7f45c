"""training/run/spent.py: parts that add up to the whole."""

from contextlib import nullcontext

import pytest

from training.run import spent as module
from training.run.spent import PARTS, Spent


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_parts_of_a_run_are_its_whole_time_and_training_is_what_is_left(clock):
    spent = Spent()
    for part, seconds in (("start", 2), ("evaluation", 3), (None, 10), ("evaluation", 4)):
        with spent.part(part) if part else nullcontext():
            clock.now += seconds
    summary = spent.summary()
    assert list(summary) == [f"{name}_seconds" for name in PARTS]
    assert summary["start_seconds"] == 2 and summary["evaluation_seconds"] == 7
    assert summary["training_seconds"] == 10 and sum(summary.values()) == 19


def test_the_line_names_what_took_time_and_leaves_nothing_out(clock):
    spent = Spent()
    with spent.part("data"):
        clock.now += 12
    with spent.part("Ray"):
        clock.now += 8
    clock.now += 21
    run = dict.fromkeys([f"{name}_seconds" for name in PARTS], 0.0)
    run |= {"training_seconds": 12.0, "checkpoint_seconds": 3.0, "start_seconds": 0.4}
    line = spent.describe(run, rest="workers")
    assert line == "time: 41 s, data 12, Ray 8, training 12, checkpoint 3, workers 6"


def test_a_part_that_fails_has_taken_its_time_too(clock):
    spent = Spent()

    def save() -> None:
        with spent.part("checkpoint"):
            clock.now += 5
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save()
    assert spent.summary()["checkpoint_seconds"] == 5
