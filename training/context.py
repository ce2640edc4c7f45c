"""What the loop knows of its launcher: rank, world, device, and how to talk to the other ranks.

Two implementations: `RayContext` inside a Ray Train worker, `TorchContext` under torchrun or in one process.
The loop is the same under both, so the launcher's own cost can be measured.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Context:
    """One rank of a run whose process group exists."""

    rank: int
    world_size: int
    device: torch.device
    launcher: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the record."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The GPU's name as its driver gives it, or the CPU's model name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        from cluster.hardware import describe_host

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

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell the launcher how far the run is. Every rank calls it equally often."""


class RayContext(Context):
    """A rank inside a Ray Train worker; Ray has made the process group."""

    @classmethod
    def create(cls, *, gpu: bool) -> "RayContext":
        """The context of the worker that calls."""
        import ray.train

        worker = ray.train.get_context()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        return cls(worker.get_world_rank(), worker.get_world_size(), device, "ray")

    def report(self, metrics: Mapping[str, Any]) -> None:
        import ray.train

        ray.train.report(dict(metrics))


@contextmanager
def torch_context(*, gpu: bool) -> Iterator[Context]:
    """The context of one rank under torchrun, or of a single process, with its process group."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if gpu else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        yield Context(rank, world_size, device, "torch")
    finally:
        dist.destroy_process_group()
