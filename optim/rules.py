"""Update rules: what one optimizer step does to one parameter, written once.

A rule is three functions. `direction` is elementwise, so it runs on any shard of the parameter;
`transform` needs whole matrices, and only a rule with `whole = True` has it; `apply` is elementwise again.
`step` composes them on one whole parameter: the single-process oracle. `optim.fused` runs the same three
functions on shards, with an exchange on either side of `transform`.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from optim.polar import orthogonalize

State = dict[str, Tensor]

SCALES = {
    # name: factor on an orthogonal r x c update
    "spectral": lambda rows, cols: sqrt(
        rows / cols
    ),  # unit RMS-to-RMS norm, https://arxiv.org/abs/2310.17813
    "jordan": lambda rows, cols: sqrt(max(1.0, rows / cols)),  # https://kellerjordan.github.io/posts/muon/
    "rms": lambda rows, cols: 0.2 * sqrt(max(rows, cols)),  # AdamW-like RMS, https://arxiv.org/abs/2502.16982
}


class Rule(Protocol):
    """What `optim.fused` needs of a rule. State, gradients and weights are fp32."""

    whole: ClassVar[bool]
    state_names: ClassVar[tuple[str, ...]]

    @property
    def dtype(self) -> torch.dtype:
        """In which raw updates travel and `transform` computes. Used only where `whole`."""
        ...

    def direction(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        """Update `state` in place with `gradient`; return the raw update, a new tensor. `step` is from 1."""
        ...

    def transform(self, matrices: Tensor, *, norms: Tensor) -> Tensor:
        """Map raw updates [B, r, c] to updates [B, r, c]. Called only where `whole`.

        norms: [B] fp32, the Frobenius norm of each raw update, taken before it was rounded to `dtype`.
        """
        ...

    def scale(self, rows: int, cols: int) -> float:
        """Factor on the updates of r x c matrices. Called only where `whole`."""
        ...

    def apply(self, weight: Tensor, update: Tensor, *, lr: float, scale: float = 1.0) -> None:
        """Write the new `weight` in place. `update` may be of lower precision."""
        ...


def _decay_and_subtract(
    weight: Tensor, update: Tensor, *, lr: float, scale: float, weight_decay: float
) -> None:
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)
    weight.sub_(update, alpha=lr * scale)


@dataclass(frozen=True)
class Muon:
    """Momentum, then the orthogonal factor of it, scaled. https://kellerjordan.github.io/posts/muon/

    m ← βm + (1-β)g;  u = (1-β)g + βm (Nesterov) or m;  w ← (1-ηλ)w - η·scale(r, c)·polar(u).
    """

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    method: str = "polar_express"
    update_scale: str = "spectral"
    dtype: torch.dtype = torch.bfloat16

    whole: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def direction(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum) if self.nesterov else momentum.clone()

    def transform(self, matrices: Tensor, *, norms: Tensor) -> Tensor:
        return orthogonalize(matrices, method=self.method, dtype=self.dtype, norms=norms)

    def scale(self, rows: int, cols: int) -> float:
        return SCALES[self.update_scale](rows, cols)

    def apply(self, weight: Tensor, update: Tensor, *, lr: float, scale: float = 1.0) -> None:
        _decay_and_subtract(weight, update, lr=lr, scale=scale, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, https://arxiv.org/abs/1711.05101, algorithm 2."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    whole: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def direction(self, gradient: Tensor, state: State, *, step: int) -> Tensor:
        first = state["first_moment"].lerp_(gradient, 1 - self.beta1)
        second = state["second_moment"].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = (second / (1 - self.beta2**step)).sqrt_().add_(self.eps)
        return first / (1 - self.beta1**step) / denominator

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def transform(self, matrices: Tensor, *, norms: Tensor) -> Tensor:
        raise NotImplementedError("AdamW is elementwise")

    def scale(self, rows: int, cols: int) -> float:
        return 1.0

    def apply(self, weight: Tensor, update: Tensor, *, lr: float, scale: float = 1.0) -> None:
        _decay_and_subtract(weight, update, lr=lr, scale=scale, weight_decay=self.weight_decay)


def new_state(rule: Rule, weight: Tensor) -> State:
    """Zero state for `weight`, under the rule's names: same shape, dtype and device."""
    return {name: torch.zeros_like(weight) for name in rule.state_names}


@torch.no_grad()
def step(rule: Rule, weight: Tensor, gradient: Tensor, state: State, *, lr: float, step: int) -> None:
    """One optimizer step on one whole parameter, in place: the oracle of every distributed path.

    Args:
        weight: fp32, [r, c] for a rule that needs whole matrices, else any shape.
        gradient: fp32, same shape: averaged, accumulated, unscaled and clipped.
        step: number of this step, from 1.
    """
    update = rule.direction(gradient, state, step=step)
    if not rule.whole:
        rule.apply(weight, update, lr=lr)
        return
    norm = torch.linalg.vector_norm(update, dtype=torch.float64).float()
    update = rule.transform(update.to(rule.dtype).unsqueeze(0), norms=norm.unsqueeze(0)).squeeze(0)
    rule.apply(weight, update, lr=lr, scale=rule.scale(*weight.shape))
