"""What is proposed fits, nothing that fits is faster, and more memory never makes it slower."""

from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.measure import hardware
from tests.training.planner.test_memory import SHAPE, on_one_gpu
from training.planner.proposal import CHECKPOINTED, EQUAL, propose

A40 = hardware.lookup("A40")
CONFIG = on_one_gpu("batch.tokens=65536")


@pytest.fixture(scope="module")
def proposal():
    return propose(CONFIG, SHAPE, A40, num_workers=1)


def test_what_is_proposed_fits_and_nothing_that_fits_is_faster(proposal) -> None:
    best = proposal.best
    assert best.memory.total <= 48e9
    fitting = [each for each in proposal.candidates if each.memory.total <= 48e9]
    assert best.seconds <= (1 + EQUAL) * min(each.seconds for each in fitting)
    assert len(fitting) < len(proposal.candidates)
    assert best.keys in proposal.reason() and " takes " in proposal.reason()
    rows = str(proposal.table()).splitlines()
    assert len(rows) == 1 + 3 * len(CHECKPOINTED) and sum(row.endswith("proposed") for row in rows) == 1


def test_checkpointing_is_proposed_where_nothing_else_fits() -> None:
    small = replace(A40, memory_gb=33)
    found = propose(CONFIG, SHAPE, small, num_workers=1)
    without = [each for each in found.candidates if not each.policy[1] and found.fits(each)]
    assert found.best.policy[1] == (not without)
    none = propose(CONFIG, SHAPE, replace(A40, memory_gb=8), num_workers=1)
    assert none.best is None and none.reason().startswith("none fits 8 GB: the smallest, ")


def test_a_run_that_does_not_compile_is_told_to() -> None:
    found = propose(on_one_gpu("batch.tokens=65536", "model.compile=false"), SHAPE, A40, num_workers=1)
    assert "model.compile=true" in found.best.keys.split()
    assert {each.policy[0] for each in found.by_policy()} == {False, True}


def test_more_memory_is_never_slower() -> None:
    sizes = (30, 40, 48, 80, 141)
    taken = [propose(CONFIG, SHAPE, replace(A40, memory_gb=gb), num_workers=1).best.seconds for gb in sizes]
    assert all(later <= (1 + EQUAL) * earlier for earlier, later in pairwise(taken))
