"""The inventory of a site, and the Ray cluster YAML made from it.

    python -m cluster.laptop.inventory CLUSTER.yaml      makes CLUSTER.yaml from CLUSTER.inventory.yaml

The YAML is for Ray's own `ray up`, `ray down`, `ray exec` and `ray attach`. Our commands run the same
set-up and start commands, so that there is one description of a node.
"""

import argparse
import hashlib
import ipaddress
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import cli, files
from cluster import config as layered
from cluster.cli import UserError
from cluster.config import key, require
from cluster.session import LONGEST_FOLDER

HEADER = "# sha256 of all below: "
PRIVATE = Path(__file__).parents[1] / "private.py"
AUTOSCALER = " --autoscaling-config=~/ray_bootstrap_config.yaml"
CODE = ("cluster", "optim", "training", "serving", "pyproject.toml", "constraints.txt")  # what nodes need
ABSOLUTE = (  # without /./ and /../
    r"(/(?!\.{1,2}(/|$))[A-Za-z0-9_.-]+)+",
    "must be an absolute path of letters, digits, '_', '.' and '-'",
)


@dataclass(frozen=True)
class SshConfig:
    user: str = key(
        "research",
        "user on every node; set-up needs no other rights",
        pattern=(r"[A-Za-z_][A-Za-z0-9_.-]*", "is not a user name"),
    )
    key: str = key(
        "~/.ssh/id_ed25519",
        "private key of this laptop. `make up` never copies it; Ray's own `ray up` copies it to the head",
        pattern=(r"[\w./~@+=,][\w./~@+=,-]*", "must be a path of letters, digits and . / ~ @ + = , _ -"),
    )


@dataclass(frozen=True)
class PortsConfig:
    gcs: int = key(6379, "Ray's control port on the head, which the workers reach", least=1024, most=65535)
    dashboard: int = key(
        8265, "Ray's dashboard and job server on the head, bound to loopback", least=1024, most=65535
    )


URL = (
    r"https?://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9_.~%-]+)*/?",
    "must be http(s)://host[:port]/path, without a password (pip reads it from ~/.netrc on the head)",
)


@dataclass(frozen=True)
class PackagesConfig:
    index: str | None = key(
        None, "package index that the head installs from; null: what pip there is set to", pattern=URL
    )
    proxy: str | None = key(None, "HTTP proxy by which the head reaches the index", pattern=URL)


