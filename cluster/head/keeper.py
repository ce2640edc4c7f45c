"""Keeps a cluster up from its head: installs the environment and runs Ray on the head and on every worker.

    python3 -m cluster.head.keeper start SITE.json      replace the keeper that runs, print the head's key
    python3 -m cluster.head.keeper stop SITE.json       end it
    python3 -m cluster.head.keeper state SITE.json      one JSON object: the nodes, and whether it runs
    python3 -m cluster.head.keeper run SITE.json        the keeper itself

`make up` starts it and reads the state of every node from SCRATCH/keeper.json. The keeper does not need the
laptop. It brings back a worker that was rebooted or whose Ray died. A reinstalled worker has lost the head's
key; `make up` gives it the key again. Standard library only: it runs before there is an environment.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from cluster import files, private
from cluster.head.addresses import is_address, own_address
from cluster.head.install import install
from cluster.head.ray_rest import FINAL, Ray, RayDown, stranger
from cluster.head.reap import descendants, of_cluster
from cluster.head.shell import Failure, Workers, bash, in_url, key_file

JOINED, FAILED = "joined", "failed"
BUSY = ("installing", "copying", "starting")  # states that may last
ALIVE_POLL_SECONDS = 2.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 3.0, 30.0
NUM_MISSES = 3  # polls in which a node, or Ray itself, must be missing before anything is done
WRITE_SECONDS = 0.2  # between two writes of the states
NUM_AT_ONCE = 32  # workers that are set up at a time: more would only share the head's network and CPUs
JOIN_SECONDS = 30.0  # from a start that succeeded until Ray must list the node


class States:
    """What the keeper knows of each node. Written to `SCRATCH/keeper.json` soon after a change.

    Many nodes change at once: a file for each change would be the square of their number in bytes.
    """

    def __init__(self, site: dict[str, Any]) -> None:
        self._file = Path(site["scratch"]) / "keeper.json"
        self._generation = site["generation"]
        self._lock = threading.Lock()
        self._nodes: dict[str, dict[str, Any]] = {}
        self._changed = threading.Event()
        threading.Thread(target=self._keep_written, daemon=True).start()

    def set(self, address: str, state: str, detail: str) -> None:
        """Note the state of a node."""
        with self._lock:
            old = self._nodes.get(address, {})
            if (old.get("state"), old.get("detail")) == (state, detail):
                return
            self._nodes[address] = {"state": state, "detail": detail, "since": time.time()}
            print(time.strftime("%F %T"), address, state, detail, flush=True)
        self._changed.set()

    def _keep_written(self) -> NoReturn:
        while True:
            self._changed.wait()
            self._changed.clear()
            with self._lock:
                report = {"generation": self._generation, "pid": os.getpid(), "nodes": dict(self._nodes)}
            try:
                files.write_json(self._file, report)
            except OSError as error:  # a full disk must not end the keeper
                print(time.strftime("%F %T"), files.problem_of(error), flush=True)
            time.sleep(WRITE_SECONDS)


class Keeper:
    """Brings up and watches the nodes of a site (`cluster.laptop.commands.for_head`)."""

    def __init__(self, site: dict[str, Any]) -> None:
        self.site = site
        self.scratch = Path(site["scratch"])
        self.ray = Ray(site["dashboard_port"])
        self._workers = Workers(site)
        self._set = States(site).set
        # node -> its resources, as Ray lists it; None: Ray is not up
        self._alive: dict[str, dict[str, float]] | None = None
        self._env = ""  # hash of the environment
        self._at_once = threading.Semaphore(NUM_AT_ONCE)
        for address in (site["head"], *site["workers"]):
            self._set(address, "waiting", "for the head" if address != site["head"] else "")

    def run(self) -> NoReturn:
        """Bring the head up, then the workers, and keep them up until SIGTERM."""
        for keep, workers in ((self._keep_worker, "workers"), (self._drain, "drained")):
            for worker in self.site[workers]:
                threading.Thread(target=keep, args=(worker,), daemon=True).start()
        self._keep_head()

    # --- the head

    def _address(self) -> str:
        """The head's, as the workers reach it."""
        return own_address(self.site["head"], self.site["workers"])

    def _keep_head(self) -> NoReturn:
        head, retry = self.site["head"], FIRST_RETRY_SECONDS
        while True:
            try:
                self._bring_up_head()
                retry = FIRST_RETRY_SECONDS
                self._watch()
                self._set(head, "waiting", "its Ray does not answer")
            except Exception as failure:  # any: it is shown in the state, and tried again
                self._set(head, FAILED, str(failure) or repr(failure))
                time.sleep(retry)
                retry = min(2 * retry, LAST_RETRY_SECONDS)
            self._alive = None

    def _watch(self) -> None:
        """Follow which nodes are alive, until Ray has not answered for some time."""
        misses = 0
        while misses < NUM_MISSES:
            try:
                self._alive = {node["node_name"]: node["resources_total"] for node in self.ray.nodes()}
                self._set(self.site["head"], JOINED, "")
                misses = 0
            except (RayDown, ValueError, KeyError, TypeError):
                misses += 1
            time.sleep(ALIVE_POLL_SECONDS)

    def _bring_up_head(self) -> None:
        site, head = self.site, self.site["head"]
        self._set(head, "installing", "environment")
        bash(site["setup"], on_line=lambda line: self._set(head, "installing", line[:100]))
        self._env = (self.scratch / "env/current").read_text().strip()
        bash(site["token"])
        try:
            Path(site["storage"]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failure(
                f"storage {site['storage']}: {error.strerror}; set storage in the inventory"
            ) from error
        marker = self.scratch / "started"
        settings = hashlib.sha256(
            f"{site['start_head']}{site['start_worker']}{self._env}".encode()
        ).hexdigest()
        self._require_no_stranger("gcs_port")
        if self._answers():
            if marker.exists() and marker.read_text() == settings:
                self._require_no_stranger("dashboard_port")  # a Ray started by hand after ours had died
                return
            going = [job["submission_id"] for job in self.ray.jobs() if job["status"] not in FINAL]
            if going:
                raise Failure(
                    f"{', '.join(going)} is going on a Ray with other settings than the inventory's: `make "
                    "stop` first, or wait for its end; nothing was changed"
                )
        elif any("gcs_server" in command for command in of_cluster(site["name"]).values()):
            raise Failure(
                "Ray runs and its dashboard does not answer; it is not restarted, because of what runs on "
                "it. If this stays so, `make down` and `make up`"
            )
        self._set(head, "starting", "Ray")
        bash(site["reap"])
        self._require_no_stranger("dashboard_port")
        self._require_no_stranger("agent_port")  # without which no job starts
        marker.unlink(missing_ok=True)
        bash(f"export ASUNCION_HEAD={self._address()}\n{site['start_head']}")
        marker.write_text(settings)
        deadline = time.monotonic() + JOIN_SECONDS
        while not self._answers():
            if time.monotonic() > deadline:
                raise Failure(
                    "Ray was started and its dashboard does not answer; see "
                    f"{self.scratch}/ray/session_latest/logs"
                )
            time.sleep(0.5)

    def _require_no_stranger(self, name: str) -> None:
        port = self.site[name]
        if whose := stranger(port, self.site["name"]):
            key = f"ports.{name.removesuffix('_port')}"
            raise Failure(f"port {port} is in use by {whose}; end that, or set {key} in the inventory")

    def _answers(self) -> bool:
        try:
            return self.ray.is_up()
        except ValueError as error:
            raise Failure(str(error)) from error

    # --- a worker

    def _keep_worker(self, worker: str) -> NoReturn:
        retry, misses = FIRST_RETRY_SECONDS, NUM_MISSES
        while True:
            alive = self._alive
            if alive is not None and worker in alive:
                self._set(worker, *_joined(self.site["gpus"][worker], alive[worker]))
                retry, misses = FIRST_RETRY_SECONDS, 0
            elif alive is not None and misses < NUM_MISSES:  # it was there a moment ago
                misses += 1
            elif alive is not None:
                try:
                    self._bring_up_worker(worker)
                except Exception as failure:
                    self._set(worker, FAILED, str(failure) or repr(failure))
                    self._sleep_until_pinned(worker, retry)
                    retry = min(2 * retry, LAST_RETRY_SECONDS)
                continue
            time.sleep(ALIVE_POLL_SECONDS)

    def _drain(self, worker: str) -> None:
        """Keep a worker out. What it runs ends first."""
        while True:
            if self._alive is None or worker not in self._alive:
                self._set(worker, "drained", "")
            elif self._is_busy():
                self._set(worker, "draining", "until the runs on this cluster have ended")
            else:
                with contextlib.suppress(Failure):
                    self._workers.ssh(worker, self.site["reap"])
            time.sleep(ALIVE_POLL_SECONDS)

    def _is_busy(self) -> bool:
        try:
            return any(job["status"] not in FINAL for job in self.ray.jobs())
        except (RayDown, ValueError):
            return True

    def _sleep_until_pinned(self, worker: str, seconds: float) -> None:
        """Sleep, until `make up` pins a key: what failed may then succeed."""
        known = self._workers.known_hosts
        before = known.stat().st_mtime_ns if known.exists() else 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and worker not in (self._alive or ()):
            if known.exists() and known.stat().st_mtime_ns != before:
                return
            time.sleep(0.5)

    def _bring_up_worker(self, worker: str) -> None:
        site = self.site
        env = self.scratch / "env" / self._env
        known = self._workers.known_hosts
        if not known.exists() or worker not in known.read_text().split():
            self._set(worker, "waiting", "for its host key, which `make up` brings from the laptop")
            time.sleep(0.5)
            return
        with self._at_once:
            install(site, self._workers, worker, env, note=partial(self._set, worker))
        self._workers.ssh(worker, f"{site['token']} -", given=private.read_token())
        self._set(worker, "starting", "Ray")
        first = f"{site['setup']} >&2 && {site['reap']} > /dev/null || exit 1\n"
        named = {
            "CLUSTER": site["name"],
            "NODE": worker,
            "ADDRESS": worker if is_address(worker) else "",
            "HEAD": in_url(self._address()),
            "RESOURCES": site["resources"][worker],
        }
        exports = "".join(f"export ASUNCION_{name}={shlex.quote(value)}\n" for name, value in named.items())
        self._workers.ssh(worker, exports + first + site["start_worker"], patience=90)
        deadline = time.monotonic() + JOIN_SECONDS
        while worker not in (self._alive or ()):
            if time.monotonic() > deadline:
                raise Failure(
                    f"its Ray started and does not join {site['head']}:{site['gcs_port']}: is a firewall "
                    f"between the nodes? See {site['scratch']}/ray-start.log there"
                )
            time.sleep(0.3)


def _joined(told: dict[str, float], resources: dict[str, float]) -> tuple[str, str]:
    """The state of a worker that Ray lists with these resources, where the inventory has told it others."""
    if all(resources.get(name, 0) == number for name, number in told.items()):
        return JOINED, ""
    here = ", ".join(f"{number:g} {name}" for name, number in told.items())
    return FAILED, f"its Ray was started before the inventory said {here}: `make down`, then `make up`"


# --- the command


def _pid(scratch: Path) -> int | None:
    """The keeper that runs, or None."""
    try:
        with (scratch / "keeper.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or 0) or None
    except FileNotFoundError:
        pass
    return None


def _stop(scratch: Path, name: str) -> None:
    """End the keeper and its pip, rsync and ssh, but not the Ray that it has started."""
    pid = _pid(scratch)
    under_way = descendants(pid) - set(of_cluster(name)) if pid is not None else set()
    deadline = time.monotonic() + 10
    while pid := _pid(scratch):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGTERM if time.monotonic() < deadline - 5 else signal.SIGKILL)
        time.sleep(0.1)
        if time.monotonic() > deadline:
            raise SystemExit(f"the keeper, pid {pid}, does not end")
    for child in under_way:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)


