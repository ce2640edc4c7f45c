"""Collect what a lent GPU machine lacks, as wheels in an ignored folder that travels with the working tree.

    python -m tests.gpu.wheels [--into FOLDER]

The machine has Python 3.12, torch, Triton, numpy and transformers, and reaches nothing. Versions are those of
constraints.txt. DeepSpeed is published as source alone; its wheel is built here without its compiled
operators, which we do not use. The last line on stdout is the command to run there: the commit is in it
because the copy of the working tree has no git folder.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster import cli
from cluster.cli import RunError
from cluster.record import provenance
from cluster.session import ROOT

FOLDER = ROOT / ".whl"
PYTHON = "3.12"
PUBLISHED = ("omegaconf", "hjson", "pydantic", "pydantic_core", "annotated-types", "typing-inspection")
SOURCE = "deepspeed"
COMMAND = (
    "python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "
    ".whl/*.whl && export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 ASUNCION_COMMIT={commit} "
    "&& python3 -m tests.gpu --out $OUT"
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="FOLDER", help="default: .whl")
    options = parser.parse_args(arguments)

    def body() -> None:
        wheels = collect(options.into)
        size = sum(wheel.stat().st_size for wheel in wheels)
        print("\n".join(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}" for wheel in wheels))
        print(f"{size / 1e6:6.2f} MB  in {options.into}")
        print(
            COMMAND.format(commit=provenance.commit_environment().get(provenance.COMMIT_VARIABLE, "unknown"))
        )

    return cli.run(body)


def collect(folder: Path) -> list[Path]:
    """Fill the folder anew; two versions of a package would stop its installation. Raises `RunError`."""
    pinned = pins((ROOT / "constraints.txt").read_text())
    with tempfile.TemporaryDirectory() as place:
        names = [f"{name}=={pinned[canonical(name)]}" for name in PUBLISHED]
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        only = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
        pip("download", "--no-deps", *only, "-d", place, *names)
        pip("wheel", "--no-deps", "-w", place, f"{SOURCE}=={pinned[SOURCE]}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place, folder)
    return sorted(folder.glob("*.whl"))


def pins(text: str) -> dict[str, str]:
    """Canonical name -> version, of each line of constraints.txt."""
    lines = (line.partition("==") for line in text.splitlines() if "==" in line)
    return {canonical(name): version.strip() for name, _, version in lines}


def canonical(name: str) -> str:
    """As packages are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(*arguments: str) -> None:
    """Run pip. Raises `RunError`, with its last line."""
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RunError(
            f"pip {arguments[0]} failed: {(errors or done.stderr.splitlines() or ['no message'])[-1]}"
        )


if __name__ == "__main__":
    sys.exit(main())
