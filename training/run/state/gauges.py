"""A running run's figures as Ray metrics, which Ray's own endpoint on each node serves to Prometheus."""

import time
from contextlib import suppress

from cluster.record import heartbeat
from cluster.review.run_reader import Run
from cluster.runs import COMPLETE, complete_checkpoints
from training.config import TrainConfig
from training.run.watch import Background

ROWS = {  # gauge -> key of metrics.jsonl, and what it is
    "asuncion_step": ("step", "newest step in the record"),
    "asuncion_tokens": ("tokens", "tokens trained on"),
    "asuncion_loss": ("loss", "training loss, nats per token"),
    "asuncion_validation_loss": ("validation_loss", "validation loss, nats per token"),
    "asuncion_tokens_per_second": ("tokens_per_second", "of all workers"),
    "asuncion_mfu": ("mfu", "share of the datasheet's peak"),
    "asuncion_data_wait_seconds": ("data_wait_seconds", "per step, that rank 0 waits for its data"),
}
CHECKPOINT_AGE = ("asuncion_checkpoint_age_seconds", "since the newest complete checkpoint was written")
HEARTBEAT_AGE = ("asuncion_heartbeat_age_seconds", "since a rank wrote its heartbeat")


class Gauges(Background):
    """Sets the metrics from the run directory, in the launcher, for the length of a `with` block."""

    POLL_SECONDS = 2.0

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        from ray.util.metrics import Gauge

        self._directory, self._tags = config.run_directory, {"run": config.run.name}
        named = [*((name, text) for name, (_, text) in ROWS.items()), CHECKPOINT_AGE]
        self._gauges = {name: Gauge(name, text, ("run",)) for name, text in named}
        self._beats = Gauge(*HEARTBEAT_AGE, ("run", "rank"))

    def run(self) -> None:
        while not self.stop.wait(self.POLL_SECONDS):
            with suppress(OSError, ValueError):  # just being replaced or deleted: the next look has it
                self._set()

    def _set(self) -> None:
        now, row = time.time(), Run(self._directory).latest
        for name, (key, _) in ROWS.items():
            if isinstance(row.get(key), int | float):
                self._gauges[name].set(row[key], self._tags)
        for path in complete_checkpoints(self._directory / "checkpoints")[-1:]:
            age = now - (path / COMPLETE).stat().st_mtime
            self._gauges[CHECKPOINT_AGE[0]].set(age, self._tags)
        for beat in heartbeat.read(self._directory):
            self._beats.set(now - beat.written, {**self._tags, "rank": str(beat.rank)})
