"""Update rules as DeepSpeed's client optimizer, under any ZeRO stage.

DeepSpeed reduces, checks and clips the gradient, then calls `ZeroOptimizer.step` with flat fp32 shards whose
borders may cut a matrix anywhere. Clipping therefore acts on the gradient, never on an orthogonalised update.

    layout      which elements the shards hold, read from DeepSpeed
    fused       the step over them
    saved       what a run keeps of them
    lending     why DeepSpeed's copy of the masters, after the step, does no harm
    shown       which weights the model computes with
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import inf, isfinite
from typing import Any

import deepspeed
import torch
from torch import Tensor

from optim.groups import Member
from optim.kernels import gpu, native
from optim.noise import Noise
from optim.rules import Rule
from optim.step import health, layout, saved
from optim.step.after import scale_rows, start_average, update_average
from optim.step.fragments import Fragment
from optim.step.fused import FusedStep
from optim.step.lending import Lending
from optim.step.ownership import OwnershipPlan
from optim.step.shown import Shown


class ZeroOptimizer(torch.optim.Optimizer):
    """Applies a `Rule` per kind of parameter, under any ZeRO stage.

    Build it from the model's partition, hand it to `deepspeed.initialize`, then call `bind` with the
    engine: from then on all state exists, in fp32, with the same keys on every rank.

    Args:
        members: the model's parameters, from `optim.groups.partition`.
        rules: label of a member -> its rule.
        peak_lr: label -> peak learning rate; `set_factors` scales it.
        clip: global norm at which the gradient is clipped; 0 is off. Used in stage 0 only, where DeepSpeed
            would clip before the true norm can be seen; in the other stages DeepSpeed clips.
        noise: added to the averaged gradient of every step, and its seed; the same in every stage and world.
        average_decay: of an average of the weights that is kept beside them; 0: none.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        rules: Mapping[str, Rule],
        peak_lr: Mapping[str, float],
        clip: float,
        noise: tuple[Noise, int] | None = None,
        average_decay: float = 0.0,
    ) -> None:
        groups: list[dict[str, Any]] = []
        for label, rule in rules.items():
            if chosen := [member for member in members if member.label == label]:
                groups.append(_group(chosen, rule, lr=peak_lr[label]))
        self.clip = clip
        self.noise = noise
        # Stage 0 in fp32: DeepSpeed wraps nothing, and reads these two from the client optimizer.
        self._global_grad_norm: Tensor | None = None
        self.overflow = False
        self.inspect = False  # whether the next steps measure their updates, for `health`
        self._units: dict[int, FusedStep] = {}  # by the id of their first flat tensor
        self._lending = Lending()
        self._shown = Shown(self._units, self._lending, refresh=self.refresh_weights)
        self._average_decay = average_decay
        self.row_factors: Mapping[str, Tensor] = {}  # for the next step, as `scale_rows` takes them
        self._replicated = False
        self._bound: deepspeed.DeepSpeedEngine | None = None
        super().__init__(groups, defaults={})

    # Without torch's wrapper, which imports torch's compiler: that is slow.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    def bind(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Read where the shards lie, check them against the weights, plan the exchange, allocate the state.

        Raises:
            ValueError: a parameter is not covered exactly once, a shard differs from the weights, or a rule
                looks ahead where the model has no copy of the weights to hold the point.
            RuntimeError: this DeepSpeed lacks an attribute that the layout is read from.
        """
        self._replicated = engine.zero_optimization_stage() == 0
        self._bound = engine
        for rule, fragments in layout.read_layout(self.param_groups, engine):
            _require_room_for_points(rule, fragments)
            unit = FusedStep(rule, fragments, device=engine.device)
            if self._average_decay:
                start_average(unit)
            self._units[id(unit.flats[0])] = unit
            for flat, state in zip(unit.flats, unit.states, strict=True):
                self.state[flat] = state
        if engine.optimizer is not self:
            engine.optimizer.step = self._lending.ends_with(engine.optimizer.step)

    @property
    def _engine(self) -> deepspeed.DeepSpeedEngine:
        assert self._bound is not None, "bind the optimizer first"
        return self._bound

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
            with _noisy(unit, self.noise):
                unit.step(lr=group["lr"], decay=group["decay"], inspect=self.inspect)
            scale_rows(unit, self.row_factors)
            if self._average_decay:
                update_average(unit, self._average_decay)
            self._lending.lend(unit.fragments)

    def _clip_replicated(self, masters: list[Tensor]) -> bool:
        """Stage 0: clip the whole gradient by its global norm. False if it is not finite."""
        gradients = [master.grad for master in masters if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm, self.overflow = norm, not torch.isfinite(norm)
        if self.clip > 0 and not self.overflow:
            torch.nn.utils.clip_grads_with_norm_(masters, self.clip, norm)
        return not self.overflow

    def set_factors(self, *, lr: float, decay: float = 1.0) -> None:
        """Set every group's learning rate to `lr` times its peak, and its weight decay to `decay` times."""
        for group in self.param_groups:
            group["lr"], group["decay"] = lr * group["peak_lr"], decay

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights; a step with a non-finite gradient does not count."""
        return next(iter(self._units.values())).steps

    @property
    def plans(self) -> list[OwnershipPlan]:
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

    @property
    def looks_ahead(self) -> bool:
        """Whether any rule takes gradients at another point than the weights."""
        return any(group["rule"].looks_ahead for group in self.param_groups)

    @property
    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping; inf if it was not finite."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None and isfinite(norm) else inf

    def lr(self, kind: str) -> float | None:
        """The learning rate of a kind of parameter in the last step; None if there is no such parameter."""
        groups = (group for group in self.param_groups if any(m.kind == kind for m in group["members"]))
        return next((group["lr"] for group in groups), None)

    def describe(self) -> str:
        """Who owns the matrices and what travels, as text."""
        return _describe(list(self._units.values()))

    def health(self, *, layers: bool = False) -> dict[str, Any]:
        """What the last step measured over all ranks, and the owners' imbalance of FLOPs; collective.

        Keys: "imbalance" and those of `health.over_all_ranks`; "layers" if asked for, of each matrix.
        """
        imbalance = max((plan.imbalance for plan in self.plans), default=0.0)
        steps = [unit.health for unit in self._units.values()]
        found = {"imbalance": imbalance} | health.over_all_ranks(steps, self._engine.device)
        return found | ({"layers": health.layers_of_all_ranks(steps)} if layers else {})

    def shards(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """What this rank must save: (parameter name, first element, {"master" or state name: 1-D tensor}).

        Over all ranks the shards tile every parameter exactly once, in every stage. State of whole rows
        comes from the matrix's owner; its elements are rows. All is fp32, but a point has the model's dtype.
        """
        return saved.shards(self._units.values(), replicated=self._replicated)

    @torch.no_grad()
    def load_shards(self, read: Callable[[str, str, int, int], Tensor], *, applied_steps: int) -> None:
        """Restore master weights and state, and refresh the model's weights from them.

        Args:
            read: (parameter name, tensor name, start, stop) -> 1-D fp32 tensor.
        """
        for unit in self._units.values():
            unit.steps = applied_steps
        points = saved.load(self._units.values(), read)
        self.refresh_weights()
        self._shown.write_points(points)

    def at_weights(self, *, averaged: bool = False) -> AbstractContextManager[None]:
        """As `Shown.weights`; collective."""
        return self._shown.weights(averaged=averaged)

    def refresh_weights(self) -> None:
        """Write the model's weights, in their precision and on every rank, from the fp32 masters."""
        layout.refresh_weights(self.param_groups, self._engine)


