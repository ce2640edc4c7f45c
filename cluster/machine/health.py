"""What goes wrong with a node while a run goes on: its GPUs by NVML, its kernel's log, its disks.

NVML's events give Xids to any user. The kernel's log gives them too, also those of a GPU that NVML has lost,
and the errors of disks; only where this user may read it. `cluster.heart.health` judges.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.machine.host import has_driver, other_user

KERNEL_LOG = Path("/dev/kmsg")
# The form of a line: https://docs.nvidia.com/deploy/xid-errors/working-with-xid-errors.html
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F]+:[0-9a-fA-F]+:[0-9a-fA-F]+)[^)]*\): (\d+)")
DISK_ERROR = re.compile(  # not of an empty drive, nor the mount option errors=remount-ro
    r"I/O error, dev (?!fd\d|sr\d)\w+|(?:EXT4|XFS|BTRFS)\S*.* error\b.*|.*[Rr]emount\S* .*read-only.*"
)
MOST_LINES = 10_000  # of the kernel's log, in one look


class Node:
    """This node. `look` reads its state, and what has happened since the last look.

    Args:
        own: a folder on a disk of its own, which must not fill up either.
        shared: folders that other nodes see too.
        kernel_log: as Linux's /dev/kmsg.
    """

    def __init__(self, *, own: str, shared: Sequence[str] = (), kernel_log: Path = KERNEL_LOG) -> None:
        self._own, self._shared = str(Path(own).absolute()), shared
        self._log = _open_at_end(kernel_log)
        self._gpus = _Gpus() if has_driver() else None

    def look(self) -> dict[str, Any]:
        """JSON-ready.

        host; gpus: see `_Gpus.read`; gpus_problem: what the driver does not answer, and why; xids: [index of
        the GPU or None, Xid] each, since the last look; disk_errors: lines of the kernel's log; disks: folder
        -> free bytes, of `own`, or why nothing can be written there.
        """
        found: dict[str, Any] = {"gpus": [], "gpus_problem": None, "xids": []}
        if self._gpus:
            found = self._gpus.read()
        disk_errors = []
        for line in _lines(self._log):
            if match := XID.search(line):
                index = self._gpus.index_at(match[1]) if self._gpus else None
                found["xids"].append([index, int(match[2])])
            elif match := DISK_ERROR.search(line):
                disk_errors.append(match[0][:200])
        return {
            **found,
            "host": platform.node(),
            "disk_errors": disk_errors,
            "disks": {self._own: _free(self._own)}
            | {disk: why for disk in self._shared if isinstance(why := _free(disk), str)},
        }

    def clock(self) -> float:
        """Seconds since the epoch, here."""
        return time.time()


class _Gpus:
    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        self._events: Any = None
        self._heard: set[int] = set()  # indices of the GPUs whose Xids arrive
        self._unanswered: dict[str, str] = {}  # function of NVML -> its error, in this look
        self._known: dict[int, tuple[str, str]] = {}  # index -> UUID and bus, of those that have answered

    def index_at(self, bus: str) -> int | None:
        """The GPU at a place on the PCI bus, as the kernel writes it: domain:bus:device."""
        place = _place(bus)
        return next((index for index, (_, at) in self._known.items() if _place(at) == place), None)

    def read(self) -> dict[str, Any]:
        """gpus: a dictionary each, in which `lost` says why it does not answer; gpus_problem; xids."""
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            return {"gpus": [], "gpus_problem": f"NVML: {error}", "xids": []}
        self._unanswered.clear()
        gpus = []
        for index in sorted({*range(count), *self._known}):
            try:
                gpus.append(self._gpu(index))
            except nvml.NVMLError as error:
                uuid = self._known.get(index, ("", ""))[0]
                gpus.append({"index": index, "uuid": uuid, "lost": str(error)})
        xids = self._xids()
        told = ", ".join(f"{question} ({why})" for question, why in self._unanswered.items())
        return {"gpus": gpus, "gpus_problem": f"NVML: {told}" if told else None, "xids": xids}

    def _gpu(self, index: int) -> dict[str, Any]:
        """ecc_errors: uncorrected, since boot; link_errors: PCIe replays and NVLink's CRC errors and replays.

        What a GPU does not have is None. others: [user, pid] of processes of other users on it.
        """
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        self._known[index] = uuid, _text(nvml.nvmlDeviceGetPciInfo(handle).busId)
        kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        rows = self._ask(nvml.nvmlDeviceGetRemappedRows, handle) or (0, 0, 0, 0)
        return {
            "index": index,
            "uuid": uuid,
            "lost": None,
            "ecc_errors": self._ask(nvml.nvmlDeviceGetTotalEccErrors, handle, kind, since),
            "remap_pending": bool(rows[2]),
            "remap_failed": bool(rows[3]),
            "throttled": self._throttled(handle),
            "link_errors": self._link_errors(handle),
            "others": self._others(handle),
        }

    def _throttled(self, handle: Any) -> list[str]:
        nvml = self._nvml
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        named = {
            "heat": nvml.nvmlClocksThrottleReasonSwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
            "its power supply": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        }
        found = [name for name, bits in named.items() if reasons & bits]
        return found or ["heat or power"] * bool(reasons & nvml.nvmlClocksThrottleReasonHwSlowdown)

    def _link_errors(self, handle: Any) -> int | None:
        nvml = self._nvml
        total = self._ask(nvml.nvmlDeviceGetPcieReplayCounter, handle) or 0
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            if (is_active := self._ask(nvml.nvmlDeviceGetNvLinkState, handle, link)) is None:
                break
            for counter in (
                (nvml.NVML_NVLINK_ERROR_DL_REPLAY, nvml.NVML_NVLINK_ERROR_DL_CRC_DATA) if is_active else ()
            ):
                total += self._ask(nvml.nvmlDeviceGetNvLinkErrorCounter, handle, link, counter) or 0
        return None if self._unanswered else total  # which would lack some

    def _others(self, handle: Any) -> list[tuple[str, int]]:
        running = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        return [(user, each.pid) for each in running if (user := other_user(each.pid))]

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """An answer, or None if this GPU or its driver has no such thing, or fails to answer just this.

        Raises:
            NVMLError: the GPU itself is lost.
        """
        nvml = self._nvml
        try:
            return question(*arguments)
        except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired):
            raise
        except (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_InvalidArgument,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_FunctionNotFound,
        ):
            return None
        except nvml.NVMLError as error:
            self._unanswered[question.__name__] = str(error)
            return None

    def _xids(self) -> list[list[int | None]]:
        """[index, Xid] of each event since the last call."""
        nvml = self._nvml
        found: list[list[int | None]] = []
        try:
            self._events = self._events or nvml.nvmlEventSetCreate()
            for index in self._known.keys() - self._heard:
                with suppress(nvml.NVMLError):  # it refuses or is lost: asked again the next time
                    handle = nvml.nvmlDeviceGetHandleByIndex(index)
                    nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._events)
                    self._heard.add(index)
            while True:  # until the time is out, at once
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
                found.append([None, int(event.eventData)])
                with suppress(nvml.NVMLError):  # a lost GPU may no longer tell its index
                    found[-1][0] = nvml.nvmlDeviceGetIndex(event.device)
        except nvml.NVMLError_Timeout:  # no more
            return found
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):  # a driver without events
            return found
        except nvml.NVMLError as error:  # such as a lost GPU in the set: the next look makes another set
            self._unanswered["Xids"] = str(error)
            self._heard.clear()
            if self._events is not None:
                with suppress(nvml.NVMLError):
                    nvml.nvmlEventSetFree(self._events)
            self._events = None
            return found


def throttled() -> set[int]:
    """Indices of the GPUs whose clocks heat or power hold down at this moment."""
    return {gpu["index"] for gpu in _Gpus().read()["gpus"] if gpu.get("throttled")}


def uuid_of(gpu: str) -> str:
    """NVML's UUID of the GPU of this index; "" if it has none, or does not answer. A UUID is itself."""
    if not gpu.isdigit():
        return gpu
    gpus = _Gpus().read()["gpus"] if has_driver() else []
    return next((each["uuid"] for each in gpus if each["index"] == int(gpu)), "")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _place(bus: str) -> tuple[int, ...]:
    """00000000:3B:00.0 of NVML and 0000:3b:00 of the kernel are one place."""
    return tuple(int(part, 16) for part in bus.partition(".")[0].split(":"))


def _open_at_end(log: Path) -> int | None:
    """The kernel's log, behind its newest line; None where it cannot be read."""
    try:
        descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    with suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_END)
    return descriptor


def _lines(log: int | None) -> list[str]:
    """New lines. One read gives one (Linux, Documentation/ABI/testing/dev-kmsg)."""
    found: list[str] = []
    while log is not None and len(found) < MOST_LINES:
        try:
            line = os.read(log, 8192)
        except BrokenPipeError:  # overwritten before it was read
            continue
        except OSError:  # no more
            break
        if not line:
            break
        found.append(line.decode(errors="replace").partition(";")[2].partition("\n")[0])
    return found


def _free(disk: str) -> int | str:
    try:
        found = os.statvfs(disk)
    except OSError as error:
        return error.strerror or repr(error)
    return "it is read-only now" if found.f_flag & os.ST_RDONLY else found.f_bavail * found.f_frsize
