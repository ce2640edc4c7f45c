"""Does training wait for W&B? The median step, and what is lost, with servers that answer and that do not.

    python -m tests.lab.wandb_delay [--rounds N] [--seconds S] [--output FILE] [--dry-run]

Each situation is a process that takes steps of a small model on one thread and one core, and logs each with
`Record.log`. `off` runs without W&B, so what it shows is the error of the measurement. The others log to a
server on loopback:

    well          it answers at once
    unreachable   nothing listens, from the start
    cut           it is gone after half of the steps, and stays away
    slow          it answers each request after 30 s

Definition: once W&B has started, steps come in pairs, one with W&B and one without it, in random order.
`moved_percent` is 100 x (time with / time without - 1), the median of all pairs with its 95% interval
(`intervals.of_median`). A step's time includes its `log()`; `moved_cpu_percent` compares the CPU time of the
training thread. A step without W&B is logged to a second record, and W&B's processes are suspended during it;
whatever became due meanwhile is done in the next step with W&B. Both switches are the same few system calls,
outside of the timed steps. Random order leaves no bias: a drift, and anything that comes every so many steps,
adds to both sides alike. So the interval of `off` has to contain 0, and its half-width is what this
measurement can resolve.

`wandb_cpu_ms` is what W&B uses a step on whatever core is free: the most that a step can lose if none is.
`start_lost_ms` is what the steps lose in all while W&B starts.

With the defaults it takes less than ten minutes on two quiet cores.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster import cli, display
from cluster.cli import RunError
from cluster.measure import benchmark, intervals
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
SETTLING_SECONDS = 3.0
LOOK_PAIRS = 20  # after so many W&B may have other processes
MOVED = ("moved_percent", "moved_cpu_percent")  # of each pair of steps
MEDIANS = (
    "step_ms", "off_step_ms", "cpu_ms", "off_cpu_ms", "log_ms", "off_log_ms", "slowest_log_ms",
    "moved_mean_percent", "wandb_cpu_ms", "start_seconds", "start_lost_ms",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.wandb_delay", description=__doc__.partition("\n")[0]
    )
    benchmark.add_options(parser, what=WHAT, rounds=2, rounds_help="runs in each situation")
    parser.add_argument("--seconds", type=float, default=40.0, help="of pairs in a run (default: 40)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    parser.add_argument("--steps-in", type=Path, help=argparse.SUPPRESS)  # the process that takes the steps
    parser.add_argument("--mode", default="online", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    def body() -> None:
        if options.steps_in:
            print(json.dumps(take_steps(options.steps_in, seconds=options.seconds, mode=options.mode)))
            return
        plan = f"{options.rounds} rounds of {', '.join(SITUATIONS)}: {options.seconds:g} s of steps each"
        measured = partial(measure, num_rounds=options.rounds, seconds=options.seconds)
        benchmark.measure_and_publish(options, what=WHAT, plan=plan, measure=measured, shown=situations_table)

    return cli.run(body)


def measure(*, num_rounds: int, seconds: float) -> dict[str, Any]:
    """All situations in turns: medians with spreads over the rounds, and what each lost of its rows."""
    samples: dict[str, list[float]] = {}
    pairs: dict[str, list[float]] = {}
    lost, said = dict.fromkeys(SITUATIONS, 0), {}
    for number in range(num_rounds):
        for situation in SITUATIONS if number % 2 == 0 else SITUATIONS[::-1]:
            found = one_run(situation, seconds=seconds)
            lost[situation] += found["lost_rows"]
            said[situation] = found["wandb_status"]
            for name in MOVED:
                pairs.setdefault(f"{name}_{situation}", []).extend(found[name])
                samples.setdefault(f"{name}_{situation}", []).append(statistics.median(found.pop(name)))
            for name in MEDIANS:
                samples.setdefault(f"{name}_{situation}", []).append(found[name])
            print(f"round {number + 1}/{num_rounds}, {situation}: {found}", file=sys.stderr, flush=True)
    result = {
        "aim_percent": AIM_PERCENT,
        "rounds": num_rounds,
        "lost_rows": lost,
        "wandb_status": said,
        **benchmark.medians(samples),
    }
    for name, values in pairs.items():
        interval = intervals.of_median(values)
        result[name], result[f"interval_{name}"] = interval.centre, [interval.low, interval.high]
        result[f"pairs_{name}"] = len(values)
    return result


def situations_table(result: Mapping[str, Any]) -> display.Table:
    """A row for each situation."""

    def moved(key: str) -> str:
        low, high = result[f"interval_{key}"]
        return f"{result[key]:+.2f}%" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")

    head = ("server", "step ms without W&B", "with", "moved (95%)", "CPU time moved (95%)", "mean moved")
    head += ("log() ms", "W&B's CPU ms a step", "lost rows")
    rows = [
        (
            each, f"{result[f'off_step_ms_{each}']:.1f}", f"{result[f'step_ms_{each}']:.1f}",
            *(moved(f"{name}_{each}") for name in MOVED), f"{result[f'moved_mean_percent_{each}']:+.2f}%",
            f"{result[f'log_ms_{each}']:.2f}", f"{result[f'wandb_cpu_ms_{each}']:.2f}",
            result["lost_rows"][each],
        )
        for each in SITUATIONS
    ]  # fmt: skip
    return display.table(head, rows)


def one_run(situation: str, *, seconds: float) -> dict[str, Any]:
    """Steps in a process of their own. Adds `lost_rows`: those missing in metrics.jsonl, or in W&B's file."""
    with tempfile.TemporaryDirectory() as place, server_of(situation) as (environment, cut):
        folder = Path(place)
        mode = "disabled" if situation == "off" else "online"
        command = [sys.executable, "-m", "tests.lab.wandb_delay", "--mode", mode]
        command += ["--steps-in", str(folder), "--seconds", str(seconds)]
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
        steps = {
            name: [row["step"] for row in read_metrics(folder / name / "metrics.jsonl")]
            for name in ("on", "off")
        }
        lost = sum(abs(num_steps - len(steps[name])) for name, num_steps in found["num_steps"].items())
        if mode == "online":
            lost += len(set(steps["on"]) - steps_on_disk(folder / "on/wandb"))
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


