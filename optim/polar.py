"""Orthogonalisation: the polar factor UVᵀ of a matrix by odd-polynomial (Newton-Schulz) iteration.

Each iteration maps X to aX + (bA + cA²)X with A = XXᵀ, which moves every singular value s to
as + bs³ + cs⁵ and leaves the singular vectors alone. A method is its list of (a, b, c).

A matrix with one side much shorter gets the Gram form: every iteration multiplies X by a polynomial of A, so
these polynomials are multiplied with each other first, n x n, and with X only once. In half precision that
alone explodes (to singular values of 75 on a 1/i spectrum): after GRAM_RESTART
iterations X is multiplied out and A taken anew. There is no key to turn the restart off. The compiled step
has no restart where its products are fp32 (optim/kernels/native.cpp).
https://github.com/Dao-AILab/gram-newton-schulz

On a GPU the matrices of a batch are iterated some at a time, so that what lives only during the iteration
takes at most GROUP_BYTES or what one matrix needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from optim.cost import GRAM_RESTART, GROUP_BYTES, NUM_ITERATIONS, uses_gram
from optim.kernels import gpu, native
from optim.precision import gram_dtype, product_dtype

Coefficients = tuple[tuple[float, float, float], ...]

EXACT = "exact"  # polar factors by eigenvalues, in fp64: for problems of few small matrices

# Side from which torch on a CPU computes three of a symmetric product's four blocks: 1.2 to 1.3 times as fast
# at 768 and above, and slower at 256 (AVX-512, bf16, one thread).
MIRRORED_FROM = 512


@dataclass(frozen=True)
class Method:
    """Coefficients of one Newton-Schulz family member, and where they come from.

    Attributes:
        later: of iterations after those.
    """

    coefficients: Coefficients
    source: str
    later: Coefficients = ()

    def steps(self, num_steps: int) -> Coefficients:
        """Of the first `num_steps` iterations; the last one that is known is repeated."""
        known = (*self.coefficients, *self.later)
        return (*known, *known[-1:] * (num_steps - len(known)))[:num_steps]


def _with_safety(coefficients: Coefficients, factor: float) -> Coefficients:
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
        later=_with_safety(
            (
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                (1.875, -1.25, 0.375),
            ),
            1.05,
        ),
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


def orthogonalize(
    matrices: Tensor,
    *,
    method: str,
    dtype: torch.dtype,
    num_steps: int = NUM_ITERATIONS,
    norms: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Approximate polar factors of a batch of matrices.

    Args:
        matrices: [B, r, c], any floating dtype. A zero matrix maps to zero.
        method: a name in `METHODS`, or EXACT.
        dtype: precision of the products (or better: `optim.precision.product_dtype`); bf16 or fp32.
        num_steps: iterations, one more than GRAM_RESTART at the least.
        norms: [B] fp32, the Frobenius norms, if they are known. Otherwise taken here, in fp64: squares of
            fp32 elements leave the range of fp32 below 1e-19 and above 1e19, and the result must not depend
            on the input's scale.
        overwrite: the result may take the place of `matrices`.

    Returns:
        [B, r, c] in `dtype`, singular values near 1 (how near depends on the method: see METHODS).
    """
    if method == EXACT:
        return _exact(matrices).to(dtype)
    if norms is None:
        norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=torch.float64).float()
    scale = 1 / norms.clamp_min(torch.finfo(torch.float32).tiny)
    gram = uses_gram(*matrices.shape[-2:])
    product = (gram_dtype if gram else product_dtype)(dtype, matrices.device)
    coefficients = METHODS[method].steps(num_steps)
    restart = GRAM_RESTART if gram else None
    by_kernels = gpu.unsupported(matrices.device, product) is None  # on a CPU: where a test interprets them
    compiled = native.unsupported(matrices.device, dtype) is None and not native.products_by_onednn()
    by_native = compiled and not by_kernels
    if by_native:  # it widens bf16 by itself where the CPU has no bf16 arithmetic
        product = dtype
    if by_native and matrices.dtype == product:
        keep = not overwrite or not matrices.is_contiguous()
        x = matrices.clone(memory_format=torch.contiguous_format) if keep else matrices
        return native.orthogonalize_(x, coefficients, factors=scale, restart=restart).to(dtype)
    if matrices.device.type != "cpu" or by_kernels:
        out = matrices if overwrite and matrices.dtype == dtype else torch.empty_like(matrices, dtype=dtype)
        _in_groups(matrices, scale, coefficients, out=out, product=product, by_kernels=by_kernels)
        return out
    x = torch.empty(matrices.shape, dtype=product)
    wide = torch.promote_types(matrices.dtype, x.dtype)
    for part, matrix, number in zip(x, matrices, scale.tolist(), strict=True):
        torch.mul(matrix.to(wide), number, out=part)  # by numbers, which need no copy in fp32 on the way
    if by_native:
        return native.orthogonalize_(x, coefficients, restart=restart).to(dtype)
    return _form(product, gram=gram)(x, coefficients).to(dtype)


