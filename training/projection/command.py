"""How long the 1.4B model would train on N nodes: tokens/s, MFU and days, and what bounds each.

    python -m training.projection [--config FILE] [--dry-run] [key=value ...]

A step's seconds are training/projection/step_model.py's, of bytes counted in training/projection/traffic.py.
Compute is that of the training cell of a baseline, or where there is none of the datasheet's peak at an
assumed MFU; links are those that it measured in a node, and between nodes if it holds a preflight's, beside
assumed ones. The headline hides no communication behind compute; `overlapped` hides all that `overlap_comm`
can. Memory per GPU is training/plan.py's.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from cluster import cli
from cluster import config as layered
from cluster.cli import UserError
from cluster.config import key, require, require_choice
from cluster.measure import hardware
from cluster.measure.probe import LINK_PEAK
from cluster.parity import baseline_file
from cluster.session import ROOT
from training import config as training_config
from training.config import MUON_RULES
from training.model.shapes import SHAPES
from training.plan import memory_bytes
from training.projection import traffic
from training.projection.step_model import (
    NCCL_PROTOCOLS,
    PARTS,
    Basis,
    Links,
    Network,
    basis_from_row,
    step_seconds,
)
from training.projection.traffic import SHARES, Job

# 25 GbE: what NHR@FAU's nodes of 8 A40 have (https://doc.nhr.fau.de/clusters/alex/); 25/8 = 3.1 GB/s.
NODE_GB_PER_S = 3.1


@dataclass(frozen=True)
class LinkConfig:
    # PCIe 4.0 x16 carries 31.5 GB/s each way; 20 is what optim.bench assumes too. Ask `make preflight`.
    pcie_gb_per_s: float = key(
        20.0, "bus bandwidth of a node's ring over PCIe 4.0 x16, GB/s; 31.5 at the most"
    )
    # Four links of 14.0625 GB/s each way: NVIDIA GA102 whitepaper, "Third-Generation NVLink".
    nvlink_gb_per_s: float = key(56.25, "NVLink bridge between two A40, GB/s each way (datasheet)")
    node_gb_per_s: float | None = key(
        None,
        "network of a node, GB/s each way; null: as the preflight measured it that the baseline holds, "
        f"else {NODE_GB_PER_S}: 25 GbE at its best",
    )

    def __post_init__(self) -> None:
        for name, value, _ in layered.walk(self):
            require(value is None or value > 0, f"links.{name}", f"{value} must be above 0")


@dataclass(frozen=True)
class AssumedConfig:
    mfu: float = key(0.4, "without a baseline: forward and backward, as a fraction of the datasheet's peak")
    product_fraction: float = key(0.6, "without a baseline: that orthogonalisation reaches of the peak")
    memory_fraction: float = key(0.8, "without a baseline: that passes over memory reach of its bandwidth")

    def __post_init__(self) -> None:
        for name, value, _ in layered.walk(self):
            require(0 < value <= 1, f"assumed.{name}", f"{value:g} is a fraction: above 0, at most 1")


@dataclass(frozen=True)
class ProjectionConfig:
    baseline: str | None = key(
        None,
        "file of `make baseline`; null: tests/baselines/*_baseline.json of this device, else the datasheet",
    )
    baseline_shape: str | None = key(None, "shape of the baseline's training cell; null: that of `shape`")
    device: str = key("A40", "GPU, by its name in cluster/measure/hardware.py or in the baseline")
    gpus_per_node: int = key(8, "GPUs of a node")
    nodes: tuple[int, ...] = key((1, 8, 64, 512), "numbers of nodes, a table for each")
    stages: tuple[int, ...] = key((1, 2, 3), "ZeRO stages")
    shape: str = key("llama-1b4", "model, by its name in training/model/shapes.py")
    rule: str = key("muon", f"rule of the hidden matrices: adamw, {', '.join(MUON_RULES)}")
    tokens: float = key(28e9, "tokens to train on: 20 per parameter of llama-1b4")
    batch_tokens: int = key(524_288, "tokens per optimizer step; as many more as one sequence per GPU takes")
    sequence_length: int = key(2048, "tokens per sequence")
    micro_sequences: int = key(4, "sequences per GPU and forward pass, at the most")
    bucket_elements: int = key(200_000_000, "zero.bucket_elements of the run")
    activation_checkpointing: bool = key(
        False, "for the memory; its extra compute is the baseline's business"
    )
    links: LinkConfig = key(LinkConfig, "what the GPUs send through")
    assumed: AssumedConfig = key(AssumedConfig, "where nothing was measured")

    def __post_init__(self) -> None:
        whole = ("gpus_per_node", "batch_tokens", "sequence_length", "micro_sequences", "bucket_elements")
        for name in (*whole, "tokens"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        require(
            bool(self.nodes) and min(self.nodes) >= 1, "nodes", "needs numbers of at least 1, as in [1,8]"
        )
        known = bool(self.stages) and set(self.stages) <= {1, 2, 3}
        require(known, "stages", f"{list(self.stages)} must be of 1, 2 and 3, as in [1,3]")
        require_choice("shape", self.shape, SHAPES)
        require_choice("rule", self.rule, (*MUON_RULES, "adamw"))
        aligned = self.batch_tokens % self.sequence_length == 0
        require(aligned, "batch_tokens", f"{self.batch_tokens} is not a multiple of {self.sequence_length=}")


# --- a baseline, or the datasheet -------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    return baseline_file.read(path, key="baseline", instead="or leave the key out for the datasheet")


def training_cell(baseline: Mapping[str, Any], *, shape: str, rule: str, path: Path) -> dict[str, Any]:
    """The training cell measured on one node. Raises `UserError`, which lists those that there are."""
    cells = [c for c in baseline["cells"] if c.get("kind") == "training" and c.get("nodes", 1) == 1]
    for cell in cells:
        if (cell.get("shape"), cell.get("rule"), cell.get("status")) == (shape, rule, "measured") and cell[
            "rounds"
        ]:
            return cell
    there = [
        f"{cell.get('shape')} with {cell.get('rule')} ({cell.get('status')}"
        f"{': ' + cell['reason'] if cell.get('reason') else ''})"
        for cell in cells
    ]
    raise UserError(
        f"baseline: {path} has no measured training cell of {shape} with {rule}; it has "
        f"{', '.join(there) or 'none'}; set baseline_shape to a measured one, or run `make baseline` again"
    )


def basis_of(config: ProjectionConfig) -> Basis:
    """From the baseline that is named or found, else from the datasheet. Raises `UserError`."""
    sheet = hardware.lookup(config.device)
    path = Path(config.baseline) if config.baseline else _found_baseline(config.device)
    if path is not None:
        return replace(_basis_of_baseline(config, path), peak_tflops=sheet.bf16_tflops if sheet else None)
    if sheet is None:
        known = ", ".join(device.name for device in hardware.DEVICES)
        raise UserError(
            f"device: {config.device!r} has no datasheet entry and no baseline; known: {known}; "
            "or set baseline to a file that `make baseline` wrote there"
        )
    peak, assumed = sheet.bf16_tflops * 1e12, config.assumed
    shape = SHAPES[config.shape]
    return Basis(
        source=f"ASSUMED, nothing measured: MFU {assumed.mfu:.0%} of {sheet.bf16_tflops:g} TFLOP/s, "
        f"optimizer products at {assumed.product_fraction:.0%} of it, passes at "
        f"{assumed.memory_fraction:.0%} of {sheet.memory_gb_per_s:g} GB/s ({sheet.source})",
        compute_seconds_per_token=shape.flops_per_token(config.sequence_length) / (assumed.mfu * peak),
        product_flops=assumed.product_fraction * peak,
        memory_bytes_per_s=assumed.memory_fraction * sheet.memory_gb_per_s * 1e9,
        network=network_of(config.links),
        peak_tflops=sheet.bf16_tflops,
    )


def _found_baseline(device: str) -> Path | None:
    """The baseline of such a device in tests/baselines, if there is one."""
    for path in sorted((ROOT / "tests" / "baselines").glob("*_baseline.json")):
        if same_device(_read(path)["hardware"]["name"], device):
            return path
    return None


def same_device(name: str, other: str) -> bool:
    """Whether two names are of one device: equal, or of the same datasheet."""
    return name == other or (hardware.lookup(name) or name) == (hardware.lookup(other) or other)


def _basis_of_baseline(config: ProjectionConfig, path: Path) -> Basis:
    baseline = _read(path)
    measured_on = baseline["hardware"]["name"]
    if not same_device(measured_on, config.device):
        raise UserError(
            f"baseline: {path} was measured on {measured_on}, and device is {config.device}; "
            f"set device='{measured_on}', or name a baseline of {config.device}"
        )
    shape = config.baseline_shape or config.shape
    if shape not in SHAPES:
        raise UserError(f"baseline_shape: {shape!r} is not one of: {', '.join(SHAPES)}")
    rows = training_cell(baseline, shape=shape, rule=config.rule, path=path)["rounds"]
    try:
        return _basis_of_rows(config, path, rows, baseline["ceilings"], shape=shape, measured_on=measured_on)
    except (KeyError, TypeError) as error:
        raise UserError(f"baseline: {path} is incomplete ({error}); run `make baseline` again") from error


def _basis_of_rows(
    config: ProjectionConfig,
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    ceilings: Mapping[str, Any],
    *,
    shape: str,
    measured_on: str,
) -> Basis:
    row = rows[0]
    job = Job(
        shape=SHAPES[shape],
        stage=row["zero_stage"],
        num_ranks=row["num_workers"],
        accumulation=row["accumulation"],
        bucket_elements=config.bucket_elements,
        whole_matrices=config.rule in MUON_RULES,
        element_bytes=4 if row.get("precision") == "fp32" else 2,
    )
    ratio = SHAPES[config.shape].flops_per_token(config.sequence_length) / row["flops_per_token"]
    source = f"measured: {path.name}, {shape} with {config.rule}, {len(rows)} rounds, on {measured_on}"
    if shape != config.shape:
        source += f"; ASSUMED: {config.shape} at the same FLOP/s ({ratio:.2f} times the FLOPs per token)"
    basis = basis_from_row(rows, ceilings, job=job, source=source, flops_ratio=ratio)
    network = network_of(config.links, ceilings.get("links_between_nodes"), file=path.name)
    return replace(basis, network=network, links=measured_links(ceilings.get("links"), network))


def network_of(config: LinkConfig, found: Mapping[str, Any] | None = None, *, file: str = "") -> Network:
    """What the key says; else what was measured; else NODE_GB_PER_S.

    Args:
        found: `probe.MeasuredLinks` of one rank on every node (`cluster.preflight`), the bus
        bandwidth of
            whose all-reduce is what a node's network carries each way while one GPU drives it; a `problem`;
            or None.
        file: of the baseline that holds them.
    """
    if config.node_gb_per_s is not None:
        return Network(config.node_gb_per_s * 1e9, "as links.node_gb_per_s says")
    if found and LINK_PEAK in found:
        nodes = f"all-reduce over {found['num_ranks']} nodes, one rank on each"
        rate = found[LINK_PEAK]["best"] * 1e9
        return Network(rate, f"measured by the preflight, in {file}: {nodes}")
    failed = f"; the preflight's measurement failed: {found['problem']}" if found else ""
    return Network(NODE_GB_PER_S * 1e9, f"ASSUMED, 25 GbE at its best{failed}")


def measured_links(found: Mapping[str, Any] | None, network: Network) -> Links | None:
    """`probe.MeasuredLinks` as a baseline has them; None where they were not measured."""
    if not found or found.get("num_ranks", 1) < 2:  # or the problem that kept them from being measured
        return None
    ring, pairs = (found[f"{kind}_gb_per_s"]["best"] * 1e9 for kind in ("all_reduce", "all_to_all"))
    hop = found["all_reduce_latency_us"] * 1e-6 / (2 * (found["num_ranks"] - 1))
    return Links(
        name=f"measured ({found['num_ranks']} GPUs)",
        bytes_per_s={**dict.fromkeys(SHARES, ring), "all_to_all": pairs},
        node_bytes_per_s=network.bytes_per_s,
        protocols=((hop, max(hop, NCCL_PROTOCOLS[0][1]), 1.0),),
    )


def link_choices(config: LinkConfig, measured: Links | None, network: Network) -> list[Links]:
    """Inside a node: as measured, PCIe alone, and NVLink pairs beside PCIe; between nodes the same network.

    A ring over PCIe uses each GPU's link both ways. With pairs it leaves and enters each pair once, so two
    rings in opposite directions use each PCIe link both ways again, and together carry twice as much, unless
    the bridge is slower: min(NVLink, 2 PCIe). An upper bound: a host bridge that all share may carry less.
    All-to-alls go between all GPUs, so at the speed of PCIe.
    """
    pcie, nvlink = config.pcie_gb_per_s * 1e9, config.nvlink_gb_per_s * 1e9
    pairs = {**dict.fromkeys(SHARES, min(nvlink, 2 * pcie)), "all_to_all": pcie}
    alone = dict.fromkeys((*SHARES, "all_to_all"), pcie)
    found = [
        Links(name=name, bytes_per_s=rates, node_bytes_per_s=network.bytes_per_s)
        for name, rates in (("PCIe", alone), ("NVLink pairs", pairs))
    ]
    return [measured, *found] if measured is not None else found


# --- the tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """How a global batch divides over GPUs: `tokens`, the least from what is asked that does."""

    tokens: int
    micro_sequences: int
    accumulation: int


def divide(config: ProjectionConfig, num_gpus: int) -> Batch:
    """At least one sequence for each GPU, equally many for all; as few micro-batches as fit."""
    sequences = ceil(config.batch_tokens / (num_gpus * config.sequence_length))
    micro = max(size for size in range(1, config.micro_sequences + 1) if sequences % size == 0)
    return Batch(sequences * num_gpus * config.sequence_length, micro, sequences // micro)


def project(config: ProjectionConfig, basis: Basis) -> list[dict[str, Any]]:
    """One row for each number of nodes, stage and link, JSON-ready."""
    shape, found = SHAPES[config.shape], []
    flops_per_token = shape.flops_per_token(config.sequence_length)
    for num_nodes in config.nodes:
        num_gpus = num_nodes * config.gpus_per_node
        batch = divide(config, num_gpus)
        for stage in config.stages:
            job = Job(
                shape=shape,
                stage=stage,
                num_ranks=num_gpus,
                accumulation=batch.accumulation,
                bucket_elements=config.bucket_elements,
                whole_matrices=config.rule in MUON_RULES,
            )
            for links in link_choices(config.links, basis.links, basis.network):
                step = step_seconds(
                    job,
                    tokens_per_rank=batch.tokens // num_gpus,
                    ranks_per_node=config.gpus_per_node,
                    basis=basis,
                    links=links,
                )
                rate = batch.tokens / step.longest
                share = None
                if basis.peak_tflops is not None:
                    share = hardware.mfu(
                        tokens_per_second=rate,
                        flops_per_token=flops_per_token,
                        num_devices=num_gpus,
                        peak_tflops=basis.peak_tflops,
                    )
                found.append(
                    {
                        "nodes": num_nodes,
                        "gpus": num_gpus,
                        "zero_stage": stage,
                        "link": links.name,
                        **{f"batch_{name}": value for name, value in asdict(batch).items()},
                        "seconds": dict(step.seconds),
                        "step_seconds": step.longest,
                        "step_seconds_overlapped": step.shortest,
                        "tokens_per_second": rate,
                        "mfu": share,
                        "days": config.tokens / rate / 86400,
                        "days_overlapped": config.tokens / batch.tokens * step.shortest / 86400,
                        "memory_bytes": _memory(config, stage, batch, num_gpus),
                        "bottleneck": step.bottleneck,
                        "sent_bytes": dict(_sent(job)),
                    }
                )
    return found


@cache
def _sent(job: Job) -> Mapping[str, float]:
    return traffic.by_name(job)


def _memory(config: ProjectionConfig, stage: int, batch: Batch, num_gpus: int) -> int:
    """Bytes per GPU by training/plan.py."""
    keys = (
        f"model.shape={config.shape}",
        f"model.activation_checkpointing={str(config.activation_checkpointing).lower()}",
        f"batch.sequence_length={config.sequence_length}",
        f"batch.micro_sequences={batch.micro_sequences}",
        f"optim.matrix.rule={config.rule}",
        f"zero.stage={stage}",
        f"zero.bucket_elements={config.bucket_elements}",
        "workers.gpu=true",
    )
    training = training_config.load(dotlist=keys)
    return sum(memory_bytes(training, SHAPES[config.shape], num_workers=num_gpus).values())


def describe(config: ProjectionConfig, basis: Basis, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is known and assumed, then a table for each number of nodes."""
    sheet = hardware.lookup(config.device)
    links = config.links
    yield f"{config.shape} with {config.rule}, {config.tokens:,.0f} tokens, on {config.device}"
    yield f"a GPU          {basis.source}"
    yield (
        f"in a node      ASSUMED: PCIe {links.pcie_gb_per_s:g} GB/s each way, NVLink "
        f"{links.nvlink_gb_per_s:g} GB/s each way; set links.* to what `make preflight` measured"
    )
    if max(config.nodes) > 1:
        yield f"between nodes  {basis.network.describe()}"
    yield "no link's time is hidden behind compute, but in `days, overlapped`; bottleneck: the largest part"
    for num_nodes in dict.fromkeys(row["nodes"] for row in rows):
        chosen = [row for row in rows if row["nodes"] == num_nodes]
        yield f"\n{batch_line(config, chosen[0])}"
        yield (
            f"{'ZeRO':<5}{'link in the node':<20}{'compute':>9}{'optim':>8}{'intra':>8}{'inter':>8}"
            f"{'latency':>9}{'step s':>9}{'tok/s':>12}{'MFU':>7}{'days':>9}{'overlapped':>12}{'GB':>7}"
            "  bottleneck"
        )
        for row in chosen:
            parts = [row["seconds"][part] for part in PARTS]
            over = sheet is not None and row["memory_bytes"] > sheet.memory_gb * 1e9
            share = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
            yield (
                f"{row['zero_stage']:<5}{row['link']:<20}{parts[0]:>9.3f}{parts[1]:>8.3f}{parts[2]:>8.3f}"
                f"{parts[3]:>8.3f}{parts[4]:>9.3f}{row['step_seconds']:>9.3f}{row['tokens_per_second']:>12,.0f}"
                f"{share:>7}{row['days']:>9.2f}{row['days_overlapped']:>12.2f}"
                f"{row['memory_bytes'] / 1e9:>7.1f}  {row['bottleneck']}{' (DOES NOT FIT)' if over else ''}"
            )