@dataclass(frozen=True)
class NodeConfig:
    gpus: int = key(8, "GPUs of every node; 0 for a site without", least=0, most=64)
    accelerator: str = key(
        "A40",
        "Ray accelerator type of the GPUs",
        pattern=(r"[A-Za-z0-9][A-Za-z0-9-]*", "is not an accelerator type of Ray, such as A40"),
    )
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
class Inventory:
    """A site: its nodes, and where things lie on them."""

    name: str = key(
        "asuncion",
        "the cluster, in file names and in messages",
        pattern=(r"[A-Za-z0-9][A-Za-z0-9_-]{0,30}", "must be at most 31 letters, digits, '-' and '_'"),
    )
    head: str = key("", "IPv4 address of the head node, as the workers reach it")
    external_head: str | None = key(
        None,
        "address or name of the head as the laptop reaches it; null: the same",
        pattern=(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", "is neither an address nor a host name"),
    )
    workers: tuple[str, ...] = key((), "IPv4 addresses of the other nodes, as the head reaches them")
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
        "Python 3.11 or 3.12 on every node, from which the environment is made",
        pattern=(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*", "is not a command"),
    )

    def __post_init__(self) -> None:
        require(bool(self.head), "head", "is missing: the address of the head node")
        for name, address in (("head", self.head), *(("workers", worker) for worker in self.workers)):
            require(_is_ipv4(address), name, f"{address!r} is not an IPv4 address")
        twice = {address for address in self.nodes if self.nodes.count(address) > 1}
        require(not twice, "workers", f"{', '.join(sorted(twice))} named twice (the head is no worker)")
        short = len(f"{self.scratch}/ray") <= LONGEST_FOLDER
        require(
            short, "scratch", f"must be at most {LONGEST_FOLDER - 4} bytes long: Ray's sockets lie below it"
        )
        require(self.scratch != self.storage, "storage", "must be another folder than scratch")
        for text in self.preflight:
            require(text.isprintable(), "preflight", f"{text!r} has characters that cannot be printed")

    @property
    def nodes(self) -> tuple[str, ...]:
        """All addresses, the head's first."""
        return (self.head, *self.workers)

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

    def site(self) -> dict[str, Any]:
        """What the keeper on the head needs to know (`cluster.head.keeper`), JSON-ready."""
        return {
            **{
                name: getattr(self, name) for name in ("name", "head", "code", "scratch", "storage", "python")
            },
            "workers": list(self.workers),
            "user": self.ssh.user,
            "gcs_port": self.ports.gcs,
            "dashboard_port": self.ports.dashboard,
            "setup": self.setup_command(),
            "reap": self.reap_command(),
            "token": self.token_command(),
            "start_head": self.start_head_command(autoscaler=False),
            "start_worker": self.start_worker_command(),
        }

    def claim_command(self) -> str:
        """Make the scratch folder, or fail if it is not safe. Runs before the code is copied."""
        return f"{self.python} -c {shlex.quote(PRIVATE.read_text())} folder {self.scratch}"

    def owned(self) -> str:
        """Test that the scratch folder is not another user's, before anything in it is run or read."""
        problem = f"{self.scratch} is not yours: set scratch in the inventory"
        return f"{{ test -O {self.scratch} -a ! -L {self.scratch} || {{ echo '{problem}' >&2; false; }}; }}"

    def setup_command(self) -> str:
        """Install the pinned environment on a node, unless it is there."""
        setup = f"bash {self.code}/cluster/head/setup.sh {self.code} {self.scratch} {self.python}"
        index, proxy = self.packages.index, self.packages.proxy
        given = [*([f"PIP_INDEX_URL={index}"] if index else ()), *([f"PIP_PROXY={proxy}"] if proxy else ())]
        return f"{self.owned()} && {' '.join([*given, setup])}"

    def reap_command(self) -> str:
        """End what this cluster runs on a node."""
        return f"{self.owned()} && {self.python} {self.code}/cluster/head/reap.py {self.name}"

    def token_command(self) -> str:
        """Make Ray's token on the head, or repair the permissions of the existing one."""
        return f"{self.python} {self.code}/cluster/private.py token"

    def start_head_command(self, *, autoscaler: bool) -> str:
        """Start Ray on the head. With its autoscaler, Ray itself starts the workers, as `ray up` wants."""
        return (
            self._environment()
            + f"ray start --head --node-ip-address={self.head} --port={self.ports.gcs}"
            + f" --dashboard-host=127.0.0.1 --dashboard-port={self.ports.dashboard}"
            + f"{self._resources()} --disable-usage-stats{AUTOSCALER if autoscaler else ''} || exit 1\n"
            + "# nobody uses Ray's client server, which can neither be left out nor bound to loopback\n"
            + f"pkill -u $(id -u) -f '[r]ay.util.client.server .*{self.head}:{self.ports.gcs}' || true\n"
        )

    def start_worker_command(self) -> str:
        """Start Ray on a worker and wait until it has joined. When its raylet ends, all of Ray there ends."""
        log = f"{self.scratch}/ray-start.log"
        return self._environment() + (
            f"setsid --wait nohup ray start --address={self.head}:{self.ports.gcs}"
            f" ${{ASUNCION_NODE:+--node-ip-address=$ASUNCION_NODE}}{self._resources()} --block"
            f" > {log} 2>&1 < /dev/null &\n"
            f"for i in $(seq 120); do\n"
            f"  grep -q 'Ray runtime started' {log} && exit 0\n"
            f"  kill -0 $! 2> /dev/null || break\n"
            f"  sleep 0.5\n"
            f"done\n"
            f"cat {log} >&2; exit 1\n"
        )

    def _environment(self) -> str:
        """Shell lines whose settings every Ray process and its children inherit."""
        interface = self.node.interface
        lines = [
            "# what Ray starts inherits this folder; not the code's folder, which every `make up` replaces",
            "cd /",
            f". {self.scratch}/activate",
            "# `make down` finds the cluster's processes by this variable",
            f"export ASUNCION_CLUSTER={self.name}",
            "# Ray's default, v2, starts one worker too few of an on-premise cluster (2.60.0)",
            "export RAY_enable_autoscaler_v2=0",
            "# Ray lowers its workers' priority by 15, which starves them beside anything else",
            "export RAY_worker_niceness=0",
            "# no metrics: Ray serves them on every address without a token; 65536 turns two ports off",
            "export RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=65536 DASHBOARD_METRIC_PORT=65536",
            "# report problems only, such as a link that fell back to sockets",
            "export NCCL_DEBUG=WARN",
            "# the interface between the nodes; without it NCCL may take docker's",
            f"export NCCL_SOCKET_IFNAME={f'={interface}' if interface else '^lo,docker'}",
            "# 25 Gbit/s Ethernet needs more than one socket and thread per connection to fill",
            "export NCCL_SOCKET_NTHREADS=4 NCCL_NSOCKS_PERTHREAD=2",
        ]
        if interface:
            lines += ["# without this, gloo (runs without GPUs) takes the interface of the host's name"]
            lines += [f"export GLOO_SOCKET_IFNAME={interface}"]
        if not self.node.infiniband:
            lines += [
                "# no InfiniBand here: do not look for it",
                "export NCCL_IB_DISABLE=1",
            ]
        lines += [
            "# NCCL_P2P_LEVEL stays unset: NCCL takes the NVLink bridge within a pair of A40, and PCIe",
            "# elsewhere, as the topology allows. If that hangs, PCIe's ACS is on: turn it off.",
            "# NCCL_P2P_DISABLE=1 avoids the hang, but is slow",
            "# Ray holds a connection and some files per worker",
            "ulimit -n 65536 2> /dev/null || ulimit -n $(ulimit -Hn)",
            "# Ray never removes the folders of earlier sessions; here the newest five stay",
            f"ls -dt {self.scratch}/ray/session_2* 2> /dev/null | tail -n +6 | xargs -r rm -rf",
        ]
        return "".join(f"{line}\n" for line in lines)

    def _resources(self) -> str:
        node = self.node
        flags = [f"--num-gpus={node.gpus}"]
        if node.gpus:
            flags += [f"--resources='{{\"accelerator_type:{node.accelerator}\": 1}}'"]
        if node.cpus is not None:
            flags += [f"--num-cpus={node.cpus}"]
        if node.memory_gb is not None:
            flags += [f"--memory={round(node.memory_gb * 1e9)}"]
        if node.object_store_gb is not None:
            flags += [f"--object-store-memory={round(node.object_store_gb * 1e9)}"]
        return "".join(f" {flag}" for flag in flags)


def _is_ipv4(text: str) -> bool:
    try:
        return bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False


def beside(cluster: Path) -> Path:
    """The inventory of the Ray YAML `cluster`: x.inventory.yaml beside x.yaml."""
    return cluster.with_name(f"{cluster.name.removesuffix('.yaml')}.inventory.yaml")


def load(cluster: Path) -> Inventory:
    """The inventory beside the Ray YAML `cluster`. Rewrites the YAML if the inventory has changed.

    Raises:
        ConfigError: a key of the inventory; the message begins with its file.
        UserError: there is no inventory, or the YAML was edited by hand.
    """
    file = beside(cluster)
    if not cluster.name.isprintable():  # it stands in the YAML
        raise UserError(f"{str(cluster)!r}: the name has characters that cannot be printed; rename it")
    if cluster.name.endswith(".inventory.yaml") or cluster.suffix != ".yaml" or not file.exists():
        raise UserError(
            f"{file}: no such file; CLUSTER names a Ray YAML, such as cluster/asuncion.yaml, beside whose "
            "inventory it lies: copy cluster/asuncion.inventory.yaml and set your site's addresses in it"
        )
    try:
        inventory = layered.load(Inventory, file=file)
    except layered.ConfigError as error:
        text = str(error)
        raise layered.ConfigError(text if text.startswith(str(file)) else f"{file}: {text}") from error
    _refresh(cluster, ray_yaml(inventory, origin=file.name))
    return inventory


def _refresh(cluster: Path, text: str) -> None:
    old = cluster.read_text(encoding="utf-8") if cluster.exists() else None
    if old == text:
        return
    if old is not None:
        digest, _, body = old.partition("\n")
        if digest != f"{HEADER}{hashlib.sha256(body.encode()).hexdigest()}":
            raise UserError(
                f"{cluster}: edited by hand, and it is made from {beside(cluster).name}; move the change "
                f"there (or into cluster/laptop/inventory.py), delete {cluster} and run the command again"
            )
    files.write_text(cluster, text)


def ray_yaml(inventory: Inventory, *, origin: str) -> str:
    """The cluster YAML of `ray up`, with the digest of its text in the first line."""
    mounts = "".join(f'  "{inventory.code}/{name}": {name}\n' for name in CODE)
    workers = ", ".join(inventory.workers)
    external = f"  external_head_ip: {_text(inventory.external_head)}\n" if inventory.external_head else ""
    body = f"""\
# The cluster for Ray's own launcher: `ray up cluster/asuncion.yaml`, from the root of the repository.
# Made from {origin}: edit that file, and this one is made again. `make up` does more: cluster/README.md.
cluster_name: {_text(inventory.name)}

provider:
  type: local                     # on premise: these addresses, and no cloud
  head_ip: {inventory.head}
  worker_ips: [{workers}]
{external}
auth:
  ssh_user: {_text(inventory.ssh.user)}
  ssh_private_key: {_text(inventory.ssh.key)}   # Ray copies it to the head, to reach the workers

max_workers: {len(inventory.workers)}   # the least number too: Ray keeps all of provider.worker_ips
upscaling_speed: 1.0
idle_timeout_minutes: 525600      # never stop a worker: these machines are not rented

# Code only: no data, no checkpoints. `make up` sends what git tracks; this launcher sends whole folders.
file_mounts:
{mounts}rsync_exclude: ["__pycache__", ".*"]
rsync_filter: ["/.gitignore"]     # leaves out the names of keys; sends other files, tracked by git or not
file_mounts_sync_continuously: false
cluster_synced_files: ["~/.ray/auth_token"]   # made on the head, and sent to the workers from there

# Installs the pinned environment; skipped while constraints.txt and pyproject.toml are unchanged.
initialization_commands: []
setup_commands:
  - |-
    {inventory.setup_command()}
head_setup_commands:
  - {inventory.token_command()}
worker_setup_commands:
  - {inventory.token_command()}

head_start_ray_commands:
  - |-
    {inventory.reap_command()}
  - |
{_indented(inventory.start_head_command(autoscaler=True))}
worker_start_ray_commands:
  - |-
    {inventory.reap_command()}
  - |
{_indented(inventory.start_worker_command())}"""
    return f"{HEADER}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def _text(value: str) -> str:
    """As YAML. Quoted, because YAML does not read plain `no`, `null` and `1e3` as text."""
    return json.dumps(value, ensure_ascii=False)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.laptop.inventory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cluster", type=Path, metavar="CLUSTER.yaml")
    options = parser.parse_args()

    def body() -> None:
        before = options.cluster.read_text() if options.cluster.exists() else None
        inventory = load(options.cluster)
        same = before == options.cluster.read_text()
        print(f"{options.cluster}: {'up to date' if same else 'made'}, {len(inventory.nodes)} nodes")

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
