"""What the distance costs: `make up`, `make status`, a run's first lines and its log, at 0 and at 140 ms.

    python -m tests.lab.bench [--rounds N] [--output FILE]

Two links take turns, each round on a cluster that is down: `near` has no delay, `far` 140 ms round trip and
0.5% loss. All hosts share this machine's clock, so the lag of a log's lines is exact. Writes JSON.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster import benchmark, cli
from cluster.cli import RunError, UserError
from tests.lab.hosts import CLUSTER_FILE, SCRATCH, Lab, missing

NUM_TICKS, TICK_SECONDS = 40, 0.25
NUM_STATUS = 5
TICKER = f"""
import json, io, sys, zipfile
from pathlib import Path
sys.path.insert(0, "{SCRATCH}/code")
from cluster.headside import Head
buffer = io.BytesIO()
with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("tick.py", '''
import time
for _ in range({NUM_TICKS}):
    print(repr(time.time()), flush=True)
    time.sleep({TICK_SECONDS})
''')
request = {{"run": "tick", "config": "", "entrypoint": "python tick.py", "preflight": "", "gated": False}}
request["package"] = "_ray_pkg_0123456789abcdef.zip"
site = json.loads(Path("{SCRATCH}/code/site.json").read_text())
print(Head(site).submit(request, buffer.getvalue())["id"])
"""


def measure(lab: Lab, name: str, *, number: int) -> dict[str, float]:
    """One round over the link that is set: seconds of each command, and milliseconds of the log's lag."""
    found: dict[str, float] = {}
    _require(lab.call("cluster.fleet", "down", CLUSTER_FILE))
    lab.run("nyc", "pkill -x ssh; rm -f /root/.asuncion/lab/[0-9a-f]*")  # no connection is open
    begin = time.monotonic()
    _require(lab.up())
    found["up_seconds"] = time.monotonic() - begin
    waits = []
    for _ in range(NUM_STATUS):
        begin = time.monotonic()
        _require(lab.call("cluster.fleet", "status", CLUSTER_FILE))
        waits.append(time.monotonic() - begin)
    found["status_seconds"] = statistics.median(waits)
    begin = time.monotonic()
    run = lab.start(*lab.train(run__name=f"{name}-{number}"))
    run.until("Running entrypoint", seconds=60)
    found["first_log_line_seconds"] = time.monotonic() - begin
    run.until(r"^step \d", seconds=120)
    found["first_training_line_seconds"] = time.monotonic() - begin
    if code := run.wait(seconds=120):
        raise RunError(f"the run failed, exit code {code}: {run.err}")
    lags = _log_lags(lab)
    found["log_lag_ms"] = statistics.median(lags)
    found["log_lag_max_ms"] = max(lags)
    return found


def _log_lags(lab: Lab) -> list[float]:
    """Milliseconds from the birth of a line on the cluster to its arrival on the laptop."""
    (lab.storage / "ticker.py").write_text(TICKER)
    started = lab.run("head", "python3 /storage/ticker.py")
    _require(started)
    run = lab.start("cluster.remote", "attach", CLUSTER_FILE, "--run", started.stdout.strip())
    lags: list[float] = []
    seen = 0
    while seen < NUM_TICKS:
        time.sleep(0.005)
        now = time.time()
        ticks = re.findall(r"^(\d+\.\d+)\n", run.out, re.MULTILINE)
        lags += [1e3 * (now - float(tick)) for tick in ticks[seen:]]
        seen = len(ticks)
    run.wait(seconds=60)
    return lags[NUM_TICKS // 4 :]  # the first were there before we were


def _require(done: "subprocess.CompletedProcess[str]") -> None:
    if done.returncode:
        raise RunError(f"{done.stdout}{done.stderr}")


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.bench", description=__doc__.splitlines()[0])
    benchmark.add_options(parser, what="cluster", rounds=3, rounds_help="turns of each link")
    options = parser.parse_args()

    def body() -> None:
        benchmark.require_rounds(options.rounds)
        if missing():
            raise UserError(f"no lab on this machine: {missing()}")
        output = benchmark.prepare_output(options.output, "cluster")
        samples: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder, Lab(Path(folder) / "lab") as lab:
            lab.seed_environment()
            _require(lab.up())  # the workers' environments, and every host key
            for number in range(options.rounds):
                for name, link in (("near", {}), ("far", lab.slow)):
                    lab.link(**link)
                    found = measure(lab, name, number=number)
                    print(f"round {number + 1}/{options.rounds}, {name}: {found}", flush=True)
                    for key, value in found.items():
                        samples.setdefault(f"{key}_{name}", []).append(value)
            lab.link()
            _require(lab.call("cluster.fleet", "down", CLUSTER_FILE))
        result = benchmark.medians(samples)
        print(benchmark.table(result))
        benchmark.publish(result, output, data_fingerprint=None)

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
