"""Ranks that beat, hang and stand still, in processes of their own."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cluster.heart import hang
from cluster.record import events, heartbeat
from cluster.record.heartbeat import Beat
from tests.commands import ROOT
from tests.waiting import wait_until

RANK = """
import ctypes, os, sys, threading, time
from pathlib import Path
from cluster.heart.hang import Heartbeat
from cluster.record.heartbeat import read

folder, rank, world_size, hold = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def wait_for_the_others():
    while True:  # until this process is ended
        time.sleep(0.01)

with Heartbeat(folder, rank=rank, world_size=world_size, start="s", hang_seconds=1.0) as heart:
    while len(read(folder)) < world_size:
        time.sleep(0.01)
    for step in range(1, 7):
        for part in ("data", "forward", "backward", "optimizer"):
            heart.mark(part, step)
            time.sleep(0.001)
    if hold == "in native code":
        ctypes.PyDLL(None).read(os.pipe()[0], bytes(1), 1)  # which keeps the interpreter's lock
    if hold == "writing":
        heart.written = lambda: 7  # bytes, and no more of them
        threading.Thread(target=wait_for_the_others, name="write-step-0000007", daemon=True).start()
        while True:
            heart.mark("data", 7)
            time.sleep(0.01)
    if hold == "here":
        heart.mark("data", 7)
        wait_for_the_others()
    heart.mark("data", 7)
    heart.mark("forward", 7)
    wait_for_the_others()
"""


@contextmanager
def ranks(folder: Path, *holds: str):
    """Processes that take six steps; then some hang in the data of the seventh, and some wait for them."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, folder, str(rank), str(len(holds)), hold],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for rank, hold in enumerate(holds)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


def beat(rank: int, **more: object) -> Beat:
    about = {
        "world_size": 3,
        "start": "s",
        "host": "gpu",
        "process": 100 + rank,
        "step": 7,
        "part": "forward",
    }
    return Beat(**{"rank": rank, **about, "num_marks": 9, "quiet_seconds": 50.0, **more})  # type: ignore[arg-type]


def test_the_rank_that_the_others_wait_for_is_named_and_the_stacks_of_all_are_there(tmp_path: Path) -> None:
    with ranks(tmp_path, "", "here") as both:
        errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    for said in [event["text"] for event in events.read(tmp_path)]:
        assert f"rank 1 ({os.uname().nodename}, process {both[1].pid}) hangs: no progress for" in said
        assert "in the data of step 7 (<string>:" in said and "in wait_for_the_others)" in said
        assert f"the stacks of the ranks are in {tmp_path}/ranks" in said
        assert f"error: {said}\n" in errors
    for rank in (0, 1):
        stacks = tmp_path / f"ranks/0000{rank}.stacks"
        assert "in wait_for_the_others" in stacks.read_text()
        assert stat.S_IMODE(stacks.stat().st_mode) == 0o600


def test_a_rank_that_is_stopped_is_found_by_another_and_its_stack_is_there(tmp_path: Path) -> None:
    with ranks(tmp_path, "", "here") as both:
        wait_until(lambda: [each.rank for each in heartbeat.read(tmp_path)] == [0, 1])
        os.kill(both[1].pid, signal.SIGSTOP)
        for process in both:
            process.communicate()
    assert [process.returncode for process in both] == [1, 1]
    kinds = [event["kind"] for event in events.read(tmp_path) if f"process {both[1].pid})" in event["text"]]
    assert kinds == ["hung", "failed"]
    assert 'File "<string>", line ' in (tmp_path / "ranks/00001.stacks").read_text()


@pytest.mark.parametrize("how", ["stopped", "in native code"])
def test_a_single_rank_of_which_no_thread_runs_is_found_from_outside(tmp_path: Path, how: str) -> None:
    with ranks(tmp_path, how) as [process]:
        wait_until(lambda: (tmp_path / "ranks/00000.json").exists())
        if how == "stopped":
            os.kill(process.pid, signal.SIGSTOP)
        said = process.communicate()[1]
        wait_until(lambda: len(events.read(tmp_path)) == 2)  # the watcher may say so last
    assert process.returncode == (1 if how == "stopped" else -signal.SIGKILL)
    text = f"rank 0 ({os.uname().nodename}, process {process.pid}) stood still: no "
    for event, kind in zip(events.read(tmp_path), ("hung", "failed"), strict=True):
        assert event["kind"] == kind and event["text"].startswith(text)
        assert f"error: {event['text']}" in said
    stacks = tmp_path / "ranks/00000.stacks"
    assert 'File "<string>", line ' in stacks.read_text() and stat.S_IMODE(stacks.stat().st_mode) == 0o600


