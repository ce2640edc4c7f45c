"""Judges what `cluster.machine.health` reads: which GPU is bad, and what else a user should know of a node.

A bad GPU has lost memory or its bus, and computes no more, or not reliably. Runs stop using it
(`cluster.heart.drained`). Everything else is a warning.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.files import size_text

GPU_BAD, GPU_PROBLEM, NODE_PROBLEM = "gpu_bad", "gpu_problem", "node_problem"  # kinds of events
# Of the GPU itself; others come from the program, or say less than these do.
# Source: https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html
BAD_XIDS = {
    48: "an error of its memory that ECC could not correct",
    64: "a row of its memory that could not be replaced",
    74: "an error of its NVLink",
    79: "it has fallen off the bus",
    94: "an error of its memory that ECC could not correct",
    95: "an error of its memory that ECC could not contain",
    119: "its own processor (GSP) does not answer",
    120: "an error of its own processor (GSP)",
    140: "an error of its memory that ECC could not recover",
}
THROTTLED_LOOKS = 3  # in a row, before it is reported
CLOCK_SECONDS = 1.0  # the preflight's limit
DISK_BYTES = 2e9  # free, below which it is reported


@dataclass(frozen=True)
class Finding:
    """Something new. kind: of the event; gpu: its index, or None; uuid: of that GPU."""

    kind: str
    text: str
    host: str
    gpu: int | None = None
    uuid: str = ""


class Judge:
    """Compares the looks at one node. Each problem is a finding once, until it has gone and comes back."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, str], int] = {}  # (GPU, counter) -> its value when the watch began
        self._throttled: Counter[int] = Counter()  # GPU -> looks in a row
        self.open: dict[tuple[Any, str], str] = {}  # (GPU or None, what) -> the text of each open problem
        self.num_throttled = 0

    def findings(self, look: dict[str, Any], *, clock_seconds: float = 0.0) -> list[Finding]:
        """What is new in a look (`machine.health.Node.look`). clock_seconds: the node's is ahead of ours."""
        host, found = look["host"], {}
        for kind, gpu, what, text in self._problems(look, clock_seconds):
            found[gpu, what] = Finding(kind, text, host, gpu, _uuid(look, gpu))
        new = [finding for key, finding in found.items() if key not in self.open]
        # an Xid is an event, and no state that could end
        kept = {key: text for key, text in self.open.items() if key[1].startswith("Xid")}
        self.open = kept | {key: finding.text for key, finding in found.items()}
        return new

    def _problems(self, look: dict[str, Any], clock_seconds: float) -> Iterator[tuple[str, Any, str, str]]:
        """(kind, GPU, what, text) of all that is wrong now."""
        host = look["host"]
        if look["gpus_problem"]:
            yield NODE_PROBLEM, None, "driver", f"{host}: {look['gpus_problem']}"
        for index, xid in look["xids"]:
            name = f"GPU {index} of {host}" if index is not None else f"a GPU of {host}"
            if xid in BAD_XIDS and index is not None:
                yield GPU_BAD, index, f"Xid {xid}", f"{name}: Xid {xid}, {BAD_XIDS[xid]}"
            else:
                text = f"{name}: Xid {xid}; see NVIDIA's list, and `dmesg | grep -i xid` there"
                yield GPU_PROBLEM, index, f"Xid {xid}", text
        self.num_throttled = 0
        for gpu in look["gpus"]:
            yield from self._of_gpu(gpu, f"GPU {gpu['index']} of {host}")
        if abs(clock_seconds) > CLOCK_SECONDS:
            text = f"{host}: its clock is off by {clock_seconds:+.1f} s; start chrony or ntpd there"
            yield NODE_PROBLEM, None, "clock", text
        for line in look["disk_errors"]:
            yield NODE_PROBLEM, None, "disk", f"{host}: the kernel reports an error of a disk: {line}"
        for disk, free in look["disks"].items():
            if not isinstance(free, int):
                yield NODE_PROBLEM, None, disk, f"{host}: {disk}: {free}"
            elif free < DISK_BYTES:
                yield NODE_PROBLEM, None, disk, f"{host}: {disk}: {size_text(free)} free; make room there"

    def _of_gpu(self, gpu: dict[str, Any], name: str) -> Iterator[tuple[str, Any, str, str]]:
        index = gpu["index"]
        if gpu["lost"]:
            yield GPU_BAD, index, "lost", f"{name} does not answer any more ({gpu['lost']})"
            return
        if gpu["remap_failed"]:
            yield GPU_BAD, index, "rows", f"{name}: a row of its memory could not be replaced"
        if errors := self._more(gpu, "ecc_errors"):
            text = f"{name}: {errors} error{'s' * (errors > 1)} of its memory that ECC could not correct"
            yield GPU_BAD, index, "ECC", text
        elif gpu["remap_pending"]:
            text = f"{name}: a row of its memory waits to be replaced; reset the GPU when it is free"
            yield GPU_PROBLEM, index, "rows", text
        if errors := self._more(gpu, "link_errors"):
            text = f"{name}: {errors} errors on its PCIe or NVLink since the run began; look at its seat"
            yield GPU_PROBLEM, index, "link", text
        self._throttled[index] = self._throttled[index] + 1 if gpu["throttled"] else 0
        self.num_throttled += bool(gpu["throttled"])
        if self._throttled[index] >= THROTTLED_LOOKS:
            text = f"{name} is throttled by {' and '.join(gpu['throttled'])}; each step waits for it"
            yield GPU_PROBLEM, index, "throttled", text
        if gpu["others"]:
            who = ", ".join(f"user {user}, pid {pid}" for user, pid in gpu["others"])
            yield GPU_PROBLEM, index, "others", f"{name} is also used by {who}; nothing was done to that"

    def _more(self, gpu: dict[str, Any], counter: str) -> int:
        """By how much a counter has grown since the first look. A reset GPU counts from 0 again."""
        if (now := gpu[counter]) is None:  # not counted, or not answered now
            return 0
        key = (gpu["index"], counter)
        self._first[key] = min(self._first.get(key, now), now)
        return now - self._first[key]


def _uuid(look: dict[str, Any], index: int | None) -> str:
    return next((gpu["uuid"] for gpu in look["gpus"] if gpu["index"] == index), "")
