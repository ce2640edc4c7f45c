"""Checkpoints that any world size and ZeRO stage can read.

`checkpoints/step-NNNNNNN/` holds one safetensors file per rank, `state.json` with the SHA-256 of each, and
`COMPLETE` with that of `state.json`. `COMPLETE` is written last; without it the checkpoint does not count. A
checkpoint that no longer matches its hashes is marked `DAMAGED` instead, and the one before is used.

A tensor is a piece of one parameter's fp32 master weights or optimizer state, keyed
`parameter|tensor|first element`. A reader takes the pieces that its own shards need, whichever rank wrote
them. The model's bf16 weights are not stored: they are the masters, rounded. `training.run.state.writer`
writes them.
"""

import bisect
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cluster import files
from cluster.cli import UserError
from cluster.runs import COMPLETE, checkpoints, complete_checkpoints

if TYPE_CHECKING:  # the launcher looks for checkpoints without torch, whose import is slow
    from torch import Tensor

FORMAT_VERSION = 2
STATE = "state.json"
DAMAGED = "DAMAGED"  # in a checkpoint that was complete: what is wrong with it


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used. The message names the file and the remedy."""


class DamagedError(CheckpointError):
    """A complete checkpoint whose files are not what was written."""


def step_directory(root: Path, step: int) -> Path:
    """`root/step-NNNNNNN`."""
    return root / f"step-{step:07d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix("step-"))


def newest_complete(root: Path, *, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under `root` with its COMPLETE mark; each newer one without is reported."""
    for path in reversed(checkpoints(root)):
        if (path / COMPLETE).exists():
            return path
        problem = "damaged" if (path / DAMAGED).exists() else "half-written"
        report(f"skipping {path}: {problem} (no {COMPLETE} file)")
    return None


