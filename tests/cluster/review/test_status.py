import fcntl
import json
import subprocess
import sys

from cluster.record import events
from cluster.record.row_format import LAUNCHER_LOCK
from cluster.review.run_reader import Run
from cluster.review.status import HEALTH_FILE, lines_of, report
from tests.cluster.review.factories import age, make_run, open_record, row
from tests.commands import ROOT


def test_a_run_has_a_line_and_its_newest_alarms_follow(tmp_path):
    run = make_run(tmp_path / "night", [row(step) for step in range(5)], finish=False)
    events.append(run, "started", "a run of 1,000 steps begins", step=0, num_steps=1000)
    for step in (1, 2, 3, 4):
        events.append(run, "loss_spike", f"the loss is {step}", step=step)
    events.append(run, "failed", "rank 3: out of memory")
    first, earlier, *alarms = lines_of(Run(run))
    assert first.split("  ")[1].split() == ["run", "night"]
    assert first.endswith("failed    step 4 of 1,000; rank 3: out of memory")
    assert earlier.strip() == "2 earlier warnings and errors in events.jsonl"
    assert [line[22:] for line in alarms] == [
        " warning: step 3: the loss is 3",
        " warning: step 4: the loss is 4",
        " error: rank 3: out of memory",
    ]


def test_a_run_that_goes_on_says_what_is_wrong_with_its_nodes(tmp_path):
    with open_record(tmp_path / "night") as record:
        record.log(row(1))
        for content, told in (
            ({"health_problems": 1, "health_throttled_gpus": 0}, "nodes: 1 open problem, "),
            (
                {"health_problems": 3, "health_throttled_gpus": 2},
                "nodes: 3 open problems, GPUs throttled: 2, ",
            ),
            ({"health_problems": 0}, None),
            ([], None),
        ):
            if content:
                content["time"] = 0
            (tmp_path / "night" / HEALTH_FILE).write_text(json.dumps(content))
            said = [line.strip() for line in lines_of(Run(tmp_path / "night")) if "nodes: " in line]
            assert [line[: len(told or "")] for line in said] == [told] * bool(told)


def test_a_serving_run_has_measured_loads(tmp_path):
    for number, said in ((1, "1 load"), (3, "3 loads")):
        run = make_run(tmp_path / said, [{**row(number), "validation_loss": 4.0}])
        (run / "requests.jsonl").touch()
        assert lines_of(Run(run))[0].endswith(f"finished  {said}")


def test_the_newest_runs_come_first_and_what_is_no_run_is_left_out(tmp_path):
    for number in range(5):
        age(make_run(tmp_path / f"run-{number}", [row(2)]), 100 * number)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert [line.split()[1] for line in report(tmp_path)] == ["run-0", "run-1", "run-2"]
    assert report(tmp_path / "missing") == []


def test_a_run_that_waits_is_shown_beside_any_number_of_newer_ones(tmp_path):
    for number in range(4):
        age(make_run(tmp_path / f"run-{number}", [row(2)]), -1000 + 100 * number)
    waiting = tmp_path / "waiting"
    waiting.mkdir()
    events.append(waiting, "waiting", "the run waits in line for 8 workers")
    with (waiting / LAUNCHER_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [line.split()[1] for line in report(tmp_path)] == ["run-0", "run-1", "run-2", "waiting"]


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path):
    make_run(tmp_path / "whole", [row(2)])
    for name, content in {"folder": None, "text": '{"step": "two"}\n', "list": '{"step": [2]}\n'}.items():
        metrics = make_run(tmp_path / name, [row(2)]) / "metrics.jsonl"
        metrics.unlink()
        metrics.mkdir() if content is None else metrics.write_text(content)
    lines = report(tmp_path, most=4)
    assert sum("cannot be read: " in line for line in lines) == 3
    assert sum(line.startswith("  run whole") and "finished" in line for line in lines) == 1


def test_the_command_shows_the_runs_of_the_folder_it_is_called_in_or_the_one_that_is_named(tmp_path):
    def status(*arguments):
        command = [sys.executable, "-m", "cluster.review.status", *arguments]
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert status().stdout.startswith("no runs in ")
    for name in ("night", "day"):
        make_run(tmp_path / "outputs" / name, [row(2)])
        (tmp_path / "outputs" / name / "config.yaml").write_text("")
    assert {line.split()[1] for line in status().stdout.splitlines()} == {"night", "day"}
    assert "run day " in status("day").stdout and "night" not in status("day").stdout
    wrong = status("noon")
    assert wrong.returncode == 2 and "no such run" in wrong.stderr and wrong.stdout == ""
