"""The fused step: a rule over shards whose borders may cut a matrix anywhere, in one pass each way.

    start      one pass over the shard: momentum, Nesterov, norm, cast, written straight into the buffer that
               is sent; then one packed all-to-all to the matrices' owners, per shape
    transform  the owner applies the rule to its matrices, batched by shape, while the next shape travels;
               then one packed all-to-all back
    finish     one pass over the shard: decay and update of the fp32 weights, and the write of what the model
               computes with, in its precision: the weights, or the point that the rule looks ahead to

On a GPU with Triton the two passes are kernels (optim/kernels/gpu.py), on a CPU that can they are compiled
(optim/kernels/native.cpp); elsewhere they go chunk by chunk, which stays in a CPU's cache. Of a shard that is
offloaded the CPU runs the passes, and `_Staging` carries pieces to the GPU and back. Nothing travels where
every matrix already lies whole on its owner. Nothing here knows DeepSpeed: fragments say where the weights
lie, and gradients are found in the `.grad` of the flat tensors.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optim.kernels import gpu as kernels
from optim.kernels import native
from optim.kernels.gpu import SegmentTable
from optim.rules import DecayingRule, MomentumRule, Rule, State, new_state
from optim.step.ownership import Matrix, Plan, Segment, make_plan

CHUNK_ELEMENTS = 1 << 16  # of a pass on the CPU: weights, gradient and state of one chunk fit its cache
STRETCH_BYTES = 32 << 20  # of one copy of an offloaded shard, at the least: 1 to 2 ms on PCIe 4.0


@dataclass(frozen=True)
class Fragment:
    """This rank's piece of one parameter: elements [start, stop) of it, at `offset` of a flat fp32 tensor.

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
        """The piece's elements in a tensor laid out as `flat`: a 1-D view."""
        return like_flat.view(-1)[self.offset : self.offset + self.stop - self.start]


