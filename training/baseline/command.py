"""`make baseline`: what this machine is worth, in training and in serving, in one file.

    python -m training.baseline [--config FILE] [--dry-run] [--cluster CLUSTER.yaml] [key=value ...]

Ceilings first (`cluster.measure.probe`), then rounds of cells, each a command of its own
(`training.baseline.steps`,
`serving.bench.steps`), so that one that runs out of memory is a result and nothing else. The file is written
anew after every cell; `cluster.parity` compares two such files, `training.projection` reads one.
"""

import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import cli, files, process, provenance
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.laptop import inventory, remote
from cluster.measure import benchmark, hardware, probe
from cluster.measure.probe import LINK_PEAK, PEAKS
from cluster.measure.usage import out_of_memory
from cluster.progress import Progress
from cluster.record import Record
from cluster.session import ROOT
from training.baseline import plan as baseline_plan
from training.baseline.ceilings import better
from training.baseline.plan import BaselineConfig, Cell, Machine, describe, make_cells
from training.model import shapes

WHAT = "baseline"
FIGURE_COLUMNS = ("figure", "tokens/s", "min", "max", "joules_per_token", "cost_per_million_tokens", "shares")
ALONE = ", during communication alone"  # end of the name of a link's share
TOLERANCE = 20  # a cell may take so many times its floor, and START_SECONDS, before it is ended
START_SECONDS = 600
LINK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
DISK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.baseline", description=__doc__.splitlines()[0], keys=BaselineConfig())
    parser.add_argument(
        "--cluster", type=Path, metavar="CLUSTER.yaml", help="measure its head node, and training on all"
    )
    options = parser.parse_args(arguments)

    def body() -> None:
        there: tuple[str, ...] = ()
        if options.cluster:
            asked = baseline_plan.load(file=options.config, dotlist=options.overrides)
            there = _on_cluster(options.cluster, asked.name)
        config = baseline_plan.load(file=options.config, dotlist=[*there, *options.overrides])
        if options.cluster and options.dry_run:
            print(layered.to_yaml(config))
        elif options.cluster:
            remote.start(
                options.cluster, run=config.name, module="training.baseline",
                config=layered.to_yaml(config), skip_preflight=False,
            )  # fmt: skip
        else:
            with cli.sigterm_as_interrupt():
                run(config, dry_run=options.dry_run)

    return cli.run(body)


def _on_cluster(cluster: Path, name: str) -> tuple[str, ...]:
    storage = inventory.load(cluster).storage
    return (
        f"directory={storage}/outputs",
        f"output={storage}/outputs/{name}/baseline.json",
        f"train.data={storage}/data",
        f"storage={storage}",
        f"preflight={storage}/preflight.json",
        "session.address=auto",
    )


def run(config: BaselineConfig, *, dry_run: bool = False) -> None:
    """Measure this machine and write its file, or print what would be measured."""
    host = hardware.describe_host()
    found = _probe({})
    datasheet = hardware.lookup(found["name"])
    about = {name: found[name] for name in ("name", "kind", "num_devices")}
    about |= {"num_nodes": _num_nodes(config), "cpu_cores": host["cpu_cores"]}
    about["datasheet"] = datasheet and asdict(datasheet)
    best = _best(found)
    machine = Machine(
        gpu=found["kind"] == "gpu",
        num_devices=found["num_devices"],
        memory_bytes=found["free_bytes"],
        tflops=best.get("product_tflops"),
        gb_per_s=best.get("read_gb_per_s"),
        num_nodes=about["num_nodes"],
        is_bf16=found["product_dtype"] == "bfloat16",
    )
    cells = make_cells(config, machine)
    nodes = f"{about['num_nodes']} nodes of " if about["num_nodes"] > 1 else ""
    print(
        f"{nodes}{about['num_devices']} x {about['name']}: "
        f"{_shown(best, 'product_tflops')} TFLOP/s in {found['product_dtype']}, "
        f"{_shown(best, 'read_gb_per_s')} GB/s, {machine.memory_bytes / 1e9:.1f} GB free, "
        "measured (cluster.measure.probe)"
    )
    for name, reason in found["problems"].items():
        print(f"{name} could not be measured, and figures have no share of it: {reason}")
    load = benchmark.load_average()
    print(describe(cells, rounds=config.rounds), flush=True)
    if dry_run:
        return
    output = _output(config, host)
    result: dict[str, Any] = {
        "format": benchmark.BASELINE_FORMAT,
        "complete": False,
        "hardware": about,
        "ceilings": found,
        "config": layered.to_dict(config),
        "load_average_before": load,
        "provenance": provenance.collect(command=sys.argv, data_fingerprint=None),
        "cells": [cell.as_json() for cell in cells],
        "figures": [],
        "ceiling_faults": [],
        "peaks_of_rounds": [],  # how well the ceilings are known
    }
    if all(cell.skipped for cell in cells):
        raise UserError("train.shapes, serve.models: nothing is left to measure; the plan above says why")
    partial = output.with_name(f"{output.stem}.partial.json")
    _measure(cells, config, result, partial)
    files.write_json(output, {**result, "complete": True})
    partial.unlink()
    print(table(result["figures"]))
    for fault in result["ceiling_faults"]:
        print(fault)
    print(f"written to {output}")
    print(f"W&B: {mirror(result, config, output)}")
    medians = {figure["id"]: statistics.median(figure["values"]) for figure in result["figures"]}
    print(json.dumps({"output": str(output), **medians}))


