"""This machine: CPU, memory, and GPUs as NVML, the driver's own library, describes them.

python -m cluster.machine.host      print `gpus` of this machine as one JSON object
"""

import ctypes
import json
import os
import platform
import pwd
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, TimeoutExpired
from typing import Any

from cluster.process import Child

KIB = 1024
ROOT = Path(__file__).parents[2]
ANSWER_SECONDS = 20  # a driver that hangs, hangs whoever asks: gpus() asks from a child
KILL_SECONDS = 1


def describe_host() -> dict[str, Any]:
    """Host name, operating system, CPU, memory (GiB) and GPUs of this machine, for the record of a run.

    `gpus` is empty without NVIDIA's driver; `gpus_problem` says which GPU does not answer, and why.
    `cpu_held_to` is the vector tier that torch is held to by ATEN_CPU_CAPABILITY, None where it is free.
    """
    about: dict[str, Any] = {
        "hostname": platform.node(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "cpu_held_to": os.environ.get("ATEN_CPU_CAPABILITY"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / KIB**3, 1),
    }
    found = gpus()
    about["gpus"] = [gpu["name"] for gpu in found["gpus"]]
    if found["gpus"]:
        about["gpu_driver"] = found["gpus"][0]["driver"]
    if found["gpus_problem"]:
        about["gpus_problem"] = found["gpus_problem"]
    return about


def gpus(*, without: Collection[int] = ()) -> dict[str, Any]:
    """`gpus` of this machine, and `gpus_problem` if the driver or one of them does not answer.

    Leaves out the GPUs of the indices `without`.
    Units: memory_gib in GiB; ecc_errors counts uncorrected errors since boot, None where ECC is off;
    others: [user, pid] of processes of other users.
    """
    if not has_driver():
        return {"gpus": [], "gpus_problem": None}
    child = Child(
        [sys.executable, "-m", "cluster.machine.host"],
        cwd=ROOT,
        text=True,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        answer, errors = child.communicate(timeout=ANSWER_SECONDS)
    except TimeoutExpired:
        child.kill()
        with suppress(TimeoutExpired):  # inside a driver that hangs, not even SIGKILL ends a process
            child.wait(KILL_SECONDS)
        problem = f"NVML did not answer within {ANSWER_SECONDS} s; is the driver hung?"
        return {"gpus": [], "gpus_problem": problem}
    if child.returncode:
        return {"gpus": [], "gpus_problem": f"NVML: {errors.strip()[-300:]}"}
    found = json.loads(answer)
    lost = [f"GPU {index}: {error}" for index, error in found.pop("lost") if index not in without]
    if lost:
        found["gpus_problem"] = f"NVML: {', '.join(lost)}"
    found["gpus"] = [gpu for gpu in found["gpus"] if gpu["index"] not in without]
    return found


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed: its library loads. Asks the driver nothing, so it cannot hang."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _ask_driver() -> dict[str, Any]:
    """As `gpus`, and `lost`: [index, error] of each GPU that does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count, driver = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return {"gpus": [], "gpus_problem": f"NVML: {error}", "lost": []}
    found, lost = [], []
    for index in range(count):
        try:
            found.append({"index": index, "driver": driver, **_gpu(index)})
        except pynvml.NVMLError as error:  # such as a GPU that fell off the bus
            lost.append([index, str(error)])
    return {"gpus": found, "gpus_problem": None, "lost": lost}


def _gpu(index: int) -> dict[str, Any]:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        errors = pynvml.nvmlDeviceGetTotalEccErrors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        )
    except pynvml.NVMLError_NotSupported:  # ECC is off
        errors = None
    others = []
    with suppress(pynvml.NVMLError_NotSupported):
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        others = [[user, each.pid] for each in running if (user := other_user(each.pid))]
    generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / KIB**3, 1),
        "ecc_errors": errors,
        "persistence": pynvml.nvmlDeviceGetPersistenceMode(handle) == pynvml.NVML_FEATURE_ENABLED,
        "others": others,
        "pcie": f"{generation}x{pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)}",
    }


def other_user(pid: int) -> str | None:
    """The name of the user whose process this is; None if it is our own, or has ended."""
    with suppress(OSError):
        user = os.stat(f"/proc/{pid}").st_uid
        if user != os.getuid():
            try:
                return pwd.getpwuid(user).pw_name
            except KeyError:
                return str(user)
    return None


def _cpu_model() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


if __name__ == "__main__":
    print(json.dumps(_ask_driver()))
