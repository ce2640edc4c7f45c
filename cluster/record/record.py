"""The record of a run: `metrics.jsonl` and `summary.json` always, Weights & Biases as their mirror.

The files are the record, and everything downstream reads them. `wandb_mirror` copies them to W&B. Every
string in either of them is masked (`cluster.masking`).
"""

import errno
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster import files
from cluster.masking import masked
from cluster.record import origins, row_format
from cluster.record.wandb_mirror import FSYNC_SECONDS, Mirror

WANDB_MODES = ("auto", "offline", "online", "disabled")  # see `Record.open`


class Record:
    """The record of one run, written by rank 0 alone. Use it as a context manager; see `Record.open`.

    Files in the run directory: `metrics.jsonl`, `provenance.json`, `summary.json` (present once the run
    has finished), `wandb_run_id` and `wandb/`.
    """

    def __init__(self, directory: Path, mirror: Mirror, *, seconds_before: float = 0.0) -> None:
        self.directory = directory
        self._mirror = mirror
        self._began = time.monotonic() - seconds_before
        self._path = directory / "metrics.jsonl"
        self._descriptor: int | None = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        row_format.claim(self._descriptor)
        files.fsync_folder(directory)
        self._fsync_at = time.monotonic() + FSYNC_SECONDS

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        config: dict[str, Any],
        provenance: dict[str, Any],
        wandb_mode: str,
        project: str,
        group: str | None,
        name: str,
        resume_step: int | None,
        job_type: str = "train",
        tags: Sequence[str] = (),
        inputs: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """Start the record of a run, or continue it.

        Args:
            directory: the run directory; created if missing.
            config: the resolved configuration, for W&B only.
            provenance: from `provenance.collect`; written to `provenance.json`. A resumed run keeps those of
                its earlier starts, oldest first, under `earlier_starts`.
            wandb_mode: auto, offline, online or disabled. auto obeys WANDB_MODE or the mode in W&B's settings
                file; without either it is online if a W&B API key or login exists, else offline.
            project, group, name: how W&B files the run.
            resume_step: the step of the checkpoint that the run continues from, or None for a fresh start.
                Rows after this step are dropped, because the run will log them again, and the W&B run is
                continued. A fresh start replaces the metrics, summary and W&B id that a run left here.
            job_type: what kind of work this is, one of `wandb_keys.JOB_TYPES`; names the section of its keys
                in W&B.
            tags: what to find the run by in W&B, such as its rule and ZeRO stage; the hardware and the commit
                are added from `provenance`.
            inputs: origins (`cluster.record.origins`) of what it is made from; to `provenance.json` and W&B.

        Raises:
            cluster.files.DamagedFile: a line of metrics.jsonl other than a torn last one is damaged.
            OSError: the directory cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "summary.json").unlink(missing_ok=True)
        rows = _rewind(directory / "metrics.jsonl", last_step=resume_step)
        used = masked([origins.checked(each) for each in inputs])
        provenance = {**masked(provenance), "job_type": job_type, **({"inputs": used} if used else {})}
        provenance = _with_earlier_starts(directory / "provenance.json", provenance, resume_step=resume_step)
        files.write_json(directory / "provenance.json", provenance)
        mirror = Mirror(
            directory,
            mode=wandb_mode,
            run_id=_wandb_run_id(directory / "wandb_run_id", resume_step=resume_step),
            config={**masked(config), "provenance": provenance},
            project=project,
            group=group,
            name=name,
            job_type=job_type,
            tags=[*tags, *_tags_of(provenance)],
            earlier=rows,
        )
        for each in origins.flat(used):
            mirror.artifact(each, used=True)
        return cls(directory, mirror, seconds_before=rows[-1].get("seconds", 0.0) if rows else 0.0)

    @property
    def wandb_status(self) -> str:
        """`starting`, `online: <url>`, `offline: <how to upload>` or `disabled: <reason>`; problems."""
        return self._mirror.status

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to `metrics.jsonl` and hand it to W&B under the keys of `wandb_keys`.

        `row` is flat and JSON-ready, with an int `step`; units belong in the keys. `seconds` is added unless
        it is there: wall time since the run began, in all its starts up to the row that this one continues.
        One object of objects, {layer: {quantity: value}}, becomes a table and histograms. A value that is not
        finite, which strict JSON cannot write, becomes null beside `<key>_nonfinite`: "nan", "inf" or "-inf";
        `read_metrics` and `follow` give it back as a float. On return the row survives the death of the
        process (SIGKILL too), and within about a second of steady logging a loss of power.

        Raises:
            ValueError: the row has no int `step`, or a key that ends in `_nonfinite`.
            OSError: the row could not be written whole, say because the disk is full; no part of it remains.
        """
        assert self._descriptor is not None, "log() on a closed record"
        if type(row.get("step")) is not int:
            raise ValueError(f"{self._path}: a row needs an int 'step'; got {row.get('step')!r}")
        seconds = time.monotonic() - self._began
        row = masked({"seconds": seconds, **row})
        line = f"{json.dumps(row_format.encode(row), allow_nan=False)}\n".encode()
        _append(self._descriptor, line, path=self._path)
        if time.monotonic() >= self._fsync_at:
            self._fsync()
        self._mirror.put(row, seconds=seconds)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show rows as a table in W&B; the run's files hold them already."""
        self._mirror.table(name, columns, masked(rows))

    def file(self, path: Path) -> None:
        """Keep a copy of a file in W&B, by its name. It must not change until the record is finished."""
        self._mirror.file(path)

    def output(self, made: origins.Origin, *, upload: bool = False) -> None:
        """Log what the run made as an artifact of W&B: by reference, or with its files (`upload`)."""
        self._mirror.artifact(masked(made), used=False, upload=upload)

    def image(self, name: str, path: Path) -> None:
        """Show a picture in W&B. The file must not change until the record is finished."""
        self._mirror.image(name, path)

    def finish(self, summary: dict[str, Any], *, exit_code: int = 0) -> None:
        """Write `summary.json` and end the W&B run, waiting for its upload at most `Mirror.CLOSE_SECONDS`.

        `wandb_status` and `wandb_run_id` are added to `summary`; values that are not finite are written as
        in `log`.
        """
        self._fsync()
        summary = masked(summary)
        self._write_summary(summary)  # before W&B gets to take its time
        self._mirror.close(summary=summary, exit_code=exit_code)
        self._write_summary(summary)

    def close(self, *, exit_code: int = 0) -> None:
        """Make the metrics durable and end the W&B run with this exit code, unless `finish` did."""
        if self._descriptor is not None:
            self._fsync()
            os.close(self._descriptor)
            self._descriptor = None
        self._mirror.close(summary={}, exit_code=exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def _fsync(self) -> None:
        assert self._descriptor is not None, "the record is closed"
        os.fsync(self._descriptor)
        self._fsync_at = time.monotonic() + FSYNC_SECONDS

    def _write_summary(self, summary: dict[str, Any]) -> None:
        about = {"wandb_status": self.wandb_status, "wandb_run_id": self._mirror.run_id}
        files.write_json(self.directory / "summary.json", row_format.encode({**summary, **about}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`. A torn last line, left by a crash or being written, is ignored.

    Raises:
        cluster.files.DamagedFile: any other line is damaged; the message names file and line.
        FileNotFoundError: there is no such file.
    """
    return [row for _, row in _parse(path.read_bytes(), path=path)]


def follow(path: Path, *, stop: Callable[[], bool], poll_seconds: float = 0.2) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `metrics.jsonl` from the first on, as they are written, until `stop()` is true.

    The file need not exist yet. Rows present when `stop()` turns true are still yielded. If a resumed run
    replaces the file, the rows start again from the first of the new file.

    Raises:
        cluster.files.DamagedFile: a damaged line, as in `read_metrics`.
    """
    identity, num_lines, position, pending = None, 0, 0, b""
    while True:
        stopping = stop()  # asked before reading, so that nothing written until then is missed
        if path.exists():
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != identity or status.st_size < position:
                    identity, num_lines, position, pending = (status.st_dev, status.st_ino), 0, 0, b""
                file.seek(position)
                pending += file.read()
                position = file.tell()
            whole, newline, pending = pending.rpartition(b"\n")
            for line, row in _parse(whole + newline, path=path, num_lines_before=num_lines):
                num_lines = line
                yield row
        if stopping:
            return
        time.sleep(poll_seconds)


def _parse(content: bytes, *, path: Path, num_lines_before: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row). Text after the last newline is ignored: its log() never returned."""
    for number, line in enumerate(content.split(b"\n")[:-1], start=num_lines_before + 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise files.DamagedFile(f"{path}, line {number}: {error}; repair or remove the line") from error
        if not isinstance(row, dict):
            raise files.DamagedFile(f"{path}, line {number}: not a JSON object; repair or remove the line")
        yield number, row_format.decode(row)


def _append(descriptor: int, line: bytes, *, path: Path) -> None:
    """Append the whole line with one write, or none of it."""
    try:
        written = os.write(descriptor, line)
    except OSError as error:
        error.filename = str(path)
        raise
    if written < len(line):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise OSError(errno.ENOSPC, "no space for a whole row; free some and resume the run", str(path))


def _rewind(path: Path, *, last_step: int | None) -> list[dict[str, Any]]:
    """Drop the torn end and the rows after `last_step`, or every row if it is None. Returns what is kept."""
    if not path.exists():
        return []
    content = path.read_bytes()
    lines = content.split(b"\n")
    rows = [
        (lines[number - 1] + b"\n", row)
        for number, row in _parse(content, path=path)
        if last_step is not None and row["step"] <= last_step
    ]
    kept = b"".join(line for line, _ in rows)
    if kept != content:
        files.write_text(path, kept.decode())
    return [row for _, row in rows]


def _tags_of(provenance: Mapping[str, Any]) -> list[str]:
    """The hardware and the commit, as far as the provenance has them."""
    host, commit = provenance.get("host", {}), provenance.get("commit", "unknown")
    device = (host.get("gpus") or [host.get("cpu")])[0]
    code = [] if commit == "unknown" else [commit[:7] + "-dirty" * bool(provenance.get("dirty"))]
    return [device, *code] if device else code


def _with_earlier_starts(
    path: Path, provenance: dict[str, Any], *, resume_step: int | None
) -> dict[str, Any]:
    if resume_step is None or not path.exists():
        return provenance
    last = files.read_json(path)
    return {**provenance, "earlier_starts": [*last.pop("earlier_starts", []), last]}


def _wandb_run_id(path: Path, *, resume_step: int | None) -> str:
    if resume_step is not None and path.exists():
        return path.read_text().strip()
    run_id = secrets.token_hex(4)
    files.write_text(path, f"{run_id}\n")
    return run_id
