"""What the laptop brings along: wheels for another machine, and a Python; by the real pip and uv."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from cluster.cli import RunError
from cluster.laptop import carry, commands, keys
from tests.commands import ROOT
from tests.standalone_python import downloads

pytestmark = pytest.mark.cluster  # pip and uv start several times
BACKEND = """
import zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "pure-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("pure.py", "")
        wheel.writestr("pure-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: pure\\nVersion: 1.0\\n")
        tag = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr("pure-1.0.dist-info/WHEEL", tag)
        wheel.writestr("pure-1.0.dist-info/RECORD", "")
    return name
"""


def make_wheel(folder, name, tag, requires=""):
    """A wheel of one empty module."""
    info = f"{name}-1.0.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An index of three packages (one in C, one without a wheel), and a project that needs them."""
    links, root = tmp_path / "links", tmp_path / "root"
    for folder in (links, root, tmp_path / "pure-1.0"):
        folder.mkdir()
    marker = "sys_platform == 'linux' and platform_machine == 'aarch64'"
    make_wheel(links, "tiny", "py3-none-any", f"pure==1.0; {marker}")
    for machine in ("aarch64", "x86_64"):
        make_wheel(links, "native", f"cp311-cp311-manylinux_2_17_{machine}")
    source = tmp_path / "pure-1.0"
    (source / "backend.py").write_text(BACKEND)
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: pure\nVersion: 1.0\n")
    project = "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
    (source / "pyproject.toml").write_text(f"{project}[project]\nname = 'pure'\nversion = '1.0'\n")
    with tarfile.open(links / "pure-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "pure-1.0")
    (root / "pyproject.toml").write_text("[project]\ndependencies = ['tiny', 'native']\n")
    (root / "constraints.txt").write_text("tiny==1.0\nnative==1.0\npure==1.0\n")
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(links))
    return root


def test_the_wheels_are_those_of_the_heads_machine_and_what_has_none_is_built(tmp_path, packages):
    for machine, more in (("aarch64", {"pure-1.0-py3-none-any.whl"}), ("x86_64", set())):
        wheels = tmp_path / machine
        carry.download(packages, wheels, python="3.11", machine=machine, glibc=28)
        native = f"native-1.0-cp311-cp311-manylinux_2_17_{machine}.whl"
        assert {file.name for file in wheels.iterdir()} == {"tiny-1.0-py3-none-any.whl", native} | more
    (packages / "constraints.txt").write_text("tiny==2.0\n")
    with pytest.raises(RunError, match=r"uv here: .*No solution"):
        carry.download(packages, tmp_path / "none", python="3.11", machine="x86_64", glibc=28)
    assert not (tmp_path / "none").exists()


def test_the_set_up_installs_from_the_carried_wheels_alone(tmp_path, packages, monkeypatch):
    """The set-up itself, by a real bash and pip, where no index is."""
    (packages / "cluster/head").mkdir(parents=True)
    for name in ("private.py", "head/setup.sh"):
        shutil.copy(ROOT / "cluster" / name, packages / "cluster" / name)
    scratch = tmp_path / "s"
    scratch.mkdir(mode=0o700)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    carry.download(packages, scratch / "wheels", python=version, machine=os.uname().machine, glibc=31)
    site = keys.Inventory(
        head="10.0.0.1", scratch="/SCRATCH", python=sys.executable, packages=keys.PackagesConfig(carried=True)
    )
    command = commands.setup(site).replace("/SCRATCH/code", str(packages)).replace("/SCRATCH", str(scratch))
    for tool in ("PIP", "UV"):
        monkeypatch.delenv(f"{tool}_NO_INDEX")
        monkeypatch.delenv(f"{tool}_FIND_LINKS")
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    (python,) = scratch.glob("env/*/bin/python")
    assert subprocess.run([python, "-c", "import tiny, native"]).returncode == 0


def test_a_python_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    """By the real uv, from an archive like those of its own list."""
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS_JSON_URL", str(downloads(tmp_path)))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    carry._fetch_python("cpython-3.11-linux-x86_64-gnu", tmp_path / "got/3.11-x86_64")
    python = tmp_path / "got/3.11-x86_64/bin/python3"
    told = "import ssl, venv, sys; print(sys.version)"
    ran = subprocess.run([python, "-c", told], capture_output=True, text=True)
    assert ran.stdout.startswith("3.11."), ran.stderr
    with pytest.raises(RunError, match="uv here"):
        carry._fetch_python("cpython-3.11-linux-riscv64-gnu", tmp_path / "got/3.11-riscv64")
    assert [file.name for file in (tmp_path / "got").iterdir()] == ["3.11-x86_64"]
