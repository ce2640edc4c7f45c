"""The fused step: a rule over shards whose borders may cut a matrix anywhere, in one pass each way.

    start      one pass over the shard: momentum, Nesterov, norm, cast, written straight into the buffer that
               is sent; then one packed all-to-all to the matrices' owners, per shape
    transform  the owner applies the rule to its matrices, batched by shape, while the next shape travels;
               then one packed all-to-all back
    finish     one pass over the shard: decay and update of the fp32 weights, and the write of what the model
               computes with, in its precision: the weights, or the point that the rule looks ahead to

The two passes, or AdamW's one, run as Triton kernels on a GPU (optim/kernels/gpu.py) and as C++ on a CPU
that can (optim/kernels/native.cpp). Elsewhere they go chunk by chunk, which stays in a CPU's cache. The CPU
runs the passes over an offloaded shard, and `exchange.Staging` carries its pieces to the GPU and back.
Nothing travels if every matrix already lies whole on its owner. This file does not know DeepSpeed: fragments
say where the weights lie, and gradients are in the `.grad` of the flat tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.directions import Adam, Corrected, Momentum
from optim.kernels import gpu, native
from optim.rules import Rule, State, new_state
from optim.step.exchange import ShapeGroup
from optim.step.fragments import Fragment, Piece, cut, rank_and_world_size
from optim.step.health import Health
from optim.step.ownership import OwnershipPlan, make_plan

CHUNK_ELEMENTS = 1 << 16  # of a pass on the CPU: weights, gradient and state of one chunk fit its cache


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
        self.device = device
        self.fragments = list(fragments)
        self.flats = list({id(fragment.flat): fragment.flat for fragment in fragments}.values())
        self.states: list[State] = [new_state(rule, flat.detach()) for flat in self.flats]
        self.steps = 0
        self.num_transforms = 0
        self.health = Health(device)
        self.plan: OwnershipPlan | None = None
        self._groups: list[ShapeGroup] = []
        self._runs = [] if rule.whole else _runs(rule, self.fragments)
        if rule.whole:
            pieces, matrices = cut(self.fragments, rule)
            self.plan = make_plan(matrices, world_size=rank_and_world_size()[1])
            self._groups = [
                ShapeGroup(rule, plan, [pieces[i] for i in indices], device=device)
                for indices, plan in self.plan.by_shape()
            ]
        # On one GPU nothing travels meanwhile: one shape after the other needs the buffers of one.
        alone = device.type == "cuda" and not any(group.travels for group in self._groups)
        self._rounds = [[group] for group in self._groups] if alone else [self._groups]

    @property
    def bytes_sent(self) -> int:
        """Bytes of matrices that cross between ranks in one step, both ways, over all ranks."""
        return sum(group.plan.elements_sent * self.rule.dtype.itemsize for group in self._groups)

    def state_of(self, fragment: Fragment) -> State:
        """Views of the fragment's elements of each state tensor, by name."""
        return {name: fragment.view(tensor) for name, tensor in self._state(fragment.flat).items()}

    def line_states(self) -> Iterator[tuple[str, int, State]]:
        """(parameter, first line, views of [lines] state tensors by name) of every matrix this rank owns.

        The lines of a parameter are those of its blocks, one after the other.
        """
        if self.rule.line_state_names:
            for group in self._groups:
                for slot, index in enumerate(group.owned):
                    fragment, block = group.matrices[index].fragment, group.matrices[index].block
                    first = sum(self.rule.num_lines(rows, fragment.cols) for rows in fragment.blocks[:block])
                    yield fragment.name, first, {name: each[slot] for name, each in group.lines.items()}

    @torch.no_grad()
    def step(self, *, lr: float, decay: float = 1.0, inspect: bool = False) -> None:
        """Update the weights and the state from the `.grad` of the flats; None counts as zero.

        Args:
            decay: factor on the rule's weight decay.
            inspect: also measure the updates, for `health`: it costs one more product per matrix.
        """
        self.steps += 1
        self.health = health = Health(self.device)
        if not self.rule.whole:
            with health.timed("finish"):
                for run in self._runs:
                    self._elementwise(run, lr=lr, decay=decay)
        for groups in self._rounds:
            self._step_whole(groups, lr=lr, decay=decay, inspect=inspect)
        self.num_transforms += health.transforms

    def _step_whole(self, groups: Sequence[ShapeGroup], *, lr: float, decay: float, inspect: bool) -> None:
        health, moves = self.health, self.rule.moves(self.steps)
        for group in groups:
            group.acquire()
            with health.timed("start"):
                if moves and isinstance(self.rule.direction, Corrected):
                    _correct(self, group, self.rule.direction)
                self._start(group)
                if moves:
                    group.send()
        for group in groups if moves else ():
            with health.timed("exchange"):
                group.receive()
            with health.timed("orthogonalize"):
                group.transform(health if inspect else None)
            with health.timed("exchange"):
                group.send_back()
            health.transforms += len(group.owned)
        for group in groups:
            with health.timed("exchange"):
                group.wait()
            with health.timed("finish"):
                self._finish(group, lr=lr, decay=decay)
            group.release()

    def _state(self, flat: Tensor) -> State:
        return self.states[next(i for i, own in enumerate(self.flats) if own is flat)]

    def _state_at(self, flat: Tensor, place: slice) -> State:
        return {name: tensor.view(-1)[place] for name, tensor in self._state(flat).items()}

    def _start(self, group: ShapeGroup) -> None:
        """The raw updates of this rank's pieces, packed, and the squares of their norms."""
        if group.staging is not None:
            for pieces in group.staging.uploading():
                for piece in pieces:
                    self._direction(piece)
            return
        for flat, pieces, table, numbers in group.parts:
            if flat.grad is not None and table is not None:
                momentum = self.rule.direction
                assert isinstance(momentum, Momentum)
                squares = torch.empty(len(pieces), dtype=torch.float64, device=flat.device)
                group.passes.momentum_pass(
                    flat.grad.view(-1), self._state(flat)["momentum"].view(-1), group.local, squares, table,
                    beta=momentum.beta_at(self.steps), nesterov=momentum.nesterov,
                )  # fmt: skip
                group.squares.index_add_(0, numbers, squares)
            else:
                for piece in pieces:
                    self._direction(piece)

    def _direction(self, piece: Piece) -> None:
        """Momentum, Nesterov, norm and cast of one piece, chunk by chunk: one pass over memory."""
        for chunk in _chunks(piece.numel, piece.fragment.flat.device):
            update = self.rule.direction(*_gradient_and_state(self, piece, chunk), step=self.steps)
            piece.buffer[chunk].copy_(update)
            wide = update.double()
            piece.square.add_(torch.dot(wide, wide))

    def _finish(self, group: ShapeGroup, *, lr: float, decay: float) -> None:
        """Decay, update, and the model's own copy, of this rank's pieces."""
        if group.staging is not None:
            for pieces in group.staging.downloading():
                for piece in pieces:
                    self._update(piece, lr=lr, scale=group.scale, decay=decay)
            return
        for flat, pieces, table, _ in group.parts:
            if table is not None:
                end = self.rule.finish(lr=lr, scale=group.scale, step=self.steps, decay=decay)
                model = pieces[0].fragment.model
                group.passes.apply_pass(
                    flat.data.view(-1), group.local, table, decay=end.decay, factor=end.factor,
                    ahead=end.ahead, model=None if model is None else model.view(-1),
                )  # fmt: skip
            else:
                for piece in pieces:
                    self._update(piece, lr=lr, scale=group.scale, decay=decay)

    def _update(self, piece: Piece, **end: float) -> None:
        """The end of the step of one piece, chunk by chunk."""
        for chunk in _chunks(piece.numel, piece.fragment.flat.device):
            place = slice(piece.offset + chunk.start, piece.offset + chunk.stop)
            self._apply(piece.fragment, place, piece.buffer[chunk], **end)

    def _elementwise(self, run: "_Run", *, lr: float, decay: float) -> None:
        flat, adam = run.fragment.flat, self.rule.direction
        if isinstance(adam, Adam) and flat.grad is not None and (passes := self._passes(flat.device)):
            place, model = slice(run.start, run.stop), run.fragment.model
            state = self._state_at(flat, place)
            end = self.rule.finish(lr=lr, scale=run.scale, step=self.steps, decay=decay)
            passes.adamw_pass(
                flat.data.view(-1)[place], flat.grad.view(-1)[place], state["first_moment"],
                state["second_moment"], beta1=adam.beta1, beta2=adam.beta2, eps=adam.eps,
                step=self.steps, decay=end.decay, factor=end.factor,
                model=None if model is None else model.view(-1)[place],
            )  # fmt: skip
            return
        gradient = torch.zeros_like(flat).view(-1) if flat.grad is None else flat.grad.view(-1)
        for chunk in _chunks(run.stop - run.start, flat.device):
            place = slice(run.start + chunk.start, run.start + chunk.stop)
            update = self.rule.direction(gradient[place], self._state_at(flat, place), step=self.steps)
            self._apply(run.fragment, place, update, lr=lr, scale=run.scale, decay=decay)

    def _passes(self, device: torch.device) -> Any:
        """The module that takes the step of an elementwise rule in one pass there, if there is one."""
        able = (each for each in (gpu, native) if each.unsupported(device, torch.bfloat16) is None)
        return next(able, None) if self.rule.not_compiled is None else None

    def _apply(self, fragment: Fragment, place: slice, update: Tensor, **end: float) -> None:
        """One chunk of the weights and of the model's copy, while both are in the cache.

        end: learning rate, scale and decay, as `Rule.apply` takes them.
        """
        weight, state = fragment.flat.data.view(-1)[place], self._state_at(fragment.flat, place)
        point = self.rule.apply(weight, update, step=self.steps, state=state, **end)
        if fragment.model is not None:
            fragment.model.view(-1)[place].copy_(weight if point is None else point)