def newest_sound(root: Path, *, report: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint under `root` whose files are what was written; None if there is none.

    Each newer one that is half-written or damaged is reported. A damaged one is marked so, if `root` can be
    written, and no longer counts: `prune` would keep it in place of a sound one.

    Raises:
        DamagedError: there are complete checkpoints, and all are damaged.
    """
    newest_complete(root, report=report)
    damaged: dict[Path, DamagedError] = {}
    for path in reversed(complete_checkpoints(root)):
        try:
            Checkpoint(path).verify()
        except DamagedError as error:
            damaged[path] = error
            continue
        for each, problem in damaged.items():
            report(f"{problem}; going on with {path}")
            with suppress(OSError):
                files.write_text(each / DAMAGED, f"{problem}\n")
                (each / COMPLETE).unlink()
        return path
    if damaged:
        raise next(iter(damaged.values()))
    return None


def kept(steps: list[int], *, keep: int, keep_every_steps: int) -> set[int]:
    """Of the steps of complete checkpoints, ascending: the newest `keep`, and every `keep_every_steps`-th."""
    for_ever = {step for step in steps if keep_every_steps and step % keep_every_steps == 0}
    return for_ever | set(steps[-keep:])


def prune(root: Path, *, keep: int, keep_every_steps: int = 0) -> None:
    """Delete the complete checkpoints that are not kept, and half-written ones older than the kept.

    `kept` chooses them. A checkpoint that is marked DAMAGED does not count among the newest.
    """
    sound = [path for path in complete_checkpoints(root) if not (path / DAMAGED).exists()]
    if len(sound) < keep:
        return
    steps = kept(list(map(step_of, sound)), keep=keep, keep_every_steps=keep_every_steps)
    retained = [path for path in sound if step_of(path) in steps]
    for path in checkpoints(root):
        if path < sound[-keep] and path not in retained:
            (path / COMPLETE).unlink(missing_ok=True)  # never leave a marked checkpoint half-deleted
            shutil.rmtree(path)


def _names_shards(written: Any) -> bool:
    return isinstance(written, dict) and all(
        isinstance(shard, dict)
        and isinstance(shard.get("bytes"), int)
        and isinstance(shard.get("sha256"), str)
        for shard in written.values()
    )


class Checkpoint:
    """A complete checkpoint, opened for reading.

    Attributes:
        state: what `save` was given.

    Raises:
        DamagedError: a file is missing, truncated or unreadable, or `state.json` is not what was written.
        CheckpointError: a file lies outside the checkpoint, or the format version is another.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._remedy = f"restore it, or delete {path} to use the checkpoint before"
        try:
            self.state: dict[str, Any] = files.read_json(files.inside(path, STATE))
            if not isinstance(self.state, dict):
                raise ValueError("not what a checkpoint writes there")
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path / STATE}: unreadable ({error}); {self._remedy}") from error
        version, mark = self.state.get("format"), (path / COMPLETE).read_bytes().strip()
        is_whole = mark == files.sha256_of(path / STATE).encode()
        if not is_whole and (mark or version == FORMAT_VERSION):  # format 1 had an empty mark
            raise DamagedError(f"{path / STATE}: its SHA-256 is not that in {COMPLETE}; {self._remedy}")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {version}, but this version reads {FORMAT_VERSION}")
        if not _names_shards(self.state.get("files")):
            raise DamagedError(f"{path / STATE}: not what a checkpoint writes there; {self._remedy}")
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for name, written in self.state["files"].items():
            try:
                file = files.inside(path, name)
            except ValueError as error:
                raise CheckpointError(f"{path / STATE}: {error}") from error
            self._index(file, written["bytes"])
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def _index(self, file: Path, size: int) -> None:
        if not file.exists():
            raise DamagedError(f"{file}: missing shard; {self._remedy}")
        if file.stat().st_size != size:
            raise DamagedError(f"{file}: {file.stat().st_size} bytes instead of {size}; {self._remedy}")
        try:
            handle = safe_open(file, framework="pt")
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                parameter, name, start = key.split("|")
                [numel] = handle.get_slice(key).get_shape()
                piece = (int(start), int(start) + numel, handle, key)
                self._pieces.setdefault((parameter, name), []).append(piece)
        except (SafetensorError, ValueError) as error:
            raise DamagedError(f"{file}: corrupt ({error}); {self._remedy}") from error

    def verify(self) -> None:
        """Raise a `DamagedError` unless every shard is readable and has the SHA-256 that was written down."""
        names = list(self.state["files"])
        try:
            with ThreadPoolExecutor() as pool:
                hashes = list(pool.map(lambda name: files.sha256_of(self.path / name), names))
        except OSError as error:  # such as an error of the disk
            where = error.filename or self.path
            raise DamagedError(f"{where}: unreadable ({error.strerror or error}); {self._remedy}") from error
        for name, found in zip(names, hashes, strict=True):
            if found != (written := self.state["files"][name]["sha256"]):
                raise DamagedError(
                    f"{self.path / name}: SHA-256 {found[:12]}… instead of {written[:12]}…: not what was "
                    f"written; {self._remedy}"
                )

    def read(self, parameter: str, name: str, start: int, stop: int) -> "Tensor":
        """Elements [start, stop) of one tensor of a parameter: 1-D, fp32.

        Raises:
            CheckpointError: some of these elements are not in the checkpoint.
        """
        import torch

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
        for key in {**identity, **saved}:
            if saved.get(key) != (value := identity.get(key)):
                raise CheckpointError(
                    f"{self.path}: {key} was {saved.get(key)!r} and is now {value!r}; "
                    "set it back, or start anew under another run.name"
                )

    def whole(self, name: str) -> Iterable[tuple[str, "Tensor"]]:
        """(parameter, 1-D fp32 tensor) of every parameter that has a tensor of this name."""
        for (parameter, tensor), pieces in self._pieces.items():
            if tensor == name:
                yield parameter, self.read(parameter, name, 0, pieces[-1][1])
