"""Whole-matrix update rules under DeepSpeed ZeRO. The only file with process groups or DeepSpeed internals.

`ZeroOptimizer` is a client optimizer: DeepSpeed reduces, checks and clips the gradient, and calls `step`
with flat fp32 shards whose borders may cut a matrix anywhere. For a rule that needs whole matrices, the
raw update (after momentum) travels to each matrix's owner by one packed all-to-all, the owner applies the
rule once, and the result travels back. Clipping therefore acts on the gradient, never on the
orthogonalised update, and no rank repeats another's work.

What is read of DeepSpeed 0.19.8 (a missing attribute is an error that names it and the version):
    stage 0     nothing: the groups hold whole fp32 parameters
    stage 1, 2  parameter._hp_mapping: where the parameter's piece lies in the flat fp32 shard
    stage 3     optimizer.fp16_groups, fp32_partitioned_groups_flat, sub_group_to_group_id;
                parameter.partition_numel(), ds_numel, ds_tensor
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from optim.groups import Member
from optim.ownership import Matrix, Plan, Segment, make_plan
from optim.rules import Rule, State, new_state

MASTER = "master"  # name of the fp32 weights beside a rule's state names


@dataclass(frozen=True)
class Fragment:
    """This rank's piece of one parameter: elements [start, stop) of it, at `offset` of a flat fp32 tensor."""

    member: Member
    start: int
    stop: int
    flat: Tensor
    offset: int

    def view(self, like_flat: Tensor) -> Tensor:
        """The piece's elements in a tensor laid out as `flat`: a 1-D view."""
        return like_flat.view(-1)[self.offset : self.offset + self.stop - self.start]


