"""What one rank holds: fragments of parameters, and in them the pieces of whole matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from optim.rules import Rule
from optim.step.ownership import Matrix


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter: elements [start, stop) of it, at `offset` of a flat fp32 tensor.

    Attributes:
        blocks: rows of each matrix that the parameter consists of: one block, unless it is a fused or
            per-head projection (`optim.groups`). May be empty where the rule is elementwise.
        model: what the model computes with, laid out as `flat`, in any precision; the step writes it.
            None: somebody else copies the weights to the model.
    """

    name: str
    blocks: tuple[int, ...]
    cols: int
    start: int
    stop: int
    flat: Tensor
    offset: int
    model: Tensor | None = None

    def view(self, like_flat: Tensor) -> Tensor:
        """The fragment's elements in a tensor laid out as `flat`: a 1-D view."""
        return like_flat.view(-1)[self.offset : self.offset + self.stop - self.start]


@dataclass
class Piece:
    """This rank's part of one matrix: its place in the flat tensor and in the packed buffer.

    `buffer` and `square` are where the passes read and write it: on the device of the flat tensor.
    """

    fragment: Fragment
    block: int  # of the parameter, which the matrix is
    numel: int
    offset: int  # of the first element, in the flat tensor
    number: int = field(init=False)  # of the matrix, in its group's plan
    position: int = field(init=False)  # of the first element, in the packed buffer
    buffer: Tensor = field(init=False)
    square: Tensor = field(init=False)


def cut(fragments: Sequence[Fragment], rule: Rule) -> tuple[list[Piece], list[Matrix]]:
    """This rank's piece of every matrix, and where every matrix lies: the same list on every rank.

    Collective: each rank learns the ranges of all others.
    """
    pieces, matrices = [], []
    for fragment, ranges in zip(fragments, _gather_ranges(fragments), strict=True):
        first = 0
        for index, rows in enumerate(fragment.blocks):
            numel = rows * fragment.cols
            holdings = [_within(first, numel, *held) for held in ranges]
            start, stop = _within(first, numel, fragment.start, fragment.stop)
            offset = fragment.offset + first + start - fragment.start
            pieces.append(Piece(fragment, index, stop - start, offset))
            name = fragment.name if len(fragment.blocks) == 1 else f"{fragment.name}[{index}]"
            polar_steps = rule.polar_steps(rows, fragment.cols)
            matrices.append(Matrix(name, rows, fragment.cols, tuple(holdings), polar_steps))
            first += numel
    return pieces, matrices


def _within(first: int, numel: int, start: int, stop: int) -> tuple[int, int]:
    """Elements [start, stop) of a parameter, counted in its matrix of `numel` elements from `first` on."""
    low, high = max(start - first, 0), min(stop - first, numel)
    return (low, high) if low < high else (0, 0)


def _gather_ranges(fragments: Sequence[Fragment]) -> list[tuple[tuple[int, int], ...]]:
    """For each fragment's parameter, the range that every rank holds, in rank order."""
    mine = [(fragment.start, fragment.stop) for fragment in fragments]
    everyone: list[list[tuple[int, int]]] = [mine] * rank_and_world_size()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return list(zip(*everyone, strict=True))


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
