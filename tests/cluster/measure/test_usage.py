import sys
import types

import pytest
import torch

from cluster.measure.usage import joules_of, joules_of_the_board, peak_memory_bytes


class NVMLError(Exception):
    pass


def nvml(monkeypatch, *, problem=None, number=1):
    """A stand-in for the driver: its counter goes up by 1.5 J per reading."""
    readings = iter(range(10_000, 10**6, 1500))

    def total(handle):
        if problem:
            raise NVMLError(problem)
        return next(readings)

    module = types.SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=total, nvmlDeviceGetCount=lambda: number,
        nvmlDeviceGetHandleByIndex=lambda index: index,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_energy_is_the_difference_of_the_counter_in_joules(monkeypatch):
    nvml(monkeypatch)
    with joules_of(torch.device("cuda", 0)) as energy:
        pass
    assert (energy.joules, energy.reason) == (1.5, None)


def test_a_driver_without_the_counter_says_so(monkeypatch):
    nvml(monkeypatch, problem="Not Supported")
    with joules_of(torch.device("cuda", 0)) as energy:
        pass
    assert energy.joules is None and energy.reason == "NVML: Not Supported"


def test_the_energy_of_the_one_board_here_is_read_without_torch(monkeypatch):
    nvml(monkeypatch)
    read, reason = joules_of_the_board()
    assert reason is None and read() + 1.5 == read()
    nvml(monkeypatch, problem="Not Supported")
    assert joules_of_the_board() == (None, "NVML: Not Supported")
    nvml(monkeypatch, number=8)
    assert joules_of_the_board() == (None, "8 GPUs are here, and which of them serves is not known")


def test_a_cpu_has_no_energy_and_its_resident_set():
    with joules_of(torch.device("cpu")) as energy:
        pass
    assert energy.joules is None and energy.reason == "not measured on a CPU"
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(100_000_000, dtype=torch.uint8)
    grown = peak_memory_bytes(torch.device("cpu")) - before
    assert len(block) == pytest.approx(1e8) and grown <= 1.2e8
    assert before > 1e8  # torch alone
