"""A micro study as a user starts it: interrupted, finished, left alone, and with a rule that fails."""

import csv
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from cluster.cli import FAILED, INTERRUPTED
from cluster.record.record import read_metrics
from tests.cluster.test_killed_parents import END_SECONDS
from tests.commands import TINY, python, started, write_corpus
from tests.waiting import PATIENCE_SECONDS, wait_until
from training.study.config import OWN_KEYS

pytestmark = pytest.mark.stack

SESSION = {"RAY_TMPDIR": f"/tmp/ray-{os.getpid()}", "WANDB_API_KEY": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, and a study of 2 rules x 2 rates and 1 seed on the smallest model: 4 + 2 runs of 16 steps."""
    folder = tmp_path_factory.mktemp("study")
    common = {name: value for name, value in TINY.items() if name not in (*OWN_KEYS, "record.wandb")}
    common |= {"data.source": write_corpus(folder), "data.directory": folder / "data"}
    common |= {"schedule.tokens": 512 * 16, "evaluation.tuning_sequences": 4, "optim.matrix.dtype": "fp32"}
    study = {
        "name": "micro",
        "directory": str(folder / "outputs"),
        "rules": {
            "adamw": {"keys": ["optim.matrix.rule=adamw"], "grid": [0.001, 0.004]},
            "muon": {"grid": [0.02, 0.05], "vector_ratios": [0.2]},
        },
        "widths": {"w64": {"hidden_size": 64, "ffn_size": 128, "num_heads": 2, "num_kv_heads": 1}},
        "seeds": [1],
        "common_keys": [f"{name}={value}" for name, value in common.items()],
        "claims": {"reference": "adamw", "rule": "muon"},
        "wandb": "disabled",
    }
    (folder / "study.yaml").write_text(json.dumps(study))
    return folder


def run_study(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return python("training.study", "--config", folder / "study.yaml", *overrides, **SESSION)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "outputs" / "micro" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder, but for this process's own."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if str(folder) in line and "pytest" not in line:
            found.append(line)
    return found


def test_an_interrupted_study_leaves_no_process_behind(folder: Path) -> None:
    runs = folder / "outputs" / "micro" / "runs"
    with started("training.study", "--config", folder / "study.yaml", **SESSION) as study:
        wait_until(lambda: study.poll() is not None or list(runs.glob("*/metrics.jsonl")))
        os.killpg(study.pid, signal.SIGINT)
        _, error = study.communicate(timeout=PATIENCE_SECONDS)
        assert study.returncode == INTERRUPTED, error
        wait_until(lambda: not processes_of(folder), seconds=END_SECONDS)


def test_the_same_command_finishes_it(folder: Path) -> None:
    done = run_study(folder)
    assert done.returncode == 0, done.stderr
    found = rows(folder)
    assert len(found) == 6 and {row["status"] for row in found} == {"finished"}
    assert [row["phase"] for row in found] == ["tuning"] * 4 + ["report"] * 2
    assert {(row["phase"], row["seed"]) for row in found} == {("tuning", "0"), ("report", "1")}
    losses = {row["run"]: float(row["validation_loss"]) for row in found}
    assert all(0.5 < loss < 5.5 for loss in losses.values())  # ln(320) = 5.77 at the start; few sentences
    assert all(row["tuning_loss"] != row["validation_loss"] for row in found)
    for rule in ("adamw", "muon"):
        tuning = [row for row in found if row["rule"] == rule and row["phase"] == "tuning"]
        [report] = [row for row in found if row["rule"] == rule and row["phase"] == "report"]
        assert report["lr"] == min(tuning, key=lambda row: float(row["tuning_loss"]))["lr"]
    report = (folder / "outputs" / "micro" / "report.md").read_text()
    assert "adamw's" in report and "None of 6." in report and "1 seed(s) make no band" in report
    figures = folder / "outputs" / "micro" / "figures"
    assert len(list(figures.glob("*.png"))) == 5


def test_a_run_leaves_its_tuning_loss(folder: Path) -> None:
    [run] = (folder / "outputs" / "micro" / "runs").glob("muon-*-seed1-*")
    evaluated = [row for row in read_metrics(run / "metrics.jsonl") if "validation_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 4, 8, 12, 16]
    assert all(row["tuning_loss"] > 0 for row in evaluated)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tuning_loss"] == evaluated[-1]["tuning_loss"] != summary["validation_loss"]
    assert not (run / "checkpoints").exists()  # dropped, as the run is finished


def test_a_third_time_does_nothing(folder: Path) -> None:
    runs = folder / "outputs" / "micro" / "runs"
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()}
    done = run_study(folder)
    assert done.returncode == 0 and "report: " in done.stdout
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()} == before


def test_a_rule_that_fails_is_reported_and_the_others_are_not_run_again(folder: Path) -> None:
    broken = ["rules.broken.keys=[model.vocab_size=256]", "rules.broken.grid=[0.01,0.02]"]
    done = run_study(folder, *broken)
    assert done.returncode == FAILED
    assert "no report run of broken finished" in done.stderr
    found = {row["run"]: row for row in rows(folder)}
    assert len(found) == 8
    failed = [row for row in found.values() if row["status"] == "failed"]
    assert {row["lr"] for row in failed} == {"0.01", "0.02"} and {row["rule"] for row in failed} == {"broken"}
    assert all("exit code 2: error: model.vocab_size: 256" in row["error"] for row in failed)
    report = (folder / "outputs" / "micro" / "report.md").read_text()
    assert "2 of 8." in report and "broken at w64: no tuning run finished" in report
    assert all(row["run"] in report for row in failed)
