"""`make up`, `make status` and `make down`: the nodes of a cluster, from the laptop.

    python -m cluster.laptop.fleet up|status|down CLUSTER.yaml

`up` copies the code and the site to the head, starts the keeper there (`cluster.head.keeper`), gives every
worker the head's key, and waits until every node has joined. It skips what is done: run it again to continue.
"""

import argparse
import fcntl
import json
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import cli
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.display import duration, pairs, show
from cluster.head.answers import REFUSED
from cluster.head.keeper import BUSY, FAILED, JOINED
from cluster.laptop import carry, commands, growth, inventory
from cluster.laptop.growth import NUM_AT_ONCE
from cluster.laptop.keys import Inventory
from cluster.laptop.package import pack
from cluster.laptop.ssh import CommandError, LinkError, NodeError, Ssh, patiently
from cluster.progress import Progress
from cluster.session import KIND

FIRST_CONTACT_SECONDS = 40.0  # for a node that does not answer at all
LINK_SECONDS = 600.0  # for a link that was there and is lost
GATE_SECONDS = 55.0  # for a node that makes no progress
FAILED_SECONDS = 8.0  # for a node that failed: the keeper has tried again by then
POLL_SECONDS = 1.0
HEAD = Path(__file__).parents[1] / "head"  # scripts that run alone on a node

NOTHING = '{"ended": 0, "left": []}'  # what `down` finds where `up` has not brought a Python yet

UNPACK = """
import io, os, shutil, sys, zipfile
scratch = sys.argv[1]
code, new, old = (scratch + end for end in ("/code", "/code.new", "/code.old"))
archive = zipfile.ZipFile(io.BytesIO(sys.stdin.buffer.read()))
for folder in (new, old):
    shutil.rmtree(folder, ignore_errors=True)
archive.extractall(new)
if os.path.exists(code):
    os.rename(code, old)
os.rename(new, code)
shutil.rmtree(old, ignore_errors=True)
"""


def head_script(site: Inventory, *arguments: str) -> str:
    """The script that asks `cluster.head.answers` on the head."""
    verb, *rest = arguments
    down = f"{{ echo 'this cluster is not up: run `make up`' >&2; exit {REFUSED}; }}"
    return (
        f"[ ! -e {site.scratch} ] || {commands.owned(site)} || exit {REFUSED}\n"
        f"cd {site.code} 2> /dev/null && test -e site.json || {down}\n"
        f"exec {commands.interpreter(site)} -m cluster.head.answers {shlex.join([verb, 'site.json', *rest])}"
    )


def up(cluster: Path, *, report: Callable[[str], None]) -> None:
    """Bring up the nodes that are not up.

    Raises:
        RunError: some nodes have not joined; the message gives each reason.
    """
    site = inventory.load(cluster)
    with _alone(site):
        _up(site, report=report)