def _best(ceilings: Mapping[str, Any]) -> dict[str, float]:
    """The peaks that could be measured."""
    return {name: ceilings[name]["best"] for name in PEAKS if ceilings[name]}


def _shown(best: Mapping[str, float], name: str) -> str:
    return f"{best[name]:.3g}" if name in best else "unknown"


def _output(config: BaselineConfig, host: Mapping[str, Any]) -> Path:
    path = Path(config.output) if config.output else benchmark.baseline_path(host, WHAT)
    for key, file in (("output", path), ("directory", _run_directory(config) / "summary.json")):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(file.with_name(f".{file.name}.try"), "")
            file.with_name(f".{file.name}.try").unlink()
        except OSError as error:
            raise UserError(f"{key}: {file} cannot be written ({error.strerror}); set another") from error
    return path


def _run_directory(config: BaselineConfig) -> Path:
    return Path(config.directory) / config.name


def mirror(result: Mapping[str, Any], config: BaselineConfig, output: Path) -> str:
    """Record a whole baseline as a run: its figures as summary and table, its file. Returns W&B's status."""
    rows, summary = [], {}
    for figure in result["figures"]:
        values = figure["values"]
        middle = {name: statistics.median(part) for name, part in figure["shares"].items()}
        joules = figure["joules_per_token"] and statistics.median(figure["joules_per_token"])
        told = ", ".join(f"{name} {share:.1%}" for name, share in middle.items())
        numbers = (statistics.median(values), min(values), max(values), joules)
        rows.append([figure["id"], *numbers, figure["cost_per_million_tokens"], told])
        summary[figure["id"]] = {"tokens_per_second": numbers[0], "shares": middle}
    with Record.open(
        _run_directory(config), config=result["config"], provenance=result["provenance"],
        wandb_mode=config.wandb, project=config.project, group="baseline", name=config.name, resume_step=None,
    ) as record:  # fmt: skip
        record.table("figures", FIGURE_COLUMNS, rows)
        record.file(output)
        record.finish({"output": str(output), "hardware": result["hardware"]["name"], "figures": summary})
        return record.wandb_status


# --- ceilings ----------------------------------------------------------------------------------------------


def _probe(products_of: Mapping[str, int]) -> dict[str, Any]:
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
    """Also the links inside this node, those between nodes (of the preflight's report), and the disk."""
    device = "cuda" if machine["kind"] == "gpu" else "cpu"
    ranks = machine["num_devices"] if device == "cuda" else 2
    links = None
    if ranks > 1:
        try:
            links = asdict(probe.measure_node_links(ranks, device=device, num_bytes=LINK_BYTES[device]))
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the rest can be measured all the same
            links = {"problem": str(error).splitlines()[0]}
    folder = Path(config.storage or config.train.data)
    folder.mkdir(parents=True, exist_ok=True)
    disk = probe.measure_disk(folder, num_bytes=DISK_BYTES[device])
    rates = {f"{what}_gb_per_s": {"best": rate, "spread": [rate, rate]}
             for what, rate in zip(("write", "read"), disk, strict=True)}  # fmt: skip
    between = _preflight(config).get("links")
    return {**_probe(products_of), "links": links, "links_between_nodes": between, "disk": rates}


def _preflight(config: BaselineConfig) -> dict[str, Any]:
    """What the preflight found of Ray's nodes (`cluster.preflight.command.examine`), or {}."""
    report = Path(config.preflight or "")
    return files.read_json(report)["found"] if report.is_file() else {}


def _num_nodes(config: BaselineConfig) -> int:
    return 1 if config.session.address == "local" else len(_preflight(config).get("nodes", [0]))


# --- measuring ---------------------------------------------------------------------------------------------


