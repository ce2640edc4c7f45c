"""Block 4: the fused step and torch.optim.Muon on the matrices of the 1.4B model, and their floor."""

import statistics

import torch

from optim.bench import step_race
from optim.bench.share import MATRICES_1B4, num_elements
from optim.cost import PASS_BYTES, orthogonalize_flops
from optim.kernels import gpu
from tests.gpu.block import TINY, Run

METHODS = {"ours": "jordan", "ours_polar_express": "polar_express"}  # the first is the peer's
MAX_DIFFERENCE = 0.05  # of first updates that should be equal; bf16 in another order makes 0.02


def measure(run: Run) -> None:
    sizes = MATRICES_1B4 if run.gpu else list(TINY.matrices().elements())
    gemm = step_race.gemm_gflops(sizes, run.device) / 1e3
    run.row("products of these matrices, bf16", tflops=gemm, **run.of_products(gemm))
    if run.gpu:
        products(run)
    race(run, sizes, gemm_tflops=gemm)


def race(run: Run, sizes: list[tuple[int, int]], *, gemm_tflops: float) -> None:
    """Whole steps in turns. The floor: its products at the measured rate, then two passes over memory."""
    found = step_race.race_steps(sizes, METHODS, num_rounds=10, device=run.device)
    too_far = f"first updates differ by {found.difference:.3f}, above {MAX_DIFFERENCE}"
    same = found.difference <= MAX_DIFFERENCE
    run.row(
        f"first update against {found.peer}", problem=None if same else too_far,
        relative_difference=found.difference, peak_allocated_gb=run.peak_memory_gb(),
    )  # fmt: skip
    flops = sum(orthogonalize_flops(*size, symmetric=True, polynomials=run.gpu) for size in sizes)
    floor = flops / (gemm_tflops * 1e12)
    if "copy_gb_per_s" in run.ceilings:
        floor += PASS_BYTES * num_elements(sizes) / (run.ceilings["copy_gb_per_s"] * 1e9)
    peer = found.seconds[found.peer]  # torch.optim.Muon on a GPU
    for name, seconds in found.seconds.items():
        middle = statistics.median(seconds)
        ratios = [theirs / ours for theirs, ours in zip(peer, seconds, strict=True)]
        run.row(
            name, ms=1e3 * middle, least_ms=1e3 * min(seconds), most_ms=1e3 * max(seconds),
            **{f"speedup_{found.peer}": statistics.median(ratios)}, floor_ms=1e3 * floor,
            percent_of_measured_floor=100 * floor / middle,
        )  # fmt: skip


def products(run: Run) -> None:
    """The products of the orthogonalisation by our kernels, and by torch: TFLOP/s as if computed in full."""
    for rows, cols in ((2048, 2048), (2048, 5504)):
        x = run.random(24, rows, cols, dtype=torch.bfloat16)
        gram = torch.empty(24, rows, rows, dtype=x.dtype, device=run.device)
        p, out = x[..., :rows], torch.empty_like(x)
        amount = 2 * 24 * rows * rows * cols / 1e12
        bodies = {
            "XXᵀ, ours": lambda x=x, gram=gram: gpu.symmetric_product(x, x, out=gram),
            "XXᵀ, torch": lambda x=x, gram=gram: torch.bmm(x, x.mT, out=gram),
            "PX + X, torch": lambda p=p, x=x, out=out: torch.baddbmm(x, p, x, out=out),
        }
        for name, body in bodies.items():
            middle, least, most = run.seconds_of(body)
            run.row(
                f"{name}, 24 x {rows} x {cols}", tflops=amount / middle, ms=1e3 * middle,
                least_ms=1e3 * least, most_ms=1e3 * most,
            )  # fmt: skip