def _in_groups(
    matrices: Tensor, scale: Tensor, coefficients: Coefficients, *, out: Tensor, product: torch.dtype,
    by_kernels: bool,
) -> None:  # fmt: skip
    """Iterate the matrices some at a time, scaled and in `product`; `out` may be `matrices`."""
    form = _form(product, gram=uses_gram(*matrices.shape[-2:]))
    size = _group_size(matrices, product)
    for source, factor, target in zip(*(each.split(size) for each in (matrices, scale, out)), strict=True):
        x = torch.empty(source.shape, dtype=product, device=source.device)
        if by_kernels and source.is_contiguous():
            gpu.scale_pass(source, factor, out=x)
        else:
            torch.mul(source, factor[:, None, None], out=x)  # in fp32, rounded once
        x = form(x, coefficients)
        if by_kernels and x.dtype != target.dtype and x.is_contiguous() and target.is_contiguous():
            gpu.scale_pass(x, None, out=target)
        else:
            target.copy_(x)


def _exact(matrices: Tensor) -> Tensor:
    """W(WᵀW)^-½ by the eigenvalues of the smaller Gram matrix: [B, r, c] -> fp64 [B, r, c].

    Singular values below 1e-7 of the largest become 0. It takes a third of an SVD's time for 8 columns.
    """
    wide = (matrices.mT if _is_tall(matrices) else matrices).double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    roots = torch.where(values > 1e-14 * values[:, -1:], values.rsqrt(), 0)
    factors = (vectors * roots[:, None, :]) @ vectors.mT @ wide
    return factors.mT if _is_tall(matrices) else factors


