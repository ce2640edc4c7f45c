"""Sends the warnings and errors of `events.jsonl` to W&B as alerts: once each, whatever starts a run has."""

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from cluster import files
from cluster.record import events

SENT = "wandb_alerts_sent"  # in the run directory: the W&B run's id, and up to which byte its events are sent
MOST_TITLE = 63  # letters; W&B's titles are shorter than 64
SECONDS = 1.0  # between looks into events.jsonl
WAIT = timedelta(milliseconds=1)  # between alerts of one title; W&B reads 0 as a minute


class Alerts:
    """Sends what is new in the `events.jsonl` of a run directory.

    Args:
        name: the run's, for the titles.
        run_id: the W&B run, to which an earlier start may have sent some. None offline, to begin with the
            first event: each offline start has a file of its own, and only the newest file is uploaded.
        alert: the method of the W&B run.
    """

    def __init__(self, directory: Path, *, name: str, run_id: str | None, alert: Callable[..., None]) -> None:
        self._directory, self._run_id, self._name = directory, run_id, name
        self._alert = alert
        self._next = 0.0
        sent = (directory / SENT).read_text().split() if (directory / SENT).exists() else []
        self._position = int(sent[1]) if run_id and sent[:1] == [run_id] else 0

    def get(self, calls: "queue.SimpleQueue[Any]") -> Any:
        """`calls.get()`, which sends new alerts about once in SECONDS while it waits and between calls."""
        while True:
            if time.monotonic() >= self._next:
                self.send()
                self._next = time.monotonic() + SECONDS
            with suppress(queue.Empty):
                return calls.get(timeout=max(0.0, self._next - time.monotonic()))

    def send(self) -> None:
        """Send what is new."""
        found, position = events.read_from(self._directory, self._position)
        for event in events.alarms(found):
            step = "" if event["step"] is None else f", step {event['step']}"
            title = f"{event['kind'].replace('_', ' ')}{step}: {self._name}"[:MOST_TITLE]
            level = "ERROR" if event["level"] == events.ERROR else "WARN"
            self._alert(title, event["text"], level, wait_duration=WAIT)
        moved, self._position = position != self._position, position
        if moved and self._run_id:
            with suppress(OSError):  # a full disk: after a resume these are sent again
                files.write_text(self._directory / SENT, f"{self._run_id} {position}\n")
