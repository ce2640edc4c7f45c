"""What share of a training step of the 1.4B model the optimizer takes, by datasheet. Pure: no torch.

Each term is of the GPU that has most to do, and none is hidden behind another:

    train          FLOPs of forward and backward, at `mfu` of the peak
    orthogonalize  FLOPs of the owned matrices, symmetric products at half their cost (optim/cost.py), at
                   `fraction_of_peak` of the peak
    passes         PASS_BYTES per element of the shard at the bandwidth of the memory
    exchange       bytes that the GPU sends in bf16, both ways, by optim/step/ownership.py's plan, on its link
    adamw          for comparison, what AdamW takes for the same matrices: ADAMW_BYTES per element

A share is (orthogonalize + passes + exchange) / (train + the same). The gradient's reduction and the
gathering of the new weights are left out: ZeRO does both for any optimizer. `training.projection` models the
whole step, with what was measured.
"""

from collections.abc import Sequence

from optim.cost import ADAMW_BYTES, PASS_BYTES, orthogonalize_flops
from optim.step.ownership import Matrix, holdings, make_plan

EXCHANGE_BYTES = 2  # bf16
STAGES = (1, 3)  # of ZeRO: 2 cuts matrices where 1 does


def layers(hidden: int, ffn: int, num_layers: int) -> list[tuple[int, int]]:
    """(rows, columns) of q, k, v, o, gate, up and down, layer after layer."""
    square, tall, wide = (hidden, hidden), (ffn, hidden), (hidden, ffn)
    return [*[square] * 4, tall, tall, wide] * num_layers


# Of llama-1b4, as training/model/shapes.py has it (a test compares): hidden matrices, elements that every
# token is multiplied with, and layers x hidden size, for the attention.
MATRICES_1B4 = layers(2048, 5504, 24)
MATMUL_ELEMENTS_1B4, ATTENTION_1B4 = 1_317_273_600, 24 * 2048


def train_flops_1b4(sequence_length: int) -> int:
    """Per token, forward and backward, as `LlamaShape.flops_per_token` counts them."""
    return 6 * MATMUL_ELEMENTS_1B4 + 12 * ATTENTION_1B4 * sequence_length


def num_elements(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * cols for rows, cols in shapes)


def estimate(
    shapes: Sequence[tuple[int, int]],
    *,
    train_flops: float,
    num_gpus: int,
    peak_flops: float,
    memory_bytes_per_s: float,
    link_bytes_per_s: float,
    mfu: float,
    fraction_of_peak: float,
) -> dict[str, float]:
    """Milliseconds of each term per optimizer step, bytes and FLOPs behind them, and shares, by key.

    Args:
        shapes: (rows, columns) of the hidden matrices.
        train_flops: of one GPU's forward and backward passes in a step.
    """
    ranks = range(num_gpus)
    plans = {stage: make_plan(_matrices(shapes, stage, num_gpus), world_size=num_gpus) for stage in STAGES}
    owned_flops = max(load for plan in plans.values() for load in plan.loads(symmetric=True))
    shard = -(-num_elements(shapes) // num_gpus)
    train = train_flops / (mfu * peak_flops)
    orthogonalize = owned_flops / (fraction_of_peak * peak_flops)
    passes = PASS_BYTES * shard / memory_bytes_per_s
    found: dict[str, float] = {
        "train_flops": train_flops,
        "owned_flops": owned_flops,
        "shard_elements": shard,
        "train_ms": 1e3 * train,
        "orthogonalize_ms": 1e3 * orthogonalize,
        "passes_ms": 1e3 * passes,
        "adamw_ms": 1e3 * ADAMW_BYTES * shard / memory_bytes_per_s,
    }
    for stage, plan in plans.items():
        sent = EXCHANGE_BYTES * max(plan.elements_sent_by(rank) for rank in ranks)
        cost = orthogonalize + passes + sent / link_bytes_per_s
        found |= {
            f"sent_bytes_zero{stage}": sent,
            f"exchange_zero{stage}_ms": 1e3 * sent / link_bytes_per_s,
            f"share_zero{stage}": cost / (train + cost),
        }
    return found


def floor_seconds(
    shapes: Sequence[tuple[int, int]], *, peak_flops: float, memory_bytes_per_s: float
) -> float:
    """The least time of a whole step on one GPU: products at the peak, then two passes over memory."""
    flops = sum(orthogonalize_flops(*shape, symmetric=True, polynomials=True) for shape in shapes)
    return flops / peak_flops + PASS_BYTES * num_elements(shapes) / memory_bytes_per_s


def _matrices(shapes: Sequence[tuple[int, int]], stage: int, num_gpus: int) -> list[Matrix]:
    """As ZeRO cuts them: end to end into equal parts (stage 1), or each by itself (stage 3)."""
    matrices, first, total = [], 0, num_elements(shapes)
    for index, (rows, cols) in enumerate(shapes):
        numel = rows * cols
        begin, whole = (0, numel) if stage == 3 else (first, total)
        held = holdings(begin, numel, part=-(-whole // num_gpus), world_size=num_gpus)
        matrices.append(Matrix(f"matrix {index}", rows, cols, held))
        first += numel
    return matrices
