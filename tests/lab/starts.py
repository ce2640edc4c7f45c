"""The command line of an instrument that starts one command again and again."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import cli
from cluster.measure import benchmark

# (a folder of all starts, the start's name, keys) -> its seconds, by part
Start = Callable[[Path, str, Sequence[str]], dict[str, float]]


def command(
    arguments: Sequence[str] | None, start: Start, *, about: str | None, what: str, module: str,
    keys: Sequence[str], aim_seconds: float,
) -> int:  # fmt: skip
    """Start it, measure and publish. Returns the exit code (`cluster.cli`).

    Args:
        about: the instrument's docstring; its first line is shown by `--help`.
        what: ends the name of its file of results.
        module: what is started, with `keys` and those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.lab.{what}", description=(about or "").partition("\n")[0]
    )
    benchmark.add_options(parser, what=what, rounds=5, rounds_help="starts")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    parser.add_argument("keys", nargs="*", metavar="key=value", help=f"of {module}, for every start")
    options = parser.parse_args(arguments)

    def measure() -> dict[str, Any]:
        return {
            "aim_seconds": aim_seconds,
            "rounds": options.rounds,
            "keys": options.keys,
            **benchmark.medians(_samples(start, options.keys, num_rounds=options.rounds)),
        }

    def body() -> None:
        plan = f"{options.rounds + 1} starts of {module} {' '.join((*keys, *options.keys))}"
        benchmark.measure_and_publish(options, what=what, plan=plan, measure=measure)

    return cli.run(body)


def _samples(start: Start, keys: Sequence[str], *, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each part in each start but the first, which prepares what the others find ready."""
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_rounds + 1):
            parts = start(Path(folder), f"round-{number}", keys)
            for name, seconds in parts.items() if number else ():
                samples.setdefault(name, []).append(seconds)
    return samples