def batch_line(config: ProjectionConfig, row: Mapping[str, Any]) -> str:
    """Nodes, GPUs and the batch, with what it had to grow to."""
    nodes = "1 node" if row["nodes"] == 1 else f"{row['nodes']} nodes"
    each = f"{row['batch_accumulation']} x {row['batch_micro_sequences']}"
    line = (
        f"{nodes}, {row['gpus']:,} GPUs: {row['batch_tokens']:,} tokens per step, "
        f"{each} sequences of {config.sequence_length} on each"
    )
    if row["batch_tokens"] != config.batch_tokens:
        line += (
            f"\n  (batch_tokens={config.batch_tokens:,} does not divide over {row['gpus']:,} GPUs x "
            f"{config.sequence_length}: grown to the least that does; it may need other learning rates)"
        )
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    defaults = ProjectionConfig()
    parser = cli.make_parser("training.projection", description=__doc__.splitlines()[0], keys=defaults)
    options = parser.parse_args(arguments)

    def body() -> None:
        config = layered.load(ProjectionConfig, file=options.config, dotlist=options.overrides)
        basis = basis_of(config)
        if options.dry_run:
            about = f"a GPU: {basis.source}\nbetween nodes: {basis.network.describe()}"
            print(f"{layered.to_yaml(config)}\n{about}")
            return
        rows = project(config, basis)
        print(*describe(config, basis, rows), sep="\n")
        sources = {"basis": basis.source, "between_nodes": basis.network.describe()}
        print(json.dumps({"projection": rows, **sources, "config": layered.to_dict(config)}))

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
