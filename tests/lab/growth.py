"""How `make up` grows: 4, 16 and 64 nodes at 140 ms. Ray is started on four; the others are simulated.

    .venv/bin/python -m tests.lab.growth

A simulated node is one of many addresses of a fifth host, with a real sshd and a real set-up; its `ray` only
fails, if another address's set-up has not ended it. Needs root. Prints a table, then one JSON object; writes
tests/baselines/*_growth.json.
"""

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster import files
from cluster.display import show, table
from cluster.machine.host import describe_host
from cluster.measure.benchmark import baseline_path
from cluster.record import provenance
from tests.lab import hosts
from tests.lab.hosts import CLUSTER_FILE, SCRATCH, Lab, missing

SIZES = (4, 16, 64)
REAL = ("head", "worker1", "worker2", "worker3")
SIMULATED = "simulated"


def measure(num_nodes: int) -> dict[str, Any]:
    """`make up` of a new site: seconds, CPU seconds on the laptop, and connections to Ray's control.

    seconds: until every node has joined or, of a simulated one, until its set-up is done.
    """
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab:
        lab.link(**lab.slow)
        for name in ("head", SIMULATED):
            lab.seed_environment(name)
        stub = f"echo 'exec echo simulated; exit 1' > $(echo {SCRATCH}/env/*/bin/ray)"
        assert lab.run(SIMULATED, stub).returncode == 0
        addresses = [f"10.77.2.{100 + number}" for number in range(num_nodes - len(REAL))]
        for address in addresses:
            lab.run(SIMULATED, f"ip addr add {address}/24 dev eth0")
        workers = [hosts.ADDRESSES[name] for name in REAL[1:]] + addresses
        lab.write_inventory(workers=workers)
        begin = time.time()
        command = f"cd {hosts.ROOT} && time -p .venv/bin/python -m cluster.laptop.fleet up {CLUSTER_FILE}"
        up = lab.run("nyc", command, timeout=900)
        named = re.findall(r"^  10\.77\.2\.1\d\d: ", up.stderr, re.MULTILINE)
        assert len(named) == len(addresses), up
        cpu = [float(text) for text in re.findall(r"^(?:user|sys) ([\d.]+)$", up.stderr, re.MULTILINE)]
        log = lab.run("head", f"cat {SCRATCH}/keeper.log").stdout
        reached = _reached(log)
        assert len(reached) == num_nodes, log
        files_open = lab.run("head", "ls /proc/$(pgrep -x gcs_server)/fd | wc -l").stdout
        return {
            "nodes": num_nodes,
            "seconds": max(reached.values()) - begin,
            "laptop_cpu_seconds": sum(cpu),
            "gcs_files": int(files_open),
        }


def _reached(log: str) -> dict[str, float]:
    """Node -> when it joined or, simulated, had been set up."""
    found: dict[str, float] = {}
    for stamp, node in re.findall(r"^(\S+ \S+) (\S+) (?:joined|failed)", log, re.MULTILINE):
        found.setdefault(node, time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")))
    return found


def main() -> int:
    """The command. Returns its exit code."""
    if reason := missing():
        print(f"no lab here: {reason}", file=sys.stderr)
        return 2
    for number, name in enumerate(("worker3", SIMULATED), 13):
        hosts.add_host(name, f"10.77.2.{number}")
    rows = [measure(num_nodes) for num_nodes in SIZES]
    cells = [
        (
            str(row["nodes"]),
            f"{row['seconds']:.0f}",
            f"{row['laptop_cpu_seconds']:.1f}",
            str(row["gcs_files"]),
        )
        for row in rows
    ]
    show(table(("nodes", "up s", "laptop's CPU s", "files of Ray's control"), cells))
    about = provenance.collect(command=sys.argv, data_fingerprint=None)
    files.write_json(baseline_path(describe_host(), "growth"), {"rows": rows, "provenance": about})
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
