"""Seconds of one optimizer step, from the rates of one GPU and of its links. Pure: no torch.

The parts of the slowest rank, none hidden behind another:

    compute      seconds per token x tokens of the rank
    optimizer    orthogonalisation of the rank's matrices and passes over its shard, from FLOPs and bytes,
                 times the measured ratio to that model
    links        sent bytes / B + steps x hop, for each collective (traffic.py). A ring crosses each node once
                 each way, so B = min(bus bandwidth in the node, the node's network). Of its k (W - 1) steps
                 k (nodes - 1) cross the network; k is 2 for an all-reduce, else 1. The faster protocol wins.
                 This is NCCL's own model: https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc
                 An all-to-all takes as long as the busiest GPU or the busiest node's network.

With `overlap_comm`, on GPUs, stage 2 reduces during the backward pass, and stage 3 gathers and reduces during
both passes. Stage 1 in bf16 hides nothing. So a step has two bounds: nothing is hidden, or all of that.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, prod
from typing import Any

from cluster.display import number
from cluster.record.origins import Origin
from optim.cost import ADAMW_BYTES, PASS_BYTES
from optim.step.ownership import OwnershipPlan
from training.projection import traffic
from training.projection.traffic import SHARES, Exchange, Job

# BF16_Optimizer (stage 1) keeps the whole fp32 gradient on every rank: norm 4 bytes, clipping 8, zeroing 4 an
# element. The other stages do the first two on the shard.
WHOLE_GRADIENT_BYTES, SHARD_GRADIENT_BYTES = 16, 12
BACKWARD_SHARE = 2 / 3  # of the compute: two products to the forward pass's one
# (hop in the node, hop between nodes, share of the bandwidth) of NCCL's ring, protocols Simple and LL: its
# tuning.cc, hwLat of PCI and NET in microseconds; LL's in a node times 1.8 where there are several.
NCCL_PROTOCOLS = ((5.7e-6, 9.6e-6, 1.0), (1.8e-6, 2.7e-6, 0.25))
PARTS = ("compute", "optimizer", "intra-node link", "inter-node link", "latency")


@dataclass(frozen=True)
class Network:
    """What a node's network carries each way, and the source of that figure."""

    bytes_per_s: float
    source: str

    def describe(self) -> str:
        """One line for people."""
        return f"{number(self.bytes_per_s / 1e9)} GB/s per node each way: {self.source}"


NO_NETWORK = Network(inf, "one node")


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Rates of one GPU.

    Attributes:
        source: where they come from, for the output.
        compute_seconds_per_token: forward and backward, and reading the data.
        product_flops: FLOP/s of the orthogonalisation.
        memory_bytes_per_s: of passes over memory.
        optimizer_factor: measured seconds of the optimizer / seconds from FLOPs and bytes.
        peak_tflops: of the datasheet, for the MFU; None without one.
        links: as measured in the node, or None.
        network: between nodes.
        origin: of the baseline that they come from, if they do (`cluster.record.origins`).
    """

    source: str
    compute_seconds_per_token: float
    product_flops: float
    memory_bytes_per_s: float
    optimizer_factor: float = 1.0
    peak_tflops: float | None = None
    links: "Interconnect | None" = None
    network: "Network" = NO_NETWORK
    origin: Origin | None = None


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """The links that ranks send through.

    Attributes:
        bytes_per_s: kind of collective -> bus bandwidth in the node.
        node_bytes_per_s: of a node's network, each way; unused with one node.
        protocols: (hop in the node in seconds, between nodes, share of the bandwidth); the fastest counts.
    """

    name: str
    bytes_per_s: Mapping[str, float]
    node_bytes_per_s: float
    protocols: tuple[tuple[float, float, float], ...] = NCCL_PROTOCOLS


@dataclass(frozen=True)
class CollectiveSeconds:
    """Seconds of a collective, by cause."""

    transfer: float
    latency: float
    crosses: bool  # the network between nodes limits the transfer


def ring_seconds(
    kind: str, num_bytes: float, *, calls: int, num_ranks: int, num_nodes: int, links: Interconnect
) -> CollectiveSeconds:
    """Of `calls` collectives over `num_bytes` in all: see this module's description."""
    inner = links.bytes_per_s[kind]
    crosses = num_nodes > 1 and links.node_bytes_per_s < inner
    rate = links.node_bytes_per_s if crosses else inner
    turns = 2 if kind == "all_reduce" else 1
    between = turns * (num_nodes - 1)
    choices = [
        CollectiveSeconds(
            SHARES[kind](num_ranks) * num_bytes / (share * rate),
            calls * ((turns * (num_ranks - 1) - between) * hop + between * node_hop),
            crosses,
        )
        for hop, node_hop, share in links.protocols
    ]
    return min(choices, key=lambda spent: spent.transfer + spent.latency)


