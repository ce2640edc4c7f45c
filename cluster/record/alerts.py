"""Sends the warnings and errors of `events.jsonl` as alerts, each once, also across resumes of the run."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster import files
from cluster.record import events

SENT = "wandb_alerts_sent"  # in the run directory: the W&B run's id, and up to which byte its events are sent
MOST_TITLE = 63  # letters; W&B's titles are shorter than 64


class Alerts:
    """Where in `events.jsonl` the next alert is to be found."""

    def __init__(self, directory: Path, *, name: str, run_id: str | None) -> None:
        """`run_id`: W&B's, under which an earlier start may have sent some. None: begin with the first."""
        self._directory, self._run_id, self._name = directory, run_id, name
        sent = (directory / SENT).read_text().split() if (directory / SENT).exists() else []
        self._position = int(sent[1]) if run_id and sent[:1] == [run_id] else 0

    def send(self, alert: Callable[[str, str, str], None]) -> None:
        """Call `alert(title, text, level)` for each new warning (level "WARN") and error ("ERROR")."""
        found, position = events.read_from(self._directory, self._position)
        for event in events.alarms(found):
            step = "" if event["step"] is None else f", step {event['step']}"
            title = f"{event['kind'].replace('_', ' ')}{step}: {self._name}"
            alert(title[:MOST_TITLE], event["text"], "ERROR" if event["level"] == events.ERROR else "WARN")
        moved, self._position = position != self._position, position
        if moved and self._run_id:
            with suppress(OSError):  # a full disk: after a resume these are sent again
                files.write_text(self._directory / SENT, f"{self._run_id} {position}\n")