@dataclass
class Health:
    """What one step measured on this rank.

    Attributes:
        device: whose time is taken.
        seconds: phase -> seconds. "start" and "finish" are the passes over the shard, "exchange" is waiting
            for what travels, "orthogonalize" is the rule on whole matrices. On a GPU filled by `read`.
        transforms: matrices that went through the rule here.
        errors: of each owned matrix, ‖OOᵀ - I‖_F / √n of its update O before scaling; only under a rule that
            means to orthogonalise.
        mean_squares: of each owned matrix, the mean square of its update after scaling.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    transforms: int = 0
    errors: list[float] = field(default_factory=list)
    mean_squares: list[float] = field(default_factory=list)
    _marks: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time a block: by the clock, or on a GPU by events on its stream, which nobody waits for yet."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((phase, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._add(phase, time.perf_counter() - started)

    def read(self) -> dict[str, float]:
        """`seconds`, after waiting for what is still on the GPU's stream."""
        for phase, begin, end in self._marks:
            end.synchronize()
            self._add(phase, begin.elapsed_time(end) / 1e3)
        self._marks = []
        return self.seconds

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class FusedStep:
    """One rule's state and step over this rank's fragments. Collective: every rank builds and steps its own.

    Args:
        fragments: one for each parameter, in the same order on every rank, empty ones included. They tile
            each parameter over the ranks, or every rank holds all of it.
        device: where whole matrices are computed; all flats may lie on the CPU instead (offload).

    Raises:
        ValueError: the fragments of a parameter neither tile nor replicate it.
    """

    def __init__(self, rule: Rule, fragments: Sequence[Fragment], *, device: torch.device) -> None:
        self.rule = rule
        self._device = device
        self.fragments = list(fragments)
        self.flats = list({id(fragment.flat): fragment.flat for fragment in fragments}.values())
        self.states: list[State] = [new_state(rule, flat.detach()) for flat in self.flats]
        self.steps = 0
        self.num_transforms = 0
        self.health = Health(device)
        self.plan: Plan | None = None
        self._groups: list[_Group] = []
        self._runs = [] if rule.whole else _runs(rule, self.fragments)
        if rule.whole:
            pieces, matrices = _cut(self.fragments)
            self.plan = make_plan(matrices, world_size=_world_size())
            self._groups = [
                _Group(rule, plan, [pieces[i] for i in indices], device=device)
                for indices, plan in self.plan.by_shape()
            ]

    @property
    def bytes_sent(self) -> int:
        """Bytes of matrices that cross between ranks in one step, both ways, over all ranks."""
        return sum(group.plan.elements_sent * self.rule.dtype.itemsize for group in self._groups)

    def state_of(self, fragment: Fragment) -> State:
        """Views of the fragment's elements of each state tensor, by name."""
        return {name: fragment.view(tensor) for name, tensor in self._state(fragment.flat).items()}

    def row_states(self) -> Iterator[tuple[str, int, State]]:
        """(parameter, first row, views of [r] state tensors by name) of every matrix that this rank owns."""
        if self.rule.row_state_names:
            for group in self._groups:
                for slot, index in enumerate(group.owned):
                    piece = group.matrices[index]
                    rows = {name: tensor[slot] for name, tensor in group.rows.items()}
                    yield piece.fragment.name, piece.first_row, rows

    def without(self, means: str) -> str | None:
        """Why the matrices do without optim/kernels/gpu.py ("kernels") or native.cpp ("native"); or None."""
        module = {"kernels": kernels, "native": native}[means]
        return module.unsupported(self._device, self.rule.dtype)

    @torch.no_grad()
    def step(self, *, lr: float, inspect: bool = False) -> None:
        """Update the weights and the state from the `.grad` of the flats; None counts as zero.

        inspect: also measure the updates, for `health`: it costs one more product per matrix.
        """
        self.steps += 1
        self.health = health = Health(self._device)
        if not self.rule.whole:
            with health.timed("finish"):
                for run in self._runs:
                    self._elementwise(run, lr=lr)
            return
        for group in self._groups:
            with health.timed("start"):
                self._start(group)
                group.send()
        for group in self._groups:
            with health.timed("exchange"):
                group.receive()
            with health.timed("orthogonalize"):
                group.transform(health if inspect else None)
            with health.timed("exchange"):
                group.send_back()
            health.transforms += len(group.owned)
        self.num_transforms += health.transforms
        for group in self._groups:
            with health.timed("exchange"):
                group.receive_back()
            with health.timed("finish"):
                self._finish(group, lr=lr)

    def _state(self, flat: Tensor) -> State:
        return self.states[next(i for i, own in enumerate(self.flats) if own is flat)]

    def _start(self, group: "_Group") -> None:
        """The raw updates of this rank's pieces, packed, and the squares of their norms."""
        if group.staging is not None:
            for pieces in group.staging.uploading():
                for piece in pieces:
                    self._direction(piece)
            return
        for flat, pieces in group.by_flat:
            if flat.grad is not None and (table := group.table(flat)) is not None:
                assert isinstance(self.rule, MomentumRule)
                squares = torch.empty(len(pieces), dtype=torch.float64, device=flat.device)
                group.passes.momentum_pass(
                    flat.grad.view(-1), self._state(flat)["momentum"].view(-1), group.local, squares, table,
                    beta=self.rule.momentum, nesterov=self.rule.nesterov,
                )  # fmt: skip
                group.squares.index_add_(0, group.numbers(flat), squares)
            else:
                for piece in pieces:
                    self._direction(piece)

    def _direction(self, piece: "_Piece") -> None:
        """Momentum, Nesterov, norm and cast of one piece, chunk by chunk: one pass over memory."""
        gradient, state = piece.fragment.flat.grad, self._state(piece.fragment.flat)
        for chunk in _chunks(piece.numel, piece.fragment.flat.device):
            place = slice(piece.offset + chunk.start, piece.offset + chunk.stop)
            now = {name: tensor.view(-1)[place] for name, tensor in state.items()}
            if gradient is None:
                part = torch.zeros(chunk.stop - chunk.start, device=piece.fragment.flat.device)
            else:
                part = gradient.view(-1)[place]
            update = self.rule.direction(part, now, step=self.steps)
            piece.buffer[chunk].copy_(update)
            wide = update.double()
            piece.square.add_(torch.dot(wide, wide))

    def _finish(self, group: "_Group", *, lr: float) -> None:
        """Decay, update, and the model's own copy, of this rank's pieces."""
        if group.staging is not None:
            for pieces in group.staging.downloading():
                for piece in pieces:
                    self._update(piece, lr=lr, scale=group.scale)
            return
        for flat, pieces in group.by_flat:
            if (table := group.table(flat)) is not None:
                assert isinstance(self.rule, DecayingRule)
                end = self.rule.finish(lr=lr, scale=group.scale, step=self.steps)
                model = pieces[0].fragment.model
                group.passes.apply_pass(
                    flat.data.view(-1), group.local, table, decay=end.decay, factor=end.factor,
                    ahead=end.ahead, model=None if model is None else model.view(-1),
                )  # fmt: skip
            else:
                for piece in pieces:
                    self._update(piece, lr=lr, scale=group.scale)

    def _update(self, piece: "_Piece", *, lr: float, scale: float) -> None:
        """The end of the step of one piece, chunk by chunk."""
        for chunk in _chunks(piece.numel, piece.fragment.flat.device):
            place = slice(piece.offset + chunk.start, piece.offset + chunk.stop)
            self._apply(piece.fragment, place, piece.buffer[chunk], lr=lr, scale=scale)

    def _elementwise(self, run: "_Run", *, lr: float) -> None:
        flat, state = run.fragment.flat, self._state(run.fragment.flat)
        gradient = torch.zeros_like(flat).view(-1) if flat.grad is None else flat.grad.view(-1)
        for chunk in _chunks(run.stop - run.start, flat.device):
            place = slice(run.start + chunk.start, run.start + chunk.stop)
            now = {name: tensor.view(-1)[place] for name, tensor in state.items()}
            update = self.rule.direction(gradient[place], now, step=self.steps)
            self._apply(run.fragment, place, update, lr=lr, scale=run.scale)

    def _apply(self, fragment: Fragment, place: slice, update: Tensor, *, lr: float, scale: float) -> None:
        """One chunk of the weights and of the model's copy, while both are in the cache."""
        weight = fragment.flat.data.view(-1)[place]
        now = {name: tensor.view(-1)[place] for name, tensor in self._state(fragment.flat).items()}
        point = self.rule.apply(weight, update, lr=lr, scale=scale, step=self.steps, state=now)
        if fragment.model is not None:
            fragment.model.view(-1)[place].copy_(weight if point is None else point)


