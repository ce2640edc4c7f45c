"""The keys of a site's inventory: its nodes, and where things lie on them."""

import ipaddress
import re
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import key, require
from cluster.head.addresses import is_address
from cluster.session import LONGEST_FOLDER

ABSOLUTE = (  # without /./ and /../
    r"(/(?!\.{1,2}(/|$))[A-Za-z0-9_.-]+)+",
    "must be an absolute path of letters, digits, '_', '.' and '-'",
)
USER = (r"[A-Za-z_][A-Za-z0-9_.-]*", "is not a user name")
FILE = (r"[\w./~@+=,][\w./~@+=,-]*", "must be a path of letters, digits and . / ~ @ + = , _ -")
URL = (
    r"https?://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9_.~%-]+)*/?",
    "must be http(s)://host[:port]/path, without a password (pip reads it from ~/.netrc on the head)",
)
ACCELERATOR = (r"[A-Za-z0-9][A-Za-z0-9-]*", "is not an accelerator type of Ray, such as A40")
HOST_NAME = re.compile(  # not 10.0.0.300: the last part is no number
    r"(?=.{1,253}$)([a-z0-9]([\w-]{,61}[a-z0-9])?\.)*(?!\d+$)[a-z0-9]([\w-]{,61}[a-z0-9])?",
    re.ASCII | re.IGNORECASE,
)
BROUGHT_PYTHON = "uv"  # as the inventory's `python`
ADDRESS = "an IPv4 or IPv6 address or a host name"


@dataclass(frozen=True)
class SshConfig:
    port: int | None = key(None, "port of sshd; null: what ~/.ssh/config says, or 22", least=1, most=65535)
    user: str = key("research", "user on every node; set-up needs no other rights", pattern=USER)
    key: str = key(
        "~/.ssh/id_ed25519",
        "private key of this laptop. `make up` never copies it; Ray's own `ray up` copies it to the head",
        pattern=FILE,
    )


@dataclass(frozen=True)
class PortsConfig:
    gcs: int = key(6379, "Ray's control port on the head, which the workers reach", least=1024, most=65535)
    dashboard: int = key(
        8265, "Ray's dashboard and job server on the head, bound to loopback", least=1024, most=65535
    )
    agent: int = key(52365, "Ray's agent on every node, which starts jobs", least=1024, most=65535)


@dataclass(frozen=True)
class PackagesConfig:
    index: str | None = key(
        None, "package index that the head installs from; null: what pip there is set to", pattern=URL
    )
    proxy: str | None = key(None, "HTTP proxy by which the head reaches the index", pattern=URL)
    carried: bool = key(False, "the head has no index: the laptop downloads the packages, and sends them")


