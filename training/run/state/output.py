"""Where the loop's rows and notes go: the record, W&B and the alarms, on rank 0."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster import config as layered
from cluster.record import origins, provenance
from cluster.record.alarms import LossAlarms
from cluster.record.record import Record
from training.config import TrainConfig
from training.data.mixture import origin_of
from training.run.checkpoint import step_of
from training.run.start import Start
from training.run.state import health, hf_weights, rewinds
from training.run.watch import loss_alarms

Observe = Callable[[dict[str, Any]], None]


def open_record(start: Start, command: list[str], *, step: int | None = None) -> Record:
    """The record of a run, on rank 0, after `step` steps (None: those of the checkpoint of `start`)."""
    config = start.config
    if step is None and start.checkpoint is not None:
        step = step_of(start.checkpoint)
    fingerprint = start.train_set.manifest.fingerprint
    about = provenance.collect(
        command=command, data_fingerprint=fingerprint, config_changes=layered.changes(config)
    )
    if went_back := rewinds.read(config.run_directory):
        about |= {"rewinds": went_back}
    return Record.open(
        config.run_directory,
        config=layered.to_dict(config),
        provenance=about,
        wandb_mode=config.record.wandb,
        project=config.record.project,
        group=config.record.group,
        name=config.run.name,
        job_type="train",
        tags=[config.optim.matrix.rule, f"zero-{config.zero.stage}"],
        resume_step=step,
        inputs=[
            origin_of(start.train_set),
            *([hf_weights.origin_of(config.load_directory)] if config.load_directory else []),
        ],
    )


@dataclass
class Output:
    """Where rows and notes go: the record on rank 0, nowhere on the others.

    Attributes:
        upload: checkpoints to W&B, not only references to them.
        alarms: for the losses.
        reopen: opens the record again, after `step` steps.
    """

    record: Record | None
    observe: Observe
    upload: bool = False
    alarms: LossAlarms | None = None
    reopen: Callable[..., Record] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.record is not None:
            self.record.__exit__(*error)

    @property
    def spiked(self) -> bool:
        """Whether the newest row began a loss spike."""
        return self.alarms is not None and self.alarms.spiked

    def row(self, row: dict[str, Any]) -> None:
        if self.record is not None:
            if "loss" in row:
                row |= health.line(self.record.directory)
            self.record.log(row)
            if self.alarms is not None:
                self.alarms.see(row)
            self.observe(row)

    def go_back(self, config: TrainConfig, *, step: int) -> None:
        """Drop the rows after `step`."""
        if self.record is not None and self.reopen is not None:
            self.record.close()
            self.record = self.reopen(step=step)
            self.alarms = loss_alarms(config, step=step)

    def checkpoint(self, path: Path) -> None:
        if self.record is not None:
            self.record.output(origins.of_checkpoint(path), upload=self.upload)
