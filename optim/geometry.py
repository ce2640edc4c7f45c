"""Norms of weight matrices and their linear minimisation oracles: which step of length one descends most.

A norm is a ball of matrices times a radius that depends on the shape: ‖X‖ = ball.value(X) / radius(r, c).
With it come its dual norm ‖S‖_* = max over ‖X‖ <= 1 of <S, X>, and the maximiser under two signs:

    lmo(S)       = argmin over ‖X‖ <= 1 of <S, X>      as in the papers: points downhill
    direction(S) = -lmo(S), so <S, direction(S)> = ‖S‖_* and ‖direction(S)‖ = 1: points uphill

A rule that steps along the norm does θ ← θ - η·direction(m), with the sign of every other rule of
`optim.rules`: `unit` is its transform and `radius` its scale, and direction(m) = radius·unit(m).

Everywhere matrices are [B, r, c] as torch stores them. A Linear's weight is [d_out, d_in], the map itself.
**An Embedding's weight is [vocabulary, dimension], the transpose of its map**, whose inputs are one-hot: d_in
is the vocabulary and d_out the dimension. What the papers call a column is a row there; the variants
":embedding" mean such storage.

A zero matrix has value 0, dual 0 and direction 0. A NaN or an infinity makes the direction NaN: all of it, or
only its line or entry if the norm treats these one by one. An infinite entry still has a sign.

Sources: Scion, https://arxiv.org/abs/2502.07529, and its code,
https://github.com/LIONS-EPFL/scion/blob/main/scion.py (whose `lmo` is our `direction`); Batched and
Transported Scion, https://arxiv.org/abs/2605.18528.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, sqrt
from typing import Protocol

import torch
from torch import Tensor


class Ball(Protocol):
    """A unit ball of matrices, the same for every shape. Results of `value` and `dual` have dtype `wide`."""

    def value(self, matrices: Tensor) -> Tensor:
        """[B]: the norm of each matrix of [B, r, c]."""
        ...

    def dual(self, matrices: Tensor) -> Tensor:
        """[B]: the largest <S, X> over the ball, for each S of [B, r, c]."""
        ...

    def unit(self, matrices: Tensor, *, norms: Tensor | None = None) -> Tensor:
        """[B, r, c] in the input's dtype: where <S, X> is largest.

        norms: [B] fp32, the Frobenius norms of the matrices, if they are known more exactly than from these.
        """
        ...


def wide(matrices: Tensor) -> torch.dtype:
    """The dtype of norms: fp64 for fp64 matrices, else fp32."""
    return torch.promote_types(matrices.dtype, torch.float32)


@dataclass(frozen=True)
class Schatten:
    """ℓp norm of the singular values, p in [1, ∞]: 1 is the nuclear, 2 the Frobenius, ∞ the operator norm.

    The maximiser of <S, X> with S = U diag(s) Vᵀ is U diag(s^(q-1) / ‖s‖_q^(q-1)) Vᵀ, 1/p + 1/q = 1: Hölder's
    inequality for the singular values, tight after von Neumann's trace inequality. For p = 1 it is u₁v₁ᵀ of a
    largest singular value.

    Exact and slow: one SVD in fp32 (of fp64: fp64), some twenty times the cost of Newton-Schulz, and more on
    a GPU. A rule takes `optim.stages.Polar` for p = ∞.

    Raises:
        ValueError: p below 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"schatten: p is {self.p}, but only p >= 1 (inf included) gives a norm")

    @property
    def q(self) -> float:
        """The dual exponent."""
        if self.p == 1:
            return inf
        return 1.0 if self.p == inf else self.p / (self.p - 1)

    def value(self, matrices: Tensor) -> Tensor:
        return _length(_finite(matrices, torch.linalg.svdvals), self.p)

    def dual(self, matrices: Tensor) -> Tensor:
        return _length(_finite(matrices, torch.linalg.svdvals), self.q)

    def unit(self, matrices: Tensor, *, norms: Tensor | None = None) -> Tensor:
        return _finite(matrices, self._exact).to(matrices.dtype)

    def _exact(self, matrices: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        largest = s[:, :1]
        relative = s / or_one(largest)
        if self.p == 1:
            weights = torch.zeros_like(s)
            weights[:, :1] = 1
        else:
            weights = (relative / _length(relative, self.q)[:, None].clamp_min(1)) ** (self.q - 1)
        return (u * (weights * (largest > 0))[:, None, :]) @ vh


@dataclass(frozen=True)
class Frobenius:
    """ℓ2 norm of all entries; its own dual."""

    def value(self, matrices: Tensor) -> Tensor:
        return torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=torch.float64).to(wide(matrices))

    def dual(self, matrices: Tensor) -> Tensor:
        return self.value(matrices)

    def unit(self, matrices: Tensor, *, norms: Tensor | None = None) -> Tensor:
        norms = self.value(matrices) if norms is None else norms
        return (matrices / or_one(norms)[:, None, None]).to(matrices.dtype)


