"""Weights & Biases as the mirror of a run's record. The only home of wandb.

It runs in a thread of its own, so that nothing W&B does or fails to do can block, slow down or kill a run.
"""

import math
import os
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.masking import mask
from cluster.record import wandb_artifacts, wandb_keys
from cluster.record.alerts import Alerts
from cluster.record.origins import Origin

MAX_TAG = 64  # letters; W&B refuses a run with a longer tag
EARLIER = "earlier"  # folder of W&B's files of earlier starts, which nobody needs to upload
FSYNC_SECONDS = 1.0  # between flushes of W&B's own log; also of metrics.jsonl


class Mirror:
    """Copies rows to W&B from a daemon thread. Its calls never raise, and only `close` waits, within a bound.

    The bounds are such that a run of a few seconds still ends as an offline W&B run when the server is away:
    INIT_SECONDS, about 3 s to turn to offline, and the copy of its rows fit into CLOSE_SECONDS.
    """

    INIT_SECONDS = 10.0
    UPLOAD_SECONDS = 10.0  # for what is not sent when the run ends; the rest stays on disk
    CLOSE_SECONDS = 60.0  # 3 s is usual; a machine that is busy with the end of a run takes ten times as long
    MAX_WAITING_ROWS = 10_000

    def __init__(
        self,
        directory: Path,
        *,
        mode: str,
        run_id: str,
        job_type: str,
        tags: Sequence[str],
        earlier: Sequence[dict[str, Any]] = (),
        **about: Any,
    ) -> None:
        self.run_id = run_id
        self._directory = directory
        self._job_type = job_type
        self._about = about | {"job_type": job_type, "tags": [tag[:MAX_TAG] for tag in dict.fromkeys(tags)]}
        self._state = "starting"
        self._problems: list[str] = []
        self._num_missed, self._closed = 0, False
        self._known: set[str] = set()  # keys of rows so far
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._calls.put(lambda run: self._repeat(run, earlier))
        self._thread = threading.Thread(target=self._work, args=(mode,), name="wandb-mirror", daemon=True)
        self._thread.start()

    @property
    def status(self) -> str:
        missed = [f"{self._num_missed} rows missed, because W&B was too slow"] * bool(self._num_missed)
        return "; ".join([self._state, *self._problems, *missed])

    def put(self, row: dict[str, Any], *, seconds: float) -> None:
        """Hand over a row. It is left out and counted if `MAX_WAITING_ROWS` wait, ignored if W&B failed."""
        if self._calls.qsize() < self.MAX_WAITING_ROWS:
            self.call(lambda run: self._log(run, row, seconds=seconds))
        else:
            self._num_missed += 1

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Hand over a table."""
        key, content = wandb_keys.wandb_key(name, job_type=self._job_type), [list(row) for row in rows]
        self.call(lambda run: run.log({key: _table(columns, content)}, commit=False))  # with the next row

    def image(self, name: str, path: Path) -> None:
        """Hand over a picture."""
        key = wandb_keys.wandb_key(name, job_type=self._job_type)
        self.call(lambda run: run.log({key: _image(path)}, commit=False))

    def file(self, path: Path) -> None:
        """Hand over a file."""

        def save(run: Any) -> None:
            # wandb would link to it; a copy is there wherever the run's folder is uploaded from
            run.save(shutil.copy(path, run.dir), base_path=run.dir, policy="now")

        self.call(save)

    def artifact(self, made: Origin, **how: bool) -> None:
        """Hand over a thing (`wandb_artifacts.log`). If W&B cannot take it, the status says so."""
        self.call(lambda run: self._problems.extend(wandb_artifacts.log(run, made, **how)))

    def call(self, do: Callable[[Any], None]) -> None:
        """Have the mirror's thread call `do` with W&B's run, after what was handed over before.

        `do` runs once, later or never. If it raises, the mirror stops and its status says why.
        """
        if self._thread.is_alive():
            self._calls.put(do)

    def close(self, *, summary: dict[str, Any], exit_code: int) -> None:
        """End the W&B run and wait for it, at most `CLOSE_SECONDS`. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True

        def finish(run: Any) -> None:
            self._alerts.send()
            found = wandb_keys.wandb_row(summary, job_type=self._job_type)
            plain = {key: value for key, value in found.items() if not _is_table(value)}
            run.summary.update({key: value for key, value in plain.items() if key not in self._known})
            run.finish(exit_code=exit_code)

        self.call(finish)
        self._calls.put(None)
        self._thread.join(self.CLOSE_SECONDS)
        if self._thread.is_alive():
            self._problems.append(f"W&B had not finished {self.CLOSE_SECONDS:g} s after the run")

    def _work(self, mode: str) -> None:
        try:
            run = self._start(mode)
            while run is not None and (do := self._alerts.get(self._calls)):
                do(run)
        except Exception as error:  # whatever W&B does, the run goes on and its record says what happened
            if self._state == "starting":
                self._state = f"disabled: {_reason(error)}"
            else:
                self._problems.append(
                    f"stopped by {_reason(error)}; to send the copy on disk: {_sync(self._directory)}"
                )

    def _repeat(self, run: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Log the rows that a resumed run has kept and W&B lacks, so that each step is there once.

        Online, W&B says at which step it goes on (`starting_step`) and drops rows of earlier steps, which it
        has from an earlier start. Offline, every start has a file of its own, and `wandb sync` appends one to
        the other: so the newest file holds all rows, and those of earlier starts are set aside.
        """
        for row in rows:
            if row["step"] >= run.starting_step:
                self._log(run, row, seconds=row.get("seconds", 0.0))
        folders = self._directory / "wandb"
        for folder in folders.glob(f"*run-*-{self.run_id}"):
            if not folder.samefile(Path(run.dir).parent):
                (folders / EARLIER).mkdir(exist_ok=True)
                folder.rename(folders / EARLIER / folder.name)

    def _log(self, run: Any, row: dict[str, Any], *, seconds: float) -> None:
        """Log a row now (`commit`) as W&B's step of that number."""
        found = wandb_keys.wandb_row(row, job_type=self._job_type) | {"seconds": seconds}
        for key in sorted(set(found) - self._known):
            if which := wandb_keys.summary_of(key):
                run.define_metric(key, step_metric="step", summary=which)
        self._known |= set(found)
        shown = {name: each for key, value in found.items() for name, each in _shown(key, value).items()}
        run.log(shown, step=row["step"], commit=True)

    def _start(self, mode: str) -> Any:
        """The W&B run in this mode, or offline if the server cannot be reached; None if disabled."""
        if mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            mode = "disabled"  # without importing wandb, which takes a second
        if mode != "disabled":
            import wandb
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            opentelemetry_proxy.disable()  # without a network it holds up the end of the process by 20 s
        if mode == "auto":
            mode = auto_mode()
        if mode == "disabled":
            self._state = "disabled: as configured"
            return None
        try:
            run = self._init(mode)
        except Exception as error:
            if mode == "offline":
                raise
            self._problems.append(_reason(error))
            wandb.teardown()  # or the id would still be "in use"
            run = self._init("offline")
        for axis in wandb_keys.AXES:
            run.define_metric(axis)
        run.define_metric("*", step_metric="step")
        earlier = None if run.offline else self.run_id
        self._alerts = Alerts(self._directory, name=run.name, run_id=earlier, alert=run.alert)
        self._state = f"online: {run.url}" if run.url else f"offline: {_sync(self._directory)}"
        return run

    def _init(self, mode: Any) -> Any:
        import wandb

        private: dict[str, Any] = {
            "x_transaction_log_flush_interval": FSYNC_SECONDS,  # else a SIGKILL costs the copy its last 15 s
            "x_disable_meta": True,  # command line and host: our provenance holds them, masked
            "x_save_requirements": False,
        }
        known = wandb.Settings.model_fields
        self._problems += [f"this wandb lacks the setting {name}" for name in private if name not in known]
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            init_timeout=self.INIT_SECONDS,
            finish_timeout=self.UPLOAD_SECONDS,
            finish_timeout_raises=True,
            **{name: value for name, value in private.items() if name in known},
        )
        wandb.setup(settings=wandb.Settings(silent=True))  # silences what precedes init, such as the login
        # Files of tables wait there for their upload. In the home, `make pull` would not bring them along.
        os.environ["WANDB_DATA_DIR"] = str(self._directory.absolute() / "wandb")
        return wandb.init(
            dir=self._directory,
            mode=mode,
            id=self.run_id,
            resume="allow",
            reinit="create_new",
            settings=settings,
            **self._about,
        )


