"""Damaged files of every kind: one clear message and an exit code, or a right result; never a traceback.

`make test-fuzz` tries more of them (`ASUNCION_PROPERTY_CASES` of each kind). Hypothesis prints and shrinks
what fails; `--hypothesis-seed=N` repeats a call.
"""

import os
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import damaged
from tests.fuzz.targets import TARGETS, outcome
from tests.properties import cases

AT_LENGTH = "ASUNCION_PROPERTY_CASES" in os.environ


@pytest.mark.parametrize("kind", TARGETS)
def test_a_damaged_file_is_one_message_that_names_it_or_is_read(kind: str) -> None:
    target = TARGETS[kind]
    examples = target.good()

    @settings(
        max_examples=cases(14), deadline=None, database=None, derandomize=not AT_LENGTH, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(seed=st.integers(0, 2**64 - 1))
    def holds(seed: int) -> None:
        random = Random(seed)
        content = damaged(random.choice(examples), random)
        with tempfile.TemporaryDirectory() as folder:
            code, errors = outcome(target, Path(folder), content)
        assert "Traceback" not in errors, errors
        if code:
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and len(lines[0]) > 20, errors
            assert code in (1, 2)

    holds()


@pytest.mark.parametrize("kind", TARGETS)
def test_a_good_file_is_read(kind: str, tmp_path: Path) -> None:
    for number, content in enumerate(TARGETS[kind].good()):
        (tmp_path / str(number)).mkdir()
        code, errors = outcome(TARGETS[kind], tmp_path / str(number), content)
        assert code == 0, errors
