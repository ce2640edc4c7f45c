"""The process group of Ray Train's workers: it listens on the node's address alone.

This module uses neither Ray's `TorchConfig` nor anything else of `ray.train.torch`. For them the controller
would import torch, and every worker many more modules, before the first step.
"""

import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import get_context
from ray.train.backend import Backend, BackendConfig

from cluster.cli import RunError
from cluster.preflight.inspection import free_place
from cluster.record.heartbeat import FORMING
from training.config import WorkersConfig
from training.run.workers import heartbeat

TIMEOUT = timedelta(minutes=30)  # of a collective
LEAVE_SECONDS = 30.0  # in which the workers leave the group at the end


@dataclass
class GroupConfig(BackendConfig):
    """backend: "gloo" or "nccl"; directory: of the run, for the heartbeats."""

    backend: str
    directory: Path
    workers: WorkersConfig

    @property
    def backend_cls(self) -> type[Backend]:
        return _Group


class _Group(Backend):
    share_cuda_visible_devices = True  # NCCL reaches the GPUs of the node's other ranks
    num_failures = 0  # starts of the workers in which one died before the group was there

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Make the group on all workers; called in the controller.

        Raises:
            RayActorError: a worker died, and Ray starts all again.
            RunError: that happened more often than `workers.max_failures`, which Ray does not count here.
        """
        try:
            address, port = worker_group.execute_single(0, free_place)
            settings = {"address": address, "port": port, "backend": backend_config.backend}
            ray.get(worker_group.execute_async(_meet, settings, backend_config, uuid.uuid4().hex))
        except RayActorError as error:
            self.num_failures += 1
            if self.num_failures <= backend_config.workers.max_failures:
                raise
            raise RunError(
                "a worker ended while the process group was formed: its process was killed, or its node was "
                "lost"
            ) from error

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the group. A worker that cannot is ended by Ray all the same."""
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_SECONDS)


def _meet(settings: dict[str, Any], config: GroupConfig, start: str) -> None:
    """`meet` on a worker, with the variables that torchrun also sets. start: the same on all workers."""
    context = get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    about = {"rank": rank, "world_size": world_size, "start": start}
    with heartbeat(config.directory, config.workers, launcher="ray", **about) as heart:
        heart.mark(FORMING)
        from cluster.machine.rendezvous import meet

        meet(**settings, rank=rank, world_size=world_size, timeout=TIMEOUT)


def _leave() -> None:
    from cluster.machine.rendezvous import leave

    leave()
