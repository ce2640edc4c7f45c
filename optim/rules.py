"""Update rules: what one optimizer step does to one parameter, written once.

A rule is three functions. `direction` is elementwise, so it runs on any shard of the parameter;
`transform` needs whole matrices, and only a rule with `whole` has it; `apply` is elementwise again.
`step` composes them on one whole parameter: the single-process oracle. `optim.step.fused` runs the same three
functions on shards, with an exchange on either side of `transform`.

The gradient is taken at a point that `apply` returns. It is the new weights, except for rules that look
ahead of them: there the model computes with the point and the fp32 masters hold the weights, so the point
costs no state of its own.

To add a rule, follow optim/README.md, "Add an update rule".
"""

from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from optim.geometry import Entries, Norm, Schatten, parse_norm
from optim.polar import orthogonalize

State = dict[str, Tensor]

SCALES = {
    # name: factor on an orthogonal r x c update
    # Unit RMS-to-RMS norm, https://arxiv.org/abs/2310.17813
    "spectral": lambda rows, cols: sqrt(rows / cols),
    # https://kellerjordan.github.io/posts/muon/
    "jordan": lambda rows, cols: sqrt(max(1.0, rows / cols)),
    # AdamW-like RMS, https://arxiv.org/abs/2502.16982
    "rms": lambda rows, cols: 0.2 * sqrt(max(rows, cols)),
}
LINES = {"row": (-1,), "column": (-2,), "row_column": (-1, -2), "column_row": (-2, -1)}  # Muon+: in turn


class Finish(NamedTuple):
    """The end of a step in three numbers: w' ← decay·w - factor·u, and the point is w' + ahead·(w' - w)."""

    decay: float
    factor: float
    ahead: float


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule in three functions, and what `optim.step` asks of it. State, gradients and weights are fp32.

    Attributes:
        dtype: in which raw updates travel and `transform` computes. Used only where `whole`.
        whole: the rule needs whole matrices.
        orthogonal: updates of whole matrices are meant to be orthogonal, or nearly so.
        looks_ahead: `apply` may return another point than the weights.
        in_kernels: `direction` is MomentumRule's or AdamW's, and `finish` says all of `apply`. False for a
            class that overrides one of them, unless that class sets it.
        state_names: laid out as the weights.
        row_state_names: one number per row of a whole matrix, kept by its owner.
    """

    weight_decay: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    whole: ClassVar[bool] = False
    orthogonal: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    in_kernels: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()
    row_state_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        asked = {"direction", "apply", "in_kernels"}
        nearest = next(vars(base) for base in cls.__mro__ if asked & vars(base).keys())
        if "in_kernels" not in nearest:
            cls.in_kernels = False  # the compiled passes would ignore what this class or a mixin overrides

    def direction(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        """Update `state` in place with `gradient`; return the raw update, a new tensor. `step` is from 1."""
        raise NotImplementedError

    def transform(self, matrices: Tensor, *, norms: Tensor, rows: State | None = None) -> Tensor:
        """Map raw updates [B, r, c], which may be overwritten, to updates [B, r, c]. Only where `whole`.

        Args:
            norms: [B] fp32, the Frobenius norm of each raw update, taken before it was rounded to `dtype`.
            rows: the state of `row_state_names`, [B, r] each; updated in place.
        """
        raise NotImplementedError(f"{type(self).__name__} is elementwise")

    def scale(self, rows: int, cols: int) -> float:
        """Factor on the updates of an r x c parameter; a vector of n is n x 1."""
        return 1.0

    def finish(self, *, lr: float, scale: float, step: int) -> Finish:
        """The numbers of this step's end, from which `apply` and the kernels compute it."""
        return Finish(1 - lr * self.weight_decay, lr * scale, 0.0)

    def apply(
        self, weight: Tensor, update: Tensor, *, lr: float, scale: float = 1.0, step: int = 1, state: State
    ) -> Tensor | None:
        """Write the new `weight` in place: w ← (1-ηλ)w - η·scale·u. `update` may be of lower precision.

        Returns the point at which the next gradient is to be taken; None if that is the new weight.
        """
        decay, factor, ahead = self.finish(lr=lr, scale=scale, step=step)
        before = weight.clone() if ahead else None
        if decay != 1:
            weight.mul_(decay)
        weight.sub_(update, alpha=factor)
        return None if before is None else weight.add(weight - before, alpha=ahead)


@dataclass(frozen=True)
class MomentumRule(Rule):
    """m ← βm + (1-β)g;  u = (1-β)g + βm (Nesterov) or m."""

    momentum: float = 0.95
    nesterov: bool = True

    state_names: ClassVar[tuple[str, ...]] = ("momentum",)
    in_kernels: ClassVar[bool] = True

    def direction(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum) if self.nesterov else momentum.clone()


