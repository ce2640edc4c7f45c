"""The shell commands by which a site's nodes are set up and started: one description, for both launchers."""

import shlex
from pathlib import Path
from typing import Any

from cluster.head.shell import in_url
from cluster.laptop.keys import BROUGHT_PYTHON, Inventory, NodeConfig
from cluster.session import KIND

PRIVATE = Path(__file__).parents[1] / "private.py"
AUTOSCALER = " --autoscaling-config=~/ray_bootstrap_config.yaml"


def for_head(site: Inventory) -> dict[str, Any]:
    """What the keeper on the head needs to know (`cluster.head.keeper`), JSON-ready."""
    names = ("name", "head", "code", "scratch", "storage")
    logins = {worker: site.ssh_of(worker) for worker in site.workers}
    return {
        **{name: getattr(site, name) for name in names},
        "python": interpreter(site),
        "claim_by_shell": claim_by_shell(site) if site.python == BROUGHT_PYTHON else None,
        "workers": [worker for worker in site.active if worker != site.head],
        "drained": list(site.drained),
        "logins": {worker: {"user": ssh.user, "port": ssh.port} for worker, ssh in logins.items()},
        "resources": {worker: resources(site.node_of(worker)) for worker in site.workers},
        "gpus": {worker: _gpus(site.node_of(worker)) for worker in site.workers},
        "gcs_port": site.ports.gcs,
        "dashboard_port": site.ports.dashboard,
        "agent_port": site.ports.agent,
        "setup": setup(site),
        "reap": reap(site),
        "token": token(site),
        "start_head": start_head(site, autoscaler=False),
        "start_worker": start_worker(site),
    }


def interpreter(site: Inventory) -> str:
    """The Python of the nodes."""
    return f"{site.scratch}/python/bin/python3" if site.python == BROUGHT_PYTHON else site.python


def claim_by_shell(site: Inventory) -> str:
    """Make the scratch folder, or fail if it is not safe, where there is no Python. Stricter than `claim`."""
    return f"""\
(umask 077; mkdir -p {site.scratch}) && {owned(site)} || exit 1
place=$(cd -P {site.scratch} && pwd)
while [ "$place" != / ]; do
  place=$(dirname "$place")
  found=$(find "$place" -maxdepth 0 '(' -uid 0 -o -uid "$(id -u)" ')' '(' ! -perm /022 -o -perm -1000 ')')
  [ -n "$found" ] || {{ echo "$place: lies above {site.scratch}, and others can write to it" >&2; exit 1; }}
done"""


def claim(site: Inventory) -> str:
    """Make the scratch folder, or fail if it is not safe. Runs before the code is copied."""
    return f"{interpreter(site)} -c {shlex.quote(PRIVATE.read_text())} folder {site.scratch}"


def owned(site: Inventory) -> str:
    """Test that the scratch folder is not another user's, before anything in it is run or read."""
    problem = f"{site.scratch} is not yours: set scratch in the inventory"
    return f"{{ test -O {site.scratch} -a ! -L {site.scratch} || {{ echo '{problem}' >&2; false; }}; }}"


def setup(site: Inventory) -> str:
    """Install the pinned environment on a node, unless it is there."""
    setup = f"bash {site.code}/cluster/head/setup.sh {site.code} {site.scratch} {interpreter(site)}"
    index, proxy, wheels = site.packages.index, site.packages.proxy, f"{site.scratch}/wheels"
    given = [*([f"PIP_INDEX_URL={index}"] if index else ()), *([f"PIP_PROXY={proxy}"] if proxy else ())]
    given += ["PIP_NO_INDEX=1", f"PIP_FIND_LINKS={wheels}"] if site.packages.carried else []
    return f"{owned(site)} && {' '.join([*given, setup])}"


def reap(site: Inventory) -> str:
    """End what this cluster runs on a node."""
    return f"{owned(site)} && {interpreter(site)} {site.code}/cluster/head/reap.py {site.name}"


