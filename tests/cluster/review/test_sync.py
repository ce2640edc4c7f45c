"""`make sync` with W&B's real client, against the server of `wandb_server.py`."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from cluster.record import wandb_log
from cluster.review.sync.segments import Staged, find
from cluster.review.sync.uploads import Uploads
from tests.cluster.review.wandb_server import WandbServer
from tests.commands import ROOT
from tests.waiting import wait_until

pytestmark = pytest.mark.stack  # whole commands

RECORD = """
import os, signal, sys, time
from pathlib import Path
from cluster.record import wandb_log
from cluster.record.record import Record

def record(first, last, *, resume_step=None, mode="offline", directory=Path(sys.argv[1])):
    run = Record.open(directory, config={"lr": 0.02}, provenance={"commit": "c0ffee"}, wandb_mode=mode,
                      project="asuncion", group="unit", name="first-light", resume_step=resume_step)
    for step in range(first, last + 1):
        run.log({"step": step, "loss": 1 / step})
    return run

def wait_for_rows(number):
    deadline, seen = time.monotonic() + 300, 0
    while seen < number:
        assert time.monotonic() < deadline, f"{seen} rows"
        time.sleep(0.05)
        logs = Path(sys.argv[1]).glob("wandb/*run-*/*.wandb")
        seen = sum(record.HasField("history") for log in logs for record in wandb_log.read(log))
"""
KILLED = """
run = record(1, 60)
run.table("requests", ["ttft"], [[0.25], [None]])
for step in range(61, 111):
    run.log({"step": step, "loss": 1 / step})
wait_for_rows(110)
os.kill(os.getpid(), signal.SIGKILL)
"""
RESUMED = """
run = record(101, 130, resume_step=100)
run.finish({"best": 0.5})
"""


def start(code, *arguments, home, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**clean, "HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        cwd=home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_command(home, environment, **constants):
    """`make sync` in `home`, with other values of the constants of `uploads`."""
    patched = "; ".join(f"uploads.{name} = {value}" for name, value in constants.items())
    code = f"from cluster.review.sync import command, uploads; {patched}\nraise SystemExit(command.main())"
    return start(code, home=home, **environment)


def sync(home, server, **constants):
    process = start_command(home, server.environment, **constants)
    printed, problems = process.communicate()
    return process.returncode, printed, problems


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with first-light: an offline run, SIGKILL after step 110, a torn log."""
    home = tmp_path_factory.mktemp("trained")
    process = start(RECORD + KILLED, home / "outputs/first-light", home=home)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGKILL
    (segment,) = find(home / "outputs/first-light")
    with segment.log.open("ab") as file:
        file.write(b"\x01\x02\x03\x04\x40\x00\x01torn")
    for file in (home / "outputs/first-light").iterdir():
        os.utime(file, (1, 1))  # long ago: the run is not running any more
    (home / "outputs").rename(home / "pulled")  # as `make pull` brings it to another machine
    return home / "pulled"


@pytest.fixture
def home(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "outputs", symlinks=True)
    return tmp_path


def steps(server):
    (run,) = server.runs.values()
    return [row["step"] for row in run.rows if "train/loss" in row]


def tables(server):
    (run,) = server.runs.values()
    return [row["train/requests"]["path"] for row in run.rows if "train/requests" in row]


def test_a_lost_server_and_a_resumed_run_leave_each_step_once(home):
    run = home / "outputs/first-light"
    with WandbServer() as server:
        server.stop_after, server.lose_answers = 1, True
        code, _, problems = sync(home, server, LOST_SECONDS=1.0)
        assert code == 1 and "does not answer any more" in problems and "run `make sync` again" in problems
        assert not find(run)[0].sent
        there = len(server.runs[find(run)[0].id].rows)
        assert 0 < there <= 110

        server.start()
        code, printed, problems = sync(home, server)
        assert (code, problems) == (0, "") and f"{there} were there" in printed
        last = f"sent {110 - there} rows in 1 segment of 1 run to {server.url}"
        assert printed.splitlines()[-1] == last
        (sent,) = server.runs.values()
        assert steps(server) == list(range(1, 111)) and (sent.complete, sent.exit_code) == (True, 1)

        assert start(RECORD + RESUMED, run, home=home).communicate()[1] == ""
        code, printed, problems = sync(home, server)
        assert (code, problems) == (0, "") and "sent 20 rows in 1 segment of 1 run" in printed
        assert steps(server) == list(range(1, 131)) and sent.num_received == 130
        assert (sent.complete, sent.exit_code) == (True, 0)
        (table,) = tables(server)
        assert table in sent.uploaded
        assert [artifact.type for artifact in server.artifacts] == ["run_table"]
        assert sent.summary["train/loss"] == 1 / 130 and sent.summary["train/best"] == 0.5
        assert sent.config["lr"] == 0.02

        num_requests = len(server.requests)
        assert sync(home, server) == (0, "nothing to send: 1 run with W&B files, all in W&B already\n", "")
        assert len(server.requests) == num_requests
    assert sorted(path.name for path in (run / "wandb").glob(".sync*")) == [".sync.lock"]