@dataclass
class _Run:
    """Elements [start, stop) of a flat tensor whose updates have one scale, under an elementwise rule."""

    fragment: Fragment
    start: int
    stop: int
    scale: float


def _runs(rule: Rule, fragments: Sequence[Fragment]) -> list[_Run]:
    """The fragments, end to end where neighbours have the same scale."""
    found: list[_Run] = []
    for fragment in fragments:
        start, stop = fragment.offset, fragment.offset + fragment.stop - fragment.start
        scale = rule.scale(sum(fragment.blocks) or 1, fragment.cols)
        last = found[-1] if found else None
        if last and last.fragment.flat is fragment.flat and (last.stop, last.scale) == (start, scale):
            last.stop = stop
        elif start < stop:
            found.append(_Run(fragment, start, stop, scale))
    return found


@dataclass
class _Piece:
    """This rank's part of one matrix: its place in the flat tensor and in the packed buffer.

    `buffer` and `square` are where the passes read and write it: on the device of the flat tensor.
    """

    fragment: Fragment
    first_row: int  # of the matrix, counted in the parameter
    start: int  # first element, counted in the matrix
    numel: int
    offset: int  # of the first element, in the flat tensor
    number: int = field(init=False)  # of the matrix, in its group's plan
    position: int = field(init=False)  # of the first element, in the packed buffer
    buffer: Tensor = field(init=False)
    square: Tensor = field(init=False)