def _group(members: list[Member], rule: Rule, *, lr: float) -> dict[str, Any]:
    """DeepSpeed replaces "params" by its shards, so "members" keeps the parameters."""
    numbers = {"peak_lr": lr, "lr": lr, "decay": 1.0}
    return {"params": [member.parameter for member in members], "members": members, "rule": rule, **numbers}


def _require_room_for_points(rule: Rule, fragments: Sequence[Fragment]) -> None:
    if rule.looks_ahead and any(fragment.model is None for fragment in fragments):
        raise ValueError(
            f"{rule.name} takes gradients ahead of the weights, but here the model computes with "
            "the masters themselves, or keeps its copy on another device; use zero.stage=1 or "
            "precision=bf16, and in stage 3 zero.offload_optimizer=false"
        )


@contextmanager
def _noisy(unit: FusedStep, injected: tuple[Noise, int] | None) -> Iterator[None]:
    """A block in which the injected noise is on copies of the unit's gradients."""
    if injected is None:
        yield
        return
    noise, seed = injected
    own = [(flat, flat.grad) for flat in unit.flats]
    for flat, gradient in own:
        flat.grad = torch.zeros_like(flat) if gradient is None else gradient.clone()
    for fragment in unit.fragments:
        assert fragment.flat.grad is not None
        gradient = fragment.view(fragment.flat.grad)
        gradient += noise.sample(
            fragment.name, start=fragment.start, stop=fragment.stop, seed=seed,
            step=unit.steps // unit.rule.gradients_per_update, device=gradient.device,
        )  # fmt: skip
    yield
    for flat, gradient in own:
        flat.grad = gradient


def _describe(units: Sequence[FusedStep]) -> str:
    plans = [unit.plan for unit in units if unit.plan is not None]
    sent, least = sum(p.elements_sent for p in plans), sum(p.minimum_elements_sent for p in plans)
    bytes_sent = sum(unit.bytes_sent for unit in units)
    size = bytes_sent // sent if sent else 0

    def unused(module: Any) -> str:
        reasons = {module.unsupported(u.device, u.rule.dtype) for u in units if u.rule.whole} - {None}
        return "; ".join(sorted(f"not used, {reason}" for reason in reasons))

    slow = sorted({unit.rule.not_compiled or "" for unit in units if unit.rule.whole} - {""})
    return (
        f"  {sum(len(plan.matrices) for plan in plans)} matrices, each orthogonalised by one rank; loads "
        f"within {max((plan.imbalance for plan in plans), default=0.0):.1%} of their mean\n"
        f"  {bytes_sent:,} bytes of matrices sent per step over all ranks "
        f"(no plan sends less than {least * size:,})\n"
        f"  Triton kernels: {unused(gpu) or 'used'}\n"
        f"  compiled step (optim/kernels/native.cpp): {unused(native) or native.describe()}"
        + "".join(f"\n  passes in torch: {reason}" for reason in slow)
    )
