"""The W&B server as `make sync` uses it: which rows it has of a run, and `wandb sync` for the rest."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import process
from cluster.cli import RunError, UserError
from cluster.masking import mask
from cluster.record.wandb_mirror import signed_in
from cluster.review.sync.segments import Segment, Staged, identities

ANSWER_SECONDS = 20.0
LOST_SECONDS = 60.0  # without an answer before an upload is given up; wandb itself would go on for a week
SHOWN_SECONDS = 30.0  # until the server shows the rows that it took in
KEY = "run `.venv/bin/wandb login`, or set WANDB_API_KEY"
AGAIN = "rows that it lacks are still on disk: run `make sync` again"
_IGNORED = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SILENT", "WANDB_QUIET", "WANDB_MODE")


@dataclass(frozen=True)
class There:
    """What the server has of a run: its rows (None if it cannot list them), and its state in W&B's words."""

    rows: list[dict[str, Any]] | None
    state: str


class Uploads:
    """The connection to the server. Made by `connect`.

    Attributes:
        url: the server's.
    """

    def __init__(self, url: str, api: Any, *, entity: str) -> None:
        self.url = url
        self._api = api
        self._entity = entity  # of runs that name none

    @classmethod
    def connect(cls) -> "Uploads":
        """Find the server and the key, as W&B's client does.

        Raises:
            UserError: there is no key, or the server refused it.
            RunError: the server does not answer.
        """
        import wandb
        from wandb.analytics.opentelemetry import opentelemetry_proxy
        from wandb.errors import AuthenticationError

        opentelemetry_proxy.disable()
        settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
        url = settings.base_url
        if not signed_in(settings):
            raise UserError(f"no API key for {url}; {KEY}")
        if not _answers(url):
            raise RunError(f"{url} does not answer; nothing was sent, nothing is lost: run `make sync` again")
        try:
            api = wandb.Api(timeout=int(ANSWER_SECONDS))
        except AuthenticationError as error:
            raise UserError(f"{url} refused the API key; {KEY}") from error
        entity = settings.entity
        with suppress(Exception):  # a server that is not W&B's may lack this; `there` finds that out
            entity = entity or api.default_entity
        return cls(url, api, entity=entity or "")

    def there(self, segment: Segment) -> There:
        """What the server has of a segment's run."""
        self._api.flush()  # or it answers from its memory
        try:
            run = self._api.run(f"{segment.entity or self._entity}/{segment.project}/{segment.id}")
            return There(list(run.scan_history(use_cache=False)), run.state)
        except Exception as error:  # wandb raises types of its own, and ValueError
            if "Could not find run" in str(error):
                return There([], "")
            if not _answers(self.url):
                raise RunError(f"{self.url} does not answer any more; {AGAIN}") from error
            print(f"{self.url} does not list the rows of a run, so a repeated `make sync` sends them again")
            return There(None, "")

    def send(self, staged: Sequence[Staged]) -> None:
        """Send the copies, and set the `problem` of each that is not in W&B afterwards.

        Raises:
            RunError: the server was lost.
        """
        folder = staged[0].log.parent
        environment = {name: value for name, value in os.environ.items() if name not in _IGNORED}
        environment["WANDB_DIR"] = str(folder)  # wandb's log of the upload
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", *(str(s.log) for s in staged)]
        output = folder / "output.txt"
        with output.open("w") as file:
            none = subprocess.DEVNULL
            with process.Child(command, env=environment, stdin=none, stdout=file, stderr=file) as child:
                self._wait(child)
        said = output.read_text().splitlines()
        errors = _errors(folder)
        for each in staged:
            each.problem = self._problem(each, errors=errors, said=said)

    def _wait(self, child: process.Child) -> None:
        answered = asked = time.monotonic()
        while child.poll() is None:
            time.sleep(0.1)
            if time.monotonic() - asked > min(5.0, LOST_SECONDS / 4):
                reached = _answers(self.url)
                asked = time.monotonic()
                answered = asked if reached else answered
                if asked - answered > LOST_SECONDS:
                    raise RunError(f"{self.url} does not answer any more; {AGAIN}")

    def _problem(self, staged: Staged, *, errors: dict[str, list[str]], said: list[str]) -> str:
        if mine := errors.get(str(staged.log)):
            elsewhere = (
                "; is it on another machine? Run `make sync` there" if "no such file" in mine[0] else ""
            )
            return mine[0] + elsewhere
        if not staged.log.with_name(f"{staged.log.name}.synced").exists():
            reasons = [line.partition("ERROR")[2].strip() for line in said if "ERROR" in line]
            return f"wandb did not finish: {mask(reasons[0]) if reasons else 'it gave no reason'}"
        deadline = time.monotonic() + SHOWN_SECONDS
        while (rows := self.there(staged.segment).rows) is not None:
            missing = staged.expected - identities(rows)
            if not missing:
                break
            if time.monotonic() > deadline:
                return f"W&B does not show {missing.total():,} of its rows"
            time.sleep(0.5)
        return ""


def _answers(url: str) -> bool:
    """Whether something answers HTTP there; any status will do."""
    try:
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _errors(folder: Path) -> dict[str, list[str]]:
    """What wandb noted as failed, by the path that it sent. `wandb sync` itself still reports success."""
    found: dict[str, list[str]] = {}
    for log in (folder / "wandb" / "logs").glob("debug-sync*.log"):
        for line in log.read_text(errors="replace").splitlines():
            try:
                about = json.loads(line)
            except ValueError:
                continue
            said = str(about.get("msg", ""))
            if str(about.get("level", "")).startswith("ERROR") and not said.startswith("api:"):
                found.setdefault(about.get("sync_path", ""), []).append(mask(" ".join(said.split())[:300]))
    return found