def take_steps(folder: Path, *, seconds: float, mode: str) -> dict[str, Any]:
    """Take pairs of steps for some seconds. Prints "half" at the half; returns the figures."""
    import torch

    torch.set_num_threads(1)
    modes = {"on": mode, "off": "disabled"}
    records = {name: open_record(folder / name, each) for name, each in modes.items()}
    # only now: the mirror's thread, and W&B's processes which that thread starts, may use any core
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    steps = Steps(records)
    began = time.perf_counter()
    while records["on"].wandb_status.startswith("starting"):
        steps.take("on")
    start_seconds, starting = time.perf_counter() - began, [took["step_ms"] for took in steps.taken["on"]]
    settled = time.perf_counter() + min(SETTLING_SECONDS, seconds)
    while time.perf_counter() < settled:
        steps.take("on")
    for taken in steps.taken.values():
        taken.clear()
    names, is_half = ["on", "off"], False
    children, before = _Children(), _cpu_beside()
    began = time.perf_counter()
    while (now := time.perf_counter()) < began + seconds or not steps.taken["on"]:
        if not is_half and now > began + seconds / 2:
            is_half = True
            print("half", flush=True)
        if len(steps.taken["on"]) % LOOK_PAIRS == 0:
            children.look()
        random.shuffle(names)
        for name in names:
            children.signal(signal.SIGSTOP if name == "off" else signal.SIGCONT)
            steps.take(name)
    children.signal(signal.SIGCONT)
    beside_ms = 1e3 * (_cpu_beside() - before)
    for record in records.values():
        record.finish({})
        record.close()
    figures = _figures(steps.taken)
    return {
        "num_steps": steps.number,
        "wandb_status": records["on"].wandb_status,
        "start_seconds": start_seconds,
        "start_lost_ms": sum(starting) - len(starting) * figures["off_step_ms"],
        "wandb_cpu_ms": beside_ms / len(steps.taken["on"]),
        **figures,
    }


def _figures(taken: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Of the steps of each side; those at one place are a pair."""
    on, off = ({key: [each[key] for each in taken[name]] for key in Steps.KEYS} for name in ("on", "off"))

    def moved(key: str) -> list[float]:
        return [100 * (one / other - 1) for one, other in zip(on[key], off[key], strict=True)]

    return {
        "moved_percent": moved("step_ms"),
        "moved_cpu_percent": moved("cpu_ms"),
        "moved_mean_percent": 100 * (statistics.mean(on["step_ms"]) / statistics.mean(off["step_ms"]) - 1),
        **{key: statistics.median(values) for key, values in on.items()},
        **{f"off_{key}": statistics.median(values) for key, values in off.items()},
        "slowest_log_ms": max(on["log_ms"]),
    }


class Steps:
    """Takes steps of a model, and logs each to one of two records."""

    KEYS = ("step_ms", "cpu_ms", "log_ms")

    def __init__(self, records: Mapping[str, Record]) -> None:
        import torch

        from training.model.llama import Llama, initialize
        from training.model.shapes import LlamaShape

        shape = LlamaShape(**SHAPE, head_dim=64, ffn_size=688)
        self._model = Llama(shape)
        initialize(self._model, seed=0)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3)
        self._tokens = torch.randint(shape.vocab_size, (SEQUENCES, LENGTH + 1))
        self._records = records
        self._loss = 0.0
        self.number = dict.fromkeys(records, 0)  # steps of each record, and so its rows
        self.taken: dict[str, list[dict[str, float]]] = {name: [] for name in records}

    def take(self, name: str) -> None:
        """Log the step before, then take one: what W&B makes of a row falls into the step of its own side."""
        self.number[name] += 1
        row = {"step": self.number[name], "loss": self._loss, **{f"value_{i}": i / 7 for i in range(20)}}
        began, cpu = time.perf_counter(), time.thread_time()
        self._records[name].log(row)
        logged = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self._model(self._tokens[:, :-1], self._tokens[:, 1:])
        loss.backward()
        self._optimizer.step()
        self._loss = loss.item()
        ended, ended_cpu = time.perf_counter(), time.thread_time()
        times = (1e3 * (ended - began), 1e3 * (ended_cpu - cpu), 1e3 * (logged - began))
        self.taken[name].append(dict(zip(self.KEYS, times, strict=True)))


def open_record(folder: Path, mode: str) -> Record:
    """A record without configuration."""
    return Record.open(
        folder, config={}, provenance={}, wandb_mode=mode, project="delay", group=None, name=folder.name,
        resume_step=None,
    )  # fmt: skip


class _Children:
    """W&B's processes, which are the only children of this one."""

    def __init__(self) -> None:
        self._processes: list[int] = []

    def look(self) -> None:
        """Find those that run now."""
        self._processes = [child.pid for child in psutil.Process().children(recursive=True)]

    def signal(self, number: signal.Signals) -> None:
        """Suspend them (SIGSTOP), or let them go on (SIGCONT)."""
        for process in self._processes:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, number)


def _cpu_beside() -> float:
    """Seconds of CPU time of all threads and processes here except this thread."""
    used = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            used.append(child.cpu_times())
    return time.process_time() - time.thread_time() + sum(times.user + times.system for times in used)


if __name__ == "__main__":
    sys.exit(main())
