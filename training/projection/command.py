"""How long the 1.4B model would train on N nodes: tokens/s, MFU and days, and what bounds each.

    python -m training.projection [--config FILE] [--dry-run] [key=value ...]

`step_model.py` computes the seconds of a step from the bytes that `traffic.py` counts and the rates of
`basis.py`: compute from the training cell of a baseline, else from the datasheet's peak at an assumed MFU;
links as the baseline measured them in a node and the preflight between nodes, and assumed ones beside them.
The main figures hide no communication behind compute; `overlapped` hides all that `overlap_comm` can. Memory
per GPU comes from training/plan.py.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

from cluster import cli
from cluster import config as layered
from cluster.display import Table, pairs, show, table
from cluster.laptop import growth
from cluster.measure import hardware
from cluster.record import origins, provenance
from cluster.record.result import record_result
from training.config import (
    BatchConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    WorkersConfig,
    ZeroConfig,
)
from training.model.shapes import SHAPES
from training.optim_config import MatrixOptimConfig, OptimConfig
from training.plan import Plan, make_plan
from training.projection import traffic
from training.projection.basis import basis_of, link_choices
from training.projection.config import ProjectionConfig
from training.projection.step_model import PARTS, Basis, Step, step_seconds
from training.projection.traffic import job_of

HEADERS = (
    *("ZeRO", "link in the node", "compute", "optim", "intra", "inter", "latency", "step s", "tok/s", "MFU"),
    *("days", "overlapped", "GB", "bottleneck"),
)


@dataclass(frozen=True)
class Batch:
    """How a global batch divides over GPUs: `tokens` is the smallest that does, from the requested one up."""

    tokens: int
    micro_sequences: int
    accumulation: int


def divide(config: ProjectionConfig, num_gpus: int) -> Batch:
    """At least one sequence per GPU, the same number on each, in as few micro-batches as possible."""
    sequences = ceil(config.batch_tokens / (num_gpus * config.sequence_length))
    micro = max(size for size in range(1, config.micro_sequences + 1) if sequences % size == 0)
    return Batch(sequences * num_gpus * config.sequence_length, micro, sequences // micro)


def project(config: ProjectionConfig, basis: Basis) -> list[dict[str, Any]]:
    """One row for each number of nodes, stage and link, JSON-ready."""
    rows = []
    for num_nodes in config.nodes:
        num_gpus = num_nodes * config.gpus_per_node
        batch = divide(config, num_gpus)
        for stage in config.stages:
            asked = training_config_of(config, stage, batch)
            plan = make_plan(asked, num_workers=num_gpus)
            job = job_of(asked, plan.shape, num_ranks=num_gpus, accumulation=plan.accumulation)
            assert job is not None, "ProjectionConfig allows only what is counted"
            common = {
                "memory_bytes": plan.total_memory_bytes,
                "sent_bytes": dict(traffic.by_name(job)),
            }
            for links in link_choices(config.links, basis.links, basis.network):
                step = step_seconds(
                    job,
                    tokens_per_rank=batch.tokens // num_gpus,
                    ranks_per_node=config.gpus_per_node,
                    basis=basis,
                    links=links,
                )
                setting = {"nodes": num_nodes, "gpus": num_gpus, "zero_stage": stage, "link": links.name}
                rows.append(setting | _figures(config, plan, batch, step, basis.peak_tflops) | common)
    return rows


def _figures(
    config: ProjectionConfig, plan: Plan, batch: Batch, step: Step, peak_tflops: float | None
) -> dict[str, Any]:
    rate = batch.tokens / step.longest
    share = peak_tflops and hardware.mfu(
        tokens_per_second=rate,
        flops_per_token=plan.flops_per_token,
        num_devices=plan.num_workers,
        peak_tflops=peak_tflops,
    )
    return {
        **{f"batch_{name}": value for name, value in asdict(batch).items()},
        "seconds": dict(step.seconds),
        "step_seconds": step.longest,
        "step_seconds_overlapped": step.shortest,
        "tokens_per_second": rate,
        "mfu": share,
        "days": config.tokens / rate / 86400,
        "days_overlapped": config.tokens / batch.tokens * step.shortest / 86400,
        "bottleneck": step.bottleneck,
    }


def training_config_of(config: ProjectionConfig, stage: int, batch: Batch) -> TrainConfig:
    """The training run that a row is about."""
    return replace(
        TrainConfig(),
        precision="bf16",
        model=ModelConfig(shape=config.shape, activation_checkpointing=config.activation_checkpointing),
        batch=BatchConfig(
            tokens=batch.tokens,
            sequence_length=config.sequence_length,
            micro_sequences=batch.micro_sequences,
        ),
        schedule=ScheduleConfig(tokens=max(int(config.tokens), batch.tokens)),
        optim=OptimConfig(matrix=MatrixOptimConfig(rule=config.rule)),
        zero=ZeroConfig(stage=stage, bucket_elements=config.bucket_elements),
        workers=WorkersConfig(gpu=True),
    )


def describe(
    config: ProjectionConfig, basis: Basis, rows: Sequence[Mapping[str, Any]]
) -> Iterator[str | Table]:
    """What is measured and what is assumed, then a table for each number of nodes."""
    sheet = hardware.lookup(config.device)
    links = config.links
    yield f"{config.shape} with {config.rule}, {config.tokens:,.0f} tokens, on {config.device}"
    assumed = (
        f"ASSUMED: PCIe {links.pcie_gb_per_s:g} GB/s each way, NVLink {links.nvlink_gb_per_s:g} GB/s each "
        "way; set links.* to what `make preflight` measured"
    )
    between = [("between nodes", basis.network.describe())] if max(config.nodes) > 1 else []
    yield pairs([("a GPU        ", basis.source), ("in a node", assumed), *between])
    yield "only `overlapped` hides communication behind compute; bottleneck: the largest part"
    memory = sheet.memory_gb * 1e9 if sheet else inf
    for num_nodes in dict.fromkeys(row["nodes"] for row in rows):
        chosen = [row for row in rows if row["nodes"] == num_nodes]
        yield f"\n{batch_line(config, chosen[0])}"
        yield table(HEADERS, [_cells(row, memory) for row in chosen], left=(0, 1, -1))
    if (most := max(config.nodes)) > 1:
        yield f"\nwhat {most} nodes need beside that"
        site = growth.Site(most, network_gb_per_s=basis.network.bytes_per_s / 1e9)
        yield pairs([*growth.describe(site), growth.checkpoint(site, SHAPES[config.shape].num_parameters)])


def _cells(row: Mapping[str, Any], memory: float) -> list[str | None]:
    return [
        *(str(row[name]) for name in ("zero_stage", "link")),
        *(f"{row['seconds'][part]:.3f}" for part in PARTS),
        f"{row['step_seconds']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        None if row["mfu"] is None else f"{row['mfu']:.1%}",
        *(f"{row[name]:.2f}" for name in ("days", "days_overlapped")),
        f"{row['memory_bytes'] / 1e9:.1f}",
        f"{row['bottleneck']}{' (DOES NOT FIT)' * (row['memory_bytes'] > memory)}",
    ]


def record(
    config: ProjectionConfig,
    rows: Sequence[Mapping[str, Any]],
    sources: Mapping[str, str],
    basis: Basis,
) -> str:
    """Record a projection as a run: its rows as a table. Returns W&B's status."""
    columns = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    table_rows = [
        [*(row[name] for name in columns), *(row["seconds"][part] for part in PARTS)] for row in rows
    ]
    return record_result(
        Path(config.directory), job_type="projection", name=f"{config.shape}-{config.device}",
        project=config.project, wandb_mode=config.wandb, config=layered.to_dict(config),
        provenance=provenance.collect(command=sys.argv, data_fingerprint=None),
        inputs=[basis.origin or origins.origin("datasheet", config.device)],
        summary={"projection": rows, **sources},
        tables={"rows": ([*columns, *(f"{part}_seconds" for part in PARTS)], table_rows)},
    )  # fmt: skip


def batch_line(config: ProjectionConfig, row: Mapping[str, Any]) -> str:
    """Nodes, GPUs and the batch, and how much it had to grow."""
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
        show(*describe(config, basis, rows))
        sources = {"basis": basis.source, "between_nodes": basis.network.describe()}
        print(f"W&B: {record(config, rows, sources, basis)}")
        print(json.dumps({"projection": rows, **sources, "config": layered.to_dict(config)}))

    return cli.run(body)
