"""What a look at a node finds. There is no GPU here, so NVML is a stand-in; the rest is this machine's."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from cluster.machine import health
from tests import fake_nvml
from tests.waiting import wait_until

KERNEL_LINES = """\
4,1,5,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=77, name=python, GPU has fallen off the bus.
4,2,6,-;usb 1-1: new device
3,3,7,-;blk_update_request: I/O error, dev nvme0n1, sector 8 op 0x1:(WRITE)
2,4,8,-;EXT4-fs error (device nvme0n1p1): ext4_find_entry:1
6,5,9,-;EXT4-fs (sda1): mounted filesystem with ordered data mode. Opts: errors=remount-ro
3,6,10,-;blk_update_request: I/O error, dev sr0, sector 0 op 0x0:(READ)
"""


@pytest.fixture
def answer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(health, "has_driver", lambda: True)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    fake_nvml.write(tmp_path)
    yield partial(fake_nvml.write, tmp_path)
    sys.modules.pop("pynvml", None)


def test_a_look_gives_what_nvml_says_of_each_gpu(answer, tmp_path):
    node = health.Node(own=".", kernel_log=tmp_path / "none")
    found = node.look()
    assert found["host"] == os.uname().nodename
    assert [(gpu["index"], gpu["uuid"], gpu["lost"]) for gpu in found["gpus"]] == [
        (0, "GPU-00", None),
        (1, "GPU-11", None),
    ]
    answer("REASONS, REPLAYS, ROWS, XIDS = {0: 33, 1: 128}, {1: 7}, {0: (0, 1, 1, 0)}, [(1, 48), (0, 31)]")
    found = node.look()
    hot, other = found["gpus"]
    assert hot["throttled"] == ["heat"] and other["throttled"] == ["its power supply"]
    assert hot["remap_pending"] and not hot["remap_failed"] and other["link_errors"] == 7
    assert found["xids"] == [[1, 48], [0, 31]] and node.look()["xids"] == []
    answer("REPLAYS = {('NVLink', 1): 2}")  # its first link is off, its second one is not
    assert [gpu["link_errors"] for gpu in node.look()["gpus"]] == [0, 4]
    answer("LOST = (1,)")
    assert node.look()["gpus"][1] == {"index": 1, "uuid": "GPU-11", "lost": "GPU is lost"}
    answer("PROBLEM = 'Driver/library version mismatch'")
    assert node.look()["gpus_problem"] == "NVML: Driver/library version mismatch"


def test_xids_arrive_of_every_gpu_that_does_not_refuse_and_of_one_that_is_lost(answer, tmp_path):
    answer("REFUSES, XIDS = (0,), [(0, 13), (1, 48)]")
    node = health.Node(own=".", kernel_log=tmp_path / "none")
    assert node.look()["xids"] == [[1, 48]]
    events = "[(0, 13), (1, 48), (0, 31), (1, 79)]"
    answer(f"LOST, XIDS = (1,), {events}")
    assert node.look()["xids"] == [[0, 31], [None, 79]]


def test_a_failure_of_nvml_is_told_and_is_neither_a_lost_gpu_nor_the_end_of_the_xids(answer, tmp_path):
    node = health.Node(own=".", kernel_log=tmp_path / "none")
    assert node.look()["gpus_problem"] is None
    answer("ROWS, NO_EVENTS, XIDS = None, 'GPU is lost', [(1, 48)]")
    found = node.look()
    told = "NVML: nvmlDeviceGetRemappedRows (Unknown Error), Xids (GPU is lost)"
    assert found["gpus_problem"] == told and found["xids"] == []
    assert [(gpu["lost"], gpu["link_errors"]) for gpu in found["gpus"]] == [(None, None)] * 2
    answer("XIDS = [(1, 48)]")
    found = node.look()
    assert found["gpus_problem"] is None and found["xids"] == [[1, 48]]


def test_throttled_is_what_is_active_and_not_what_is_not(answer):
    answer("REASONS, NUM_GPUS = {0: 1, 1: 33, 2: 8}, 3")  # 1: idle
    assert health.throttled() == {1, 2}


def test_the_kernels_lines_are_read_and_a_gpu_is_found_by_its_place_on_the_bus(answer, tmp_path):
    log = tmp_path / "kmsg"
    log.write_text("4,0,1,-;NVRM: Xid (PCI:0000:3b:00): 48, of before\n")
    node = health.Node(own=".", kernel_log=log)
    node.look()
    for line in KERNEL_LINES.splitlines(keepends=True):  # a read gives one, as of the real one
        with log.open("a") as file:
            file.write(line)
        found = node.look()
        if "Xid" in line:
            assert found["xids"] == [[1, 79]]
        else:
            assert found["xids"] == [] and bool(found["disk_errors"]) == ("nvme0" in line)


@pytest.mark.skipif(not os.access("/dev/kmsg", os.R_OK | os.W_OK), reason="only root writes the kernel's log")
def test_the_kernels_own_log_is_read_from_its_end():
    try:
        log = health._open_at_end(health.KERNEL_LOG)
        mark = f"asuncion's tests wrote this, {os.getpid()}.{time.monotonic()}"
        Path("/dev/kmsg").write_text(f"<7>{mark}\n")
    except OSError:
        pytest.skip("the kernel's log is closed here")
    read = []
    wait_until(
        lambda: read.extend(health._lines(log)) or any(mark in line for line in read), told=lambda: read
    )
    os.close(log)


def test_disks_are_this_machines(tmp_path):
    gone = str(tmp_path / "gone")
    found = health.Node(own=str(tmp_path), shared=[str(tmp_path), gone]).look()["disks"]
    assert found[str(tmp_path)] > 0 and found[gone] == "No such file or directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")
def test_another_users_process_on_a_gpu_is_named_and_left_alone(answer):
    command = ["setpriv", "--reuid=65534", "sleep", "600"]
    with subprocess.Popen(command) as other, subprocess.Popen(["sleep", "600"]) as own:
        try:
            node = health.Node(own=".")
            answer(f"PIDS = {{1: [{other.pid}, {own.pid}, 999999999]}}")
            mine = lambda: node.look()["gpus"][1]["others"]  # noqa: E731
            assert wait_until(mine, told=mine) == [("nobody", other.pid)]
            assert other.poll() is None
        finally:
            other.kill()
            own.kill()


def test_the_real_pynvml_has_every_name_that_is_asked_for():
    """The stand-in must not know more than NVML's own module, which can be read without a GPU."""
    names = set(re.findall(r"nvml\.(\w+)", Path(health.__file__).read_text()))
    source = Path(importlib.util.find_spec("pynvml").origin).read_text()
    defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    defined |= set(re.findall(r"^(\w+)\s*=", source, flags=re.MULTILINE)) | {"NVMLError"}
    errors = {name for name in names if name.startswith("NVMLError_")}
    assert names - errors <= defined and len(names) > 20
    for name in errors:  # pynvml makes the classes from the codes
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removeprefix("NVMLError_")).upper()
        assert f"NVML_ERROR_{code}" in defined
