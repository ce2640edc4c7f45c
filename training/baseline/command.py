"""`make baseline`: what this machine reaches in training and in serving, in one file.

    python -m training.baseline [--config FILE] [--dry-run] [--cluster CLUSTER.yaml] [key=value ...]

It measures the ceilings (`cluster.measure.probe`), then rounds of cells. Each cell is a process
(`training.baseline.steps` or `serving.bench.steps`), so a cell that runs out of memory disturbs no other. The
file is written again after every cell. `cluster.parity` compares two files; `training.projection` reads one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import cli, files
from cluster import config as layered
from cluster.cli import UserError
from cluster.display import number, show
from cluster.laptop import inventory, remote
from cluster.machine.host import describe_host
from cluster.measure import benchmark, hardware
from cluster.parity import baseline_file
from cluster.record import origins, provenance
from cluster.record.result import record_result
from training.baseline import plan as baseline_plan
from training.baseline.elsewhere import measure_elsewhere
from training.baseline.figures import rates, shares_text, table
from training.baseline.measure import measure, measure_device, num_nodes, peaks_of
from training.baseline.plan import BaselineConfig, Capacity, describe, make_cells

WHAT = "baseline"
FIGURE_COLUMNS = ("figure", "tokens/s", "min", "max", "joules_per_token", "cost_per_million_tokens", "shares")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.baseline", description=__doc__.splitlines()[0], keys=BaselineConfig())
    parser.add_argument(
        "--cluster", type=Path, metavar="CLUSTER.yaml", help="measure its head node, and training on all"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # `elsewhere` runs this
    options = parser.parse_args(arguments)

    def body() -> None:
        there: tuple[str, ...] = ()
        if options.cluster:
            asked = baseline_plan.load(file=options.config, dotlist=options.overrides)
            there = _on_cluster(options.cluster, asked)
        config = baseline_plan.load(file=options.config, dotlist=[*there, *options.overrides])
        if options.cluster and options.dry_run:
            print(layered.to_yaml(config))
        elif options.cluster:
            remote.start(
                options.cluster, run=config.name, module="training.baseline",
                config=layered.to_yaml(config), skip_preflight=False,
            )  # fmt: skip
        elif config.accelerator and config.session.address != "local" and not options.here:
            with cli.sigterm_as_interrupt():
                measure_elsewhere(config)
        else:
            with cli.sigterm_as_interrupt():
                run(config, dry_run=options.dry_run)

    return cli.run(body)


def _on_cluster(cluster: Path, asked: BaselineConfig) -> tuple[str, ...]:
    storage, name = inventory.load(cluster).storage, asked.name
    if asked.accelerator and name == BaselineConfig().name:
        name += f"-{asked.accelerator.lower()}"
    return (
        f"name={name}",
        f"directory={storage}/outputs",
        f"output={storage}/outputs/{name}/baseline.json",
        f"train.data={storage}/data",
        f"storage={storage}",
        f"preflight={storage}/preflight.json",
        "session.address=auto",
    )


def run(config: BaselineConfig, *, dry_run: bool = False) -> None:
    """Measure this machine and write its file, or print what would be measured."""
    host = describe_host()
    ceilings = measure_device({})
    datasheet = hardware.lookup(ceilings["name"])
    about = {name: ceilings[name] for name in ("name", "kind", "num_devices")}
    about |= {"num_nodes": num_nodes(config), "cpu_cores": host["cpu_cores"]}
    about["datasheet"] = datasheet and asdict(datasheet)
    print(_described(about, ceilings))
    load = benchmark.load_average()
    cells = make_cells(config, _capacity(about, ceilings))
    print(describe(cells, rounds=config.rounds), flush=True)
    if dry_run:
        return
    output = _output(config, host)
    result = baseline_file.new(
        hardware=about,
        ceilings=ceilings,
        config=layered.to_dict(config),
        load_average_before=load,
        provenance=provenance.collect(command=sys.argv, data_fingerprint=None),
        cells=[cell.as_json() for cell in cells],
    )
    if all(cell.skipped for cell in cells):
        raise UserError("train.shapes, serve.models: nothing is left to measure; the plan above says why")
    partial = output.with_name(f"{output.stem}.partial.json")
    measure(cells, config, result, partial)
    inputs = origins.unique(figure["input"] for figure in result["figures"] if figure["input"])
    result["provenance"] = {**result["provenance"], "inputs": inputs}
    files.write_json(output, {**result, "complete": True})
    partial.unlink()
    show(table(result["figures"]), *result["ceiling_faults"], f"written to {output}")
    print(f"W&B: {mirror(result, config, output)}")
    medians = {figure["id"]: statistics.median(figure["values"]) for figure in result["figures"]}
    print(json.dumps({"output": str(output), **medians}))


def _capacity(about: Mapping[str, Any], ceilings: Mapping[str, Any]) -> Capacity:
    peaks = peaks_of(ceilings)
    return Capacity(
        gpu=about["kind"] == "gpu",
        num_devices=about["num_devices"],
        memory_bytes=ceilings["free_bytes"],
        tflops=peaks.get("product_tflops"),
        gb_per_s=peaks.get("read_gb_per_s"),
        num_nodes=about["num_nodes"],
        is_bf16=ceilings["product_dtype"] == "bfloat16",
    )


def _described(about: Mapping[str, Any], ceilings: Mapping[str, Any]) -> str:
    """Device, ceilings and what could not be measured, for people."""
    peaks = {name: number(peak) for name, peak in peaks_of(ceilings).items()}
    nodes = f"{about['num_nodes']} nodes of " if about["num_nodes"] > 1 else ""
    lines = [
        f"{nodes}{about['num_devices']} x {about['name']}: "
        f"{peaks.get('product_tflops', 'unknown')} TFLOP/s in {ceilings['product_dtype']}, "
        f"{peaks.get('read_gb_per_s', 'unknown')} GB/s, {ceilings['free_bytes'] / 1e9:.1f} GB free, "
        "measured (cluster.measure.probe)"
    ]
    for name, reason in ceilings["problems"].items():
        lines.append(f"{name} could not be measured, so no figure is a share of it: {reason}")
    return "\n".join(lines)


def _output(config: BaselineConfig, host: Mapping[str, Any]) -> Path:
    path = Path(config.output).expanduser() if config.output else benchmark.baseline_path(host, WHAT)
    for key, file in (("output", path), ("directory", _run_directory(config) / "summary.json")):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(file.with_name(f".{file.name}.try"), "")
            file.with_name(f".{file.name}.try").unlink()
        except OSError as error:
            raise UserError(f"{key}: {file} cannot be written ({error.strerror}); set another") from error
    return path


def _run_directory(config: BaselineConfig) -> Path:
    return Path(config.directory).expanduser() / config.name


def mirror(result: Mapping[str, Any], config: BaselineConfig, output: Path) -> str:
    """Record a whole baseline as a run: its figures as summary and table, its file. Returns W&B's status."""
    rows, summary = [], {}
    for figure in result["figures"]:
        median, least, most = rates(figure)
        joules = figure["joules_per_token"] and statistics.median(figure["joules_per_token"])
        cost = figure["cost_per_million_tokens"]
        rows.append([figure["id"], median, least, most, joules, cost, shares_text(figure)])
        middle = {name: statistics.median(part) for name, part in figure["shares"].items()}
        summary[figure["id"]] = {"tokens_per_second": median, "shares": middle}
    return record_result(
        _run_directory(config), job_type="baseline", name=config.name, project=config.project,
        config=result["config"], provenance=result["provenance"], wandb_mode=config.wandb,
        summary={"output": str(output), "hardware": result["hardware"]["name"], "figures": summary},
        tables={"figures_table": (FIGURE_COLUMNS, rows)}, attachments=[output],
        inputs=result["provenance"].get("inputs", []), outputs=[origins.of_results(output)],
    )  # fmt: skip
