"""How matrices travel: from the shards to their owners, through the rule, and back.

`ShapeGroup` holds all matrices of one shape; `Staging` brings the pieces of an offloaded shard to the GPU.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from optim.kernels import gpu, native
from optim.kernels.passes import SegmentTable
from optim.rules import Rule, State
from optim.step.fragments import Piece, rank_and_world_size
from optim.step.health import Health
from optim.step.ownership import OwnershipPlan, Segment

STRETCH_BYTES = 32 << 20  # of one copy of an offloaded shard, at the least: 1 to 2 ms on PCIe 4.0


class FlatPart(NamedTuple):
    """The pieces of a group that lie in one flat tensor.

    Attributes:
        table: where they lie, for the compiled passes; None if the passes go chunk by chunk.
        numbers: of their matrices in the group's plan, as an index.
    """

    flat: Tensor
    pieces: list[Piece]
    table: SegmentTable | None
    numbers: Tensor


class ShapeGroup:
    """All matrices of one shape: the buffers through which they travel, and their transformation.

    `local` holds this rank's pieces, ordered by owner; `_arrived` the pieces that this rank owns, ordered by
    source; `whole` the owned matrices. Each serves both ways. `passes` is the module with the two passes, or
    None; `staging` is there where the flats lie on another device than `local`.
    """

    def __init__(self, rule: Rule, plan: OwnershipPlan, pieces: list[Piece], *, device: torch.device) -> None:
        rank, _ = rank_and_world_size()
        ranks = range(plan.world_size)
        self.rule, self.plan, self.matrices = rule, plan, pieces
        self.owned = plan.owned_by(rank)
        self.shape = (plan.matrices[0].rows, plan.matrices[0].cols)
        self.scale = rule.scale(*self.shape)
        able = (each for each in (gpu, native) if each.unsupported(device, rule.dtype) is None)
        self.passes: Any = next(able, None)
        self._works: list[dist.Work] = []  # what is on its way

        held = [plan.from_owner(owner, rank) for owner in ranks]
        self._held_sizes = _sizes(held)
        self._in = [plan.to_owner(source, rank) for source in ranks]
        self._back = [plan.from_owner(rank, target) for target in ranks]
        crossings = [(a, b) for a in ranks for b in ranks if a != b]
        self._travels_in = any(plan.to_owner(a, b) for a, b in crossings)
        self._travels_back = any(plan.from_owner(a, b) for a, b in crossings)

        self._allocate(rank, device)
        elsewhere = {_lies_elsewhere(piece.fragment.flat, device) for piece in pieces}
        assert len(elsewhere) == 1, "some flat tensors are offloaded, and some are not"
        self.staging = Staging(self.local, self.squares) if True in elsewhere else None
        self.parts = self._place(_joined(held))
        self.release()

    @property
    def travels(self) -> bool:
        """Whether pieces cross between ranks, or between the CPU and the GPU."""
        return self._travels_in or self._travels_back or self.staging is not None

    def acquire(self) -> None:
        """Give the buffers their memory, before a step. On a CPU they keep it."""
        for storage, num_bytes in self._storages:
            storage.resize_(num_bytes)

    def release(self) -> None:
        """Leave the buffers' memory to the model until the next step. Their views stay valid."""
        for storage, _ in self._storages:
            storage.resize_(0)

    def _allocate(self, rank: int, device: torch.device) -> None:
        num_owned, numel, dtype = len(self.owned), self.shape[0] * self.shape[1], self.rule.dtype
        self.local = torch.empty(sum(self._held_sizes), dtype=dtype, device=device)
        self.squares = torch.zeros(len(self.plan.matrices), dtype=torch.float64, device=device)
        num_lines = self.rule.num_lines(*self.shape)
        self.lines: State = {
            name: torch.zeros(num_owned, num_lines, device=device) for name in self.rule.line_state_names
        }
        self._owned_index = torch.tensor(self.owned, dtype=torch.int64, device=device)
        arriving = sum(_sizes(self._in)) if self._travels_in else 0
        leaving = sum(_sizes(self._back)) if self._travels_back else 0
        self._arrived = torch.empty(max(arriving, leaving), dtype=dtype, device=device)
        if self._travels_in:
            self.whole = torch.empty(num_owned, numel, dtype=dtype, device=device)
        else:  # this rank's own pieces are whole matrices, in order
            own = slice(sum(self._held_sizes[:rank]), sum(self._held_sizes[: rank + 1]))
            self.whole = self.local[own].view(num_owned, numel)
        buffers = (self.local, self._arrived, self.whole) if device.type == "cuda" else ()
        storages = {each._cdata: each for each in (buffer.untyped_storage() for buffer in buffers)}
        self._storages = [(storage, storage.nbytes()) for storage in storages.values()]

    def _place(self, segments: list[Segment]) -> list[FlatPart]:
        """Give each piece that this rank holds its place in the packed buffer, in the plan's order."""
        packed, squares = self.local, self.squares
        if self.staging is not None:
            packed, squares = self.staging.packed, self.staging.squares
        by_flat: dict[int, list[Piece]] = {}
        position = 0
        for segment in segments:
            piece = self.matrices[segment.matrix]
            piece.number, piece.position = segment.matrix, position
            piece.buffer = packed[position : position + segment.numel]
            piece.square = squares[segment.matrix]
            position += segment.numel
            by_flat.setdefault(id(piece.fragment.flat), []).append(piece)
        if self.staging is not None:
            self.staging.divide([self.matrices[segment.matrix] for segment in segments])
        return [self._part(pieces) for pieces in by_flat.values()]

    def _part(self, pieces: list[Piece]) -> FlatPart:
        flat, table = pieces[0].fragment.flat, None
        if self.rule.not_compiled is None and self.staging is None and self.passes is not None:
            table = SegmentTable.build(
                [piece.offset for piece in pieces],
                [piece.position for piece in pieces],
                [piece.numel for piece in pieces],
                device=flat.device,
            )
        numbers = torch.tensor([piece.number for piece in pieces], device=self.local.device)
        return FlatPart(flat, pieces, table, numbers)

    def norms(self) -> Tensor:
        """Of whole matrices, fp64, from the squares that the pieces of all ranks have; collective.

        The squares begin anew.
        """
        if self.staging is not None:
            self.squares.copy_(self.staging.squares)
        if self._travels_in:
            dist.all_reduce(self.squares)
        norms = self.squares.sqrt()
        for squares in (self.squares, self.staging.squares if self.staging else self.squares):
            squares.zero_()
        return norms

    def send(self) -> None:
        """Start the pieces on their way to the owners, with the squares of their norms."""
        if self._travels_in:
            sizes = _sizes(self._in)
            arrived = self._arrived[: sum(sizes)]
            self._works = [
                dist.all_reduce(self.squares, async_op=True),
                dist.all_to_all_single(arrived, self.local, sizes, self._held_sizes, async_op=True),
            ]

    def receive(self) -> None:
        """Wait for the pieces of the owned matrices and put these together."""
        self.wait()
        if self._travels_in:
            whole, arrived = self._whole_and_packed(self._in)
            if whole:
                torch._foreach_copy_(whole, arrived)

    def transform(self, health: Health | None) -> None:
        """The rule on the owned matrices; `whole` then holds their updates."""
        if self.owned:
            norms = self.squares.index_select(0, self._owned_index).sqrt().float()
            whole = self.whole.view(-1, *self.shape)
            update = self.rule.transform(whole, norms=norms, lines=self.lines)
            if health is not None:
                names = [self.plan.matrices[index].name for index in self.owned]
                health.inspect(update, self.scale, orthogonal=self.rule.orthogonal, names=names)
            if update is not whole:  # else the rule has written it in its place
                whole.copy_(update)
        self.squares.zero_()

    def send_back(self) -> None:
        """Start the updates on their way to where the weights lie."""
        if self._travels_back:
            whole, leaving = self._whole_and_packed(self._back)
            if whole:
                torch._foreach_copy_(leaving, whole)
            sizes = _sizes(self._back)
            outgoing = self._arrived[: sum(sizes)]
            self._works = [
                dist.all_to_all_single(self.local, outgoing, self._held_sizes, sizes, async_op=True)
            ]

    def wait(self) -> None:
        """Until what is on its way has arrived."""
        for work in self._works:
            work.wait()
        self._works = []

    def _whole_and_packed(self, by_rank: list[list[Segment]]) -> tuple[list[Tensor], list[Tensor]]:
        """Each segment as a part of its owned matrix, and in the buffer that travels."""
        slots = {index: slot for slot, index in enumerate(self.owned)}
        segments = _joined(by_rank)
        packed = self._arrived[: sum(_sizes(by_rank))].split([s.numel for s in segments])
        return [self.whole[slots[s.matrix], s.start : s.stop] for s in segments], list(packed)


