"""What a rank sends in one optimizer step, by ZeRO stage, under our DeepSpeed configuration. Pure: no torch.

N parameters of p bytes (2 in bf16), W ranks. Of a collective's buffer a rank sends the share in SHARES:

    stage    gradients                               new weights             weights again
    1        all-reduce N p, once, after backward    all-gather N p, once    -
    2        all-reduce N p, in every micro-batch    all-gather N p, once    -
    3        reduce-scatter N p, in every one        the small ones, once    all-gather in every one

Read in DeepSpeed 0.19.8, and counted on ranks in tests/numerics/test_projection.py:
    * Gradients accumulate in fp32 and travel in the model's precision (engine.communication_data_type).
    * Stage 1 in bf16 is BF16_Optimizer, which reduces after the backward pass: `overlap_comm` hides nothing.
    * Stage 2 all-reduces each bucket (use_multi_rank_bucket_allreduce), so it sends what an all-reduce does.
    * Stage 3 gathers the weights in every forward pass. In the backward pass it gathers those again that it
      released: a module is kept where fewer than REUSE_DISTANCE elements are used before it is used again, or
      where prefetching, a bucket per call of a module, has found it gathered. With LIVE_BUCKETS buckets that
      hold the model (the 1.4B's do) that leaves little but the embedding; with less, prefetching counts as
      none, which is exact for small buckets and too much for those between.
      A checkpointed layer is recomputed just before its backward pass, so recomputing gathers nothing more.
    * Parameters of up to PERSISTENT elements stay whole in stage 3, and are gathered after the step.

Muon's matrices travel to their owners and back (optim/ownership.py) in `exchange_bytes` per element, in two
all-to-alls per matrix shape. Norms and flags, under 1 kB, are left out.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from optim.ownership import Matrix, Plan, make_plan
from training.config import MUON_RULES, SCION_RULES, TrainConfig
from training.shapes import LlamaShape

REUSE_DISTANCE = 10**9  # stage3_max_reuse_distance; with PERSISTENT a default that training/engine.py keeps
PERSISTENT = 10**5  # stage3_param_persistence_threshold, elements
LIVE_BUCKETS = 20  # of `zero.bucket_elements` in training/engine.py's stage3_max_live_parameters
STAGE_1_BUCKET = 500_000_000  # elements of BF16_Optimizer's buckets; `zero.bucket_elements` is the others'

# What a rank of W sends of the whole buffer. https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
SHARES = {
    "all_reduce": lambda w: 2 * (w - 1) / w,
    "all_gather": lambda w: (w - 1) / w,
    "reduce_scatter": lambda w: (w - 1) / w,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What decides the traffic of a step.

    Attributes:
        whole_matrices: the hidden matrices' rule needs them whole (Muon's family); else nothing is exchanged.
        element_bytes: of weights and gradients that travel, 2 in bf16.
        exchange_bytes: per element of the matrices that go to their owners and back.
    """

    shape: LlamaShape
    stage: int
    num_ranks: int
    accumulation: int
    bucket_elements: int
    whole_matrices: bool = True
    element_bytes: int = 2
    exchange_bytes: int = 2
    reuse_distance: int = REUSE_DISTANCE

    def groups(self) -> dict[str, list[tuple[int, ...]]]:
        """Sizes of the parameters under one rule, in the model's order (optim/groups.py)."""
        found: dict[str, list[tuple[int, ...]]] = {"table": [], "vector": [], "matrix": []}
        for name, size in self.shape.parameters().items():
            kind = "vector" if len(size) == 1 else "matrix" if ".layers." in name else "table"
            found[kind].append(size)
        return found


def job_of(config: TrainConfig, shape: LlamaShape, *, num_ranks: int, accumulation: int) -> Job | None:
    """Of a run; None where this module does not know what travels: in stage 0, and under Scion's rules."""
    rule = config.optim.matrix.rule
    if config.zero.stage == 0 or rule in SCION_RULES:
        return None
    return Job(
        shape=shape,
        stage=config.zero.stage,
        num_ranks=num_ranks,
        accumulation=accumulation,
        bucket_elements=config.zero.bucket_elements,
        whole_matrices=rule in MUON_RULES,
        element_bytes=2 if config.precision == "bf16" else 4,
        exchange_bytes=2 if config.optim.matrix.dtype == "bf16" else 4,
    )


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in a step.

    Attributes:
        name: what travels.
        kind: of SHARES.
        num_bytes: of the whole buffers of all calls together.
        calls: how many there are.
        hidden_by: the pass that it runs beside where `overlap_comm` is set (GPUs), or None.
    """

    name: str
    kind: str
    num_bytes: int
    calls: int
    hidden_by: str | None = None

    def sent_bytes(self, num_ranks: int) -> float:
        """That a rank sends."""
        return SHARES[self.kind](num_ranks) * self.num_bytes


@dataclass(frozen=True)
class Exchange:
    """The way to the owners; the way back is its mirror. Bytes of all shapes together, one way.

    Attributes:
        sent_bytes: by rank, both ways.
        worst_rank_bytes: that the busiest rank sends or receives, the larger, one way.
        worst_node_bytes: that cross the busiest node's border, the larger direction, one way.
        peers: ranks that the busiest rank talks to, summed over the shapes.
    """

    sent_bytes: tuple[int, ...]
    worst_rank_bytes: int
    worst_node_bytes: int
    peers: int


def collectives(job: Job) -> list[Collective]:
    """The collectives of one optimizer step, but for `exchange`'s. Empty on one rank."""
    if job.num_ranks == 1:
        return []
    return _stage_3(job) if job.stage == 3 else _stages_1_and_2(job)


