"""Weights & Biases as the mirror of a run's record. The only home of wandb.

It runs in a thread of its own, so that nothing W&B does or fails to do can block, slow down or kill a run.
"""

import os
import queue
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.machine.host import has_driver
from cluster.masking import mask

FSYNC_SECONDS = 1.0  # between flushes of W&B's own log; also of metrics.jsonl
_TABLE, _FILE = "table", "file"


class Mirror:
    """Copies rows to W&B from a daemon thread. Its calls never raise, and only `close` waits, within a bound.

    The bounds are such that a run of a few seconds still ends as an offline W&B run when the server is away:
    INIT_SECONDS, about 3 s to turn to offline, and the copy of its rows fit into CLOSE_SECONDS.
    """

    INIT_SECONDS = 10.0
    UPLOAD_SECONDS = 10.0  # for what is not sent when the run ends; the rest stays on disk
    CLOSE_SECONDS = 20.0
    MAX_WAITING_ROWS = 10_000

    def __init__(self, directory: Path, *, mode: str, run_id: str, **about: Any) -> None:
        self.run_id = run_id
        self._directory = directory
        self._about = about
        self._state = "starting"
        self._problems: list[str] = []
        self._num_missed = 0
        self._exit_code = 0
        self._closed = False
        self._calls: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(mode,), name="wandb-mirror", daemon=True)
        self._thread.start()

    @property
    def status(self) -> str:
        missed = [f"{self._num_missed} rows missed, because W&B was too slow"] if self._num_missed else []
        return "; ".join([self._state, *self._problems, *missed])

    def put(self, row: dict[str, Any]) -> None:
        """Hand over a row; it is missed if W&B is `MAX_WAITING_ROWS` behind, ignored if W&B failed."""
        if self._calls.qsize() < self.MAX_WAITING_ROWS:
            self._calls.put(("log", dict(row)))
        elif self._thread.is_alive():
            self._num_missed += 1

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Hand over a table."""
        content = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._calls.put((_TABLE, {name: content}))

    def file(self, path: Path) -> None:
        """Hand over a file."""
        self._calls.put((_FILE, {"path": path}))

    def close(self, *, summary: dict[str, Any], exit_code: int) -> None:
        """End the W&B run and wait for it, at most `CLOSE_SECONDS`. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self._exit_code = exit_code
        self._calls.put(("finish", summary))
        self._thread.join(self.CLOSE_SECONDS)
        if self._thread.is_alive():
            self._problems.append(f"W&B was not done {self.CLOSE_SECONDS:g} s after the run; left behind")

    def _work(self, mode: str) -> None:
        try:
            run = self._start(mode)
            while run is not None:
                call, content = self._calls.get()
                if call == "finish":
                    run.summary.update(content)
                    run.finish(exit_code=self._exit_code)
                    return
                if call == _FILE:
                    # wandb would link to it; a copy is there wherever the run's folder is uploaded from
                    copy = shutil.copy(content["path"], run.dir)
                    run.save(copy, base_path=run.dir, policy="now")
                    continue
                if call == _TABLE:
                    content = {name: _wandb_table(about) for name, about in content.items()}
                run.log(content)
        except Exception as error:  # whatever W&B does, the run goes on and its record says what happened
            if self._state == "starting":
                self._state = f"disabled: {_reason(error)}"
            else:
                self._problems.append(
                    f"stopped by {_reason(error)}; to send the copy on disk: {self._sync('run')}"
                )

    def _start(self, mode: str) -> Any:
        """The W&B run in this mode, or offline if the server cannot be reached; None if disabled."""
        if mode != "disabled":
            import wandb
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            opentelemetry_proxy.disable()  # without a network it holds up the end of the process by 20 s
        if mode == "auto":
            mode = _auto_mode(wandb.setup(settings=wandb.Settings(silent=True)).settings)
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
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._state = f"online: {run.url}" if run.url else f"offline: {self._sync('offline-run')}"
        return run

    def _init(self, mode: Any) -> Any:
        import wandb

        private: dict[str, Any] = {
            "x_transaction_log_flush_interval": FSYNC_SECONDS,  # else a SIGKILL costs the copy its last 15 s
            "x_disable_stats": not has_driver(),
            "x_disable_meta": True,  # command line and host: our provenance holds them, masked
            "x_disable_machine_info": True,
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
        return wandb.init(
            dir=self._directory,
            mode=mode,
            id=self.run_id,
            resume="allow",
            reinit="create_new",
            settings=settings,
            **self._about,
        )

    def _sync(self, kind: str) -> str:
        return f"wandb sync {self._directory / 'wandb'}/{kind}-*-{self.run_id}"


def _wandb_table(about: dict[str, Any]) -> Any:
    import wandb

    return wandb.Table(**about, allow_mixed_types=True)


def _auto_mode(settings: Any) -> str:
    """WANDB_MODE or the mode in W&B's settings file; else online with a key or login; else offline."""
    if "WANDB_MODE" in os.environ or settings.mode != "online":
        return settings.mode
    from wandb.sdk.lib.wbauth import read_netrc_auth  # `wandb login` keeps the key in the netrc file

    signed_in = settings.api_key or settings.identity_token_file or read_netrc_auth(host=settings.base_url)
    return "online" if signed_in else "offline"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(mask(str(error)).split())[:200]}"
