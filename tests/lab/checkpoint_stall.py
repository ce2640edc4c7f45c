"""How long training stands still for a checkpoint in the background, beside a synchronous one.

    python -m tests.lab.checkpoint_stall [--megabytes 600] [--rounds 5] [--folder DIR] [--output FILE]

One rank writes a state of that size to DIR by `training.run.state.writer`, both ways in turns. `synchronous`
is `save`: write, sync, hash and mark. `stall` is `Writer.begin`, which copies the state aside; the thread's
write is waited for outside of it. `finite` is the check before either, that all numbers are finite. The aim
is a stall below 5% of a synchronous write. Compare on an idle machine, with DIR on the storage of the run.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster import cli
from cluster.measure import benchmark
from training.run.context import Context
from training.run.state.writer import Writer, save
from training.run.watch import is_finite

WHAT = "checkpoint_stall"
AIM = 0.05
TENSORS = 100


class OneRank(Context):
    """A rank without others, and without a process group."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.checkpoint_stall", description=__doc__.partition("\n")[0]
    )
    benchmark.add_options(parser, what=WHAT, rounds=5, rounds_help="checkpoints of each kind")
    parser.add_argument("--megabytes", type=int, default=600, help="of state (default: 600)")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: here)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    options = parser.parse_args(arguments)

    def body() -> None:
        plan = f"{options.rounds} checkpoints of {options.megabytes} MB of each kind in {options.folder}"
        measured = partial(measure, options.folder, megabytes=options.megabytes, num_rounds=options.rounds)
        benchmark.measure_and_publish(options, what=WHAT, plan=plan, measure=measured)

    return cli.run(body)


def measure(folder: Path, *, megabytes: int, num_rounds: int) -> dict[str, Any]:
    """Seconds of both kinds in turns, and the stall's share; the first round only touches the memory."""
    samples: dict[str, list[float]] = {}
    context = OneRank(0, 1, torch.device("cpu"), "none")
    numel = megabytes * 10**6 // 4 // TENSORS
    shards = [(f"weight.{index}", 0, {"master": torch.randn(numel)}) for index in range(TENSORS)]
    background = Writer(context)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for number in range(num_rounds + 1):
            checkpoints = Path(place, str(number), "checkpoints")
            began = time.monotonic()
            assert all(is_finite(tensor) for *_, named in shards for tensor in named.values())
            finite = time.monotonic() - began
            began = time.monotonic()
            background.begin(checkpoints / "step-0000001", shards=shards, state={"step": 1})
            stall = time.monotonic() - began
            background.wait()
            began = time.monotonic()
            save(checkpoints / "step-0000002", shards=shards, state={"step": 2}, context=context)
            synchronous = time.monotonic() - began
            shutil.rmtree(checkpoints)
            if number:
                samples.setdefault("finite_seconds", []).append(finite)
                samples.setdefault("stall_seconds", []).append(stall)
                samples.setdefault("synchronous_seconds", []).append(synchronous)
                samples.setdefault("stall_share", []).append(stall / synchronous)
    return {"aim": AIM, "rounds": num_rounds, "megabytes": megabytes, **benchmark.medians(samples)}


if __name__ == "__main__":
    sys.exit(main())
