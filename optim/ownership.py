"""Which rank owns which matrix, and which pieces must travel. Pure: no torch, no process groups.

Under ZeRO every rank holds a slice of the flattened weights, and a slice border may cut a matrix anywhere.
A matrix rule needs the whole matrix, once, on one rank: its owner. Before the rule, each rank sends its
pieces to the owners; after it, each owner sends the pieces of the update back to where the weights live.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """One matrix and where its elements live.

    Attributes:
        holdings: per rank, the half-open range [start, stop) of the flattened matrix that the rank holds.
            Ranges either tile the matrix exactly (ZeRO 1-3) or are all whole (ZeRO 0: replicated).
    """

    name: str
    rows: int
    cols: int
    holdings: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def flops(self) -> int:
        """Of one quintic Newton-Schulz iteration: XXᵀ, A² and BX at 2 FLOPs per multiply-add."""
        short, long = sorted((self.rows, self.cols))
        return 4 * short * short * long + 2 * short**3

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
class Plan:
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

    def owned_by(self, rank: int) -> list[int]:
        """Indices of the matrices that `rank` owns."""
        return [index for index, owner in enumerate(self.owners) if owner == rank]

    @property
    def elements_sent(self) -> int:
        """Elements that cross between ranks in one step, both ways, over all ranks."""
        ranks = range(self.world_size)
        return sum(
            segment.numel
            for a in ranks
            for b in ranks
            if a != b
            for segment in self.to_owner(a, b) + self.from_owner(a, b)
        )

    @property
    def imbalance(self) -> float:
        """Largest rank's FLOPs over the mean, minus 1; 0 is perfect."""
        loads = [sum(self.matrices[i].flops for i in self.owned_by(rank)) for rank in range(self.world_size)]
        return max(loads) * self.world_size / sum(loads) - 1 if sum(loads) else 0.0


def make_plan(matrices: Sequence[Matrix], *, world_size: int) -> Plan:
    """Own each matrix once, balanced by FLOPs: largest first, to the least loaded rank.

    Among equally loaded ranks the one that holds most of the matrix wins, which saves traffic. The same
    input gives the same plan on every rank.

    Raises:
        ValueError: the holdings of a matrix neither tile it nor replicate it, naming the matrix.
    """
    for matrix in matrices:
        _check_cover(matrix, world_size)
    owners = [0] * len(matrices)
    loads = [0] * world_size
    for index in sorted(range(len(matrices)), key=lambda i: (-matrices[i].flops, i)):
        matrix = matrices[index]

        def cost(rank: int, matrix: Matrix = matrix) -> tuple[int, int, int]:
            start, stop = matrix.holdings[rank]
            return loads[rank], start - stop, rank

        owners[index] = min(range(world_size), key=cost)
        loads[owners[index]] += matrix.flops
    return Plan(tuple(matrices), tuple(owners), world_size)


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