def test_a_checkpoint_that_no_longer_grows_ends_a_run_that_trains_on(tmp_path: Path) -> None:
    with ranks(tmp_path, "writing") as [process]:
        process.communicate()
    assert process.returncode == 1
    [text, _] = [event["text"] for event in events.read(tmp_path)]
    assert "hangs: its checkpoint has not grown for 1 s (<string>:" in text
    assert "in wait_for_the_others); look at the storage" in text


def test_the_watcher_ends_with_its_rank(tmp_path: Path) -> None:
    with ranks(tmp_path, "here") as [process]:
        wait_until(lambda: (tmp_path / "ranks/00000.json").exists())
        [watcher] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        wait_until(lambda: not is_alive(watcher))
    assert not (tmp_path / "events.jsonl").exists()


def is_alive(process: str) -> bool:
    """A zombie, which whoever inherits it has yet to collect, is not."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_who_is_named() -> None:
    def named(*beats: Beat) -> str:
        found = heartbeat.describe_hang(Path("run"), list(beats), world_size=3, hang_seconds=45.0)
        return found.partition(";")[0]

    there = {"where": "loop.py:1 in take_step"}
    waiting = {"where": "distributed_c10d.py:9 in all_reduce", "waits": True}
    assert named(beat(0, **there), beat(2, **there)) == "rank 1: no heartbeat in this start"
    assert named(beat(0, **there), beat(1, written=100.0), beat(2, **there, written=160.0)) == (
        "rank 1 (gpu, process 101) stands still: no heartbeat for 60 s, the last in the forward of step 7"
    )
    assert named(beat(0, **there), beat(1, **there, num_marks=8, part="data"), beat(2, **there)) == (
        "rank 1 (gpu, process 101) hangs: no progress for 50 s in the data of step 7 (loop.py:1 in take_step)"
    )
    assert named(beat(0, **waiting), beat(1, **there), beat(2, **waiting)).startswith("rank 1 (gpu")
    assert named(beat(0, **waiting), beat(1, **waiting), beat(2, **waiting)).startswith(
        "each of the ranks 0, 1, 2 hangs"
    )
    assert named(beat(0, **there), beat(1, **there, stopped_seconds=47.0), beat(2, **there)) == (
        "rank 1 (gpu, process 101) stood still: no thread of it ran for 47 s, in the forward of step 7"
    )


def test_what_is_progress() -> None:
    """Of a part of known length only its end is; computing and reading are elsewhere; what grows, always."""
    heart = hang.Heartbeat(Path("run"), hang_seconds=45.0)
    heart._worked.since = lambda seconds: computes  # type: ignore[method-assign]
    heart._before, quiet = 1000.0, {}  # seconds of which sums are exact
    now = heart._before

    def after(seconds: int, name: str) -> None:
        nonlocal now
        for _ in range(seconds):
            now += 1.0
            heart._look(now)
        quiet[name] = heart._quiet

    heart.mark("start")
    computes = False
    after(11, "a start that waits")  # the first look only notices the new part
    computes = True
    after(1339, "one that computes")
    after(10, "one that computes for longer than a compiler does")
    for step in range(1, 5):
        heart.mark("forward", step)
        after(11, f"computing in step {step}")
        heart.mark("row")
    heart.mark("checkpoint")
    computes = False
    heart.written = lambda: int(now)
    after(11, "a checkpoint that grows")
    heart.written = lambda: None
    after(10, "and one that waits")
    assert {name: round(seconds) for name, seconds in quiet.items()} == {
        "a start that waits": 10, "one that computes": 0,
        "one that computes for longer than a compiler does": 10,
        "computing in step 1": 0, "computing in step 2": 0, "computing in step 3": 0,
        "computing in step 4": 10, "a checkpoint that grows": 0, "and one that waits": 9,
    }  # fmt: skip


def test_a_rank_that_waits_for_one_that_makes_progress_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    first, second = (
        hang.Heartbeat(tmp_path, rank=rank, world_size=2, start="s", hang_seconds=45.0) for rank in (0, 1)
    )
    first._quiet = first._there = 49.0
    assert not first._hangs()  # the other one has no heartbeat yet
    first._quiet = first._there = 51.0
    assert first._hangs()
    hang._write(second._file, second._beat())
    assert not first._hangs()
    second._quiet = 40.0
    hang._write(second._file, second._beat())
    assert first._hangs()
    first._quiet, first._write_quiet, second._write_quiet = 0.0, 50.0, 0.0
    hang._write(second._file, second._beat())
    assert not first._hangs()  # the checkpoint waits for the other one's part, which grows


def test_a_rank_that_is_being_ended_goes_no_further(tmp_path: Path, monkeypatch) -> None:
    """It was stopped, say, and runs again: else a short run would end well on the others."""
    (tmp_path / "ranks").mkdir()
    monkeypatch.setattr(hang, "GRACE_SECONDS", 0.3)
    ended: list[int] = []
    monkeypatch.setattr(hang.os, "_exit", lambda code: ended.append(heart._num_marks))
    heart = hang.Heartbeat(tmp_path, world_size=2, start="s", hang_seconds=45.0)
    thread = threading.Thread(target=heart._end)
    thread.start()
    wait_until(lambda: (tmp_path / "ranks/00000.stacks").exists())
    heart.mark("data", 1)
    thread.join()
    assert ended == [0]


def test_a_child_that_computes_is_work(tmp_path: Path) -> None:
    work = hang._Work()
    work.since(1.0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        wait_until(lambda: work.since(1.0))
        child.kill()


def test_a_rank_that_waits_for_the_handle_of_a_collective_is_known() -> None:
    class Handle:
        def wait(self) -> tuple[str, bool]:
            return hang._place(sys._getframe())

    where, waits = Handle().wait()
    assert where.startswith("test_heartbeat.py:") and where.endswith(" in wait") and waits
    assert not hang._place(sys._getframe())[1]
    handle = type("Native", (), {"wait": staticmethod(hang._place)})  # no frame of its own, as in C++
    assert handle.wait(sys._getframe())[1]


def test_a_slow_rank_is_told_with_what_it_costs() -> None:
    beats = [beat(rank, forward_seconds=seconds) for rank, seconds in enumerate((1.0, 1.1, 1.5))]
    assert heartbeat.stragglers(beats, fraction=0.25) == {
        2: "rank 2 (gpu, process 102) is slow: its forward passes take 1.5 s of a step, 36% longer than the "
        "median; each step waits for it, about 1.2 s"
    }
    assert heartbeat.stragglers(beats, fraction=0.4) == heartbeat.stragglers(beats, fraction=0) == {}
    costs = [heartbeat.straggler_seconds(beats, fraction=fraction) for fraction in (0.25, 0.4, 0)]
    assert costs == [pytest.approx(1.2), 0, 0] and heartbeat.straggler_seconds([], fraction=0.25) == 0


@pytest.mark.parametrize(
    ("gpus", "may"),
    [("", True), ("0,3", True), ("0,1", False), ("GPU-33", True), ("GPU-4,3", True), ("13", False)],
)
def test_a_rank_may_use_the_gpus_that_it_was_given_or_any(gpus: str, may: bool) -> None:
    assert beat(0, gpus=gpus).may_use("gpu", 3, "GPU-33f") is may
    assert not beat(0, gpus=gpus).may_use("other", 3, "GPU-33f")


def test_status_has_the_ranks_of_the_newest_start(tmp_path: Path) -> None:
    assert heartbeat.describe(tmp_path) == []
    for rank, start in ((0, "new"), (1, "new"), (2, "old")):
        heart = hang.Heartbeat(tmp_path, rank=rank, world_size=2, start=start)
        with heart:
            wait_until(lambda heart=heart: heart._file.exists())
    old = tmp_path / "ranks/00002.json"
    os.utime(old, (1, 1))
    assert heartbeat.describe(tmp_path) == ["2 of 2 ranks have a heartbeat"]
    (tmp_path / "ranks/00000.json").write_text("{")  # being written by an older version
    long_ago = time.time() - 100
    os.utime(tmp_path / "ranks/00001.json", (long_ago, long_ago))
    [line] = heartbeat.describe(tmp_path)
    assert line.startswith("0 of 2 ranks have a heartbeat; rank 1 (") and "has been silent for 100 s" in line
