"""The READMEs and the Makefile: commands run, and files, tests and links that they name are there."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.commands import ROOT
from tests.waiting import PATIENCE_SECONDS

OURS = ("cluster", "optim", "training", "serving", "tests")
NOT_OURS = {  # made by a user or a run, or Ray's
    *("cluster/mine.yaml", "cluster/mine.inventory.yaml", "my.yaml", "secrets.yaml", "config.yaml"),
    "dashboard.py",
}
ROOMS = ("cluster", "optim", "training", "serving")
READMES = ["README.md", "CHANGELOG.md", *(f"{room}/README.md" for room in (*ROOMS, "tests"))]
READMES += sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/*/README.md"))
TEXTS = {readme: (ROOT / readme).read_text() for readme in READMES}
COMMANDS = list(
    dict.fromkeys(
        line.split("  #")[0].strip()
        for text in TEXTS.values()
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
    )
)
SUFFIXES = "py|cpp|h|sh|md|yaml|svg"


def dry(command: str) -> list[str]:
    """The command with this interpreter, and stopped before it does anything that takes long."""
    words = shlex.split(command)
    words = [word for word in words if not word.startswith("ASUNCION_")]
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


@functools.cache
def run(command: str) -> subprocess.CompletedProcess[str]:
    # No command needs another variable: people start them by `env -i`, cron and ssh too.
    environment = {name: os.environ[name] for name in ("HOME", "PATH")} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        dry(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_readme_command_runs(command: str) -> None:
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout or "usage:" in done.stdout or "parameters" in done.stdout


def test_the_1b4_dry_run_says_what_readme_promises() -> None:
    [command] = [command for command in COMMANDS if "--dry-run" in command]
    done = run(command)
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


each_readme = pytest.mark.parametrize("readme", READMES)


@each_readme
def test_every_file_that_a_readme_names_is_there(readme: str) -> None:
    places = (ROOT, (ROOT / readme).parent)
    named = re.findall(r"`((?:tests|cluster|optim|training|serving)/[\w/.-]+\.\w+)`", TEXTS[readme])
    named += re.findall(rf"`([\w/.-]+\.(?:{SUFFIXES}))`", TEXTS[readme])
    named += re.findall(r"CONFIG=(\S+\.yaml)", TEXTS[readme])
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    assert missing - NOT_OURS == set()


@each_readme
def test_every_module_that_a_readme_names_is_there(readme: str) -> None:
    text = TEXTS[readme].replace("`python -m ...`", "")
    named = {name for name in re.findall(r"-m ([a-z_]+[\w.]*)", text) if name.partition(".")[0] in OURS}
    now = {name for name in named if f"| `python -m {name}` | `" not in text}  # not CHANGELOG's old names
    assert [name for name in sorted(now) if find_spec(name) is None] == []


@each_readme
def test_every_test_that_a_readme_names_is_there(readme: str) -> None:
    """`tests/a/test_b.py`: `test_c`, `test_d`."""
    missing = []
    for file, names in re.findall(r"`(tests/[\w/]+\.py)`((?:[:,] `test_\w+`)*)", TEXTS[readme]):
        functions = re.findall(r"^def (test_\w+)\(", (ROOT / file).read_text(), flags=re.MULTILINE)
        missing += [f"{file}: {name}" for name in re.findall(r"test_\w+", names) if name not in functions]
    assert missing == []
    everywhere = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", TEXTS[readme])
    assert [name for name in named if f"def {name}(" not in everywhere] == []


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_every_claim_names_the_test_that_shows_it(room: str) -> None:
    _, _, section = TEXTS[f"{room}/README.md"].partition("## What holds, and where it is shown")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 3
    assert [row for row in rows if not re.search(r"\| `tests/[\w/]+\.py`", row)] == []


@each_readme
def test_every_table_is_rendered_as_one(readme: str) -> None:
    """A blank line within a table would leave the rows below it as text."""
    tokens = MarkdownIt("commonmark").enable("table").parse(TEXTS[readme])
    assert not [
        line
        for token in tokens
        if token.type == "inline" and token.level < 3
        for line in token.content.splitlines()
        if line.startswith("|") and line.endswith("|")
    ]


@each_readme
def test_every_link_leads_somewhere(readme: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[readme])
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in local if not ((ROOT / readme).parent / link).exists()] == []


def test_make_help_has_a_line_for_each_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"\.PHONY: ((?:.*\\\n)*.*)", makefile)[1].replace("\\\n", " ").split()
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert sorted(words[0] for words in lines if words and words[0] in targets) == sorted(targets)
    assert len(targets) > 20 and all(len(words[1]) > 10 for words in lines if words and words[0] in targets)


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
    limit = {"timeout": PATIENCE_SECONDS}
    done = subprocess.run(make, cwd=tmp_path, env=environment, capture_output=True, text=True, **limit)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(".venv: installing Python packages") and "minutes" in lines[0]
    pip = next(number for number, line in enumerate(lines) if line.startswith("pip install"))
    assert "--constraint constraints.txt" in lines[pip] and "--quiet" not in lines[pip]
    assert (tmp_path / ".venv" / "ready").exists() == (code == 0) == (done.returncode == 0)
    if code == 0:
        assert re.fullmatch(r"\.venv: ready after \d+ s", lines[pip + 1])
        assert lines[-1].strip() == "python -m training.launch"
