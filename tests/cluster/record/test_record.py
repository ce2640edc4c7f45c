import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.record import record
from cluster.record.record import Record, follow, read_metrics
from cluster.record.wandb_keys import wandb_row
from tests.commands import ROOT
from tests.waiting import PATIENCE_SECONDS, wait_until


def open_record(directory, *, resume_step=None, wandb_mode="disabled"):
    return Record.open(
        directory,
        config={"optim": {"lr": 0.02}},
        provenance={"commit": f"after {resume_step}"},
        wandb_mode=wandb_mode,
        project="asuncion",
        group="unit",
        name="first-light",
        resume_step=resume_step,
    )


def steps(directory):
    return [row["step"] for row in read_metrics(directory / "metrics.jsonl")]


def log_steps(directory, first, last, **how):
    with open_record(directory, **how) as run:
        for step in range(first, last + 1):
            run.log({"step": step, "loss": 1 / step})


def in_subprocess(code, *arguments, home, **environment):
    """Run `code` with our helpers in scope, in a process that has its own W&B state and no login."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    ours = "import sys, time; sys.path.insert(0, 'tests/cluster/record'); from test_record import *"
    program = f"{ours}\nrecord.Mirror.CLOSE_SECONDS = PATIENCE_SECONDS\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env={**clean, "HOME": str(home), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wandb_records(directory):
    """The records of the newest start of the W&B run in a run directory, by W&B's own reader."""
    *_, newest = sorted((directory / "wandb").glob("*run-*-*"))
    wandb = Path(sys.executable).with_name("wandb")
    answer = subprocess.run(
        [wandb, "leet", "inspect", "--json", newest], capture_output=True, text=True, check=True
    ).stdout
    return [json.loads(line) for line in answer.splitlines()]


