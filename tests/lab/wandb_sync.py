"""Whether `make sync` brings everything to W&B once, although each side is killed midway.

    .venv/bin/python -m tests.lab.wandb_sync --openwandb /path/to/openwandb

A run is killed by SIGKILL. `make sync` is killed while it sends, then the server, then `make sync` is
repeated. Then the run is resumed from an earlier step, and sent again. There are two witnesses: the loopback
server of the tests, and openwandb 0.5.25, which is independent of W&B's code (PyPI; CC-BY-NC: a test
instrument in an environment of its own, and no dependency).

openwandb cannot show everything. It does not list the rows of a run, so `make sync` cannot leave out those
that it has: they come again under the same step, and openwandb appends what W&B would replace (`sent_again`).
It calls every artifact complete before its files are there, so only the loopback server gets an artifact.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster import cli, process
from cluster.cli import RunError
from cluster.measure import benchmark
from cluster.review.sync.segments import find
from tests.cluster.review.test_sync import RECORD, start, start_command
from tests.cluster.review.wandb_server import API_KEY, WandbServer
from tests.waiting import wait_until

WHAT = "wandb_sync"
KILLED_AT, RESUMED_FROM, LAST = 1100, 1000, 1300
KILLED = f"""
run = record(1, 500)
run.table("requests", ["ttft"], [[0.25], [None]])
if len(sys.argv) > 2:
    run.output({{"kind": "checkpoint", "name": "a-run/step-500", "path": None, "fingerprint": "a" * 64}})
for step in range(501, {KILLED_AT + 1}):
    run.log({{"step": step, "loss": 1 / step}})
wait_for_rows({KILLED_AT})
os.kill(os.getpid(), signal.SIGKILL)
"""
RESUMED = f"""
record({RESUMED_FROM + 1}, {LAST}, resume_step={RESUMED_FROM}).finish({{"best": 0.5}})
"""


class Loopback(WandbServer):
    """The tests' server, asked as openwandb is, and slow after the first rows: there is time to kill."""

    def __init__(self) -> None:
        super().__init__()
        has_rows = lambda: any(run.num_received for run in self.runs.values())  # noqa: E731
        self.wait_seconds = lambda name: 2.0 if name.startswith("file_stream") and has_rows() else 0.0

    def holds(self, run_id: str) -> dict[str, Any]:
        """Steps with the number of times that each is there; files; artifacts."""
        run = self.runs.get(run_id)
        rows = run.rows if run else []
        return {
            "steps": Counter(row["step"] for row in rows if "train/loss" in row),
            "files": sorted(run.uploaded) if run else [],
            "artifacts": sorted(artifact.type for artifact in self.artifacts),
        }


class Openwandb:
    """An openwandb process on loopback."""

    def __init__(self, program: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY}
        where = ["--host", "127.0.0.1", "--port", str(port), "--data-dir", str(folder)]
        self._command, self._log = [str(program), "serve", *where], folder / "log.txt"
        self._child: process.Child | None = None

    def start(self) -> None:
        with self._log.open("a") as log:
            self._child = process.Child(self._command, stdout=log, stderr=log)
        wait_until(self._answers, told=self._log.read_text)

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def __enter__(self) -> "Openwandb":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def holds(self, run_id: str) -> dict[str, Any]:
        """As `Loopback.holds`."""
        try:
            losses = self._get(f"v2/runs/{run_id}/metrics")["metrics_by_key"].get("train/loss", [])
            files = self._get(f"v1/runs/{run_id}/files")["files"]
            artifacts = self._get(f"v2/runs/{run_id}/artifacts")["artifacts"]
        except urllib.error.HTTPError:  # no such run yet
            return {"steps": Counter(), "files": [], "artifacts": []}
        return {
            "steps": Counter(round(1 / loss["value"]) for loss in losses),
            "files": sorted({file["name"] for file in files}),
            "artifacts": sorted(artifact["artifact_type"] for artifact in artifacts),
        }

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(
            f"{self.url}/api/{path}", headers={"Authorization": f"Bearer {API_KEY}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(self.url, timeout=5).close()
            return True
        return False


def witness(server: Any) -> dict[str, Any]:
    """Send a run to a server while each side is killed once. Returns what the server holds at the end."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        directory = home / "outputs/first-light"
        artifact = ["artifact"] if isinstance(server, Loopback) else []
        training = start(RECORD + KILLED, directory, *artifact, home=home)
        if training.communicate()[1] or training.returncode != -signal.SIGKILL:
            raise RunError("the run did not log its rows")
        for file in directory.iterdir():
            os.utime(file, (1, 1))  # long ago: the run is not running any more
        (segment,) = find(directory)

        command = start_command(home, server.environment)
        killed_with = wait_until(lambda: sum(server.holds(segment.id)["steps"].values()))
        command.kill()
        command.communicate()

        command = start_command(home, server.environment, LOST_SECONDS=2.0)
        before = killed_with
        wait_until(
            lambda: sum(server.holds(segment.id)["steps"].values()) > before or command.poll() is not None
        )
        server.stop()
        first_problem = command.communicate()[1]
        lost_code = command.returncode
        server.start()

        codes = [sync_to_end(home, server)]
        if start(RECORD + RESUMED, directory, home=home).communicate()[1]:
            raise RunError("the run was not resumed")
        codes.append(sync_to_end(home, server))
        holds = server.holds(segment.id)
    steps = holds["steps"]
    return {
        "rows_when_the_client_was_killed": killed_with,
        "exit_code_when_the_server_was_killed": lost_code,
        "said_when_the_server_was_killed": first_problem.strip().replace(server.url, "URL"),
        "exit_codes_afterwards": codes,
        "steps_missing": len(set(range(1, LAST + 1)) - set(steps)),
        "steps_unknown": len(set(steps) - set(range(1, LAST + 1))),
        "sent_again": steps.total() - len(steps),
        "tables": sum("media/table" in name for name in holds["files"]),
        "artifacts": holds["artifacts"],
    }


def sync_to_end(home: Path, server: Any) -> int:
    """`make sync` until it exits with 0, at most three times. Returns the last exit code."""
    for _ in range(3):
        command = start_command(home, server.environment)
        printed, problems = command.communicate()
        print(printed + problems, file=sys.stderr, end="", flush=True)
        if command.returncode == 0:
            break
    return command.returncode


@contextlib.contextmanager
def servers(program: Path) -> Iterator[dict[str, Any]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        Loopback() as loopback,
        Openwandb(program, Path(folder)) as openwandb,
    ):
        yield {"loopback": loopback, "openwandb": openwandb}


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.wandb_sync", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--openwandb", type=Path, required=True, help="the program openwandb, version 0.5.25")
    parser.add_argument("--output", type=Path, help="default: tests/baselines/<hardware>_wandb_sync.json")
    options = parser.parse_args()

    def body() -> None:
        output = benchmark.prepare_output(options.output, WHAT)
        began = time.monotonic()
        with servers(options.openwandb) as all_servers:
            found = {name: witness(server) for name, server in all_servers.items()}
        result = {"bench": WHAT, "openwandb_version": "0.5.25", **found, "seconds": time.monotonic() - began}
        benchmark.publish(
            result, output, job_type="launcher-bench", wandb_mode="disabled", data_fingerprint=None
        )
        for name, each in found.items():
            wanted = {"steps_missing": 0, "steps_unknown": 0, "tables": 1, "exit_codes_afterwards": [0, 0]}
            if name == "loopback":
                wanted |= {"sent_again": 0, "artifacts": ["checkpoint", "run_table"]}
            if not wanted.items() <= each.items():
                raise RunError(f"{name}: not everything is there once: {each}")

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