def exchange_seconds(travels: Exchange, *, num_nodes: int, links: Interconnect) -> CollectiveSeconds:
    """To the owners and back: the busiest GPU's link or the busiest node's, and one hop for each peer."""
    inner = travels.worst_rank_bytes / links.bytes_per_s["all_to_all"]
    outer = travels.worst_node_bytes / links.node_bytes_per_s if num_nodes > 1 else 0.0
    hop = min(node_hop if num_nodes > 1 else hop for hop, node_hop, _ in links.protocols)
    return CollectiveSeconds(2 * max(inner, outer), 2 * travels.peers * hop, outer > inner)


def optimizer_work(job: Job, plans: Sequence[OwnershipPlan]) -> tuple[float, float]:
    """(FLOPs, bytes of memory) of the optimizer step on the most loaded rank. Not for Scion.

    Under mars every second step orthogonalises; the FLOPs are the mean.
    """
    assert not job.norms
    elements = [(sum(map(prod, group.sizes)), group.whole) for group in job.groups().values()]
    total = sum(count for count, _ in elements)
    shard = sum((PASS_BYTES if whole else ADAMW_BYTES) * count for count, whole in elements) / job.num_ranks
    everywhere = job.stage == 1 and job.element_bytes == 2
    shard += WHOLE_GRADIENT_BYTES * total if everywhere else SHARD_GRADIENT_BYTES * total / job.num_ranks
    loads = zip(*(plan.loads(symmetric=True) for plan in plans), strict=True)
    return max(map(sum, loads), default=0) / job.gradients_per_update, shard


def optimizer_seconds(job: Job, plans: Sequence[OwnershipPlan], basis: Basis) -> float:
    """Of the most loaded rank."""
    flops, num_bytes = optimizer_work(job, plans)
    return basis.optimizer_factor * (flops / basis.product_flops + num_bytes / basis.memory_bytes_per_s)


@dataclass(frozen=True)
class Step:
    """One optimizer step: seconds by part of PARTS with nothing hidden, and what overlap can hide at most."""

    seconds: Mapping[str, float]
    hidden_seconds: float

    @property
    def longest(self) -> float:
        return sum(self.seconds.values())

    @property
    def shortest(self) -> float:
        return self.longest - self.hidden_seconds

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=lambda part: self.seconds[part])


def step_seconds(
    job: Job, *, tokens_per_rank: int, ranks_per_node: int, basis: Basis, links: Interconnect
) -> Step:
    """Predict a step of the most loaded rank."""
    plans = traffic.ownership(job)
    num_nodes = ceil(job.num_ranks / ranks_per_node)
    seconds = dict.fromkeys(PARTS, 0.0)
    seconds["compute"] = basis.compute_seconds_per_token * tokens_per_rank
    seconds["optimizer"] = optimizer_seconds(job, plans, basis)
    beside = {"forward": 0.0, "backward": 0.0}

    def add(spent: CollectiveSeconds) -> float:
        seconds["inter-node link" if spent.crosses else "intra-node link"] += spent.transfer
        seconds["latency"] += spent.latency
        return spent.transfer + spent.latency

    for each in traffic.collectives(job):
        spent = ring_seconds(
            each.kind,
            each.num_bytes,
            calls=each.calls,
            num_ranks=job.num_ranks,
            num_nodes=num_nodes,
            links=links,
        )
        taken = add(spent)
        if each.hidden_by is not None:
            beside[each.hidden_by] += taken
    add(
        exchange_seconds(
            traffic.exchange_of(job, ranks_per_node=ranks_per_node), num_nodes=num_nodes, links=links
        )
    )
    backward = BACKWARD_SHARE * seconds["compute"]
    hidden = min(beside["backward"], backward) + min(beside["forward"], seconds["compute"] - backward)
    return Step(seconds, hidden)


def basis_from_row(
    rows: Sequence[Mapping[str, Any]],
    ceilings: Mapping[str, Any],
    *,
    job: Job,
    source: str,
    flops_ratio: float = 1.0,
) -> Basis:
    """From the steps of `training.baseline.steps` and the ceilings of `cluster.measure.probe` of one device.

    Args:
        rows: of equal runs; medians count.
        job: of these rows, to compare the optimizer's measured time with its model.
        flops_ratio: FLOPs per token of the predicted model / of the measured one.
    """

    def median(name: str) -> float:
        return statistics.median(float(row[name]) for row in rows)

    scale = median("step_seconds") / median("phased_step_seconds")
    compute = (median("seconds_compute") + median("seconds_data")) * scale * flops_ratio
    basis = Basis(
        source=source,
        compute_seconds_per_token=compute * rows[0]["num_workers"] / rows[0]["tokens_per_step"],
        product_flops=ceilings["product_tflops"]["best"] * 1e12,
        memory_bytes_per_s=ceilings["copy_gb_per_s"]["best"] * 1e9,
    )
    modelled = optimizer_seconds(job, traffic.ownership(job), basis)
    return replace(basis, optimizer_factor=median("seconds_optimizer") * scale / modelled)
