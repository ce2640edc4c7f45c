"""Update rules: what one optimizer step does to one parameter, each written once, as a composition.

    direction  gradients to the raw update: momentum, Adam            entry by entry   directions.py
    stages     polar factor, unit of a norm, lines normalised         whole matrices   stages.py
    scale      a factor by the matrix's shape, and the end of the step: decay, w ← decay·w - factor·u
    ahead      where the next gradient is taken, if not at w          entry by entry   lookahead.py

`step` does all of it to one whole parameter: the single-process oracle. `optim.step.fused` runs the same
parts on shards, with an exchange on either side of the stages.

To add a rule, follow optim/README.md, "Add an update rule".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from optim.cost import NUM_ITERATIONS
from optim.directions import Adam, Corrected, Direction, Momentum, Second, Sign, State
from optim.geometry import Entries, Schatten, parse_norm
from optim.lookahead import EmaNesterov, LookAhead, Previous, Transport
from optim.stages import Aurora, EqualLines, Given, LineMoments, Polar, Stage, Unit

SCALES = {
    # name: factor on an orthogonal r x c update
    # Unit RMS-to-RMS norm, https://arxiv.org/abs/2310.17813
    "spectral": lambda rows, cols: sqrt(rows / cols),
    # https://kellerjordan.github.io/posts/muon/
    "jordan": lambda rows, cols: sqrt(max(1.0, rows / cols)),
    # AdamW-like RMS, https://arxiv.org/abs/2502.16982
    "rms": lambda rows, cols: 0.2 * sqrt(max(rows, cols)),
    # The update as it is: https://arxiv.org/abs/2609.39114, Eq. (4.1)
    "none": lambda rows, cols: 1.0,
}


class Finish(NamedTuple):
    """The end of a step in three numbers: w' ← decay·w - factor·u, and the point is w' + ahead·(w' - w)."""

    decay: float
    factor: float
    ahead: float


@final
@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one step does to a parameter. State, gradients and weights are fp32.

    Attributes:
        name: as a configuration names it, for messages.
        scale: (rows, columns) -> factor on the update; a vector of n is n x 1.
        weight_decay: decoupled, λ: w ← (1-ηλ)w.
        cautious: the decay acts only on entries whose sign is that of the update: those that it moves
            towards zero anyway. https://arxiv.org/abs/2510.12402
        dtype: in which raw updates travel and the stages multiply. Used only where `whole`.
    """

    name: str
    direction: Direction
    stages: tuple[Stage, ...] = ()
    scale: Callable[[int, int], float] = SCALES["none"]
    ahead: LookAhead | None = None
    weight_decay: float = 0.0
    cautious: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def whole(self) -> bool:
        """Whether it needs whole matrices."""
        return bool(self.stages)

    @property
    def orthogonal(self) -> bool:
        """Whether updates of whole matrices are meant to be orthogonal, or nearly so."""
        return any(isinstance(stage, Polar | Aurora) for stage in self.stages)

    def polar_steps(self, rows: int, cols: int) -> tuple[int, ...]:
        """Iterations of each orthogonalisation of an r x c matrix. Another norm's minimiser counts as one."""
        for stage in self.stages:
            if isinstance(stage, Polar):
                return (stage.num_steps,)
            if isinstance(stage, Aurora):
                return (stage.polar.num_steps,) * stage.num_polars(rows, cols)
        return (NUM_ITERATIONS,)

    @property
    def looks_ahead(self) -> bool:
        """Whether `apply` may return another point than the weights."""
        return self.ahead is not None

    @property
    def gradients_per_update(self) -> int:
        """Steps, each with a gradient of the same batch, that one update takes."""
        return 2 if isinstance(self.ahead, Previous) else 1

    def moves(self, step: int) -> bool:
        """Whether this step moves the weights; if not, the stages have nothing to do."""
        return step % self.gradients_per_update == 0

    @property
    def not_compiled(self) -> str | None:
        """Why the compiled passes do not know this rule, in a few words; None: they do."""
        if type(self.direction) not in (Momentum, Adam):
            return f"{self.name}'s direction is no plain momentum"
        if self.ahead is not None and type(self.ahead) is not Transport:
            return f"{self.name} looks ahead by more than a displacement"
        return "cautious weight decay asks for the sign of each entry" if self.cautious else None

    @property
    def state_names(self) -> tuple[str, ...]:
        """State that is laid out as the weights."""
        return (*self.direction.state_names, *(self.ahead.state_names if self.ahead else ()))

    @property
    def line_state_names(self) -> tuple[str, ...]:
        """State with one number per line of a whole matrix, kept by its owner."""
        return tuple(name for stage in self.stages for name in stage.line_state_names)

    def num_lines(self, rows: int, cols: int) -> int:
        """Numbers in each such state of an r x c matrix."""
        return sum(stage.num_lines(rows, cols) for stage in self.stages)

    def transform(self, matrices: Tensor, *, norms: Tensor, lines: State | None = None) -> Tensor:
        """Map raw updates [B, r, c], which may be overwritten, to updates [B, r, c]. Only where `whole`.

        Args:
            norms: [B] fp32, the Frobenius norm of each raw update, taken before it was rounded to `dtype`.
            lines: the state of `line_state_names`, [B, lines] each; updated in place.
        """
        assert self.whole, f"{self.name} is elementwise"
        given = Given(norms, self.dtype, lines or {})
        for stage in self.stages:
            matrices, given = stage(matrices, given), given._replace(norms=None)
        return matrices.to(self.dtype)

    def finish(self, *, lr: float, scale: float, step: int, decay: float = 1.0) -> Finish:
        """The numbers of this step's end, from which `apply` and the compiled passes compute it.

        decay: a schedule's factor on `weight_decay`.
        """
        ahead = self.ahead.ahead(step, lr=lr) if isinstance(self.ahead, Transport) else 0.0
        return Finish(1 - lr * (self.weight_decay * decay), lr * scale, ahead)

    def apply(
        self, weight: Tensor, update: Tensor, *, lr: float, scale: float = 1.0, step: int = 1,
        decay: float = 1.0, state: State,
    ) -> Tensor | None:  # fmt: skip
        """Write the new `weight` in place: w ← (1-ηλ)w - η·scale·u. `update` may be of lower precision.

        Returns the point at which the next gradient is to be taken; None if that is the new weight.
        """
        end = self.finish(lr=lr, scale=scale, step=step, decay=decay)

        def descend(weight: Tensor) -> None:
            if end.decay != 1:
                weight.mul_(torch.where(update * weight < 0, 1.0, end.decay) if self.cautious else end.decay)
            weight.sub_(update, alpha=end.factor)

        if self.ahead is not None:
            return self.ahead.move(weight, descend, step=step, lr=lr, state=state)
        descend(weight)
        return None


def muon(
    *, momentum: float = 0.95, nesterov: bool = True, method: str = "polar_express",
    polar_steps: int = 5, update_scale: str = "spectral", **common: Any,
) -> Rule:  # fmt: skip
    """Momentum, then the orthogonal factor of it, scaled. https://kellerjordan.github.io/posts/muon/

    Args:
        method, polar_steps: as `optim.stages.Polar` takes them.
        update_scale: a name in SCALES.
        common: fields of `Rule`.
    """
    return Rule(
        **{"name": "muon"} | common, direction=Momentum(momentum, nesterov),
        stages=(Polar(method, polar_steps),), scale=SCALES[update_scale],
    )  # fmt: skip


def normuon(
    *, lines: str = "row", beta2: float = 0.95, alpha: float = 1e-10, divisor: str = "sqrt_plus",
    length: str = "full", **options: Any,
) -> Rule:  # fmt: skip
    """Muon whose rows, columns or lines along the larger dimension are levelled by their past.

    https://arxiv.org/abs/2510.05491; https://arxiv.org/abs/2609.39114: Algorithm 1 with nesterov=False; Eq.
    (4.1) with length="kept" and update_scale="none". The arguments are those of `optim.stages.LineMoments`.
    """
    plain = muon(**{"name": "normuon", "update_scale": "rms"} | options)
    return replace(plain, stages=(*plain.stages, LineMoments(lines, beta2, alpha, divisor, length)))


def muon_plus(*, lines: str = "row", **options: Any) -> Rule:
    """Muon whose rows, columns or both in turn get length one after it. https://arxiv.org/abs/2602.21545"""
    plain = muon(**{"name": "muon_plus"} | options)
    return replace(plain, stages=(*plain.stages, EqualLines(lines)))


def muon_eq(*, lines: str = "row", **options: Any) -> Rule:
    """Muon whose rows (MuonEq-R) get length one before it. https://arxiv.org/abs/2603.28254"""
    plain = muon(**{"name": "muon_eq"} | options)
    return replace(plain, stages=(EqualLines(lines, lengthened=False), *plain.stages))


def aurora(*, lines: str = "row", iterations: int = 2, **options: Any) -> Rule:
    """Muon with a polar factor of even rows, where a matrix is tall. https://arxiv.org/abs/2606.27715"""
    plain = muon(**{"name": "aurora"} | options)
    [polar] = plain.stages
    assert isinstance(polar, Polar)
    return replace(plain, stages=(Aurora(polar, iterations, lines),))


def mars(*, strength: float = 0.025, **options: Any) -> Rule:
    """Muon of gradients corrected by a second one: two gradients an update. arXiv 2510.21800 (MARS-M)"""
    plain = muon(**{"name": "mars"} | options)
    assert isinstance(plain.direction, Momentum)
    return replace(plain, direction=Corrected(plain.direction, strength), ahead=Previous())


def paired(rule: Rule) -> Rule:
    """The rule beside `mars`: it moves in every second step, and its point waits as that of `mars` does.

    Raises:
        ValueError: the rule looks ahead by itself.
    """
    if rule.ahead is not None:
        raise ValueError(f"{rule.name}: looks ahead, which it cannot beside mars")
    return replace(rule, direction=Second(rule.direction), ahead=Previous())


def scion(
    *, momentum: float = 0.95, nesterov: bool = False, norm: str = "spectral",
    method: str = "polar_express", polar_steps: int = 5, radius: float = 1.0,
    constrained: bool = False, weight_decay: float = 0.0, **common: Any,
) -> Rule:  # fmt: skip
    """Momentum, then the norm's linear minimisation oracle. https://arxiv.org/abs/2502.07529

    m ← βm + (1-β)g;  w ← (1-η)w + η·ρ·lmo(m) (constrained: w stays in the ball of radius ρ, if it began
    there) or w ← (1-ηλ)w + η·ρ·lmo(m) (unconstrained). With gradients averaged over a batch this is Batched
    Scion (arXiv 2605.18528).

    Args:
        norm: as `optim.geometry.parse_norm` takes it; `method` finds the directions of a spectral one.
        radius: ρ, in the norm's own units.

    Raises:
        ValueError: an unknown norm.
    """
    geometry, direction = parse_norm(norm), Momentum(momentum, nesterov)
    stage = Polar(method, polar_steps) if geometry.ball == Schatten(inf) else Unit(geometry.ball)
    of_entries = isinstance(geometry.ball, Entries)  # a sign needs no other entry
    return Rule(
        **{"name": "scion"} | common, direction=Sign(direction) if of_entries else direction,
        stages=() if of_entries else (stage,), weight_decay=1.0 if constrained else weight_decay,
        scale=lambda rows, cols: radius * geometry.radius(rows, cols),
    )  # fmt: skip


def warm_started(rule: Rule) -> Rule:
    """The rule with momentum that begins as the first gradient: `optim.directions.Momentum`.

    Raises:
        ValueError: the rule has no momentum.
    """

    def begun(direction: Direction) -> Direction:
        if isinstance(direction, Momentum):
            return replace(direction, warm_start=True)
        if isinstance(direction, Sign):
            return replace(direction, of=begun(direction.of))
        if isinstance(direction, Corrected):
            return replace(direction, momentum=replace(direction.momentum, warm_start=True))
        raise ValueError(f"{rule.name}: has no momentum that could begin as the first gradient")

    return replace(rule, direction=begun(rule.direction))


def transported(
    rule: Rule, *, transport: float = 1.0, cap: float = inf, ramp_steps: int = 0, peak_lr: float | None = None
) -> Rule:
    """The rule with its gradients taken c·β/(1-β) steps ahead of the weights. arXiv 2605.18528

    With c = 0 it is the rule itself. Of `scion` this is Transported Scion; of `muon` without Nesterov, and
    no cap, Muon-IGT (arXiv 2605.05577).

    Args:
        transport: c.
        cap: the most steps ahead.
        ramp_steps, peak_lr: as `optim.lookahead.Transport` takes them.

    Raises:
        ValueError: the rule has no momentum, or looks ahead already.
    """
    momentum = rule.direction.of if isinstance(rule.direction, Sign) else rule.direction
    if not isinstance(momentum, Momentum) or rule.ahead is not None:
        raise ValueError(f"{rule.name}: transport is for rules with momentum that do not look ahead already")
    steps = min(transport * momentum.beta / (1 - momentum.beta), cap)
    return replace(rule, ahead=Transport(steps, ramp_steps, peak_lr)) if steps > 0 else rule


def ema_nesterov(
    rule: Rule, *, lookahead: float = 0.6, velocity_decay: float = 0.99, ramp_steps: int = 0
) -> Rule:
    """The rule from a point ahead of the weights, on their average course: `optim.lookahead.EmaNesterov`.

    Raises:
        ValueError: the rule looks ahead already.
    """
    if rule.ahead is not None:
        raise ValueError(f"{rule.name}: looks ahead already")
    return replace(rule, ahead=EmaNesterov(lookahead, velocity_decay, ramp_steps)) if lookahead > 0 else rule


def sgd(*, momentum: float = 0.95, **common: Any) -> Rule:
    """Stochastic gradient descent with an average for momentum: u = m as it is."""
    return Rule(**{"name": "sgd"} | common, direction=Momentum(momentum, nesterov=False))


def signum(*, momentum: float = 0.95, **common: Any) -> Rule:
    """The sign of the momentum. https://arxiv.org/abs/1802.04434"""
    return Rule(**{"name": "signum"} | common, direction=Sign(Momentum(momentum, nesterov=False)))


def adamw(*, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, **common: Any) -> Rule:
    """Adam with decoupled weight decay, https://arxiv.org/abs/1711.05101, algorithm 2."""
    return Rule(**{"name": "adamw"} | common, direction=Adam(beta1, beta2, eps))


def new_state(rule: Rule, weight: Tensor, *, num_lines: int = 0) -> State:
    """Zero state under the rule's names: of the weight's shape, dtype and device.

    num_lines: of whole matrices (`Rule.num_lines`), for the state with one number per line, [num_lines].
    """
    state = {name: torch.zeros_like(weight) for name in rule.state_names}
    if num_lines:
        state |= {name: weight.new_zeros(num_lines) for name in rule.line_state_names}
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
    if isinstance(rule.direction, Corrected) and rule.moves(step):
        corrected = rule.direction.correct(gradient, state)
        corrected *= rule.direction.clip_factor(torch.linalg.vector_norm(corrected, dtype=torch.float64))
    update = rule.direction(gradient, state, step=step)
    if rule.whole and rule.moves(step):
        norm = torch.linalg.vector_norm(update, dtype=torch.float64).float()
        lines = {name: state[name].unsqueeze(0) for name in rule.line_state_names}
        update = update.to(rule.dtype).unsqueeze(0)
        update = rule.transform(update, norms=norm.unsqueeze(0), lines=lines).squeeze(0)
    scale = rule.scale(*(weight.shape if weight.dim() == 2 else (weight.numel(), 1)))
    point = rule.apply(weight, update, lr=lr, scale=scale, step=step, state=state)
    return weight if point is None else point
