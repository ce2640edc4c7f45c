"""Four hosts on one machine: a laptop, and a head with two workers behind a router and a slow link.

Each host has its own network, process table, /tmp, /dev/shm, home and sshd. Between the laptop and the
cluster lies a relay in user space (`wan.py`) with delay, jitter, loss and outages. Needs root, iproute2,
openssh-server, tini, rsync and /dev/net/tun.

    with Lab(folder) as lab: lab.run("nyc", "...")
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.commands import ROOT, tiny, write_corpus
from tests.waiting import PATIENCE_SECONDS, wait_until

ADDRESSES = {"nyc": "10.77.0.2", "head": "10.77.2.10", "worker1": "10.77.2.11", "worker2": "10.77.2.12"}
IPV6 = {name: f"fd77::{address.split('.')[2]}:{address.split('.')[3]}" for name, address in ADDRESSES.items()}
CLUSTER = ("head", "worker1", "worker2")
SCRATCH, STORAGE = "/scratch/lab", "/storage/lab"
CLUSTER_FILE = "/root/lab.yaml"  # on the laptop
SSHD = """\
Port 22
HostKey /etc/ssh/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PrintMotd no
Subsystem sftp /usr/lib/openssh/sftp-server
MaxStartups 300
"""
_NUMBERS = itertools.count()  # of the labs of this process
PYTHON = f"{sys.base_prefix}/bin/python3"


def add_host(name: str, address: str) -> None:
    """Give the labs of this process one more host beside the cluster's."""
    ADDRESSES[name] = address
    IPV6[name] = f"fd77::2:{address.rpartition('.')[2]}"


