"""A stand-in for NVML, where there is no GPU: the module pynvml, whose answers a test writes.

`write(folder, ...)` puts it there. With the folder on `sys.path`, or in PYTHONPATH, every process that asks
for pynvml gets it; later calls of `write` change the answers of processes that run.
`tests/cluster/machine/test_health.py` checks that the real pynvml has the names that are asked for.
"""

from pathlib import Path

STAND_IN = """
import pathlib, types
_here = pathlib.Path(__file__)
class NVMLError(Exception): pass
class NVMLError_NotSupported(NVMLError): pass
class NVMLError_InvalidArgument(NVMLError): pass
class NVMLError_NoPermission(NVMLError): pass
class NVMLError_FunctionNotFound(NVMLError): pass
class NVMLError_GpuIsLost(NVMLError): pass
class NVMLError_ResetRequired(NVMLError): pass
class NVMLError_Timeout(NVMLError): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = NVML_FEATURE_ENABLED = 1
NVML_NVLINK_ERROR_DL_REPLAY, NVML_NVLINK_ERROR_DL_CRC_DATA, NVML_NVLINK_MAX_LINKS = 0, 3, 36
nvmlEventTypeXidCriticalError = 8
nvmlClocksThrottleReasonHwSlowdown, nvmlClocksThrottleReasonSwThermalSlowdown = 8, 32
nvmlClocksThrottleReasonHwThermalSlowdown, nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 64, 128
def nvmlInit():
    global PROBLEM, LOST, ECC, PERSISTENCE, REASONS, NUM_GPUS, XIDS, ROWS, REPLAYS, PIDS, REFUSES, NO_EVENTS
    PROBLEM, LOST, ECC, PERSISTENCE, REASONS, NUM_GPUS, XIDS = None, (), 0, 1, {}, 2, []
    ROWS, REPLAYS, PIDS, REFUSES, NO_EVENTS = {}, {}, {}, (), None
    exec(_here.with_name("answers.py").read_text(), globals())
    if PROBLEM: raise NVMLError(PROBLEM)
def nvmlDeviceGetCount(): return NUM_GPUS
def nvmlSystemGetDriverVersion(): return "570.86.15"
def nvmlDeviceGetHandleByIndex(index):
    if index in LOST: raise NVMLError_GpuIsLost("GPU is lost")
    return index
nvmlDeviceGetIndex = nvmlDeviceGetHandleByIndex
def nvmlDeviceGetUUID(handle): return f"GPU-{handle}{handle}"
def nvmlDeviceGetPciInfo(handle): return types.SimpleNamespace(busId=f"00000000:{handle + 0x3a:02X}:00.0")
def nvmlDeviceGetTotalEccErrors(handle, kind, counter):
    if ECC is None: raise NVMLError_NotSupported("Not Supported")
    return ECC
def nvmlDeviceGetRemappedRows(handle):
    if ROWS is None: raise NVMLError("Unknown Error")
    return ROWS.get(handle, (0, 0, 0, 0))
def nvmlDeviceGetPcieReplayCounter(handle): return REPLAYS.get(handle, 0)
def nvmlDeviceGetNvLinkState(handle, link):
    if link > 1: raise NVMLError_InvalidArgument("Invalid Argument")
    return link
def nvmlDeviceGetNvLinkErrorCounter(handle, link, counter): return REPLAYS.get(("NVLink", handle), 0)
def nvmlDeviceGetComputeRunningProcesses(handle):
    return [types.SimpleNamespace(pid=pid) for pid in PIDS.get(handle, ())]
def nvmlDeviceGetName(handle): return "NVIDIA A40"
def nvmlDeviceGetMemoryInfo(handle): return types.SimpleNamespace(total=46068 << 20)
def nvmlDeviceGetPersistenceMode(handle): return PERSISTENCE
def nvmlDeviceGetMaxPcieLinkGeneration(handle): return 4
def nvmlDeviceGetMaxPcieLinkWidth(handle): return 16
def nvmlDeviceGetCurrentClocksThrottleReasons(handle): return REASONS.get(handle, 0)
_waited, _registered = 0, set()
def nvmlEventSetCreate(): return "events"
def nvmlEventSetFree(events): _registered.clear()
def nvmlDeviceRegisterEvents(handle, kinds, events):
    if handle in REFUSES: raise NVMLError("Unknown Error")
    _registered.add(handle)
def nvmlEventSetWait_v2(events, milliseconds):
    global _waited
    if NO_EVENTS: raise NVMLError(NO_EVENTS)
    while _waited < len(XIDS) and XIDS[_waited][0] not in _registered: _waited += 1
    if _waited >= len(XIDS): raise NVMLError_Timeout("Timeout")
    _waited += 1
    index, xid = XIDS[_waited - 1]
    return types.SimpleNamespace(device=index, eventData=xid)
"""


def write(folder: Path, answers: str = "") -> None:
    """Make it answer so: Python that sets PROBLEM, LOST, ECC, ... (`nvmlInit` of the stand-in has all names).

    XIDS: (index, Xid) of all events from the beginning.
    """
    for name, text in (("answers.py", answers), ("pynvml.py", STAND_IN)):
        new = folder / f".{name}"
        new.write_text(text)
        new.rename(folder / name)
