"""The copy of a run's checkpoints behind an fsspec URL (`checkpoint.upload`).

    URL/<run>/checkpoints/step-NNNNNNN/    a checkpoint's files, PARTS, and COMPLETE, which is written last
    URL/<run>/metrics.jsonl, ...           the record when the newest one was sent

A file is sent again unless the one there has its size, and PARTS its SHA-256. So an upload that was killed
goes on with the file that it was killed in.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from cluster import files
from cluster.cli import UserError
from cluster.record import events
from cluster.runs import COMPLETE, complete_checkpoints
from training.config import TrainConfig
from training.data.urls import file_system
from training.run.checkpoint import STATE, kept, step_directory, step_of
from training.run.state import rewinds

PARTS = "parts.json"  # in a checkpoint there: file -> SHA-256 of what was sent under its name
RECORD = ("metrics.jsonl", "events.jsonl", "provenance.json", "wandb_run_id", rewinds.FILE)
POLL_SECONDS, RETRY_SECONDS = 2.0, 30.0
TRIES = 3  # for what is left when a run ends


class Remote:
    """What a run has behind the URL. Errors are those of the file system: any `Exception`.

    Raises:
        UserError: fsspec cannot open the URL, for example because it does not know the protocol.
    """

    def __init__(self, url: str, *, run: str) -> None:
        self._name = f"{url.rstrip('/')}/{run}"
        with _reported(url):
            self._system, root = file_system(url)
        self._root = f"{root.rstrip('/')}/{run}"

    @classmethod
    def of(cls, config: TrainConfig) -> Self | None:
        """That of a run; None without `checkpoint.upload`."""
        url = config.checkpoint.upload
        return cls(url, run=config.run.name) if url else None

    def __str__(self) -> str:
        return self._name

    def require_writable(self) -> None:
        """Raise a `UserError` if nothing can be written there."""
        probe = f"{self._root}/.probe"
        with _reported(self):
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(probe, b"")
            self._system.rm_file(probe)

    def steps(self) -> dict[int, bool]:
        """The step of each checkpoint there, and whether it is complete."""
        self._system.invalidate_cache()
        try:
            found = self._system.ls(f"{self._root}/checkpoints", detail=False)
        except FileNotFoundError:
            return {}
        names = [name for name in map(_last, found) if re.fullmatch(r"step-\d+", name)]
        return {
            step_of(Path(name)): self._system.exists(f"{self._root}/checkpoints/{name}/{COMPLETE}")
            for name in names
        }

    def send(self, path: Path) -> bool:
        """Send a complete checkpoint. Returns False if it is there already."""
        there, mark = self._place(step_of(path)), (path / COMPLETE).read_text()
        self._system.invalidate_cache()
        if self._read(f"{there}/{COMPLETE}") == mark:
            return False
        self._system.makedirs(there, exist_ok=True)
        self._remove(f"{there}/{COMPLETE}")  # of this step before a rewind
        sent: dict[str, str] = json.loads(self._read(f"{there}/{PARTS}") or "{}")
        for name, sha256 in _hashes(path, mark).items():
            size = (path / name).stat().st_size
            if sent.get(name) == sha256 and self._size(f"{there}/{name}") == size:
                continue
            if sent.pop(name, None):
                self._system.pipe_file(f"{there}/{PARTS}", json.dumps(sent).encode())
            self._system.put_file(str(path / name), f"{there}/{name}")
            self._system.invalidate_cache()
            if (arrived := self._size(f"{there}/{name}")) != size:
                raise OSError(f"{there}/{name} has {arrived} bytes instead of {size}")
            sent[name] = sha256
            self._system.pipe_file(f"{there}/{PARTS}", json.dumps(sent).encode())
        for name in RECORD:
            if (path.parent.parent / name).exists():
                self._system.put_file(str(path.parent.parent / name), f"{self._root}/{name}")
        self._system.pipe_file(f"{there}/{COMPLETE}", mark.encode())
        return True

    def prune(self, *, keep: int, keep_every_steps: int, dropped: Callable[[int], bool]) -> None:
        """Delete what `training.run.checkpoint.prune` would, and what the run itself has dropped."""
        steps = self.steps()
        gone = {step for step in steps if dropped(step)}
        complete = sorted(step for step, whole in steps.items() if whole and step not in gone)
        retained = kept(complete, keep=keep, keep_every_steps=keep_every_steps)
        if len(complete) >= keep:
            gone |= {step for step in steps if step < complete[-keep] and step not in retained}
        for step in gone:
            self._remove(f"{self._place(step)}/{COMPLETE}")
            self._system.rm(self._place(step), recursive=True)

    def fetch(self, step: int, directory: Path) -> Path:
        """Bring a complete checkpoint into a run directory, with the record if there is none.

        Raises:
            UserError: it cannot be read, or is not what was sent.
        """
        there, path = self._place(step), step_directory(directory / "checkpoints", step)
        with _reported(there):
            (path / COMPLETE).unlink(missing_ok=True)
            path.mkdir(parents=True, exist_ok=True)
            mark = self._system.cat_file(f"{there}/{COMPLETE}").decode()
            self._get(f"{there}/{STATE}", path / STATE, sha256=mark.strip())
            for name, sha256 in _hashes(path, mark).items():
                self._get(f"{there}/{name}", files.inside(path, name), sha256=sha256)
            for name in RECORD:
                with suppress(FileNotFoundError):
                    if not (directory / name).exists():
                        self._system.get_file(f"{self._root}/{name}", str(directory / name))
            files.write_text(path / COMPLETE, mark)
        return path

    def _get(self, there: str, here: Path, *, sha256: str) -> None:
        if here.exists() and files.sha256_of(here) == sha256:
            return
        self._system.get_file(there, str(here))
        if files.sha256_of(here) != sha256:
            raise ValueError(f"{here.name} is not what was sent (SHA-256); delete that checkpoint there")

    def _place(self, step: int) -> str:
        return f"{self._root}/checkpoints/{step_directory(Path(), step).name}"

    def _read(self, there: str) -> str | None:
        with suppress(FileNotFoundError):
            return self._system.cat_file(there).decode()
        return None

    def _size(self, there: str) -> int | None:
        with suppress(FileNotFoundError):
            return self._system.info(there)["size"]
        return None

    def _remove(self, there: str) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(there)


def restore(
    config: TrainConfig, remote: Remote | None, *, newest: Path | None, report: Callable[[str], None]
) -> Path | None:
    """The checkpoint to continue from: `newest`, or a newer one behind `checkpoint.upload`, now here.

    Raises:
        UserError: nothing can be read or written there.
    """
    if remote is None:
        return newest
    remote.require_writable()
    directory = config.run_directory
    with _reported(remote):
        step = max((step for step, whole in remote.steps().items() if whole), default=0)
    if step <= (step_of(newest) if newest else 0) or _dropped(directory, step):
        return newest
    report(f"fetching step {step:,} from {remote}")
    return remote.fetch(step, directory)


class Uploads:
    """Sends the checkpoints of a run to `checkpoint.upload` in a thread, for the length of a `with` block.

    What cannot be sent is an event, and is tried again; the training never waits. At the end of the block
    the thread sends what is left, unless an error ended the block.
    """

    def __init__(self, config: TrainConfig, remote: Remote | None, *, note: Callable[[str], None]) -> None:
        self._config, self._note, self._remote = config, note, remote
        self._checkpoints = config.run_directory / "checkpoints"
        self._done: dict[Path, str | None] = {}  # checkpoint -> mark of what was sent
        self._problem = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="uploads")

    def __enter__(self) -> None:
        if self._remote:
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        if self._remote and kind is None:
            if self._left():
                self._note(f"sending the newest checkpoint to {self._remote}")
            self._thread.join()
            if left := self._left():
                self._note(
                    f"{left[0].name} is not at {self._remote}: {self._problem}; the same command sends it"
                )

    def _run(self) -> None:
        tries = 0
        while tries < TRIES:
            if self._attempt() and self._ending.is_set() and not self._left():
                return
            tries += bool(self._problem) and self._ending.is_set()
            wait = RETRY_SECONDS if self._problem else POLL_SECONDS
            if self._ending.is_set():
                time.sleep(min(wait, POLL_SECONDS))
            else:
                self._ending.wait(wait)

    def _left(self) -> list[Path]:
        """What is still to be sent, the newest first."""
        found = reversed(complete_checkpoints(self._checkpoints))
        return [path for path in found if self._done.get(path) != _mark(path)]

    def _attempt(self) -> bool:
        """Send and prune. Returns whether that was possible."""
        assert self._remote is not None
        keep, every = self._config.checkpoint.keep, self._config.checkpoint.keep_every_steps
        directory = self._config.run_directory
        left = self._left()
        for path in left:
            mark = _mark(path)
            try:
                began = time.monotonic()
                new = self._remote.send(path)
            except Exception as error:  # whatever a file system raises; the training goes on
                if _mark(path) != mark:  # it was deleted meanwhile, and a newer one is there
                    continue
                return self._fail(path, error)
            self._done[path] = mark
            if new:
                text = f"{path.name} is at {self._remote}, after {time.monotonic() - began:.0f} s"
                events.append(directory, "uploaded", text, step=step_of(path))
        try:
            if left:
                self._remote.prune(
                    keep=keep, keep_every_steps=every, dropped=lambda step: _dropped(directory, step)
                )
        except Exception as error:
            return self._fail(left[0], error)
        self._problem = ""
        return True

    def _fail(self, path: Path, error: Exception) -> bool:
        """One event for a problem, however often it is met."""
        if (problem := _reason(error)) != self._problem:
            self._problem = problem
            text = f"{path.name} could not be sent to {self._remote}: {problem}; the run goes on"
            directory, step = self._config.run_directory, step_of(path)
            events.append(directory, "upload_failed", f"{text}, and tries again", step=step)
        return False


def _hashes(path: Path, mark: str) -> dict[str, str]:
    """File -> SHA-256 of a checkpoint, as `state.json` and the text of COMPLETE, `mark`, say."""
    state: dict[str, Any] = files.read_json(path / STATE)
    return {STATE: mark.strip()} | {name: shard["sha256"] for name, shard in state["files"].items()}


def _mark(path: Path) -> str | None:
    with suppress(OSError):
        return (path / COMPLETE).read_text()
    return None


def _dropped(directory: Path, step: int) -> bool:
    """Whether the run went back to before this step, and is not there again."""
    newest = max(map(step_of, complete_checkpoints(directory / "checkpoints")), default=0)
    went_back = rewinds.read(directory)
    return step > newest and any(each["to_step"] < step <= each["from_step"] for each in went_back)


def _last(name: str) -> str:
    return PurePosixPath(name.rstrip("/")).name


@contextmanager
def _reported(place: object) -> Iterator[None]:
    """Turns any error of a file system into a `UserError` that names the place."""
    try:
        yield
    except Exception as error:
        raise UserError(f"checkpoint.upload: {place}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
