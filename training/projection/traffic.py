"""What a rank sends in one optimizer step, by ZeRO stage, under our DeepSpeed configuration. Pure: no torch.

N parameters of p bytes (2 in bf16), W ranks. A rank sends SHARES of a collective's buffer:

    stage    gradients                               new weights             weights again
    1        all-reduce N p, once, after backward    all-gather N p, once    -
    2        all-reduce N p, in every micro-batch    all-gather N p, once    -
    3        reduce-scatter N p, in every one        the small ones, once    all-gather in every one

Read in DeepSpeed 0.19.8, and counted on ranks in tests/training/projection/test_traffic.py:
    * Gradients accumulate in fp32 and travel in `zero.communication_dtype`, by default the model's precision.
    * Stage 1 in bf16 is BF16_Optimizer, which reduces after the backward pass: `overlap_comm` hides nothing.
    * Stage 2 all-reduces each bucket (use_multi_rank_bucket_allreduce), so it sends what an all-reduce does.
    * Stage 3 gathers the weights in every forward pass. In the backward pass it gathers again what it
      released. It keeps a module if fewer than REUSE_DISTANCE elements are used before the module's next use,
      or if prefetching (a bucket per call of a module) found it gathered. If LIVE_BUCKETS buckets hold the
      model, as they do for 1.4B, little but the embedding is gathered again. If they do not, prefetching is
      not counted: exact for small buckets, too much for those in between.
      A checkpointed layer is recomputed just before its backward pass, so recomputing gathers nothing more.
    * Parameters of up to PERSISTENT elements stay whole in stage 3, and are gathered after the step.

Matrices whose rule needs them whole travel to their owners and back (optim/step/ownership.py) in
`optim.matrix.dtype`, in two all-to-alls per matrix shape: under Muon the hidden matrices, under Scion all
whose norm is not of single entries. Under mars they do in every second step, of which this file counts the
mean. Norms and flags, under 1 kB, are left out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from optim.step.ownership import Matrix, OwnershipPlan, holdings, make_plan
from training.config import TrainConfig
from training.model.shapes import LlamaShape
from training.optim_config import SCION_RULES, MatrixOptimConfig

# DeepSpeed's defaults, which training/run/engine.py keeps:
REUSE_DISTANCE = 10**9  # stage3_max_reuse_distance, elements
PERSISTENT = 10**5  # stage3_param_persistence_threshold, elements
LIVE_BUCKETS = 20  # of `zero.bucket_elements` in training/run/engine.py's stage3_max_live_parameters
ENTRY_NORMS = ("sign", "sign:plain")  # of optim/geometry.py: those that need no whole matrix
ROW_NORMS = ("column:embedding", "row", "row:plain")  # under which optim/groups.py cuts tables into blocks
TABLE_BLOCK_ROWS = 512  # of optim/groups.py

# The share of the whole buffer that a rank of W sends. https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
SHARES = {
    "all_reduce": lambda w: 2 * (w - 1) / w,
    "all_gather": lambda w: (w - 1) / w,
    "reduce_scatter": lambda w: (w - 1) / w,
}


@dataclass
class Group:
    """Parameters under one rule, in the model's order.

    Attributes:
        whole: the rule needs whole matrices.
        matrix: of hidden matrices, its keys.
        sizes: of the parameters.
        blocks: rows of the matrices that each consists of.
    """

    whole: bool
    matrix: MatrixOptimConfig = field(default_factory=MatrixOptimConfig)
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    blocks: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that determines the traffic of a step.

    Attributes:
        matrix: the rule of the hidden matrices.
        norms: under Scion, (pattern of names, norm@radius) of every parameter; the first that matches counts.
        by_name: (pattern of names, rule) of hidden matrices that have another rule.
        gradients_per_update: steps of which one moves the weights.
        element_bytes: of weights that travel, 2 in bf16; gradient_bytes: of gradients.
    """

    shape: LlamaShape
    stage: int
    num_ranks: int
    accumulation: int
    bucket_elements: int
    matrix: MatrixOptimConfig = field(default_factory=MatrixOptimConfig)
    norms: tuple[tuple[str, str], ...] = ()
    by_name: tuple[tuple[str, MatrixOptimConfig], ...] = ()
    gradients_per_update: int = 1
    element_bytes: int = 2
    gradient_bytes: int = 2
    reuse_distance: int = REUSE_DISTANCE

    def groups(self) -> dict[str, Group]:
        """By label of the rule (optim/groups.py), or by pattern of names, in the order of the shards."""
        found = {"table": Group(False), "vector": Group(False)}
        for label, matrix in (("matrix", self.matrix), *self.by_name):
            found[label] = Group(matrix.needs_matrices, matrix)
        if self.norms:
            norms = dict.fromkeys(label for _, label in self.norms)
            found = {label: Group(label.partition("@")[0] not in ENTRY_NORMS, self.matrix) for label in norms}
        for name, size in self.shape.parameters().items():
            kind = "vector" if len(size) == 1 else "matrix" if ".layers." in name else "table"
            blocks: tuple[int, ...] = size[:1]
            if self.norms:
                label = next(label for pattern, label in self.norms if fnmatchcase(name, pattern))
                if kind == "table" and label.partition("@")[0] in ROW_NORMS:
                    blocks = tuple(
                        min(TABLE_BLOCK_ROWS, size[0] - row) for row in range(0, size[0], TABLE_BLOCK_ROWS)
                    )
                kind = label
            if kind == "matrix":
                kind = next((each for each, _ in self.by_name if fnmatchcase(name, each)), kind)
            found[kind].sizes.append(size)
            found[kind].blocks.append(blocks)
        return {label: group for label, group in found.items() if group.sizes}