def missing() -> str | None:
    """Why there can be no lab on this machine, or None."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    packages = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client"}
    for program in ("ip", "sshd", "ssh", "tini", "rsync"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            return f"needs {program} (Debian's {packages.get(program, program)})"
    if not (Path(ROOT) / ".venv/bin/python").exists():
        return "needs .venv in the repository, which `make test` makes"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    probe = subprocess.run(["unshare", "-m", "-p", "-u", "-i", "-n", "-f", "true"], capture_output=True)
    return None if probe.returncode == 0 else "needs namespaces, which this machine forbids"


class Network:
    """A network namespace for each host and one for the gateway, and the slow link beyond it."""

    def __init__(self, folder: Path) -> None:
        self._prefix = f"lab{os.getpid()}-{next(_NUMBERS)}"
        self._control = folder / "wan.json"
        self._relay: subprocess.Popen[bytes] | None = None

    def build(self) -> None:
        for name in (*ADDRESSES, "gw"):
            _do("ip", "netns", "add", self.namespace(name))
            self.ip(name, "link set lo up")
        self.ip("gw", "link add br0 type bridge")
        self.ip("gw", "addr add 10.77.2.1/24 dev br0")
        self.ip("gw", "addr add fd77::2:1/112 dev br0 nodad")
        self.ip("gw", "link set br0 up")
        for setting in ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"):
            _do("ip", "netns", "exec", self.namespace("gw"), "sysctl", "-qw", setting)
        for name in [name for name in ADDRESSES if name != "nyc"]:
            self.ip("gw", f"link add v-{name} type veth peer name eth0 netns {self.namespace(name)}")
            self.ip("gw", f"link set v-{name} master br0 up")
            self.ip(name, f"addr add {ADDRESSES[name]}/24 dev eth0")
            self.ip(name, f"addr add {IPV6[name]}/112 dev eth0 nodad")
            self.ip(name, "link set eth0 up")
            self.ip(name, "route add default via 10.77.2.1")
            self.ip(name, "route add default via fd77::2:1")
        self.link()
        relay = ["setpriv", "--pdeathsig", "KILL", sys.executable, Path(__file__).with_name("wan.py")]
        relay += [self.namespace("nyc"), self.namespace("gw"), self._control]
        self._relay = subprocess.Popen(relay)
        for name, address in (("nyc", "10.77.1.2/30"), ("gw", "10.77.1.1/30")):
            there = ("ip", "-n", self.namespace(name), "link", "show", "wan0")
            wait_until(lambda there=there: _try(*there), told="wan0")
            self.ip(name, f"addr add {address} dev wan0")
            self.ip(name, "link set wan0 up txqueuelen 5000")
        self.ip("nyc", f"addr add {ADDRESSES['nyc']}/32 dev lo")
        self.ip("nyc", f"addr add {IPV6['nyc']}/128 dev lo")
        self.ip("nyc", f"route add 10.77.2.0/24 via 10.77.1.1 dev wan0 src {ADDRESSES['nyc']}")
        self.ip("nyc", f"route add fd77::2:0/112 dev wan0 src {IPV6['nyc']}")
        self.ip("gw", f"route add {ADDRESSES['nyc']}/32 via 10.77.1.2 dev wan0")
        self.ip("gw", f"route add {IPV6['nyc']}/128 dev wan0")

    def close(self) -> None:
        """Remove what was made of it."""
        if self._relay:
            self._relay.kill()
            self._relay.wait()
        for name in (*ADDRESSES, "gw"):
            _try("ip", "netns", "del", self.namespace(name))

    def link(
        self,
        *,
        delay_ms: float = 0.0,
        jitter_ms: float = 0.0,
        loss: float = 0.0,
        burst: float = 1.0,
        down: bool | str = False,
    ) -> None:
        """Set the link to the cluster: one-way delay and jitter, loss, or an outage.

        Args:
            loss: as a fraction of 1; `burst`: packets that are lost in a row, on average.
            down: "there" (to the cluster), "back", or True for both ways.
        """
        part = self._control.with_suffix(".part")
        state = {"delay_ms": delay_ms, "jitter_ms": jitter_ms, "loss": loss, "burst": burst}
        state["down"] = {True: "both", False: ""}.get(down, down)
        part.write_text(json.dumps(state))
        part.rename(self._control)

    def namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def ip(self, name: str, arguments: str) -> None:
        """`ip` in the namespace of a host, or of the gateway."""
        _do("ip", "-n", self.namespace(name), *arguments.split())


class Lab:
    """The four hosts, for the length of a `with` block.

    Args:
        folder: an empty folder for their disks, keys and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._network = Network(folder)
        self.link = self._network.link
        self.storage = folder / "storage"

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        self.storage.mkdir(parents=True)
        disks = self.folder / "hosts"
        disks.mkdir()
        # the upper folder of an overlay must lie elsewhere than /
        _do("mount", "-t", "tmpfs", "-o", "size=8g,mode=755", "lab", disks)
        for name in ("user", *ADDRESSES):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", self.folder / f"key_{name}")
        public = (self.folder / "key_user.pub").read_text()
        (disks / "authorized_keys").write_text(public)
        (disks / "sshd_config").write_text(SSHD)
        lines = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (disks / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")
        self._network.build()
        for name in ADDRESSES:
            (disks / name).mkdir()
            shutil.copy(self.folder / f"key_{name}", disks / name / "host_key")
            self.power_on(name)
        shutil.copy(self.folder / "key_user", disks / "nyc/disk/home/.ssh/id_ed25519")
        self.write_inventory()

    def close(self) -> None:
        """End all hosts with all that runs on them, and remove what was made."""
        for name in list(self._hosts):
            self.power_off(name)
        self._network.close()
        _try("umount", "-l", self.folder / "hosts")

    # --- hosts

    def power_on(self, name: str) -> None:
        """Start a host and wait for its sshd."""
        command = [
            *("setpriv", "--pdeathsig", "KILL"),  # a killed test leaves nothing behind
            *("ip", "netns", "exec", self._network.namespace(name)),
            *("unshare", "-m", "-p", "-u", "-i", "-f", "--kill-child=KILL"),
            *(Path(__file__).with_name("host.sh"), name, self.folder / "hosts" / name),
            *(f"{sys.base_prefix} {ROOT}", "" if name == "nyc" else self.storage),
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("ab") as log:
            self._hosts[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "LAB_PATH": f"{sys.base_prefix}/bin"},
            )  # fmt: skip
        probe = f"exec 3<>/dev/tcp/{ADDRESSES[name]}/22"
        near = name if name == "nyc" else "gw"
        connect = ("ip", "netns", "exec", self._network.namespace(near), "timeout", "1", "bash", "-c", probe)
        wait_until(lambda: _try(*connect), told=f"{name}'s sshd")

    def power_off(self, name: str, *, wipe: bool = False) -> None:
        """End a host at once, as a loss of power would; `wipe` installs it anew, with the same host key."""
        host = self._hosts.pop(name)
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended by itself
            for child in _children(host.pid):
                os.kill(child, signal.SIGKILL)
        host.kill()
        host.wait()
        if wipe:
            shutil.rmtree(self.folder / "hosts" / name / "disk")

    def command(self, name: str, *command: Any) -> list[str]:
        """A command line that runs `command` on a host, as root."""
        init = _children(self._hosts[name].pid)[0]
        environment = [
            *("HOME=/root", "TERM=dumb", "LANG=C.UTF-8", "PYTHONUNBUFFERED=1"),
            f"PATH={ROOT}/.venv/bin:{sys.base_prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
        return [
            *("nsenter", "-t", str(init), "-m", "-p", "-u", "-i", "-n", "-r", "env", "-C", "/root", "-i"),
            *(*environment, *map(str, command)),
        ]  # fmt: skip

    def run(
        self, name: str, script: str, *, timeout: float = 4 * PATIENCE_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """A bash script on a host, to its end."""
        return subprocess.run(
            self.command(name, "bash", "-c", script),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def ours(self, *arguments: Any) -> list[str]:
        """A command line of `python -m ...` on the laptop, from the repository's root."""
        quoted = " ".join(f"'{argument}'" for argument in arguments)
        return self.command("nyc", "bash", "-c", f"cd {ROOT} && exec .venv/bin/python -m {quoted}")

    def call(
        self, *arguments: Any, timeout: float = 4 * PATIENCE_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """`python -m ...` on the laptop, to its end."""
        return subprocess.run(
            self.ours(*arguments), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    def start(self, *arguments: Any) -> "Running":
        """`python -m ...` on the laptop, in the background."""
        return Running(self.ours(*arguments))

    def up(self) -> subprocess.CompletedProcess[str]:
        """`make up`."""
        return self.call("cluster.laptop.fleet", "up", CLUSTER_FILE)

    def train(self, **changes: Any) -> list[str]:
        """Arguments of a tiny run of two workers on the cluster. Keyword a__b sets the key a.b."""
        if not (self.storage / "lab/corpus.jsonl").exists():
            (self.storage / "lab").mkdir(exist_ok=True)
            write_corpus(self.storage / "lab")
        ours = ("run.directory=", "data.directory=", "launcher=")  # the cluster's own, and the default
        keys = {"workers__count": 2, **changes}
        arguments = [each for each in tiny(Path(STORAGE), **keys) if not each.startswith(ours)]
        return ["training.launch", "--cluster", CLUSTER_FILE, "--skip-preflight", *arguments]

    def log_on_laptop(self, run: str) -> bytes:
        """What the laptop has kept of the log of a run."""
        (log,) = (self.folder / "hosts/nyc/disk/home/.asuncion/lab/logs").glob(f"{run}-*.log")
        return log.read_bytes()

    def log_on_head(self, run: str) -> bytes:
        """The log of a run, as Ray wrote it."""
        done = self.run("head", f"cat {SCRATCH}/ray/session_latest/logs/job-driver-{run}.log")
        assert done.returncode == 0, done.stderr
        return done.stdout.encode()

    def rays(self, name: str) -> list[str]:
        """The processes of Ray, and those it started, on a host."""
        said = self.run(name, "ps axww -o args").stdout.splitlines()
        marks = ("ray/", "ray::", "training.launch", "cluster.head.keeper")
        return [line for line in said if any(mark in line for mark in marks)]

    def write_inventory(self, **changes: Any) -> None:
        """The cluster's inventory, on the laptop. Keyword a__b sets the key a.b."""
        keys: dict[str, Any] = {
            "name": "lab", "head": ADDRESSES["head"], "workers": [ADDRESSES["worker1"], ADDRESSES["worker2"]],
            "ssh": {"user": "root", "key": "/root/.ssh/id_ed25519"},
            "node": {"gpus": 0, "cpus": 2, "memory_gb": 2.0, "object_store_gb": 0.2, "interface": "eth0"},
            "scratch": SCRATCH, "storage": STORAGE, "python": PYTHON,
            "preflight": ["limits.scratch_free_gb=1", "limits.storage_free_gb=1", "size.disk_megabytes=16"],
        }  # fmt: skip
        for name, value in changes.items():
            section, _, key = name.rpartition("__")
            (keys.setdefault(section, {}) if section else keys)[key] = value
        file = self.folder / "hosts/nyc/disk/home/lab.inventory.yaml"
        file.write_text(json.dumps(keys, indent=1))

    def seed_environment(self, name: str = "head", *, scratch: str = SCRATCH) -> None:
        """The environment on a host, as `setup.sh` would have installed it from a package index.

        There is no index in the lab: the environment's packages are those of this repository's .venv.
        """
        packages = Path(ROOT, ".venv/lib").glob("python3.*/site-packages")
        script = f"""set -e
        hash=$( (cat {ROOT}/constraints.txt {ROOT}/pyproject.toml; {PYTHON} -VV) | sha256sum | cut -c1-12)
        env={scratch}/env/$hash
        {PYTHON} -m venv --without-pip $env
        echo {next(packages)} > $(echo $env/lib/python3.*/site-packages)/lab.pth
        printf '#!%s\\nfrom ray.scripts.scripts import main\\nmain()\\n' $env/bin/python > $env/bin/ray
        chmod +x $env/bin/ray
        touch $env/ready"""
        done = self.run(name, script)
        assert done.returncode == 0, done.stderr

    # --- the link

    @property
    def slow(self) -> dict[str, float]:
        """New York to Asunción: 140 ms round trip, 0.5% loss."""
        return {"delay_ms": 70, "jitter_ms": 3, "loss": 0.005}


class Running:
    """A command in the background; its output is collected."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._out, self._err = bytearray(), bytearray()
        pairs = ((self._process.stdout, self._out), (self._process.stderr, self._err))
        self._readers = [threading.Thread(target=_collect, args=pair, daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    @property
    def raw_out(self) -> bytes:
        """Standard output so far, as it came."""
        return bytes(self._out)

    @property
    def out(self) -> str:
        """Standard output so far."""
        return bytes(self._out).decode(errors="replace")

    @property
    def err(self) -> str:
        """Standard error so far."""
        return bytes(self._err).decode(errors="replace")

    def until(self, pattern: str, *, seconds: float = PATIENCE_SECONDS) -> float:
        """Wait for a regular expression in the output; returns the seconds that it took."""
        begin = time.monotonic()
        while not re.search(pattern, self.out + self.err, re.MULTILINE):
            code = self._process.poll()
            waited = time.monotonic() - begin
            if code is not None:  # all that it has written counts
                self.wait()
                if re.search(pattern, self.out + self.err, re.MULTILINE):
                    break
            told = f"no {pattern!r} (exit code {code}):\n{self.out}\n{self.err}"
            assert code is None and waited < seconds, told
            time.sleep(0.02)
        return time.monotonic() - begin

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal to the command itself, which is the child of nsenter."""
        for child in _children(self._process.pid):
            os.kill(child, number)

    def wait(self, *, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit code."""
        code = self._process.wait(timeout=seconds)
        for reader in self._readers:
            reader.join(timeout=PATIENCE_SECONDS)
        return code


def _collect(stream: Any, into: bytearray) -> None:
    while chunk := stream.read1(1 << 16):
        into += chunk


def _do(*command: Any) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"


def _try(*command: Any) -> bool:
    return subprocess.run([str(part) for part in command], capture_output=True).returncode == 0


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
