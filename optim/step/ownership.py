"""Which rank owns which matrix, and which pieces must travel. Pure: no torch, no process groups.

Under ZeRO every rank holds a slice of the flattened weights, and a slice border may cut a matrix anywhere.
A matrix rule needs the whole matrix, once, on one rank: its owner. Before the rule, each rank sends its
pieces to the owners; after it, each owner sends the pieces of the update back to where the weights live.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from optim.cost import NUM_ITERATIONS, orthogonalize_flops

SLACK = 0.02  # of the mean load, that a rank may carry on top of it to save traffic


@dataclass(frozen=True)
class Matrix:
    """One matrix and where its elements live.

    Attributes:
        holdings: per rank, the half-open range [start, stop) of the flattened matrix that the rank holds.
            Ranges either tile the matrix exactly (ZeRO 1-3) or are all whole (ZeRO 0: replicated).
        polar_steps: iterations of each orthogonalisation that its rule takes.
    """

    name: str
    rows: int
    cols: int
    holdings: tuple[tuple[int, int], ...]
    polar_steps: tuple[int, ...] = (NUM_ITERATIONS,)

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @cached_property
    def flops(self) -> int:
        """What its owner computes (optim/cost.py)."""
        return self.flops_if(symmetric=False)

    def flops_if(self, *, symmetric: bool) -> int:
        """The same; symmetric: symmetric products cost half."""
        return sum(
            orthogonalize_flops(self.rows, self.cols, num_steps=num_steps, symmetric=symmetric)
            for num_steps in self.polar_steps
        )

    def held_by(self, rank: int) -> int:
        """Elements that `rank` holds."""
        start, stop = self.holdings[rank]
        return stop - start

    @property
    def replicated(self) -> bool:
        return all(holding == (0, self.numel) for holding in self.holdings)


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of the flattened matrix number `matrix` of a plan."""

    matrix: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class OwnershipPlan:
    """Owners of a list of matrices, and the traffic that follows from them."""

    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    world_size: int

    def to_owner(self, source: int, owner: int) -> list[Segment]:
        """What rank `source` sends to rank `owner` before the rule, in the order of the buffer."""
        return [
            Segment(index, *matrix.holdings[source])
            for index, matrix in enumerate(self.matrices)
            if self.owners[index] == owner and (source == owner or not matrix.replicated)
            if matrix.holdings[source][0] < matrix.holdings[source][1]
        ]

    def from_owner(self, owner: int, target: int) -> list[Segment]:
        """What rank `owner` sends to rank `target` after the rule, in the order of the buffer."""
        return [
            Segment(index, *matrix.holdings[target])
            for index, matrix in enumerate(self.matrices)
            if self.owners[index] == owner
            if matrix.holdings[target][0] < matrix.holdings[target][1]
        ]

    def by_shape(self) -> list[tuple[list[int], "OwnershipPlan"]]:
        """One plan for each shape, and the indices of its matrices here; the same order on every rank."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, matrix in enumerate(self.matrices):
            shapes.setdefault((matrix.rows, matrix.cols), []).append(index)
        return [
            (
                indices,
                OwnershipPlan(
                    tuple(self.matrices[i] for i in indices),
                    tuple(self.owners[i] for i in indices),
                    self.world_size,
                ),
            )
            for indices in shapes.values()
        ]

    def owned_by(self, rank: int) -> list[int]:
        """Indices of the matrices that `rank` owns."""
        return [index for index, owner in enumerate(self.owners) if owner == rank]

    def loads(self, *, symmetric: bool = False) -> list[int]:
        """FLOPs of the matrices that each rank owns (`optim.cost`)."""
        loads = [0] * self.world_size
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            loads[owner] += matrix.flops_if(symmetric=symmetric)
        return loads

    def elements_sent_by(self, rank: int) -> int:
        """Elements that `rank` sends to others in one step, to owners and back."""
        others = (other for other in range(self.world_size) if other != rank)
        both = (self.to_owner(rank, other) + self.from_owner(rank, other) for other in others)
        return sum(segment.numel for segments in both for segment in segments)

    @property
    def elements_sent(self) -> int:
        """Elements that cross between ranks in one step, both ways, over all ranks."""
        return sum(map(self.elements_sent_by, range(self.world_size)))

    @property
    def minimum_elements_sent(self) -> int:
        """A lower bound for any plan: all but the largest holding of each matrix, there and back.

        It is reached if every matrix is owned where most of it lies. A replicated matrix is not sent to its
        owner; its owner sends the update to all others.
        """
        return sum(
            matrix.numel * (self.world_size - 1)
            if matrix.replicated
            else 2 * (matrix.numel - max(map(matrix.held_by, range(self.world_size))))
            for matrix in self.matrices
        )

    @property
    def imbalance(self) -> float:
        """Largest rank's FLOPs over the mean, minus 1; 0 is perfect."""
        loads = self.loads()
        return max(loads) * self.world_size / sum(loads) - 1 if sum(loads) else 0.0


