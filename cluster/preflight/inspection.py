"""What the preflight reads and measures on a node, in Ray actors there (`cluster.preflight`)."""

import platform
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.head.addresses import family
from cluster.machine import health, host, toolchain
from cluster.measure import probe
from cluster.record import provenance

CPU_GEMM_SIZE = 1024  # the nodes' CPUs are measured briefly; their GPUs are what counts


class Inspector:
    """One node. A Ray actor that holds all GPUs of its node."""

    def facts(
        self, scratch: str, storage: str, mark: str, disk_bytes: int, drained: Sequence[int]
    ) -> dict[str, Any]:
        """Versions, GPUs and disks, JSON-ready. What cannot be read is a `problem` in it, not an error.

        Args:
            mark: name of the file by which the other nodes see that the storage is one place.
            drained: indices of GPUs at which nobody looks.
        """
        import torch

        return {
            "hostname": platform.node(),
            "versions": {
                "python": platform.python_version(),
                **provenance.versions(),
                "cuda": torch.version.cuda or "none",
                "code": provenance.code_version()["commit"],
            },
            **host.gpus(without=drained),
            "drained_gpus": len(drained),
            "toolchain_problem": toolchain.missing(),
            "scratch": _folder(Path(scratch).expanduser(), disk_bytes),
            "storage": _folder(Path(storage).expanduser(), disk_bytes, mark=mark),
        }

    def clock(self) -> float:
        """Seconds since the epoch, here."""
        return time.time()

    def sees(self, storage: str, mark: str) -> list[str]:
        """Hosts whose mark is on the storage, as seen from here."""
        return sorted(
            file.name.removeprefix(f".{mark}-") for file in Path(storage).expanduser().glob(f".{mark}-*")
        )

    def ceilings(self, num_gpus: int, repeats: int) -> dict[str, Any]:
        """`ceilings`, a `probe.Ceilings` of every GPU that works or of the CPU; `problem`; `throttled`.

        A GPU's has its index on the node as `gpu`.
        `throttled` holds the indices of GPUs whose clocks were held down right after their products.
        """
        if num_gpus == 0:
            measured = asdict(probe.measure(device="cpu", repeats=repeats, size=CPU_GEMM_SIZE))
            return {"ceilings": [measured], "problem": None, "throttled": []}
        import torch

        found, problem, throttled = [], None, set()
        names = _gpus_of_this_actor()
        for place in range(min(num_gpus, torch.cuda.device_count())):
            index = int(names[place]) if place < len(names) and names[place].isdigit() else place
            try:
                with torch.cuda.device(place):
                    found.append({**asdict(probe.measure(device="cuda", repeats=repeats)), "gpu": index})
            except RuntimeError as error:
                problem = f"GPU {index}: {str(error).strip().splitlines()[0]}"
            throttled |= health.throttled()
        return {"ceilings": found, "problem": problem, "throttled": sorted(throttled)}


class Rank:
    """One end of a collective. A Ray actor with one GPU, or none."""

    def place(self) -> dict[str, Any]:
        """See `free_place`."""
        address, port = free_place()
        return {"address": address, "port": port}

    def links(self, **arguments: Any) -> dict[str, Any]:
        """See `probe.measure_links`."""
        return asdict(probe.measure_links(**arguments))


def _gpus_of_this_actor() -> list[str]:
    """What Ray calls its GPUs, in the order in which torch counts them."""
    import ray

    return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])


def free_place() -> tuple[str, int]:
    """The address of this node, of a process of Ray, and a port that is free there."""
    import ray

    address = ray.util.get_node_ip_address()
    with socket.socket(family(address)) as free:
        free.bind((address, 0))
        return address, free.getsockname()[1]


def _folder(folder: Path, disk_bytes: int, *, mark: str | None = None) -> dict[str, Any]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if mark is not None:
            (folder / f".{mark}-{platform.node()}").write_text("seen")
        write, read = probe.measure_disk(folder, num_bytes=disk_bytes)
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return {"problem": f"{error.filename or folder}: {error.strerror}"}
    return {"problem": None, "free_gb": free, "write_gb_per_s": write, "read_gb_per_s": read}
