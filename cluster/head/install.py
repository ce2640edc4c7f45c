"""What a worker needs before Ray starts there, from the head: a Python, the environment, the code.

Standard library only, as the keeper, whose part it is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import private
from cluster.head.shell import Failure, Workers, bash

PROBE = """
cd / || exit 9
echo "python $({python} -c '{identity}' 2>&1 | tail -1)"
refused=$({python} - folder {scratch} 2>&1) || {{ echo "refused $refused"; exit 0; }}
mkdir -p {scratch}/env {code} || exit 8
echo "free $(df -P -B1 {scratch} | awk 'END {{print $4}}')"
test -e {env}/ready && echo "env ready"
command -v rsync > /dev/null && echo "rsync yes"
true
"""
# of a Python, for an environment that is made with one and runs with another; setup.sh hashes the version too
IDENTITY = "import sys; print(sys.version.replace(chr(10), chr(32)), sys.base_prefix)"


def install(
    site: dict[str, Any], workers: Workers, worker: str, env: Path, *, note: Callable[[str, str], None]
) -> None:
    """Bring a worker what it has not, of the head's environment `env` and code.

    Args:
        note: called with the worker's state and a detail, as the work goes on.

    Raises:
        Failure: it cannot have it. The message says why and what to do.
    """
    note("connecting", "")
    if site["claim_by_shell"]:
        _bring_python(site, workers, worker, note=note)
    probe = PROBE.format(**site, env=env, identity=IDENTITY)
    answer = workers.ssh(worker, probe, given=Path(private.__file__).read_bytes(), patience=20)
    found = dict(line.partition(" ")[::2] for line in answer.splitlines() if " " in line)
    mine = bash(f"{site['python']} -c '{IDENTITY}'")
    if found.get("python") != mine:
        raise Failure(
            f"{site['python']} is {found.get('python')}, and {mine} on the head: the environment would "
            "not run; install the same, or set python in the inventory"
        )
    if "refused" in found:
        raise Failure(f"{found['refused']}, or set scratch in the inventory")
    if "rsync" not in found:
        raise Failure("has no rsync; install it")
    if "env" not in found:
        _copy_environment(site, workers, worker, env, free=int(found.get("free") or 0), note=note)
    workers.rsync(worker, Path(site["code"]))


def _bring_python(
    site: dict[str, Any], workers: Workers, worker: str, *, note: Callable[[str, str], None]
) -> None:
    place = Path(site["scratch"]) / "python"
    asked = f"{site['claim_by_shell']}\ntest -e {place}/ready && echo there || true"
    if not workers.ssh(worker, asked):
        note("copying", "Python, from the head")
        workers.rsync(worker, place, "--exclude=/ready")
        workers.ssh(worker, f"touch {place}/ready")


def _copy_environment(
    site: dict[str, Any],
    workers: Workers,
    worker: str,
    env: Path,
    *,
    free: int,
    note: Callable[[str, str], None],
) -> None:
    size = int(bash(f"du -sb {env}").split()[0])
    note("copying", f"environment, {size / 1e9:.2f} GB, from the head")
    if free < 1.1 * size + 1e9:
        raise Failure(
            f"{site['scratch']} has {free / 1e9:.1f} GB free, and the environment needs "
            f"{size / 1e9:.1f} and 1 to spare; make room, or set scratch in the inventory"
        )
    workers.rsync(worker, env, "--exclude=/ready")
    workers.ssh(worker, f"sync -f {env}; touch {env}/ready")
