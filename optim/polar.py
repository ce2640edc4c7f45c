"""Orthogonalisation: the polar factor UVᵀ of a matrix by odd-polynomial (Newton-Schulz) iteration.

Each iteration maps X to aX + (bA + cA²)X with A = XXᵀ, which moves every singular value s to
as + bs³ + cs⁵ and leaves the singular vectors alone. A method is its list of (a, b, c).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.precision import product_dtype


@dataclass(frozen=True)
class Method:
    """Coefficients of one Newton-Schulz family member, and where they come from."""

    coefficients: tuple[tuple[float, float, float], ...]
    source: str


def _with_safety(
    coefficients: tuple[tuple[float, float, float], ...], factor: float
) -> tuple[tuple[float, float, float], ...]:
    """Evaluate each polynomial at s/factor, so that rounding cannot push s out of its basin."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in coefficients)


METHODS = {
    "jordan": Method(
        ((3.4445, -4.7750, 2.0315),) * 5,
        "https://kellerjordan.github.io/posts/muon/",
    ),
    "polar_express": Method(
        _with_safety(
            (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            ),
            1.05,
        ),
        "https://arxiv.org/abs/2505.16932 (algorithm 1); safety 1.05 as in "
        "https://github.com/Dao-AILab/gram-newton-schulz",
    ),
    "cans": Method(
        _with_safety(
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            1.02,
        ),
        "https://arxiv.org/abs/2506.10935 (Chebyshev-optimised Newton-Schulz); safety 1.02 is ours: "
        "as published, s = 1.005 diverges, and bf16 products send a matrix of rank one to 1e12",
    ),
}


def orthogonalize(matrices: Tensor, *, method: str, dtype: torch.dtype) -> Tensor:
    """Approximate polar factors of a batch of matrices.

    Args:
        matrices: [B, r, c], any floating dtype; not modified. A zero matrix maps to zero.
        method: a name in `METHODS`.
        dtype: precision of the products (or better: `optim.precision.product_dtype`). The Frobenius norm is
            taken in fp64 before the cast: squares of fp32 elements leave the range of fp32 below 1e-19 and
            above 1e19, and the result must not depend on the input's scale.

    Returns:
        [B, r, c] in `dtype`, singular values near 1 (how near depends on the method: see METHODS).
    """
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float64).float()
    x = (matrices / norm.clamp_min(torch.finfo(torch.float32).tiny)).to(product_dtype(dtype, matrices.device))
    tall = x.size(-2) > x.size(-1)
    if tall:  # iterate on the smaller Gram matrix
        x = x.mT
    for a, b, c in METHODS[method].coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(dtype)


def polar_factor(matrix: Tensor) -> Tensor:
    """The exact polar factor UVᵀ of one matrix [r, c] by SVD in fp64: the slow oracle."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh
