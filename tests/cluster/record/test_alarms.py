import json
import math
import os
import random
import subprocess

import pytest

from cluster.record import events, heartbeat
from cluster.record.alarms import (
    CALM,
    LEAST_HISTORY,
    WINDOW,
    DiskAlarm,
    LossAlarms,
    ProgressAlarm,
    StragglerAlarm,
)


def row(step, loss, *, skipped=0, **more):
    return {"step": step, "loss": loss, "gradient_norm": 1.0, "lr": 0.02, "skipped_steps": skipped, **more}


def falling(step, *, noise):
    """A loss as in pretraining: 11 at first, 3 after some thousand steps."""
    return 2.5 + 8.5 * math.exp(-step / 300) + 3 * (step + 10) ** -0.5 + noise.gauss(0, 0.05)


def told(directory):
    return [(event["kind"], event["step"]) for event in events.read(directory)]


def seen(directory, losses, **options):
    alarms = LossAlarms(directory, **{"deviations": 7.0, **options})
    for step, loss in enumerate(losses):
        alarms.see(row(step, loss))
    return alarms


def test_a_falling_loss_with_the_noise_of_batches_raises_nothing(tmp_path):
    noise = random.Random(1)
    seen(tmp_path, [falling(step, noise=noise) for step in range(5000)])
    assert told(tmp_path) == []


def test_a_spike_is_one_event_and_says_what_was_usual(tmp_path):
    noise = random.Random(1)
    losses = [falling(step, noise=noise) for step in range(1000)]
    losses[800:810] = [loss + 1 for loss in losses[800:810]]
    losses[805] = losses[700]  # for a moment it is back
    losses[900] += 1
    seen(tmp_path, losses)
    assert told(tmp_path) == [("loss_spike", 800), ("loss_spike", 900)]
    event = events.read(tmp_path)[0]
    assert event["level"] == "warning" and event["median"] < event["limit"] < event["loss"]
    assert "the gradient norm is 1.00, usually 1.00" in event["text"] and event["lr"] == 0.02


def test_a_spike_writes_large_numbers_as_people_do(tmp_path):
    alarms = LossAlarms(tmp_path, deviations=7)
    for step in range(LEAST_HISTORY + 1):
        last = step == LEAST_HISTORY
        loss, norm = (23456.0, 1.45e6) if last else (3.0, 1e-9)
        alarms.see({"step": step, "loss": loss, "gradient_norm": norm, "lr": 2.7})
    text = events.read(tmp_path)[0]["text"]
    assert text.startswith("the loss is 23,460; the median before is 3.000, the limit 3.100")
    assert text.endswith("the gradient norm is 1,450,000, usually 1.00·10⁻⁹; the learning rate is 2.70")


def test_there_is_no_alarm_at_the_start(tmp_path):
    losses = [3.0] * (LEAST_HISTORY - 1)
    seen(tmp_path, [*losses, 30.0])
    assert told(tmp_path) == []
    seen(tmp_path, [3.0, *losses, 30.0])
    assert told(tmp_path) == [("loss_spike", LEAST_HISTORY)]


def test_a_constant_loss_that_rises_a_little_is_no_spike(tmp_path):
    seen(tmp_path, [3.0] * 100 + [3.09])
    assert told(tmp_path) == []
    seen(tmp_path, [3.0] * 100 + [3.11])
    assert told(tmp_path) == [("loss_spike", 100)]


def test_a_loss_that_stays_high_becomes_the_usual_one(tmp_path):
    seen(tmp_path, [3.0] * 100 + [5.0] * (WINDOW + CALM) + [8.0])
    assert told(tmp_path) == [("loss_spike", 100), ("loss_spike", 100 + WINDOW + CALM)]


def test_spikes_can_be_turned_off_and_made_rarer(tmp_path):
    noise = random.Random(1)
    losses = [3 + noise.gauss(0, 0.05) for _ in range(100)] + [3.6]
    seen(tmp_path, losses, deviations=0.0)
    seen(tmp_path, losses, deviations=30.0)
    assert told(tmp_path) == []
    seen(tmp_path, losses)
    assert told(tmp_path) == [("loss_spike", 100)]


def test_a_loss_that_is_not_finite_is_one_event_until_it_is_finite_again(tmp_path):
    nan, inf = math.nan, math.inf
    seen(tmp_path, [3.0, nan, inf, nan, 3.0, nan])
    assert told(tmp_path) == [("loss_not_finite", 1), ("loss_not_finite", 5)]
    assert events.read(tmp_path)[0]["level"] == "error"
    assert events.read(tmp_path)[0]["text"] == "the loss is nan"


def test_a_validation_loss_counts_too_and_lines_without_a_loss_are_no_loss(tmp_path):
    alarms = LossAlarms(tmp_path, deviations=7.0)
    alarms.see({"step": 0, "tokens": 0, "validation_loss": 5.0})
    alarms.see({"step": 5, "tokens": 0, "validation_loss": math.inf})
    alarms.see({"step": 6, "tokens": 0})
    assert [event["text"] for event in events.read(tmp_path)] == ["the validation loss is inf"]


def test_steps_that_were_skipped_are_one_event_per_series(tmp_path):
    alarms = LossAlarms(tmp_path, deviations=7.0)
    for step, skipped in enumerate([0, 1, 2, 3, 3, 3, 5]):
        alarms.see(row(step, 3.0, skipped=skipped))
    assert told(tmp_path) == [("skipped_steps", 1), ("skipped_steps", 6)]
    assert "2 steps were skipped" in events.read(tmp_path)[1]["text"]