class _Staging:
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
        self._stretches: list[list[_Piece]] = []

    def divide(self, pieces: list[_Piece]) -> None:
        """Divide all pieces, in the order of their positions, into stretches."""
        least = STRETCH_BYTES // self.packed.itemsize
        for piece in pieces:
            last = self._stretches[-1] if self._stretches else None
            if last is None or piece.position - last[0].position >= least:
                self._stretches.append([piece])
            else:
                last.append(piece)

    def uploading(self) -> Iterator[list[_Piece]]:
        """Yield the pieces of each stretch, to be written, and then start it on its way to the GPU."""
        self.squares.zero_()
        for pieces in self._stretches:
            yield pieces
            place = self._place(pieces)
            self._local[place].copy_(self.packed[place], non_blocking=True)
        self._local_squares.copy_(self.squares, non_blocking=True)

    def downloading(self) -> Iterator[list[_Piece]]:
        """Start all stretches on their way back, and yield the pieces of each once it has arrived."""
        arrivals = []
        for pieces in self._stretches:
            place = self._place(pieces)
            self.packed[place].copy_(self._local[place], non_blocking=True)
            arrivals.append(torch.cuda.Event() if self._local.device.type == "cuda" else None)
            if arrivals[-1] is not None:
                arrivals[-1].record()
        for pieces, arrival in zip(self._stretches, arrivals, strict=True):
            if arrival is not None:
                arrival.synchronize()
            yield pieces

    def _place(self, pieces: list[_Piece]) -> slice:
        return slice(pieces[0].position, pieces[-1].position + pieces[-1].numel)