@dataclass(frozen=True)
class Entries:
    """Largest absolute entry; the dual is the sum of absolute entries. The maximiser is the sign."""

    def value(self, matrices: Tensor) -> Tensor:
        return matrices.abs().amax(dim=(-2, -1)).to(wide(matrices))

    def dual(self, matrices: Tensor) -> Tensor:
        return matrices.abs().sum(dim=(-2, -1), dtype=torch.float64).to(wide(matrices))

    def unit(self, matrices: Tensor, *, norms: Tensor | None = None) -> Tensor:
        return torch.where(matrices.isnan(), matrices, matrices.sign())  # torch's sign of NaN is 0


@dataclass(frozen=True)
class Lines:
    """Largest ℓ2 norm of a row (`dim` = -1) or a column (`dim` = -2) as stored; the dual is their sum.

    The maximiser normalises each line by itself; a zero line stays zero.
    """

    dim: int

    def value(self, matrices: Tensor) -> Tensor:
        return self._norms(matrices).amax(-1)

    def dual(self, matrices: Tensor) -> Tensor:
        return self._norms(matrices).sum(-1, dtype=torch.float64).to(wide(matrices))

    def unit(self, matrices: Tensor, *, norms: Tensor | None = None) -> Tensor:
        lines = or_one(self._norms(matrices)).unsqueeze(self.dim)
        return (matrices / lines).to(matrices.dtype)

    def _norms(self, matrices: Tensor) -> Tensor:
        return torch.linalg.vector_norm(matrices, dim=self.dim, dtype=torch.float64).to(wide(matrices))


def _length(values: Tensor, order: float) -> Tensor:
    """ℓ_order norms [B] of singular values [B, n]; their powers stay in range."""
    largest = values.amax(-1)
    return largest * torch.linalg.vector_norm(values / or_one(largest)[:, None], ord=order, dim=-1)


def or_one(norms: Tensor) -> Tensor:
    """Divisors: zeros, whose matrices are zero, become one."""
    return torch.where(norms == 0, 1, norms)