def test_a_refused_upload_and_a_killed_command_lose_nothing(home):
    run = home / "outputs/first-light"
    with WandbServer() as server:
        server.refuse = lambda name: name.startswith("upload media")
        code, _, problems = sync(home, server)
        assert code == 1 and "first-light: file transfer: upload: failed to upload" in problems
        assert not find(run)[0].sent

        server.refuse = lambda name: False
        server.wait_seconds = lambda name: 600.0 if name.startswith("upload media") else 0.0
        num_requests = len(server.requests)
        command = start_command(home, server.environment)
        wait_until(lambda: any("file_stream" in name for name in server.requests[num_requests:]))
        command.kill()
        command.communicate()
        server.stop()  # and with it what wandb left to do

        server.wait_seconds = lambda name: 0.0
        server.start()
        unreadable = home / "outputs/broken/wandb/offline-run-20261127_000000-abcd1234/run-abcd1234.wandb"
        unreadable.mkdir(parents=True)  # as another user's file is, to whoever is not root
        code, _, problems = sync(home, server)
        assert code == 1 and f"broken: {unreadable}: Is a directory" in problems
        assert "in 1 segment of 1 run" in problems and "not sent whole: broken" in problems
        assert steps(server) == list(range(1, 111)) and len(tables(server)) == 1
        (sent,) = server.runs.values()
        assert sent.num_received == 110 and tables(server)[0] in sent.uploaded
    assert find(run)[0].sent


