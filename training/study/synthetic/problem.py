"""A matrix problem whose constants are known, its noise, and the theory's exponents for it.

**Theory** (Zhang & Lin, https://arxiv.org/abs/2605.18528; we know its abstract and its update rules). The
noise has a bounded p-th moment, p in (1, 2]. To reach a mean dual gradient norm of ε, Batched Scion needs
ε^-(3p-2)/(p-1) gradients. Transported Scion needs ε^-(5p-3)/(2p-2) if the Hessian is Lipschitz. The
parameters that reach these rates follow from the descent lemma, as in Cutkosky and Mehta
(https://arxiv.org/abs/2002.03305) for p = 2 and the Euclidean norm. With a = 1-β, e_t = m_t - ∇F(θ_t),
Δ = F(θ_0) - min F and steps of length η:

    mean over t < T of ‖∇F(θ_t)‖_* <= Δ/(ηT) + 2·mean ‖e_t‖_* + Lη/2
    Batched:      ‖e‖_* ~ Lη/a + σ_* a^((p-1)/p)       the average lags 1/a steps behind
    Transported:  ‖e‖_* ~ ρ(η/a)² + σ_* a^((p-1)/p)    the lag cancels to first order

(and σ_*/(aT), of lower order). Equal terms give, for a run of T gradients,

    Batched:      a ~ T^-p/(3p-2)    η ~ T^-(2p-1)/(3p-2)    ε ~ T^-(p-1)/(3p-2)
    Transported:  a ~ T^-2p/(5p-3)   η ~ T^-(3p-1)/(5p-3)    ε ~ T^-(2p-2)/(5p-3)

The control is Scion at Transported's parameters. It keeps its lag, Lη/a ~ T^-(p-1)/(5p-3): half of
Transported's exponent.

**Problem.** F(X) = δ² Σ log cosh(X_ij/δ), ∇F = δ tanh(X/δ). F is convex, linear far out, and quadratic
around its only minimum, 0. Per entry |h''| <= 1 and |h'''| <= 4/(3√3 δ). Let ‖·‖ be the largest singular
value and n = min(r, c). Then ‖D‖_F² <= n‖D‖² and |D_ij| <= ‖D‖, hence

    |∇²F[D, E]| <= ‖D‖_F ‖E‖_F <= n ‖D‖ ‖E‖                            L = n
    |∇³F[D, E, G]| <= max|h'''| max|G_ij| ‖D‖_F ‖E‖_F                  ρ = 4n / (3√3 δ)

D = E = G = [I 0] attains both.

**Noise** is that of `optim.noise` on each entry, with tail index p + `tail_margin`. Symmetric noise does not
hurt a method that normalises: one noisy gradient points right more often than wrong, so averages only add
lag. The default noise is therefore ±(|ξ| - E|ξ|), with signs fixed by the seed: most draws mislead a little,
the rare large ones make up for it, and only an average of many gradients is right. Its p-th moment is at most
2^(2-p) scale^p, because subtracting the mean has norm 1 in L², 2 in L¹ and 2^(2/p-1) in between
(Riesz-Thorin). As ‖Z‖_* <= √n ‖Z‖_F, σ_* <= √n (rc)^(1/p) 2^(2/p-1) scale. So close to the tail index, much
of the moment lies in values rarer than any run draws (see `Noise.sample`).
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
    """Scion at Transported's parameters: its lag Lη/(1-β) sets the rate."""
    average, step, _ = transported_theory(p)
    return Exponents(average, step, step - average)


@dataclass(frozen=True)
class ScionVariant:
    """A rule and the way its parameters are chosen.

    Attributes:
        theory: p -> exponents of its parameters and its rate.
        transported: it runs Transported Scion, else Scion.
        tuned_as_transported: its constants are those of Transported Scion, else of Scion.
        any_average: it may use averages below `shortest_average`.
    """

    title: str
    theory: Callable[[float], Exponents]
    transported: bool = False
    tuned_as_transported: bool = False
    any_average: bool = False


VARIANTS = {
    "batched": ScionVariant("Batched Scion", batched_theory),
    "transported": ScionVariant("Transported Scion", transported_theory, True, True),
    "control": ScionVariant("control: Scion at Transported's parameters", control_theory, False, True),
    "any_average": ScionVariant("Scion, any average", batched_theory, any_average=True),
}


@dataclass(frozen=True)
class Problem:
    """F(X) = width² Σ log cosh(X/width) of matrices [..., r, c], and its constants (see the module)."""

    rows: int
    cols: int
    width: float

    @property
    def gradient_lipschitz(self) -> float:
        """L of ‖∇F(X) - ∇F(Y)‖_* <= L ‖X - Y‖: the largest singular value and its dual norm."""
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
class NoiseStream:
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
