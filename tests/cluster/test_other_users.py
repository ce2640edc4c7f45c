"""What other users of the same machine reach of a `make train` on one machine, and what listens.

The run has a network namespace of its own, so that nothing else's sockets are in the way. Root only.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.commands import ROOT, command, tiny, write_corpus
from tests.intruder import attack
from tests.listening import compare, documented, listening_there
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]
LEAKED = "0123456789abcdef" * 4
# Loopback, and an address that others could reach: with loopback alone Ray would have no choice.
NETWORK = """ip link set lo up && ip link add out type veth peer name in && ip link set out up &&
ip link set in up && ip addr add 198.51.100.1/24 dev out && ip route add default dev out"""
WITHOUT_CLUSTER = "What listens without a cluster"
ROWS = documented("cluster/README.md", WITHOUT_CLUSTER) | documented("training/README.md", WITHOUT_CLUSTER)


class Run:
    """A long `make train` on an embedded Ray of two workers, past its first step, with all that listens."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        write_corpus(folder)
        arguments = tiny(folder, launcher="ray", workers__count=2, schedule__tokens=512 * 100_000)
        self.token = (
            self.home / ".ray/auth_token"
        )  # as Ray itself, or an earlier version of ours, has left it
        self.token.parent.mkdir()
        self.token.write_text(LEAKED)
        self.token.chmod(0o644)
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        environment = {**os.environ, "HOME": str(self.home), "XDG_CACHE_HOME": cache}
        environment.pop("RAY_TMPDIR", None)
        before = set(Path("/tmp").glob("ray-*"))
        own_network = ["unshare", "--net", "sh", "-c", f'{NETWORK} && exec "$0" "$@"']
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*own_network, *command("training.launch", *arguments)],
                cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        metrics, log = folder / "outputs/first-light/metrics.jsonl", folder / "log"

        def trains() -> bool:
            assert self._process.poll() is None, log.read_text()
            return metrics.exists() and metrics.read_text().count("\n") > 1

        def told() -> str:
            return f"{compare(listening_there(self.python()), ROWS)}\n{log.read_text()}"

        try:
            wait_until(trains, told=log.read_text)
            wait_until(lambda: "unseen" not in compare(listening_there(self.python()), ROWS), told=told)
            (self.folder,) = (one for one in set(Path("/tmp").glob("ray-*")) - before if self._has_open(one))
        except BaseException:
            self.end()
            raise

    def _has_open(self, folder: Path) -> bool:
        targets = []
        for link in Path(f"/proc/{self._process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it has just been closed
                targets.append(os.readlink(link))
        return any(target.startswith(f"{folder}/") for target in targets)

    def python(self) -> list[str]:
        """A Python in the run's network namespace."""
        return ["nsenter", "-t", str(self._process.pid), "-n", sys.executable, "-I"]

    def end(self) -> None:
        """As Ctrl-C does."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGINT)
            self._process.wait(timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = Run(tmp_path_factory.mktemp("run"))
    yield made
    made.end()


def kinds(paths: list[Path]) -> dict[str, str]:
    return {str(path): "d" if path.is_dir() else "s" if path.is_socket() else "f" for path in paths}


def test_another_user_reaches_no_file_and_no_socket_of_ray_and_runs_no_job(run):
    """Not even with a token that an earlier version has let it read."""
    walk = os.walk(run.folder)  # unlike `rglob`, it takes no offence at what has just been removed
    below = [Path(place, name) for place, folders, files in walk for name in (*folders, *files)]
    paths = [run.folder, run.token, *below]
    assert sum(path.is_socket() for path in paths) >= 2
    assert any(path.name == "working_dir_files" for path in paths)
    done, statuses = attack(run.python(), kinds(paths), [None, LEAKED])
    assert done == [] and set(statuses) <= {401, 403} and len(statuses) == 2
    # the same as the run's own user, to see that it can succeed; the job is empty, so that none has to run
    token = (run.folder / "token").read_text()
    done, statuses = attack(run.python(), {str(run.folder): "d"}, [token], user=0, job={})
    assert len(done) == 2 and statuses[0] not in (401, 403)


def test_a_token_that_was_left_open_is_closed(run):
    assert run.token.stat().st_mode & 0o777 == 0o600
    assert run.token.parent.stat().st_mode & 0o777 == 0o700


def test_what_listens_is_what_the_readmes_say(run):
    assert compare(listening_there(run.python()), ROWS) == {}


def test_nothing_is_left_of_a_run_that_was_interrupted(run):
    run.end()
    assert not run.folder.exists()
