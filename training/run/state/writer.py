"""Writes checkpoints while training goes on: a copy of the state aside, and a thread that writes it.

The order makes a half-written checkpoint impossible to mistake for a whole one: every rank writes, syncs and
hashes its shard; then rank 0 writes `state.json`, and `COMPLETE` last. The threads meet in the store of the
process group. A collective of theirs could meet one of the training's.
"""

import errno
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from cluster import files
from cluster.record import origins
from cluster.runs import COMPLETE
from training.run.checkpoint import FORMAT_VERSION, STATE, CheckpointError
from training.run.context import Context
from training.run.state import shard

T = TypeVar("T")
Shards = Iterable[tuple[str, int, Mapping[str, Tensor]]]  # as `ZeroOptimizer.shards` gives them
POSTED = "checkpoint"  # in the store, of each rank: its newest shard
POLL_SECONDS = 0.05
LEAVE_SECONDS = 30.0  # after an error of the training, for a write that has begun
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Writer:
    """Writes checkpoints of a run, at most one at a time. All ranks have one, and call it together."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._copies: dict[str, Tensor] = {}  # kept: fresh memory takes longer to touch than to fill
        self._write: _Write | None = None

    @property
    def failed(self) -> bool:
        """Whether the write in flight failed on this rank. `wait` raises what went wrong, on every rank."""
        return self._write is not None and self._write.problem is not None

    def moved(self) -> int | None:
        """Of the write in flight on this rank: a number that grows while it moves; None: nothing to do."""
        return self._write.moved if self._write is not None else None

    def begin(
        self,
        path: Path,
        *,
        shards: Shards,
        state: dict[str, Any],
        then: Callable[[], None] = lambda: None,
        copy: bool = True,
    ) -> None:
        """Begin to write the checkpoint `path`, once the one before is complete. Collective.

        Args:
            shards: this rank's part of the state.
            state: what `Checkpoint.state` gives back. What the run directory around `path` knows of commit
                and data is added (`cluster.record.origins`).
            then: called on rank 0, in the thread, once the checkpoint is complete.
            copy: the shards change before `wait` is called, so write a copy of them in host memory.

        Raises:
            CheckpointError: on every rank, if any rank could not write the one before.
        """
        self.wait()
        if self._context.is_main:
            shutil.rmtree(path, ignore_errors=True)  # of an earlier start
        tensors = {
            f"{parameter}|{name}|{start}": tensor.detach()
            for parameter, start, named in shards
            for name, tensor in named.items()
        }
        tensors = self._aside(tensors) if copy else {name: t.cpu() for name, t in tensors.items()}
        token = self._context.gather(uuid.uuid4().hex)[0]
        self._write = _Write(self._context, path, tensors=tensors, state=state, token=token, then=then)
        self._write.start()

    def _aside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = copy
            copy.copy_(tensor, non_blocking=True)
        self._context.synchronize()
        return {name: self._copies[name] for name in tensors}

    def wait(self) -> None:
        """Return once the checkpoint that was begun is complete. Collective.

        Raises:
            CheckpointError: on every rank, if any rank could not write; what was written is removed.
        """
        if self._write is None:
            return
        write, self._write = self._write, None
        write.shard_done.wait()
        problems, written = zip(*self._context.gather((write.problem, write.shard)), strict=True)
        if self._context.is_main:  # spares the thread its own search, and ends it if a rank failed
            write.all_shards = dict(written) if not any(problems) else {}
            write.join()
        problems = (*problems, *self._context.gather(write.problem))
        if any(problems):
            if not (write.path / COMPLETE).exists():
                shutil.rmtree(write.path, ignore_errors=True)
            raise CheckpointError(next(filter(None, problems)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error of the training the write in flight may end: its state is from before."""
        if self._write is not None and isinstance(error, Exception):
            self._write.gives_up_at = time.monotonic() + LEAVE_SECONDS
            self._write.join(LEAVE_SECONDS)