@dataclass(frozen=True)
class NodeConfig:
    gpus: int = key(8, "GPUs of every node; 0 for a site without", least=0, most=64)
    accelerator: str = key("A40", "Ray accelerator type of the GPUs", pattern=ACCELERATOR)
    cpus: int | None = key(None, "CPUs that Ray hands out per node; null: all", least=1)
    memory_gb: float | None = key(None, "memory that Ray hands out per node, GB; null: 70% of it", least=0.5)
    object_store_gb: float | None = key(
        None, "Ray's object store per node, GB; null: 30% of the memory. Ray itself needs 0.08", least=0.08
    )
    interface: str | None = key(
        None,
        "network interface between the nodes; null: NCCL takes any but loopback and docker",
        pattern=(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{,14}", "is not the name of a network interface"),
    )
    infiniband: bool = key(False, "whether the nodes have InfiniBand or RoCE")


@dataclass(frozen=True)
class DiffersConfig:
    """What differs on one node. Null: as on the others."""

    drained: bool = key(False, "a worker that stays out: it does not join, and runs nothing")
    gpus: int | None = key(None, "node.gpus", least=0, most=64)
    accelerator: str | None = key(None, "node.accelerator", pattern=ACCELERATOR)
    port: int | None = key(None, "ssh.port", least=1, most=65535)
    user: str | None = key(None, "ssh.user", pattern=USER)
    key: str | None = key(None, "ssh.key", pattern=FILE)


@dataclass(frozen=True)
class Inventory:
    """A site: its nodes, and where things lie on them."""

    name: str = key(
        "asuncion",
        "the cluster, in file names and in messages",
        pattern=(r"[A-Za-z0-9][A-Za-z0-9_-]{0,30}", "must be at most 31 letters, digits, '-' and '_'"),
    )
    head: str = key("", f"the head node, as the workers reach it: {ADDRESS}")
    external_head: str | None = key(None, "the head as the laptop reaches it; null: the same")
    workers: tuple[str, ...] = key((), f"the other nodes, as the head reaches them: each {ADDRESS}")
    differs: dict[str, DiffersConfig] = key(
        dict, "node -> drained, gpus, accelerator, port, user, key: what differs there"
    )
    ssh: SshConfig = key(SshConfig, "")
    ports: PortsConfig = key(PortsConfig, "")
    node: NodeConfig = key(NodeConfig, "")
    packages: PackagesConfig = key(PackagesConfig, "")
    scratch: str = key(
        "/scratch/asuncion", "folder on each node's own disk: code, environment", pattern=ABSOLUTE
    )
    storage: str = key(
        "/storage/asuncion",
        "folder on storage that all nodes share: data, runs, checkpoints",
        pattern=ABSOLUTE,
    )
    preflight: tuple[str, ...] = key(
        (), "keys of cluster/preflight/command.py that differ here: limits.of_median=0.9"
    )
    python: str = key(
        "python3",
        "Python 3.11 or 3.12 on every node, from which the environment is made; uv: the laptop brings one",
        pattern=(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*", "is not a command"),
    )

    def __post_init__(self) -> None:
        require(bool(self.head), "head", "is missing: the address or name of the head node")
        given = [("head", self.head), *(("workers", worker) for worker in self.workers)]
        for name, address in [
            *given,
            *([("external_head", self.external_head)] if self.external_head else []),
        ]:
            require(_canonical(address) is not None, name, f"{address!r} is not {ADDRESS}")
        found = [_canonical(address) for address in self.nodes]
        twice = [node for node in self.nodes if found.count(_canonical(node)) > 1]
        require(not twice, "workers", f"{', '.join(sorted(set(twice)))} named twice (the head is no worker)")
        for node, differs in self.differs.items():
            require(node in self.nodes, f"differs.{node}", "is neither the head nor one of the workers")
            drained = differs.drained and node == self.head
            require(
                not drained, f"differs.{node}.drained", "the head cannot be drained: Ray's control runs there"
            )
        ports = (self.ports.gcs, self.ports.dashboard, self.ports.agent)
        require(len(set(ports)) == 3, "ports", f"gcs, dashboard and agent must differ, and are {ports}")
        short = len(f"{self.scratch}/ray") <= LONGEST_FOLDER
        require(
            short, "scratch", f"must be at most {LONGEST_FOLDER - 4} bytes long: Ray's sockets lie below it"
        )
        require(self.scratch != self.storage, "storage", "must be another folder than scratch")
        for text in self.preflight:
            require(text.isprintable(), "preflight", f"{text!r} has characters that cannot be printed")

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes by the names they have here, the head first."""
        return (self.head, *self.workers)

    @property
    def drained(self) -> tuple[str, ...]:
        """The workers that stay out."""
        return tuple(worker for worker in self.workers if self._differs(worker).drained)

    @property
    def active(self) -> tuple[str, ...]:
        """The nodes that are to join, the head first."""
        return tuple(node for node in self.nodes if node not in self.drained)

    def node_of(self, node: str) -> NodeConfig:
        """What a node has."""
        differs = self._differs(node)
        given = {name: getattr(differs, name) for name in ("gpus", "accelerator")}
        return replace(self.node, **{name: value for name, value in given.items() if value is not None})

    def ssh_of(self, node: str) -> SshConfig:
        """How a node is reached."""
        differs = self._differs(node)
        given = {name: getattr(differs, name) for name in ("port", "user", "key")}
        return replace(self.ssh, **{name: value for name, value in given.items() if value is not None})

    def _differs(self, node: str) -> DiffersConfig:
        return self.differs.get(node, DiffersConfig())

    @property
    def reached_at(self) -> str:
        """The head's address, as this laptop reaches it."""
        return self.external_head or self.head

    @property
    def code(self) -> str:
        """Where the code lies on every node."""
        return f"{self.scratch}/code"

    @property
    def home(self) -> Path:
        """This laptop's folder for the cluster: pinned host keys, and the sockets of open connections."""
        return Path("~/.asuncion").expanduser() / self.name


def _canonical(node: str) -> str | None:
    """One spelling of a node's address or name; None if it is neither."""
    if is_address(node):
        return None if "%" in node else str(ipaddress.ip_address(node))
    return node.lower() if HOST_NAME.fullmatch(node) else None
