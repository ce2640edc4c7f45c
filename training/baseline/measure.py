"""Measures a baseline: the ceilings, and every cell of the plan, each in a process of its own."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import files, process
from cluster.cli import RunError, UserError
from cluster.measure import probe
from cluster.measure.probe import LINK_PEAK, PEAKS
from cluster.measure.usage import out_of_memory
from cluster.progress import Progress
from cluster.session import ROOT
from training.baseline.ceilings import better
from training.baseline.figures import faults, figures
from training.baseline.plan import BaselineConfig, Cell

TOLERANCE = 20  # a cell may take so many times its floor, and START_SECONDS, before it is ended
START_SECONDS = 600
LINK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
DISK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}


def measure_device(products_of: Mapping[str, int]) -> dict[str, Any]:
    """`training.baseline.ceilings.measure` in a process of its own. Raises `RunError`."""
    asked = [f"{name}:{num_rows}" for name, num_rows in products_of.items()]
    command = [sys.executable, "-m", "training.baseline.ceilings", *asked]
    done = process.run(command, cwd=ROOT)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"torch does not run on this machine's device: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _all_ceilings(
    config: BaselineConfig, machine: Mapping[str, Any], products_of: Mapping[str, int]
) -> dict[str, Any]:
    """`measure_device`, links in this node and (from the preflight's report) between nodes, and the disk."""
    device = "cuda" if machine["kind"] == "gpu" else "cpu"
    ranks = machine["num_devices"] if device == "cuda" else 2
    links = None
    if ranks > 1:
        try:
            links = asdict(probe.measure_node_links(ranks, device=device, num_bytes=LINK_BYTES[device]))
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the rest can be measured all the same
            links = {"problem": str(error).splitlines()[0]}
    folder = Path(config.storage or config.train.data).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    disk = probe.measure_disk(folder, num_bytes=DISK_BYTES[device])
    rates = {f"{what}_gb_per_s": {"best": rate, "spread": [rate, rate]}
             for what, rate in zip(("write", "read"), disk, strict=True)}  # fmt: skip
    between = _preflight(config).get("links")
    return {**measure_device(products_of), "links": links, "links_between_nodes": between, "disk": rates}


def _preflight(config: BaselineConfig) -> dict[str, Any]:
    """What the preflight found of Ray's nodes (`cluster.preflight.command.examine`), or {}.

    Raises:
        UserError: the file is no such report.
    """
    report = Path(config.preflight or "").expanduser()
    if not report.is_file():
        return {}
    content = files.read_json(report)
    found = content.get("found") if isinstance(content, dict) else None
    if isinstance(found, dict):
        nodes = found.get("nodes", {})
        if isinstance(nodes, dict) and all(isinstance(facts, dict) for facts in nodes.values()):
            return found
    raise UserError(f"preflight: {report} is no report of `make preflight`; run that again")


def num_nodes(config: BaselineConfig) -> int:
    """Nodes of the cluster (of the kind asked for) that the preflight reports; 1 without a cluster."""
    if config.session.address == "local":
        return 1
    kinds = [facts.get("accelerator") for facts in _preflight(config).get("nodes", {}).values()]
    return max(1, len(kinds) if config.accelerator is None else kinds.count(config.accelerator))


def measure(cells: Sequence[Cell], config: BaselineConfig, result: dict[str, Any], output: Path) -> None:
    """Every cell in every round, in turns. Updates `result`, and writes it to `output` after each."""
    going = [cell for cell in cells if not cell.skipped]
    products_of = {cell.about["model"]: cell.about["rows"] for cell in going if cell.kind == "training"}
    with Progress(config.rounds * len(going), unit="cell") as progress:
        for number in range(config.rounds):
            progress.update({"step": number * len(going), "doing": "ceilings"})
            now = _all_ceilings(config, result["hardware"], products_of)
            result["ceilings"] = better(result["ceilings"], now)
            peaks = peaks_of(now)
            if LINK_PEAK in (links := now["links"] or {}):
                peaks[LINK_PEAK] = links[LINK_PEAK]["best"]
            result["peaks_of_rounds"].append(peaks)
            for place, cell in enumerate(going):
                progress.update({"step": number * len(going) + place, "doing": cell.id})
                if cell.problem is None:
                    begin = time.monotonic()
                    _once(cell)
                    end = cell.problem[0] if cell.problem else f"{time.monotonic() - begin:.0f} s"
                    progress.note(f"round {number + 1}/{config.rounds} {cell.id}: {end}")
                progress.update({"step": number * len(going) + place + 1})
                result["cells"] = [cell.as_json() for cell in cells]
                result["figures"] = figures(result["cells"], result, config)
                result["ceiling_faults"] = faults(result["figures"])
                files.write_json(output, result)


def _once(cell: Cell) -> None:
    """Run a cell's command once. Adds its last line to the rounds, or sets its problem."""
    limit = START_SECONDS + TOLERANCE * cell.floor_seconds
    try:
        done = process.run([sys.executable, *cell.command], cwd=ROOT, timeout=limit)
    except subprocess.TimeoutExpired:
        cell.problem = ("failed", f"did not end within {limit:.0f} s")
        return
    out, err = done.stdout, done.stderr
    found = _last_object(out) if done.returncode == 0 else None
    if found is not None:
        if (nodes := found.get("num_nodes", 1)) == cell.about.get("nodes", 1):
            cell.rounds.append(found)
        else:
            cell.problem = ("failed", f"Ray placed the workers on {nodes} nodes: are others' runs going?")
        return
    errors = [line for line in err.splitlines() if "error: " in line]
    last = (errors or err.strip().splitlines() or ["no message"])[-1]
    reason = (last.partition("error: ")[2] or last)[:300]
    killed = done.returncode == -signal.SIGKILL or "exitcode  : -9" in err
    if killed:
        reason = "killed, as the kernel does when memory runs out"
    cell.problem = ("out of memory" if killed or out_of_memory(err) else "failed", reason)


def _last_object(out: str) -> dict[str, Any] | None:
    """The last line that is a JSON object; other ranks and libraries may print after it. NaN is refused."""
    for line in reversed(out.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return json.loads(line, parse_constant=_refuse)
    return None


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def peaks_of(ceilings: Mapping[str, Any]) -> dict[str, float]:
    """The peaks that could be measured."""
    return {name: ceilings[name]["best"] for name in PEAKS if ceilings[name]}
