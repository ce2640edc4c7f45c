"""The campaign's short form: one run of each of a few kinds, and what its checks see."""

import subprocess
import sys

import pytest

from tests.commands import ROOT
from tests.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.stack


def test_runs_that_are_broken_and_resumed_equal_those_that_are_not() -> None:
    command = [sys.executable, "-m", "tests.faults", "--first", "31", "--runs", "4", "--no-output"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"faulted_runs": 4' in done.stdout and '"wrong": 0' in done.stdout
