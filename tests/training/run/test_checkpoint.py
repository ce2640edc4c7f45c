"""Checkpoints of a process that is killed while it writes them."""

import errno
import itertools
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import files
from tests.waiting import wait_until
from training.run import checkpoint
from training.run.checkpoint import Checkpoint
from training.run.context import Context
from training.run.state import writer

NUMEL = 1_000_000


class OneRank(Context):
    """A rank without others, and without a process group."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"), "none")

    def gather(self, value: Any) -> list[Any]:
        return [value]


def write_until_killed(root: Path, started: int, *, stop_in: int | None) -> None:
    """Checkpoints of the steps 1, 2, ...; each element holds the step. That of `stop_in` stays unfinished."""
    os.write(started, b"x")
    for step in itertools.count(1):
        if step == stop_in:
            writer._Write._write_marks = lambda *_: signal.pause()
        tensors = {"master": torch.full((NUMEL,), float(step))}
        path = checkpoint.step_directory(root, step)
        writer.save(path, shards=[("weight", 0, tensors)], state={"step": step}, context=OneRank())
        checkpoint.prune(root, keep=2)


def test_sigkill_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path):
    draw = random.Random(0)
    half_written = 0
    for attempt in range(12):
        root = tmp_path / str(attempt)
        root.mkdir()
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                write_until_killed(root, writing, stop_in=None if attempt else 3)
            finally:
                os._exit(1)
        os.read(reading, 1)
        begun = f"*/{checkpoint.COMPLETE}" if attempt else "step-*3/rank-*"
        wait_until(lambda root=root, begun=begun: list(root.glob(begun)))
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reading), os.close(writing)

        skipped: list[str] = []
        newest = checkpoint.newest_complete(root, report=skipped.append)
        assert newest is not None
        found = Checkpoint(newest)
        step = checkpoint.step_of(newest)
        assert found.state["step"] == step
        assert torch.equal(found.read("weight", "master", 0, NUMEL), torch.full((NUMEL,), float(step)))
        half_written += len(skipped)
        # The same step is written again over what was left.
        path = checkpoint.step_directory(root, step + 1)
        tensors = {"master": torch.full((NUMEL,), 0.5)}
        writer.save(path, shards=[("weight", 0, tensors)], state={"step": step + 1}, context=OneRank())
        assert checkpoint.newest_complete(root, report=skipped.append) == path
        assert Checkpoint(path).read("weight", "master", 0, 1) == 0.5
    assert half_written > 0  # some were killed while they wrote


def write(root: Path, *steps: int) -> None:
    for step in steps:
        path = checkpoint.step_directory(root, step)
        tensors = {"master": torch.full((4,), float(step))}
        writer.save(path, shards=[("weight", 0, tensors)], state={"step": step}, context=OneRank())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def flip_the_highest_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 128
    path.write_bytes(content)


def flip_a_bit_of_the_format(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"format": 2', '"format": 3'))
    assert path.read_text() != text


SHARD = "rank-00000-of-00001.safetensors"


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        *((flip_a_bit, file) for file in (SHARD, checkpoint.STATE, checkpoint.COMPLETE)),
        (flip_the_highest_bit, checkpoint.COMPLETE),
        (flip_a_bit_of_the_format, checkpoint.STATE),
        *((Path.unlink, file) for file in (SHARD, checkpoint.STATE)),
        *((lambda path: os.truncate(path, 20), file) for file in (SHARD, checkpoint.STATE)),
    ],
)
def test_of_a_damaged_checkpoint_the_file_is_named_and_the_one_before_is_used(damage, file, tmp_path):
    write(tmp_path, 1, 2, 3)
    damaged = checkpoint.step_directory(tmp_path, 3)
    damage(damaged / file)
    reports: list[str] = []
    newest = checkpoint.newest_sound(tmp_path, report=reports.append)
    assert newest == checkpoint.step_directory(tmp_path, 2)
    assert len(reports) == 1 and str(damaged) in reports[0] and f"going on with {newest}" in reports[0]
    # It counts no longer, so that the sound ones outlive it.
    write(tmp_path, 4)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{n}" for n in (2, 3, 4)]
    write(tmp_path, 3)
    assert checkpoint.newest_sound(tmp_path, report=reports.append) == tmp_path / "step-0000004"
    Checkpoint(damaged).verify()


def test_if_every_checkpoint_is_damaged_nothing_starts_again_from_the_beginning(tmp_path):
    write(tmp_path, 1, 2)
    for step in (1, 2):
        flip_a_bit(checkpoint.step_directory(tmp_path, step) / SHARD)
    for _ in range(2):  # the second time too
        with pytest.raises(checkpoint.DamagedError, match=r"step-0000002/rank.* SHA-256 .* delete "):
            checkpoint.newest_sound(tmp_path, report=print)


def test_a_run_whose_provenance_is_damaged_says_so_to_all_ranks_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match=r"step-0000001: .*provenance\.json: not valid JSON"):
        write(tmp_path / "checkpoints", 1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_shard_that_the_disk_cannot_read_is_damage_too(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)
    sha256_of = files.sha256_of

    def failing(path: Path) -> str:
        if path == tmp_path / "step-0000002" / SHARD:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return sha256_of(path)

    monkeypatch.setattr(files, "sha256_of", failing)
    reports: list[str] = []
    assert checkpoint.newest_sound(tmp_path, report=reports.append) == tmp_path / "step-0000001"
    assert f"step-0000002/{SHARD}: unreadable (Input/output error)" in reports[0]


def test_every_so_many_steps_one_is_kept_for_ever_and_a_damaged_one_takes_no_place(tmp_path):
    write(tmp_path, *range(1, 8))
    (tmp_path / "step-0000007" / checkpoint.DAMAGED).write_text("its mark was still to be removed")
    checkpoint.prune(tmp_path, keep=2, keep_every_steps=2)
    assert sorted(checkpoint.step_of(path) for path in tmp_path.iterdir()) == [2, 4, 5, 6, 7]
    (tmp_path / "step-0000006" / checkpoint.DAMAGED).write_text("")
    checkpoint.prune(tmp_path, keep=4)
    assert sorted(checkpoint.step_of(path) for path in tmp_path.iterdir()) == [2, 4, 5, 6, 7]
    checkpoint.prune(tmp_path, keep=3)
    checkpoint.prune(tmp_path, keep=1)
    assert sorted(checkpoint.step_of(path) for path in tmp_path.iterdir()) == [5, 6, 7]


def test_a_copy_that_a_user_made_is_no_checkpoint_and_is_not_deleted(tmp_path):
    write(tmp_path, 1, 2, 3)
    copy = tmp_path / "step-0000001.bak"
    shutil.copytree(tmp_path / "step-0000001", copy)
    (tmp_path / "step-0000000.half").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-0000000.half", "step-0000001.bak", "step-0000002", "step-0000003",
    ]  # fmt: skip
    assert checkpoint.newest_sound(tmp_path, report=print) == tmp_path / "step-0000003"
