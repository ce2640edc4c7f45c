"""What the distance costs: `make up`, `make status`, a run's first lines, its log and an outage's end.

    python -m tests.lab.bench [--rounds N] [--output FILE]

Two links take turns, each round on a cluster that is down: `near` has no delay, `far` 140 ms round trip and
0.5% loss. All hosts share this machine's clock, so the lag of a log's lines is exact. `resume` is the time
from the return of a link that was away for a minute to the next line of the log. Writes JSON.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster import cli
from cluster.cli import RunError, UserError
from cluster.measure import benchmark
from tests.lab.hosts import CLUSTER_FILE, SCRATCH, Lab, Running, missing

NUM_TICKS, TICK_SECONDS = 40, 0.25
OUTAGE_SECONDS = 60
NUM_STATUS = 5
TICKER = f"""
import hashlib, json, io, sys, zipfile
from pathlib import Path
sys.path.insert(0, "{SCRATCH}/code")
from cluster.head.answers import Head
buffer = io.BytesIO()
with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("tick.py", '''
import time
for _ in range({NUM_TICKS + int(2 * OUTAGE_SECONDS / TICK_SECONDS)}):
    print(repr(time.time()), flush=True)
    time.sleep({TICK_SECONDS})
''')
request = {{"run": "tick", "config": "", "entrypoint": "python tick.py", "preflight": "", "gated": False,
    "digest": hashlib.sha256(buffer.getvalue()).hexdigest()}}
request["package"] = "_ray_pkg_0123456789abcdef.zip"
site = json.loads(Path("{SCRATCH}/code/site.json").read_text())
print(Head(site).submit(request, buffer.getvalue())["id"])
"""


def measure(lab: Lab, name: str, link: dict[str, float], *, number: int) -> dict[str, float]:
    """One round over a link: seconds of each command, and milliseconds of the log's lag."""
    found: dict[str, float] = {}
    _require(lab.call("cluster.laptop.fleet", "down", CLUSTER_FILE))
    lab.run("nyc", "pkill -x ssh; rm -f /root/.asuncion/lab/[0-9a-f]*")  # no connection is open
    begin = time.monotonic()
    _require(lab.up())
    found["up_seconds"] = time.monotonic() - begin
    waits = []
    for _ in range(NUM_STATUS):
        begin = time.monotonic()
        _require(lab.call("cluster.laptop.fleet", "status", CLUSTER_FILE))
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
    found |= _log(lab, link)
    return found


def _log(lab: Lab, link: dict[str, float]) -> dict[str, float]:
    """A log that ticks: milliseconds from a line's birth to the laptop, and an outage's end."""
    (lab.storage / "ticker.py").write_text(TICKER)
    started = lab.run("head", "python3 /storage/ticker.py")
    _require(started)
    run = lab.start("cluster.laptop.remote", "attach", CLUSTER_FILE, "--run", started.stdout.strip())
    lags: list[float] = []
    while len(lags) < NUM_TICKS:
        time.sleep(0.005)
        now = time.time()
        lags += [1e3 * (now - tick) for tick in _ticks(run)[len(lags) :]]
    lags = lags[NUM_TICKS // 4 :]  # the first were there before we were
    lab.link(**link, down=True)
    run.until("link lost", seconds=60)
    time.sleep(OUTAGE_SECONDS)
    seen = len(_ticks(run))
    lab.link(**link)
    begin = time.monotonic()
    while len(_ticks(run)) == seen:
        time.sleep(0.005)
    resumed = time.monotonic() - begin
    _require(lab.call("cluster.laptop.remote", "stop", CLUSTER_FILE))
    run.wait(seconds=60)
    return {
        "log_lag_ms": statistics.median(lags),
        "log_lag_max_ms": max(lags),
        "resume_seconds": resumed,
    }


def _ticks(run: Running) -> list[float]:
    """Times of birth of the log's lines that have arrived."""
    return [float(tick) for tick in re.findall(r"^(\d+\.\d+)\n", run.out, re.MULTILINE)]


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
                    found = measure(lab, name, link, number=number)
                    print(f"round {number + 1}/{options.rounds}, {name}: {found}", flush=True)
                    for key, value in found.items():
                        samples.setdefault(f"{key}_{name}", []).append(value)
            lab.link()
            _require(lab.call("cluster.laptop.fleet", "down", CLUSTER_FILE))
        result = benchmark.medians(samples)
        print(benchmark.table(result))
        benchmark.publish(
            result, output, job_type="launcher-bench", wandb_mode=options.wandb, data_fingerprint=None
        )

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