def token(site: Inventory) -> str:
    """Make Ray's token on the head, or repair the permissions of the existing one."""
    return f"{interpreter(site)} {site.code}/cluster/private.py token"


def start_head(site: Inventory, *, autoscaler: bool) -> str:
    """Start Ray on the head. With its autoscaler, Ray itself starts the workers, as `ray up` wants.

    ASUNCION_HEAD is the head's address, if the inventory has its name.
    """
    return (
        _environment(site)
        + f"ray start --head --node-ip-address=${{ASUNCION_HEAD:-{site.head}}} --node-name={site.head}"
        + f" --port={site.ports.gcs} --dashboard-host=127.0.0.1 --dashboard-port={site.ports.dashboard}"
        + f" --dashboard-agent-listen-port={site.ports.agent}"
        + f" {_quoted(resources(site.node_of(site.head)))} --disable-usage-stats"
        + f"{AUTOSCALER if autoscaler else ''} || exit 1\n"
        + "# nobody uses Ray's client server, which can neither be left out nor bound to loopback\n"
        + f"pkill -u $(id -u) -f '[r]ay.util.client.server .*:{site.ports.gcs}( |$)' || true\n"
    )


def start_worker(site: Inventory) -> str:
    """Start Ray on a worker and wait until it has joined. When its raylet ends, all of Ray there ends.

    The keeper says which worker this is: ASUNCION_HEAD, ASUNCION_NODE (its name), ASUNCION_ADDRESS (if the
    name is one) and ASUNCION_RESOURCES.
    """
    log = f"{site.scratch}/ray-start.log"
    return _environment(site) + (
        f"resources={shlex.quote(resources(site.node))}\n"
        f"setsid --wait nohup ray start --address=${{ASUNCION_HEAD:-{in_url(site.head)}}}:{site.ports.gcs}"
        " ${ASUNCION_NODE:+--node-name=$ASUNCION_NODE}"
        " ${ASUNCION_ADDRESS:+--node-ip-address=$ASUNCION_ADDRESS}"
        f" --dashboard-agent-listen-port={site.ports.agent}"
        f" ${{ASUNCION_RESOURCES:-$resources}} --block > {log} 2>&1 < /dev/null &\n"
        f"for i in $(seq 120); do\n"
        f"  grep -q 'Ray runtime started' {log} && exit 0\n"
        f"  kill -0 $! 2> /dev/null || break\n"
        f"  sleep 0.5\n"
        f"done\n"
        f"cat {log} >&2; exit 1\n"
    )


def _environment(site: Inventory) -> str:
    """Shell lines whose settings every Ray process and its children inherit."""
    interface = site.node.interface
    lines = [
        "# what Ray starts inherits this folder; not the code's folder, which every `make up` replaces",
        "cd /",
        f". {site.scratch}/activate",
        "# `make down` finds the cluster's processes by this variable",
        f"export ASUNCION_CLUSTER={site.name}",
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
    if not site.node.infiniband:
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
        f"ls -dt {site.scratch}/ray/session_2* 2> /dev/null | tail -n +6 | xargs -r rm -rf",
    ]
    return "".join(f"{line}\n" for line in lines)


def resources(node: NodeConfig) -> str:
    """Options of `ray start` for what a node has. None holds a space, so that a shell can split them."""
    flags = [f"--num-gpus={node.gpus}"]
    if node.gpus:
        flags += [f'--resources={{"{KIND}{node.accelerator}":1}}']
    if node.cpus is not None:
        flags += [f"--num-cpus={node.cpus}"]
    if node.memory_gb is not None:
        flags += [f"--memory={round(node.memory_gb * 1e9)}"]
    if node.object_store_gb is not None:
        flags += [f"--object-store-memory={round(node.object_store_gb * 1e9)}"]
    return " ".join(flags)


def _quoted(options: str) -> str:
    return shlex.join(options.split())


def _gpus(node: NodeConfig) -> dict[str, float]:
    """What Ray lists of a node's GPUs."""
    return {"GPU": node.gpus, f"{KIND}{node.accelerator}": 1} if node.gpus else {"GPU": 0}
