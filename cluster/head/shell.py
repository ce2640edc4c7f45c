"""Commands that the keeper runs, on the head and over ssh on the workers. A failure says what to do.

Standard library only: it runs before there is an environment.
"""

import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any


class Failure(Exception):
    """A node cannot join now. The message says why and what to do."""


class Workers:
    """The workers of a site (`cluster.laptop.inventory.Inventory.site`), as the head reaches them."""

    def __init__(self, site: dict[str, Any]) -> None:
        self._user = site["user"]
        self.known_hosts = Path(site["scratch"]) / "known_hosts"
        options = {
            "BatchMode": "yes",
            "IdentityFile": str(key_file(site)),
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "UpdateHostKeys": "no",
            "ConnectTimeout": "5",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "LogLevel": "ERROR",
        }
        self._ssh = ["ssh", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]

    def ssh(self, worker: str, script: str, *, given: bytes = b"", patience: float = 60) -> str:
        """Output of a script on a worker. Raises `Failure`."""
        command = [*self._ssh, f"{self._user}@{worker}", "bash", "-c", shlex.quote(script)]
        return _run(command, given=given, patience=patience)

    def rsync(self, worker: str, folder: Path, *more: str) -> None:
        """Make a worker's folder equal to the head's. Raises `Failure`."""
        target = f"{self._user}@{worker}:{folder}/"
        through = shlex.join(self._ssh)
        _run(["rsync", "--archive", "--delete", *more, "-e", through, f"{folder}/", target], patience=3600)


def key_file(site: dict[str, Any]) -> Path:
    """The head's own private key, made there and never anywhere else."""
    return Path("~/.ssh").expanduser() / f"asuncion_{site['name']}"


def _run(command: list[str], *, given: bytes = b"", patience: float) -> str:
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=patience)
    except subprocess.TimeoutExpired as error:
        raise Failure(f"did not answer within {patience:g} s") from error
    except FileNotFoundError as error:
        raise Failure(f"{command[0]}: no such command on the head; install it") from error
    said = done.stderr.decode(errors="replace").strip()
    if "Permission denied (" in said:
        raise Failure("does not accept the head's key (installed anew?): run `make up` again")
    if "Host key verification failed" in said or "HOST IDENTIFICATION HAS CHANGED" in said:
        raise Failure("has another host key than the pinned one: `make up` from the laptop says what to do")
    if other := re.search(r"Version mismatch.*Ray: (\S+).*Ray: (\S+)", said, re.DOTALL):
        raise Failure(
            f"has Ray {other[2]}, and the head has {other[1]}: its environment was changed by hand; rm -r "
            "the folder env in its scratch, and it is copied again"
        )
    if done.returncode:
        text = said or done.stdout.decode(errors="replace").strip()
        if "No space left" in text:
            raise Failure(f"{_last_line(text)}; make room, or set scratch in the inventory")
        raise Failure(_last_line(text) or f"exit code {done.returncode}")
    return done.stdout.decode(errors="replace")


def bash(script: str, *, on_line: Any = None) -> str:
    """Output of a script on this machine; `on_line` gets each line as it comes. Raises `Failure`."""
    process = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.decode(errors="replace").rstrip())
        if on_line:
            on_line(lines[-1])
        if "Ray runtime started" in lines[-1]:  # what it leaves running keeps this pipe open
            break
    if process.wait():
        raise Failure(_last_line("\n".join(lines)) or f"exit code {process.returncode}")
    return "\n".join(lines)


def _last_line(text: str) -> str:
    """The last line that says something: not a frame of pip's or a pointer of Python's."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
    errors = [line for line in lines if "rror" in line or "No space left" in line]
    return (errors or lines or [""])[-1][:300]


def is_taken(port: int) -> bool:
    """Whether something listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False


def by_whom(port: int) -> str:
    """Which program listens on the port, as part of a sentence; empty if that is unknown."""
    if shutil.which("ss") is None:
        return ""
    said = subprocess.run(["ss", "-Hltnp", f"sport = :{port}"], capture_output=True, text=True).stdout
    _, found, user = said.partition('users:(("')
    return f" by {user.partition(chr(34))[0]}" if found else ""