@dataclass(frozen=True)
class Muon(MomentumRule):
    """Momentum, then the orthogonal factor of it, scaled. https://kellerjordan.github.io/posts/muon/"""

    method: str = "polar_express"
    update_scale: str = "spectral"

    whole: ClassVar[bool] = True
    orthogonal: ClassVar[bool] = True

    def transform(self, matrices: Tensor, *, norms: Tensor, rows: State | None = None) -> Tensor:
        return orthogonalize(matrices, method=self.method, dtype=self.dtype, norms=norms, overwrite=True)

    def scale(self, rows: int, cols: int) -> float:
        return SCALES[self.update_scale](rows, cols)


@dataclass(frozen=True)
class NorMuon(Muon):
    """Muon whose rows (neurons) are each divided by the RMS of their past. https://arxiv.org/abs/2510.05491

    With O orthogonal: v ← β₂v + (1-β₂)·mean over columns of O²;  Ô = O / (√v + ε). Then Ô gets back the
    Frobenius norm √min(r, c) of an orthogonal matrix, so that scales mean what they mean for Muon; with
    "rms" the step is the paper's 0.2·η·√(rc) / ‖Ô‖_F.
    """

    update_scale: str = "rms"
    beta2: float = 0.95
    eps: float = 1e-10

    row_state_names: ClassVar[tuple[str, ...]] = ("row_second_moment",)

    def transform(self, matrices: Tensor, *, norms: Tensor, rows: State | None = None) -> Tensor:
        assert rows is not None
        update = super().transform(matrices, norms=norms).float()
        second = rows["row_second_moment"].lerp_(update.square().mean(-1), 1 - self.beta2)
        return _as_long_as_orthogonal(update / second.sqrt().add_(self.eps)[..., None]).to(self.dtype)


@dataclass(frozen=True)
class MuonPlus(Muon):
    """Muon whose rows, columns or both in turn get length one after it. https://arxiv.org/abs/2602.21545

    The result gets back the Frobenius norm √min(r, c) of an orthogonal matrix (our convention), so that
    scales mean what they mean for Muon. `lines` is a name in LINES.
    """

    lines: str = "row"

    def transform(self, matrices: Tensor, *, norms: Tensor, rows: State | None = None) -> Tensor:
        update = super().transform(matrices, norms=norms).float()
        for dim in LINES[self.lines]:
            lengths = torch.linalg.vector_norm(update, dim=dim, keepdim=True)
            update = update / torch.where(lengths == 0, 1, lengths)
        return _as_long_as_orthogonal(update).to(self.dtype)


def _as_long_as_orthogonal(update: Tensor) -> Tensor:
    """[B, r, c] with Frobenius norms √min(r, c); zero matrices stay zero."""
    lengths = torch.linalg.matrix_norm(update, keepdim=True)
    return update * (min(update.shape[-2:]) ** 0.5 / torch.where(lengths == 0, 1, lengths))


@dataclass(frozen=True)
class EmaNesterov(Muon):
    """Muon that steps from a point ahead of the weights, on their average course. arXiv 2605.25395

    y = θ + b·v, the gradient's point;  θ' = (1-ηλ)y - η·scale·polar(u);  v ← γv + (1-γ)(θ' - θ).

    `lookahead` is b, `velocity_decay` γ. The former rises from 0 over the first `ramp_steps` steps, so that
    the point is a function of the step's number. The decay acts on y, from which this rule steps.
    """

    lookahead: float = 0.6
    velocity_decay: float = 0.99
    ramp_steps: int = 0

    state_names: ClassVar[tuple[str, ...]] = ("momentum", "velocity")

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        return self.lookahead > 0

    def apply(
        self, weight: Tensor, update: Tensor, *, lr: float, scale: float = 1.0, step: int = 1, state: State
    ) -> Tensor | None:
        velocity, (decay, factor, _) = state["velocity"], self.finish(lr=lr, scale=scale, step=step)
        after = weight.add(velocity, alpha=_ramped(self.lookahead, step - 1, self.ramp_steps))
        after.mul_(decay).sub_(update, alpha=factor)
        velocity.lerp_(after - weight, 1 - self.velocity_decay)
        weight.copy_(after)
        return after.add_(velocity, alpha=_ramped(self.lookahead, step, self.ramp_steps))


