"""The middle of a rule: maps of whole matrices [B, r, c], one after the other, such as the polar factor.

A stage may overwrite its matrices, and returns any floating dtype; `Rule.transform` rounds the last result.
A line of a matrix is one of its rows or columns.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from optim.cost import balances_lines
from optim.directions import State
from optim.geometry import Ball, or_one, wide
from optim.polar import orthogonalize

LINES = ("row", "column", "larger", "row_column", "column_row")  # the last two: one after the other
DIVISORS = {  # name -> what a line is divided by, of its second moment v and alpha
    "sqrt_plus": lambda v, alpha: v.sqrt().add_(alpha),  # √v + α: Algorithm 1 of arXiv 2609.39114
    "max": lambda v, alpha: v.clamp_min(alpha).sqrt_(),  # √max(v, α): its language models
}


class Given(NamedTuple):
    """What a stage is told beside the matrices.

    Attributes:
        norms: [B] fp32, their Frobenius norms before they were rounded; None after the first stage.
        dtype: of the products.
        lines: the state of `line_state_names`, [B, lines] fp32 each; updated in place.
    """

    norms: Tensor | None
    dtype: torch.dtype
    lines: State


class Stage(Protocol):
    """What a rule asks of a stage. State of `line_state_names` has one number per line."""

    @property
    def line_state_names(self) -> tuple[str, ...]: ...

    def num_lines(self, rows: int, cols: int) -> int: ...

    def __call__(self, matrices: Tensor, given: Given) -> Tensor: ...


class _Stateless:
    line_state_names: ClassVar[tuple[str, ...]] = ()

    def num_lines(self, rows: int, cols: int) -> int:
        return 0


@dataclass(frozen=True)
class Polar(_Stateless):
    """The orthogonal factor, by `num_steps` iterations of a method of `optim.polar`, or by its EXACT."""

    method: str = "polar_express"
    num_steps: int = 5

    def __call__(self, matrices: Tensor, given: Given) -> Tensor:
        return orthogonalize(
            matrices,
            method=self.method,
            num_steps=self.num_steps,
            dtype=given.dtype,
            norms=given.norms,
            overwrite=True,
        )


@dataclass(frozen=True)
class Unit(_Stateless):
    """Where <S, X> is largest over a ball of `optim.geometry`."""

    ball: Ball

    def __call__(self, matrices: Tensor, given: Given) -> Tensor:
        return self.ball.unit(matrices, norms=given.norms)


@dataclass(frozen=True)
class EqualLines(_Stateless):
    """Each line divided by its length; `lines` is a name in LINES.

    After the polar factor: https://arxiv.org/abs/2602.21545 (Muon+), with `lengthened`, our convention: the
    result gets the Frobenius norm √min(r, c) of an orthogonal matrix, so that scales mean what they mean for
    Muon. Before it: https://arxiv.org/abs/2603.28254 (MuonEq).
    """

    lines: str = "row"
    lengthened: bool = True

    def __call__(self, matrices: Tensor, given: Given) -> Tensor:
        update = matrices.to(wide(matrices))
        for dim in _dims(self.lines, *matrices.shape[-2:]):
            update = update / or_one(torch.linalg.vector_norm(update, dim=dim, keepdim=True))
        return _with_length(update, min(update.shape[-2:]) ** 0.5) if self.lengthened else update


@dataclass(frozen=True)
class LineMoments:
    """Each line O_i divided by the RMS of its past. https://arxiv.org/abs/2609.39114, from 2510.05491

    v ← β₂v + (1-β₂)·mean of O² over the line;  Ô = O / divisor(v, α), a name in DIVISORS.

    Attributes:
        lines: "row", "column" or "larger": along the matrix's larger dimension, rows of a square one.
        length: "full": Ô gets the Frobenius norm √min(r, c) of an orthogonal matrix, which with the scale
            "rms" is Algorithm 1's step 0.2·√(rc)·Ô/‖Ô‖_F. "kept": it gets ‖O‖_F, Eq. (4.1).
    """

    lines: str = "row"
    beta2: float = 0.95
    alpha: float = 1e-10
    divisor: str = "sqrt_plus"
    length: str = "full"

    @property
    def line_state_names(self) -> tuple[str, ...]:
        return (f"{self.lines}_second_moment",)

    def num_lines(self, rows: int, cols: int) -> int:
        return {"row": rows, "column": cols, "larger": max(rows, cols)}[self.lines]

    def __call__(self, matrices: Tensor, given: Given) -> Tensor:
        update = matrices.to(wide(matrices))
        [dim] = _dims(self.lines, *update.shape[-2:])
        [name] = self.line_state_names
        second = given.lines[name].lerp_(update.square().mean(dim), 1 - self.beta2)
        divided = update / or_one(DIVISORS[self.divisor](second, self.alpha)).unsqueeze(dim)
        if self.length == "kept":
            return _with_length(divided, torch.linalg.matrix_norm(update, keepdim=True))
        return _with_length(divided, min(update.shape[-2:]) ** 0.5)


@dataclass(frozen=True)
class Aurora(_Stateless):
    """A polar factor whose lines have nearly the same length. https://arxiv.org/abs/2606.27715

    O = polar(D·M), with D = 1/(lengths of M's rows) at first, and then K - 1 times D ← D·√((c/r) / (squared
    lengths of O's rows)), for matrices with more rows than columns. Of all others it is the polar factor;
    with `lines` "larger" the columns of wide matrices are balanced, as in
    https://github.com/tilde-research/aurora-release.
    """

    polar: Polar = Polar()
    iterations: int = 2  # K
    lines: str = "row"

    def num_polars(self, rows: int, cols: int) -> int:
        """Orthogonalisations of an r x c matrix."""
        return self.iterations if balances_lines(rows, cols, self.lines) else 1

    def __call__(self, matrices: Tensor, given: Given) -> Tensor:
        rows, cols = matrices.shape[-2:]
        if not balances_lines(rows, cols, self.lines):
            return self.polar(matrices, given)
        matrices, dim = matrices.to(wide(matrices)), -1 if rows > cols else -2
        balance = 1 / or_one(torch.linalg.vector_norm(matrices, dim=dim, keepdim=True))
        update = self.polar(balance * matrices, given._replace(norms=None))
        for _ in range(self.iterations - 1):
            squares = update.float().square().sum(dim, keepdim=True).clamp_min(1e-14)
            balance = balance * (min(rows, cols) / max(rows, cols) / squares).sqrt()
            update = self.polar(balance * matrices, given._replace(norms=None))
        return update


def _dims(lines: str, rows: int, cols: int) -> tuple[int, ...]:
    """Along which dimensions the entries of a line lie, in the order of `lines`."""
    larger = (-1,) if rows >= cols else (-2,)
    fixed = {"row": (-1,), "column": (-2,), "row_column": (-1, -2), "column_row": (-2, -1)}
    return larger if lines == "larger" else fixed[lines]


def _with_length(update: Tensor, length: Tensor | float) -> Tensor:
    """[B, r, c] with these Frobenius norms; zero matrices stay zero."""
    return update * (length / or_one(torch.linalg.matrix_norm(update, keepdim=True)))
