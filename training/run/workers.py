"""The workers of a run: those of Ray Train, one function on each of them; or the ranks under torchrun."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import files
from cluster.cli import RunError, UserError
from cluster.heart.hang import Heartbeat
from cluster.masking import mask
from cluster.record import events
from cluster.record.provenance import commit_environment
from cluster.session import environment, ray_session, set_defaults, worker_environment
from training.config import TrainConfig, WorkersConfig

if TYPE_CHECKING:
    from training.run.context import Ranks

TOLD = ("hung", "out_of_memory")  # events that say more than the worker's own end
# Callbacks of Ray Train 2.60 that each start a process, whose imports compete with those of the workers.
# One would free the workers' resources if only the controller died, but then the run ends, and with it all
# that is Ray's; the other serves Ray Data, which no worker reads.
NOT_NEEDED = ("PlacementGroupCleanerCallback", "DatasetsCallback")
# On a full cluster Ray Train takes its request back after 60 s and makes a new one. An elastic run has to: it
# may ask for a node that was just lost.
WAITING = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(365 * 86400)}
LOST = "another rank is gone"  # in the message of a rank that fails because of that


@contextmanager
def session(config: TrainConfig) -> Iterator[None]:
    """The Ray of `config.session` for the length of a `with` block. Raises `ConfigError`: it is too small."""
    workers = config.workers
    environment = worker_environment(gpu=workers.gpu, threads=_threads(workers))
    resources = {name: amount * workers.count for name, amount in _each(workers).items()}
    with ray_session(config.session, resources=resources, worker_env=environment | commit_environment()):
        yield


def run(
    function: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    *,
    workers: WorkersConfig,
    directory: Path,
) -> Any:
    """Call `function(arguments)` on every worker, in a session; returns what rank 0's returned.

    Args:
        directory: for Ray Train's own folder; on storage that all nodes share, if there are several.

    Raises:
        RunError: a worker failed; its own message. The traceback is in `directory`/failure.log.
        KeyboardInterrupt: SIGINT or SIGTERM.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from training.run.process_group import GroupConfig

    _start_coordinator()
    group = GroupConfig(backend="nccl" if workers.gpu else "gloo", directory=directory, workers=workers)

    class Trainer(DataParallelTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Nothing: Ray's own ends the process with 1 and without a word. The caller has one."""

        def _create_default_callbacks(self) -> list[Any]:
            """Without those that start a process of their own, for what no run here has."""
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in NOT_NEEDED]

    elastic = (workers.min_count, workers.count)
    trainer = Trainer(
        lambda: function(arguments),  # as a configuration, the arguments would reach the controller too
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.min_count is None else elastic,  # type: ignore[arg-type]
            use_gpu=workers.gpu,
            resources_per_worker=_each(workers),
            accelerator_type=workers.accelerator,
        ),
        backend_config=group,
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(directory),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    try:
        with environment(WAITING if workers.min_count is None else {}):
            return trainer.fit().return_value  # type: ignore[attr-defined]  # of Ray Train's V1 Result
    except TrainingFailedError as error:
        raise RunError(_reason(error, directory)) from error
    except SystemExit as error:  # what Ray Train makes of SIGINT, and Ray of SIGTERM
        raise KeyboardInterrupt from error


def _start_coordinator() -> None:
    """Start the process that the controller would start and wait for, while the controller itself starts."""
    with suppress(ImportError):  # another Ray, whose controller starts its own
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        get_or_create_autoscaling_coordinator()


def heartbeat(
    directory: Path, workers: WorkersConfig, *, launcher: str, rank: int, world_size: int, start: str
) -> Heartbeat:
    """The heartbeat of a rank. start: see `cluster.record.heartbeat.Beat`."""
    return Heartbeat(
        directory, rank=rank, world_size=world_size, start=start, hang_seconds=workers.hang_seconds,
        final=launcher != "ray" or workers.max_failures == 0,
    )  # fmt: skip


def torch_ranks(workers: WorkersConfig) -> "Ranks":
    """The ranks of torchrun, or this process alone, with the threads of a worker. Collective.

    Raises:
        UserError: torchrun started another number of processes than `workers.count`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != workers.count:
        raise UserError(
            f"workers.count: {workers.count}, but torchrun started {world_size} processes; "
            f"set workers.count={world_size} or --nproc-per-node={workers.count}"
        )
    set_defaults(worker_environment(gpu=workers.gpu, threads=_threads(workers)))  # torch reads it on import
    import torch

    from training.run.context import Ranks

    if not workers.gpu:
        torch.set_num_threads(_threads(workers))
    return Ranks.meet()


def _threads(workers: WorkersConfig) -> int:
    """Compute threads of a worker on a CPU."""
    return max(1, int(workers.cpus))


def _each(workers: WorkersConfig) -> dict[str, float]:
    """Ray resources of one worker."""
    return {"CPU": workers.cpus} | ({"GPU": 1} if workers.gpu else {})


def _reason(error: Any, directory: Path) -> str:
    """Why the workers ended; the whole story goes into `directory`/failure.log.

    That is the sentence about a hang or a kill for memory, or the message of the first worker that failed by
    itself, and not because another one was gone. Secrets are masked in both. Only the owner reads the log: an
    exception may say what no mask recognises.
    """
    failures = getattr(error, "worker_failures", {})
    causes = [failures[rank] for rank in sorted(failures)] or [error]
    story = mask("\n".join(f"--- {cause!r}\n{cause}" for cause in causes))
    files.write_text(directory / "failure.log", f"{story}\n", mode=0o600)
    found = events.read(directory)
    newest = events.newest(found, (*TOLD, *events.STARTS, *events.WORKERS))
    if newest in TOLD:
        return str(next(event["text"] for event in reversed(found) if event["kind"] == newest))
    causes.sort(key=lambda cause: LOST in str(cause) or "ActorDiedError" in repr(cause))
    lines = [line.strip() for line in mask(str(causes[0])).splitlines() if line.strip()]
    return lines[-1] if lines else mask(repr(causes[0]))
