"""How long `make train` takes to its first step, by part, where the data are ready.

    python -m tests.lab.startup [--rounds 5] [--output FILE] [--dry-run] [key=value ...]

Each round is one start of the default run, of two steps, in a folder of its own; an unmeasured one goes
first and prepares the data. The parts are those of the event `first_step` (`training.run.spent.Startup`). The
aim is 20 s on two cores. Measure on an idle machine; a round takes about half a minute there.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster import cli, process
from cluster.cli import RunError
from cluster.measure import benchmark
from cluster.record import events
from training.run.spent import SUFFIX

WHAT = "startup"
AIM_SECONDS = 20.0
KEYS = ("schedule.tokens=8192", "record.wandb=offline")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.startup", description=__doc__.partition("\n")[0]
    )
    benchmark.add_options(parser, what=WHAT, rounds=5, rounds_help="starts")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="of training.launch, for every start")
    options = parser.parse_args(arguments)

    def body() -> None:
        plan = f"{options.rounds + 1} starts of training.launch {' '.join((*KEYS, *options.keys))}"
        measured = partial(measure, options.keys, num_rounds=options.rounds)
        benchmark.measure_and_publish(options, what=WHAT, plan=plan, measure=measured)

    return cli.run(body)


def measure(keys: Sequence[str], *, num_rounds: int) -> dict[str, Any]:
    """Medians of the seconds to the first step, and of each part."""
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_rounds + 1):
            parts = start(Path(folder), f"round-{number}", keys)
            if number:
                for name, seconds in {f"first_step{SUFFIX}": sum(parts.values()), **parts}.items():
                    samples.setdefault(name, []).append(seconds)
    return {
        "aim_seconds": AIM_SECONDS,
        "rounds": num_rounds,
        "keys": list(keys),
        **benchmark.medians(samples),
    }


def start(folder: Path, name: str, keys: Sequence[str]) -> dict[str, float]:
    """One run; `<part>_seconds` until its first step. Raises `RunError`: it failed, or reported none."""
    places = (f"run.name={name}", f"run.directory={folder}/outputs", f"data.directory={folder}/data")
    done = process.run([sys.executable, "-m", "training.launch", *KEYS, *keys, *places])
    first_steps = [each for each in events.read(folder / "outputs" / name) if each["kind"] == "first_step"]
    if done.returncode or not first_steps:
        raise RunError(f"{name} did not finish (exit code {done.returncode}):\n{done.stderr}")
    return {key: value for key, value in first_steps[0].items() if key.endswith(SUFFIX)}


if __name__ == "__main__":
    sys.exit(main())