@contextmanager
def _alone(site: Inventory) -> Iterator[None]:
    """A block that one command of this machine at a time may be in, for each cluster. Raises `RunError`."""
    site.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (site.home / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunError(
                f"{site.name}: another `make up` or `make down` from this machine is at work (pid "
                f"{lock.read().strip() or 'unknown'}); wait for its end"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _up(site: Inventory, *, report: Callable[[str], None]) -> None:
    begin = time.monotonic()
    generation = uuid.uuid4().hex
    package = pack(
        more={"site.json": json.dumps({**commands.for_head(site), "generation": generation}, indent=2)}
    )
    drained = f" ({len(site.drained)} more drained: {', '.join(site.drained)})" if site.drained else ""
    report(f"{site.name}: {len(site.active)} nodes{drained}; {package}")
    head = Ssh(site, site.head, pin=True)
    patiently(lambda: head.run("true", timeout=30), patience=FIRST_CONTACT_SECONDS, report=report)
    carry.bring(site, head, report=report)
    key = _give_code(site, head, package.data, report=report)
    refusals = _let_head_in(site, head, key, report=report)
    known = (site.home / "known_hosts").read_bytes()
    place = f"{site.scratch}/known_hosts"
    patiently(
        lambda: head.run(f"cat > {place}.new && mv {place}.new {place}", given=known),
        patience=LINK_SECONDS,
        report=report,
    )
    problems = _gate(site, head, generation, refusals, report=report)
    if problems:
        lines = "\n".join(f"  {node}: {why}" for node, why in problems.items())
        joined = len(site.active) - len(problems)
        raise RunError(
            f"{joined} of {len(site.active)} nodes joined; not these:\n{lines}\n"
            "the others work, and a node that can join later will; `make up` again continues"
        )
    report(f"{len(site.active)} of {len(site.active)} nodes joined, in {time.monotonic() - begin:.0f} s")


def _give_code(site: Inventory, head: Ssh, package: bytes, *, report: Callable[[str], None]) -> str:
    """Copy code and site to the head and start the keeper. Returns the head's public key."""
    python = commands.interpreter(site)
    script = (
        f"set -e\n{commands.claim(site)}\n{python} -c {shlex.quote(UNPACK)} {site.scratch}\n"
        f"cd {site.code}\n{python} -m cluster.head.keeper start site.json"
    )
    try:
        answer = patiently(lambda: head.run(script, given=package), patience=LINK_SECONDS, report=report)
    except CommandError as error:
        raise _explained(error, site) from error
    return answer.decode().strip().splitlines()[-1]


def _explained(error: CommandError, site: Inventory) -> RunError:
    if "No space left" in error.output:
        remedy = f"make room in {site.scratch}, or set scratch in the inventory"
    elif "command not found" in error.output:
        remedy = (
            f"install {site.python} (3.11 or 3.12), or set python in the inventory (python: uv brings one)"
        )
    elif "Permission denied" in error.output or "Read-only" in error.output:
        user = site.ssh_of(site.head).user
        remedy = f"user {user} must be able to write {site.scratch}; set scratch in the inventory"
    elif f"{site.scratch}: " in error.output:  # what `cluster.private` refuses
        remedy = "or set scratch in the inventory"
    else:
        return error
    return RunError(f"{error}; {remedy}")


def _let_head_in(site: Inventory, head: Ssh, key: str, *, report: Callable[[str], None]) -> dict[str, str]:
    """Add the head's public key on every worker, all at once. Returns address -> why that failed."""
    place = "~/.ssh/authorized_keys"
    script = (
        f"umask 077; mkdir -p ~/.ssh; touch {place}; grep -qF {shlex.quote(key)} {place} || "
        f'{{ [ -z "$(tail -c1 {place})" ] || echo >> {place}; echo {shlex.quote(key)} >> {place}; }}'
    )

    def one(worker: str) -> str | None:
        deadline = time.monotonic() + FIRST_CONTACT_SECONDS
        while True:
            try:
                Ssh(site, worker, pin=True).run(script, timeout=30)
                return None
            except (NodeError, CommandError) as error:
                return str(error).removeprefix(f"{worker}: ")
            except LinkError as error:
                asked = time.monotonic()
                patiently(lambda: head.run("true", timeout=30), patience=LINK_SECONDS, report=report)
                # time without the head is not the worker's
                deadline += max(0.0, time.monotonic() - asked - 1)
                if time.monotonic() > deadline:
                    return f"{str(error).removeprefix(f'{worker}: ')}; is it on, and on the head's network?"
                time.sleep(1)

    workers = [node for node in site.active if node != site.head]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        found = dict(zip(workers, pool.map(one, workers), strict=True))
    return {worker: why for worker, why in found.items() if why is not None}


def _gate(
    site: Inventory, head: Ssh, generation: str, refusals: dict[str, str], *, report: Callable[[str], None]
) -> dict[str, str]:
    """Wait until all nodes have joined. Returns address -> reason of each that has not."""
    with Progress(len(site.active), unit="node") as progress:
        return _wait(site, head, generation, refusals, progress, report=report)


def _wait(
    site: Inventory,
    head: Ssh,
    generation: str,
    refusals: dict[str, str],
    progress: Progress,
    *,
    report: Callable[[str], None],
) -> dict[str, str]:
    shown: dict[str, tuple[str, str]] = {}
    is_ours = False
    active = {node: time.monotonic() for node in site.active}  # when it last did something
    entered = dict(active)  # when its state, whatever the detail, began
    script = f"cd {site.code} && {commands.interpreter(site)} -m cluster.head.keeper state site.json"
    while True:
        answer = _parsed(patiently(lambda: head.run(script), patience=LINK_SECONDS, report=report), head)
        keeper = answer["keeper"] or {}
        if is_ours and keeper.get("generation") != generation:
            raise RunError(
                f"another `make up` of {site.name} has taken over, from another machine; see there"
            )
        is_ours = is_ours or keeper.get("generation") == generation
        states = keeper["nodes"] if is_ours else {}
        if not answer["runs"]:
            raise RunError(
                f"the keeper on {site.head} ended: {answer['said']}; see {site.scratch}/keeper.log"
            )
        problems: dict[str, str] = {}
        waiting = False
        for node in site.active:
            state = states.get(node, {"state": "waiting", "detail": "", "since": answer["now"]})
            current = (state["state"], state["detail"])
            if current != (before := shown.get(node)):
                shown[node] = current
                active[node] = time.monotonic()
                if before and before[0] != state["state"]:
                    entered[node] = active[node]
                if state["state"] in (*BUSY, JOINED, FAILED):
                    report(f"{node}: {' '.join(filter(None, current))}")
            if state["state"] == JOINED:
                continue
            if node != site.head and states.get(site.head, {}).get("state") in BUSY:
                active[node] = time.monotonic()  # workers wait for the head, which may install for minutes
            lasted = answer["now"] - state["since"]
            if node in refusals and state["state"] not in BUSY:
                problems[node] = refusals[node]
            elif state["state"] == FAILED and (node == site.head or lasted > FAILED_SECONDS):
                problems[node] = state["detail"]
            elif state["state"] not in BUSY and time.monotonic() - active[node] > GATE_SECONDS:
                problems[node] = " ".join([*filter(None, current), f"for {GATE_SECONDS:g} s"])
            else:
                waiting = True
        _show_progress(progress, shown, entered)
        if site.head in problems:
            raise RunError(f"head {site.head}: {problems[site.head]}")
        if not waiting:
            return problems
        time.sleep(POLL_SECONDS)


def _show_progress(progress: Progress, shown: dict[str, tuple[str, str]], entered: dict[str, float]) -> None:
    """How many nodes have joined, and the one that has been at work longest."""
    joined = [node for node, (state, _) in shown.items() if state == JOINED]
    busy = sorted((entered[node], node) for node, (state, _) in shown.items() if state in BUSY)
    lasts = [f"{node} {shown[node][0]}, {duration(time.monotonic() - since)} so far" for since, node in busy]
    progress.update({"step": len(joined), "doing": ", ".join(["joined", *lasts[:1]])})


def status(cluster: Path) -> str:
    """The nodes and runs of the cluster, as a table; under it the newest runs' progress and alarms."""
    site = inventory.load(cluster)
    answer = ask(site, head_script(site, "status"))
    states = (answer["keeper"] or {"nodes": {}})["nodes"]
    alive = {node["name"]: node for node in answer["alive"]}
    drained = f", {len(site.drained)} drained" if site.drained else ""
    lines = [f"{site.name}: {len(alive)} of {len(site.active)} nodes in Ray{drained}"]
    if answer["problem"]:
        lines.append(f"{answer['problem']}; `make up` brings it up")
    if not answer["runs"]:
        lines.append("no keeper runs on the head: a node that falls out stays out; `make up` starts one")
    for node in site.nodes:
        state = states.get(node, {"state": "unknown", "detail": ""})
        if node in alive:
            found = alive[node]
            resources = ", ".join(
                f"{found['resources'].get(name, 0):g} {name}"
                for name in ("GPU", "CPU")
                if name in found["resources"]
            )
            kinds = [each.removeprefix(KIND) for each in found["resources"] if each.startswith(KIND)]
            lines.append(f"  {node:<16}{found['address']:<20}{' '.join([resources, *kinds])}")
        elif node in site.drained:
            lines.append(f"  {node:<16}drained in the inventory")
        elif state["state"] == JOINED or not answer["runs"]:  # what a keeper said last is no news
            lines.append(f"  {node:<16}not in Ray")
        else:
            lines.append(f"  {node:<16}{state['state']} {state['detail']}")
    if check := answer.get("preflight"):
        verdict = "passed" if check["passed"] else f"FAILED: {'; '.join(check['failures'])}"
        lines.append(f"preflight of {check['time']}: {verdict}")
    for job in answer["jobs"][-5:]:
        lasted = ((job["end_time"] or answer["now"] * 1e3) - (job["start_time"] or answer["now"] * 1e3)) / 1e3
        lines.append(f"  run {job['submission_id']:<24}{job['status'].lower():<12}{lasted:.0f} s")
    if answer.get("outputs"):
        lines += ["run directories, the newest first:", *answer["outputs"]]
    return "\n".join(lines)


def ask(site: Inventory, script: str, *, given: bytes = b"") -> dict[str, Any]:
    """The head's answer to `head_script`, in one round trip. Waits while the link is lost for a short time.

    Raises:
        RunError: the head refuses the request; the message is the head's.
    """
    head = Ssh(site, site.head)
    try:
        answer = patiently(lambda: head.run(script, given=given), patience=60, report=note)
    except CommandError as error:
        raise RunError(error.output.splitlines()[-1] if error.output else str(error)) from error
    return _parsed(answer, head)


def note(text: str) -> None:
    """Print a line on standard error. Standard output is for a run's own lines."""
    print(text, file=sys.stderr, flush=True)


def _parsed(answer: bytes, node: Ssh) -> dict[str, Any]:
    """The JSON object in the last line of an answer. Lines that a login prints may precede it."""
    lines = answer.decode(errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (ValueError, IndexError) as error:
        said = lines[-1][:200] if lines else "nothing"
        raise RunError(
            f"{node.address}: answered {said!r}; does the user's ~/.bashrc print there?"
        ) from error


def down(cluster: Path, *, report: Callable[[str], None], keep_access: bool = False) -> None:
    """End what the cluster runs on every node, and check that nothing is left.

    Args:
        keep_access: leave the head's key and what else `cluster.head.forget` removes.

    Raises:
        RunError: a node could not be reached, or something is left on it.
    """
    site = inventory.load(cluster)
    with _alone(site):
        _down(site, report=report, keep_access=keep_access)


def _down(site: Inventory, *, report: Callable[[str], None], keep_access: bool) -> None:
    head = Ssh(site, site.head, pin=True)  # Ray's own `ray up` pins nothing
    stop = (
        f"cat ~/.ssh/asuncion_{site.name}.pub 2> /dev/null || true; [ ! -e {site.code}/site.json ] || "
        f"{{ {commands.owned(site)} && cd {site.code} && "
        f"{commands.interpreter(site)} -m cluster.head.keeper stop site.json; }}"
    )
    said = patiently(lambda: head.run(stop), patience=60, report=report).decode().splitlines()
    key = said[0] if said else ""
    reap, forget = ((HEAD / name).read_bytes() for name in ("reap.py", "forget.py"))

    def one(node: str, forgets: bool = not keep_access) -> tuple[bool, str]:
        there = Ssh(site, node, pin=True)
        python = commands.interpreter(site)
        nothing = f"[ {site.python} = {python} -o -e {python} ] || {{ echo '{NOTHING}'; exit; }}\n"
        try:
            script = f"{nothing}{python} - {site.name}"
            found = _parsed(there.run(script, given=reap, timeout=60), there)
            if forgets:
                script = f"{nothing}{python} - {site.name} {site.scratch} {shlex.quote(key)}"
                found |= _parsed(there.run(script, given=forget, timeout=60), there)
        except CommandError as error:
            try:
                return False, f"still there: {'; '.join(json.loads(error.output)['left'])}"
            except ValueError:
                return False, str(error)
        except RunError as error:
            return node in site.drained, str(error)  # it may be drained because it is broken
        ended = found["ended"]
        told = f"{ended} processes ended, none left" if ended else "nothing was running"
        return True, told + ("; access removed" if found.get("removed") else "")

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        workers = dict(zip(site.workers, pool.map(one, site.workers), strict=True))
    # Only the head knows its key: it keeps it until every worker has forgotten it.
    forgets = not keep_access and all(clean for clean, _ in workers.values())
    found = {site.head: one(site.head, forgets), **workers}
    for node, (_, text) in found.items():
        report(f"{node}: {text}")
    problems = [node for node, (clean, _) in found.items() if not clean]
    if problems:
        raise RunError(f"not down: {', '.join(problems)} (above); mend that and run `make down` again")
    stays = f"{site.scratch}/env stays for the next `make up`; runs and data lie in {site.storage}"
    report(f"{site.name} is down. {stays}")


@dataclass(frozen=True)
class DownConfig:
    keep_access: bool = layered.key(
        False, "leave the head's key on the nodes, Ray's token and the line in ~/.bashrc"
    )


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.laptop.fleet", description=__doc__.splitlines()[0]
    )
    parser.add_argument("verb", choices=("up", "status", "down"))
    parser.add_argument("cluster", type=Path, metavar="CLUSTER.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the inventory and what the site needs, and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="down: keep_access=true")
    options = parser.parse_args()

    def note(text: str) -> None:
        print(text, flush=True)

    def body() -> None:
        if options.overrides and options.verb != "down":
            raise UserError(f"{options.overrides[0]}: `make {options.verb}` takes no keys")
        if options.dry_run:
            site = inventory.load(options.cluster)
            print(layered.to_yaml(site))
            show(pairs(growth.describe(growth.site_of(site))))
        elif options.verb == "status":
            print(status(options.cluster))
        elif options.verb == "up":
            up(options.cluster, report=note)
        else:
            config = layered.load(DownConfig, dotlist=options.overrides)
            down(options.cluster, report=note, keep_access=config.keep_access)

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
