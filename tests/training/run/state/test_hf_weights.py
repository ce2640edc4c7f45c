"""Continued pretraining: a run that starts from the weights of a Hugging Face directory."""

import json
import shutil
from pathlib import Path

import pytest

from cluster import files
from cluster.cli import BAD_INPUT
from cluster.record.record import read_metrics
from tests.commands import TINY, python, tiny, write_corpus
from training import launch
from training.run.export import export

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a finished run `first`, and its weights in `hf`."""
    folder = tmp_path_factory.mktemp("load")
    write_corpus(folder)
    done = python("training.launch", *tiny(folder, run__name="first", model__qk_norm="true"))
    assert done.returncode == 0, done.stderr
    export(folder / "outputs/first", output=folder / "hf", dtype="float32")
    return folder


def keys(folder: Path, name: str, **changes: object) -> list[str]:
    """Of a run from the weights, whose shape only config.json says."""
    loaded = {"load": f"hf:{folder / 'hf'}", "data__tokenizer": folder / "hf/tokenizer.json", **changes}
    given = [f"{key.replace('__', '.')}=" for key in changes]
    return [
        argument
        for argument in tiny(folder, run__name=name, **loaded)
        if not argument.startswith("model.") or argument.startswith(tuple(given))
    ]


def test_it_begins_where_the_weights_were_with_a_new_schedule_and_names_them(folder: Path) -> None:
    done = python("training.launch", *keys(folder, "second", workers__count=2, zero__stage=3), ranks=2)
    assert done.returncode == 0, done.stderr
    run = folder / "outputs/second"
    rows = read_metrics(run / "metrics.jsonl")
    before = files.read_json(folder / "outputs/first/summary.json")["validation_loss"]
    assert rows[0]["validation_loss"] == pytest.approx(before, abs=1e-4)  # two ranks add in another order
    first = read_metrics(folder / "outputs/first/metrics.jsonl")
    assert [row["lr"] for row in rows[1:]] == [row["lr"] for row in first[1:]]
    assert rows[1]["loss"] < first[1]["loss"] - 0.5
    sources = {source["kind"]: source for source in files.read_json(run / "provenance.json")["inputs"]}
    lineage = files.read_json(folder / "hf/lineage.json")
    assert sources["export"]["fingerprint"] == lineage["fingerprint"]
    assert sources["export"]["inputs"][0]["kind"] == "checkpoint"


def test_of_weights_that_are_no_export_of_ours_the_content_is_the_fingerprint(folder: Path, tmp_path) -> None:
    from training.run.state.hf_weights import origin_of

    other = tmp_path / "other"
    shutil.copytree(folder / "hf", other)
    (other / "lineage.json").unlink()
    before = origin_of(other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert before["kind"] == "model" and len(before["fingerprint"]) == 64 and "fingerprint_of" not in before
    origin_of.cache_clear()  # as for another process
    assert origin_of(other)["fingerprint"] != before["fingerprint"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"load": "hf:/nowhere"}, ["load: ", "/nowhere: no such config.json"]),
        ({"model__num_layers": 3}, ["model.num_layers: num_layers is 3, but 2 in hf:", "leave the key out"]),
        ({"model__qk_norm": "false"}, ["model.qk_norm: qk_norm is False, but True in hf:"]),
        ({"model__shape": "llama-60m"}, ["model.shape: ", "but 320 in hf:"]),
        ({"data__tokenizer": "train"}, ["data.tokenizer: 'train' makes another", "hf/tokenizer.json"]),
    ],
    ids=str,
)
def test_what_does_not_fit_the_weights_is_refused_by_its_key(folder: Path, capsys, changes, parts) -> None:
    assert TINY["model.num_layers"] == 2
    assert launch.main(keys(folder, "refused", **changes)) == BAD_INPUT
    message = capsys.readouterr().err
    for part in parts:
        assert part in message
    assert not (folder / "outputs/refused/checkpoints").exists()


def test_data_of_another_tokenizer_and_a_missing_tensor_are_refused(folder: Path, tmp_path, capsys) -> None:
    tokenizer = json.loads((folder / "hf/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert launch.main(keys(folder, "refused", data__tokenizer=tmp_path / "tokenizer.json")) == BAD_INPUT
    message = capsys.readouterr().err
    assert "data.tokenizer: 2 of 320 tokens of" in message
    assert f"set data.tokenizer={folder / 'hf'}" in message

    deeper = tmp_path / "deeper"
    shutil.copytree(folder / "hf", deeper)
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert launch.main(keys(folder, "refused", load=f"hf:{deeper}")) == BAD_INPUT
    assert "load: " in (message := capsys.readouterr().err)
    assert "model.layers.2.self_attn.q_proj.weight is missing" in message

    (deeper / "config.json").write_text(json.dumps(config))
    (deeper / "tokenizer.json").write_text("{")
    assert launch.main(keys(folder, "refused", load=f"hf:{deeper}")) == BAD_INPUT
    assert f"{deeper}/tokenizer.json: not a Hugging Face tokenizer.json" in capsys.readouterr().err