def _sync(directory: Path) -> str:
    where = directory.absolute()
    return f"make sync RUN={where.name if where.parent.name == 'outputs' else where}"


def _shown(key: str, value: Any) -> dict[str, Any]:
    """What W&B shows of a value: {layer: {quantity: number}} as a table and a histogram per quantity."""
    if not isinstance(value, dict) or not value or not all(isinstance(v, dict) for v in value.values()):
        return {key: value}
    import wandb

    section, _, name = key.rpartition("/")
    quantities = list(dict.fromkeys(quantity for each in value.values() for quantity in each))
    rows = [[layer, *(each.get(quantity) for quantity in quantities)] for layer, each in value.items()]
    shown = {key: _table([name, *quantities], rows)}
    for column, quantity in enumerate(quantities, start=1):
        values = [row[column] for row in rows]
        numbers = [each for each in values if isinstance(each, int | float) and math.isfinite(each)]
        if numbers:
            shown[f"{section}/{quantity}_by_layer"] = wandb.Histogram(numbers)
    return shown


def _table(columns: Sequence[str], rows: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)


def _image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))


def _is_table(value: Any) -> bool:
    """Whether it is a list of lists or objects, which W&B's summary does not show."""
    return isinstance(value, list) and any(isinstance(each, list | dict) for each in value)


def auto_mode() -> str:
    """WANDB_MODE or the mode in W&B's settings file; else online with a key or login; else offline."""
    import wandb

    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if "WANDB_MODE" in os.environ or settings.mode != "online":
        return settings.mode
    return "online" if signed_in(settings) else "offline"


def signed_in(settings: Any) -> bool:
    """Whether W&B has an API key or a login for its server."""
    from wandb.sdk.lib.wbauth import read_netrc_auth  # `wandb login` keeps the key in the netrc file

    return bool(settings.api_key or settings.identity_token_file or read_netrc_auth(host=settings.base_url))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(mask(str(error)).split())[:200]}"
