"""`make baseline` and `make parity` for real, on a model small enough for a test."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.review.panel_keys import missing
from tests.commands import TINY, python, started, write_corpus
from tests.waiting import PATIENCE_SECONDS, wait_until
from training.model.shapes import LlamaShape, to_hf_config

pytestmark = pytest.mark.stack
SHAPE = LlamaShape(
    vocab_size=320, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=128
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Arguments of a small baseline, one of whose models has no weights."""
    folder = tmp_path_factory.mktemp("baseline")
    write_corpus(folder)
    for name in ("mine", "weightless"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(to_hf_config(SHAPE, dtype="bfloat16")))
    data = ("data.vocab_size", "data.validation_fraction")
    more = [f"data.source={folder}/corpus.jsonl", *(f"{name}={TINY[name]}" for name in data)]
    return folder, [
        "rounds=2", f"train.shapes=[{folder}/mine/config.json]", "train.rules=[muon]",
        f"serve.models=[{folder}/mine/config.json,{folder}/weightless]", "serve.batches=[1,2]",
        "train.tokens=64", "train.sequence_length=32", "train.most_micro_sequences=2", "train.steps=2",
        f"train.data={folder}/data", f"train.more=[{','.join(more)}]",
        "serve.prompt_tokens=16", "serve.new_tokens=128", "cost.device_hour=2.0",
        f"directory={folder}/outputs", "wandb=disabled",
    ]  # fmt: skip


def test_a_machine_is_measured_and_compared_with_itself_and_a_datasheet(machine):
    folder, arguments = machine
    output = folder / "cpu.json"
    done = python("training.baseline", *arguments, f"output={output}", "wandb=offline", "train.workers=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["complete"] and found["hardware"]["kind"] == "cpu"
    assert found["ceilings"]["links"]["num_ranks"] == 2
    figures = {figure["id"]: figure for figure in found["figures"]}
    assert list(figures) == [
        "training/mine/muon", "prefill/mine/batch 1", "decode/mine/batch 1",
        "prefill/mine/batch 2", "decode/mine/batch 2",
    ]  # fmt: skip
    training = figures["training/mine/muon"]
    assert len(training["values"]) == 2
    assert sum(training["time_shares"].values()) == pytest.approx(1)
    rows = found["cells"][0]["rounds"]
    for part in ("compute", "communication", "optimizer", "data"):
        shares = [row[f"seconds_{part}"] / row["phased_step_seconds"] for row in rows]
        assert training["time_shares"][part] == pytest.approx(sum(shares) / 2) and min(shares) >= 0
    assert training["values"] == [row["tokens_per_step"] / row["step_seconds"] for row in rows]
    peak = found["ceilings"]["product_tflops"]["best"] * 1e12
    mfu = [value * SHAPE.flops_per_token(32) / peak for value in training["values"]]
    assert training["shares"]["MFU of measured product"] == pytest.approx(mfu)
    assert training["ranks"] == 2
    # an all-reduce and half of an all-gather; two ranks hold a layer each, so no matrix travels
    width = {"bf16": 2, "fp32": 4}[training["precision"]]
    assert (width == 2) == (found["ceilings"]["product_dtype"] == "bfloat16")
    sent = (1 + 1 / 2) * width * SHAPE.num_parameters
    assert training["link_bytes"] == pytest.approx(sent / rows[0]["tokens_per_step"], rel=1e-3)
    link = found["ceilings"]["links"]["all_reduce_gb_per_s"]["best"] * 1e9
    shares = [value * training["link_bytes"] / link for value in training["values"]]
    name = "share of measured link: all-reduce bus bandwidth, 2 ranks"
    assert training["shares"][name] == pytest.approx(shares)
    # The same bytes in the seconds in which collectives ran. These are of other steps than `values`.
    alone = [sent / row["seconds_communication"] / link for row in rows]
    assert training["shares"][f"{name}, during communication alone"] == pytest.approx(alone, rel=1e-3)
    assert all("all_reduce_gb_per_s" in row for row in found["peaks_of_rounds"])
    price = 2.0 * 1e6 / 3600 / (sum(training["values"]) / 2)
    assert training["cost_per_million_tokens"] == pytest.approx(price)
    (failed,) = (cell for cell in found["cells"] if cell["id"] == "serving/weightless")
    assert failed["status"] == "failed" and "weightless" in failed["reason"]

    summary = json.loads((folder / "outputs/baseline/summary.json").read_text())
    assert summary["wandb_status"].startswith("offline: ") and "W&B: offline: " in done.stdout
    assert list(summary["figures"]) == list(figures)
    assert missing(folder / "outputs/baseline", "baseline") == set()
    [copy] = (folder / "outputs/baseline/wandb").glob("offline-run-*/files/cpu.json")
    assert json.loads(copy.read_text()) == found

    report = folder / "report"
    compared = python("cluster.parity", output, output, "--output", report, "--wandb", "disabled")
    assert compared.returncode == 0, compared.stderr
    last = json.loads(compared.stdout.strip().splitlines()[-1])
    assert {name: round(each["parity"][0], 9) for name, each in last.items()} == dict.fromkeys(figures, 1.0)
    assert "serving/weightless: failed" in (report / "report.md").read_text()
    each_figure_leads_back_to_its_data_or_weights(found, report)


def each_figure_leads_back_to_its_data_or_weights(found: dict, report: Path) -> None:
    inputs = {figure["kind"]: figure["input"] for figure in found["figures"]}
    assert inputs["training"]["kind"] == "dataset" and len(inputs["training"]["fingerprint"]) == 64
    assert inputs["decode"] == inputs["prefill"] and "random weights" in inputs["decode"]["note"]
    assert found["provenance"]["inputs"] == [inputs["training"], inputs["decode"]]
    text = (report / "report.md").read_text()
    assert "└─ model " in text and "random weights: trained by no run, on no data" in text
    sides = json.loads((report / "provenance.json").read_text())["inputs"]
    assert [(side["kind"], side["name"]) for side in sides] == [("baseline", "cpu")] * 2
    assert sides[0]["inputs"] == found["provenance"]["inputs"]


def test_one_that_is_killed_leaves_what_it_had_measured(machine):
    folder, arguments = machine
    output = folder / "killed.json"
    partial = folder / "killed.partial.json"
    endless = ["train.shapes=[]", "rounds=1000"]
    with started("training.baseline", *arguments, *endless, f"output={output}") as process:
        wait_until(partial.exists)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        process.communicate(timeout=PATIENCE_SECONDS)
        wait_until(lambda: running(f"model.shape={folder}") == [])  # nothing that it started goes on
    assert not output.exists()
    found = json.loads(partial.read_text())
    assert not found["complete"] and len(found["figures"]) >= 1
    compared = python(
        "cluster.parity", partial, "datasheet:h100", "--output", folder / "r", "--wandb", "disabled"
    )
    assert compared.returncode == 0 and "broken off" in (folder / "r/report.md").read_text()


def test_the_ranks_of_a_cell_end_with_the_command(machine):
    """Each rank is in a session of its own, which torchrun makes; here the command alone is told to end."""
    folder, arguments = machine
    name = f"model.shape={folder}/mine"
    output = f"output={folder}/ranks.json"
    with started("training.baseline", *arguments, "train.workers=2", output) as process:
        wait_until(lambda: len(running(name)) >= 3)  # torchrun and two ranks
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 130
        wait_until(lambda: running(name) == [])


def running(part):
    """Processes with this in their command line."""
    return subprocess.run(["pgrep", "-f", part], capture_output=True, text=True).stdout.split()
