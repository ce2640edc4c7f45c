"""Commands over ssh, whatever the login shell is and prints; commands of the keeper, and what failures mean.

    python3 shell.py ssh ...     as ssh, without what the login shell prints first: for `rsync -e`

Standard library only: it runs before there is an environment.
"""

import base64
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BEGIN = "asuncion-begins"  # the line, on both streams, after which what a script prints begins
RSYNC_PATH = f"echo {BEGIN}; rsync"  # the same for rsync's own command there
# No option of the user's ssh configuration may put another command, a terminal or a forwarding in the way.
PLAIN = {
    "BatchMode": "yes",  # nothing may ask
    "IdentitiesOnly": "yes",  # an agent's other keys would use up the server's attempts
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "GlobalKnownHostsFile": "/dev/null",
    "UpdateHostKeys": "no",
    "LogLevel": "INFO",  # at ERROR ssh says nothing of a failed negotiation, nor that the server hung up
}


class Failure(Exception):
    """A node cannot join now. The message says why and what to do."""


class Workers:
    """The workers of a site (`cluster.laptop.commands.for_head`), as the head reaches them."""

    def __init__(self, site: dict[str, Any]) -> None:
        self._logins = site["logins"]
        self.known_hosts = Path(site["scratch"]) / "known_hosts"
        options = {
            **PLAIN,
            "IdentityFile": str(key_file(site)),
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "ConnectTimeout": "5",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
        }
        self._ssh = ["ssh", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]

    def _to(self, worker: str) -> list[str]:
        port = self._logins[worker]["port"]
        return [*self._ssh, "-o", f"HostKeyAlias={worker}", *(("-p", str(port)) if port else ())]

    def ssh(self, worker: str, script: str, *, given: bytes = b"", patience: float = 60) -> str:
        """Output of a script on a worker. Raises `Failure`."""
        place = f"{self._logins[worker]['user']}@{worker}"
        said = _run([*self._to(worker), place, login_command(script)], given=given, patience=patience)
        if (output := after_greeting(said)) is None:
            raise Failure(not_run(said))
        return output.decode(errors="replace")

    def rsync(self, worker: str, folder: Path, *more: str) -> None:
        """Make a worker's folder equal to the head's. Raises `Failure`."""
        through = quiet_rsync(self._to(worker))
        target = f"{self._logins[worker]['user']}@{in_url(worker)}:{folder}/"
        command = ["rsync", "--archive", "--delete", *more, *through, f"{folder}/", target]
        _run(command, patience=3600)


def in_url(node: str) -> str:
    """A node's address or name before a port, where IPv6 needs brackets."""
    return f"[{node}]" if ":" in node else node


def key_file(site: dict[str, Any]) -> Path:
    """The head's own private key, made there and never anywhere else."""
    return Path("~/.ssh").expanduser() / f"asuncion_{site['name']}"


def login_command(script: str) -> str:
    """One command by which any login shell (sh, bash, zsh, tcsh, fish) has bash run the script, in the home.

    Base64 has nothing that a shell would expand, and no line end, which tcsh forbids in quotes. Without
    --norc bash reads ~/.bashrc once more, because sshd has started it.
    """
    begin = f"echo {BEGIN}; echo {BEGIN} >&2; cd || cd /\n"
    packed = base64.b64encode((begin + script).encode()).decode()
    return f"exec bash --norc -c 'eval \"$(echo {packed} | base64 -d)\"'"


def after_greeting(output: bytes) -> bytes | None:
    """What the script of a `login_command` printed; None if it did not run."""
    _, found, rest = output.partition(f"{BEGIN}\n".encode())
    return rest if found else None


def not_run(output: bytes) -> str:
    """What to do about a login that does not run the command."""
    said = output.decode(errors="replace").strip()
    return (
        f"the login ends without running the command (it printed {said[-200:]!r}): does ~/.bashrc or the "
        "like exit there, or is the key bound to a command in authorized_keys?"
    )


def quiet_rsync(ssh: Sequence[str]) -> list[str]:
    """Options of rsync that make it go through this ssh, and drop what the login shell prints first."""
    through = shlex.join([sys.executable, str(Path(__file__).resolve()), *ssh])
    return ["-e", through, f"--rsync-path={RSYNC_PATH}"]


def _drop_greeting(command: Sequence[str]) -> int:
    """Run a command, and pass on what it prints after the line BEGIN. Returns its exit code."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    os.set_blocking(1, True)  # rsync gives a socket that is not: a full one would refuse what we write
    pass_on = PastGreeting(lambda chunk: os.write(1, chunk))
    while chunk := os.read(child.stdout.fileno(), 1 << 16):
        pass_on(chunk)
    return child.wait()


class PastGreeting:
    """Calls `write` with the bytes that follow the line BEGIN in a stream that comes in chunks."""

    def __init__(self, write: Callable[[bytes], Any]) -> None:
        self._write = write
        self.greeting: bytes | None = b""  # what came so far; None: BEGIN has been seen

    def __call__(self, chunk: bytes) -> None:
        if self.greeting is not None:
            self.greeting += chunk
            if (rest := after_greeting(self.greeting)) is None:
                return
            self.greeting, chunk = None, rest
        if chunk:
            self._write(chunk)


def _run(command: list[str], *, given: bytes = b"", patience: float) -> bytes:
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=patience)
    except subprocess.TimeoutExpired as error:
        raise Failure(f"did not answer within {patience:g} s") from error
    except FileNotFoundError as error:
        raise Failure(f"{command[0]}: no such command on the head; install it") from error
    said = done.stderr.decode(errors="replace").rpartition(f"{BEGIN}\n")[2].strip()
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
        text = said or (after_greeting(done.stdout) or done.stdout).decode(errors="replace").strip()
        if "No space left" in text:
            raise Failure(f"{_last_line(text)}; make room, or set scratch in the inventory")
        raise Failure(_last_line(text) or f"exit code {done.returncode}")
    return done.stdout


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


if __name__ == "__main__":
    sys.exit(_drop_greeting(sys.argv[1:]))
