"""What is said where no run, or none of that name, is there: the same to those who serve and who evaluate."""

import pytest

from cluster.cli import UserError
from serving import checkpoints
from serving.config import ModelConfig
from training.evaluate import checkpoint

FINDERS = {
    "model": checkpoint.find,
    "model.path": lambda path: checkpoints.find(ModelConfig(path=path)),
}


@pytest.mark.parametrize("key", FINDERS)
def test_a_name_that_is_no_run_lists_those_that_are(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        (tmp_path / "outputs" / name / "checkpoints/step-0000003").mkdir(parents=True)
        (tmp_path / "outputs" / name / "checkpoints/step-0000003/COMPLETE").write_text("")
    (tmp_path / "outputs/broken-off").mkdir()
    with pytest.raises(UserError) as error:
        FINDERS[key]("tinny")
    said = str(error.value)
    assert said.startswith(f"{key}: 'tinny' is neither a Hugging Face directory with a config.json nor a run")
    assert said.endswith(f"runs in {tmp_path}/outputs: a, b; train one with `make train`")


@pytest.mark.parametrize("key", FINDERS)
def test_without_any_run_the_newest_is_an_error_with_its_remedies(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        FINDERS[key]("newest")
    said = str(error.value)
    assert said.startswith(f"{key}: no run with a complete checkpoint in {tmp_path}/outputs; train one with")
    assert "a Hugging Face" in said
