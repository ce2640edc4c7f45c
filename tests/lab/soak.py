"""A soak: outages of 1 to 60 s while a run's log is followed. Are its bytes the same here and there?

    .venv/bin/python -m tests.lab.soak [--outages 100]

Every second outage is one-way or bursts of loss; the others let nothing through. The next one begins once the
log moves again. Needs root. Prints a table, then one JSON object; writes tests/baselines/*_soak.json.
"""

import argparse
import json
import shlex
import statistics
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
from tests.commands import ROOT
from tests.lab.hosts import CLUSTER_FILE, SCRATCH, Lab, Running, missing
from tests.waiting import wait_until

SHORTEST, LONGEST = 1.0, 60.0
KINDS = (True, "there", True, "back", True, "burst")
BURST = {"loss": 0.3, "burst": 40.0}
RUN = "soak"
# Lines of all lengths, carriage returns, bytes that are no text: about 30 kB/s. It ends if nobody ends it.
TICKER = """
import os, random, time
for number in range(400_000):
    os.write(1, b"%d " % number + random.randbytes(random.randrange(2000)) + b"\\r\\n")
    time.sleep(0.03)
"""
FOLLOW = """
from pathlib import Path
from cluster.laptop import inventory, remote
from cluster.laptop.package import pack
cluster = Path({cluster!r})
site = inventory.load(cluster)
command = "python -c " + {ticker!r}
remote.follow(site, remote._submit(site, {run!r}, command, pack(), asked="soak"), cluster=cluster)
"""


def durations(outages: int) -> list[float]:
    """Seconds, from the shortest to the longest in equal ratios."""
    ratio = LONGEST / SHORTEST
    return [SHORTEST * ratio ** (number / max(1, outages - 1)) for number in range(outages)]


def soak(lab: Lab, outages: int) -> dict[str, Any]:
    """The outages on a lab whose cluster is up.

    Returns:
        rows: kind, outage_seconds, back_seconds (from the link's return to the next byte here); num_bytes;
        same: whether here, kept here and there are the same bytes.
    """
    script = FOLLOW.format(cluster=CLUSTER_FILE, ticker=shlex.quote(TICKER), run=RUN)
    command = f"cd {ROOT} && exec .venv/bin/python -c {shlex.quote(script)}"
    follower = Running(lab.command("nyc", "bash", "-c", command))
    wait_until(lambda: follower.raw_out, told=lambda: follower.err)
    rows = []
    for number, seconds in enumerate(durations(outages)):
        kind = KINDS[number % len(KINDS)]
        lab.link(**{**lab.slow, **(BURST if kind == "burst" else {"down": kind})})
        time.sleep(seconds)
        lab.link(**lab.slow)
        begin, seen = time.monotonic(), len(follower.raw_out)
        wait_until(lambda seen=seen: len(follower.raw_out) > seen, told=lambda: follower.err)
        rows.append(
            {"kind": "both ways" if kind is True else kind, "outage_seconds": seconds,
             "back_seconds": time.monotonic() - begin}
        )  # fmt: skip
        print(f"{number + 1}/{outages} {rows[-1]}", file=sys.stderr, flush=True)
    lab.call("cluster.laptop.remote", "stop", CLUSTER_FILE, "--run", f"{RUN}-1")
    follower.wait()
    logs = lab.folder / f"hosts/head/disk/upper{SCRATCH}/ray"
    (there,) = (log.read_bytes() for log in logs.glob(f"session_2*/logs/job-driver-{RUN}-1.log"))
    same = follower.raw_out == there == lab.log_on_laptop(f"{RUN}-1")
    return {"rows": rows, "num_bytes": len(there), "same": same}


def main() -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outages", type=int, default=100)
    options = parser.parse_args()
    if reason := missing():
        print(f"no lab here: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab:
        lab.link(**lab.slow)
        lab.seed_environment()
        up = lab.up()
        assert up.returncode == 0, up.stdout + up.stderr
        found = soak(lab, options.outages)
    kinds = dict.fromkeys(row["kind"] for row in found["rows"])
    back = {kind: [row["back_seconds"] for row in found["rows"] if row["kind"] == kind] for kind in kinds}
    cells = [
        (kind, str(len(each)), f"{statistics.median(each):.2f}", f"{max(each):.2f}")
        for kind, each in back.items()
    ]
    show(table(("outage", "number", "back after s, median", "most"), cells))
    result = {
        "num_outages": len(found["rows"]), "num_bytes": found["num_bytes"], "same_bytes": found["same"],
        "back_seconds_most": max(max(each) for each in back.values()), "rows": found["rows"],
    }  # fmt: skip
    about = provenance.collect(command=sys.argv, data_fingerprint=None)
    files.write_json(baseline_path(describe_host(), "soak"), {**result, "provenance": about})
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}))
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
