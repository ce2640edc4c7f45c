"""What NVML says of GPUs. The answers are those of a stand-in: there is no GPU here."""

import os
import subprocess
from functools import partial

import pytest

from cluster.machine import host
from tests import fake_nvml
from tests.waiting import wait_until


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Makes NVML answer so, to this process and to children."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(host, "has_driver", lambda: True)
    monkeypatch.delitem(host.sys.modules, "pynvml", raising=False)

    fake_nvml.write(tmp_path)
    yield partial(fake_nvml.write, tmp_path)
    host.sys.modules.pop("pynvml", None)


def test_a_sound_node(answer):
    found = host.gpus()
    assert found["gpus_problem"] is None and [gpu["index"] for gpu in found["gpus"]] == [0, 1]
    gpu = found["gpus"][1]
    assert (gpu["name"], gpu["driver"], gpu["pcie"]) == ("NVIDIA A40", "570.86.15", "4x16")
    assert gpu["memory_gib"] == 45.0 and gpu["ecc_errors"] == 0 and gpu["persistence"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")
def test_another_users_process_on_a_gpu_is_named(answer):
    with subprocess.Popen(["setpriv", "--reuid=65534", "sleep", "600"]) as other:
        try:
            wait_until(lambda: os.stat(f"/proc/{other.pid}").st_uid == 65534)
            answer(f"PIDS = {{1: [{os.getpid()}, {other.pid}, 999999999]}}")
            assert [gpu["others"] for gpu in host.gpus()["gpus"]] == [[], [["nobody", other.pid]]]
        finally:
            other.kill()


def test_ecc_that_is_off_is_no_error(answer):
    answer("ECC, PERSISTENCE, NUM_GPUS = None, 0, 1")
    (gpu,) = host.gpus()["gpus"]
    assert gpu["ecc_errors"] is None and not gpu["persistence"]


def test_a_lost_gpu_is_a_problem_and_the_others_are_counted(answer):
    answer("LOST, NUM_GPUS = (1,), 3")
    found = host.gpus()
    assert [gpu["index"] for gpu in found["gpus"]] == [0, 2]
    assert found["gpus_problem"] == "NVML: GPU 1: GPU is lost"
    found = host.gpus(without=[0, 1])
    assert [gpu["index"] for gpu in found["gpus"]] == [2] and found["gpus_problem"] is None


def test_the_host_is_described_and_a_broken_driver_says_how(answer):
    found = host.describe_host()
    assert found["gpus"] == ["NVIDIA A40", "NVIDIA A40"] and found["gpu_driver"] == "570.86.15"
    assert found["cpu_cores"] >= 1 and found["memory_gib"] > 0.1 and found["hostname"]
    answer("PROBLEM = 'Driver/library version mismatch'")
    found = host.describe_host()
    assert found["gpus"] == [] and found["gpus_problem"] == "NVML: Driver/library version mismatch"


def test_a_driver_that_hangs_is_a_problem(answer, monkeypatch):
    monkeypatch.setattr(host, "ANSWER_SECONDS", 0.5)
    answer("import time; time.sleep(60)")
    found = host.gpus()
    assert found == {"gpus": [], "gpus_problem": "NVML did not answer within 0.5 s; is the driver hung?"}


def test_without_a_driver_there_are_no_gpus_and_no_problem(monkeypatch):
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert host.gpus() == {"gpus": [], "gpus_problem": None}
    assert "gpu_driver" not in host.describe_host()
