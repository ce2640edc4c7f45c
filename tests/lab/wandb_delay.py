"""Does training wait for W&B? The median step, and what is lost, with servers that answer and that do not.

    python -m tests.lab.wandb_delay [--rounds N] [--seconds S] [--output FILE] [--dry-run]

One process after another, in turns, takes steps of a small model on one thread and logs each with
`Record.log`. `off` is without W&B; the others log to a server on loopback:

    well          it answers at once
    unreachable   nothing listens, from the start
    cut           it is gone after half of the steps, and stays away
    slow          it answers each request after 30 s

A step's time includes its `log()`. With the defaults it takes about four minutes on two quiet cores.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster import cli
from cluster.cli import RunError
from cluster.measure import benchmark
from cluster.process import Child
from cluster.record.record import Record, read_metrics
from cluster.session import ROOT
from tests.cluster.review.wandb_server import API_KEY, WandbServer

WHAT = "wandb_delay"
SITUATIONS = ("off", "well", "unreachable", "cut", "slow")
SLOW_SECONDS = 30.0
AIM_PERCENT = 1.0  # by which the median may move
SHAPE = {"vocab_size": 4096, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4}
SEQUENCES, LENGTH = 4, 128
SETTLING_STEPS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.wandb_delay", description=__doc__.partition("\n")[0]
    )
    benchmark.add_options(parser, what=WHAT, rounds=2, rounds_help="runs in each situation")
    parser.add_argument(
        "--seconds", type=float, default=14.0, help="of steps in a run (default: 14; W&B gives up at 10)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    parser.add_argument("--steps-in", type=Path, help=argparse.SUPPRESS)  # the process that takes the steps
    parser.add_argument("--mode", default="online", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    def body() -> None:
        if options.steps_in:
            take_steps(options.steps_in, seconds=options.seconds, mode=options.mode)
            return
        plan = f"{options.rounds} rounds of {', '.join(SITUATIONS)}: {options.seconds:g} s of steps each"
        measured = partial(measure, num_rounds=options.rounds, seconds=options.seconds)
        benchmark.measure_and_publish(options, what=WHAT, plan=plan, measure=measured)

    return cli.run(body)


def measure(*, num_rounds: int, seconds: float) -> dict[str, Any]:
    """All situations in turns: medians with spreads over the rounds, and what each lost of its rows."""
    samples: dict[str, list[float]] = {}
    lost, said = dict.fromkeys(SITUATIONS, 0), {}
    for number in range(num_rounds):
        runs = {}
        for situation in SITUATIONS if number % 2 == 0 else SITUATIONS[::-1]:
            runs[situation] = found = one_run(situation, seconds=seconds)
            lost[situation] += found["lost_rows"]
            said[situation] = found["wandb_status"]
            print(f"round {number + 1}/{num_rounds}, {situation}: {found}", file=sys.stderr, flush=True)
        for situation, found in runs.items():
            for name in ("step_ms", "log_ms", "slowest_log_ms"):
                samples.setdefault(f"{name}_{situation}", []).append(found[name])
            if situation != "off":
                moved = 100 * (found["step_ms"] / runs["off"]["step_ms"] - 1)
                samples.setdefault(f"moved_percent_{situation}", []).append(moved)
    return {
        "aim_percent": AIM_PERCENT,
        "rounds": num_rounds,
        "lost_rows": lost,
        "wandb_status": said,
        **benchmark.medians(samples),
    }


def one_run(situation: str, *, seconds: float) -> dict[str, Any]:
    """Steps in a process of their own. Adds `lost_rows`: those missing in metrics.jsonl, or in W&B's file."""
    with tempfile.TemporaryDirectory() as place, server_of(situation) as (environment, cut):
        folder = Path(place)
        mode = "disabled" if situation == "off" else "online"
        command = [sys.executable, "-m", "tests.lab.wandb_delay", "--mode", mode]
        command += ["--steps-in", str(folder / "run"), "--seconds", str(seconds)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment = {**clean, "HOME": place, **environment}
        with Child(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line == "half\n":
                    cut()
                else:
                    found = json.loads(line)
        if child.returncode:
            raise RunError(f"{situation}: the process that takes the steps ended with {child.returncode}")
        steps = [row["step"] for row in read_metrics(folder / "run/metrics.jsonl")]
        lost = abs(found["num_steps"] - len(steps))
        if mode == "online":
            lost += len(set(steps) - steps_on_disk(folder / "run/wandb"))
        return found | {"lost_rows": lost}


def steps_on_disk(folder: Path) -> set[int]:
    """The steps in W&B's own files: those that `make sync` can send."""
    found = set()
    for run in folder.glob("*run-*-*"):
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", run]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = (json.loads(line) for line in answer.splitlines())
        found |= {row["history"]["item"]["step"] for row in rows if row["type"] == "history"}
    return found


@contextmanager
def server_of(situation: str) -> Iterator[tuple[dict[str, str], Any]]:
    """The environment of a run in this situation, and what to call at its half."""

    def nothing() -> None:
        return None

    if situation == "off":
        yield {}, nothing
    elif situation == "unreachable":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
            yield {"WANDB_BASE_URL": url, "WANDB_API_KEY": API_KEY}, nothing
    else:
        with WandbServer() as server:
            if situation == "slow":
                server.wait_seconds = lambda name: SLOW_SECONDS
            yield server.environment, server.stop if situation == "cut" else nothing


def take_steps(folder: Path, *, seconds: float, mode: str) -> None:
    """Take steps for some seconds, log each, and print the times as one JSON line; "half" at the half."""
    import torch

    from training.model.llama import Llama, initialize
    from training.model.shapes import LlamaShape

    torch.set_num_threads(1)
    shape = LlamaShape(**SHAPE, head_dim=64, ffn_size=688)
    model = Llama(shape)
    initialize(model, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(shape.vocab_size, (SEQUENCES, LENGTH + 1))
    step_ms, log_ms, is_half = [], [], False
    record = Record.open(
        folder, config={}, provenance={}, wandb_mode=mode, project="delay", group=None, name=folder.name,
        resume_step=None,
    )  # fmt: skip
    began = time.perf_counter()
    while (now := time.perf_counter()) < began + seconds or len(step_ms) <= SETTLING_STEPS:
        if not is_half and now > began + seconds / 2:
            is_half = True
            print("half", flush=True)
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        row = {"step": len(step_ms) + 1, "loss": loss.item(), **{f"value_{i}": i / 7 for i in range(20)}}
        before_log = time.perf_counter()
        record.log(row)
        ended = time.perf_counter()
        step_ms.append(1e3 * (ended - now))
        log_ms.append(1e3 * (ended - before_log))
    record.finish({})
    record.close()
    found = {
        "num_steps": len(step_ms),
        "step_ms": statistics.median(step_ms[SETTLING_STEPS:]),
        "log_ms": statistics.median(log_ms),
        "slowest_log_ms": max(log_ms),
        "wandb_status": record.wandb_status,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
