"""What is broken is never called done, and a run directory has one writer."""

import fcntl
import os
import platform
import signal
from pathlib import Path

import pytest

from cluster.record import events
from cluster.record.record import read_metrics
from tests.commands import python, started, tiny, write_corpus
from tests.waiting import wait_until
from training import config as training_config
from training.run.checkpoint import newest_sound
from training.run.watch import Skips, TrainingError

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a corpus."""
    folder = tmp_path_factory.mktemp("broken")
    write_corpus(folder)
    return folder


def test_a_run_whose_gradients_are_never_finite_fails_again_and_leaves_no_checkpoint(folder: Path) -> None:
    rates = {"optim__matrix__lr": 1e30, "optim__vector__lr": 1e30}
    keys = tiny(folder, run__name="nan", **rates, schedule__tokens=512 * 30, checkpoint__every_steps=2)
    run = folder / "outputs/nan"
    for _ in range(2):  # "run again", as it says
        done = python("training.launch", *keys)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert "not finite in 4 of 30 steps, more than optim.max_skipped_fraction=0.1 allows" in last
        assert "lower optim.matrix.lr" in last and "validation loss" not in done.stdout
        assert not (run / "summary.json").exists()
        assert newest_sound(run / "checkpoints", report=print) is None
        kinds = [event["kind"] for event in events.read(run)]
        assert "checkpoint_withheld" in kinds and kinds[-1] == "failed"


def test_a_second_writer_is_refused_with_the_name_of_the_first_and_changes_nothing(folder: Path) -> None:
    keys = tiny(folder, run__name="one", schedule__tokens=512 * 4000)
    run = folder / "outputs/one"
    with started("training.launch", *keys) as process:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) > 3)
        before = read_metrics(run / "metrics.jsonl")
        second = python("training.launch", *keys)
        assert second.returncode == 2
        assert f"{run} is being written by process {process.pid} on {platform.node()}" in second.stderr
        assert read_metrics(run / "metrics.jsonl")[: len(before)] == before
        os.killpg(process.pid, signal.SIGKILL)
    with (run / "launcher.lock").open("a") as lock:  # a dead owner's lock is free
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_skipped_steps_are_counted_across_resumes() -> None:
    config = training_config.load(dotlist=["optim.max_skipped_fraction=1"])
    skips = Skips(config, num_steps=100)
    for step in range(1, 11):
        skips.count(step, applied=min(step, 2))
    later = Skips(config, num_steps=100)
    later.resume({"step": 10, "applied_steps": 2, "consecutive_skips": skips.in_a_row})
    for step in range(11, 22):
        later.count(step, applied=2)
    with pytest.raises(TrainingError, match="step 22: the gradient was not finite in 20 steps in a row"):
        later.count(22, applied=2)
