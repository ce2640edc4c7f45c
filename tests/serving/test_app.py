"""The serving command before anything starts: its plan, and what it refuses."""

import socket

import pytest

from cluster.cli import BAD_INPUT
from serving.app import main

RANDOM = ("model.weights=random", "model.shape=llama-1b4")


def test_a_dry_run_prints_the_configuration_and_the_sizes(capsys):
    assert main(["--dry-run", *RANDOM, "engine.cache_tokens=131072"]) == 0
    shown = capsys.readouterr().out
    assert "cache_tokens: 131072" in shown and "from random weights" in shown
    lines = {name: text.strip() for name, _, text in (line.partition("  ") for line in shown.splitlines())}
    assert lines["parameters"] == "1,420,396,544 (1.4204B)"
    assert lines["weights"] == "2,840.8 MB in bfloat16"
    # 2 (keys, values) x 24 layers x 2048 x 2 bytes a token
    assert lines["cache"] == "25,769.8 MB: keys and values of 131,072 tokens, 196,608 bytes each"


def test_float32_is_twice_as_large(capsys):
    assert main(["--dry-run", *RANDOM, "engine.dtype=float32"]) == 0
    assert "5,681.6 MB in float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["model.path=nowhere"], ["model.path: 'nowhere'", "make train"]),
        (["model.weights=random"], ["model.shape"]),
        (["model.weights=random", "model.shape=llama-9t"], ["model.shape: llama-9t", "llama-1b4"]),
        (["deployment.prot=80"], ["deployment.prot", "unknown key", "haproxy"]),
        (["deployment.port=70000"], ["deployment.port", "65535"]),
        (["deployment.replicas=2", "deployment.max_replicas=1"], ["deployment.max_replicas"]),
        (["deployment.cors_origins=[https://a.example/]"], ["deployment.cors_origins", "without a path"]),
        (["engine.kind=tgi"], ["engine.kind", "vllm"]),
        (["engine.step_tokens=8"], ["engine.step_tokens", "engine.slots"]),
    ],
    ids=str,
)
def test_a_bad_key_is_one_message_that_names_it(arguments, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dry in ([], ["--dry-run"]):
        assert main([*dry, *arguments]) == BAD_INPUT
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "Traceback" not in error
        for part in parts:
            assert part in error


def test_a_port_that_is_taken_is_refused_at_once(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*RANDOM, f"deployment.port={port}"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert f"deployment.port: 127.0.0.1:{port} cannot be bound" in error and "deployment.host" in error
