"""What the optimizer step should cost in training the 1.4B model, from datasheets. Pure: no torch.

Each term is of the GPU that has most to do, and none is hidden behind another:

    train          FLOPs of forward and backward, 6 N_matmul + 12 L h s per token, at `mfu` of the peak
    orthogonalize  FLOPs of the owned matrices, symmetric products at half their cost (optim/cost.py), at
                   `fraction_of_peak` of the peak
    passes         PASS_BYTES per element of the shard at the bandwidth of the memory
    exchange       bytes that the GPU sends in bf16, both ways, by optim/step/ownership.py's plan, on its link
    adamw          for comparison, what AdamW takes for the same matrices: ADAMW_BYTES per element

A share is (orthogonalize + passes + exchange) / (train + the same). The gradient's reduction and the
gathering of the new weights are left out: ZeRO does both for any optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from optim.cost import orthogonalize_flops
from optim.step.ownership import Matrix, make_plan

# Bytes per element that the two passes over the shard move at the least: fp32 gradient 4, momentum there and
# back 8, bf16 update out 2; bf16 update in 2, fp32 weight there and back 8. And AdamW, all in fp32: gradient
# 4, two moments 16, weight 8.
PASS_BYTES, ADAMW_BYTES = 24, 28
EXCHANGE_BYTES = 2  # bf16
STAGES = (1, 3)  # of ZeRO: 2 cuts matrices where 1 does


@dataclass(frozen=True)
class Machine:
    """One GPU's ceilings: bf16 peak, FLOP/s; bytes per second of its memory and of its link to the others."""

    peak_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float


@dataclass(frozen=True)
class Model:
    hidden: int
    ffn: int
    num_layers: int
    vocabulary: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of q, k, v, o, gate, up and down, layer after layer."""
        square, tall, wide = (self.hidden, self.hidden), (self.ffn, self.hidden), (self.hidden, self.ffn)
        return [*[square] * 4, tall, tall, wide] * self.num_layers

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward, as the training's MFU counts them (training/model/shapes.py)."""
        num_matmul = num_elements(self.shapes) + self.vocabulary * self.hidden
        return 6 * num_matmul + 12 * self.num_layers * self.hidden * sequence_length


LLAMA_1B4 = Model(hidden=2048, ffn=5504, num_layers=24, vocabulary=50304)


def num_elements(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * cols for rows, cols in shapes)


def estimate(
    machine: Machine,
    model: Model,
    *,
    num_gpus: int,
    tokens_per_step: int,
    sequence_length: int,
    mfu: float,
    fraction_of_peak: float,
) -> dict[str, float]:
    """Milliseconds of each term per optimizer step, bytes and FLOPs behind them, and shares, by key."""
    plans = {stage: make_plan(_cut(model.shapes, stage, num_gpus), world_size=num_gpus) for stage in STAGES}
    owned_flops = max(
        sum(orthogonalize_flops(*model.shapes[i], symmetric=True) for i in plan.owned_by(rank))
        for plan in plans.values()
        for rank in range(num_gpus)
    )
    shard = -(-num_elements(model.shapes) // num_gpus)
    train_flops = model.flops_per_token(sequence_length) * tokens_per_step / num_gpus
    train = train_flops / (mfu * machine.peak_flops)
    orthogonalize = owned_flops / (fraction_of_peak * machine.peak_flops)
    passes = PASS_BYTES * shard / machine.memory_bytes_per_s
    found: dict[str, float] = {
        "train_flops": train_flops,
        "owned_flops": owned_flops,
        "shard_elements": shard,
        "train_ms": 1e3 * train,
        "orthogonalize_ms": 1e3 * orthogonalize,
        "passes_ms": 1e3 * passes,
        "adamw_ms": 1e3 * ADAMW_BYTES * shard / machine.memory_bytes_per_s,
    }
    for stage, plan in plans.items():
        sent = EXCHANGE_BYTES * max(
            sum(
                segment.numel
                for other in range(num_gpus)
                if other != rank
                for segment in plan.to_owner(rank, other) + plan.from_owner(rank, other)
            )
            for rank in range(num_gpus)
        )
        cost = orthogonalize + passes + sent / machine.link_bytes_per_s
        found |= {
            f"sent_bytes_zero{stage}": sent,
            f"exchange_zero{stage}_ms": 1e3 * sent / machine.link_bytes_per_s,
            f"share_zero{stage}": cost / (train + cost),
        }
    return found


def floor_seconds(machine: Machine, shapes: Sequence[tuple[int, int]]) -> float:
    """The least time of a whole step on one GPU: products at the peak, then two passes over memory."""
    flops = sum(orthogonalize_flops(*shape, symmetric=True) for shape in shapes)
    return flops / machine.peak_flops + PASS_BYTES * num_elements(shapes) / machine.memory_bytes_per_s


def _cut(shapes: Sequence[tuple[int, int]], stage: int, num_gpus: int) -> list[Matrix]:
    """The matrices as ZeRO cuts them: end to end into equal parts (stage 1), or each by itself (stage 3)."""
    matrices, first = [], 0
    for index, (rows, cols) in enumerate(shapes):
        numel = rows * cols
        begin, whole = (0, numel) if stage == 3 else (first, num_elements(shapes))
        size = -(-whole // num_gpus)
        borders = [min(max(size * rank - begin, 0), numel) for rank in range(num_gpus)] + [numel]
        holdings = tuple((a, b) if a < b else (0, 0) for a, b in pairwise(borders))
        matrices.append(Matrix(f"matrix {index}", rows, cols, holdings))
        first += numel
    return matrices
