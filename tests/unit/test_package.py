"""The code that travels to a cluster."""

import io
import subprocess
import zipfile

import pytest

from cluster import package
from cluster.cli import UserError


def checkout(folder):
    """A git checkout with a file of ours, an ignored one, and one outside our rooms."""
    subprocess.run(["git", "init", "-q", folder], check=True)
    (folder / "cluster").mkdir()
    (folder / "cluster/tool.py").write_text("pass\n")
    (folder / "cluster/wandb.key").write_text("secret")
    (folder / "outputs").mkdir()
    (folder / "outputs/run.bin").write_text("data")
    (folder / ".gitignore").write_text("*.key\n")
    return folder


def names(packed):
    return zipfile.ZipFile(io.BytesIO(packed.data)).namelist()


def test_code_travels_and_neither_data_nor_what_git_ignores(tmp_path):
    packed = package.pack(root=checkout(tmp_path), more={"run.yaml": "a: 1\n"})
    assert names(packed) == ["cluster/tool.py", "run.yaml"]


def test_the_same_code_has_the_same_digest_and_another_has_another(tmp_path):
    first = package.pack(root=checkout(tmp_path))
    (tmp_path / "cluster/tool.py").touch()
    assert package.pack(root=tmp_path) == first
    (tmp_path / "cluster/tool.py").write_text("pass  # changed\n")
    assert package.pack(root=tmp_path).digest != first.digest


def test_without_git_our_rooms_travel(tmp_path):
    (tmp_path / "cluster/__pycache__").mkdir(parents=True)
    (tmp_path / "cluster/tool.py").write_text("pass\n")
    (tmp_path / "cluster/__pycache__/tool.pyc").write_text("")
    assert names(package.pack(root=tmp_path)) == ["cluster/tool.py"]


def test_too_much_is_refused_with_the_largest_file_named(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MAX_BYTES", 300)
    folder = checkout(tmp_path)
    (folder / "cluster/weights.py").write_text("".join(f"{i * 7919 % 10007}" for i in range(500)))
    with pytest.raises(UserError, match=r"cluster/weights\.py .*\.gitignore"):
        package.pack(root=folder)


def test_our_own_code_is_well_below_the_cap():
    packed = package.pack()
    assert len(packed.data) < package.MAX_BYTES / 5
    assert {"cluster/setup.sh", "cluster/simd.h", "optim/native.cpp", "pyproject.toml"} <= set(names(packed))
    assert not any(name.startswith(("tests/", ".git", "outputs/", "data/")) for name in names(packed))