def _stages_1_and_2(job: Job) -> list[Collective]:
    num_elements = sum(_padded(sizes, job.num_ranks) for sizes in job.groups().values())
    num_bytes = num_elements * job.element_bytes
    weights = Collective("new weights", "all_gather", num_bytes, sum(map(bool, job.groups().values())))
    if job.stage == 1:
        calls = math.ceil(num_elements / STAGE_1_BUCKET)
        return [Collective("gradients", "all_reduce", num_bytes, calls), weights]
    # without the padding: buckets hold the gradients themselves
    num_bytes = job.shape.num_parameters * job.element_bytes * job.accumulation
    calls = math.ceil(job.shape.num_parameters / job.bucket_elements) * job.accumulation
    return [Collective("gradients", "all_reduce", num_bytes, calls, "backward"), weights]


def _padded(sizes: list[tuple[int, ...]], num_ranks: int) -> int:
    """Elements of a group's flat tensor, which 2 W divide."""
    return math.ceil(sum(map(math.prod, sizes)) / (2 * num_ranks)) * 2 * num_ranks


def _stage_3(job: Job) -> list[Collective]:
    sizes = [math.prod(size) for size in job.shape.parameters().values()]
    parts = {size: math.ceil(size / job.num_ranks) * job.num_ranks for size in sizes}
    forward, backward = _gathers(sizes, job)
    small = [size for size in sizes if size <= PERSISTENT]

    def gathered(name: str, chosen: list[int], hidden_by: str) -> Collective:
        num_bytes = sum(parts[size] for size in chosen) * job.element_bytes * job.accumulation
        calls = min(len(chosen), math.ceil(sum(chosen) / job.bucket_elements) + 1) * job.accumulation
        return Collective(name, "all_gather", num_bytes, calls, hidden_by)

    num_bytes = sum(parts[size] for size in sizes) * job.element_bytes * job.accumulation
    calls = math.ceil(sum(sizes) / job.bucket_elements) * job.accumulation
    found = [
        Collective("gradients", "reduce_scatter", num_bytes, calls, "backward"),
        gathered("weights, forward", forward, "forward"),
        gathered("weights, backward", backward, "backward"),
        Collective(
            "small weights", "all_gather", sum(parts[s] for s in small) * job.element_bytes, len(small)
        ),
    ]
    return [each for each in found if each.num_bytes]


def _gathers(sizes: list[int], job: Job) -> tuple[list[int], list[int]]:
    """Sizes of the parameters that a micro-batch gathers, in its forward and in its backward pass."""
    large = [size for size in sizes if size > PERSISTENT]
    tied = sizes[0] if job.shape.tied else 0
    # Between the two uses of a module lie the modules after it, forth and back. A tied embedding is used
    # by the head as well, after the forward pass of all layers and before their backward pass.
    after, far = sum(sizes) + tied, []
    for size in sizes:
        after -= size
        far.append(size > PERSISTENT and 2 * after >= job.reuse_distance)
    if tied:
        far[0] = sizes[0] > PERSISTENT and sum(sizes[1:]) >= job.reuse_distance
    if sum(large) > LIVE_BUCKETS * job.bucket_elements:
        again = [size for size, released in zip(sizes, far, strict=True) if released]
        return large + (again[:1] if tied and far[0] else []), again
    # Prefetching runs through the forward pass by a bucket per call of a module, and then marks as kept all
    # that it finds gathered. So only modules that were over by then are released.
    early = _over_before_all_is_gathered(job)
    again = [size for size, released in zip(sizes, far, strict=True) if released]
    return large, again[: sum(size > PERSISTENT for size in early)]


