"""Whole training runs as a user starts them: what they leave behind, resumption, and two launchers."""

import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster import files
from cluster.record import events
from cluster.record.record import read_metrics
from tests.cluster.review.panel_keys import logged, missing, shown_by
from tests.commands import ROOT, python, started, tiny, write_corpus
from tests.standstill import STEP
from tests.waiting import wait_until
from training import config as training_config
from training.run.checkpoint import Checkpoint
from training.run.export import export

pytestmark = pytest.mark.stack

NUM_STEPS = 40
REFERENCE = {
    "record__wandb": "offline",
    "optim__inspect_every_steps": 10,
    "optim__noise__measure_every_steps": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_corpus(folder)
    return folder


def run_keys(folder: Path, name: str, **changes: object) -> list[str]:
    keys = {"workers__count": 2, "schedule__tokens": 512 * NUM_STEPS, "checkpoint__every_steps": 5}
    return tiny(folder, run__name=name, workers__hang_seconds=0, **{**keys, **changes})


def losses(run: Path) -> dict[int, tuple]:
    """Step -> what must not depend on how often the run was interrupted, or on its launcher."""
    keys = ("tokens", "loss", "validation_loss", "gradient_norm", "lr", "lr_vector")
    return {row["step"]: tuple(row.get(key) for key in keys) for row in read_metrics(run / "metrics.jsonl")}


def kill_at(
    step: int,
    run: Path,
    *arguments: object,
    ranks: int = 0,
    before: Callable[[], None] = lambda: None,
    **environment: str,
) -> int:
    """Start a run, SIGKILL it where it stands still after `step`; the last step that was written by then.

    before: called before the SIGKILL.
    """
    metrics = run / "metrics.jsonl"

    def last() -> int:
        if process.poll() is not None:
            raise AssertionError(f"it ended before step {step}: {process.communicate()}")
        rows = read_metrics(metrics)[-1:] if metrics.exists() else []
        return rows[0]["step"] if rows and rows[0]["step"] >= step else 0

    still = {STEP: str(step), **environment}
    with started("tests.standstill", *arguments, ranks=ranks, **still) as process:
        seen = wait_until(last, told=f"step {step}")
        wait_until(lambda: list(run.glob("checkpoints/*/COMPLETE")))  # which is written meanwhile
        before()
        return seen


def train_workers(session: str) -> list[int]:
    """Process ids of Ray Train's workers in this session of Ray."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours
            ours = f"RAY_TMPDIR={session}".encode() in entry.joinpath("environ").read_bytes().split(b"\0")
            if ours and b"RayTrainWorker" in entry.joinpath("cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """The run directory of an uninterrupted run under torchrun, two ranks, with an offline W&B mirror."""
    keys = run_keys(folder, "reference", **REFERENCE)
    done = python("training.launch", *keys, ranks=2, WANDB_API_KEY="")
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout and "sample 'The name of the'" in done.stdout
    assert re.search(r"^time: \d+ s, .*training \d", done.stdout, re.MULTILINE)
    assert re.search(r"first step after [\d.]+ s: command [\d.]+, imports .*, step \d", done.stderr)
    return folder / "outputs" / "reference"


def test_a_run_leaves_its_record(reference: Path, folder: Path) -> None:
    rows = read_metrics(reference / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    row = rows[-1]
    assert row["tokens"] == 512 * NUM_STEPS
    assert 0 < row["gradient_norm"] < 100 and row["skipped_steps"] == 0
    assert row["tokens_per_second"] == pytest.approx(512 / row["step_seconds"])
    assert row["mfu"] is None and "no datasheet peak" in row["mfu_reason"]
    assert rows[0]["validation_loss"] > 5.5 > 4.5 > row["validation_loss"]  # ln(320) = 5.77 at the start
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["validation_loss"] == row["validation_loss"] and summary["tokens"] == row["tokens"]
    assert summary["wandb_status"].startswith("offline")
    parts = ("start", "training", "evaluation", "checkpoint", "sample")
    assert all(summary[f"{part}_seconds"] > 0 for part in parts)
    assert sum(summary[f"{part}_seconds"] for part in parts) > summary["wall_seconds"]  # which is of the loop
    assert list((reference / "wandb").glob("offline-run-*/run-*.wandb"))
    provenance = json.loads((reference / "provenance.json").read_text())
    assert len(provenance["data_fingerprint"]) == 64 and provenance["packages"]["deepspeed"] == "0.19.8"
    resolved = training_config.load(file=reference / "config.yaml")
    assert resolved == training_config.load(dotlist=run_keys(folder, "reference", **REFERENCE))
    assert (reference / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert kept == ["step-0000035", "step-0000040"]


def test_wandb_has_every_key_that_the_views_show_of_training(reference: Path) -> None:
    """Those of a GPU whose ceiling is known: `test_meter.py`."""
    assert missing(reference, "train", "throughput", "validation", "optimizer", "noise", "health") == {
        ("history", "throughput/mfu_of_measured")
    }
    keys = {(where, name) for where, name in shown_by() if where == "config"}
    assert {("config", "optim.matrix.lr"), ("config", "provenance.commit")} < keys <= logged(reference)
    assert {("table", "optimizer/layers"), ("image", "train/loss_plot")} < logged(reference)


def test_a_killed_run_resumes_bit_for_bit(reference: Path, folder: Path) -> None:
    keys = run_keys(folder, "killed")
    run = folder / "outputs" / "killed"
    seen = kill_at(8, run, "training.launch", *keys, ranks=2)
    before = losses(run)
    assert max(before) >= seen  # nothing that had been written is lost
    again = python("training.launch", *keys, ranks=2)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    assert losses(run) == losses(reference)
    assert all(before[step] == losses(reference)[step] for step in before)
    found = [(event["kind"], event["step"]) for event in events.read(run)]
    starts = [kind for kind, _ in found if kind not in ("checkpoint", "first_step")]
    # the rank that is killed last sees the other go, and may still say so
    assert starts in (
        ["started", "workers", end, "resumed", "workers", "finished"] for end in ("killed", "failed")
    )
    resumed = dict(found)["resumed"]
    assert found.index(("checkpoint", resumed)) < found.index(("resumed", resumed)) and resumed > 0
    if max(before) > resumed:
        text = [event["text"] for event in events.read(run) if event["kind"] == "workers"][1]
        assert f"steps {resumed + 1} to {max(before)} are taken again" in text


def test_a_killed_run_that_looks_ahead_under_noise_resumes_bit_for_bit_and_exports_its_weights(
    folder: Path,
) -> None:
    changes = {
        "workers__count": 1,
        "schedule__tokens": 512 * 20,
        "optim__matrix__rule": "transported_scion",
        "optim__clip": 0,
        "optim__noise__inject": "student",
        "optim__noise__scale": 0.001,
        "optim__average_decay": 0.9,
        "optim__qk_clip": 0.01,
    }
    whole, killed = (run_keys(folder, name, **changes) for name in ("ahead", "ahead-killed"))
    done = python("training.launch", *whole)
    assert done.returncode == 0, done.stderr
    kill_at(8, folder / "outputs/ahead-killed", "training.launch", *killed)
    again = python("training.launch", *killed)
    assert again.returncode == 0 and "resuming" in again.stderr, again.stderr
    assert losses(folder / "outputs/ahead-killed") == losses(folder / "outputs/ahead")
    ends = [files.read_json(folder / f"outputs/{name}/summary.json") for name in ("ahead", "ahead-killed")]
    assert ends[0]["averaged_loss"] == ends[1]["averaged_loss"] != ends[0]["validation_loss"]
    run = folder / "outputs/ahead"
    export(run, dtype="float32")
    saved = Checkpoint(run / "checkpoints/step-0000020")
    exported = load_file(run / "export/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    master, point = (saved.read(name, key, 0, exported[name].numel()) for key in ("master", "point"))
    assert torch.equal(exported[name].flatten(), master)
    assert (point - master).norm() > 1e-3 * master.norm()  # what the model last computed gradients with
    export(run, dtype="float32", averaged=True)
    exported = load_file(run / "export/model.safetensors")
    assert torch.equal(exported[name].flatten(), saved.read(name, "average", 0, exported[name].numel()))


def test_a_finished_run_is_left_alone(reference: Path, folder: Path) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    again = python("training.launch", *run_keys(folder, "reference", **REFERENCE), ranks=2)
    assert again.returncode == 0 and "is complete at step 40" in again.stderr
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_ray_train_gives_the_same_losses_also_after_its_driver_is_killed(
    reference: Path, folder: Path, tmp_path: Path
) -> None:
    # Relative, as by default: the driver's working directory counts, not the workers'.
    outputs = os.path.relpath(folder / "outputs", ROOT)
    keys = run_keys(
        folder,
        "ray",
        launcher="ray",
        run__directory=outputs,
        record__stalled_minutes=0.1,
        workers__max_failures=1,
    )
    run = folder / "outputs" / "ray"
    with_own_session = {"RAY_TMPDIR": f"/tmp/ray-{os.getpid()}"}
    soon = {"RAY_metrics_report_interval_ms": "500"}

    def told(kind: str, *, after: str = "started") -> list[str]:
        found = [(event["kind"], event["text"]) for event in events.read(run)]
        begin = next((place for place, event in enumerate(found) if event[0] == after), len(found))
        return [text for each, text in found[begin:] if each == kind]

    def figures() -> dict[str, str]:
        """What Ray's endpoint gives of the run: gauge and its own labels -> value."""
        ports = Path(with_own_session["RAY_TMPDIR"]).glob("ray-*/r/session_latest/metrics_export_port_*")
        file = max(ports, key=lambda port: port.stat().st_mtime)  # another test may have left its session
        with urllib.request.urlopen(f"http://127.0.0.1:{file.read_text()}/metrics") as answer:
            lines = answer.read().decode()
        found = re.findall(
            r'^ray_(asuncion_\w+)\{.*?((?:rank="\d+",)?run="ray")\} (\S+)', lines, re.MULTILINE
        )
        return {f"{name}{{{labels}}}": value for name, labels, value in found}

    def lose_a_worker() -> None:
        names = ("step", "tokens", "loss", "tokens_per_second", "data_wait_seconds", "checkpoint_age_seconds")
        ages = [f'asuncion_heartbeat_age_seconds{{rank="{rank}",run="ray"}}' for rank in (0, 1)]
        expected = {*(f'asuncion_{name}{{run="ray"}}' for name in names), *ages}
        step = 'asuncion_step{run="ray"}'
        wait_until(lambda: expected <= set(found := figures()) and float(found[step]) >= 8, told=figures)
        wait_until(lambda: told("no_progress", after="checkpoint"), told=lambda: events.read(run))
        os.kill(train_workers(with_own_session["RAY_TMPDIR"])[0], signal.SIGKILL)
        wait_until(lambda: told("no_progress", after="restarted"), told=lambda: events.read(run))

    seen = kill_at(8, run, "training.launch", *keys, before=lose_a_worker, **soon, **with_own_session)
    assert max(losses(run)) >= seen
    assert "seen from the launcher" in told("no_progress")[-1]
    assert "Ray started the workers again: 2 workers" in told("restarted")[0]
    again = python("training.launch", *keys, **with_own_session)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr and "step 40/40" in again.stderr
    assert told("killed") and told("finished", after="resumed") and not told("failed")
    assert losses(run) == losses(reference)