def state(scratch: Path) -> dict[str, Any]:
    """`keeper`: its report on the nodes, or None; `runs`: whether it runs; `said`: its last line."""
    place, log = scratch / "keeper.json", scratch / "keeper.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return {
        "now": time.time(),
        "keeper": json.loads(place.read_text()) if place.exists() else None,
        "runs": _pid(scratch) is not None,
        "said": lines[-1] if lines else "",
    }


def _start(file: Path, site: dict[str, Any]) -> None:
    scratch = Path(site["scratch"])
    _stop(scratch, site["name"])
    key = key_file(site)
    if not key.exists():
        key.parent.mkdir(mode=0o700, exist_ok=True)
        comment = f"asuncion {site['name']} head"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", key], check=True)
    with (scratch / "keeper.log").open("ab") as log:
        # Not a `cluster.process.Child`: the keeper must outlive this command and the connection it came by.
        subprocess.Popen(
            [sys.executable, "-m", "cluster.head.keeper", "run", file],
            cwd=site["code"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 10
    while _pid(scratch) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    print(key.with_name(f"{key.name}.pub").read_text().strip())


def _be(site: dict[str, Any]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # Ray goes on
    with (Path(site["scratch"]) / "keeper.lock").open("a+") as lock:
        deadline = time.monotonic() + 5  # `_pid` holds it for an instant
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SystemExit("a keeper runs already") from None
                time.sleep(0.02)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        Keeper(site).run()


def main(verb: str, file: Path) -> None:
    """One of the commands above."""
    site = json.loads(file.read_text())
    scratch = Path(site["scratch"])
    if verb == "start":
        _start(file, site)
    elif verb == "stop":
        _stop(scratch, site["name"])
    elif verb == "state":
        print(json.dumps(state(scratch)))
    elif verb == "run":
        _be(site)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