class Staging:
    """Pinned memory through which the pieces of an offloaded shard travel to the GPU and back.

    They go in stretches, copied without waiting: while the CPU works on one, its neighbour travels.

    Args:
        local, squares: of the group, on the GPU; `packed` and `squares` here mirror them on the CPU.
    """

    def __init__(self, local: Tensor, squares: Tensor) -> None:
        pin = local.device.type == "cuda"
        self.packed = torch.empty_like(local, device="cpu", pin_memory=pin)
        self.squares = torch.zeros_like(squares, device="cpu", pin_memory=pin)
        self._local, self._local_squares = local, squares
        self._stretches: list[list[Piece]] = []

    def divide(self, pieces: list[Piece]) -> None:
        """Divide all pieces, in the order of their positions, into stretches."""
        least = STRETCH_BYTES // self.packed.itemsize
        for piece in pieces:
            last = self._stretches[-1] if self._stretches else None
            if last is None or piece.position - last[0].position >= least:
                self._stretches.append([piece])
            else:
                last.append(piece)

    def uploading(self) -> Iterator[list[Piece]]:
        """Yield the pieces of each stretch, to be written, and then start it on its way to the GPU."""
        self.squares.zero_()
        for pieces in self._stretches:
            yield pieces
            place = _extent(pieces)
            self._local[place].copy_(self.packed[place], non_blocking=True)
        self._local_squares.copy_(self.squares, non_blocking=True)

    def downloading(self) -> Iterator[list[Piece]]:
        """Start all stretches on their way back, and yield the pieces of each once it has arrived."""
        arrivals = []
        for pieces in self._stretches:
            place = _extent(pieces)
            self.packed[place].copy_(self._local[place], non_blocking=True)
            arrivals.append(torch.cuda.Event() if self._local.device.type == "cuda" else None)
            if arrivals[-1] is not None:
                arrivals[-1].record()
        for pieces, arrival in zip(self._stretches, arrivals, strict=True):
            if arrival is not None:
                arrival.synchronize()
            yield pieces


def _extent(pieces: list[Piece]) -> slice:
    return slice(pieces[0].position, pieces[-1].position + pieces[-1].numel)


def _lies_elsewhere(flat: Tensor, device: torch.device) -> bool:
    """Whether a flat tensor is offloaded: it lies on another device than the matrices are computed on."""
    return flat.device.type != device.type


def _joined(by_rank: Sequence[list[Segment]]) -> list[Segment]:
    return [segment for segments in by_rank for segment in segments]


def _sizes(by_rank: Sequence[list[Segment]]) -> list[int]:
    return [sum(segment.numel for segment in segments) for segments in by_rank]