def _over_before_all_is_gathered(job: Job) -> list[int]:
    """Sizes of the parameters whose modules had their turn before prefetching had gathered everything."""
    calls = list(_calls(job.shape))
    waiting = [size for size in calls if size > PERSISTENT]
    for number, size in enumerate(calls):
        if size > PERSISTENT and len(waiting) == sum(each > PERSISTENT for each in calls[number:]):
            waiting.pop(0)  # its own, that nothing has fetched before
        budget = job.bucket_elements
        while waiting and budget > 0:
            budget -= waiting.pop(0)
        if not waiting:
            return [each for each in calls[:number] if each]
    return [each for each in calls if each]


def _calls(shape: LlamaShape) -> Iterator[int]:
    """Elements that each module of training/model.py holds itself, in the order of the forward pass."""
    sizes = {name: math.prod(size) for name, size in shape.parameters().items()}
    yield from (0, 0, sizes["model.embed_tokens.weight"])
    for layer in range(shape.num_layers):
        for module in (
            *("", "input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            *("self_attn.o_proj", "post_attention_layernorm", "mlp", "mlp.gate_proj", "mlp.up_proj"),
            "mlp.down_proj",
        ):
            yield sizes.get(f"model.layers.{layer}.{module}.weight", 0)
    yield from (sizes["model.norm.weight"], sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"]))


# --- the matrices' owners ---------------------------------------------------------------------------------


def ownership(job: Job) -> Plan | None:
    """Who owns which hidden matrix; None under an elementwise rule."""
    if not job.whole_matrices:
        return None
    sizes = [(rows, cols) for rows, cols in job.groups()["matrix"]]
    first, matrices = 0, []
    part = _padded(job.groups()["matrix"], job.num_ranks) // job.num_ranks
    for index, (rows, cols) in enumerate(sizes):
        numel = rows * cols
        begin, size = (0, math.ceil(numel / job.num_ranks)) if job.stage == 3 else (first, part)
        borders = [min(max(size * rank - begin, 0), numel) for rank in range(job.num_ranks + 1)]
        holdings = tuple((a, b) if a < b else (0, 0) for a, b in pairwise(borders))
        matrices.append(Matrix(f"matrix {index}", rows, cols, holdings))
        first += numel
    return make_plan(matrices, world_size=job.num_ranks)


def exchange(plan: Plan, *, element_bytes: int, ranks_per_node: int) -> Exchange:
    """What travels by `plan`, if ranks are numbered node by node."""
    sent = [0] * plan.world_size
    worst_rank = worst_node = peers = 0
    for indices, _ in plan.by_shape():
        leaving, arriving = [0] * plan.world_size, [0] * plan.world_size
        over, into = _zeros(plan.world_size, ranks_per_node), _zeros(plan.world_size, ranks_per_node)
        meetings: dict[int, set[int]] = {}
        for index in indices:
            owner = plan.owners[index]
            for rank, (start, stop) in enumerate(plan.matrices[index].holdings):
                if start == stop or rank == owner:
                    continue
                leaving[rank] += stop - start
                arriving[owner] += stop - start
                meetings.setdefault(rank, set()).add(owner)
                meetings.setdefault(owner, set()).add(rank)
                if rank // ranks_per_node != owner // ranks_per_node:
                    over[rank // ranks_per_node] += stop - start
                    into[owner // ranks_per_node] += stop - start
        sent = [total + a + b for total, a, b in zip(sent, leaving, arriving, strict=True)]
        worst_rank += max(*leaving, *arriving)
        worst_node += max(*over, *into)
        peers += max(map(len, meetings.values()), default=0)
    return Exchange(
        tuple(number * element_bytes for number in sent),
        worst_rank * element_bytes,
        worst_node * element_bytes,
        peers,
    )


def _zeros(num_ranks: int, ranks_per_node: int) -> list[int]:
    return [0] * math.ceil(num_ranks / ranks_per_node)


def sent_bytes(job: Job) -> list[float]:
    """Bytes that each rank sends in one step, matrices included."""
    common = sum(each.sent_bytes(job.num_ranks) for each in collectives(job))
    plan = ownership(job)
    if plan is None:
        return [common] * job.num_ranks
    travels = exchange(plan, element_bytes=job.exchange_bytes, ranks_per_node=job.num_ranks)
    return [common + sent for sent in travels.sent_bytes]


def by_name(job: Job) -> Mapping[str, float]:
    """Bytes that a rank sends, the largest over the ranks, by what travels."""
    found = {each.name: each.sent_bytes(job.num_ranks) for each in collectives(job)}
    plan = ownership(job)
    if plan is not None and job.num_ranks > 1:
        travels = exchange(plan, element_bytes=job.exchange_bytes, ranks_per_node=job.num_ranks)
        found["matrices, there and back"] = max(travels.sent_bytes)
    return found