def _group_size(matrices: Tensor, product: torch.dtype) -> int:
    """How many matrices are iterated at once: X twice, and five n x n matrices in the Gram form, else two."""
    rows, cols = matrices.shape[-2:]
    short = min(rows, cols)
    each = (2 * rows * cols + (5 if uses_gram(rows, cols) else 2) * short**2) * product.itemsize
    num_groups = ceil(len(matrices) / max(1, GROUP_BYTES // each))
    return max(1, ceil(len(matrices) / max(1, num_groups)))


def _form(product: torch.dtype, *, gram: bool) -> Callable[[Tensor, Coefficients], Tensor]:
    if not gram:
        return _standard_form
    return _gram_form_fp16 if product == torch.float16 else _gram_form


def _standard_form(x: Tensor, coefficients: Coefficients) -> Tensor:
    # The identity goes onto the polynomial's diagonal, where bf16 rounds it: 2% from the exact polynomials on
    # Gaussian matrices. a·X apart, as torch.optim.Muon and optim/kernels/native.cpp have it, gives 1.1%, and
    # in torch a dearer product with X.
    for a, b, c in coefficients:
        x = _multiply(_polynomial(_gram_matrix(x), a, b, c), x)
    return x


def _gram_form(x: Tensor, coefficients: Coefficients) -> Tensor:
    for steps in (coefficients[:GRAM_RESTART], coefficients[GRAM_RESTART:]):
        gram, product = _gram_matrix(x), None
        for a, b, c in steps[:-1]:
            factor = _polynomial(gram, a, b, c)
            product = factor if product is None else _multiply_polynomials(factor, product)
            gram = _symmetric(_multiply_polynomials(factor, gram), factor)
        factor = _polynomial(gram, *steps[-1])
        x = _multiply(factor if product is None else _multiply_polynomials(factor, product), x)
    return x


def _gram_form_fp16(x: Tensor, coefficients: Coefficients) -> Tensor:
    """The same with all products but those with X symmetric: 14 n x n products at half their cost.

    Each polynomial is kept without its aI, which is added in fp32: P·Q = aQ + (P - aI)·Q. That and the three
    bits that fp16 has more than bf16 keep the rounding of mirrored products small: on low ranks and heavy
    tails the error is 0.1 where `_gram_form` in bf16 has 0.18.
    """
    for steps in (coefficients[:GRAM_RESTART], coefficients[GRAM_RESTART:]):
        gram, product = _gram_matrix(x), None
        for a, b, c in steps[:-1]:
            rest = _symmetric(gram, gram, alpha=c, addend=gram, beta=b)
            product = _plus_identity(rest, a) if product is None else _times(product, rest, a)
            half = _times(gram, rest, a)
            gram = _times(half, rest, a)
        a, b, c = steps[-1]
        rest = _symmetric(gram, gram, alpha=c, addend=gram, beta=b)
        x = _multiply(_plus_identity(rest, a) if product is None else _times(product, rest, a), x)
    return x


def _times(polynomial: Tensor, rest: Tensor, a: float) -> Tensor:
    """polynomial·(aI + rest): all polynomials of one Gram matrix, so that they commute."""
    return _symmetric(polynomial, rest, addend=polynomial, beta=a)


def _plus_identity(matrix: Tensor, a: float) -> Tensor:
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


def _multiply_polynomials(left: Tensor, right: Tensor) -> Tensor:
    # Symmetric but for their rounding, and in bf16 computed in full: to mirror half of one makes its rounding
    # part of what the next step amplifies, and matrices of low rank leave the band (3.9 in place of 1.15).
    return _symmetric(left, right) if left.dtype == torch.float32 else left @ right.mT


def _gram_matrix(x: Tensor) -> Tensor:
    """XXᵀ or, of a tall matrix, XᵀX: the smaller, [B, n, n]."""
    wide = x.mT if _is_tall(x) else x
    return _symmetric(wide, wide)


def _is_tall(x: Tensor) -> bool:
    """Whether X is multiplied from the right."""
    return x.size(-2) > x.size(-1)


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """aI + bA + cA²."""
    if gpu.unsupported(gram.device, gram.dtype) is None:
        return gpu.symmetric_product(gram, gram, alpha=c, c=gram, beta=b, diagonal=a)
    polynomial = _symmetric(gram, gram, alpha=c, addend=gram, beta=b)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return polynomial


def _symmetric(
    left: Tensor, right: Tensor, *, alpha: float = 1.0, addend: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """alpha·L·Rᵀ + beta·addend, known to be symmetric: XXᵀ, or polynomials of one Gram matrix."""
    if gpu.unsupported(left.device, left.dtype) is None:
        return gpu.symmetric_product(left, right, alpha=alpha, c=addend, beta=beta)
    if left.device.type == "cpu" and left.size(-2) >= MIRRORED_FROM:
        return _mirrored(left, right, alpha=alpha, addend=addend, beta=beta)
    if addend is None:
        return left @ right.mT
    return torch.baddbmm(addend, left, right.mT, beta=beta, alpha=alpha)


def _mirrored(left: Tensor, right: Tensor, *, alpha: float, addend: Tensor | None, beta: float) -> Tensor:
    """The same in three of its four blocks, the last one copied: 3/4 of the work."""
    num_matrices, n, _ = left.shape
    half = n // 2
    out = left.new_empty(num_matrices, n, n)
    corner = left.new_empty(half, half)
    for x, y, z, c in zip(left, right, out, addend if addend is not None else out, strict=True):
        for block, rows in ((z[half:], slice(half, n)), (corner, slice(0, half))):
            columns = y[: block.size(1)].mT
            if addend is None:
                torch.mm(x[rows], columns, out=block)
            else:
                torch.addmm(c[rows, : block.size(1)], x[rows], columns, beta=beta, alpha=alpha, out=block)
        z[:half, :half] = corner
        z[:half, half:] = z[half:, :half].mT
    return out


def _multiply(polynomial: Tensor, x: Tensor) -> Tensor:
    """P·X or, of a tall matrix, X·P: on the shorter side."""
    return x @ polynomial if _is_tall(x) else polynomial @ x


def polar_factor(matrix: Tensor) -> Tensor:
    """The exact polar factor UVᵀ of one matrix [r, c] by SVD in fp64: the slow oracle."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh
