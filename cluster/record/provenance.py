"""Where a result comes from: code, versions, data, machine, time and command. Never a secret."""

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.machine.host import describe_host
from cluster.masking import mask_secrets

NOT_CODE = ":(exclude)tests/baselines"  # a bench that writes its file does not change the code
COMMIT_VARIABLE = "ASUNCION_COMMIT"
PACKAGES = ("torch", "deepspeed", "ray", "wandb", "numpy", "tokenizers", "safetensors")

_ROOT = Path(__file__).resolve().parents[2]


def collect(
    *,
    command: Sequence[str],
    data_fingerprint: str | None,
    packages: Sequence[str] = PACKAGES,
    config_changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything needed to tell where a run came from, as JSON-ready values.

    Args:
        command: the command line, such as `sys.argv`; values that look like secrets are masked, and a
            program of ours is named from our root.
        data_fingerprint: hash of the data manifest, or None for work without data.
        packages: names of distributions whose versions matter.
        config_changes: from `cluster.config.changes`: what differs from the defaults of this version.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": mask_secrets([_from_root(argument) for argument in command]),
        **code_version(),
        "python": sys.version.split()[0],
        "packages": versions(packages),
        "data_fingerprint": data_fingerprint,
        "host": describe_host(),
        "config_changes": config_changes,
    }


def code_version() -> dict[str, Any]:
    """`commit` and `dirty` (uncommitted or untracked files, baselines aside) of the code that runs.

    A copy of the code, such as the working directory that Ray uploads, takes them from the environment (see
    `commit_environment`), also where it lies over a git folder of another commit. Failing both, `commit` is
    "unknown", `dirty` None, and `commit_problem` says why.
    """
    if carried := os.environ.get(COMMIT_VARIABLE):
        return {"commit": carried.removesuffix("+dirty"), "dirty": carried.endswith("+dirty")}
    try:
        toplevel = _git("rev-parse", "--show-toplevel")
        if Path(toplevel).resolve() != _ROOT:  # a copy that lies inside somebody else's checkout
            raise LookupError(f"{_ROOT} is no git checkout of its own; it lies inside {toplevel}")
        return {
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--", ".", NOT_CODE)),
        }
    except LookupError as problem:
        return {"commit": "unknown", "dirty": None, "commit_problem": str(problem)}


def commit_environment() -> dict[str, str]:
    """The variable that carries `code_version` to workers whose copy of the code has no git folder."""
    code = code_version()
    return {} if code["dirty"] is None else {COMMIT_VARIABLE: code["commit"] + "+dirty" * code["dirty"]}


def _from_root(argument: str) -> str:
    return argument.removeprefix(f"{_ROOT}/")


def _git(*arguments: str) -> str:
    """Output of a git command in our root. Raises `LookupError` with the reason if there is none."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise LookupError(f"git could not run: {error}") from error
    if done.returncode:
        first_line = done.stderr.strip().partition("\n")[0] or f"exit status {done.returncode}"
        raise LookupError(f"git {arguments[0]}: {first_line}")
    return done.stdout.strip()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Distribution -> its version, or "not installed"."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
