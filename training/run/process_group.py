"""The process group of Ray Train's workers: it listens on the node's address alone."""

from datetime import timedelta
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars

from cluster.machine.rendezvous import meet
from cluster.preflight.inspection import free_place


class GroupConfig(TorchConfig):
    """Ray's `TorchConfig`, whose own store listens on every address."""

    @property
    def backend_cls(self) -> type:
        return _Group


class _Group(TorchConfig().backend_cls):  # type: ignore[misc]  # a property that returns a class
    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Make the group on all workers, as Ray's does; called on the driver's side."""
        address, port = worker_group.execute_single(0, free_place)
        worker_group.execute(_set_torch_distributed_env_vars)
        settings = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "address": address,
            "port": port,
            "timeout": timedelta(seconds=backend_config.timeout_s),
        }
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, _meet, settings, rank) for rank in ranks])


def _meet(settings: dict[str, Any], rank: int) -> None:
    """`meet` on a worker. Ray's `execute_single_async` has an argument `rank` of its own."""
    meet(**settings, rank=rank)
