"""Ranks that beat, hang and stand still, in processes of their own."""

import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.record import heartbeat
from cluster.record.heartbeat import Beat
from tests.commands import ROOT
from tests.waiting import wait_until

RANK = """
import sys, time
from pathlib import Path
from cluster.record.heartbeat import Heartbeat, read

folder, rank, world_size, hold = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def wait_for_the_others():
    while True:  # until this process is ended
        time.sleep(0.01)

def fail(text):
    with (folder / "said").open("a") as file:
        file.write(text + "\\n")

with Heartbeat(folder, rank=rank, world_size=world_size, start="s", hang_seconds=1.0, fail=fail) as heart:
    while len(read(folder)) < world_size:
        time.sleep(0.01)
    for step in range(1, 7):
        for part in ("data", "forward", "backward", "optimizer"):
            heart.mark(part, step)
            time.sleep(0.001)
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
    for said in (tmp_path / "said").read_text().splitlines():
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
    said = (tmp_path / "said").read_text().splitlines()
    assert any(f"process {both[1].pid})" in line for line in said)
    assert 'File "<string>", line ' in (tmp_path / "ranks/00001.stacks").read_text()


def test_who_is_named() -> None:
    def named(*beats: Beat) -> str:
        return heartbeat.describe_hang(Path("run"), list(beats), world_size=3).partition(";")[0]

    there = {"where": "loop.py:1 in take_step"}
    waiting = {"where": "distributed_c10d.py:9 in all_reduce", "waits": True}
    assert named(beat(0, **there), beat(2, **there)) == "rank 1 has never written a heartbeat"
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


def test_a_first_step_and_a_checkpoint_may_take_longer_than_a_step() -> None:
    heart = heartbeat.Heartbeat(Path("run"), hang_seconds=45.0)
    limits = {}
    for step in range(1, 6):
        heart.mark("forward", step)
        limits[step] = heart._limit
        heart.mark("row")
    heart.mark("checkpoint")
    limits["first checkpoint"] = heart._limit
    heart.mark("data", 6)
    heart.mark("checkpoint")
    limits["checkpoint"] = heart._limit
    assert {name: round(seconds, 0) for name, seconds in limits.items()} == {
        1: 1350, 2: 1350, 3: 1350, 4: 1350, 5: 45, "first checkpoint": 1350, "checkpoint": 450,
    }  # fmt: skip


def test_a_rank_that_waits_for_the_handle_of_a_collective_is_known() -> None:
    class Handle:
        def wait(self) -> tuple[str, bool]:
            return heartbeat._place(sys._getframe())

    where, waits = Handle().wait()
    assert where.startswith("test_heartbeat.py:") and where.endswith(" in wait") and waits
    assert not heartbeat._place(sys._getframe())[1]


def test_a_slow_rank_is_told_with_what_it_costs() -> None:
    beats = [beat(rank, forward_seconds=seconds) for rank, seconds in enumerate((1.0, 1.1, 1.5))]
    assert heartbeat.stragglers(beats, fraction=0.25) == {
        2: "rank 2 (gpu, process 102) is slow: its forward passes take 1.5 s of a step, 36% longer than the "
        "median; each step waits for it, about 1.2 s"
    }
    assert heartbeat.stragglers(beats, fraction=0.4) == heartbeat.stragglers(beats, fraction=0) == {}


def test_status_has_the_ranks_of_the_newest_start(tmp_path: Path) -> None:
    assert heartbeat.describe(tmp_path) == []
    for rank, start in ((0, "new"), (1, "new"), (2, "old")):
        heart = heartbeat.Heartbeat(tmp_path, rank=rank, world_size=2, start=start)
        with heart:
            wait_until(lambda heart=heart: heart._file.exists())
    old = tmp_path / "ranks/00002.json"
    os.utime(old, (1, 1))
    assert heartbeat.describe(tmp_path) == ["2 of 2 ranks have a heartbeat"]
    (tmp_path / "ranks/00000.json").write_text("{")  # being written by an older version
    long_ago = time.time() - 100
    os.utime(tmp_path / "ranks/00001.json", (long_ago, long_ago))
    [line] = heartbeat.describe(tmp_path)
    assert line.startswith("0 of 2 ranks have a heartbeat; rank 1 (") and "is silent since 100 s" in line
