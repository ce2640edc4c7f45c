"""Convergence rates on a synthetic matrix problem, beside those of the theory: `run_synthetic`.

**Theory** (Zhang & Lin, https://arxiv.org/abs/2605.18528; known to us are its abstract and its update
rules). Noise has a bounded p-th moment, p in (1, 2]. Until the mean dual norm of the gradient is ε, Batched
Scion takes ε^-(3p-2)/(p-1) gradients, and Transported Scion ε^-(5p-3)/(2p-2) if the Hessian is Lipschitz.
Parameters that reach this follow from the descent lemma, as in Cutkosky and Mehta
(https://arxiv.org/abs/2002.03305) for p = 2 and the Euclidean norm. With a = 1-β, e_t = m_t - ∇F(θ_t), Δ =
F(θ_0) - min F and steps of length η:

    mean over t < T of ‖∇F(θ_t)‖_* <= Δ/(ηT) + 2·mean ‖e_t‖_* + Lη/2
    Batched:      ‖e‖_* ~ Lη/a + σ_* a^((p-1)/p)       the average lags 1/a steps behind
    Transported:  ‖e‖_* ~ ρ(η/a)² + σ_* a^((p-1)/p)    the lag cancels to first order

(and σ_*/(aT), of lower order). Equal terms give, for a run of T gradients,

    Batched:      a ~ T^-p/(3p-2)    η ~ T^-(2p-1)/(3p-2)    ε ~ T^-(p-1)/(3p-2)
    Transported:  a ~ T^-2p/(5p-3)   η ~ T^-(3p-1)/(5p-3)    ε ~ T^-(2p-2)/(5p-3)

Scion at Transported's parameters keeps its lag, Lη/a ~ T^-(p-1)/(5p-3), half of that exponent: the control.

**Problem.** F(X) = δ² Σ log cosh(X_ij/δ), ∇F = δ tanh(X/δ): convex, flat far out, and quadratic around its
only minimum, 0. Per entry |h''| <= 1 and |h'''| <= 4/(3√3 δ). Let ‖·‖ be the largest singular value and n =
min(r, c). Then ‖D‖_F² <= n‖D‖² and |D_ij| <= ‖D‖, hence

    |∇²F[D, E]| <= ‖D‖_F ‖E‖_F <= n ‖D‖ ‖E‖                            L = n
    |∇³F[D, E, G]| <= max|h'''| max|G_ij| ‖D‖_F ‖E‖_F                  ρ = 4n / (3√3 δ)

Both are attained, by D = E = G = [I 0].

**Noise** of `optim.noise` on each entry, its tail index `tail_margin` above p. Symmetric noise is no
adversary of a method that normalises: one noisy gradient points right more often than wrong, and averages
bring nothing but lag. By default it is therefore ±(|ξ| - E|ξ|), with signs fixed by the seed: most draws
mislead a little, the rare large ones make up for it, and only an average of many gradients is right. Its
p-th moment is at most 2^(2-p) scale^p, because taking the mean off has norm 1 in L², 2 in L¹ and 2^(2/p-1)
in between (Riesz and Thorin). As ‖Z‖_* <= √n ‖Z‖_F, σ_* <= √n (rc)^(1/p) 2^(2/p-1) scale. So close to the
tail index, much of the moment lies in values rarer than any run draws (see `Noise.sample`).

**Tuning.** The constants of a and η are found once, at the tuning horizon and on streams of its own, from
one grid for both rules. Averages of fewer than `shortest_average` gradients, 1/a, are tried and shown but
not taken: the theory lets a → 0, and without an average there is nothing to transport. "Scion, any average"
may take them, and shows what a practitioner loses by the theory.

**What slopes can show.** F is convex, so the mean of all iterates is at least (F(θ_0) - F(θ_T)) / (ηT),
which falls as the theory says whatever the noise. A slope can be shallower than that, where lag or noise
fall more slowly, but not steeper in the long run. The mean of the later half is free of this way down.
Neither says what the best parameters of each horizon would reach: around its minimum F is strongly convex.
Intervals are bootstrapped over seeds, each with its own start, signs and noise. They hold no error of the
power law; the slope over the longer half of the horizons shows how much that bends.

**Transport from zero momentum**, as `optim.rules.new_state` gives it, is exact with β/(1-β)·(1-β^t) after
step t: the weighted mean of all points is then θ_t. The full factor from the first step on overshoots for
1/a steps; `ramp_steps` = 1/a, used here, comes close to the exact one. It matters: at T = 512 and p = 2,
averages of 256 end at a mean dual norm of 2.1 with it and of 6.8 without, where Scion has 6.2.

**Found** with the defaults (`describe` prints current numbers): slopes at p = 2 and 1.5 are -0.256 and
-0.223 for Transported, -0.206 and -0.175 for Batched, -0.187 and -0.153 for the control: the order that the
theory predicts. What speaks against it:

- Gains are those of long averages. Against Scion that may average a single gradient, Transported ends 18%
  lower at p = 2 and 7% higher at p = 1.5.
- With `skewed=false` Scion is best with no average at all; at p = 1.5 Transported ends 17% above that.
- With `scale=5 width=2` noise rules. Batched comes closer to its theory, -0.226 and -0.190; Transported has
  -0.200 and -0.190 and gains nothing (ratios 1.06 and 1.00). The noise of an average moves the weights by
  η/a in one direction, so they settle near √(Lη/a · σ_* a^((p-1)/p)). With Transported's parameters this
  falls three quarters as fast as ε, until the lag Lη/a exceeds the noise; before, transport has nothing to
  win.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from training.study.synthetic.config import SyntheticConfig

if TYPE_CHECKING:  # the report is written without torch
    from torch import Tensor

    from optim.noise import Noise

SPECTRAL = "spectral:plain"  # the largest singular value; its dual is the nuclear norm

# --- theory ---


class Exponents(NamedTuple):
    """Of T: 1-β ~ T^-average, η ~ T^-step, mean dual norm ~ T^-rate."""

    average: float
    step: float
    rate: float


def batched_theory(p: float) -> Exponents:
    return Exponents(p / (3 * p - 2), (2 * p - 1) / (3 * p - 2), (p - 1) / (3 * p - 2))


def transported_theory(p: float) -> Exponents:
    return Exponents(2 * p / (5 * p - 3), (3 * p - 1) / (5 * p - 3), (2 * p - 2) / (5 * p - 3))


def control_theory(p: float) -> Exponents:
    """Scion at Transported's parameters: what is left of the rate is that of its lag, Lη/(1-β)."""
    average, step, _ = transported_theory(p)
    return Exponents(average, step, step - average)


