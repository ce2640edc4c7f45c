"""What Triton needs on a node, on nodes that are simulated by a path and a folder of headers."""

from pathlib import Path

import pytest

from cluster.machine import toolchain
from cluster.preflight import inspection


@pytest.fixture
def node(tmp_path, monkeypatch) -> Path:
    """One with gcc and headers."""
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "_include", lambda: str(tmp_path))
    for name in ("CC", *toolchain.HEADER_PATHS):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_compiler_and_headers_are_all_that_is_needed(node):
    assert toolchain.missing() is None
    (node / "gcc").rename(node / "clang")
    assert toolchain.missing() is None


def test_a_node_without_a_compiler_is_told_what_to_install(node):
    (node / "gcc").unlink()
    said = "Triton needs a C compiler, and neither gcc nor clang is on the path: `apt install gcc`, or set CC"
    assert toolchain.missing() == f"{said} to another"


def test_a_compiler_that_is_named_and_missing_is_an_error_as_it_is_for_triton(node, monkeypatch):
    monkeypatch.setenv("CC", str(node / "icx"))
    assert f"CC={node / 'icx'} is not on the path" in toolchain.missing()
    (node / "gcc").rename(node / "icx")
    assert toolchain.missing() is None


def test_a_node_without_headers_is_told_what_to_install(node, monkeypatch):
    (node / "Python.h").unlink()
    assert toolchain.missing().startswith(
        f"Triton needs Python.h, which is not in {node}: `apt install python3."
    )
    (node / "elsewhere").mkdir()
    (node / "elsewhere/Python.h").touch()
    monkeypatch.setenv("CPATH", f"/nowhere:{node / 'elsewhere'}")
    assert toolchain.missing() is None


def test_the_headers_are_sought_where_triton_seeks_them(monkeypatch):
    """Its build is called with a compiler that only says what it was asked."""
    from triton.runtime import build

    asked: list[str] = []
    monkeypatch.setattr(build.subprocess, "check_call", lambda command, **_: asked.extend(command))
    build._build("x", "x.c", "/tmp", [], [], [], [])
    assert f"-I{toolchain._include()}" in asked


def test_a_preflight_asks_every_node(node, tmp_path, monkeypatch):
    facts = inspection.Inspector().facts(str(tmp_path), str(tmp_path), "mark", 4_000_000, ())
    assert facts["toolchain_problem"] is None
    (node / "gcc").unlink()
    facts = inspection.Inspector().facts(str(tmp_path), str(tmp_path), "mark", 4_000_000, ())
    assert "C compiler" in facts["toolchain_problem"]
