"""OpenSSH from the laptop to the nodes: one shared connection per node, host keys pinned.

The head is reached directly and the workers through it, so only the head needs to be reachable from outside.
The first `make up` pins each node's host key in ~/.asuncion/NAME/known_hosts; from then on another key is an
error. The private key stays on the laptop: there is no agent forwarding either.
"""

import hashlib
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cluster import private, process
from cluster.cli import RunError
from cluster.head.shell import BEGIN, PLAIN, after_greeting, in_url, login_command, not_run, quiet_rsync
from cluster.laptop.keys import Inventory

CONNECT_SECONDS = 4  # SYN goes out at 0, 1 and 3 s: more patience would only lengthen the gaps
# A dead link is noticed after 6 s (ssh waits for one interval more than it counts). TCP alone would double
# its wait at each attempt, and so might use a link only as long after its return as the outage lasted.
ALIVE_SECONDS, ALIVE_COUNT = 2, 2
PERSIST_SECONDS = 900  # for which the connection outlives the last command
RETRY_SECONDS = (0.3, 0.6, 1.0)  # between attempts at a lost link; the last one repeats
LINK_CODES = (10, 12, 30, 35, 255)  # exit codes of rsync for a connection that broke
T = TypeVar("T")

# what ssh says of a file of the user's that it does not read, by line and option
CONFIGURATION = re.compile(
    r"Bad owner or permissions on .*|Bad configuration option.*|terminating, \d+ bad configuration options|"
    r"[^\n]*line \d+: [^\n]*",
)
# lines of ssh that do not say why: of a first contact, and of a connection through the head that ended
NO_REASON = ("Permanently added", "UNKNOWN port 65535")
TRANSPORT = 255  # ssh's own exit code, for all that is not the remote command's


class NodeError(RunError):
    """A node refuses, and trying again does not help. The message names the node and the remedy."""


class LinkError(RunError):
    """A node cannot be reached now. The message names the node and the reason."""


class CommandError(RunError):
    """A command on a node failed. The message names the node; `code` and `output` are the command's."""

    def __init__(self, message: str, *, code: int, output: str) -> None:
        super().__init__(message)
        self.code = code
        self.output = output