@dataclass(frozen=True)
class Contender:
    """Attributes:
    theory: p -> exponents of its parameters and its rate.
    transported: it runs Transported Scion, else Scion.
    tuned_as_transported: its constants are those of Transported Scion, else of Scion.
    any_average: it may take averages below `shortest_average`.
    """

    title: str
    theory: Callable[[float], Exponents]
    transported: bool = False
    tuned_as_transported: bool = False
    any_average: bool = False


CONTENDERS = {
    "batched": Contender("Batched Scion", batched_theory),
    "transported": Contender("Transported Scion", transported_theory, True, True),
    "control": Contender("control: Scion at Transported's parameters", control_theory, False, True),
    "any_average": Contender("Scion, any average", batched_theory, any_average=True),
}


# --- the problem ---


@dataclass(frozen=True)
class Problem:
    """F(X) = width² Σ log cosh(X/width) of matrices [..., r, c], and the constants of the module's text."""

    rows: int
    cols: int
    width: float

    @property
    def gradient_lipschitz(self) -> float:
        """L of ‖∇F(X) - ∇F(Y)‖_* <= L ‖X - Y‖, with the largest singular value and its dual."""
        return float(min(self.rows, self.cols))

    @property
    def hessian_lipschitz(self) -> float:
        """ρ of |(∇²F(X) - ∇²F(Y))[D, E]| <= ρ ‖X - Y‖ ‖D‖ ‖E‖."""
        return 4 / (3 * math.sqrt(3) * self.width) * min(self.rows, self.cols)

    def value(self, points: "Tensor") -> "Tensor":
        """[...] of [..., r, c]; log cosh x = |x| + log1p(exp(-2|x|)) - log 2, which does not overflow."""
        x = (points / self.width).abs()
        return self.width**2 * (x + (-2 * x).exp().log1p() - math.log(2)).sum((-2, -1))

    def gradient(self, points: "Tensor") -> "Tensor":
        return (points / self.width).tanh_().mul_(self.width)


def noise_of(config: SyntheticConfig, p: float) -> "Noise":
    from optim.noise import Noise

    tail = math.inf if config.noise == "gaussian" else p + config.tail_margin
    return Noise(config.noise, tail=tail, moment=p, scale=config.scale)


def noise_bound(config: SyntheticConfig, p: float) -> float:
    """σ_* with E‖noise‖_*^p <= σ_*^p."""
    spread = math.sqrt(min(config.rows, config.cols)) * (config.rows * config.cols) ** (1 / p)
    return spread * config.scale * (2 ** (2 / p - 1) if config.skewed else 1)


@dataclass(frozen=True)
class Stream:
    """One seed's start and noise, functions of (config.seed, name): the same for every rule and horizon."""

    config: SyntheticConfig
    name: str

    def _gaussian(self, what: str, scale: float) -> "Tensor":
        from optim.noise import Noise

        shape = (self.config.rows, self.config.cols)
        law, name = Noise("gaussian", scale=scale), f"{self.name}.{what}"
        return law.sample(name, start=0, stop=math.prod(shape), seed=self.config.seed, step=0).view(shape)

    def start(self) -> "Tensor":
        """θ_0, fp32 [r, c]."""
        return self._gaussian("start", self.config.distance)

    def noise(self, p: float, *, begin: int, end: int) -> "Tensor":
        """fp32 [end - begin, r, c]: the noise on the gradients of steps begin + 1 to end."""
        from optim.noise import KINDS

        law, (rows, cols) = noise_of(self.config, p), (self.config.rows, self.config.cols)
        start, stop = begin * rows * cols, end * rows * cols
        draws = law.sample(f"{self.name}.noise", start=start, stop=stop, seed=self.config.seed, step=0)
        draws = draws.view(-1, rows, cols)
        if not self.config.skewed:
            return draws
        mean = law.unit * KINDS[law.kind].moment(1.0, tail=law.tail)
        return draws.abs_().sub_(mean).mul_(self._gaussian("signs", 1.0).sign())
