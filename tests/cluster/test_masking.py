"""What a record, a log and an error message may say of a secret: nothing."""

import json
import os
from pathlib import Path

import pytest

from cluster import cli, config
from cluster.masking import MASK, is_secret, mask, mask_secrets, masked
from cluster.record import provenance, wandb_mirror
from cluster.record.record import Record
from training.run import workers

HEX40 = "0123456789abcdef" * 2 + "01234567"
SECRET = "s3cr3t-Value"

SAYS_A_SECRET = [
    f"https://user:{SECRET}@host/x",
    f"redis://:{SECRET}@host:1",
    f"https://user:p@{SECRET}@host/x",
    f"GET /v1/models?api_key={SECRET}&limit=3",
    f"GET /v1?a=1&key={SECRET} HTTP/1.1",
    f"https://host/file?X-Amz-Signature={SECRET}#top",
    f"https://host/?access%5Ftoken={SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"authorization:Basic {SECRET}==",
    f"{{'Authorization': 'Token {SECRET}', 'n': 1}}",
    f"[(b'authorization', b'Bearer {SECRET}')]",
    f'{{"headers": {{"X-Api-Key": "{SECRET}"}}}}',
    f'"{{\\"api_key\\": \\"{SECRET}\\"}}"',
    f"Set-Cookie: session={SECRET}; Path=/",
    f"sent bearer {SECRET}",
    f"WANDB_API_KEY={SECRET}",
    f"export HF_TOKEN='{SECRET}'",
    f"password = {SECRET}",
    f'password="a b {SECRET}"',
    f"aws_secret_access_key: {SECRET}",
    f"machine api.wandb.ai login user password {SECRET}",
    f"Server=host;User Id=me;Pwd={SECRET};",
    f'{{"SecretAccessKey":\n  "{SECRET}"}}',
    f"client_secret: {SECRET}",
    f"curl --token {SECRET} --limit 3",
    f"curl --api-key='{SECRET}'",
    f"API key {HEX40} is not valid",
    f"wandb: invalid key: '{HEX40}'",
    "hf_" + "AbCdEfGhIj" * 3,
    "sk-proj-" + "AbCdEfGhIj" * 3,
    "wandb_v1_" + "AbCdEfGhIj" * 5,
    "ghp_" + "AbCdEfGhIj" * 3,
    "AKIAABCDEFGHIJKLMNOP",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefgh_123",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n-----END OPENSSH PRIVATE KEY-----",
    f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
]
SAYS_NONE = [
    "batch.tokens=16384",
    "data.tokenizer=train",
    "expected key=value, for example batch.tokens=16384",
    "unknown key 'nope'; keys here: name, flag",
    "ssh.key: must be one line",
    f"commit {HEX40}, dirty",
    "12.5 ms per token: 3, at p99",
    "ms per token: 12.5",
    "git@github.com:owner/name.git",
    "https://host/a@b?limit=3",
    "endpoint: one that asks for a key takes it from OPENAI_API_KEY",
    "no end-of-text token; add one of its names",
    "/home/me/outputs/first-light/checkpoints",
]


@pytest.mark.parametrize("text", SAYS_A_SECRET)
def test_a_secret_is_masked_wherever_it_stands(text):
    found = mask(f"before {text} after")
    assert MASK in found and found.startswith("before ")
    assert not any(secret in found for secret in (SECRET, HEX40, "AbCdEfGhIj", "AKIA", "eyJ"))
    assert mask(found) == found
    assert MASK in masked({"rows": [[text]]})["rows"][0][0]


WITHIN = [  # how one text comes to stand within another
    json.dumps,
    repr,
    lambda text: repr(ValueError(text)),
    lambda text: repr(text.encode()),
    lambda text: json.dumps(json.dumps({"error": text, "n": 1})),
    lambda text: f"Traceback (most recent call last):\n  ...\nValueError: {text}\n",
]


@pytest.mark.parametrize("within", WITHIN)
def test_a_secret_is_masked_in_a_text_within_a_text(within):
    for text in SAYS_A_SECRET:
        found = mask(within(text))
        assert not any(secret in found for secret in (SECRET, HEX40, "AbCdEfGhIj", "AKIA", "eyJ")), found
    for text in SAYS_NONE:
        assert mask(within(text)) == within(text)


