"""Update rules under DeepSpeed ZeRO: where the shards lie. The only file with DeepSpeed internals.

`ZeroOptimizer` is a client optimizer: DeepSpeed reduces, checks and clips the gradient, and calls `step`
with flat fp32 shards whose borders may cut a matrix anywhere. It reads which elements these hold, and leaves
the rest to `optim.step.fused`. Clipping therefore acts on the gradient, never on the orthogonalised update.

The step itself writes what the model computes with: the masters rounded, or the point that a rule looks
ahead to. DeepSpeed would then copy the masters there once more. So until its step is over, the masters show
the model's copy, and copying a tensor onto itself is nothing.

What is read of DeepSpeed 0.19.8 (a missing attribute is an error that names it and the version):
    stage 0     nothing: the groups hold whole fp32 parameters
    stage 1, 2  parameter._hp_mapping: where the parameter's piece lies in the flat fp32 shard;
                optimizer.parallel_partitioned_bit16_groups, or bf16_partitioned_groups of a BF16_Optimizer,
                or param_buffer_of_bit16_for_cpu_offload_groups: the model's copy of the shard
    stage 3     optimizer.fp16_groups, fp32_partitioned_groups_flat, fp16_partitioned_groups_flat,
                sub_group_to_group_id; parameter.partition_numel(), ds_numel, ds_tensor
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, isfinite, prod
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from optim.groups import Member
from optim.kernels import native
from optim.noise import Noise
from optim.rules import Rule
from optim.step.fused import Fragment, FusedStep
from optim.step.ownership import Plan

MASTER = "master"  # name of the fp32 weights beside a rule's state names
POINT = "point"  # and of the point that a rule looks ahead to, in the model's precision
PHASES = ("start", "exchange", "orthogonalize", "finish")  # of optim.step.fused


class ZeroOptimizer(torch.optim.Optimizer):
    """Applies a `Rule` per kind of parameter, under any ZeRO stage.

    Build it from the model's partition, hand it to `deepspeed.initialize`, then call `bind` with the
    engine: from then on all state exists, in fp32, with the same keys on every rank.

    Args:
        members: the model's parameters, from `optim.groups.partition`.
        rules: label of a member -> its rule.
        peak_lr: label -> peak learning rate; `set_lr_factor` scales it.
        clip: global norm at which the gradient is clipped; 0 is off. Used in stage 0 only, where DeepSpeed
            would clip before the true norm can be seen; in the other stages DeepSpeed clips.
        noise: added to the averaged gradient of every step, and its seed; the same in every stage and world.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        rules: Mapping[str, Rule],
        peak_lr: Mapping[str, float],
        clip: float,
        noise: tuple[Noise, int] | None = None,
    ) -> None:
        groups: list[dict[str, Any]] = []
        for label, rule in rules.items():
            chosen = [member for member in members if member.label == label]
            if chosen:
                groups.append(
                    {
                        "params": [member.parameter for member in chosen],
                        "members": chosen,  # DeepSpeed replaces "params" by its shards
                        "rule": rule,
                        "peak_lr": peak_lr[label],
                        "lr": peak_lr[label],
                    }
                )
        self.clip = clip
        self.noise = noise
        # Stage 0 in fp32: DeepSpeed wraps nothing, and reads these two from the client optimizer.
        self._global_grad_norm: Tensor | None = None
        self.overflow = False
        self.inspect = False  # whether the next steps measure their updates, for `health`
        self._members = {member.name: member for member in members}
        self._units: dict[int, FusedStep] = {}
        self._lent: list[tuple[Tensor, Tensor]] = []  # (flat, its data) while it shows the model's copy
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
        return [unit.plan for unit in self._units.values() if unit.plan is not None]

    @property
    def num_transforms(self) -> int:
        """Matrices that this rank has put through a whole-matrix rule since `bind`."""
        return sum(unit.num_transforms for unit in self._units.values())

    @property
    def bytes_sent(self) -> int:
        """Bytes of matrices that cross between ranks in one step, both ways, over all ranks."""
        return sum(unit.bytes_sent for unit in self._units.values())

    def describe(self) -> str:
        """Who owns the matrices and what travels, as text."""
        plans = self.plans
        sent, least = sum(p.elements_sent for p in plans), sum(p.minimum_elements_sent for p in plans)
        size = self.bytes_sent // sent if sent else 0
        units = [unit for unit in self._units.values() if unit.rule.whole]
        unused = {reason for unit in units if (reason := unit.without("kernels"))}
        reasons = {f"not used, {reason}" for unit in units if (reason := unit.without("native"))}
        return (
            f"  {sum(len(plan.matrices) for plan in plans)} matrices, each orthogonalised by one rank; loads "
            f"within {max((plan.imbalance for plan in plans), default=0.0):.1%} of their mean\n"
            f"  {self.bytes_sent:,} bytes of matrices sent per step over all ranks "
            f"(no plan sends less than {least * size:,})\n"
            f"  Triton kernels: {'not used, ' + '; '.join(sorted(unused)) if unused else 'used'}\n"
            f"  compiled step (optim/kernels/native.cpp): {'; '.join(sorted(reasons)) or native.describe()}"
        )

    def health(self) -> dict[str, float]:
        """What the last step measured, over all ranks; collective.

        Keys: "imbalance" of the owners' FLOPs; "orthogonalisations", in that step over all ranks;
        "<phase>_seconds" for each of PHASES, of the slowest rank; after a step with
        `inspect`, "orthogonality_error" (‖OOᵀ - I‖_F / √n, mean over the matrices under rules that mean to
        orthogonalise), its "_max", and "update_rms" (of the scaled updates, over all matrices).
        """
        steps = [unit.health for unit in self._units.values()]
        timed = [health.read() for health in steps]
        seconds = [sum(phases.get(phase, 0.0) for phases in timed) for phase in PHASES]
        errors = [error for health in steps for error in health.errors]
        squares = [square for health in steps for square in health.mean_squares]
        transforms = sum(health.transforms for health in steps)
        assert self._engine is not None, "bind the optimizer first"
        largest = torch.tensor([*seconds, max(errors, default=0.0)], dtype=torch.float64)
        counted = [len(errors), sum(errors), len(squares), sum(squares), transforms]
        sums = torch.tensor(counted, dtype=torch.float64)
        largest, sums = largest.to(self._engine.device), sums.to(self._engine.device)
        if dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            dist.all_reduce(sums)
        found: dict[str, float] = {
            "imbalance": max((plan.imbalance for plan in self.plans), default=0.0),
            "orthogonalisations": sums[-1].item(),
        }
        found |= {f"{phase}_seconds": value for phase, value in zip(PHASES, largest.tolist(), strict=False)}
        num_errors, total_error, num_squares, total_square, _ = sums.tolist()
        if num_errors:
            found["orthogonality_error"] = total_error / num_errors
            found["orthogonality_error_max"] = largest[-1].item()
        if num_squares:
            found["update_rms"] = (total_square / num_squares) ** 0.5
        return found

    @property
    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping; inf if it was not finite."""
        assert self._engine is not None, "bind the optimizer first"
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None and isfinite(norm) else inf

    def lr(self, kind: str) -> float | None:
        """The learning rate of a kind of parameter in the last step; None if there is no such parameter."""
        groups = (group for group in self.param_groups if any(m.kind == kind for m in group["members"]))
        return next((group["lr"] for group in groups), None)

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self.param_groups:
            group["lr"] = factor * group["peak_lr"]

    def bind(self, engine: "deepspeed.DeepSpeedEngine") -> None:
        """Read where the shards lie, check them against the weights, plan the exchange, allocate the state.

        Raises:
            ValueError: a parameter is not covered exactly once, a shard differs from the weights, or a rule
                looks ahead where the model has no copy of the weights to hold the point.
            RuntimeError: this DeepSpeed lacks an attribute that the layout is read from.
        """
        stage = engine.zero_optimization_stage()
        self._replicated = stage == 0
        self._engine = engine
        offloaded = getattr(engine.optimizer, "cpu_offload", False)  # its copy is on the way to the model's
        for rule, fragments in _read_layout(self.param_groups, engine):
            for fragment in fragments:
                parameter = self._members[fragment.name].parameter
                _check_against_weights(fragment, parameter, stage, offloaded=offloaded)
            if rule.looks_ahead and any(fragment.model is None for fragment in fragments):
                raise ValueError(
                    f"{type(rule).__name__} takes gradients ahead of the weights, but here the model "
                    "computes with the masters themselves, or keeps its copy on another device; use "
                    "zero.stage=1 or precision=bf16, and in stage 3 zero.offload_optimizer=false"
                )
            unit = FusedStep(rule, fragments, device=engine.device)
            self._units[id(unit.flats[0])] = unit
            for flat, state in zip(unit.flats, unit.states, strict=True):
                self.state[flat] = state
        if engine.optimizer is not self:
            engine.optimizer.step = self._returning_masters(engine.optimizer.step)

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
            unit = self._units[id(group["params"][0])]
            with self._noisy(unit):
                unit.step(lr=group["lr"], inspect=self.inspect)
            self._lend(unit)

    @contextmanager
    def _noisy(self, unit: FusedStep) -> Iterator[None]:
        """A block in which the injected noise is on copies of the unit's gradients."""
        if self.noise is None:
            yield
            return
        noise, seed = self.noise
        own = [(flat, flat.grad) for flat in unit.flats]
        for flat, gradient in own:
            flat.grad = torch.zeros_like(flat) if gradient is None else gradient.clone()
        for fragment in unit.fragments:
            assert fragment.flat.grad is not None
            gradient = fragment.view(fragment.flat.grad)
            gradient += noise.sample(
                fragment.name, start=fragment.start, stop=fragment.stop, seed=seed, step=unit.steps,
                device=gradient.device,
            )  # fmt: skip
        yield
        for flat, gradient in own:
            flat.grad = gradient

    def _lend(self, unit: FusedStep) -> None:
        """Let the unit's masters show the model's copy, until `_take_back`."""
        for flat, model in {id(f.flat): (f.flat, f.model) for f in unit.fragments}.values():
            if model is not None:
                self._lent.append((flat, flat.data))
                flat.data = model

    def _take_back(self) -> None:
        for flat, data in self._lent:
            flat.data = data
        self._lent = []

    def _returning_masters(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed's step, after which the masters are themselves again."""

        @functools.wraps(step)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            try:
                return step(*arguments, **options)
            finally:
                self._take_back()

        return wrapped

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
        """What this rank must save: (parameter name, first element, {"master" or state name: 1-D tensor}).

        Over all ranks the shards tile every parameter exactly once, in every stage. State of whole rows
        comes from the matrix's owner; its elements are rows. All is fp32, but a point has the model's dtype.
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
                    tensors = _tensors(unit, fragment)
                    yield fragment.name, start, {name: t[share] for name, t in tensors.items()}
            yield from unit.row_states()

    @torch.no_grad()
    def load_shards(self, read: Callable[[str, str, int, int], Tensor], *, applied_steps: int) -> None:
        """Restore master weights and state, and refresh the model's weights from them.

        Args:
            read: (parameter name, tensor name, start, stop) -> 1-D fp32 tensor.
        """
        points = []
        for unit in self._units.values():
            unit.steps = applied_steps
            for fragment in unit.fragments:
                for name, tensor in _tensors(unit, fragment).items():
                    content = read(fragment.name, name, fragment.start, fragment.stop)
                    if name == POINT:  # which refreshing the weights would overwrite
                        points.append((tensor, content))
                    else:
                        tensor.copy_(content)
            for parameter, first, rows in unit.row_states():
                for name, tensor in rows.items():
                    tensor.copy_(read(parameter, name, first, first + len(tensor)))
        self.refresh_weights()
        self._write_points(points)

    @contextmanager
    def at_weights(self) -> Iterator[None]:
        """A block in which the model computes with the weights, also under rules that look ahead.

        Collective. It keeps this rank's share of the points aside for as long as the block lasts.
        """
        if not self.looks_ahead:
            yield
            return
        ahead = [unit for unit in self._units.values() if unit.rule.looks_ahead]
        models = {id(f.model): f.model for unit in ahead for f in unit.fragments if f.model is not None}
        points = [(model, model.clone()) for model in models.values()]
        self.refresh_weights()
        yield
        self._write_points(points)

    @property
    def looks_ahead(self) -> bool:
        """Whether any rule takes gradients at another point than the weights."""
        return any(group["rule"].looks_ahead for group in self.param_groups)

    @torch.no_grad()
    def _write_points(self, points: list[tuple[Tensor, Tensor]]) -> None:
        """Write these into the model's copies of this rank's shards, and hand them to every rank."""
        if self.looks_ahead:
            for model, point in points:
                model.copy_(point)
            for unit in self._units.values():
                self._lend(unit)
            self.refresh_weights()
            self._take_back()

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
            _read(wrapper, "_partition_all_parameters")()  # gathered ones would stay as they are
            for index in range(len(_read(wrapper, "fp32_partitioned_groups_flat"))):
                _read(wrapper, "_reassign_or_swap_out_partitioned_parameters")(index)
            persistent = _read(wrapper, "persistent_parameters")  # small ones, kept whole on every rank
            if persistent:
                persistent[0].all_gather(persistent)
        else:
            _read(wrapper, "update_lp_params")()


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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
    for index, group in enumerate(groups):
        if stage == 0:
            yield group["rule"], _whole_parameters(group["members"], group["params"])
        else:
            model = _model_partition(engine.optimizer, index)
            yield group["rule"], _flat_partition(group["members"], group["params"], model)


def _fragment(
    member: Member, start: int, stop: int, flat: Tensor, offset: int, model: Tensor | None
) -> Fragment:
    cols = member.shape[1] if len(member.shape) == 2 else 1
    return Fragment(member.name, member.blocks, cols, start, stop, flat, offset, model)


def _tensors(unit: FusedStep, fragment: Fragment) -> dict[str, Tensor]:
    """Views of the fragment's master weights, state and point, by name."""
    tensors = {MASTER: fragment.view(fragment.flat.data), **unit.state_of(fragment)}
    if unit.rule.looks_ahead:
        assert fragment.model is not None
        tensors[POINT] = fragment.view(fragment.model)
    return tensors


def _whole_parameters(members: list[Member], masters: list[Tensor]) -> list[Fragment]:
    """Stage 0: every rank holds every parameter."""
    found = []
    for member, master in zip(members, masters, strict=True):
        model = None if master is member.parameter else member.parameter.data
        found.append(_fragment(member, 0, prod(member.shape), master, 0, model))
    return found


def _model_partition(wrapper: Any, index: int) -> Tensor:
    """Stages 1 and 2: what DeepSpeed copies this rank's shard of a group to."""
    if getattr(wrapper, "cpu_offload", False):
        return _read(wrapper, "param_buffer_of_bit16_for_cpu_offload_groups")[index]
    bf16 = isinstance(wrapper, BF16_Optimizer)
    rank, _ = _rank_and_world_size()
    return _read(wrapper, "bf16_partitioned_groups" if bf16 else "parallel_partitioned_bit16_groups")[index][
        rank
    ]


def _flat_partition(members: list[Member], masters: list[Tensor], model: Tensor) -> list[Fragment]:
    """Stages 1 and 2: one flat shard per group, in which consecutive parameters lie end to end."""
    [flat] = masters
    fragments = []
    for member in members:
        mapping = _read(member.parameter, "_hp_mapping")
        if mapping is None:  # no piece of this parameter here
            fragments.append(_fragment(member, 0, 0, flat, 0, model))
            continue
        in_parameter = _read(mapping, "lp_fragment_address")
        in_shard = _read(mapping, "hp_fragment_address")
        stop = in_parameter.start + in_parameter.numel
        fragments.append(_fragment(member, in_parameter.start, stop, flat, in_shard.start, model))
    return fragments


def _read_stage_3(groups: list[dict[str, Any]], wrapper: Any) -> Iterator[tuple[Rule, list[Fragment]]]:
    """Stage 3: every parameter is cut into equal pieces, and sub-groups of pieces lie end to end."""
    rank, _ = _rank_and_world_size()
    by_parameter = {id(member.parameter): member for group in groups for member in group["members"]}
    for index, flat in enumerate(_read(wrapper, "fp32_partitioned_groups_flat")):
        model = _read(wrapper, "fp16_partitioned_groups_flat")[index]
        if model is not None and model.device != flat.device:
            model = None  # DeepSpeed copies the masters to the other device
        fragments, offset = [], 0
        for parameter in _read(wrapper, "fp16_groups")[index]:
            size, numel = _read(parameter, "partition_numel")(), _read(parameter, "ds_numel")
            start = min(rank * size, numel)
            member = by_parameter[id(parameter)]
            fragments.append(_fragment(member, start, min(start + size, numel), flat, offset, model))
            offset += size
        yield groups[_read(wrapper, "sub_group_to_group_id")[index]]["rule"], fragments


def _read(owner: Any, attribute: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError as error:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {type(owner).__name__}.{attribute}, from which "
            "optim/step/zero.py reads the shard layout; install deepspeed==0.19.8"
        ) from error


def _check_against_weights(fragment: Fragment, parameter: Tensor, stage: int, *, offloaded: bool) -> None:
    """The shard must hold the model's own weights and know where they lie, or the layout was misread."""
    if stage == 3:
        weights = _read(parameter, "ds_tensor").view(-1)[: fragment.stop - fragment.start]
    else:
        weights = parameter.detach().reshape(-1)[fragment.start : fragment.stop]
    master = fragment.view(fragment.flat.detach())
    where = f"{fragment.name}: elements {fragment.start} to {fragment.stop}"
    if not torch.equal(master.to(weights.device, weights.dtype), weights):
        raise ValueError(
            f"{where} of the fp32 master differ from the model's weights; "
            f"DeepSpeed {deepspeed.__version__} lays shards out in another way"
        )
    if fragment.model is None or offloaded or not len(weights):
        return
    if fragment.view(fragment.model).data_ptr() != weights.data_ptr():
        raise ValueError(
            f"{where} are not where the step would write the model's weights; "
            f"DeepSpeed {deepspeed.__version__} lays its copy out in another way"
        )
