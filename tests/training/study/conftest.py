"""The plan of the made-up study."""

from pathlib import Path

import pytest

from tests.training.study.made_up import load
from training.study.plan import StudyPlan


@pytest.fixture
def fresh(tmp_path: Path) -> StudyPlan:
    """The study's plan, in a folder of its own."""
    return StudyPlan(load(tmp_path))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> StudyPlan:
    """The same for tests that write no run: it keeps the configurations that it has loaded."""
    return StudyPlan(load(tmp_path_factory.mktemp("study")))
