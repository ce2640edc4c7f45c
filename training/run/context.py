"""What the loop knows of its launcher: rank, world, device, and how to talk to the other ranks.

Rank 0 prepares the data before there is a process group (`Ranks`): in a group the other ranks would wait in a
collective, and NCCL ends the run if that takes longer than 10 minutes.

Two implementations: `RayContext` inside a Ray Train worker, `TorchContext` under torchrun or in one process.
The loop is the same under both, so the launcher's cost can be measured.
"""

import ctypes
import json
import os
import pickle
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from cluster.cli import BAD_INPUT, RunError
from cluster.machine.rendezvous import interface_of
from cluster.session import set_defaults

LONGEST_PREPARATION = timedelta(days=2)  # of data by rank 0; torchrun ends the others if it fails
Result = TypeVar("Result")
StoreLost = dist.DistNetworkError  # the store was in a process that has ended
MEET_SECONDS = 300.0  # in which all ranks find the store, where no torchrun holds it
PREPARED, TAKEN = "asuncion/prepared", "asuncion/taken"  # keys of the store
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
TAKE_SECONDS = 60.0  # in which the ranks take what was prepared; torchrun starts them together


@dataclass(frozen=True)
class Context:
    """One rank of a run whose process group exists."""

    rank: int
    world_size: int
    device: torch.device
    launcher: str

    @property
    def start(self) -> str:
        """A name that is the same on all ranks, and new in each start. Any rank may be the first to ask."""
        return start_of(_store())

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the record."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The GPU's name as its driver gives it, or the CPU's model name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        from cluster.machine.host import describe_host

        return describe_host()["cpu"]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Any picklable object."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all ranks, in place."""
        dist.all_reduce(value)
        return value

    def most(self, value: torch.Tensor) -> torch.Tensor:
        """The largest `value` of all ranks, entry by entry, in place."""
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def post(self, name: str, value: Any) -> None:
        """Leave `value`, JSON-ready, for rank 0, in place of what this rank left before under `name`.

        Unlike a collective, any thread may do this at any time.
        """
        _store().set(f"asuncion/{name}/{self.rank}", json.dumps(value))

    def posted(self, name: str, rank: int) -> Any:
        """What a rank left under `name`; None if it has left nothing."""
        store, key = _store(), f"asuncion/{name}/{rank}"
        return json.loads(store.get(key)) if store.check([key]) else None

    def synchronize(self) -> None:
        """Wait until the device has finished what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell the launcher how far the run is. Every rank calls it, the same number of times."""


class RayContext(Context):
    """A rank inside a Ray Train worker; Ray has made the process group."""

    @classmethod
    def create(cls, *, gpu: bool) -> "RayContext":
        """The context of the worker that calls."""
        import ray.train

        worker, device = ray.train.get_context(), torch.device("cpu")
        if gpu:
            import ray.train.torch

            device = ray.train.torch.get_device()
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
        return cls(worker.get_world_rank(), worker.get_world_size(), device, "ray")

    def report(self, metrics: Mapping[str, Any]) -> None:
        import ray.train

        ray.train.report(dict(metrics))


@dataclass(frozen=True)
class Ranks:
    """The ranks under torchrun, or a single process, before their process group exists."""

    rank: int
    world_size: int
    store: dist.Store

    @classmethod
    def meet(cls) -> "Ranks":
        """Find the other ranks. Collective.

        Raises:
            RunError: they did not all come.
        """
        if "MASTER_ADDR" in os.environ:
            try:
                store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=MEET_SECONDS)))
            except (dist.DistError, ValueError) as error:  # too late, or a variable is missing
                raise RunError(_who_is_missing(error)) from error
            return cls(rank, world_size, store)
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), dist.HashStore())

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on rank 0, on every rank. Any picklable object. Collective, and once per run.

        An error of `work` is raised on rank 0, which explains it; the other ranks end with its exit code.
        """
        if self.rank == 0:
            try:
                result = work()
            except BaseException:
                self.store.set(PREPARED, b"")  # type: ignore[arg-type]  # it takes bytes
                raise
            self.store.set(PREPARED, pickle.dumps(result))  # type: ignore[arg-type]
            if result is None and self.world_size > 1:  # the store may be in this process, which ends now
                with suppress(dist.DistStoreError):
                    self.store.wait([TAKEN], timedelta(seconds=TAKE_SECONDS))
            return result
        try:
            self.store.wait([PREPARED], LONGEST_PREPARATION)
            received = self.store.get(PREPARED)
        except dist.DistNetworkError:  # without torchrun the store is in rank 0's process, and ends with it
            received = b""
        if not received:
            sys.exit(BAD_INPUT)
        if self.store.add(f"{TAKEN}/number", 1) == self.world_size - 1:
            self.store.set(TAKEN, b"1")  # type: ignore[arg-type]
        return pickle.loads(received)


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, for what it allocates next.

    Else much of a step's memory goes back to the system when it is freed, and comes again page by page, each
    with a fault. The process holds a little more memory. Only glibc has the setting.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_MAX, 0)  # large blocks lie in the heap too
        mallopt(M_TRIM_THRESHOLD, -1)  # which does not shrink


def _who_is_missing(error: Exception) -> str:
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    who = " of ".join(os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
    return (
        f"rank {who}: the ranks did not meet at {place} within {MEET_SECONDS:g} s "
        f"({str(error).splitlines()[0][:200]}); look for a rank that has not started, or for a firewall"
    )


def start_of(store: dist.Store) -> str:
    """The name of this start, on which all processes of the store agree."""
    key = f"asuncion/start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return store.compare_set(key, "", uuid.uuid4().hex).decode()


class Stop:
    """Lets all ranks stop after the same step, once one of them is asked to.

    That rank puts the number of the next step into the store of the process group. All see it in time: the
    collectives of a step wait for every rank, so none can end that step before this rank has begun it.

    Args:
        asked: whether this rank is asked; called once a step.
    """

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked
        self._key = f"asuncion/stop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._told = False
        self._step = 0  # of this process: the run's may go back

    def due(self, *, failed: bool = False) -> bool:
        """Whether to stop after this step. Every rank calls it after each step.

        failed: this rank cannot go on, so it asks too.
        """
        store = _store()
        self._step += 1
        if not self._told and (failed or self._asked()):
            self._told = True
            store.compare_set(self._key, "", str(self._step + 1))
        return store.check([self._key]) and self._step >= int(store.get(self._key))


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


@contextmanager
def torch_context(ranks: Ranks | None = None, *, gpu: bool) -> Iterator[Context]:
    """The context of one rank under torchrun, or of a single process, with its process group.

    ranks: if they have met already. Collective.
    """
    ranks = ranks or Ranks.meet()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)) == ranks.world_size:  # one machine
        set_defaults({"GLOO_SOCKET_IFNAME": interface_of("127.0.0.1") or "lo"})
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=ranks.store, rank=ranks.rank, world_size=ranks.world_size
    )
    try:
        yield Context(ranks.rank, ranks.world_size, device, "torch")
    finally:
        dist.destroy_process_group()
