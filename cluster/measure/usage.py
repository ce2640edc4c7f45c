"""What a process used of its device: peak memory, and energy by the counter of the driver (NVML)."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SHORTEST_SECONDS = 0.5  # the counter moves every few tens of milliseconds

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "exitcode  : -9")


@dataclass
class Energy:
    """Joules between the two ends of a `with` block, or None and the reason.

    Of a block of SHORTEST_SECONDS it is good to a tenth. A shorter one may read 0, or more than the board
    can draw.
    """

    joules: float | None = None
    reason: str | None = None
    so_far: Callable[[], float | None] = lambda: None  # since the block began


@contextmanager
def joules_of(device: Any) -> Iterator[Energy]:
    """Measure a torch device. The counter (`nvmlDeviceGetTotalEnergyConsumption`) is the whole board's.

    Source: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html, in mJ, since Volta.
    """
    energy = Energy()
    read = _counter(device, energy)
    if read:
        before = read()
        energy.so_far = lambda: (read() - before) / 1e3
    yield energy
    energy.joules = energy.so_far()


def joules_of_the_board() -> tuple[Callable[[], float] | None, str | None]:
    """A function that reads the joules of this machine's one GPU since some origin, or None and the reason.

    Without torch: for whoever measures a device that another process uses. As in `joules_of`.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        if (number := pynvml.nvmlDeviceGetCount()) != 1:
            return None, f"{number} GPUs are here, and which of them serves is not known"
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, None


def out_of_memory(message: str) -> bool:
    """Whether an error's text, of torch, CUDA, NCCL or torchrun, says that memory ran out."""
    return any(sign in message for sign in OUT_OF_MEMORY)


def peak_memory_bytes(device: Any) -> int:
    """Of this process so far: what torch allocated on a GPU, or the resident set on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _counter(device: Any, energy: Energy) -> Any:
    """A function that reads the counter in millijoules, or None with the reason in `energy`."""
    if device.type != "cuda":
        energy.reason = "not measured on a CPU"
        return None
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        energy.reason = f"NVML: {error}"
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
