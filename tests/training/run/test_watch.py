"""Events and alarms of real runs, each by its real cause."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from cluster.record import events
from cluster.record.record import read_metrics
from tests.commands import python, started, tiny, write_corpus
from tests.waiting import wait_until
from training import config as training_config
from training.run.watch import RunWatch, explained

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_corpus(folder)
    return folder


def told(run: Path) -> list[tuple[str, int | None]]:
    return [(event["kind"], event["step"]) for event in events.read(run)]


def ranks_of(torchrun: int) -> dict[int, int]:
    """Rank -> process id, of the ranks that a torchrun has started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            environment = entry.joinpath("environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is not ours
            continue
        ranks = [each.removeprefix(b"RANK=") for each in environment if each.startswith(b"RANK=")]
        if parent == torchrun and ranks:
            found[int(ranks[0])] = int(entry.name)
    return found


def test_a_storage_that_fails_for_a_moment_does_not_end_the_watch(tmp_path: Path) -> None:
    config = training_config.load(dotlist=[f"run.directory={tmp_path}", "run.name=night"])
    config.run_directory.mkdir()
    shown: list[str] = []
    watch = RunWatch(config, observer="the launcher", note=shown.append)
    file = config.run_directory / events.FILE
    file.mkdir()  # it cannot be read now
    watch._look(seconds=1.0)
    file.rmdir()
    events.append(config.run_directory, "node_lost", "node 10.0.0.2 is lost")
    watch._look(seconds=1.0)
    assert any("node 10.0.0.2 is lost" in line for line in shown)


def test_what_torch_cannot_allocate_is_said_with_the_part_and_what_to_change() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    said = str(explained(refused.value, who="rank 3: ", where="the backward of step 7"))
    assert said.startswith("rank 3: out of memory in the backward of step 7 (RuntimeError: ")
    assert "lower batch.micro_sequences" in said and said.endswith("from the newest checkpoint")
    assert explained(RuntimeError("shapes differ"), who="rank 3: ", where="") is None


def test_a_run_that_diverges_tells_each_stage_of_it_once(folder: Path) -> None:
    """The rate rises far above what training bears: the loss climbs, then no gradient is finite."""
    keys = {"precision": "fp32", "batch__tokens": 64, "schedule__tokens": 64 * 200}
    never = {
        "checkpoint__every_steps": 1000,
        "evaluation__every_steps": 1000,
        "optim__max_skipped_fraction": 1,
    }
    rates = {"optim__vector__lr": 30, "optim__matrix__lr": 50}
    rising = {"schedule__warmup_fraction": 0.54, "schedule__decay_fraction": 0.0}
    done = python("training.launch", *tiny(folder, run__name="diverges", **keys, **never, **rates, **rising))
    assert done.returncode == 1
    run = folder / "outputs/diverges"
    assert told(run)[:2] == [("started", 0), ("workers", 0)]
    kinds = [kind for kind, _ in told(run)]
    assert {"loss_spike", "skipped_steps"} <= set(kinds) and kinds.count("failed") == 1
    # Once a stage, not once a row; how many stages there are depends on the CPU's rounding, and so does
    # whether the loss stays finite (on Zen 5) when the gradients do not.
    rows = read_metrics(run / "metrics.jsonl")
    not_finite = sum(not math.isfinite(row.get("loss", 0.0)) for row in rows)
    assert (not_finite > 0) == ("loss_not_finite" in kinds)
    assert kinds.count("loss_not_finite") < max(not_finite, 1)
    spike = next(event for event in events.read(run) if event["kind"] == "loss_spike")
    assert spike["step"] > 20 and spike["loss"] > spike["limit"] > spike["median"]
    assert f"warning: step {spike['step']}: the loss is " in done.stderr  # and the launcher shows it
    failed = events.read(run)[-1]
    assert (failed["kind"], failed["level"]) == ("failed", "error")
    assert "rank 0: step" in failed["text"] and "not finite in 20 steps in a row" in failed["text"]
    assert "failed" not in done.stderr and "not finite in 20 steps" in done.stderr  # once, as the error


def test_a_rank_that_stands_still_is_seen_by_another(folder: Path) -> None:
    keys = {
        "workers__count": 2,
        "schedule__tokens": 512 * 100_000,
        "record__stalled_minutes": 0.1,
        "workers__hang_seconds": 0,
    }
    run = folder / "outputs/stands-still"
    with started("training.launch", *tiny(folder, run__name=run.name, **keys), ranks=2) as process:

        def newest(kind: str, since: int) -> dict | None:
            assert process.poll() is None, process.communicate()
            return next((event for event in events.read(run)[since:] if event["kind"] == kind), None)

        def stop(rank: int) -> str:
            """What is said of a rank that stands still, until it goes on."""
            since = len(told(run))
            os.kill(ranks[rank], signal.SIGSTOP)
            alarm = wait_until(lambda: newest("no_progress", since), told=lambda: told(run))
            os.kill(ranks[rank], signal.SIGCONT)
            wait_until(lambda: newest("progress", since), told=lambda: told(run))
            assert alarm["level"] == "error"
            return alarm["text"]

        wait_until(lambda: newest("checkpoint", 0), told=lambda: told(run))
        ranks = ranks_of(process.pid)
        for rank in (0, 1):
            others = f"minutes, seen from rank {1 - rank};"
            # on a busy machine a rank may have to wait so long, and be told of, before it is stopped
            assert any(others in stop(rank) for _ in range(3)), events.read(run)