class _Group:
    """All matrices of one shape: the buffers through which they travel, and their transformation.

    `local` holds this rank's pieces, ordered by owner; `arrived` the pieces that this rank owns, ordered by
    source; `whole` the owned matrices. Each serves both ways. `passes` is the module with the two passes, or
    None; `staging` is there where the flats lie on another device than `local`.
    """

    def __init__(self, rule: Rule, plan: Plan, pieces: list[_Piece], *, device: torch.device) -> None:
        rank, ranks = _rank(), range(plan.world_size)
        self.rule, self.plan, self.owned = rule, plan, plan.owned_by(rank)
        self.matrices = pieces
        self.shape = (plan.matrices[0].rows, plan.matrices[0].cols)
        self.scale = rule.scale(*self.shape)
        self._work: dist.Work | None = None
        self._norm_work: dist.Work | None = None

        held = [plan.from_owner(owner, rank) for owner in ranks]
        self._held_sizes = _sizes(held)
        self._in = [plan.to_owner(source, rank) for source in ranks]
        self._back = [plan.from_owner(rank, target) for target in ranks]
        self._travels_in = any(plan.to_owner(a, b) for a in ranks for b in ranks if a != b)
        self._travels_back = any(plan.from_owner(a, b) for a in ranks for b in ranks if a != b)

        able = (each for each in (kernels, native) if each.unsupported(device, rule.dtype) is None)
        self.passes: Any = next(able, None)
        numel = self.shape[0] * self.shape[1]
        self.local = torch.empty(sum(self._held_sizes), dtype=rule.dtype, device=device)
        self.squares = torch.zeros(len(plan.matrices), dtype=torch.float64, device=device)
        self.whole = torch.empty(len(self.owned), numel, dtype=rule.dtype, device=device)
        self.rows: State = {
            name: torch.zeros(len(self.owned), self.shape[0], device=device) for name in rule.row_state_names
        }
        self._owned_index = torch.tensor(self.owned, dtype=torch.int64, device=device)
        own = slice(sum(self._held_sizes[:rank]), sum(self._held_sizes[: rank + 1]))
        arriving = sum(_sizes(self._in)) if self._travels_in else 0
        leaving = sum(_sizes(self._back)) if self._travels_back else 0
        self._arrived = torch.empty(max(arriving, leaving), dtype=rule.dtype, device=device)
        if not self._travels_in:  # this rank's own pieces are whole matrices, in order
            self.whole = self.local[own].view(len(self.owned), numel)

        elsewhere = {_lies_elsewhere(piece.fragment.flat, device) for piece in pieces}
        assert len(elsewhere) == 1, "some flat tensors are offloaded, and some are not"
        self.staging = _Staging(self.local, self.squares) if True in elsewhere else None
        packed, squares = self.local, self.squares
        if self.staging is not None:
            packed, squares = self.staging.packed, self.staging.squares

        by_flat: dict[int, tuple[Tensor, list[_Piece]]] = {}
        position = 0
        for segment in _flat(held):
            piece = pieces[segment.matrix]
            piece.number, piece.position = segment.matrix, position
            piece.buffer = packed[position : position + segment.numel]
            piece.square = squares[segment.matrix]
            position += segment.numel
            by_flat.setdefault(id(piece.fragment.flat), (piece.fragment.flat, []))[1].append(piece)
        if self.staging is not None:
            self.staging.divide([pieces[segment.matrix] for segment in _flat(held)])
        self.by_flat = list(by_flat.values())
        self._tables = {id(flat): self._table(flat, own) for flat, own in self.by_flat}
        self._numbers = {
            id(flat): torch.tensor([piece.number for piece in own], device=device)
            for flat, own in self.by_flat
        }

    def table(self, flat: Tensor) -> SegmentTable | None:
        """Where the pieces in `flat` lie, for the kernels; None if the passes go chunk by chunk."""
        return self._tables[id(flat)]

    def numbers(self, flat: Tensor) -> Tensor:
        """The numbers in the plan of the matrices with pieces in `flat`, as an index."""
        return self._numbers[id(flat)]

    def _table(self, flat: Tensor, pieces: list["_Piece"]) -> SegmentTable | None:
        if not (isinstance(self.rule, MomentumRule) and self.rule.in_kernels):
            return None
        if self.staging is not None or self.passes is None:
            return None
        return SegmentTable.build(
            [piece.offset for piece in pieces],
            [piece.position for piece in pieces],
            [piece.numel for piece in pieces],
            device=flat.device,
        )

    def send(self) -> None:
        """Start the pieces on their way to the owners, with the squares of their norms."""
        if not self._travels_in:
            return
        self._norm_work = dist.all_reduce(self.squares, async_op=True)
        arrived = self._arrived[: sum(_sizes(self._in))]
        self._work = dist.all_to_all_single(
            arrived, self.local, _sizes(self._in), self._held_sizes, async_op=True
        )

    def receive(self) -> None:
        """Wait for the pieces of the owned matrices and put these together."""
        if not self._travels_in:
            return
        self._wait()
        slots = {index: slot for slot, index in enumerate(self.owned)}
        segments = _flat(self._in)
        if segments:
            torch._foreach_copy_(
                [self.whole[slots[s.matrix], s.start : s.stop] for s in segments],
                list(self._arrived[: sum(_sizes(self._in))].split([s.numel for s in segments])),
            )

    def transform(self, health: Health | None) -> None:
        """The rule on the owned matrices; `whole` then holds their updates."""
        if self.owned:
            norms = self.squares.index_select(0, self._owned_index).sqrt().float()
            update = self.rule.transform(self.whole.view(-1, *self.shape), norms=norms, rows=self.rows)
            if health is not None:
                _inspect(update, self.scale, health, orthogonal=self.rule.orthogonal)
            self.whole.view(-1, *self.shape).copy_(update)
        self.squares.zero_()

    def send_back(self) -> None:
        """Start the updates on their way to where the weights lie."""
        if not self._travels_back:
            return
        slots = {index: slot for slot, index in enumerate(self.owned)}
        segments, sizes = _flat(self._back), _sizes(self._back)
        outgoing = self._arrived[: sum(sizes)]
        if segments:
            torch._foreach_copy_(
                list(outgoing.split([s.numel for s in segments])),
                [self.whole[slots[s.matrix], s.start : s.stop] for s in segments],
            )
        self._work = dist.all_to_all_single(self.local, outgoing, self._held_sizes, sizes, async_op=True)

    def receive_back(self) -> None:
        """Wait for the updates of this rank's pieces."""
        self._wait()

    def _wait(self) -> None:
        for work in (self._norm_work, self._work):
            if work is not None:
                work.wait()
        self._norm_work = self._work = None


