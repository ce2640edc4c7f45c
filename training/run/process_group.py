"""The process group of Ray Train's workers: it listens on the node's address alone."""

import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars

from cluster.machine.rendezvous import meet
from cluster.preflight.inspection import free_place
from cluster.record.heartbeat import FORMING
from training.config import WorkersConfig
from training.run.workers import heartbeat


@dataclass
class GroupConfig(TorchConfig):
    """Ray's `TorchConfig`, whose own store listens on every address, and which waits half an hour for a rank.

    directory: of the run, for the heartbeats.
    """

    directory: Path = Path()
    workers: WorkersConfig = field(default_factory=WorkersConfig)

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
        ranks, start = range(len(worker_group)), uuid.uuid4().hex
        places = [(settings, rank, backend_config, start) for rank in ranks]
        ray.get([worker_group.execute_single_async(place[1], _meet, *place) for place in places])


def _meet(settings: dict[str, Any], rank: int, config: GroupConfig, start: str) -> None:
    """`meet` on a worker. Ray's `execute_single_async` has an argument `rank` of its own."""
    about = {"rank": rank, "world_size": settings["world_size"], "start": start}
    with heartbeat(config.directory, config.workers, launcher="ray", **about) as heart:
        heart.mark(FORMING)
        meet(**settings, rank=rank)