def _measure(cells: Sequence[Cell], config: BaselineConfig, result: dict[str, Any], output: Path) -> None:
    going = [cell for cell in cells if not cell.skipped]
    products_of = {cell.about["model"]: cell.about["rows"] for cell in going if cell.kind == "training"}
    with Progress(config.rounds * len(going)) as progress:
        for number in range(config.rounds):
            now = _all_ceilings(config, result["hardware"], products_of)
            result["ceilings"] = better(result["ceilings"], now)
            peaks = _best(now)
            if LINK_PEAK in (links := now["links"] or {}):
                peaks[LINK_PEAK] = links[LINK_PEAK]["best"]
            result["peaks_of_rounds"].append(peaks)
            for place, cell in enumerate(going):
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
    """Run a cell's command once; its last line joins the rounds, or its problem is noted."""
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
    said = (errors or err.strip().splitlines() or ["no message"])[-1].partition("error: ")
    reason = (said[2] or said[0])[:300]
    killed = done.returncode == -signal.SIGKILL or "exitcode  : -9" in err
    if killed:
        reason = "killed, as the kernel does when memory runs out"
    cell.problem = ("out of memory" if killed or out_of_memory(err) else "failed", reason)


def _last_object(out: str) -> dict[str, Any] | None:
    """The last line that is a JSON object; other ranks and libraries may print after it. NaN is none."""
    for line in reversed(out.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return json.loads(line, parse_constant=_refuse)
    return None


def _refuse(constant: str) -> float:
    raise ValueError(constant)


# --- what it comes to --------------------------------------------------------------------------------------


def figures(
    cells: Sequence[Mapping[str, Any]], result: Mapping[str, Any], config: BaselineConfig
) -> list[dict[str, Any]]:
    """Rates with what bounds them, one value per round.

    Each has `id`, `unit`, `values` (of one device), `flops` and `bytes` (the least that one unit of work
    takes; `bytes` is None where work does not pass through memory once per unit, as in training), in training
    `ranks`, `nodes` and `link_bytes` (see `_trained`), `joules_per_token`, `cost_per_million_tokens` (None
    where not known), `shares` of each ceiling, by name, and the `command`.
    """
    found: list[dict[str, Any]] = []
    for cell in cells:
        if cell["rounds"]:
            found += (_trained if cell["kind"] == "training" else _served)(cell)
    for figure in found:
        figure["shares"] = shares(figure, result["ceilings"], result["hardware"]["datasheet"])
        figure["cost_per_million_tokens"] = _cost(figure, config)
        energy = " and energy" if figure["joules_per_token"] and config.cost.kwh else ""
        figure["cost_of"] = f"{config.cost.currency}, device hours{energy}"
    return found


def _trained(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`link_bytes`: through the busiest link while a device takes one token; None where they are not counted.

    In a node that link is a rank's, on several it is a node's to the others. The bytes are what collectives
    need at the least (training/projection/traffic.py), the same that bus bandwidths count: rate x
    `link_bytes` / bus bandwidth is the link's share of a step.
    """
    rows = cell["rounds"]
    nodes = rows[0]["num_nodes"]
    devices = rows[0]["num_workers"] if rows[0]["on_gpu"] else nodes  # the ranks of a CPU share it
    sent = rows[0]["sent_bytes_per_step" if nodes == 1 else "node_bytes_per_step"]
    joules = _known([row["joules_per_step"] for row in rows])
    whole = [row["phased_step_seconds"] for row in rows]
    times = {
        part: statistics.median(
            row[f"seconds_{part}"] / seconds for row, seconds in zip(rows, whole, strict=True)
        )
        for part in ("compute", "communication", "optimizer", "data")
    }
    return [
        {
            "id": cell["id"],
            "kind": "training",
            "shape": cell["shape"],
            "model": cell["model"],
            "unit": "tokens/s per device",
            "values": [row["tokens_per_step"] / row["step_seconds"] / devices for row in rows],
            "devices": devices,
            **{key: rows[0][key] for key in ("precision", "zero_stage", "micro_sequences", "accumulation")},
            "tokens_per_step": rows[0]["tokens_per_step"],
            "flops": rows[0]["flops_per_token"],
            "bytes": None,
            "ranks": rows[0]["num_workers"],
            "nodes": nodes,
            "link_bytes": None if sent is None else sent * devices / rows[0]["tokens_per_step"],
            "communication_seconds": [row["seconds_communication"] for row in rows],
            "joules_per_token": joules and [each / rows[0]["tokens_per_step"] for each in joules],
            "step_seconds": [row["step_seconds"] for row in rows],
            "step_seconds_p10": [row["step_seconds_p10"] for row in rows],
            "step_seconds_p90": [row["step_seconds_p90"] for row in rows],
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
            "time_shares": {**times, "other": 1 - sum(times.values())},
            "command": cell["command"],
        }
    ]


def _served(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    rows = cell["rounds"]
    info = rows[0]["info"]
    shape = shapes.resolve(cell["model"])
    for place, point in enumerate(rows[0]["points"]):
        points = [row["points"][place] for row in rows]
        batch, prompt, context = point["batch"], point["prompt_tokens"], point["mean_context"]
        common = {
            "shape": cell["shape"],
            "unit": "tokens/s per device",
            "devices": 1,
            "batch": batch,
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
            "command": cell["command"],
        }
        found += [
            {
                **common,
                "id": f"prefill/{cell['shape']}/batch {batch}",
                "kind": "prefill",
                "values": [p["prefill_tokens_per_second"] for p in points],
                "joules_per_token": _known([p["joules_per_token_prefill"] for p in points]),
                "flops": shape.prefill_flops(prompt) / prompt,
                "bytes": info["weight_bytes"] / (batch * prompt),
                "ttft_ms": [p["ttft_ms"] for p in points],
            },
            {
                **common,
                "id": f"decode/{cell['shape']}/batch {batch}",
                "kind": "decode",
                "values": [p["decode_tokens_per_second"] for p in points],
                "joules_per_token": _known([p["joules_per_token_decode"] for p in points]),
                "flops": shape.decode_flops(context),
                # of the weights as they lie in memory, which may be wider than what is computed in
                "bytes": info["weight_bytes"] / batch + context * info["kv_bytes_per_token"],
                "itl_ms": [p["itl_ms"] for p in points],
            },
        ]
    return found


def shares(
    figure: Mapping[str, Any], ceilings: Mapping[str, Any], datasheet: Mapping[str, Any] | None
) -> dict[str, list[float]]:
    """Denominator -> share of it in each round: FLOPs or bytes per second over the ceiling's."""
    peaks = {}
    if ceilings["product_tflops"]:
        peaks["MFU of measured product"] = ("flops", ceilings["product_tflops"]["best"] * 1e12)
    if ceilings["read_gb_per_s"]:
        peaks["MBU of measured read"] = ("bytes", ceilings["read_gb_per_s"]["best"] * 1e9)
    if own := ceilings["products_tflops"].get(figure.get("model")):
        peaks["MFU of measured products of this model"] = ("flops", own["best"] * 1e12)
    if datasheet:
        peaks["MFU of datasheet"] = ("flops", datasheet["bf16_tflops"] * 1e12)
        peaks["MBU of datasheet"] = ("bytes", datasheet["memory_gb_per_s"] * 1e9)
    found = {
        name: [value * figure[work] / peak for value in figure["values"]]
        for name, (work, peak) in peaks.items()
        if figure[work] is not None
    }
    return found | _link_shares(figure, ceilings)


def faults(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with ceilings of which a figure's median reaches more than 100%.

    A link's share during communication alone may: a GPU computes beside it, which counts bytes but no time.
    """
    reached: dict[str, dict[str, float]] = {}
    for figure in figures:
        for name, values in figure["shares"].items():
            if not name.endswith(ALONE):
                reached.setdefault(name, {})[figure["id"]] = statistics.median(values)
    found = (hardware.ceiling_fault(shares, ceiling=name) for name, shares in reached.items())
    return [fault for fault in found if fault]


def _link_shares(figure: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of the measured link, in each round: over the whole step, and while collectives ran and nothing else.

    Bytes of collectives beside which a GPU computed count in both, and their time in the first alone.
    """
    across = figure.get("nodes", 1) > 1
    links = ceilings.get("links_between_nodes" if across else "links") or {}
    sent = figure.get("link_bytes")
    if not sent or links.get("num_ranks", 0) < figure["nodes" if across else "ranks"]:
        return {}
    peak = links[LINK_PEAK]["best"] * 1e9
    ends = f"{links['num_ranks']} {'nodes' if across else 'ranks'}"
    name = f"share of measured {'network' if across else 'link'}: all-reduce bus bandwidth, {ends}"
    found = {name: [value * sent / peak for value in figure["values"]]}
    alone = figure["communication_seconds"]
    if all(alone):
        step = sent * figure["tokens_per_step"] / figure["devices"]
        found[name + ALONE] = [step / seconds / peak for seconds in alone]
    return found


def _known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _cost(figure: Mapping[str, Any], config: BaselineConfig) -> float | None:
    """Price of a million tokens: device hours and, where energy was measured, kilowatt hours."""
    if config.cost.device_hour is None:
        return None
    hours = 1e6 / statistics.median(figure["values"]) / 3600
    energy = statistics.median(figure["joules_per_token"]) if figure["joules_per_token"] else 0.0
    return hours * config.cost.device_hour + energy * 1e6 / 3.6e6 * (config.cost.kwh or 0.0)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The figures, for people."""
    lines = [f"{'':<34}{'tokens/s':>10}{'min':>10}{'max':>10}  shares"]
    for figure in found:
        values = figure["values"]
        told = ", ".join(f"{name} {statistics.median(part):.1%}" for name, part in figure["shares"].items())
        numbers = (statistics.median(values), min(values), max(values))
        lines.append(f"{figure['id']:<34}" + "".join(f"{n:>10.4g}" for n in numbers) + f"  {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
