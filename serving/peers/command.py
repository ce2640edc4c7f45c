"""`python -m serving.bench bench.compare=...`: a race, its table and its baseline file."""

import os
import sys
from pathlib import Path

from cluster import config as layered
from cluster.display import show
from cluster.machine.host import describe_host
from cluster.measure import benchmark
from serving.bench.config import ServeBenchConfig
from serving.bench.measure import note
from serving.peers import overhead, races
from training.model import shapes


def compare(config: ServeBenchConfig) -> None:
    """Race our engine against `bench.compare`. Writes the baseline file; the last line on stdout is JSON."""
    peer, num_rounds = config.bench.compare, config.bench.rounds
    assert peer is not None
    if peer == "serve":
        result = overhead.measure(config, report=note)
    else:
        result = races.race(
            {peer: os.path.expanduser(config.bench.python or sys.executable)},
            num_rounds=num_rounds,
            threads=config.engine.threads or describe_host()["cpu_cores"],
            shape=shapes.resolve(config.model.shape) if config.model.shape else races.TINY,
            report=note,
        )
    show(benchmark.table(result))
    chosen = Path(config.bench.output).expanduser() if config.bench.output else None
    output = benchmark.prepare_output(chosen, f"serve_{peer}")
    benchmark.publish(
        result, output, job_type="race", wandb_mode=config.bench.wandb, project=config.bench.project,
        config=layered.to_dict(config), data_fingerprint=None,
    )  # fmt: skip
