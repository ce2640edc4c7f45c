"""What one device of this machine can do, measured in a process of its own, which frees the memory.

    python -m training.baseline.ceilings [SHAPE:ROWS ...]        one JSON object

Besides `cluster.measure.probe`, it measures the products of each model's weights, forward and backward.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.machine.host import describe_host
from cluster.measure import probe
from training.model import shapes


def measure(products_of: Mapping[str, int]) -> dict[str, Any]:
    """`probe.Ceilings` as a dict, with `kind` ("gpu", "cpu"), `name`, `num_devices` and these:

    `free_bytes` is the free memory of one device; `products_tflops` maps the name of a shape to a
    `probe.Ceiling` of its products, without those that could not be measured: `problems` says why.

    Args:
        products_of: name of a shape -> tokens that are multiplied at once.
    """
    import torch

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    free = torch.cuda.mem_get_info()[0] if gpu else _available_memory()
    found = asdict(probe.measure(device=device, num_threads=None if gpu else os.cpu_count()))
    products = {}
    for name, num_rows in products_of.items():
        counts = shapes.resolve(name).products()
        within = probe.CPU_SECONDS / len(products_of)
        try:
            ceiling = probe.measure_products(counts, num_rows=num_rows, device=device, within=within)
            products[name] = asdict(ceiling)
        except (RuntimeError, MemoryError) as error:  # out of memory among them
            said = str(error).strip().splitlines() or [type(error).__name__]
            found["problems"][f"products of {name}"] = said[0]
    return {
        **found,
        "kind": "gpu" if gpu else "cpu",
        "name": found["device"] if gpu else describe_host()["cpu"],
        "num_devices": torch.cuda.device_count() if gpu else 1,
        "free_bytes": free,
        "products_tflops": products,
    }


def better(before: Any, now: Any) -> Any:
    """Two measurements joined: the higher of each `best`, and the union of each spread.

    A disturbance can only lower a ceiling, so the higher one is nearer the truth. If the second measurement
    is missing or a `problem`, the first counts.
    """
    if before and (now is None or (isinstance(now, dict) and "problem" in now)):
        return before
    if isinstance(before, dict) and "problem" in before:
        return now
    if before and isinstance(now, dict) and set(now) == {"best", "spread"}:
        ends = [*before["spread"], *now["spread"]]
        return {"best": max(before["best"], now["best"]), "spread": [min(ends), max(ends)]}
    if isinstance(now, dict):
        known = before or {}
        both = {name: better(known[name], value) if name in known else value for name, value in now.items()}
        return {**known, **both}
    return now


def _available_memory() -> float:
    table = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in table if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024.0


def main() -> int:
    """Measure, and print one JSON object."""
    asked = (argument.rpartition(":") for argument in sys.argv[1:])
    print(json.dumps(measure({name: int(rows) for name, _, rows in asked})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