def job_of(config: TrainConfig, shape: LlamaShape, *, num_ranks: int, accumulation: int) -> Job | None:
    """Of a run; None where the traffic is not modelled.

    That is in stage 0, with matrices per head, and with Scion or another dtype for some of them.
    """
    matrix, named = config.optim.matrix, config.optim.matrices
    mixed = len({(each.dtype, each.rule in SCION_RULES) for each in named.values()}) > 1
    if config.zero.stage == 0 or matrix.per_head or mixed or (len(named) > 1 and matrix.rule in SCION_RULES):
        return None
    entries = config.optim.scion.norms if matrix.rule in SCION_RULES else ()
    weights = 2 if config.is_bf16 else 4
    return Job(
        shape=shape,
        stage=config.zero.stage,
        num_ranks=num_ranks,
        accumulation=accumulation,
        bucket_elements=config.zero.bucket_elements,
        matrix=matrix,
        norms=tuple((pattern, label) for pattern, _, label in (entry.partition("=") for entry in entries)),
        by_name=tuple((pattern, each) for pattern, each in named.items() if pattern),
        gradients_per_update=config.optim.gradients_per_update,
        element_bytes=weights,
        gradient_bytes={"auto": weights, "bf16": 2, "fp32": 4}[config.zero.communication_dtype],
    )


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in a step.

    Attributes:
        name: what travels.
        kind: of SHARES.
        num_bytes: of the whole buffers of all calls together.
        calls: how many there are.
        hidden_by: the pass that it overlaps with if `overlap_comm` is set (GPUs), or None.
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
    """The way to the owners in a step; the way back mirrors it. Bytes of all shapes together, one way.

    Attributes:
        sent_bytes: by rank, both ways.
        worst_rank_bytes: that the busiest rank sends or receives, the larger, one way.
        worst_node_bytes: that cross the busiest node's border, the larger direction, one way.
        peers: ranks that the busiest rank talks to, summed over the shapes.
    """

    sent_bytes: tuple[float, ...]
    worst_rank_bytes: float
    worst_node_bytes: float
    peers: float


def collectives(job: Job) -> list[Collective]:
    """The collectives of one optimizer step without those of `exchange`. None on one rank."""
    if job.num_ranks == 1:
        return []
    return _stage_3(job) if job.stage == 3 else _stages_1_and_2(job)


def _stages_1_and_2(job: Job) -> list[Collective]:
    groups = job.groups().values()
    num_elements = sum(_padded(group.sizes, job.num_ranks) for group in groups)
    num_bytes = num_elements * job.element_bytes
    weights = Collective("new weights", "all_gather", num_bytes, len(groups))
    if job.stage == 1:
        calls = sum(math.ceil(_padded(g.sizes, job.num_ranks) / job.bucket_elements) for g in groups)
        return [Collective("gradients", "all_reduce", num_elements * job.gradient_bytes, calls), weights]
    # without the padding: buckets hold the gradients themselves
    num_bytes = job.shape.num_parameters * job.gradient_bytes * job.accumulation
    calls = math.ceil(job.shape.num_parameters / job.bucket_elements) * job.accumulation
    return [Collective("gradients", "all_reduce", num_bytes, calls, "backward"), weights]


def _padded(sizes: list[tuple[int, ...]], num_ranks: int) -> int:
    """Elements of a group's flat tensor, padded to a multiple of 2 W."""
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

    num_bytes = sum(parts[size] for size in sizes) * job.gradient_bytes * job.accumulation
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
    """Sizes of the parameters whose modules had run before prefetching had gathered everything."""
    calls = list(_calls(job.shape))
    waiting = [size for size in calls if size > PERSISTENT]
    for number, size in enumerate(calls):
        if size > PERSISTENT and len(waiting) == sum(each > PERSISTENT for each in calls[number:]):
            waiting.pop(0)  # its own, which nothing has prefetched
        budget = job.bucket_elements
        while waiting and budget > 0:
            budget -= waiting.pop(0)
        if not waiting:
            return [each for each in calls[:number] if each]
    return [each for each in calls if each]


