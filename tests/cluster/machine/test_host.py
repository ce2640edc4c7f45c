"""What NVML says of GPUs. The answers are those of a stand-in: there is no GPU here."""

import pytest

from cluster.machine import host

STAND_IN = """
import types
class NVMLError(Exception): pass
class NVMLError_NotSupported(NVMLError): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = NVML_FEATURE_ENABLED = 1
nvmlClocksThrottleReasonHwSlowdown, nvmlClocksThrottleReasonSwThermalSlowdown = 8, 32
PROBLEM, LOST, ECC, PERSISTENCE, REASONS, NUM_GPUS = None, (), 0, 1, (), 2
def nvmlInit():
    if PROBLEM: raise NVMLError(PROBLEM)
def nvmlDeviceGetCount(): return NUM_GPUS
def nvmlSystemGetDriverVersion(): return "570.86.15"
def nvmlDeviceGetHandleByIndex(index):
    if index in LOST: raise NVMLError("GPU is lost")
    return index
def nvmlDeviceGetTotalEccErrors(handle, kind, counter):
    if ECC is None: raise NVMLError_NotSupported("Not Supported")
    return ECC
def nvmlDeviceGetName(handle): return "NVIDIA A40"
def nvmlDeviceGetMemoryInfo(handle): return types.SimpleNamespace(total=46068 << 20)
def nvmlDeviceGetPersistenceMode(handle): return PERSISTENCE
def nvmlDeviceGetMaxPcieLinkGeneration(handle): return 4
def nvmlDeviceGetMaxPcieLinkWidth(handle): return 16
def nvmlDeviceGetCurrentClocksThrottleReasons(handle): return REASONS[handle]
"""


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Makes NVML answer so, to this process and to children."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(host, "has_driver", lambda: True)
    monkeypatch.delitem(host.sys.modules, "pynvml", raising=False)

    def write(changes=""):
        (tmp_path / "pynvml.py").write_text(f"{STAND_IN}{changes}\n")

    write()
    yield write
    host.sys.modules.pop("pynvml", None)


def test_a_sound_node(answer):
    found = host.gpus()
    assert found["gpus_problem"] is None and [gpu["index"] for gpu in found["gpus"]] == [0, 1]
    gpu = found["gpus"][1]
    assert (gpu["name"], gpu["driver"], gpu["pcie"]) == ("NVIDIA A40", "570.86.15", "4x16")
    assert gpu["memory_gib"] == 45.0 and gpu["ecc_errors"] == 0 and gpu["persistence"]


def test_ecc_that_is_off_is_no_error(answer):
    answer("ECC, PERSISTENCE, NUM_GPUS = None, 0, 1")
    (gpu,) = host.gpus()["gpus"]
    assert gpu["ecc_errors"] is None and not gpu["persistence"]


def test_a_lost_gpu_is_a_problem_and_the_others_are_counted(answer):
    answer("LOST, NUM_GPUS = (1,), 3")
    found = host.gpus()
    assert [gpu["index"] for gpu in found["gpus"]] == [0, 2]
    assert found["gpus_problem"] == "NVML: GPU 1: GPU is lost"


def test_the_host_is_described_and_a_broken_driver_says_how(answer):
    found = host.describe_host()
    assert found["gpus"] == ["NVIDIA A40", "NVIDIA A40"] and found["gpu_driver"] == "570.86.15"
    assert found["cpu_cores"] >= 1 and found["memory_gib"] > 0.1 and found["hostname"]
    answer("PROBLEM = 'Driver/library version mismatch'")
    found = host.describe_host()
    assert found["gpus"] == [] and found["gpus_problem"] == "NVML: Driver/library version mismatch"
    assert host.throttled() == set()


def test_a_driver_that_hangs_is_a_problem(answer, monkeypatch):
    monkeypatch.setattr(host, "ANSWER_SECONDS", 0.5)
    answer("import time; time.sleep(60)")
    found = host.gpus()
    assert found == {"gpus": [], "gpus_problem": "NVML did not answer within 0.5 s; is the driver hung?"}


def test_without_a_driver_there_are_no_gpus_and_no_problem(monkeypatch):
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert host.gpus() == {"gpus": [], "gpus_problem": None}
    assert "gpu_driver" not in host.describe_host()


def test_throttled_is_what_is_active_and_not_what_is_not(answer):
    answer("REASONS, NUM_GPUS = (1, 33, 8), 3")  # 1: idle
    assert host.throttled() == {1, 2}
