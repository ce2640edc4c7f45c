"""The campaign's short form: one run of each of a few kinds, and what its checks see."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.stack


def test_runs_that_are_broken_and_resumed_equal_those_that_are_not(tmp_path: Path) -> None:
    output = tmp_path / "faults.json"
    command = [sys.executable, "-m", "tests.faults", "--first", "31", "--runs", "3", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"faulted_runs": 3' in done.stdout and '"wrong": 0' in done.stdout