class Ssh:
    """Commands on one node of a cluster.

    Args:
        address: of the inventory's nodes: its address or name there.
        pin: accept and keep the key of a host that is met for the first time, as `make up` does.
    """

    def __init__(self, inventory: Inventory, address: str, *, pin: bool = False) -> None:
        self.address = address
        self._inventory = inventory
        self._pin = pin

    @property
    def host(self) -> str:
        """The node's address, as it is reached."""
        return self._inventory.reached_at if self.address == self._inventory.head else self.address

    @property
    def user(self) -> str:
        """The user on the node."""
        return self._inventory.ssh_of(self.address).user

    def arguments(self) -> list[str]:
        """ssh with all options, for this node."""
        inventory = self._inventory
        arguments = ["ssh", *self.options()]
        if self.address == inventory.head:
            return [*arguments, f"{self.user}@{self.host}"]
        head = Ssh(inventory, inventory.head, pin=self._pin)
        escaped = [part.replace("%", "%%") for part in head.arguments()]
        proxy = shlex.join([*escaped[:-1], "-W", "[%h]:%p", escaped[-1]])
        return [*arguments, "-o", f"ProxyCommand={proxy}", f"{self.user}@{self.address}"]

    def options(self) -> list[str]:
        """Options of ssh, the same for ssh and for rsync's ssh."""
        home, login = self._inventory.home, self._inventory.ssh_of(self.address)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        options = {
            **PLAIN,
            "IdentityFile": str(Path(login.key).expanduser()),
            **({"Port": str(login.port)} if login.port is not None else {}),
            "HostKeyAlias": self.host,  # what known_hosts calls it here and on the head, whatever the port
            "StrictHostKeyChecking": "accept-new" if self._pin else "yes",
            "UserKnownHostsFile": str(home / "known_hosts"),
            "HashKnownHosts": "no",  # the head is given the workers' lines
            "ConnectTimeout": str(CONNECT_SECONDS),
            "ServerAliveInterval": str(ALIVE_SECONDS),
            "ServerAliveCountMax": str(ALIVE_COUNT),
            "ControlMaster": "auto",
            "ControlPath": f"{_sockets(home)}/%C",
            "ControlPersist": str(PERSIST_SECONDS),
        }
        return [part for name, value in options.items() for part in ("-o", f"{name}={value}")]

    def run(self, script: str, *, given: bytes = b"", timeout: float = 120) -> bytes:
        """Run a bash script on the node, in one round trip, and return its standard output.

        Args:
            given: its standard input.
            timeout: seconds after which it counts as unreachable.

        Raises:
            NodeError: wrong key, changed host key, unknown host name.
            LinkError: no answer, or the connection broke.
            CommandError: the script's exit code was not 0.
        """
        try:
            done = subprocess.run(
                [*self.arguments(), login_command(script)], input=given, capture_output=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise LinkError(f"{self.address}: no answer within {timeout:g} s") from error
        except FileNotFoundError as error:
            raise NodeError("ssh: no such command; install the OpenSSH client on this machine") from error
        said = done.stderr.decode(errors="replace").rpartition(f"{BEGIN}\n")[2].strip()
        if done.returncode == TRANSPORT:
            raise self.explain(said)
        if (answer := after_greeting(done.stdout)) is None:
            raise NodeError(f"{self.address}: {not_run(done.stdout + done.stderr)}")
        if done.returncode:
            output = said or answer.decode(errors="replace").strip()
            last = output.splitlines()[-1] if output else "no output"
            raise CommandError(
                f"{self.address}: {last} (exit code {done.returncode})", code=done.returncode, output=output
            )
        return answer

    def explain(self, said: str) -> RunError:
        """The error behind ssh's message when it ended with its own exit code."""
        inventory, node = self._inventory, self.address
        login = inventory.ssh_of(node)
        head = Ssh(inventory, inventory.head)
        through = "" if node == inventory.head else f"-o ProxyJump={head.user}@{head.host} "
        through += f"-p {login.port} " if login.port is not None else ""
        if "UNPROTECTED PRIVATE KEY" in said:
            return NodeError(f"{node}: ssh refuses {login.key}, which others can read: `chmod 600` it")
        if "Permission denied" in said and _has_passphrase(key := Path(login.key).expanduser()):
            return NodeError(
                f"{node}: the key {key} has a passphrase, and no agent holds it: `ssh-add {key}`"
            )
        if "Permission denied" in said or "Too many authentication failures" in said:
            return NodeError(
                f"{node}: refuses the key {login.key} for user {self.user}; set ssh.user and ssh.key in the "
                f"inventory, or `ssh-copy-id {through}-i {login.key} {self.user}@{self.host}`"
            )
        if "HOST IDENTIFICATION HAS CHANGED" in said or "Host key verification failed" in said:
            known = inventory.home / "known_hosts"
            if "CHANGED" in said:
                return NodeError(
                    f"{node}: its host key is not the pinned one. If the node was installed anew: "
                    f"`ssh-keygen -R {self.host} -f {known}`, then `make up`; if not, somebody is in between"
                )
            return NodeError(
                f"{node}: its host key is not pinned in {known}; run `make up` from this machine"
            )
        if "Unable to negotiate" in said:
            offer = said.partition("Unable to negotiate")[2].strip(".")
            return NodeError(f"{node}: ssh here and sshd there have no algorithm in common ({offer.strip()})")
        if "Could not resolve hostname" in said and "Temporary failure" not in said:
            return NodeError(f"{node}: no such host; check the address in the inventory")
        if "no such identity" in said.lower() or "invalid format" in said:
            return NodeError(f"{login.key}: cannot be used as a key; set ssh.key in the inventory")
        if "administratively prohibited" in said:
            return NodeError(
                f"{node}: sshd on {inventory.head} forbids forwarding, by which the workers are reached; "
                f"its administrator can set `AllowTcpForwarding yes` for {self.user}"
            )
        if refusal := CONFIGURATION.search(said):
            return NodeError(f"{node}: ssh here refuses its configuration: {refusal[0]}; see ~/.ssh/config")
        lines = [line for line in said.splitlines() if not any(mark in line for mark in NO_REASON)]
        return LinkError(f"{node}: {lines[-1] if lines else 'the connection broke'}")


def _has_passphrase(key: Path) -> bool:
    """Whether the private key is there, and cannot be used without a passphrase."""
    if not key.exists():
        return False
    done = subprocess.run(["ssh-keygen", "-y", "-P", "", "-f", key], capture_output=True, text=True)
    return "incorrect passphrase" in done.stderr


def _sockets(home: Path) -> Path:
    """The folder of this cluster's sockets, short: their paths may have 104 bytes (macOS)."""
    folder = Path(f"/tmp/asuncion-{os.getuid()}/{hashlib.sha256(bytes(home)).hexdigest()[:8]}")
    try:
        private.make_folder(folder.parent)
        private.make_folder(folder)
    except PermissionError as error:
        raise NodeError(f"{error.filename}: {error.strerror}") from error
    return folder


class Outage:
    """Backs off while a link is lost. Reports the loss once and the return once."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._since: float | None = None
        self._tries = 0

    def wait(self, why: str) -> float:
        """The link is lost, or still lost: sleep before the next attempt. Returns seconds since the loss."""
        if self._since is None:
            self._since = time.monotonic()
            self._report(f"link lost: {why}; trying again until it is back")
        time.sleep(RETRY_SECONDS[min(self._tries, len(RETRY_SECONDS) - 1)])
        self._tries += 1
        return time.monotonic() - self._since

    def end(self) -> None:
        """The link works."""
        if self._since is not None:
            self._report(f"link is back, {time.monotonic() - self._since:.0f} s after it was missed")
        self._since, self._tries = None, 0


def patiently(attempt: Callable[[], T], *, patience: float, report: Callable[[str], None]) -> T:
    """The result of `attempt`, which is repeated while the link is lost.

    Args:
        patience: seconds for which it is repeated, from the first loss on.
        report: called at the loss and at the return, once each.

    Raises:
        LinkError: the link did not come back in this time.
    """
    outage = Outage(report)
    while True:
        try:
            result = attempt()
        except LinkError as error:
            if outage.wait(str(error)) > patience:
                raise LinkError(f"{error}; gave up after {patience:g} s") from error
        else:
            outage.end()
            return result


def transfer(node: Ssh, command: Sequence[str], *, patience: float, report: Callable[[str], None]) -> str:
    """The output of rsync, which is repeated while the link is lost. What has arrived is kept.

    Args:
        command: from `push` or `rsync`.
        patience: as for `patiently`.

    Raises:
        LinkError: the link did not come back in this time.
        RunError: rsync failed, and the link is not the cause.
    """

    def attempt() -> str:
        try:
            done = process.run(command, whole_tree=False)
        except FileNotFoundError as error:
            raise RunError("rsync: no such command; install it on this machine and on the head") from error
        lines = done.stderr.strip().splitlines() or [f"rsync's code {done.returncode}"]
        said = next((line for line in lines if line.startswith("rsync")), lines[0])  # a login may print too
        if done.returncode in LINK_CODES:
            raise LinkError(f"{node.address}: {said}")
        if done.returncode:
            raise RunError(f"{node.address}: {said}")
        return done.stdout

    return patiently(attempt, patience=patience, report=report)


def push(node: Ssh, source: Path, target: str) -> list[str]:
    """The command that makes the folder `target` of the node equal to `source` here; goes on as `rsync`."""
    return [
        *("rsync", "--archive", "--compress", "--delete", "--partial-dir=.rsync-partial"),
        *quiet_rsync(["ssh", *node.options()]),
        *(f"{source}/", f"{node.user}@{in_url(node.host)}:{target}/"),
    ]


def rsync(node: Ssh, source: str, target: Path, *, exclude: Sequence[str]) -> list[str]:
    """The command that brings the folder `target` here up to date with the folder `source` of the node.

    Only differences travel, and a file that broke off goes on where it stopped.
    """
    return [
        *(
            "rsync",
            "--archive",
            "--safe-links",
            "--compress",
            "--partial-dir=.rsync-partial",
            "--stats",
        ),
        *quiet_rsync(["ssh", *node.options()]),
        *(f"--exclude={name}" for name in exclude),
        *(f"{node.user}@{in_url(node.host)}:{source.rstrip('/')}/", f"{target}/"),
    ]