@pytest.mark.parametrize("text", SAYS_NONE)
def test_text_without_a_secret_stays(text):
    assert mask(text) == text


def test_the_rest_of_a_line_stays():
    assert mask(f"GET http://u:{SECRET}@h:1/v1?api_key={SECRET}&n=3 -> 401") == (
        f"GET http://{MASK}@h:1/v1?api_key={MASK}&n=3 -> 401"
    )
    assert json.loads(mask(json.dumps({"token": SECRET, "n": 1}))) == {"token": MASK, "n": 1}


def test_the_values_of_secret_variables_are_masked_without_a_name_beside_them(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", f"plain{SECRET}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"plain{SECRET}andmore")
    monkeypatch.setenv("HF_TOKEN", "short")  # too short to be told from a word
    assert mask(f"x plain{SECRET}andmore y plain{SECRET} short") == f"x {MASK} y {MASK} short"
    assert mask(os.getcwd()) == os.getcwd()  # which is the value of PWD


def test_numbers_and_names_of_a_record_stay_and_values_under_a_secrets_name_go():
    row = {"step": 3, "tokens": 512, "lr": 0.1, "device": "cpu", "samples": {"The key": "is here"}}
    assert masked(row) == row
    assert masked({"env": {"HF_TOKEN": SECRET, "DEBUG": "1"}, "api_key": SECRET, "password": ""}) == {
        "env": {"HF_TOKEN": MASK, "DEBUG": "1"},
        "api_key": MASK,
        "password": "",
    }
    assert is_secret("api_key") and is_secret("optim.token") and not is_secret("key")


def test_a_command_line_is_masked_by_the_names_of_its_arguments():
    assert provenance.mask_secrets is mask_secrets
    assert mask_secrets(["x", "--key", SECRET, f"a.key={SECRET}", f"http://u:{SECRET}@h"]) == [
        "x", "--key", MASK, f"a.key={MASK}", f"http://{MASK}@h",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [cli.UserError, cli.RunError, config.ConfigError, OSError, ValueError])
def test_a_command_that_fails_says_no_secret(kind, capsys):
    def body() -> None:
        raise kind(f"GET http://host/?api_key={SECRET}: refused")

    assert cli.run(body) == (cli.BAD_INPUT if kind in (cli.UserError, config.ConfigError) else cli.FAILED)
    said = capsys.readouterr().err
    assert "refused" in said and f"api_key={MASK}" in said and SECRET not in said
    assert ("Traceback" in said) == (kind is ValueError)


def test_a_message_with_control_characters_of_an_input_stays_one_line(capsys):
    def body() -> None:
        raise cli.UserError("data.sources=\x1e\u2028: é is no source")

    assert cli.run(body) == cli.BAD_INPUT
    assert capsys.readouterr().err.splitlines() == ["error: data.sources=\\x1e\\u2028: é is no source"]


def test_a_failed_worker_s_log_says_no_secret_and_only_its_owner_reads_it(tmp_path):
    log = tmp_path / "failure.log"
    error = RuntimeError(f"Traceback\n  ...\nHTTPError: 401 for http://host/?token={SECRET}")
    assert workers._reason(error, tmp_path) == f"HTTPError: 401 for http://host/?token={MASK}"
    assert "HTTPError: 401" in log.read_text() and SECRET not in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_what_the_record_says_of_wandb_holds_no_key():
    assert (
        wandb_mirror._reason(ValueError(f"API key\n  {HEX40} is wrong"))
        == f"ValueError: API key {MASK} is wrong"
    )


def test_other_results_follow_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        run = tmp_path / "run"
        with Record.open(
            run, config={}, provenance={}, wandb_mode="disabled", project="p", group=None, name="n",
            resume_step=None,
        ) as open_record:  # fmt: skip
            open_record.log({"step": 1})
            open_record.finish({})
    finally:
        os.umask(before)
    # Checkpoints and exports: tests/training/test_export.py
    modes = {path.name: path.stat().st_mode & 0o777 for path in [run, *Path(run).iterdir()]}
    assert modes.pop("run") == 0o775
    assert len(modes) == 4 and set(modes.values()) == {0o664}
