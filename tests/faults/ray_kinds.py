"""Faults of runs under Ray Train: the same checks, and the same undisturbed run as under torch."""

import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cluster.record import events
from cluster.session import free_ports
from tests.faults.arm import arm
from tests.faults.kinds import Kind, Story, at_row
from tests.faults.runs import Outcome
from tests.waiting import wait_until

SETUP = "two"  # whose undisturbed run is also that of Ray's workers
KEYS = {"launcher": "ray", "workers__cpus": 1}
RESTARTS = {**KEYS, "workers__max_failures": 1}


def launch(keys: list[str], *, specs: dict[int, dict[str, Any]], once: str) -> None:
    """The command, in a process that has just been forked; its workers are armed, the first time."""
    from training import launch

    launch._ray_worker = partial(armed, specs=json.dumps(specs), once=once)  # type: ignore[assignment]
    sys.exit(launch.main(keys))


def armed(arguments: dict[str, Any], *, specs: str, once: str) -> bool:
    """A worker of Ray Train, in which something goes wrong unless it has before."""
    from training.launch import _ray_worker

    spec = json.loads(specs).get(os.environ["RANK"])
    if spec:
        with suppress(FileExistsError):
            os.close(os.open(f"{once}-{os.environ['RANK']}", os.O_CREAT | os.O_EXCL))
            arm([spec], arguments["start"].config.run_directory)
    return _ray_worker(arguments)


def begin(story: Story, what: str, **options: Any) -> Outcome:
    """One start under Ray; afterwards no process of its Ray is left."""
    session = session_folder()
    specs = options.pop("specs", {})
    once = str(story.place.folder / "logs" / f"{story.place.name}.once")
    command = partial(launch, specs=specs, once=once)
    own = {"RAY_TMPDIR": session}
    outcome = story.start(what, command=command, num_ranks=1, **{"environment": own, **options})
    if "environment" in options:  # a Ray that goes on
        return outcome
    try:
        wait_until(lambda: not of_session(session), seconds=180)
    except AssertionError:
        story.require(False, f"{what}: left over: {of_session(session)}")
    return outcome


def session_folder() -> str:
    """Of this campaign's Ray: short, because of its sockets."""
    return f"/tmp/rf{os.getpid()}"


def of_session(session: str) -> list[str]:
    """Processes that belong to the Ray of this temporary folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"RAY_TMPDIR={session}".encode() in entry.joinpath("environ").read_bytes().split(b"\0"):
                found.append(f"{entry.name} {entry.joinpath('cmdline').read_bytes()[:80]!r}")
    return found


def worker_killed(story: Story) -> None:
    """SIGKILL of a worker: Ray Train starts the workers again, and the run ends."""
    rank, spec = story.point("call", share=0.9)
    fault = {"fault": "kill", **spec}
    outcome = begin(
        story, f"Ray: SIGKILL of rank {rank} at call {spec['at']}", specs={rank: fault}, **RESTARTS
    )
    restarted(story, outcome)


def worker_stopped(story: Story) -> None:
    """SIGSTOP of a worker: the other one finds that, and Ray Train starts the workers again."""
    rank, spec = story.point("call", share=0.9)
    fault = {"fault": "stop", **spec}
    keys = {**RESTARTS, "workers__hang_seconds": 4}
    outcome = begin(story, f"Ray: SIGSTOP of rank {rank} at call {spec['at']}", specs={rank: fault}, **keys)
    restarted(story, outcome)
    story.require("hung" in [event["kind"] for event in events.read(story.run)], "no event hung")


def worker_hangs_for_good(story: Story) -> None:
    """The same without restarts: the launcher fails with the sentence that names the rank."""
    rank, spec = story.point("call", share=0.9)
    fault = {"fault": "stand still", **spec}
    keys = {**KEYS, "workers__hang_seconds": 4}
    outcome = begin(story, f"Ray: rank {rank} hangs at call {spec['at']}", specs={rank: fault}, **keys)
    story.fails(outcome, f"rank {rank} ", "workers.hang_seconds")


def driver_killed(story: Story) -> None:
    """SIGKILL of the launcher: its Ray ends, and the same command resumes the run."""
    step = story.rng.randrange(1, 8)
    meddle = at_row(story, step, lambda pids: os.kill(pids[0], signal.SIGKILL))
    begin(story, f"Ray: SIGKILL of the launcher at row {step}", meddle=meddle, **KEYS)


def node_lost(story: Story) -> None:
    """One of two nodes is lost, and the run waits; a node joins, and the run goes on with as many workers."""
    session, port = session_folder(), free_ports(1)[0]
    Path(session).mkdir(mode=0o700, exist_ok=True)
    token = Path(session, "token")
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    ray = {"RAY_TMPDIR": session, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    added: list[str] = []

    def add_node(address: str, *where: str) -> None:
        added.append(address)
        options = (f"--node-ip-address={address}", "--num-cpus=1", "--object-store-memory=100000000")
        program = Path(sys.executable).parent / "ray"
        command = [program, "start", *where, *options, "--disable-usage-stats"]
        done = subprocess.run(command, env={**os.environ, **ray}, capture_output=True, text=True)
        story.require(done.returncode == 0, f"ray start: {done.stderr[-300:]}")

    def meddle(_pids: list[int]) -> None:
        if len(added) == 2 and "node_lost" in [event["kind"] for event in events.read(story.run)]:
            add_node("127.0.0.4", f"--address=127.0.0.2:{port}")

    try:
        add_node("127.0.0.2", "--head", f"--port={port}", "--include-dashboard=false")
        add_node("127.0.0.3", f"--address=127.0.0.2:{port}")
        _, spec = story.point("call", share=0.9)
        fault = {"fault": "node", **spec}
        keys = {**RESTARTS, "session__address": f"127.0.0.2:{port}"}
        outcome = begin(
            story, f"Ray: a node lost at call {spec['at']}, and another added", meddle=meddle,
            specs={0: fault, 1: fault}, environment=ray, on_loopback=False, **keys,
        )  # fmt: skip
    finally:
        for pid in of_session(session):
            with suppress(ProcessLookupError):
                os.kill(int(pid.split()[0]), signal.SIGKILL)
    restarted(story, outcome)
    kinds = {event["kind"] for event in events.read(story.run)}
    story.require({"node_lost", "node_joined"} <= kinds, f"events: {kinds}")


def restarted(story: Story, outcome: Outcome) -> None:
    """It must have come to its end after one restart."""
    story.require(outcome.done, f"exit codes {outcome.codes}: {outcome.err.strip().splitlines()[-1:]}")
    kinds = [event["kind"] for event in events.read(story.run)]
    story.require("restarted" in kinds, f"no event restarted: {kinds}")


RAY_ROUND: list[tuple[str, Kind]] = [
    ("Ray: worker killed", worker_killed),
    ("Ray: launcher killed", driver_killed),
    ("Ray: worker stopped", worker_stopped),
    ("Ray: worker hangs", worker_hangs_for_good),
    ("Ray: node lost and added", node_lost),
]