@dataclass(frozen=True)
class Scion(MomentumRule):
    """Momentum, then the norm's linear minimisation oracle. https://arxiv.org/abs/2502.07529

    m ← βm + (1-β)g;  w ← (1-η)w + η·ρ·lmo(m) (constrained: w stays in the ball of radius ρ, if it began
    there) or w ← (1-ηλ)w + η·ρ·lmo(m) (unconstrained). With gradients averaged over a batch this is Batched
    Scion (arXiv 2605.18528).

    Attributes:
        norm: as `optim.geometry.parse_norm` takes it; `method` finds the directions of a spectral one.
        radius: ρ, in the norm's own units.
    """

    nesterov: bool = False
    norm: str = "spectral"
    method: str | None = "polar_express"
    radius: float = 1.0
    constrained: bool = False

    in_kernels: ClassVar[bool] = True  # where it needs whole matrices, `direction` is MomentumRule's

    @cached_property
    def geometry(self) -> Norm:
        """The norm itself. Raises ValueError for an unknown name."""
        return parse_norm(self.norm, method=self.method)

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return not isinstance(self.geometry.ball, Entries)  # a sign needs no other entry

    @property
    def orthogonal(self) -> bool:  # type: ignore[override]
        return isinstance(self.geometry.ball, Schatten) and self.geometry.ball.p == inf

    def direction(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        update = super().direction(gradient, state, step=step)
        return update if self.whole else self.geometry.unit(update)

    def transform(self, matrices: Tensor, *, norms: Tensor, rows: State | None = None) -> Tensor:
        return self.geometry.unit(matrices, norms=norms)

    def scale(self, rows: int, cols: int) -> float:
        return self.radius * self.geometry.radius(rows, cols)

    def finish(self, *, lr: float, scale: float, step: int) -> Finish:
        decay = 1.0 if self.constrained else self.weight_decay
        return Finish(1 - lr * decay, lr * scale, 0.0)


@dataclass(frozen=True)
class TransportedScion(Scion):
    """Scion with its gradients taken at a point ahead of the weights. arXiv 2605.18528

    Y_t = θ_t + c·β/(1-β)·(θ_t - θ_{t-1}). The displacement is what the step did to the weights, **its decay
    included**. With c = 0 this is Scion, bit for bit.

    Attributes:
        transport: c. At β = 0.95 the paper's c = 1 looks 19 steps ahead.
        cap: the largest c·β/(1-β), in steps.
        ramp_steps: over how many steps the factor rises from 0. Momentum that starts at zero makes
            β/(1-β)·(1-β^t) the exact factor after step t; 1/(1-β) comes close, and 0 overshoots at first
            (training/study/synthetic/problem.py measures it).
    """

    transport: float = 1.0
    cap: float = inf
    ramp_steps: int = 0

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        return self.transport > 0 and self.cap > 0 and self.momentum > 0

    def finish(self, *, lr: float, scale: float, step: int) -> Finish:
        ahead = min(self.transport * self.momentum / (1 - self.momentum), self.cap)
        plain = super().finish(lr=lr, scale=scale, step=step)
        return plain._replace(ahead=_ramped(ahead, step, self.ramp_steps))


def _ramped(value: float, step: int, ramp_steps: int) -> float:
    """`value`, reached linearly after `ramp_steps` steps."""
    return value * min(1.0, step / ramp_steps) if ramp_steps else value


@dataclass(frozen=True)
class Sgd(MomentumRule):
    """Stochastic gradient descent with an average for momentum: u = m as it is."""

    nesterov: bool = False


@dataclass(frozen=True)
class Signum(Sgd):
    """The sign of the momentum. https://arxiv.org/abs/1802.04434"""

    def direction(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        return super().direction(gradient, state, step=step).sign_()


@dataclass(frozen=True)
class AdamW(Rule):
    """Adam with decoupled weight decay, https://arxiv.org/abs/1711.05101, algorithm 2."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    state_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")
    in_kernels: ClassVar[bool] = True

    def direction(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        first = state["first_moment"].lerp_(gradient, 1 - self.beta1)
        second = state["second_moment"].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = (second / (1 - self.beta2**step)).sqrt_().add_(self.eps)
        return first / (1 - self.beta1**step) / denominator


def new_state(rule: Rule, weight: Tensor, *, num_rows: int = 0) -> State:
    """Zero state under the rule's names: of the weight's shape, dtype and device.

    num_rows: of a whole matrix, for the state that has one number per row, [num_rows].
    """
    state = {name: torch.zeros_like(weight) for name in rule.state_names}
    if num_rows:
        state |= {name: weight.new_zeros(num_rows) for name in rule.row_state_names}
    return state


@torch.no_grad()
def step(rule: Rule, weight: Tensor, gradient: Tensor, state: State, *, lr: float, step: int) -> Tensor:
    """One optimizer step on one whole parameter, in place: the oracle of every distributed path.

    Args:
        weight: fp32, [r, c] for a rule that needs whole matrices, else any shape.
        gradient: fp32, same shape: averaged, accumulated, unscaled and clipped.
        step: number of this step, from 1.

    Returns:
        The point at which the next gradient is to be taken; `weight` itself unless the rule looks ahead.
    """
    update = rule.direction(gradient, state, step=step)
    if rule.whole:
        norm = torch.linalg.vector_norm(update, dtype=torch.float64).float()
        rows = {name: state[name].unsqueeze(0) for name in rule.row_state_names}
        update = update.to(rule.dtype).unsqueeze(0)
        update = rule.transform(update, norms=norm.unsqueeze(0), rows=rows).squeeze(0)
    scale = rule.scale(*(weight.shape if weight.dim() == 2 else (weight.numel(), 1)))
    point = rule.apply(weight, update, lr=lr, scale=scale, step=step, state=state)
    return weight if point is None else point
