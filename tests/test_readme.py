"""README's commands and file tree are true."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

README = (ROOT / "README.md").read_text()
ROOMS = ("cluster", "optim", "training", "serving")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("make ", ".venv/bin/python "))
]
COMMANDS += re.findall(r"`(torchrun [^`]*)`", README)


def dry(command: str) -> list[str]:
    """The command with this interpreter, and stopped before it does anything that takes long."""
    words = shlex.split(command)
    if words[0] == "make":
        venv = Path(sys.prefix)
        # This environment stands in for .venv, so that nothing is installed by the test.
        make = ["make", f"VENV={venv}", f"--old-file={venv}/ready"]
        if words[1] == "train":
            arguments = next((word for word in words if word.startswith("ARGS=")), "ARGS=")
            others = [word for word in words[1:] if not word.startswith("ARGS=")]
            return [*make, *others, f"{arguments} --dry-run"]
        return [*make, "--dry-run", *words[1:]]
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *words[1:], "--dry-run"]
    words[0] = sys.executable
    return words if "--dry-run" in words else [*words, "--help"]


def test_readme_has_the_front_doors() -> None:
    assert {"make train", "make test"} <= set(COMMANDS) and len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_readme_command_runs(command: str) -> None:
    # No command needs another variable: people start them by `env -i`, cron and ssh too.
    environment = {name: os.environ[name] for name in ("HOME", "PATH")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        dry(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout or "usage:" in done.stdout or "parameters" in done.stdout


def test_the_1b4_dry_run_says_what_readme_promises() -> None:
    [command] = [command for command in COMMANDS if "--dry-run" in command]
    done = subprocess.run(dry(command), cwd=ROOT, capture_output=True, text=True, timeout=120)
    for part in ("1.4204B", "weights", "gradients", "momentum", "activations", "tokens per step", "steps"):
        assert part in done.stdout


def mapped(readme: Path) -> set[str]:
    """Paths without .py, from the first block: `a, b   what they do`, and `folder/   c, d: what they do`."""
    paths = set()
    for line in re.findall(r"```\n(.*?)```", readme.read_text(), flags=re.DOTALL)[0].splitlines():
        first, _, rest = line.strip().partition(" ")
        folder = first if first.endswith("/") else ""
        names = rest.partition(":")[0] if folder else re.split(r"\s{2,}", line.strip())[0]
        paths |= {f"{folder}{name.strip()}" for name in names.split(",")}
    return paths


@pytest.mark.parametrize("room", ROOMS)
def test_the_map_of_a_room_is_complete(room: str) -> None:
    folder = ROOT / room
    files = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.py")}
    names = mapped(folder / "README.md")
    missing = {file for file in files if not Path(file).name.startswith("__")} - names
    assert missing == set(), f"{room}/README.md: name these files in the map at its top"
    gone = {name for name in names - files if not (folder / name).is_file()}
    assert gone == set(), f"{room}/README.md: its map names files that are not there"


@pytest.mark.parametrize("readme", ["README.md", *(f"{room}/README.md" for room in ROOMS)])
def test_every_file_that_a_readme_names_is_there(readme: str) -> None:
    file = ROOT / readme
    if not file.is_file():
        pytest.skip("this room has none yet")
    named = re.findall(r"`((?:tests|cluster|optim|training|serving)/[\w/.-]+\.\w+)`", file.read_text())
    assert [name for name in named if "/mine" not in name and not (ROOT / name).exists()] == []


# Stands for python3: the environment that it makes has a pip and a python that only say so.
PYTHON = """#!/bin/sh
mkdir -p .venv/bin
printf '#!/bin/sh\\necho pip "$@"; exit %s\\n' "$PIP_CODE" > .venv/bin/pip
printf '#!/bin/sh\\necho python "$@"\\n' > .venv/bin/python
chmod +x .venv/bin/pip .venv/bin/python
"""


@pytest.mark.parametrize("code", [0, 3])
def test_the_first_make_says_what_it_installs_and_how_long_it_took(tmp_path: Path, code: int) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PIP_CODE": str(code)}
    make = ["make", "train", "PYTHON=./python"]
    done = subprocess.run(make, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(".venv: installing Python packages") and "minutes" in lines[0]
    pip = next(number for number, line in enumerate(lines) if line.startswith("pip install"))
    assert "--constraint constraints.txt" in lines[pip] and "--quiet" not in lines[pip]
    assert (tmp_path / ".venv" / "ready").exists() == (code == 0) == (done.returncode == 0)
    if code == 0:
        assert re.fullmatch(r"\.venv: ready after \d+ s", lines[pip + 1])
        assert lines[-1].strip() == "python -m training.launch"
