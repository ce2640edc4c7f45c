"""The first part of a rule: from gradients to the raw update, entry by entry, so on any shard of a parameter.

A direction is called with the gradient and the state under its `state_names`, which it updates in place. It
returns the raw update, a new tensor. All is fp32. `step` is the number of this step, from 1.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from optim.geometry import Entries

State = dict[str, Tensor]


class Direction(Protocol):
    """What a rule asks of its direction. `state_names` are laid out as the weights."""

    @property
    def state_names(self) -> tuple[str, ...]: ...

    def __call__(self, gradient: Tensor, state: State, *, step: int) -> Tensor: ...


@dataclass(frozen=True)
class Momentum:
    """m ← βm + (1-β)g;  u = (1-β)g + βm (Nesterov) or m. Compiled passes know it (optim/step/fused.py).

    m begins at 0, or with `warm_start` as the first gradient. Then transport by β/(1-β) is exact from the
    first step on: of a quadratic without noise, m is the gradient at the weights.
    """

    beta: float = 0.95
    nesterov: bool = True
    warm_start: bool = False

    state_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def beta_at(self, step: int) -> float:
        """β of this step."""
        return 0.0 if self.warm_start and step == 1 else self.beta

    def __call__(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        beta = self.beta_at(step)
        momentum = state["momentum"].lerp_(gradient, 1 - beta)
        return gradient.lerp(momentum, beta) if self.nesterov else momentum.clone()


@dataclass(frozen=True)
class Sign:
    """The sign of each entry of another direction; of NaN it is NaN."""

    of: Direction

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.of.state_names

    def __call__(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        return Entries().unit(self.of(gradient, state, step=step))


@dataclass(frozen=True)
class Adam:
    """The direction of https://arxiv.org/abs/1711.05101, algorithm 2. A compiled pass knows it."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    state_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def __call__(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        first = state["first_moment"].lerp_(gradient, 1 - self.beta1)
        second = state["second_moment"].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = (second / (1 - self.beta2**step)).sqrt_().add_(self.eps)
        return first / (1 - self.beta1**step) / denominator


@dataclass(frozen=True)
class Corrected:
    """Momentum of gradients that a second gradient corrects. https://arxiv.org/abs/2510.21800

    c = g(θ; ξ) + γ·β/(1-β)·(g(θ; ξ) - g(θ_before; ξ)), clipped to ‖c‖_F <= 1;  m ← βm + (1-β)c.

    An update takes two steps on the same batch ξ, so it counts as two gradients. The first step, an odd one,
    is given g(θ_before; ξ), keeps it and returns 0. `optim.lookahead.Previous` moves the point between the
    two. Before the second step the caller puts c in its place, by `correct` and `clip_factor`: the norm of a
    matrix is no matter of single entries.
    """

    momentum: Momentum
    strength: float = 0.025  # γ

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*self.momentum.state_names, "gradient_before")

    def correct(self, gradient: Tensor, state: State) -> Tensor:
        """In an even step: put c in the place of g(θ_before; ξ), not clipped yet, and return that place."""
        factor = self.strength * self.momentum.beta / (1 - self.momentum.beta)
        before = state["gradient_before"]
        return before.copy_(gradient.add(gradient - before, alpha=factor))

    @staticmethod
    def clip_factor(norms: Tensor) -> Tensor:
        """What c is multiplied by, for the norms of whole matrices."""
        return (1 / norms).clamp_max(1)

    def __call__(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        """In an even step `gradient` is not used: c takes its place."""
        before = state["gradient_before"]
        if step % 2:
            before.copy_(gradient)
            return torch.zeros_like(gradient)
        return self.momentum(before, state, step=step // 2)


@dataclass(frozen=True)
class Second:
    """Another direction, on the second gradient of each pair: for parameters beside those of `Corrected`."""

    of: Direction

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.of.state_names

    def __call__(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        return torch.zeros_like(gradient) if step % 2 else self.of(gradient, state, step=step // 2)