def _calls(shape: LlamaShape) -> Iterator[int]:
    """Elements that each module of training/model/llama.py holds itself, in the order of the forward pass."""
    sizes = {name: math.prod(size) for name, size in shape.parameters().items()}
    yield from (0, 0, sizes["model.embed_tokens.weight"])
    norms = ("self_attn.q_norm", "self_attn.k_norm") if shape.qk_norm else ()
    for layer in range(shape.num_layers):
        for module in (
            *("", "input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            *norms,
            *("self_attn.o_proj", "post_attention_layernorm", "mlp", "mlp.gate_proj", "mlp.up_proj"),
            "mlp.down_proj",
        ):
            name = f"model.layers.{layer}.{module}"
            yield sizes.get(f"{name}.weight", 0) + sizes.get(f"{name}.bias", 0)
    yield from (sizes["model.norm.weight"], sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"]))


def ownership(job: Job) -> list[OwnershipPlan]:
    """The owner of each matrix, for each rule that needs whole matrices."""
    return [
        make_plan(_matrices(group, job), world_size=job.num_ranks)
        for group in job.groups().values()
        if group.whole
    ]


def _matrices(group: Group, job: Job) -> list[Matrix]:
    """The matrices of a group, and the part of each that every rank holds."""
    found: list[Matrix] = []
    first = 0
    part = _padded(group.sizes, job.num_ranks) // job.num_ranks
    for size, blocks in zip(group.sizes, group.blocks, strict=True):
        numel, cols = math.prod(size), math.prod(size[1:])
        begin, width = (0, math.ceil(numel / job.num_ranks)) if job.stage == 3 else (first, part)
        row = 0
        for rows in blocks:
            held = holdings(begin + row * cols, rows * cols, part=width, world_size=job.num_ranks)
            polar_steps = group.matrix.polar_steps_of(rows, cols)
            found.append(Matrix(f"matrix {len(found)}", rows, cols, held, polar_steps))
            row += rows
        first += numel
    return found


def exchange(job: Job, plans: Sequence[OwnershipPlan], *, ranks_per_node: int) -> Exchange:
    """The traffic of the plans of a job. Ranks are numbered node by node."""
    num_ranks = job.num_ranks
    sent = [0] * num_ranks
    worst_rank = worst_node = peers = 0
    groups = [(plan, indices) for plan in plans for indices, _ in plan.by_shape()]
    for plan, indices in groups:
        leaving, arriving = [0] * num_ranks, [0] * num_ranks
        over, into = _zeros(num_ranks, ranks_per_node), _zeros(num_ranks, ranks_per_node)
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
    share = 1 / job.gradients_per_update
    element_bytes = share * (2 if job.matrix.dtype == "bf16" else 4)
    return Exchange(
        tuple(number * element_bytes for number in sent),
        worst_rank * element_bytes,
        worst_node * element_bytes,
        peers * share,
    )


def _zeros(num_ranks: int, ranks_per_node: int) -> list[int]:
    return [0] * math.ceil(num_ranks / ranks_per_node)


def exchange_of(job: Job, *, ranks_per_node: int) -> Exchange:
    """The traffic to the owners of a job's matrices."""
    return exchange(job, ownership(job), ranks_per_node=ranks_per_node)


def sent_bytes(job: Job) -> list[float]:
    """Bytes that each rank sends in one step, matrices included."""
    common = sum(each.sent_bytes(job.num_ranks) for each in collectives(job))
    return [common + sent for sent in exchange_of(job, ranks_per_node=job.num_ranks).sent_bytes]


def node_bytes(job: Job, *, ranks_per_node: int) -> float:
    """Bytes that leave (or enter) the busiest node in one step. Ranks are numbered node by node.

    A ring leaves and enters each node once, whatever its ranks (`training.projection.step_model`). Matrices
    go from each rank to their owners and back.
    """
    common = sum(each.sent_bytes(job.num_ranks) for each in collectives(job))
    return common + 2 * exchange_of(job, ranks_per_node=ranks_per_node).worst_node_bytes


def by_name(job: Job) -> Mapping[str, float]:
    """Bytes that a rank sends, the largest over the ranks, by what travels."""
    found = {each.name: each.sent_bytes(job.num_ranks) for each in collectives(job)}
    if most := max(exchange_of(job, ranks_per_node=job.num_ranks).sent_bytes):
        found["matrices, there and back"] = most
    return found
