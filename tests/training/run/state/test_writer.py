"""Checkpoints that are written while training goes on."""

import resource
import threading
from pathlib import Path

import pytest
import torch

from tests.ranks import spawn
from tests.training.run.test_checkpoint import OneRank
from tests.waiting import wait_until
from training.run import checkpoint
from training.run.checkpoint import Checkpoint, CheckpointError
from training.run.context import Context
from training.run.state import writer
from training.run.state.writer import Writer

NUMEL = 100_000


def shards(rank: int, value: float) -> list:
    return [("weight", rank * NUMEL, {"master": torch.full((NUMEL,), value)})]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The marks of every checkpoint are not written before this is set."""
    event, marks = threading.Event(), writer._Write._write_marks

    def wait(write: writer._Write, written: dict) -> None:
        event.wait()
        marks(write, written)

    monkeypatch.setattr(writer._Write, "_write_marks", wait)
    return event


def test_training_goes_on_meanwhile_and_what_is_written_is_the_state_at_the_call(tmp_path, held):
    path, then = tmp_path / "step-0000001", threading.Event()
    mine, state = shards(0, 1.0), {"step": 1}
    background = Writer(OneRank())
    background.begin(path, shards=mine, state=state, then=then.set)
    for *_, named in mine:
        named["master"].fill_(2.0)  # the next step of the training
    wait_until(lambda: list(path.glob("rank-*")))
    assert checkpoint.newest_complete(tmp_path, report=lambda _: None) is None and not then.is_set()
    held.set()
    background.wait()
    assert then.is_set()
    assert torch.equal(Checkpoint(path).read("weight", "master", 0, NUMEL), torch.ones(NUMEL))
    background.begin(tmp_path / "step-0000002", shards=mine, state={"step": 2})  # into the same copies
    background.wait()
    assert torch.equal(Checkpoint(path).read("weight", "master", 0, NUMEL), torch.ones(NUMEL))
    assert Checkpoint(tmp_path / "step-0000002").read("weight", "master", 0, 1) == 2


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, held):
    background = Writer(OneRank())
    background.begin(tmp_path / "step-0000001", shards=shards(0, 1.0), state={})
    second = threading.Thread(
        target=lambda: background.begin(tmp_path / "step-0000002", shards=shards(0, 2.0), state={})
    )
    second.start()
    wait_until(lambda: list(tmp_path.glob("*1/rank-*")))
    assert not (tmp_path / "step-0000002").exists()
    held.set()
    second.join()
    background.wait()
    assert len(checkpoint.complete_checkpoints(tmp_path)) == 2


def test_an_error_of_the_training_lets_the_write_in_flight_end_and_a_second_signal_does_not_wait(
    tmp_path, held
):
    def train(step: int, error: type[BaseException]) -> None:
        with Writer(OneRank()) as background:
            background.begin(checkpoint.step_directory(tmp_path, step), shards=shards(0, 1.0), state={})
            raise error

    with pytest.raises(KeyboardInterrupt):
        train(1, KeyboardInterrupt)
    assert checkpoint.complete_checkpoints(tmp_path) == []
    held.set()
    with pytest.raises(RuntimeError):
        train(2, RuntimeError)
    assert tmp_path / "step-0000002" in checkpoint.complete_checkpoints(tmp_path)


def test_a_write_that_fails_is_known_at_once_and_leaves_nothing(tmp_path):
    (tmp_path / "checkpoints").write_text("no folder")
    background = Writer(OneRank())
    background.begin(tmp_path / "checkpoints/step-0000001", shards=shards(0, 1.0), state={})
    wait_until(lambda: background.failed)
    with pytest.raises(CheckpointError, match=r"step-0000001: cannot be written \(Not a directory\)"):
        background.wait()
    background.wait()  # it has been said


def write_on(context: Context, root: Path) -> list[str]:
    """On two ranks: a checkpoint, one that rank 1 cannot write, and one after it. The problems."""
    problems, (_, most) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(context) as background:
        for step in (1, 2, 3):
            path = checkpoint.step_directory(root, step)
            if context.rank == 1:  # as a full disk does
                resource.setrlimit(resource.RLIMIT_FSIZE, (NUMEL if step == 2 else most, most))
            background.begin(path, shards=shards(context.rank, step), state={"step": step})
            if step == 2:
                wait_until(lambda: background.failed)  # on both, without a collective
            else:
                wait_until(lambda path=path: (path / checkpoint.COMPLETE).exists())
                assert len(list(path.glob("rank-*"))) == 2
            context.gather(step)  # a collective of the training
            try:
                background.wait()
            except CheckpointError as error:
                problems.append(str(error))
    return problems


def test_two_ranks_meet_without_a_collective_and_a_failure_of_one_is_that_of_both(tmp_path):
    said = spawn(write_on, tmp_path, world_size=2)
    assert said[0] == said[1] and len(said[0]) == 1
    assert "step-0000002: cannot be written (File too large); free space there" in said[0][0]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000001", "step-0000003"]