def test_a_resumed_run_goes_on_with_what_it_saw_and_tells_no_step_twice(tmp_path):
    losses = [3.0] * 60 + [9.0] + [3.0] * 60 + [9.0]
    rows = [row(step, loss, skipped=step // 50) for step, loss in enumerate(losses)]
    whole = LossAlarms(tmp_path, deviations=7.0)
    for each in rows:
        whole.see(each)
    before = told(tmp_path)
    assert before == [("skipped_steps", 50), ("loss_spike", 60), ("skipped_steps", 100), ("loss_spike", 121)]
    for step in (40, 61, 110):
        again = LossAlarms(tmp_path, deviations=7.0)
        again.replay(rows[:step])
        for each in rows[step:]:
            again.see(each)
    assert told(tmp_path) == before
    (tmp_path / events.FILE).unlink()
    again = LossAlarms(tmp_path, deviations=7.0)
    again.replay(rows[:110])
    again.see(row(110, 9.0, skipped=2))
    assert told(tmp_path) == [("loss_spike", 110)]  # at once, without another LEAST_HISTORY lines


def test_progress_is_a_new_line_or_a_checkpoint(tmp_path):
    metrics, checkpoints = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    alarm = ProgressAlarm(tmp_path, minutes=1, observer="the launcher")
    for change in (lambda: metrics.write_text("{}\n"), lambda: (checkpoints / "step-1").mkdir(parents=True)):
        alarm.check(seconds=50)
        change()
        alarm.check(seconds=50)
        assert told(tmp_path) == []
    alarm.check(seconds=50)
    alarm.check(seconds=50)
    alarm.check(seconds=500)
    assert told(tmp_path) == [("no_progress", None)]
    assert "for 1.7 minutes, seen from the launcher" in events.read(tmp_path)[0]["text"]
    metrics.write_text("{}\n{}\n")
    alarm.check(seconds=50)
    assert told(tmp_path) == [("no_progress", None), ("progress", None)]
    assert events.read(tmp_path)[1]["text"] == "the run moves again, after 10.0 minutes"


def test_of_two_observers_one_tells(tmp_path):
    observers = [ProgressAlarm(tmp_path, minutes=1, observer=f"rank {rank}") for rank in (0, 1)]
    for _ in range(2):
        for observer in observers:
            observer.check(seconds=100)
        (tmp_path / "metrics.jsonl").write_text("x" * len(events.read(tmp_path)))
        for observer in observers:
            observer.check(seconds=1)
    assert told(tmp_path) == [("no_progress", None), ("progress", None)] * 2


def test_no_minutes_no_alarm(tmp_path):
    alarm = ProgressAlarm(tmp_path, minutes=0, observer="the launcher")
    alarm.check(seconds=1e6)
    assert told(tmp_path) == []


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(file, megabytes):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, megabytes * 1_000_000)


def test_a_disk_that_is_nearly_full_is_one_event_until_there_is_space_again(disk):
    alarm = DiskAlarm(disk, gigabytes=0.02)
    alarm.check()
    assert told(disk) == []
    for _ in range(2):
        fill(disk / "other", 55)
        alarm.check()
        alarm.check()
        (disk / "other").unlink()
        alarm.check()
    assert told(disk) == [("disk_nearly_full", None)] * 2
    event = events.read(disk)[0]
    assert "less than 20 MB (record.disk_free_gb)" in event["text"] and event["free_bytes"] < 20_000_000


def test_space_for_two_checkpoints_must_be_free(disk):
    alarm = DiskAlarm(disk, gigabytes=0.0)
    fill(disk / "checkpoints/step-0000010/rank-0", 20)
    alarm.check()
    assert told(disk) == []  # it is not complete
    (disk / "checkpoints/step-0000010/COMPLETE").touch()
    alarm.check()
    assert told(disk) == []  # 47 MB are free
    fill(disk / "other", 10)
    alarm.check()
    assert told(disk) == [("disk_nearly_full", None)]
    assert "a checkpoint takes 20 MB" in events.read(disk)[0]["text"]


def test_a_rank_that_is_slow_for_a_minute_is_one_event_and_one_that_is_slow_for_a_moment_none(tmp_path):
    alarm = StragglerAlarm(tmp_path, fraction=0.25)

    def look(*forward_seconds):
        folder = tmp_path / heartbeat.FOLDER
        folder.mkdir(exist_ok=True)
        for rank, seconds in enumerate(forward_seconds):
            about = {"rank": rank, "world_size": 3, "start": "s", "host": "gpu", "process": 7, "step": 5}
            beat = {**about, "part": "data", "num_marks": 9, "quiet_seconds": 0.0, "forward_seconds": seconds}
            (folder / f"{rank:05d}.json").write_text(json.dumps(beat))
        alarm.check(seconds=StragglerAlarm.LOOK_SECONDS)
        return [(event["kind"], event["rank"]) for event in events.read(tmp_path)]

    for _ in range(StragglerAlarm.LOOKS - 1):
        assert look(1.0, 1.0, 2.0) == []
    assert look(1.0, 1.0, 1.1) == []
    for _ in range(StragglerAlarm.LOOKS + 2):
        told = look(1.0, 1.0, 2.0)
    assert told == [("straggler", 2)]
