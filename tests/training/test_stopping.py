"""A run that is asked to stop: a checkpoint, a clean exit, and the same command resumes it."""

import signal
from pathlib import Path

import pytest

from cluster.record import events
from cluster.record.record import read_metrics
from tests.commands import python, started, tiny, write_corpus
from tests.waiting import wait_until
from training.run.checkpoint import newest_sound, step_of

pytestmark = pytest.mark.stack
NUM_STEPS = 60


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row}


def is_logging(metrics: Path) -> bool:
    return metrics.exists() and bool(read_metrics(metrics))


def keys(folder: Path, name: str, **more: object) -> list[str]:
    """Of a run that writes no checkpoint before its last step, unless it is stopped."""
    never = 2 * NUM_STEPS
    steps = {
        "schedule__tokens": 512 * NUM_STEPS,
        "checkpoint__every_steps": never,
        "evaluation__every_steps": never,
    }
    return tiny(folder, run__name=name, **steps, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a corpus, and a run `whole` that nobody stopped."""
    folder = tmp_path_factory.mktemp("stopping")
    write_corpus(folder)
    done = python("training.launch", *keys(folder, "whole"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("number", "launcher", "code"),
    [(signal.SIGTERM, {}, 143), (signal.SIGINT, {"launcher": "ray"}, 130)],
    ids=["SIGTERM alone", "Ctrl-C under Ray"],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_loses_no_step(
    folder: Path, number: signal.Signals, launcher: dict[str, object], code: int
) -> None:
    for attempt in range(5):  # this process may stand still until the run is over
        name = f"{number.name}-{attempt}"
        run = folder / "outputs" / name
        with started("training.launch", *keys(folder, name, **launcher)) as process:
            metrics = run / "metrics.jsonl"
            wait_until(lambda p=process, m=metrics: p.poll() is not None or is_logging(m))
            process.send_signal(number)
            _, error = process.communicate(timeout=240)
        if process.returncode != 0:
            break
    assert process.returncode == code, error
    assert error.strip().splitlines()[-1].startswith(f"stopped: {run}; the same command resumes it")
    assert "Traceback" not in error
    newest = newest_sound(run / "checkpoints", report=print)
    assert newest is not None and step_of(newest) == max(losses(run)) < NUM_STEPS
    last = events.read(run)[-1]
    assert (last["kind"], last["step"]) == ("stopped", step_of(newest))
    resumed = python("training.launch", *keys(folder, name))
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming {run} from step {step_of(newest)}" in resumed.stderr
    assert losses(run) == losses(folder / "outputs/whole")
