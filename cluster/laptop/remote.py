"""Runs on a cluster, from a laptop: start, follow, attach, stop, pull. The run does not need the laptop.

    python -m cluster.laptop.remote attach|stop|pull CLUSTER.yaml [--run NAME]
    python -m cluster.laptop.remote preflight CLUSTER.yaml [key=value ...]
    python -m cluster.laptop.remote clear CLUSTER.yaml HOST:GPU

`training.launch --cluster` starts runs through `start`. A start takes two round trips: one carries the code,
one opens the log. The laptop keeps a copy of each log in ~/.asuncion/NAME/logs; the copy's size says where to
continue.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cluster import cli, process
from cluster.cli import RunError, UserError
from cluster.head import answers
from cluster.head.shell import BEGIN, PastGreeting, login_command, not_run
from cluster.laptop import inventory
from cluster.laptop.fleet import ask, head_script, note
from cluster.laptop.keys import Inventory, NodeConfig
from cluster.laptop.package import Package, pack
from cluster.laptop.ssh import TRANSPORT, LinkError, NodeError, Outage, Ssh, rsync, transfer
from cluster.record.provenance import commit_environment

PREFLIGHT = "preflight"  # name of its runs
RUN_FILE = "run.yaml"  # the resolved configuration, in the package
PULL_PATIENCE_SECONDS = 600.0


def start(cluster: Path, *, run: str, module: str, config: str, skip_preflight: bool = False) -> None:
    """Start `python -m MODULE --config FILE` on the cluster, and follow it to its end.

    If a run of this name and configuration is active, it is followed instead. The preflight runs first unless
    it has passed; if it fails, the run does not start.

    Args:
        config: content of the file.
        skip_preflight: start without a preflight.

    Raises:
        UserError: the name is taken by the preflight.
        RunError: the cluster refuses the run, or the run failed.
        KeyboardInterrupt: Ctrl-C; the run goes on.
    """
    if run == PREFLIGHT:
        raise UserError(f"run.name: {run!r} is what the preflight's own runs are called; take another")
    site = inventory.load(cluster)
    gate = None if skip_preflight else f"python -m cluster.preflight {_preflight_arguments(site)}"
    package = pack(more={RUN_FILE: config})
    note(f"{site.name}: {package}")
    record = _submit(site, run, f"python -m {module} --config {RUN_FILE}", package, asked=config, gate=gate)
    follow(site, record, cluster=cluster)


def preflight(cluster: Path, more: Sequence[str]) -> None:
    """Run the preflight on the cluster and follow it. Raises `RunError` if it fails."""
    site = inventory.load(cluster)
    arguments = _preflight_arguments(site, more)
    record = _submit(site, PREFLIGHT, f"python -m cluster.preflight {arguments}", pack(), asked=arguments)
    follow(site, record, cluster=cluster)


def _submit(
    site: Inventory, run: str, command: str, package: Package, *, asked: str, gate: str | None = None
) -> dict[str, Any]:
    """Start a run, or find the one that is active. Returns its record. One round trip.

    Args:
        asked: what identifies the run; an active run of this name that was asked something else is an error.
        gate: a command that has to succeed first, unless the preflight has passed.
    """
    environment = "".join(f"{name}={value} " for name, value in commit_environment().items())
    request = {
        "run": run,
        "config": hashlib.sha256(asked.encode()).hexdigest(),
        "entrypoint": f"{environment}exec {command}",
        "preflight": f"{environment}{gate}",
        "gated": gate is not None,
        "package": f"_ray_pkg_{package.digest[:16]}.zip",
        "digest": package.digest,
    }
    given = json.dumps(request).encode() + b"\n" + package.data
    answer = ask(site, head_script(site, "submit"), given=given)
    note(f"run {answer['id']} {'is going: attached to it' if answer['going'] else 'submitted'}")
    return answer


def _preflight_arguments(site: Inventory, more: Sequence[str] = ()) -> str:
    keys = {
        "session.address": "auto",
        "scratch": site.scratch,
        "storage": site.storage,
        "expect.nodes": len(site.active),
        "expect.gpus": site.node.gpus,
        "expect.accelerator": site.node.accelerator if site.node.gpus else "null",
        "expect.differs": json.dumps({node: _expected(site.node_of(node)) for node in site.differs}),
        "expect.drained": json.dumps(site.drained),
        "output": f"{site.storage}/preflight.json",
    }
    words = [*(f"{name}={value}" for name, value in keys.items()), *site.preflight, *more]
    return " ".join(map(shlex.quote, words))


def _expected(node: NodeConfig) -> dict[str, Any]:
    return {"gpus": node.gpus, "accelerator": node.accelerator if node.gpus else None}


def follow(site: Inventory, record: dict[str, Any], *, cluster: Path) -> None:
    """Show the log of a run, from the byte up to which this laptop has it.

    Args:
        record: the head's record of the run (`answers.Head.resolve`).

    Raises:
        RunError: the run failed or was stopped, or Ray was restarted under it.
        KeyboardInterrupt: Ctrl-C; the run goes on, and a message says how to come back.
    """
    run_id = record["id"]
    with _log_here(site, record) as log:
        if log is not None and log.tell():
            note(f"continuing at byte {log.tell():,} of the log; what came before is in {log.name}")
        try:
            outcome = _stream(site, run_id, log)
        except KeyboardInterrupt:
            end = f"CLUSTER={cluster} RUN={run_id}"
            note(f"\ndetached; {run_id} goes on. `make attach {end}` comes back, `make stop {end}` ends it")
            raise
    resume = "run the same command again to resume from the newest checkpoint"
    if run_id.startswith(f"{PREFLIGHT}-"):
        resume = "run it again"
    if outcome == answers.SUCCEEDED:
        note(f"{run_id} has ended")
    elif outcome == answers.RUN_STOPPED:
        raise RunError(f"{run_id} was stopped; {resume}")
    elif outcome == answers.RUN_FAILED:
        raise RunError(f"{run_id} failed (its log is above); {resume}")
    elif outcome == answers.RAY_RESTARTED:
        raise RunError(f"Ray on the head was restarted, and {run_id} ended with it; {resume}")
    elif outcome == answers.RAY_DOWN:
        raise RunError(f"Ray on the head does not answer any more; `make up`, and then {resume}")
    else:
        raise RunError(f"{run_id}: the head refuses to follow it")


def _stream(site: Inventory, run_id: str, log: BinaryIO | None) -> int:
    """Copy the log to standard output; reconnect whenever the link is lost. Returns the outcome."""
    head = Ssh(site, site.head)
    offset = log.tell() if log is not None else 0
    outage = Outage(note)

    def write(chunk: bytes) -> None:
        nonlocal offset
        offset += len(chunk)
        if log is not None:
            log.write(chunk)
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()

    while True:
        script = head_script(site, "follow", run_id, str(offset))
        code, said = _copy([*head.arguments(), login_command(script)], write, on_attached=outage.end)
        if code == answers.REFUSED:
            raise RunError(said.splitlines()[-1] if said else "the head refuses")
        if code != TRANSPORT:
            return code
        error = head.explain(said)
        if isinstance(error, NodeError):
            raise error
        outage.wait(str(error))


def _copy(
    command: list[str], write: Callable[[bytes], None], *, on_attached: Callable[[], None]
) -> tuple[int, str]:
    """Pass on the command's output as it comes. Returns its exit code and its standard error."""
    child = process.Child(
        command,
        whole_tree=False,  # the connection that ssh opens is shared, and outlives it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stderr is not None
    errors = child.stderr
    said: list[str] = []

    def listen() -> None:
        for line in errors:
            text = line.decode(errors="replace").strip()
            if text == answers.ATTACHED:
                on_attached()
            elif text.endswith(BEGIN):  # what came before is the login's
                said.clear()
            else:
                said.append(text)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pass_on = PastGreeting(write)
    try:
        while chunk := os.read(child.stdout.fileno(), 1 << 16):
            pass_on(chunk)
        code = child.wait()
        listener.join()
    finally:
        child.kill()
    if code != TRANSPORT and pass_on.greeting is not None:
        raise RunError(not_run(pass_on.greeting))
    return code, "\n".join(said)


@contextmanager
def _log_here(site: Inventory, record: dict[str, Any]) -> Iterator[BinaryIO | None]:
    """This laptop's copy of the log, open at its end; None if another process writes it."""
    place = site.home / "logs" / _plain(f"{record['id']}-{record['token']}.log")
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("ab", buffering=0) as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(
                f"another command on this machine follows {record['id']}; showing its log from the beginning"
            )
            yield None
            return
        log.seek(0, os.SEEK_END)
        yield log


def _plain(name: str) -> str:
    """A name from the head, for a file on this laptop. Raises `RunError` if it is not a plain name."""
    if re.fullmatch(r"\w[\w.-]*", name) is None:
        raise RunError(f"the head answered {name!r}, which is not the name of a run; nothing was written")
    return name


def attach(cluster: Path, run: str) -> None:
    """Follow a run: by id, the newest of a name, or the newest of all."""
    site = inventory.load(cluster)
    follow(site, ask(site, head_script(site, "resolve", run)), cluster=cluster)


def stop(cluster: Path, run: str) -> None:
    """End a run. Its checkpoints stay."""
    site = inventory.load(cluster)
    answer = ask(site, head_script(site, "stop", run))
    note(f"{answer['id']}: {answer['status'].lower()}; its checkpoints are kept")


def clear(cluster: Path, gpus: Sequence[str]) -> None:
    """Let drained GPUs be used again. Raises `UserError`: none is named."""
    site = inventory.load(cluster)
    if not gpus:
        raise UserError("say which, as `make status` names it: ARGS=HOST:GPU")
    for gpu in gpus:
        note(f"{ask(site, head_script(site, 'clear', gpu))['cleared']} is used again, by the next run")


def pull(cluster: Path, run: str, *, target: Path) -> None:
    """Copy a run's metrics, plots and W&B files here, without its checkpoints. Only changes travel.

    Raises:
        RunError: there is no such run, or rsync failed and the link is not the cause.
    """
    site = inventory.load(cluster)
    name = _plain(ask(site, head_script(site, "resolve", run))["run"])
    (target / name).mkdir(parents=True, exist_ok=True)
    head = Ssh(site, site.head)
    command = rsync(
        head,
        f"{site.storage}/outputs/{name}",
        target / name,
        exclude=("checkpoints", "ray-train"),
    )
    try:
        said = transfer(head, command, patience=PULL_PATIENCE_SECONDS, report=note)
    except LinkError as error:
        raise LinkError(f"{error}; `make pull` again continues") from error
    received = next((line for line in said.splitlines() if "Total bytes received" in line), "")
    note(f"{target / name} is up to date ({received.rpartition(':')[2].strip() or '0'} bytes over the link)")


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.laptop.remote", description=__doc__.splitlines()[0]
    )
    parser.add_argument("verb", choices=("attach", "stop", "pull", "preflight", "clear"))
    parser.add_argument("cluster", type=Path, metavar="CLUSTER.yaml")
    parser.add_argument("--run", default="", help="name or id of a run; default: the newest")
    parser.add_argument("--to", type=Path, default=Path("outputs"), help="pull: folder for the runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="preflight: keys; clear: HOST:GPU")
    options = parser.parse_args()

    def body() -> None:
        if options.verb == "attach":
            attach(options.cluster, options.run)
        elif options.verb == "stop":
            stop(options.cluster, options.run)
        elif options.verb == "pull":
            pull(options.cluster, options.run, target=options.to)
        elif options.verb == "clear":
            clear(options.cluster, options.overrides)
        else:
            preflight(options.cluster, options.overrides)

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
