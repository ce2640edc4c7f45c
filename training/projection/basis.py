"""Rates of one GPU and of its links: from a file of `make baseline`, else from the datasheet. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.cli import UserError
from cluster.measure import hardware
from cluster.measure.probe import LINK_PEAK
from cluster.parity import baseline_file
from cluster.session import ROOT
from training.model.shapes import SHAPES
from training.optim_config import MatrixOptimConfig, OptimConfig
from training.projection.config import NODE_GB_PER_S, LinkConfig, ProjectionConfig
from training.projection.step_model import NCCL_PROTOCOLS, Basis, Interconnect, Network, basis_from_row
from training.projection.traffic import SHARES, Job


def _read(path: Path) -> dict[str, Any]:
    return baseline_file.read(path, key="baseline", instead="or leave the key out for the datasheet")


def training_cell(baseline: Mapping[str, Any], *, shape: str, rule: str, path: Path) -> dict[str, Any]:
    """The training cell measured on one node. Raises `UserError`, which lists the cells of the file."""
    cells = [c for c in baseline["cells"] if c.get("kind") == "training" and c.get("nodes", 1) == 1]
    wanted = (shape, rule, "measured")
    for cell in cells:
        if (cell.get("shape"), cell.get("rule"), cell.get("status")) == wanted and cell["rounds"]:
            return cell
    listed = [
        f"{cell.get('shape')} with {cell.get('rule')} ({cell.get('status')}"
        f"{': ' + cell['reason'] if cell.get('reason') else ''})"
        for cell in cells
    ]
    raise UserError(
        f"baseline: {path} has no measured training cell of {shape} with {rule}; it has "
        f"{', '.join(listed) or 'none'}; set baseline_shape to a measured one, or run `make baseline` again"
    )


def basis_of(config: ProjectionConfig) -> Basis:
    """From the named baseline, else from one of this device in tests/baselines, else from the datasheet.

    Raises:
        UserError: a baseline that cannot be used, or a device without baseline and datasheet.
    """
    sheet = hardware.lookup(config.device)
    path = Path(config.baseline).expanduser() if config.baseline else _found_baseline(config.device)
    if path is not None:
        basis = _basis_of_baseline(config, path)
        peak = sheet.bf16_tflops if sheet else None
        return replace(basis, peak_tflops=peak, origin=baseline_file.origin(path, _read(path)))
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
    row, fp32, matrix = rows[0], rows[0].get("precision") == "fp32", MatrixOptimConfig(rule=config.rule)
    job = Job(
        shape=SHAPES[shape],
        stage=row["zero_stage"],
        num_ranks=row["num_workers"],
        accumulation=row["accumulation"],
        bucket_elements=config.bucket_elements,
        matrix=matrix,
        gradients_per_update=OptimConfig(matrix=matrix).gradients_per_update,
        element_bytes=4 if fp32 else 2,
        gradient_bytes=4 if fp32 else 2,
    )
    ratio = SHAPES[config.shape].flops_per_token(config.sequence_length) / row["flops_per_token"]
    source = f"measured: {path.name}, {shape} with {config.rule}, {len(rows)} rounds, on {measured_on}"
    if shape != config.shape:
        source += f"; ASSUMED: {config.shape} at the same FLOP/s ({ratio:.2f} times the FLOPs per token)"
    basis = basis_from_row(rows, ceilings, job=job, source=source, flops_ratio=ratio)
    network = network_of(config.links, ceilings.get("links_between_nodes"), file=path.name)
    return replace(basis, network=network, links=measured_links(ceilings.get("links"), network))


def network_of(config: LinkConfig, measured: Mapping[str, Any] | None = None, *, file: str = "") -> Network:
    """The key, else the measurement, else NODE_GB_PER_S.

    Args:
        measured: `probe.MeasuredLinks` of one rank on each node, from the preflight. The bus
            bandwidth of its all-reduce is what a node's network carries each way while one GPU drives it.
            Or a `problem`, or None.
        file: the baseline that contains it.
    """
    if config.node_gb_per_s is not None:
        return Network(config.node_gb_per_s * 1e9, "as links.node_gb_per_s says")
    if measured and LINK_PEAK in measured:
        nodes = f"all-reduce over {measured['num_ranks']} nodes, one rank on each"
        rate = measured[LINK_PEAK]["best"] * 1e9
        return Network(rate, f"measured by the preflight, in {file}: {nodes}")
    failed = f"; the preflight's measurement failed: {measured['problem']}" if measured else ""
    return Network(NODE_GB_PER_S * 1e9, f"ASSUMED, 25 GbE at its best{failed}")


def measured_links(found: Mapping[str, Any] | None, network: Network) -> Interconnect | None:
    """From the `probe.MeasuredLinks` of a baseline; None if they were not measured."""
    if not found or found.get("num_ranks", 1) < 2:  # one rank, or only a `problem`
        return None
    ring, pairs = (found[f"{kind}_gb_per_s"]["best"] * 1e9 for kind in ("all_reduce", "all_to_all"))
    hop = found["all_reduce_latency_us"] * 1e-6 / (2 * (found["num_ranks"] - 1))
    return Interconnect(
        name=f"measured ({found['num_ranks']} GPUs)",
        bytes_per_s={**dict.fromkeys(SHARES, ring), "all_to_all": pairs},
        node_bytes_per_s=network.bytes_per_s,
        protocols=((hop, max(hop, NCCL_PROTOCOLS[0][1]), 1.0),),
    )


def link_choices(config: LinkConfig, measured: Interconnect | None, network: Network) -> list[Interconnect]:
    """In a node: as measured, PCIe alone, and NVLink pairs with PCIe. Between nodes: always `network`.

    A ring over PCIe uses each GPU's link both ways. With NVLink pairs it crosses each pair once. Two
    rings in opposite directions then use each PCIe link both ways and carry twice as much, unless the bridge
    is slower: min(NVLink, 2 PCIe). This is an upper bound: a host bridge that all GPUs share may carry less.
    All-to-alls go between all GPUs, so they run at the speed of PCIe.
    """
    pcie, nvlink = config.pcie_gb_per_s * 1e9, config.nvlink_gb_per_s * 1e9
    pairs = {**dict.fromkeys(SHARES, min(nvlink, 2 * pcie)), "all_to_all": pcie}
    alone = dict.fromkeys((*SHARES, "all_to_all"), pcie)
    assumed = [
        Interconnect(name=name, bytes_per_s=rates, node_bytes_per_s=network.bytes_per_s)
        for name, rates in (("PCIe", alone), ("NVLink pairs", pairs))
    ]
    return [measured, *assumed] if measured is not None else assumed
