"""A client of Ray's REST interface on the head: nodes and jobs. Standard library only: it starts fast.

Ray's own commands take 1 to 3 seconds each to import, and `ray job` neither resumes a log nor survives a lost
link. Source: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/api.html
"""

import contextlib
import json
import os
import pwd
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from cluster.head.reap import of_cluster, processes
from cluster.private import read_token, token_file

FINAL = ("SUCCEEDED", "FAILED", "STOPPED")  # states of a job that has ended


class RayDown(RuntimeError):
    """Ray does not answer on this node."""


class Ray:
    """The Ray whose dashboard listens on a loopback port of this machine."""

    def __init__(self, dashboard_port: int) -> None:
        self._port = dashboard_port
        self._base = f"http://127.0.0.1:{dashboard_port}"

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            self._ask("GET", "/api/version")
        except RayDown:
            return False
        return True

    def session(self) -> str:
        """Name of its session; its logs lie in <scratch>/ray/<session>."""
        return self._ask("GET", "/api/version")["session_name"]

    def nodes(self) -> list[dict[str, Any]]:
        """Its nodes that are alive: node_ip, node_name, is_head_node, resources_total and more."""
        answer = self._ask(
            "GET", "/api/v0/nodes?limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        )
        return answer["data"]["result"]["result"]

    def jobs(self) -> list[dict[str, Any]]:
        """Submitted jobs, oldest first: submission_id, status, message, start_time, metadata and more."""
        jobs = [job for job in self._ask("GET", "/api/jobs/") if job.get("submission_id")]
        return sorted(jobs, key=lambda job: job.get("start_time") or 0)

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """One job, or None if this Ray does not know it."""
        return self._ask("GET", f"/api/jobs/{submission_id}", absent=(404,))

    def upload(self, name: str, data: bytes) -> None:
        """Store a working directory as gcs://`name`."""
        self._ask("PUT", f"/api/packages/gcs/{name}", data=data, binary=True)

    def submit(self, request: dict[str, Any]) -> None:
        """Start a job. Safe to repeat: an existing job of this submission_id stays as it is."""
        try:
            self._ask("POST", "/api/jobs/", data=json.dumps(request).encode())
        except ValueError as error:
            if "already exists" not in str(error):
                raise

    def stop(self, submission_id: str) -> None:
        """Ask a job to end; its driver gets RAY_JOB_STOP_SIGNAL, and SIGKILL if it does not end."""
        self._ask("POST", f"/api/jobs/{submission_id}/stop")

    def _ask(
        self,
        method: str,
        path: str,
        *,
        data: bytes | None = None,
        binary: bool = False,
        absent: tuple[int, ...] = (),
    ) -> Any:
        owner = listener(self._port)
        if owner is None:
            raise RayDown(f"Ray does not answer at {self._base}")
        if owner != os.getuid():  # who would be given the token
            raise ValueError(
                f"port {self._port} is user {_name(owner)}'s, not your Ray's; set ports.dashboard in the "
                "inventory"
            )
        request = urllib.request.Request(self._base + path, data=data, method=method)
        if token := read_token():
            request.add_header("Authorization", f"Bearer {token.decode()}")
        request.add_header("Content-Type", "application/octet-stream" if binary else "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code in absent:
                return None
            if error.code in (401, 403):
                raise ValueError(
                    f"the Ray on port {self._port} refuses the token in {token_file()}: if it is another "
                    "cluster's, set ports.dashboard and ports.gcs in the inventory; else `make down` and "
                    "`make up`"
                ) from error
            if error.code >= 500 and "already exists" not in said:
                raise RayDown(f"Ray's job server: {_reason(said) or error}") from error
            raise ValueError(said.strip() or str(error)) from error
        except (OSError, ValueError, HTTPException) as error:
            raise RayDown(f"Ray does not answer at {self._base} ({error})") from error
        if binary:
            return None
        try:
            return json.loads(body)
        except ValueError as error:
            raise RayDown(f"what answers at {self._base} is not Ray's job server") from error


def listener(port: int) -> int | None:
    """The user who listens on this TCP port of 127.0.0.1 or of every address, or None."""
    loopback, every = "0100007F", "00000000"
    users = [user for local, user, _ in _listening(port, ("tcp",)) if local in (loopback, every)]
    return users[0] if users else None


def stranger(port: int, cluster: str) -> str | None:
    """Who listens on this TCP port without being a process of this cluster, in words; None if nobody does.

    Of another user's process only the user is known.
    """
    ours = set().union(*map(_sockets, of_cluster(cluster)))
    for _, user, inode in _listening(port):
        if inode in ours:
            continue
        if user != os.getuid():
            return f"user {_name(user)}"
        for pid, process in processes().items():
            if inode in _sockets(pid):
                return f"a process of yours, pid {pid}: {process.command[:80].strip()}"
        return "a process of yours"
    return None


def _listening(port: int, tables: Sequence[str] = ("tcp", "tcp6")) -> list[tuple[str, int, str]]:
    """(address in hexadecimal, user, inode) of every socket that listens on this TCP port, IPv4 and IPv6.

    The kernel takes milliseconds to write a table.
    """
    found = []
    for table in tables:
        file = Path("/proc/net", table)
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            _, local, _, state, _, _, _, user, _, inode, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.append((address, int(user), inode))
    return found


def _sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process has open; none if it has ended or is another user's."""
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                kind, _, inode = os.readlink(link).partition(":")
                if kind == "socket":
                    found.add(inode.strip("[]"))
    return found


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _reason(traceback: str) -> str:
    """The lines from the last one that names an error. The very last line may be only a full stop."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    begins = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return " ".join(lines[begins[-1] if begins else -1 :])[:500]
