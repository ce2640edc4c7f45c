"""What the laptop brings along: a Python where the site has none, and packages where it has no index.

`python: uv` fetches a standalone CPython for the head by uv; `packages.carried: true` downloads the
wheels of the pinned environment for it. Both are kept in ~/.asuncion, and go to the head by rsync, which
continues after a lost link. The head passes them on to the workers.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from cluster import process
from cluster.cli import RunError
from cluster.laptop import commands
from cluster.laptop.keys import BROUGHT_PYTHON, Inventory
from cluster.laptop.ssh import Ssh, patiently, push, transfer
from cluster.session import ROOT

VERSION = "3.11"  # of the Python that is brought
GLIBC_MINORS = (40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 28, 17)  # of glibc 2, for which uv resolves
PATIENCE_SECONDS = 600.0  # for a link that is lost


def bring(site: Inventory, head: Ssh, *, report: Callable[[str], None]) -> None:
    """Send what the inventory says to bring along, unless the head has it.

    Raises:
        RunError: it cannot be had here, or the head is of another kind than Linux with glibc.
    """
    if site.python == BROUGHT_PYTHON:
        _bring_python(site, head, report=report)
    if site.packages.carried:
        _bring_wheels(site, head, report=report)


def _bring_python(site: Inventory, head: Ssh, *, report: Callable[[str], None]) -> None:
    place = f"{site.scratch}/python"
    script = f"{commands.claim_by_shell(site)}\ntest -e {place}/ready && echo yes || echo no; uname -sm"
    there, system = _answer(head, script, report=report)
    if there == "yes":
        return
    kind, _, machine = system.partition(" ")
    if kind != "Linux":
        raise RunError(f"{head.address}: is {system}, and a Python can be brought to Linux alone")
    local = Path("~/.asuncion/python").expanduser() / f"{VERSION}-{machine}"
    if not local.exists():
        report(f"fetching Python {VERSION} for {machine}, by uv")
        _fetch_python(f"cpython-{VERSION}-linux-{machine}-gnu", local)
    _send(head, local, place, report=report)
    _answer(head, f"touch {place}/ready", report=report)


def _fetch_python(which: str, target: Path) -> None:
    """A standalone Python as the folder `target`, which is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _run([*_uv(), "python", "install", "--install-dir", folder, "--no-bin", "--force", which])
        (found,) = [each for each in Path(folder).iterdir() if each.is_dir() and not each.is_symlink()
                    and each.name.startswith("cpython")]  # fmt: skip
        found.rename(target)


def _bring_wheels(site: Inventory, head: Ssh, *, report: Callable[[str], None]) -> None:
    ask = "json.dumps([*sys.version_info[:2], platform.machine(), *platform.libc_ver()])"
    ask = f"import json, platform, sys; print({ask})"
    (line,) = _answer(head, f"{commands.interpreter(site)} -c {shlex.quote(ask)}", report=report)
    major, minor, machine, libc, version = json.loads(line)
    if libc != "glibc":
        raise RunError(f"{head.address}: its Python is not built on glibc; packages cannot be carried there")
    pinned = [(ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml")]
    digest = hashlib.sha256(b"".join([*pinned, line.encode()])).hexdigest()[:12]
    local = Path("~/.asuncion/wheels").expanduser() / digest
    if not local.exists():
        report(f"downloading the packages for Python {major}.{minor} on {machine}")
        download(ROOT, local, python=f"{major}.{minor}", machine=machine, glibc=int(version.split(".")[1]))
    _send(head, local, f"{site.scratch}/wheels", report=report)


def download(root: Path, target: Path, *, python: str, machine: str, glibc: int) -> None:
    """The wheels of the environment that `root` pins, as the folder `target`, which is whole or absent.

    What has no wheel is built here, and must be pure Python.

    Args:
        root: has pyproject.toml and constraints.txt.
        python: version of the Python that they are for, such as 3.11.
        machine: such as x86_64.
        glibc: its minor version there: 28 of glibc 2.28.

    Raises:
        RunError: a package cannot be had, or not for there.
    """
    minor = next((each for each in GLIBC_MINORS if each <= glibc), GLIBC_MINORS[-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary)
        wanted, exact = folder / "wanted.txt", folder / "exact.txt"
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        wanted.write_text("\n".join(project["dependencies"]))
        _run(
            [*_uv(), "pip", "compile", "--quiet", "--no-annotate", "--output-file", exact, wanted,
             "--constraint", root / "constraints.txt", "--python-version", python,
             "--python-platform", f"{machine}-manylinux_2_{minor}"]
        )  # fmt: skip
        wheels = folder / "wheels"
        tags = [f"--platform=manylinux_2_{each}_{machine}" for each in range(glibc, 4, -1)]
        tags += [f"--platform=manylinux{each}_{machine}" for each in (2014, 2010, 1)]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        _run(
            [*pip, "download", "--no-deps", "--requirement", exact, "--dest", wheels, *tags,
             "--python-version", python, "--implementation", "cp", "--abi", f"cp{python.replace('.', '')}",
             "--abi", "abi3", "--abi", "none"]
        )  # fmt: skip
        for source in [each for each in wheels.iterdir() if each.suffix != ".whl"]:
            _run([*pip, "wheel", "--no-deps", "--wheel-dir", folder / "built", source])
            source.unlink()
        for built in (folder / "built").glob("*.whl"):
            if not built.stem.endswith("-none-any"):
                raise RunError(
                    f"{built.name}: has no wheel for {machine}, and is not pure Python; it cannot be carried"
                )
            built.rename(wheels / built.name)
        wheels.rename(target)


def _uv() -> list[str]:
    """uv: a single binary that resolves for another platform, and knows the builds of CPython.

    It is taken from this environment or the PATH, or else installed for this user.
    """
    places = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    if found := shutil.which("uv", path=places):
        return [found]
    folder = Path("~/.asuncion/uv").expanduser()
    if not (folder / "bin/uv").exists():
        pinned = ("--constraint", ROOT / "constraints.txt")
        _run([sys.executable, "-m", "pip", "install", "--quiet", *pinned, "--target", folder, "uv"])
    return [str(folder / "bin/uv")]


def _run(command: list[str | Path]) -> None:
    done = process.run([str(part) for part in command], whole_tree=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if re.search(r"\w", line)]
        errors = [line for line in said if "rror" in line] or said
        what = "pip" if command[0] == sys.executable else "uv"
        raise RunError(f"{what} here: {errors[0].strip() if errors else done.returncode}")


def _answer(head: Ssh, script: str, *, report: Callable[[str], None]) -> list[str]:
    said = patiently(lambda: head.run(script), patience=PATIENCE_SECONDS, report=report)
    return said.decode().splitlines()


def _send(head: Ssh, source: Path, target: str, *, report: Callable[[str], None]) -> None:
    """Make a folder of the head equal to one here."""
    size = sum(each.stat().st_size for each in source.rglob("*") if each.is_file() and not each.is_symlink())
    report(f"{head.address}: bringing {source.parent.name}, {size / 1e9:.2f} GB, to {target}")
    transfer(head, push(head, source, target), patience=PATIENCE_SECONDS, report=report)