def _finite(matrices: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The function of [B, r, c] in `wide`, NaN for matrices that are not finite: an SVD refuses these."""
    matrices = matrices.to(wide(matrices))
    finite = matrices.isfinite().all(-1).all(-1)
    result = function(torch.where(finite[:, None, None], matrices, 0))
    return torch.where(finite.view(-1, *[1] * (result.dim() - 1)), result, torch.nan)


@dataclass(frozen=True)
class Norm:
    """A norm of [r, c] matrices: a ball times a radius.

    Attributes:
        name: as `parse_norm` takes it.
        radius: (rows, columns as stored) -> how far the unit ball reaches, in units of `ball`.
    """

    name: str
    ball: Ball
    radius: Callable[[int, int], float]

    def value(self, matrices: Tensor) -> Tensor:
        """‖X‖: [B, r, c], any floating dtype -> [B] in `wide`."""
        return self.ball.value(matrices) / self.radius(*matrices.shape[-2:])

    def dual(self, matrices: Tensor) -> Tensor:
        """‖S‖_* = <S, direction(S)>: [B, r, c], any floating dtype -> [B] in `wide`."""
        return self.ball.dual(matrices) * self.radius(*matrices.shape[-2:])

    def unit(self, matrices: Tensor, *, norms: Tensor | None = None) -> Tensor:
        """`direction` over `radius`, so that a rule can multiply in the weights' precision.

        Args:
            matrices: [B, r, c], any floating dtype; not modified.
            norms: [B] fp32, the Frobenius norms before `matrices` were rounded, if known.

        Returns:
            [B, r, c] in the dtype of `matrices`.
        """
        return self.ball.unit(matrices, norms=norms)

    def direction(self, matrices: Tensor, *, norms: Tensor | None = None) -> Tensor:
        """The ascent direction of norm one with the largest <S, ·>: [B, r, c]. Step by -η times it."""
        return self.unit(matrices, norms=norms) * self.radius(*matrices.shape[-2:])

    def lmo(self, matrices: Tensor, *, norms: Tensor | None = None) -> Tensor:
        """argmin over ‖X‖ <= 1 of <S, X>, [B, r, c]: -`direction`, the papers' sign. Step by +η times it."""
        return -self.direction(matrices, norms=norms)


def _unscaled(rows: int, cols: int) -> float:
    return 1.0


NORMS: dict[str, tuple[Ball, Callable[[int, int], float]]] = {
    # name: ball, radius(rows, columns), as stored. In brackets: Scion's name for it, and what it uses it for.
    #
    # ‖X‖_op √(d_in/d_out), the RMS -> RMS operator norm (Spectral: hidden matrices)
    "spectral": (Schatten(inf), lambda rows, cols: sqrt(rows / cols)),
    # the same, but directions never fall below 1 (Spectral, max: dense input layers)
    "spectral:input": (Schatten(inf), lambda rows, cols: max(1.0, sqrt(rows / cols))),
    # ‖X‖_op
    "spectral:plain": (Schatten(inf), _unscaled),
    # ‖X‖_F: normalised SGD
    "frobenius": (Frobenius(), _unscaled),
    # RMS of all entries (BiasRMS, of a vector as [n, 1]: biases)
    "frobenius:rms": (Frobenius(), lambda rows, cols: sqrt(rows * cols)),
    # d_in·max|x|, directions are ±1/d_in (Sign: the head)
    "sign": (Entries(), lambda rows, cols: 1 / cols),
    # max|x| (Sign, not normalized): signSGD
    "sign:plain": (Entries(), _unscaled),
    # largest RMS of a column, the 1 -> RMS operator norm (ColNorm)
    "column": (Lines(dim=-2), lambda rows, cols: sqrt(rows)),
    # d_in times the same (ColNorm, normalized: other than input layers)
    "column:normalized": (Lines(dim=-2), lambda rows, cols: sqrt(rows) / cols),
    # largest RMS of a token's vector, a row as stored (ColNorm, transpose: embeddings)
    "column:embedding": (Lines(dim=-1), lambda rows, cols: sqrt(cols)),
    # √d_in times the largest ℓ2 norm of a row, the RMS -> ∞ operator norm (RowNorm)
    "row": (Lines(dim=-1), lambda rows, cols: 1 / sqrt(cols)),
    # largest ℓ2 norm of a row (RowNorm, not normalized)
    "row:plain": (Lines(dim=-1), _unscaled),
    # largest ℓ2 norm of one dimension over all tokens (RowNorm, not normalized, transpose: embeddings)
    "row:embedding": (Lines(dim=-2), _unscaled),
}

SCION = (
    # Pattern of a dotted name (Hugging Face's) -> norm; the first that matches counts. Scion multiplies each
    # by a radius of its own: 50 for hidden matrices and 3000 for the head in the README's nanoGPT.
    #
    # An input layer of one-hot vectors. A head tied to it is one parameter, and Scion's nanoGPT gives that
    # the head's norm: then put ("*embed_tokens.weight", "sign") before this.
    ("*embed_tokens.weight", "column:embedding"),
    ("*lm_head.weight", "sign"),
    # Scion's `Auto` gives every 0-D and 1-D parameter the RMS norm: [n] as [n, 1]. Its nanoGPT has none.
    ("*norm.weight", "frobenius:rms"),
    ("*bias", "frobenius:rms"),
    ("*", "spectral"),
)


def parse_norm(text: str) -> Norm:
    """The norm of a name in `NORMS`, or of "schatten:P" with P a number from 1 to inf (radius 1).

    Raises:
        ValueError: an unknown name (the message lists all), or a P that is not a number or below 1.
    """
    family, _, argument = text.partition(":")
    if text in NORMS:
        ball, radius = NORMS[text]
        return Norm(text, ball, radius)
    if family != "schatten":
        raise ValueError(f"unknown norm {text!r}; known are {', '.join(NORMS)} and schatten:P")
    try:
        p = float(argument)
    except ValueError:
        raise ValueError(f"norm {text!r}: P of schatten:P is a number from 1 to inf") from None
    return Norm(text, Schatten(p), _unscaled)


def norm_for(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    """The norm of a parameter: of the first pattern (fnmatch, case counts, * also matches dots) it matches.

    Raises:
        ValueError: no pattern matches, so a catch-all ("*", ...) is missing.
    """
    for pattern, norm in patterns:
        if fnmatchcase(name, pattern):
            return norm
    raise ValueError(f"no norm for {name}: none of {', '.join(pattern for pattern, _ in patterns)} matches")