def holdings(first: int, numel: int, *, part: int, world_size: int) -> tuple[tuple[int, int], ...]:
    """What each rank holds of `numel` elements from `first` on, if rank r holds [r·part, (r + 1)·part)."""
    borders = [min(max(part * rank - first, 0), numel) for rank in range(world_size + 1)]
    return tuple((a, b) if a < b else (0, 0) for a, b in pairwise(borders))


def make_plan(matrices: Sequence[Matrix], *, world_size: int) -> OwnershipPlan:
    """Own each matrix once: balanced by FLOPs, and among balanced plans with little traffic.

    Largest first to the least loaded rank gives the balance. Then matrices move to ranks that hold more of
    them, alone or two ranks exchanging theirs, as long as no rank's load exceeds that plan's largest, or the
    mean by SLACK. The same input gives the same plan on every rank.

    Raises:
        ValueError: the holdings of a matrix neither tile it nor replicate it, naming the matrix.
    """
    for matrix in matrices:
        _check_cover(matrix, world_size)
    owners, loads = _balance(matrices, world_size)
    limit = max(max(loads), int(sum(loads) / world_size * (1 + SLACK))) if matrices else 0
    _localize(matrices, owners, loads, limit=limit)
    return OwnershipPlan(tuple(matrices), tuple(owners), world_size)


def _balance(matrices: Sequence[Matrix], world_size: int) -> tuple[list[int], list[int]]:
    """Owners and loads by longest-processing-time scheduling; among equals the rank that holds most wins."""
    owners, loads = [0] * len(matrices), [0] * world_size
    for index in sorted(range(len(matrices)), key=lambda i: (-matrices[i].flops, i)):
        matrix = matrices[index]
        costs = [(loads[rank], -matrix.held_by(rank), rank) for rank in range(world_size)]
        *_, owners[index] = min(costs)
        loads[owners[index]] += matrix.flops
    return owners, loads


def _localize(matrices: Sequence[Matrix], owners: list[int], loads: list[int], *, limit: int) -> None:
    """Change `owners` and `loads` in place until no move or exchange of two keeps more elements at home."""
    ranks = range(len(loads))
    improved = True
    while improved:
        improved = False
        for index, matrix in enumerate(matrices):
            here = owners[index]
            wishes = [(-matrix.held_by(rank), rank) for rank in ranks]
            for _, rank in sorted(wish for wish in wishes if wish < (-matrix.held_by(here), -1)):
                if loads[rank] + matrix.flops <= limit:
                    _move(matrices, owners, loads, index, rank)
                    improved = True
                    break
                other = _best_exchange(matrices, owners, loads, index, rank, limit=limit)
                if other is not None:
                    _move(matrices, owners, loads, index, rank)
                    _move(matrices, owners, loads, other, here)
                    improved = True
                    break


def _best_exchange(
    matrices: Sequence[Matrix], owners: list[int], loads: list[int], index: int, rank: int, *, limit: int
) -> int | None:
    """The matrix of `rank` to give for matrix `index`: it must save traffic and overload nobody."""
    matrix, here = matrices[index], owners[index]
    gain = matrix.held_by(rank) - matrix.held_by(here)
    best, best_gain = None, 0
    for other, candidate in enumerate(matrices):
        if owners[other] != rank:
            continue
        change = matrix.flops - candidate.flops
        if loads[rank] + change > limit or loads[here] - change > limit:
            continue
        total = gain + candidate.held_by(here) - candidate.held_by(rank)
        if total > best_gain:
            best, best_gain = other, total
    return best


def _move(matrices: Sequence[Matrix], owners: list[int], loads: list[int], index: int, rank: int) -> None:
    loads[owners[index]] -= matrices[index].flops
    loads[rank] += matrices[index].flops
    owners[index] = rank


def _check_cover(matrix: Matrix, world_size: int) -> None:
    if len(matrix.holdings) != world_size:
        raise ValueError(f"{matrix.name}: {len(matrix.holdings)} holdings for {world_size} ranks")
    if matrix.replicated:
        return
    position = 0
    for start, stop in sorted(holding for holding in matrix.holdings if holding[0] < holding[1]):
        if start != position:
            raise ValueError(f"{matrix.name}: elements {position} to {start} are held by no rank or by two")
        position = stop
    if position != matrix.numel:
        raise ValueError(f"{matrix.name}: elements {position} to {matrix.numel} are held by no rank")