def _inspect(update: Tensor, scale: float, health: Health, *, orthogonal: bool) -> None:
    """Add the mean square, and the orthogonality error if asked, of each update [B, r, c] to `health`."""
    squares = torch.linalg.vector_norm(update, dim=(-2, -1), dtype=torch.float32).square()
    health.mean_squares += (squares * scale**2 / update[0].numel()).tolist()
    if orthogonal:
        short = update.float()
        short = short.mT if short.size(-2) > short.size(-1) else short
        gram = short @ short.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        health.errors += (torch.linalg.matrix_norm(gram) / gram.size(-1) ** 0.5).tolist()


def _cut(fragments: list[Fragment]) -> tuple[list[_Piece], list[Matrix]]:
    """This rank's piece of every matrix, and where every matrix lies: the same list on every rank."""
    pieces, matrices = [], []
    for fragment, ranges in zip(fragments, _gather_ranges(fragments), strict=True):
        first = 0
        for index, rows in enumerate(fragment.blocks):
            numel = rows * fragment.cols

            def inside(start: int, stop: int, first: int = first, numel: int = numel) -> tuple[int, int]:
                low, high = max(start - first, 0), min(stop - first, numel)
                return (low, high) if low < high else (0, 0)

            start, stop = inside(fragment.start, fragment.stop)
            offset = fragment.offset + first + start - fragment.start
            pieces.append(_Piece(fragment, first // fragment.cols, start, stop - start, offset))
            name = fragment.name if len(fragment.blocks) == 1 else f"{fragment.name}[{index}]"
            matrices.append(Matrix(name, rows, fragment.cols, tuple(inside(*held) for held in ranges)))
            first += numel
    return pieces, matrices


def _gather_ranges(fragments: list[Fragment]) -> list[tuple[tuple[int, int], ...]]:
    """For each fragment's parameter, the range that every rank holds, in rank order."""
    mine = [(fragment.start, fragment.stop) for fragment in fragments]
    everyone: list[list[tuple[int, int]]] = [mine] * _world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return list(zip(*everyone, strict=True))


def _lies_elsewhere(flat: Tensor, device: torch.device) -> bool:
    """Whether a flat tensor is offloaded: it lies on another device than the matrices are computed on."""
    return flat.device.type != device.type


def _chunks(numel: int, device: torch.device) -> Iterator[slice]:
    """Slices of a pass: small on the CPU, for its cache; the whole on a GPU, which has nothing to gain."""
    size = CHUNK_ELEMENTS if device.type == "cpu" else max(numel, 1)
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def _flat(segments: list[list[Segment]]) -> list[Segment]:
    return [segment for per_rank in segments for segment in per_rank]


def _sizes(segments: list[list[Segment]]) -> list[int]:
    return [sum(segment.numel for segment in per_rank) for per_rank in segments]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
