"""The last part of a rule: the point at which the next gradient is taken, where it is not the new weights.

The model computes with the point, and the fp32 masters hold the weights, so the point costs no state. Each
`move` writes the new weights in place with `descend`, which does w ← decay·w - factor·u, and returns the
point as a new tensor. It is elementwise. `step` is the number of this step, from 1, and `lr` its rate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from optim.directions import State

Descend = Callable[[Tensor], None]


class LookAhead(Protocol):
    """What a rule asks of its look-ahead. `state_names` are laid out as the weights."""

    @property
    def state_names(self) -> tuple[str, ...]: ...

    def move(
        self, weight: Tensor, descend: Descend, *, step: int, lr: float, state: State
    ) -> Tensor | None: ...


@dataclass(frozen=True)
class Transport:
    """Y = θ + a·(θ - θ_before), where the displacement includes the decay. https://arxiv.org/abs/2605.18528

    The papers' a is β/(1-β), with β of an average that takes the place of momentum: at β = 0.95 the point is
    19 steps ahead. LMO-IGT (https://arxiv.org/abs/2605.05577) takes its gradients there too. Compiled passes
    know this point (optim/step/fused.py).

    Attributes:
        steps: a.
        ramp_steps: over how many steps a rises from 0. Momentum that starts at zero makes
            β/(1-β)·(1-β^t) the exact factor after step t; 1/(1-β) comes close, and 0 overshoots at first
            (training/study/synthetic/problem.py measures it).
        peak_lr: if not None, a is scaled by lr/peak_lr, so that the point comes back to the weights as the
            schedule ends; EMA-Nesterov's record run scales its own look-ahead so.
    """

    steps: float
    ramp_steps: int = 0
    peak_lr: float | None = None

    state_names: ClassVar[tuple[str, ...]] = ()

    def ahead(self, step: int, *, lr: float) -> float:
        """a after this step."""
        share = 1.0 if self.peak_lr is None else lr / self.peak_lr
        return share * ramped(self.steps, step, self.ramp_steps)

    def move(self, weight: Tensor, descend: Descend, *, step: int, lr: float, state: State) -> Tensor | None:
        before, ahead = weight.clone(), self.ahead(step, lr=lr)
        descend(weight)
        return weight.add(weight - before, alpha=ahead)


@dataclass(frozen=True)
class EmaNesterov:
    """Steps from a point ahead of the weights, on their average course. https://arxiv.org/abs/2605.25395

    y = θ + b·v, the gradient's point;  θ' = (1-ηλ)y - η·scale·u;  v ← γv + (1-γ)(θ' - θ).

    `lookahead` is b: it rises from 0 over the first `ramp_steps` steps, a function of the step's number.
    `velocity_decay` is γ. The decay acts on y, from which this rule steps.
    """

    lookahead: float = 0.6
    velocity_decay: float = 0.99
    ramp_steps: int = 0

    state_names: ClassVar[tuple[str, ...]] = ("velocity",)

    def move(self, weight: Tensor, descend: Descend, *, step: int, lr: float, state: State) -> Tensor | None:
        velocity = state["velocity"]
        after = weight.add(velocity, alpha=ramped(self.lookahead, step - 1, self.ramp_steps))
        descend(after)
        velocity.lerp_(after - weight, 1 - self.velocity_decay)
        weight.copy_(after)
        return after.add_(velocity, alpha=ramped(self.lookahead, step, self.ramp_steps))


@dataclass(frozen=True)
class Previous:
    """The point behind `optim.directions.Corrected`: the weights before this step, then the weights.

    The step to an even number moves the weights and leaves the point where they were; the step to an odd
    number moves nothing but the point, to the weights.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def move(self, weight: Tensor, descend: Descend, *, step: int, lr: float, state: State) -> Tensor | None:
        if step % 2:
            return None
        before = weight.clone()
        descend(weight)
        return before


def ramped(value: float, step: int, ramp_steps: int) -> float:
    """`value`, reached linearly after `ramp_steps` steps."""
    return value * min(1.0, step / ramp_steps) if ramp_steps else value