def test_a_run_that_goes_on_is_sent_as_far_as_it_is_and_not_marked(tmp_path):
    directory = tmp_path / "outputs/study/a-run"
    code = """
run = record(1, 5)
wait_for_rows(5)
print("logged", flush=True)
sys.stdin.read()
for step in range(6, 9):
    run.log({"step": step, "loss": 1 / step})
run.finish({})
"""
    with WandbServer() as server:
        training = start(RECORD + code, directory, home=tmp_path)
        assert training.stdout.readline() == "logged\n"
        code, printed, problems = sync(tmp_path, server)
        assert (code, problems) == (
            0,
            "",
        ) and "still running, so run `make sync` again later: study/a-run" in printed
        assert steps(server) == [1, 2, 3, 4, 5]
        (sent,) = server.runs.values()
        assert not sent.complete and not find(directory)[0].sent
        assert training.communicate()[1] == "" and training.returncode == 0
        with (directory / "wandb/.sync.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            code, _, problems = sync(tmp_path, server)
            assert code == 1 and "study/a-run: another `make sync` is sending it" in problems
        assert sync(tmp_path, server)[0] == 0
    assert steps(server) == list(range(1, 9)) and sent.num_received == 8
    assert (sent.complete, sent.exit_code, find(directory)[0].sent) == (True, 0, True)


def test_an_online_run_that_lost_its_server_is_completed(tmp_path):
    directory = tmp_path / "outputs/first-light"
    code = """
from cluster.record.wandb_mirror import Mirror
Mirror.INIT_SECONDS, Mirror.UPLOAD_SECONDS, Mirror.CLOSE_SECONDS = 300.0, 1.0, 1.0
run = record(1, 5, mode="online")
print("logged", flush=True)
sys.stdin.readline()
for step in range(6, 11):
    run.log({"step": step, "loss": 1 / step})
run.finish({})
wait_for_rows(10)
os.kill(os.getpid(), signal.SIGKILL)  # or wandb tries for longer
"""
    with WandbServer() as server:
        often = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds, not 15
        training = start(RECORD + code, directory, home=tmp_path, **server.environment, **often)
        assert training.stdout.readline() == "logged\n"
        wait_until(lambda: any(run.rows for run in server.runs.values()))
        server.stop()
        training.communicate("go on\n")
        there = steps(server)
        assert there == [1, 2, 3, 4, 5][: len(there)]
        server.start()
        (segment,) = find(directory)
        os.utime(segment.log)
        assert "left alone" in sync(tmp_path, server)[1]  # its own client may still be at it
        assert steps(server) == there
        os.utime(segment.log, (1, 1))
        code, _, problems = sync(tmp_path, server)
        assert (code, problems) == (0, "")
    assert steps(server) == list(range(1, 11)) and segment.sent


def test_without_a_key_or_a_server_nothing_is_touched(home):
    before = sorted((home / "outputs").rglob("*"))
    with WandbServer() as server:
        wrong = start_command(home, {**server.environment, "WANDB_API_KEY": "1" * 40})
        assert f"error: {server.url} refused the API key" in wrong.communicate()[1] and wrong.returncode == 2
    code, printed, problems = sync(home, server)
    assert code == 1 and printed == "" and "does not answer; nothing was sent" in problems
    process = start_command(home, {})
    assert process.communicate()[1].startswith("error: no API key for https://") and process.returncode == 2
    assert sorted((home / "outputs").rglob("*")) == before


def crafted(segment, folder, *, steps, seconds_later):
    """A later segment of the same run, with these rows and an end."""
    log = segment.run / "wandb" / folder / segment.log.name
    log.parent.mkdir()
    head = [record for record in wandb_log.read(segment.log) if record.HasField("run")]
    head[0].run.start_time.seconds += seconds_later
    rows = []
    for step in steps:
        rows.append(type(head[0])())
        for key, value in (("step", step), ("seconds", 0.5), ("train/loss", 1 / step)):
            rows[-1].history.item.add(nested_key=[key], value_json=str(value))
    end = type(head[0])()
    end.exit.exit_code = 0
    wandb_log.write(log, [*head, *rows, end, end])
    return log


def test_the_copy_of_a_segment_holds_what_is_not_there_and_what_no_later_start_repeats(home):
    run = home / "outputs/first-light"
    (first,) = find(run)
    crafted(first, "offline-run-20300101_000000-x", steps=range(101, 131), seconds_later=9)
    first, second = find(run)
    there = [{"step": step, "seconds": 1, "train/loss": 0, "_step": step} for step in range(1, 21)]
    staged = Staged.make(first, folder=home / "a/copy", there=there, later=[second], live=False)
    assert (staged.num_there, staged.num_rows, staged.num_superseded) == (20, 80, 10)
    records = list(wandb_log.read(staged.log))
    assert [row["step"] for row in map(wandb_log.row_of, records) if row] == list(range(21, 101))
    assert [record.artifact.type for record in records if record.HasField("artifact")] == ["run_table"]
    assert records[-1].exit.not_complete  # the second segment ends the run
    state = staged.log.with_name(f"{staged.log.name}.syncstate")
    assert json.loads(state.read_text())["starting_step"] == 21

    second.marker.touch()  # sent out of order: the summary of the run is the second's
    staged = Staged.make(first, folder=home / "b/copy", there=there, later=[second], live=False)
    assert not any(record.HasField("summary") for record in wandb_log.read(staged.log))
    alone = Staged.make(second, folder=home / "c/copy", there=None, later=[], live=False)
    ends = [record.exit for record in wandb_log.read(alone.log) if record.HasField("exit")]
    assert alone.num_rows == 30 and [end.not_complete for end in ends] == [False]


def test_an_upload_that_wandb_did_not_finish_is_a_problem_although_its_exit_code_is_0(home):
    (segment,) = find(home / "outputs/first-light")
    staged = Staged.make(segment, folder=home / "a/copy", there=[], later=[], live=False)
    uploads = Uploads("http://127.0.0.1:1", None, entity="")
    said = ["wandb: Syncing 1 run(s):", "wandb: ERROR No response."]  # and no marker, exit code 0: as seen
    staged.problem = uploads._problem(staged, errors={}, said=said)
    assert staged.problem == "wandb did not finish: No response."
    staged.settle()
    assert not segment.sent and not (home / "a").exists()


@pytest.mark.parametrize("cut", [0, 7])
def test_a_log_is_read_up_to_its_torn_end_as_wandb_reads_it(tmp_path, killed, cut):
    records = list(wandb_log.read(find(killed / "first-light")[0].log)) * 20
    copy = tmp_path / "run-1.wandb"
    wandb_log.write(copy, records)
    assert copy.stat().st_size > 10 * (1 << 15)  # blocks
    os.truncate(copy, copy.stat().st_size - cut)
    ours = list(wandb_log.read(copy))
    assert ours == records[: len(ours)] and len(ours) >= len(records) - 2
    assert (len(ours) == len(records)) == (cut == 0)
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", tmp_path]
    assert len(subprocess.run(inspect, capture_output=True, text=True).stdout.splitlines()) == len(ours)