def save(path: Path, *, shards: Shards, state: dict[str, Any], context: Context) -> None:
    """Write one checkpoint and wait for it, as `Writer` does. Collective."""
    writer = Writer(context)
    writer.begin(path, shards=shards, state=state, copy=False)
    writer.wait()


class _Write(threading.Thread):
    """One checkpoint on its way to the disk, on one rank.

    Attributes:
        shard: file name, and what `state.json` says of it; once `shard_done` is set.
        problem: why this rank could not write; on rank 0 also why another could not.
        moved: bytes and files on the disk; None while there is nothing to do but to wait for other ranks.
        all_shards: of every rank, set from outside; empty: a rank failed.
        gives_up_at: by the monotonic clock; from then on rank 0 does not wait for the others.
    """

    def __init__(
        self,
        context: Context,
        path: Path,
        *,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        token: str,
        then: Callable[[], None],
    ) -> None:
        super().__init__(name=f"write-{path.name}", daemon=True)
        self.path = path
        self.shard: tuple[str, dict[str, Any]] | None = None
        self.problem: str | None = None
        self.moved: int | None = 0
        self.shard_done = threading.Event()
        self.all_shards: dict[str, dict[str, Any]] | None = None
        self.gives_up_at = math.inf
        self._context, self._tensors, self._state = context, tensors, state
        self._token, self._then = token, then

    def run(self) -> None:
        try:
            self._attempt(self._write_shard)
            written, self.moved = self.moved, None
            if not self._context.is_main:
                self._context.post(POSTED, [self._token, self.problem, self.shard])
            self.shard_done.set()
            if self._context.is_main and self.problem is None and (shards := self._shards_of_all()):
                self.moved = written
                self._attempt(lambda: self._write_marks(shards))
                if self.problem is None:
                    self._then()
        except Exception as error:  # of a lost store, or of `then`
            self.problem = f"{self.path}: {type(error).__name__}: {error}"
        finally:
            self.moved = None
            self.shard_done.set()

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            remedy = "free space there" if error.errno in NO_SPACE else "make it writable"
            self.problem = (
                f"{self.path}: cannot be written ({error.strerror or error}); {remedy}, then run the same "
                "command again"
            )
        except Exception as error:  # reaches the training, on every rank, in `Writer.wait`
            self.problem = f"{self.path}: {type(error).__name__}: {error}"

    def _write_shard(self) -> None:
        context = self._context
        file = self.path / f"rank-{context.rank:05d}-of-{context.world_size:05d}.safetensors"
        sha256 = shard.write(file, self._tensors, moved=self._count)
        self.shard = (file.name, {"bytes": file.stat().st_size, "sha256": sha256})

    def _count(self, num_bytes: int) -> None:
        self.moved = (self.moved or 0) + num_bytes

    def _shards_of_all(self) -> dict[str, dict[str, Any]]:
        """What every rank wrote. Empty if one could not (`problem`), or if this one gives up."""
        found = {0: self.shard}
        while self.all_shards is None and time.monotonic() < self.gives_up_at:
            for rank in set(range(self._context.world_size)) - set(found):
                token, problem, shard = self._context.posted(POSTED, rank) or (None, None, None)
                if token == self._token and problem:
                    self.problem = problem
                    return {}
                if token == self._token:
                    found[rank] = shard
            if len(found) == self._context.world_size:
                return dict(shard for _, shard in sorted(found.items()) if shard)
            time.sleep(POLL_SECONDS)
        return self.all_shards or {}

    def _write_marks(self, shards: dict[str, dict[str, Any]]) -> None:
        lineage = origins.of_writer(self.path.parent.parent)
        content = {"format": FORMAT_VERSION, **self._state, "files": shards, "lineage": lineage}
        files.write_json(self.path / STATE, content)
        files.write_text(self.path / COMPLETE, f"{files.sha256_of(self.path / STATE)}\n")
        files.fsync_folder(self.path.parent)
