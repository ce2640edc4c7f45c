"""GPUs that no run uses until a user clears them: the file and its command."""

import subprocess
import sys

import pytest

from cluster import files
from cluster.heart import drained
from cluster.review.status import report
from tests.commands import ROOT


def test_a_gpu_is_drained_once_and_until_it_is_cleared(tmp_path):
    assert drained.read(tmp_path) == [] and report(tmp_path) == []
    for _ in range(2):
        drained.add(tmp_path, host="node1", gpu=3, uuid="", reason="GPU 3 of node1: Xid 79")
        drained.add(tmp_path, host="node2", gpu=0, uuid="GPU-1", reason="b")
    assert [each.name for each in drained.read(tmp_path)] == ["node1:3", "node2:0"]
    (first, _) = report(tmp_path)
    assert "GPU node1:3 is drained since" in first and "Xid 79; mended? `make clear ARGS=node1:3`" in first
    command = [sys.executable, "-S", "-m", "cluster.heart.drained", tmp_path]  # -S: the standard library only
    done = subprocess.run([*command, "node1:3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "node1:3 is used again, by the next run\n", done.stderr
    assert [each.name for each in drained.read(tmp_path)] == ["node2:0"]
    done = subprocess.run([*command, "node1:3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "node1:3 is not drained; drained: node2:0" in done.stderr
    (tmp_path / drained.FILE).write_text("[{}]")
    with pytest.raises(files.DamagedFile, match=r"drained\.json"):
        drained.read(tmp_path)
    assert "drained.json" in report(tmp_path)[0]
