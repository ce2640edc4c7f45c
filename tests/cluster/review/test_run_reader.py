import json
import math
import os
import platform
import signal
import subprocess
import sys

from cluster import files
from cluster.config import changes, read_yaml, to_yaml
from cluster.review.run_reader import Run
from tests.cluster.review.factories import age, make_run, open_record, row
from tests.commands import ROOT
from tests.waiting import wait_until
from training import config as training_config


def test_a_finished_run_is_read_whole(tmp_path):
    run = Run(make_run(tmp_path / "a", map(row, range(1, 11)), changes={"optim.matrix.lr": [0.02, 0.04]}))
    assert run.state.name == "finished" and run.problems == []
    assert (run.last_step, run.planned_steps, len(run.columns["step"].rows)) == (10, 10, 10)
    assert run.config["optim.matrix.rule"] == "muon" and run.summary["tokens"] == 1000
    assert run.changes == {"optim.matrix.lr": [0.02, 0.04]} and run.events == []
    held_out = run.columns["validation_loss"]
    assert list(held_out.rows) == [1, 3, 5, 7, 9] and held_out.values[0] == row(2)["validation_loss"]
    assert "mfu" not in run.columns, "null is no number"


def test_a_run_is_running_while_a_record_holds_it_however_long_it_is_silent(tmp_path):
    with open_record(tmp_path) as record:
        record.log(row(1))
        age(tmp_path, 5000)
        state = Run(tmp_path).state
        assert state.name == "running" and "1h23m old, and one was due" in state.reason
    state = Run(tmp_path).state
    assert state.name == "failed" and "killed, or its node was lost" in state.reason


def test_a_killed_run_has_failed_and_keeps_its_rows(tmp_path):
    code = (
        "import sys, pathlib, time; from tests.cluster.review.factories import open_record, row\n"
        "record = open_record(pathlib.Path(sys.argv[1])); record.log(row(1)); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    try:
        wait_until(lambda: Run(tmp_path).last_step == 1, seconds=60)
        assert Run(tmp_path).state.name == "running"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert Run(tmp_path).state.name == "running", "its last row is fresh, and its host is unknown"
    about = {"host": {"hostname": platform.node()}}
    (tmp_path / "provenance.json").write_text(json.dumps(about))
    assert Run(tmp_path).state.name == "failed", "no process of this host holds its lock"
    (tmp_path / "launcher.lock").write_text(f"process {os.getpid()} on {platform.node()}\n")
    assert Run(tmp_path).state.name == "running", "its launcher lives"
    (tmp_path / "provenance.json").write_text("{}")
    age(tmp_path, 100)
    assert Run(tmp_path).state.name == "failed" and Run(tmp_path).last_step == 1


def test_a_run_that_left_a_word_is_believed_at_once(tmp_path):
    make_run(tmp_path, [row(1)], finish=False)
    event = {"kind": "failed", "level": "error", "step": 1, "text": "the gradient was not finite"}
    old = json.dumps({**event, "time": "2020-01-01T00:00:00Z", "text": "an earlier start"})
    new = json.dumps({**event, "time": "2099-01-01T00:00:00Z"})
    (tmp_path / "events.jsonl").write_text(f"{old}\n")
    assert Run(tmp_path).state.name == "running", "that was an earlier start of the run"
    (tmp_path / "events.jsonl").write_text(f"{old}\n{new}\n")
    assert Run(tmp_path).state == Run(tmp_path).state.__class__("failed", "the gradient was not finite")
    (tmp_path / "events.jsonl").write_text(new.replace("failed", "stopped") + "\n")
    assert Run(tmp_path).state.name == "stopped"


def test_damage_is_left_out_and_counted(tmp_path):
    make_run(tmp_path, [row(1), row(2, loss=math.nan), row(3, loss=math.inf)], finish=False)
    (tmp_path / "config.yaml").write_text("a: [1\n")
    (tmp_path / "provenance.json").write_text("{")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('not json\n[1]\n{"step": 4, "loss": 3.5}\n{"step": 5, "lo')
    run = Run(tmp_path)
    assert list(run.columns["step"].values) == [1, 2, 3, 4]
    losses = run.columns["loss"].values
    assert math.isnan(losses[1]) and losses[2] == math.inf and losses[3] == 3.5
    assert run.config == {} and run.provenance == {} and run.changes is None
    assert [problem.partition(":")[0] for problem in run.problems] == [
        *("metrics.jsonl", "config.yaml", "provenance.json"),
    ]
    assert run.problems[0] == "metrics.jsonl: 2 damaged lines left out"


def test_a_resumed_run_has_each_step_once(tmp_path):
    make_run(tmp_path, map(row, range(1, 8)), finish=False)
    with open_record(tmp_path, resume_step=5) as record:
        record.log(row(6))
    assert list(Run(tmp_path).columns["step"].values) == [1, 2, 3, 4, 5, 6]


def test_what_is_not_there_is_empty_and_named(tmp_path):
    run = Run(tmp_path / "nothing")
    assert run.state.name == "failed" and "no run began here" in run.state.reason
    assert run.columns == {} and run.latest == {} and run.planned_steps is None
    assert run.config == {} and run.problems == ["config.yaml: missing"]


def test_the_newest_values_come_from_the_end_of_a_long_file(tmp_path):
    make_run(tmp_path, [row(1, started=True)], finish=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(row(step))}\n" for step in range(2, 2000))
    assert Run(tmp_path).latest["step"] == 1999
    assert "started" not in Run(tmp_path).latest and Run(tmp_path).columns["started"].values[0] == 1


def test_a_record_keeps_what_differs_from_the_defaults_of_its_version(tmp_path):
    config = training_config.load(dotlist=["optim.matrix.lr=0.04", "optim.scion.norms=['*=sign']"])
    found = changes(config)
    assert found["optim.matrix.lr"] == [0.02, 0.04] and found["optim.scion.norms"][1] == ["*=sign"]
    assert set(found) <= {"optim.matrix.lr", "optim.scion.norms", "precision"}, "auto is settled by the host"
    files.write_json(tmp_path / "changes.json", found)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_yaml(tmp_path / "config.yaml")["optim"]["matrix"]["lr"] == 0.04


def test_the_reader_is_light():
    code = (
        "import sys, cluster.review.run_reader\n"
        "print([name for name in ('torch', 'omegaconf', 'wandb', 'ray', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
