"""Of `make eval` what needs neither a model nor the harness: keys, which checkpoint, scores, the table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import config as layered
from cluster.cli import UserError
from cluster.config import ConfigError
from cluster.runs import ModelDirectory
from tests.commands import ROOT
from tests.test_architecture import IMPORT_WITHOUT_TORCH
from training.evaluate import scoring
from training.evaluate.checkpoint import find, named, shape_of
from training.evaluate.config import EvaluateConfig
from training.evaluate.report import last_line, table
from training.model.shapes import SHAPES, to_hf_config


def test_the_keys_and_the_report_load_without_torch():
    names = ("command", "config", "report", "harness", "scoring", "checkpoint", "endpoint")
    command = [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *(f"training.evaluate.{name}" for name in names)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["device=tpu"], "device: 'tpu' is not one of"),
        (["dtype=float16"], "dtype: 'float16' is not one of"),
        (["batch_size=0"], "batch_size: must be at least 1"),
        (["limit=0"], "limit: must be at least 1"),
        (["num_fewshot=-1"], "num_fewshot: must not be negative"),
        (["endpoint=host:8000", "tasks=[a]"], "endpoint: 'host:8000' must begin with http:// or https://"),
        (["endpoint=http://host:8000"], "tasks: an endpoint is evaluated by tasks alone"),
        (["endpoint=http://host:8000", "tasks=[a]", "data=d"], "data: perplexity is measured locally"),
        (["endpoint_model=m"], "endpoint_model: only with endpoint"),
        (["tasks=hellaswag"], "tasks"),
    ],
)
def test_a_key_that_cannot_be_is_named(keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        layered.load(EvaluateConfig, dotlist=keys)


def touch(file: Path, *, at: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(to_hf_config(SHAPES["llama-5m"], dtype="bfloat16")))
    os.utime(file, (at, at))


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs a (exported after its training) and b (trained last, exported before), and a directory hf."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "outputs"
    for name, trained, exported in (("a", 100.0, 150.0), ("b", 300.0, 200.0)):
        touch(runs / name / "checkpoints/step-0000003/COMPLETE", at=trained)
        touch(runs / name / "export/config.json", at=exported)
    touch(tmp_path / "hf/config.json", at=0.0)
    return runs


def test_which_checkpoint_a_name_means(outputs):
    b = ModelDirectory(outputs / "b/export", "b", run=outputs / "b", stale=True)
    assert find("newest") == find("b") == find(str(outputs / "b")) == named("b") == b
    assert find("a") == ModelDirectory(outputs / "a/export", "a", run=outputs / "a")
    assert find("outputs/b/export") == ModelDirectory(outputs / "b/export", "b", run=outputs / "b")
    assert find("hf") == ModelDirectory(outputs.parent / "hf", "hf")
    assert named("hf") is None
    with pytest.raises(UserError, match=r"model: 'c' is neither .* runs in .*: a, b; train one"):
        find("c")


def test_a_checkpoint_without_a_tokenizer_or_of_another_architecture_is_refused(outputs):
    hf = outputs.parent / "hf"
    with pytest.raises(UserError, match=r"model: .*hf/tokenizer.json is missing"):
        shape_of(find("hf"))
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    known = "'llama', 'mistral', 'qwen2', 'qwen3'"
    with pytest.raises(
        UserError, match=rf"model: .*hf/config.json: model_type: 'gpt2' is not one of: {known}$"
    ):
        shape_of(find("hf"))


RESULTS = {
    "results": {
        "one": {
            "alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.1,
            "f1,strict": 0.25, "f1_stderr,strict": "N/A",
        },
        "many": {"alias": "many", "acc,none": 0.4},
    },
    "groups": {"many": {"alias": "many", "acc,none": 0.4, "acc_stderr,none": float("nan")}},
    "versions": {"one": 2.0, "many": None},
    "n-shot": {"one": 5},
    "n-samples": {"one": {"original": 100, "effective": 20}},
    "higher_is_better": {"one": {"acc": True, "f1": None}},
}  # fmt: skip


def test_scores_are_read_from_the_harness_s_results():
    one, strict, many = scoring._scores(RESULTS)
    assert (one.task, one.metric, one.filter, one.value, one.stderr) == ("one", "acc", "none", 0.5, 0.1)
    assert (one.version, one.num_fewshot, one.samples, one.of_samples) == ("2.0", 5, 20, 100)
    assert one.higher_is_better is True and not one.group
    assert (strict.metric, strict.filter, strict.value, strict.stderr) == ("f1", "strict", 0.25, None)
    assert (many.task, many.group, many.stderr, many.samples, many.version) == (
        "many",
        True,
        None,
        None,
        None,
    )


def test_the_table_and_the_last_line():
    scores = [vars(score) for score in scoring._scores(RESULTS)]
    result = {"model": {"name": "m"}, "scores": scores, "perplexity": {"left_out": "no data"}}
    lines = "\n".join(map(str, table(result))).splitlines()
    assert lines[0].split() == ["task", "version", "shots", "samples", "metric", "filter", "value", "stderr"]
    assert lines[1].split() == ["one", "2.0", "5", "20/100", "acc", "none", "0.5000", "0.1000"]
    assert lines[3].split() == ["many", "-", "-", "-", "acc", "none", "0.4000", "-"]
    assert lines[4] == "perplexity left out: no data"
    last = last_line(result, Path("/x/eval.json"))
    assert last["scores"] == {"one/acc,none": 0.5, "one/f1,strict": 0.25, "many/acc,none": 0.4}
    assert last["perplexity"] is None and last["file"] == "/x/eval.json"