def test_rows_are_strict_json_and_come_back_with_their_non_finite_values(tmp_path):
    row = {"step": 1, "loss": math.nan, "up": math.inf, "down": -math.inf, "mfu": None, "skipped": False}
    with open_record(tmp_path) as run:
        run.log(row)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line and line.count("\n") == 1
    on_disk = json.loads(line)
    assert [on_disk[name] for name in ("loss", "up", "down")] == [None, None, None]
    assert [on_disk[f"{name}_nonfinite"] for name in ("loss", "up", "down")] == ["nan", "inf", "-inf"]
    (back,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(back.pop("loss")) and row.pop("loss") is not None
    assert back.pop("seconds") >= 0
    assert back == row


@pytest.mark.parametrize(
    "row", [{"loss": 1.0}, {"step": 1.0}, {"step": True}, {"step": 1, "x_nonfinite": "nan"}]
)
def test_a_row_that_could_not_be_read_back_is_refused(tmp_path, row):
    with open_record(tmp_path) as run, pytest.raises(ValueError, match=r"int 'step'|reserved"):
        run.log(row)
    assert steps(tmp_path) == []


def test_resuming_drops_the_torn_line_and_the_rows_after_the_checkpoint(tmp_path):
    log_steps(tmp_path, 1, 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert steps(tmp_path) == list(range(1, 11))
    log_steps(tmp_path, 7, 9, resume_step=6)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (first["step"], first["loss"]) == (1, 1.0)


def test_a_fresh_start_replaces_what_an_earlier_run_left(tmp_path):
    with open_record(tmp_path) as run:
        run.log({"step": 1})
        run.finish({})
    run_id = (tmp_path / "wandb_run_id").read_text()
    log_steps(tmp_path, 1, 2)
    assert steps(tmp_path) == [1, 2]
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "wandb_run_id").read_text() != run_id


def test_resuming_keeps_the_wandb_id_and_the_provenance_of_earlier_starts(tmp_path):
    log_steps(tmp_path, 1, 4)
    run_id = (tmp_path / "wandb_run_id").read_text()
    log_steps(tmp_path, 3, 4, resume_step=2)
    log_steps(tmp_path, 5, 6, resume_step=4)
    assert (tmp_path / "wandb_run_id").read_text() == run_id
    starts = [{"commit": f"after {step}", "job_type": "train"} for step in (None, 2, 4)]
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance == {**starts[2], "earlier_starts": starts[:2]}


@pytest.mark.parametrize("damage", [b"\x00\x00", b"[1]", b'{"step": 2'])
def test_a_damaged_line_inside_the_file_is_an_error_that_names_file_and_line(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        list(follow(path, stop=lambda: True))


def test_the_summary_says_what_became_of_the_mirror(tmp_path):
    with open_record(tmp_path) as run:
        run.finish({"loss": math.nan, "tokens": 5, "validation": {"loss": math.inf}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "loss": None,
        "loss_nonfinite": "nan",
        "tokens": 5,
        "validation": {"loss": None, "loss_nonfinite": "inf"},
        "wandb_status": "disabled: as configured",
        "wandb_run_id": (tmp_path / "wandb_run_id").read_text().strip(),
    }


def test_every_row_acknowledged_before_a_sigkill_is_in_the_file(tmp_path):
    code = """
with open_record(Path(sys.argv[1])) as run:
    for step in itertools.count(1):
        run.log({"step": step, "loss": 1 / step})
        print(step, flush=True)
"""
    writer = in_subprocess(code, tmp_path, home=tmp_path)
    acknowledged = [int(writer.stdout.readline()) for _ in range(60)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().split()]
    assert writer.wait() == -signal.SIGKILL
    assert steps(tmp_path)[: len(acknowledged)] == acknowledged


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_no_part_of_the_row(tmp_path):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with open_record(Path(sys.argv[1])) as run:
    try:
        for step in range(1, 1000):
            run.log({"step": step, "loss": 1 / step})
    except OSError as error:
        print(step, error.filename, error.strerror, sep="|")
"""
    writer = in_subprocess(code, tmp_path, home=tmp_path)
    answer, problems = writer.communicate()
    assert problems == ""
    failed_step, file, reason = answer.strip().split("|")
    assert file == str(tmp_path / "metrics.jsonl") and "free some" in reason
    assert steps(tmp_path) == list(range(1, int(failed_step)))
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_durability_costs_an_fsync_a_second_and_not_one_a_row(tmp_path, monkeypatch):
    now, synced = [0.0], []
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    with open_record(tmp_path) as run:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(now[0]))
        for step in range(1, 41):
            now[0] = step / 8
            run.log({"step": step})
    assert synced == [1.0, 2.0, 3.0, 4.0, 5.0, 5.0]  # the last one by close()


def test_follow_waits_for_the_file_tails_it_and_starts_again_when_a_resume_replaces_it(tmp_path):
    seen, done, polls = [], threading.Event(), itertools.count()
    polled = [0]

    def wait_for(count):
        wait_until(lambda: len(seen) >= count, told=seen)

    def stop():
        polled[0] = next(polls)
        return done.is_set()

    def read():
        rows = follow(tmp_path / "metrics.jsonl", stop=stop, poll_seconds=0.005)
        for row in rows:
            seen.append(row["step"])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    log_steps(tmp_path, 1, 3)
    wait_for(3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    before = polled[0]
    wait_until(lambda: polled[0] > before + 2)  # it has looked again
    assert seen == [1, 2, 3]
    with open_record(tmp_path, resume_step=2) as run:
        wait_for(5)
        run.log({"step": 3})
        wait_for(6)
        done.set()
    reader.join(PATIENCE_SECONDS)
    assert seen == [1, 2, 3, 1, 2, 3]


def test_wandb_offline_holds_the_same_rows_config_and_summary(tmp_path):
    code = """
with open_record(Path(sys.argv[1]), wandb_mode="auto") as run:
    for step in range(10, 110, 10):
        run.log({"step": step, "loss": 1 / step, "mfu": None})
    run.finish({"best_loss": 0.25})
"""
    writer = in_subprocess(code, tmp_path, home=tmp_path)
    printed, problems = writer.communicate()
    assert (printed, problems, writer.returncode) == ("", "", 0)
    records = wandb_records(tmp_path)
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    ours = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert ours == [wandb_row(row, job_type="train") for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert set(ours[0]) == {"step", "seconds", "train/loss", "throughput/mfu"}
    (run,) = (r["run"] for r in records if r["type"] == "run")
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert (run["run_id"], run["display_name"], run["project"]) == (run_id, "first-light", "asuncion")
    assert run["config"]["update"]["optim"] == {"lr": 0.02}
    assert run["config"]["update"]["provenance"]["commit"] == "after None"
    assert {"glob_name": "*", "step_metric": "step"}.items() <= next(
        r["metric"] for r in records if r["type"] == "metric" and "glob_name" in r["metric"]
    ).items()
    assert '"train/best_loss"' in json.dumps([r for r in records if r["type"] == "summary"])
    status = json.loads((tmp_path / "summary.json").read_text())["wandb_status"]
    assert status == f"offline: make sync RUN={tmp_path}"


def test_a_table_is_shown_in_wandb_and_is_no_row_of_the_metrics(tmp_path):
    with open_record(tmp_path, wandb_mode="offline") as record:
        record.table("requests", ["load", "ttft"], [["1 in flight", 0.25], ["1 in flight", None]])
        record.log({"step": 1})
        record.finish({})
    [table] = (tmp_path / "wandb").glob("offline-run-*/files/media/table/train/requests*.json")
    assert json.loads(table.read_text())["data"] == [["1 in flight", 0.25], ["1 in flight", None]]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_file_is_copied_into_the_wandb_run(tmp_path):
    file = tmp_path / "result.json"
    file.write_text('{"a": 1}')
    for mode in ("offline", "disabled"):
        with open_record(tmp_path / mode, wandb_mode=mode) as record:
            record.file(file)
            record.finish({})
    [copy] = (tmp_path / "offline/wandb").glob("offline-run-*/files/result.json")
    assert not copy.is_symlink() and copy.read_text() == '{"a": 1}'
    saved = [r["files"]["files"] for r in wandb_records(tmp_path / "offline") if r["type"] == "files"]
    assert [each["path"] for files in saved for each in files].count("result.json") == 1
    assert not (tmp_path / "disabled/wandb").exists()


SILENT = """
answers, init = threading.Event(), record.Mirror._init
record.Mirror._init = lambda *given: answers.wait() and init(*given)
run = open_record(Path(sys.argv[1]), wandb_mode="online")
for step in range(1, 101):
    run.log({"step": step, "loss": 1 / step})
"""


def test_a_wandb_that_never_answers_holds_up_neither_rows_nor_the_end(tmp_path):
    code = f"{SILENT}record.Mirror.CLOSE_SECONDS = 0.1\nrun.finish({{}})\nrun.close()"
    writer = in_subprocess(code, tmp_path, home=tmp_path, WANDB_API_KEY="0123456789" * 4)
    assert writer.communicate(timeout=PATIENCE_SECONDS) == ("", "") and writer.returncode == 0
    assert steps(tmp_path) == list(range(1, 101))
    status = json.loads((tmp_path / "summary.json").read_text())["wandb_status"]
    assert "W&B had not finished 0.1 s after the run" in status


def test_an_unreachable_wandb_server_neither_blocks_nor_kills_the_run(tmp_path):
    code = f"record.Mirror.INIT_SECONDS = 3.0\n{SILENT}answers.set()\nrun.finish({{}})\nrun.close()"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        key = "0123456789" * 4
        writer = in_subprocess(code, tmp_path, home=tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY=key)
        assert writer.communicate(timeout=2 * PATIENCE_SECONDS) == ("", "") and writer.returncode == 0
    assert steps(tmp_path) == list(range(1, 101))
    status = json.loads((tmp_path / "summary.json").read_text())["wandb_status"]
    assert status.startswith("offline: make sync ") and "connection refused" in status
    assert len([r for r in wandb_records(tmp_path) if r["type"] == "history"]) == 100
    assert key.encode() not in b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
