"""Which directory is served: runs, exports and Hugging Face directories, old and new."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import UserError
from serving.checkpoints import Served, check, eos_ids, export_if_stale, find, shape_of
from serving.config import ModelConfig
from serving.endpoint.text import numbered_tokenizer
from tests.commands import ROOT
from tests.serving.test_deployment import tiny_checkpoint
from training.model.shapes import SHAPES, to_hf_config


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs, under the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def touch(file: Path, *, at: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(to_hf_config(SHAPES["llama-5m"], dtype="bfloat16")))
    os.utime(file, (at, at))


def make_run(run: Path, *, trained: float | None = None, exported: float | None = None) -> Path:
    """A run with a checkpoint that was complete, and an export that was made, at these times."""
    (run / "checkpoints" / "step-0000009").mkdir(parents=True)  # broken off: without COMPLETE
    if trained is not None:
        touch(run / "checkpoints" / "step-0000003" / "COMPLETE", at=trained)
    if exported is not None:
        touch(run / "export" / "config.json", at=exported)
    return run


def test_the_newest_run_is_the_one_trained_or_exported_last(outputs):
    make_run(outputs / "a", trained=100.0)
    make_run(outputs / "b", trained=300.0)
    make_run(outputs / "c", trained=200.0)
    make_run(outputs / "broken")
    found = find(ModelConfig())
    assert found == Served(outputs / "b" / "export", "b", stale_run=outputs / "b")
    make_run(outputs / "d", exported=400.0)
    assert find(ModelConfig()) == Served(outputs / "d" / "export", "d")
    assert find(ModelConfig(name="mine")).name == "mine"


@pytest.mark.parametrize(
    ("trained", "exported", "stale"),
    [(100.0, None, True), (100.0, 200.0, False), (200.0, 100.0, True), (None, 100.0, False)],
)
def test_an_export_is_stale_if_missing_or_older_than_the_newest_complete_checkpoint(
    outputs, trained, exported, stale
):
    run = make_run(outputs / "run", trained=trained, exported=exported)
    assert find(ModelConfig(path="run")).stale_run == (run if stale else None)


def test_a_run_goes_by_its_name_and_by_its_directory(outputs, tmp_path):
    make_run(outputs / "here", trained=1.0)
    elsewhere = make_run(tmp_path / "elsewhere" / "run", trained=1.0)
    assert find(ModelConfig(path="here")).directory == outputs / "here" / "export"
    for path in (str(elsewhere), "elsewhere/run"):
        assert find(ModelConfig(path=path)) == Served(elsewhere / "export", "run", stale_run=elsewhere)


def test_a_hugging_face_directory_is_served_as_it_is(tmp_path):
    touch(tmp_path / "llama" / "config.json", at=1.0)
    assert find(ModelConfig(path="llama")) == Served(tmp_path / "llama", "llama")


def test_random_weights_have_no_directory():
    found = find(ModelConfig(weights="random", shape="llama-5m"))
    assert found == Served(None, "llama-5m-random")
    assert shape_of(ModelConfig(weights="random", shape="llama-5m"), found) == SHAPES["llama-5m"]


def test_without_a_run_the_message_says_how_to_make_one(outputs):
    make_run(outputs / "broken")
    with pytest.raises(UserError) as refused:
        find(ModelConfig())
    for part in ("model.path", str(outputs), "make train", "model.weights=random"):
        assert part in str(refused.value)


def test_an_unknown_path_is_named_with_the_runs_there_are(outputs):
    make_run(outputs / "first", trained=1.0)
    make_run(outputs / "broken")
    with pytest.raises(UserError) as refused:
        find(ModelConfig(path="frist"))
    for part in ("model.path: 'frist'", f"runs in {outputs}: first;", "make train"):
        assert part in str(refused.value)
    with pytest.raises(UserError, match="complete checkpoint"):
        find(ModelConfig(path="broken"))


def test_a_stale_export_is_made_again(outputs, monkeypatch):
    run = make_run(outputs / "run", trained=200.0, exported=100.0)
    exported, notes = [], []

    def done(run: Path, *, dtype: str) -> None:
        exported.append((run, dtype))
        touch(run / "export" / "config.json", at=300.0)

    monkeypatch.setattr("training.run.export.export", done)
    export_if_stale(find(ModelConfig()), report=notes.append)
    export_if_stale(find(ModelConfig()), report=notes.append)  # it is fresh now
    assert exported == [(run, "bfloat16")]
    assert notes == [f"exporting {run}"]


def test_an_export_that_fails_says_why(outputs):
    run = make_run(outputs / "run", trained=1.0)
    with pytest.raises(UserError, match=f"{run}: cannot be exported: ") as refused:
        export_if_stale(find(ModelConfig()), report=lambda note: None)
    assert "config.yaml" in str(refused.value) and "Traceback" not in str(refused.value)


def test_a_model_that_ours_is_not_is_refused_before_anything_starts(tmp_path):
    touch(tmp_path / "other" / "config.json", at=1.0)
    file = tmp_path / "other" / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"gpt2"'))
    config = ModelConfig(path="other")
    with pytest.raises(UserError, match=r"model\.path: .*config\.json.*gpt2"):
        shape_of(config, find(config))
    config = ModelConfig(weights="random", shape="llama-9t")
    with pytest.raises(UserError, match=r"model\.shape: llama-9t"):
        shape_of(config, find(config))


# --- every file is checked before Ray starts ----------------------------------------------------------------


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, Callable[[Path], object]] = {
    r"model\.safetensors: not a readable safetensors file": lambda m: cut(m / "model.safetensors"),
    r"config\.json: logits_scaling: 8": lambda m: edit(m / "config.json", logits_scaling=8),
    r"config\.json: tie_word_embeddings: 'no'": lambda m: edit(m / "config.json", tie_word_embeddings="no"),
    r"config\.json: .*line 1": lambda m: (m / "config.json").write_text("{"),
    r"model\.safetensors: tensor .* has shape": lambda m: edit(m / "config.json", intermediate_size=32),
    r"tensor model\.layers\.1\..* is missing": lambda m: edit(m / "config.json", num_hidden_layers=2),
    r"index\.json: has no weight_map": lambda m: edit(m / "model.safetensors.index.json", weight_map=[]),
    r"a-2\.safetensors: listed in .*, but missing": lambda m: edit(
        m / "model.safetensors.index.json", weight_map={"x": "a-2.safetensors"}
    ),
    r"generation_config\.json: not valid JSON: maximum recursion": lambda m: (
        m / "generation_config.json"
    ).write_text("[" * 100_000),
    r"model/.*: leads nowhere \(embedded null byte": lambda m: edit(
        m / "model.safetensors.index.json", weight_map={"x": "\0"}
    ),
    r"config\.json: rope_scaling: says something else than rope_parameters": lambda m: edit(
        m / "config.json", rope_scaling={"rope_type": "linear", "factor": 4.0}
    ),
    r"generation_config\.json: eos_token_id: 'x'": lambda m: edit(
        m / "generation_config.json", eos_token_id="x"
    ),
    r"generation_config\.json: eos_token_id: \[300\] is neither a token id of the model": lambda m: edit(
        m / "generation_config.json", eos_token_id=[300]
    ),
    r"tokenizer\.json: not a tokenizer": lambda m: (m / "tokenizer.json").write_text("[]"),
    r"tokenizer\.json: missing": lambda m: (m / "tokenizer.json").unlink(),
    r"tokenizer\.json: has 301 tokens, config.json only 300": lambda m: numbered_tokenizer(301).save(
        str(m / "tokenizer.json")
    ),
    r"tokenizer_config\.json: chat_template is no text": lambda m: edit(
        m / "tokenizer_config.json", chat_template=5
    ),
    r"pytorch_model\.bin is of a format that is not read": lambda m: (m / "model.safetensors").rename(
        m / "pytorch_model.bin"
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_one_message_before_anything_starts(message, tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    DAMAGES[message](model)
    config = ModelConfig(path=str(model))
    with pytest.raises(UserError, match=message) as refused:
        check(config, find(config))
    assert "\n" not in str(refused.value)


def test_a_sound_checkpoint_has_its_shape_and_a_file_is_no_directory(tmp_path):
    config = ModelConfig(path=str(tiny_checkpoint(tmp_path / "model")))
    assert check(config, find(config)).vocab_size == 300
    edit(tmp_path / "model" / "generation_config.json", eos_token_id=[7, 8])
    for own, expected in ({"content": "Ġ299"}, [7, 8, 299]), ("no token", [7, 8]), (None, [7, 8]):
        edit(tmp_path / "model" / "tokenizer_config.json", eos_token=own)
        assert eos_ids(tmp_path / "model") == expected
    for name in ("model/model.safetensors", "llama.gguf"):
        with pytest.raises(UserError, match=r"model\.path: .*GGUF and pickles are not read"):
            find(ModelConfig(path=str(tmp_path / name)))


def test_a_damaged_checkpoint_is_refused_without_torch_and_without_ray(tmp_path):
    cut(tiny_checkpoint(tmp_path / "model") / "model.safetensors")
    code = (
        "import sys; from serving.app import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"model.path={tmp_path / 'model'}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "2 []\n" and done.stderr.count("error: ") == done.stderr.count("\n") == 1