def _correct(unit: FusedStep, group: ShapeGroup, direction: Corrected) -> None:
    """Replace the gradients before by the corrected ones, each matrix of these clipped. Collective."""
    pieces = [piece for part in group.parts for piece in part.pieces]
    for piece in pieces:
        for chunk in _chunks(piece.numel, piece.fragment.flat.device):
            corrected = direction.correct(*_gradient_and_state(unit, piece, chunk)).double()
            piece.square.add_(torch.dot(corrected, corrected))
    factors = direction.clip_factor(group.norms())
    for piece in pieces:
        _, state = _gradient_and_state(unit, piece, slice(0, piece.numel))
        state["gradient_before"] *= factors[piece.number].to(piece.square.device)


def _gradient_and_state(unit: FusedStep, piece: Piece, chunk: slice) -> tuple[Tensor, State]:
    """Of one chunk of a piece; zeros for a gradient that is missing."""
    flat, place = piece.fragment.flat, slice(piece.offset + chunk.start, piece.offset + chunk.stop)
    state = unit._state_at(flat, place)
    if flat.grad is None:
        return torch.zeros(chunk.stop - chunk.start, device=flat.device), state
    return flat.grad.view(-1)[place], state


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


def _chunks(numel: int, device: torch.device) -> Iterator[slice]:
    """Slices of a pass: small on the CPU, for its cache; the whole on a GPU, which has nothing to gain."""
    size = CHUNK_ELEMENTS if device.type == "cpu" else max(numel, 1)
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))
