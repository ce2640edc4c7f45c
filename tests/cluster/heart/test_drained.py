"""GPUs that no run uses until a user clears them: the file and its command."""

import subprocess
import sys
import threading

import pytest

from cluster import files
from cluster.heart import drained
from cluster.review.status import report
from tests.commands import ROOT
from tests.waiting import PATIENCE_SECONDS


def test_a_holder_that_is_told_nothing_ends_itself(tmp_path, monkeypatch):
    """Whoever made it was killed meanwhile, and would leave the GPU taken for ever."""
    ended = threading.Event()
    monkeypatch.setattr(drained, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(drained.os, "_exit", lambda code: ended.set())
    drained.add(tmp_path, host="node1", gpu=3, uuid="", reason="a")
    told = drained.Holder(tmp_path)
    told.keep(drained.read(tmp_path)[0])
    monkeypatch.setattr(drained, "UNUSED_SECONDS", 0.0)
    assert told.keeps() == "node1:3" and not ended.wait(0.1)
    drained.Holder(tmp_path)
    assert ended.wait(PATIENCE_SECONDS)
    ended.clear()
    drained.clear(tmp_path, "node1:3")
    assert ended.wait(PATIENCE_SECONDS)


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
    for text in (
        "[{}]",
        "{}",
        "null",
        "[1]",
        '[{"host": 1, "gpu": 0, "uuid": "", "reason": "", "time": ""}]',
    ):
        (tmp_path / drained.FILE).write_text(text)
        with pytest.raises(files.DamagedFile, match=r"drained\.json: is no list of drained GPUs; delete it"):
            drained.read(tmp_path)
        assert "drained.json: is no list" in report(tmp_path)[0]
