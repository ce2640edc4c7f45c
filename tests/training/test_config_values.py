"""Values that no configuration may hold: references outside it, and secrets."""

import json

import pytest

from tests.training.config_refusal import Outer, load_text, refusal

OUTSIDE = [
    "${oc.env:CANARY}",
    "${oc.env:CANARY,default}",
    "before ${oc.env:CANARY} after",
    "${oc.decode:${oc.env:CANARY}}",
    "${${inner.unit}:CANARY}",
    "${oc.select:name}",
    "${somebodys:CANARY}",
    "\\${oc.env:CANARY}",  # config.yaml would hold it unescaped, and the next start would read that
]


@pytest.mark.parametrize("value", OUTSIDE)
def test_a_value_that_reads_something_outside_the_configuration_is_refused(value, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", "canary")
    said = refusal(f"name={value}", schema=Outer)
    assert ": name: " in said and "give the value itself" in said and "canary" not in said
    file = tmp_path / "c.yaml"
    for text in (
        f"name: {json.dumps(value)}\n",
        f"words: [a, {json.dumps(value)}]\n",
        f"inner: {json.dumps(value)}\n",
        f"inner:\n  size: {json.dumps(value)}\n",
        f"name: !!python/object/apply:pathlib.PosixPath [{json.dumps(value)}]\n",
        f"? {json.dumps(value)}\n: 1\n",
    ):
        file.write_text(text)
        said = refusal(file=file, schema=Outer)
        assert said.startswith(f"{file}: ") and "give the value itself" in said and "canary" not in said


def test_a_value_that_config_yaml_could_not_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", "canary")
    for name in ("\\${inner.size}", "${words[0]}{oc.env:CANARY}"):
        said = refusal("words=[$]", f"name={name}", schema=Outer)
        assert said.startswith("name: '${") and "config.yaml" in said and "canary" not in said


def test_a_value_may_be_that_of_another_key(tmp_path):
    assert load_text(tmp_path, "name: ${inner.size} of ${ words[0] }\n").name == "1 of a"


@pytest.mark.parametrize("value", ["http://me:pass@host:1", "http://host/?api_key=x", "hf_" + "a1" * 16])
def test_a_value_that_looks_like_a_secret_is_refused(value, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"words: [{value}]\n")
    for said in (refusal(f"name={value}", schema=Outer), refusal(file=file, schema=Outer)):
        assert "looks like a secret" in said and "environment variable" in said and value not in said


def test_an_unknown_key_of_a_secrets_name_is_refused_without_its_value():
    assert refusal("api_key=hunter2", schema=Outer).startswith("api_key=***: unknown key 'api_key'")


def test_a_yaml_key_with_a_dot_is_an_unknown_key(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("inner.size: 2\n")
    assert "unknown key 'inner.size'" in refusal(file=file, schema=Outer)
    file.write_text("nope.size: 2\n")
    assert "unknown key 'nope.size'; keys here: name" in refusal(file=file, schema=Outer)
