"""Checkpoints that any world size and ZeRO stage can read.

`checkpoints/step-NNNNNNN/` holds one safetensors file per rank, `state.json`, and `COMPLETE`, written last:
without it the checkpoint does not count. A tensor is a piece of one parameter's fp32 master weights or
optimizer state, keyed `parameter|tensor|first element`. A reader takes the pieces that its own shards need,
whichever rank wrote them. The model's bf16 weights are not stored: they are the masters, rounded.
"""

import bisect
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster import files
from cluster.cli import UserError
from cluster.record import origins
from cluster.runs import COMPLETE, complete_checkpoints
from training.run.context import Context

FORMAT_VERSION = 1
STATE = "state.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used. The message names the file and the remedy."""


def step_directory(root: Path, step: int) -> Path:
    """`root/step-NNNNNNN`."""
    return root / f"step-{step:07d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix("step-"))


def newest_complete(root: Path, *, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under `root` with its COMPLETE mark; each newer one without is reported."""
    for path in sorted(root.glob("step-*"), reverse=True):
        if (path / COMPLETE).exists():
            return path
        report(f"skipping {path}: half-written (no {COMPLETE} file)")
    return None


def prune(root: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and half-written ones older than these."""
    complete = complete_checkpoints(root)
    if len(complete) < keep:
        return
    oldest_kept = complete[-keep]
    for path in root.glob("step-*"):
        if path < oldest_kept:
            (path / COMPLETE).unlink(missing_ok=True)  # never leave a marked checkpoint half-deleted
            shutil.rmtree(path)


def save(
    path: Path,
    *,
    shards: Iterable[tuple[str, int, dict[str, Tensor]]],
    state: dict[str, Any],
    context: Context,
) -> None:
    """Write one checkpoint. Every rank calls it, with its own `shards` (`ZeroOptimizer.shards`).

    Its state says what the run directory around `path` knows of commit and data (`cluster.record.origins`).

    Raises:
        CheckpointError: on every rank, if any rank could not write; what was written is removed.
    """
    if context.is_main:
        shutil.rmtree(path, ignore_errors=True)  # a half-written one of an earlier start
    context.gather(None)
    name = f"rank-{context.rank:05d}-of-{context.world_size:05d}.safetensors"
    problem, size = _attempt(path, lambda: _write_tensors(path / name, shards))
    problems, sizes = zip(*context.gather((problem, (name, size))), strict=True)
    if context.is_main and not any(problems):
        lineage = origins.of_writer(path.parent.parent)
        content = {"format": FORMAT_VERSION, **state, "lineage": lineage, "files": dict(sizes)}
        problem, _ = _attempt(path, lambda: _write_marks(path, content))
    problems = (*problems, *context.gather(problem))
    if any(problems):
        context.gather(None)  # no rank is still writing
        shutil.rmtree(path, ignore_errors=True)
        raise CheckpointError(next(filter(None, problems)))


def _attempt(path: Path, write: Callable[[], int]) -> tuple[str | None, int]:
    """(problem, result): one rank's failure must reach the others before it is raised."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return None, write()
    except (OSError, SafetensorError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif system := re.search(r"I/O error: (.*) \(os error", reason):  # safetensors' own wrapping of errno
            reason = system[1]
        return f"{path}: cannot be written ({reason}); free space there, then run the same command again", 0


def _write_tensors(path: Path, shards: Iterable[tuple[str, int, dict[str, Tensor]]]) -> int:
    tensors = {
        f"{parameter}|{name}|{start}": tensor.detach().cpu().contiguous()
        for parameter, start, named in shards
        for name, tensor in named.items()
    }
    save_file(tensors, path)
    files.set_mode_of_folder(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def _write_marks(path: Path, content: dict[str, Any]) -> int:
    files.write_json(path / STATE, content)
    files.write_text(path / COMPLETE, "")
    files.fsync_folder(path.parent)
    return 0


class Checkpoint:
    """A complete checkpoint, opened for reading.

    Attributes:
        state: what `save` was given.

    Raises:
        CheckpointError: a file is missing, truncated, unreadable or outside the checkpoint, or the format
            version is another.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.state: dict[str, Any] = files.read_json(files.inside(path, STATE))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path / STATE}: unreadable ({error}); delete {path} to use the one before"
            ) from error
        if self.state.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format {self.state.get('format')}, but this version reads {FORMAT_VERSION}"
            )
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for name, size in self.state["files"].items():
            try:
                file = files.inside(path, name)
            except ValueError as error:
                raise CheckpointError(f"{path / STATE}: {error}") from error
            self._index(file, size)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def _index(self, file: Path, size: int) -> None:
        remedy = f"restore it, or delete {self.path} to use the checkpoint before"
        if not file.exists():
            raise CheckpointError(f"{file}: missing shard; {remedy}")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes instead of {size}; {remedy}")
        try:
            handle = safe_open(file, framework="pt")
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                parameter, name, start = key.split("|")
                [numel] = handle.get_slice(key).get_shape()
                piece = (int(start), int(start) + numel, handle, key)
                self._pieces.setdefault((parameter, name), []).append(piece)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file}: corrupt ({error}); {remedy}") from error

    def read(self, parameter: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one tensor of a parameter: 1-D, fp32.

        Raises:
            CheckpointError: some of these elements are not in the checkpoint.
        """
        result = torch.empty(stop - start, dtype=torch.float32)
        pieces = self._pieces.get((parameter, name), [])
        position = start
        index = max(bisect.bisect_right(pieces, start, key=lambda piece: piece[0]) - 1, 0)
        for first, last, handle, key in pieces[index:]:
            if position == stop or first > position:
                break
            until = min(last, stop)
            if until > position:
                result[position - start : until - start] = handle.get_slice(key)[
                    position - first : until - first
                ]
                position = until
        if position < stop:
            raise CheckpointError(
                f"{self.path}: {parameter} has no {name} for elements {position} to {stop}; "
                "the run that wrote it had another model or optimizer"
            )
        return result

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Raise a `CheckpointError` unless a run of this `training.plan.run_identity` can continue it."""
        saved = self.state["identity"]
        for key, value in identity.items():
            if saved.get(key) != value:
                raise CheckpointError(
                    f"{self.path}: {key} was {saved.get(key)!r} and is now {value!r}; "
                    "set it back, or start anew under another run.name"
                )

    def whole(self, name: str) -> Iterable[tuple[str, Tensor]]:
        """(parameter, 1-D fp32 tensor) of every parameter that has a tensor of this name."""
        for (parameter, tensor), pieces in self._pieces.items():
            if tensor == name:
                yield parameter, self.read(parameter, name, 0, pieces[-1][1])