class ZeroOptimizer(torch.optim.Optimizer):
    """Applies a `Rule` per kind of parameter, under any ZeRO stage.

    Build it from the model's partition, hand it to `deepspeed.initialize`, then call `bind` with the
    engine: from then on all state exists, in fp32, with the same keys on every rank.

    Args:
        members: the model's parameters, from `optim.groups.partition`.
        rules: kind -> rule.
        peak_lr: kind -> peak learning rate; `set_lr_factor` scales it.
        clip: global norm at which the gradient is clipped; 0 is off. Used in stage 0 only, where DeepSpeed
            would clip before the true norm can be seen; in the other stages DeepSpeed clips.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        rules: Mapping[str, Rule],
        peak_lr: Mapping[str, float],
        clip: float,
    ) -> None:
        groups: list[dict[str, Any]] = []
        for kind, rule in rules.items():
            chosen = [member for member in members if member.kind == kind]
            if chosen:
                groups.append(
                    {
                        "params": [member.parameter for member in chosen],
                        "members": chosen,  # DeepSpeed replaces "params" by its shards
                        "kind": kind,
                        "rule": rule,
                        "peak_lr": peak_lr[kind],
                        "lr": peak_lr[kind],
                    }
                )
        self.clip = clip
        # Stage 0 in fp32: DeepSpeed wraps nothing, and reads these two from the client optimizer.
        self._global_grad_norm: Tensor | None = None
        self.overflow = False
        self._units: dict[int, _Unit] = {}
        self._replicated = False
        self._engine: deepspeed.DeepSpeedEngine | None = None
        super().__init__(groups, defaults={})

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights; a step with a non-finite gradient does not count."""
        return next(iter(self._units.values())).steps

    @property
    def plans(self) -> list[Plan]:
        """The ownership plans, one for each call of `step` that has whole-matrix work."""
        return [unit.exchange.plan for unit in self._units.values() if unit.exchange is not None]

    @property
    def num_transforms(self) -> int:
        """Matrices that this rank has put through a whole-matrix rule since `bind`."""
        return sum(unit.exchange.num_transforms for unit in self._units.values() if unit.exchange is not None)

    @property
    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping; inf if it was not finite."""
        assert self._engine is not None, "bind the optimizer first"
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None and isfinite(norm) else inf

    def lr(self, kind: str) -> float | None:
        """The learning rate of a kind of parameter in the last step; None if there is no such parameter."""
        return next((group["lr"] for group in self.param_groups if group["kind"] == kind), None)

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self.param_groups:
            group["lr"] = factor * group["peak_lr"]

    def bind(self, engine: "deepspeed.DeepSpeedEngine") -> None:
        """Read where the shards lie, check them against the weights, plan the exchange, allocate the state.

        Raises:
            ValueError: a parameter is not covered exactly once, or a shard differs from the weights.
            RuntimeError: this DeepSpeed lacks an attribute that the layout is read from.
        """
        stage = engine.zero_optimization_stage()
        self._replicated = stage == 0
        self._engine = engine
        for rule, fragments in _read_layout(self.param_groups, engine):
            for fragment in fragments:
                _check_against_weights(fragment, stage)
            unit = _Unit(rule, fragments, device=engine.device)
            self._units[id(unit.flats[0])] = unit
            for flat, state in zip(unit.flats, unit.states, strict=True):
                self.state[flat] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Called by DeepSpeed with `.grad` set: once for all groups (stage 0) or once per shard."""
        assert closure is None
        if not self._units:
            return  # DeepSpeed's dry run while it builds its fp32 copies in stage 0
        groups = [group for group in self.param_groups if group["params"]]
        if self._replicated and not self._clip_replicated([p for group in groups for p in group["params"]]):
            return
        for group in groups:
            self._units[id(group["params"][0])].step(lr=group["lr"])

    def _clip_replicated(self, masters: list[Tensor]) -> bool:
        """Stage 0: clip the whole gradient by its global norm. False if it is not finite."""
        gradients = [master.grad for master in masters if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm
        self.overflow = not torch.isfinite(norm)
        if self.overflow:
            return False
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(masters, self.clip, norm)
        return True

    def shards(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """What this rank must save: (parameter name, first element, {"master" or state name: 1-D fp32}).

        Over all ranks the shards tile every parameter exactly once, in every stage.
        """
        rank, world_size = _rank_and_world_size()
        for unit in self._units.values():
            for fragment in unit.fragments:
                share = slice(None)
                start, numel = fragment.start, fragment.stop - fragment.start
                if self._replicated:
                    share = slice(numel * rank // world_size, numel * (rank + 1) // world_size)
                    start, numel = share.start, share.stop - share.start
                if numel:
                    tensors = unit.tensors(fragment)
                    yield fragment.member.name, start, {name: t[share] for name, t in tensors.items()}

    def load_shards(self, read: Callable[[str, str, int, int], Tensor], *, applied_steps: int) -> None:
        """Restore master weights and state, and refresh the model's weights from them.

        Args:
            read: (parameter name, tensor name, start, stop) -> 1-D fp32 tensor.
        """
        for unit in self._units.values():
            unit.steps = applied_steps
            for fragment in unit.fragments:
                for name, tensor in unit.tensors(fragment).items():
                    tensor.copy_(read(fragment.member.name, name, fragment.start, fragment.stop))
        self.refresh_weights()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Write the model's weights, in their precision and on every rank, from the fp32 masters."""
        assert self._engine is not None, "bind the optimizer first"
        stage, wrapper = self._engine.zero_optimization_stage(), self._engine.optimizer
        if stage == 0:
            for group in self.param_groups:
                for member, master in zip(group["members"], group["params"], strict=True):
                    member.parameter.copy_(master)
        elif stage == 3:
            for index in range(len(_read(wrapper, "fp32_partitioned_groups_flat"))):
                _read(wrapper, "_reassign_or_swap_out_partitioned_parameters")(index)
            persistent = _read(wrapper, "persistent_parameters")  # small ones, kept whole on every rank
            if persistent:
                persistent[0].all_gather(persistent)
        else:
            _read(wrapper, "update_lp_params")()


class _Unit:
    """The flat tensors that one group hands to one call of `step`, and the fragments inside them."""

    def __init__(self, rule: Rule, fragments: list[Fragment], *, device: torch.device) -> None:
        self.rule = rule
        self.fragments = fragments
        self.flats = list({id(fragment.flat): fragment.flat for fragment in fragments}.values())
        self.states: list[State] = [new_state(rule, flat.detach()) for flat in self.flats]
        self.steps = 0
        self.exchange = _Exchange(rule, fragments, device=device) if rule.whole else None

    def step(self, *, lr: float) -> None:
        self.steps += 1
        updates: dict[int, Tensor] = {}
        for flat, state in zip(self.flats, self.states, strict=True):
            gradient = torch.zeros_like(flat) if flat.grad is None else flat.grad
            updates[id(flat)] = self.rule.direction(gradient, state, step=self.steps)
        if self.exchange is not None:
            self.exchange.run([fragment.view(updates[id(fragment.flat)]) for fragment in self.fragments])
        for flat in self.flats:
            self.rule.apply(flat.data, updates[id(flat)], lr=lr)

    def tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """Views of the fragment's master weights and state, by name."""
        state = self.states[next(i for i, flat in enumerate(self.flats) if flat is fragment.flat)]
        views = {name: fragment.view(tensor) for name, tensor in state.items()}
        return {MASTER: fragment.view(fragment.flat.data), **views}


class _Exchange:
    """Pieces to owners, rule on whole matrices batched by shape, pieces back. Buffers on `device`."""

    def __init__(self, rule: Rule, fragments: list[Fragment], *, device: torch.device) -> None:
        self.rule = rule
        self.device = device
        self.dtype = getattr(rule, "dtype", torch.float32)
        self.rank, self.world_size = _rank_and_world_size()
        self.plan = make_plan(
            [
                Matrix(f.member.name, f.member.shape[0], f.member.shape[1], holdings)
                for f, holdings in zip(fragments, _gather_holdings(fragments), strict=True)
            ],
            world_size=self.world_size,
        )
        ranks = range(self.world_size)
        self._out = [self.plan.to_owner(self.rank, owner) for owner in ranks]
        self._in = [self.plan.to_owner(source, self.rank) for source in ranks]
        self._back_out = [self.plan.from_owner(self.rank, target) for target in ranks]
        self._back_in = [self.plan.from_owner(owner, self.rank) for owner in ranks]
        self._by_shape: dict[tuple[int, int], list[int]] = {}
        for index in self.plan.owned_by(self.rank):
            matrix = self.plan.matrices[index]
            self._by_shape.setdefault((matrix.rows, matrix.cols), []).append(index)
        self.num_transforms = 0

    def run(self, pieces: list[Tensor]) -> None:
        """Replace raw updates by transformed ones, in place. `pieces`: this rank's 1-D piece per matrix."""
        received = self._all_to_all([pieces[s.matrix] for s in _flat(self._out)], self._out, self._in)
        whole = {
            index: torch.empty(self.plan.matrices[index].numel, dtype=self.dtype, device=self.device)
            for index in self.plan.owned_by(self.rank)
        }
        for segment, chunk in zip(_flat(self._in), received, strict=True):
            whole[segment.matrix][segment.start : segment.stop] = chunk
        for shape, indices in self._by_shape.items():
            batch = torch.stack([whole[index].view(shape) for index in indices])
            for index, result in zip(indices, self.rule.transform(batch), strict=True):
                whole[index] = result.reshape(-1)
            self.num_transforms += len(indices)
        received = self._all_to_all(
            [whole[s.matrix][s.start : s.stop] for s in _flat(self._back_out)], self._back_out, self._back_in
        )
        for segment, chunk in zip(_flat(self._back_in), received, strict=True):
            pieces[segment.matrix].copy_(chunk)

    def _all_to_all(
        self, chunks: list[Tensor], outgoing: list[list[Segment]], incoming: list[list[Segment]]
    ) -> tuple[Tensor, ...]:
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        send = torch.cat([empty, *(chunk.to(self.device, self.dtype) for chunk in chunks)])
        if self.world_size == 1:
            received = send
        else:
            sizes_in, sizes_out = _sizes(incoming), _sizes(outgoing)
            received = empty.new_empty(sum(sizes_in))
            dist.all_to_all_single(received, send, sizes_in, sizes_out)
        return received.split([segment.numel for segment in _flat(incoming)])


def _flat(segments: list[list[Segment]]) -> list[Segment]:
    return [segment for per_rank in segments for segment in per_rank]


def _sizes(segments: list[list[Segment]]) -> list[int]:
    return [sum(segment.numel for segment in per_rank) for per_rank in segments]


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gather_holdings(fragments: list[Fragment]) -> list[tuple[tuple[int, int], ...]]:
    """For each fragment's parameter, the range that every rank holds, in rank order."""
    _, world_size = _rank_and_world_size()
    mine = [(fragment.start, fragment.stop) for fragment in fragments]
    everyone: list[list[tuple[int, int]]] = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(everyone, mine)
    return list(zip(*everyone, strict=True))


# --- the layout of each ZeRO stage ------------------------------------------------------------------------


def _read_layout(
    groups: list[dict[str, Any]], engine: "deepspeed.DeepSpeedEngine"
) -> Iterator[tuple[Rule, list[Fragment]]]:
    """Yield (rule, fragments in the same order on every rank) for each unit of work of `step`."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        yield from _read_stage_3(groups, engine.optimizer)
        return
    if stage and engine.zero_round_robin_gradients():
        raise ValueError(
            "round_robin_gradients makes DeepSpeed report wrong shard addresses; "
            "remove it from the DeepSpeed configuration"
        )
    for group in groups:
        read = _whole_parameters if stage == 0 else _flat_partition
        yield group["rule"], read(group["members"], group["params"])


def _whole_parameters(members: list[Member], masters: list[Tensor]) -> list[Fragment]:
    """Stage 0: every rank holds every parameter."""
    return [
        Fragment(member, 0, prod(member.shape), master, 0)
        for member, master in zip(members, masters, strict=True)
    ]


def _flat_partition(members: list[Member], masters: list[Tensor]) -> list[Fragment]:
    """Stages 1 and 2: one flat shard per group, in which consecutive parameters lie end to end."""
    [flat] = masters
    fragments = []
    for member in members:
        mapping = _read(member.parameter, "_hp_mapping")
        if mapping is None:  # no piece of this parameter here
            fragments.append(Fragment(member, 0, 0, flat, 0))
            continue
        in_parameter = _read(mapping, "lp_fragment_address")
        in_shard = _read(mapping, "hp_fragment_address")
        stop = in_parameter.start + in_parameter.numel
        fragments.append(Fragment(member, in_parameter.start, stop, flat, in_shard.start))
    return fragments


def _read_stage_3(groups: list[dict[str, Any]], wrapper: Any) -> Iterator[tuple[Rule, list[Fragment]]]:
    """Stage 3: every parameter is cut into equal pieces, and sub-groups of pieces lie end to end."""
    rank, _ = _rank_and_world_size()
    by_parameter = {id(member.parameter): member for group in groups for member in group["members"]}
    for index, flat in enumerate(_read(wrapper, "fp32_partitioned_groups_flat")):
        fragments, offset = [], 0
        for parameter in _read(wrapper, "fp16_groups")[index]:
            size, numel = _read(parameter, "partition_numel")(), _read(parameter, "ds_numel")
            start = min(rank * size, numel)
            member = by_parameter[id(parameter)]
            fragments.append(Fragment(member, start, min(start + size, numel), flat, offset))
            offset += size
        yield groups[_read(wrapper, "sub_group_to_group_id")[index]]["rule"], fragments


def _read(owner: Any, attribute: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError as error:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {type(owner).__name__}.{attribute}, from which "
            "optim/zero.py reads the shard layout; install deepspeed==0.19.8"
        ) from error


def _check_against_weights(fragment: Fragment, stage: int) -> None:
    """The shard must hold the model's own weights, or the layout was misread."""
    parameter = fragment.member.parameter
    if stage == 3:
        weights = _read(parameter, "ds_tensor").view(-1)[: fragment.stop - fragment.start]
    else:
        weights = parameter.detach().reshape(-1)[fragment.start : fragment.stop]
    master = fragment.view(fragment.flat.detach())
    if not torch.equal(master.to(weights.device, weights.dtype), weights):
        raise ValueError(
            f"{fragment.member.name}: elements {fragment.start} to {fragment.stop} of the fp32 master differ "
            f"from the model's weights; DeepSpeed {deepspeed.__version__} lays shards out in another way"
        )
