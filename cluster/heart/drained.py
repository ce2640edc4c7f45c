"""GPUs that are not used again until a user clears them: `drained.json`, beside the runs of all who share it.

    python -m cluster.heart.drained OUTPUTS [HOST:GPU ...]       print them, or clear these

A run drains a GPU that goes bad under it. In Ray, a process that holds the GPU keeps it from everybody else.
Importing this needs the standard library only.
"""

import argparse
import fcntl
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import files
from cluster.machine import health

FILE = "drained.json"
NAMESPACE = "asuncion drained"  # of the holders, in Ray
HOLD_SECONDS = 60.0  # for a GPU that another run still has
UNUSED_SECONDS = 5 * HOLD_SECONDS  # after which a holder ends itself that was not told what to keep
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Drained:
    """A GPU. uuid: NVML's, which stays with the GPU; gpu: its index on the host when it went bad."""

    host: str
    gpu: int
    uuid: str
    reason: str
    time: str

    @property
    def name(self) -> str:
        """As a user names it, to clear it."""
        return f"{self.host}:{self.gpu}"

    def __str__(self) -> str:
        return f"{self.name} is drained since {self.time}: {self.reason}"


def read(outputs: Path) -> list[Drained]:
    """All of them. Raises `files.DamagedFile`."""
    file = outputs / FILE
    if not file.exists():
        return []
    found = files.read_json(file)
    types = {"host": str, "gpu": int, "uuid": str, "reason": str, "time": str}
    if not isinstance(found, list) or not all(
        isinstance(each, dict) and {name: type(value) for name, value in each.items()} == types
        for each in found
    ):
        raise files.DamagedFile(f"{file}: is no list of drained GPUs; delete it, and all GPUs are used again")
    return [Drained(**each) for each in found]


def add(outputs: Path, *, host: str, gpu: int, uuid: str, reason: str) -> None:
    """Drain a GPU; nothing if it is drained already."""
    with _changing(outputs) as found:
        if not any((each.uuid or each.name) == (uuid or f"{host}:{gpu}") for each in found):
            now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            found.append(Drained(host, gpu, uuid, reason, now))


def clear(outputs: Path, name: str) -> None:
    """Use a GPU again. Raises `ValueError`: it is not drained."""
    with _changing(outputs) as found:
        if name not in (names := [each.name for each in found]):
            raise ValueError(f"{name} is not drained; drained: {', '.join(names) or 'none'}")
        found[:] = [each for each in found if each.name != name]


@contextmanager
def _changing(outputs: Path) -> Iterator[list[Drained]]:
    with _alone(outputs, "file"):
        found = read(outputs)
        yield found
        files.write_json(outputs / FILE, [asdict(each) for each in found])


@contextmanager
def _alone(outputs: Path, what: str) -> Iterator[None]:
    """A block that one process of all nodes at a time may be in. A lost node may leave its lock behind."""
    with (outputs / f".drained.{what}.lock").open("w") as lock:
        until = time.monotonic() + UNUSED_SECONDS
        with suppress(OSError):  # storage without locks
            while time.monotonic() < until:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
        yield


class Holder:
    """Holds one GPU, as a detached Ray actor, until that GPU is cleared.

    It ends itself if nobody tells it to `keep` that GPU: whoever made it may have been killed.
    """

    def __init__(self, outputs: Path) -> None:
        self._outputs = outputs
        self._drained: Drained | None = None
        threading.Thread(target=self._hold, daemon=True).start()

    def has(self) -> tuple[str, str]:
        """What Ray calls its GPU (by CUDA_VISIBLE_DEVICES: an index, or a UUID), and NVML's UUID of it."""
        import ray

        (found,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return found, health.uuid_of(found)

    def keeps(self) -> str | None:
        """The name of the drained GPU that it holds."""
        return self._drained.name if self._drained else None

    def keep(self, drained: Drained) -> None:
        """Hold on, until it is cleared."""
        self._drained = drained

    def _hold(self) -> None:
        until = time.monotonic() + UNUSED_SECONDS
        while self._drained or time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            with suppress(OSError, ValueError):  # the storage does not answer now
                if self._drained and self._drained.name not in [each.name for each in read(self._outputs)]:
                    break
        os._exit(0)


def hold(outputs: Path) -> list[Drained]:
    """Keep the drained GPUs of the running Ray from everybody. Returns those that are held.

    A node without Ray's resource GPU has none to hold, and neither has one whose GPU was replaced.

    Raises:
        TimeoutError: somebody still uses one; the message names it.
    """
    import ray

    nodes = {node["NodeManagerHostname"]: node for node in ray.nodes() if node["Alive"]}
    drained = [each for each in read(outputs) if _num_gpus(nodes.get(each.host))]
    if not drained:
        return []
    with _alone(outputs, "hold"):  # two would take GPUs of a node from each other
        held = set()
        for found in ray.util.list_named_actors(all_namespaces=True):
            with suppress(ray.exceptions.RayError, ValueError):  # it has just ended
                if found["namespace"] == NAMESPACE:
                    holder: Any = ray.get_actor(**found)
                    held.add(ray.get(holder.keeps.remote(), timeout=HOLD_SECONDS))
        return [each for each in drained if each.name in held or _hold(each, nodes[each.host], outputs)]


def _num_gpus(node: dict[str, Any] | None) -> int:
    return int(node["Resources"].get("GPU", 0)) if node else 0


def _hold(drained: Drained, node: dict[str, Any], outputs: Path) -> bool:
    """Take GPUs of the node until it is this one, and give the others back. Ray offers no choice."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    about = {"num_cpus": 0, "num_gpus": 1, "lifetime": "detached", "namespace": NAMESPACE}
    others: list[Any] = []
    try:
        for _ in range(_num_gpus(node)):
            kind: Any = ray.remote(Holder).options(**about, name=uuid.uuid4().hex, scheduling_strategy=place)
            holder = kind.remote(outputs.absolute())
            others.append(holder)
            name, its_uuid = ray.get(holder.has.remote(), timeout=HOLD_SECONDS)
            if (its_uuid or name) == (drained.uuid if its_uuid else str(drained.gpu)):
                ray.get(holder.keep.remote(drained), timeout=HOLD_SECONDS)
                others.remove(holder)
                return True
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError(
            f"{drained}, and somebody uses it still: `make status` names the runs; wait for their end, or "
            "stop them"
        ) from None
    finally:
        for other in others:
            ray.kill(other)
    return False


def main(arguments: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.heart.drained", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS", help="the folder of the runs")
    parser.add_argument("names", nargs="*", metavar="HOST:GPU", help="clear these; none: print all")
    options = parser.parse_args(arguments)
    try:
        for name in options.names:
            clear(options.outputs, name)
            print(f"{name} is used again, by the next run")
        for each in () if options.names else read(options.outputs):
            print(each)
    except (OSError, ValueError) as error:
        told = files.problem_of(error) if isinstance(error, OSError) else error
        print(f"error: {told}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
