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
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cluster.config import key, require, require_choice

if TYPE_CHECKING:  # the study's configuration is read without torch
    from torch import Tensor

    from optim.noise import Noise
    from optim.rules import Scion

NOISES = ("gaussian", "student", "stable")  # of optim/noise.py
SPECTRAL = "spectral:plain"  # the largest singular value; its dual is the nuclear norm
LONGEST_AVERAGE = 256  # gradients, of the tuning grid
STEP_LENGTHS = tuple(2.0**-k for k in range(1, 7))  # η of the tuning grid, over the starting distance
NUM_POINTS = 64  # iterates at which the exact gradient is measured, evenly over a run
NOISE_STEPS = 256  # gradients of a stream drawn at a time
RESAMPLES = 4000
Report = Callable[[str], None]


@dataclass(frozen=True)
class SyntheticConfig:
    enabled: bool = key(False, "measure the convergence rates on the synthetic problem")
    rows: int = key(4, "rows of the matrix")
    cols: int = key(16, "its columns")
    width: float = key(4.0, "δ: entries below it feel a quadratic, entries above it a slope")
    distance: float = key(1.0, "RMS of the entries at the start; the minimum is at 0")
    moments: tuple[float, ...] = key((2.0, 1.5), "p: the highest finite moment of the noise, each in (1, 2]")
    horizons: tuple[int, int] = key(
        (8, 13), "shortest and longest run, in powers of two; all between are run"
    )
    tuning_horizon: int = key(9, "run at which the constants are tuned, a power of two")
    shortest_average: int = key(8, "1/(1-momentum) that tuning may take at least, a power of two")
    seeds: int = key(16, "runs of each kind, every one with its own start and noise")
    tuning_seeds: int = key(4, "the same for tuning, on other streams")
    noise: str = key("student", f"its law: {', '.join(NOISES)}")
    tail_margin: float = key(0.1, "tail index of the noise minus p; gaussian has none")
    scale: float = key(1.0, "(E|noise|^p)^(1/p) of an entry, before the skew")
    skewed: bool = key(True, "one-sided noise less its mean, under random signs; else symmetric noise")
    seed: int = key(0, "of all streams")

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            require(getattr(self, name) >= 1, f"synthetic.{name}", "must be at least 1")
        for name in ("width", "distance", "tail_margin"):
            require(0 < getattr(self, name) < math.inf, f"synthetic.{name}", "must be positive")
        require(0 <= self.scale < math.inf, "synthetic.scale", "must not be negative")
        for name in ("seeds", "tuning_seeds"):
            require(getattr(self, name) >= 2, f"synthetic.{name}", "must be at least 2")
        require(
            len(set(self.moments)) == len(self.moments) > 0, "synthetic.moments", "one or more, all different"
        )
        require(all(1 < p <= 2 for p in self.moments), "synthetic.moments", "each must lie in (1, 2]")
        ordered = len(self.horizons) == 2 and 3 <= self.horizons[0] <= self.horizons[1] - 2 <= 18
        require(
            ordered, "synthetic.horizons", "two powers from 3 to 20, at least two apart: a slope needs three"
        )
        require(4 <= self.tuning_horizon <= 20, "synthetic.tuning_horizon", "a power from 4 to 20")
        shortest = self.shortest_average
        require(
            1 <= shortest <= LONGEST_AVERAGE and shortest & (shortest - 1) == 0,
            "synthetic.shortest_average",
            f"must be a power of two up to {LONGEST_AVERAGE}",
        )
        tried = 2 * shortest <= 2**self.tuning_horizon
        require(tried, "synthetic.shortest_average", "must be at most half of the tuning horizon's gradients")
        require_choice("synthetic.noise", self.noise, NOISES)
        if self.noise == "stable":
            fits = max(self.moments) + self.tail_margin <= 2
            require(fits, "synthetic.noise", "stable has tails up to 2, but moments + tail_margin exceeds it")


def smoke(config: SyntheticConfig) -> SyntheticConfig:
    """The same in miniature, some seconds long: it shows that everything runs, not a rate."""
    return replace(
        config,
        horizons=(6, 9),
        tuning_horizon=6,
        shortest_average=min(8, config.shortest_average),
        seeds=6,
        tuning_seeds=2,
    )


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


# --- runs ---


@dataclass(frozen=True)
class Trial:
    """`num_steps` steps of a rule, for every stream at once."""

    rule: "Scion"
    lr: float
    num_steps: int
    moment: float

    @property
    def stride(self) -> int:
        """Steps from one measured iterate to the next."""
        return max(1, self.num_steps // NUM_POINTS)


def make_trial(*, transported: bool, average: float, lr: float, num_steps: int, moment: float) -> Trial:
    """average: 1/(1-β), at least 1, of one gradient a step."""
    import torch

    from optim.rules import Scion, TransportedScion

    momentum = 1 - 1 / average
    exact: dict[str, Any] = {"momentum": momentum, "norm": SPECTRAL, "method": None, "dtype": torch.float32}
    rule = TransportedScion(**exact, ramp_steps=round(average)) if transported else Scion(**exact)
    return Trial(rule, lr, num_steps, moment)


def step_together(
    trials: Sequence[Trial], weights: "Tensor", gradients: "Tensor", momenta: "Tensor", *, step: int
) -> "Tensor":
    """`optim.rules.step` for n trials of S streams each, with one decomposition call for all; the same bits.

    Args:
        weights, gradients, momenta: fp32 [n, S, r, c]; weights and momenta are updated in place.
        step: number of this step, from 1.

    Returns:
        [n, S, r, c]: the points of the next gradients.
    """
    import torch

    updates = torch.stack(
        [
            trial.rule.direction(gradient, {"momentum": momentum}, step=step)
            for trial, gradient, momentum in zip(trials, gradients, momenta, strict=True)
        ]
    )
    flat = updates.flatten(0, 1)
    norms = torch.linalg.vector_norm(flat, dim=(-2, -1), dtype=torch.float64).float()
    units = trials[0].rule.transform(flat, norms=norms).view_as(updates)  # the norm is the same in all
    points = []
    for trial, weight, unit in zip(trials, weights, units, strict=True):
        scale = trial.rule.scale(*weight.shape[-2:])
        point = trial.rule.apply(weight, unit, lr=trial.lr, scale=scale, step=step)
        points.append(weight if point is None else point)
    return torch.stack(points)


def simulate(config: SyntheticConfig, trials: Sequence[Trial], streams: Sequence[Stream]) -> "list[Tensor]":
    """The dual norm of the exact gradient at the weights of each trial: fp64 [points, S], every stride steps.

    All trials go in lock-step, the longest first in memory, so that those still running are a prefix.
    """
    import torch

    from optim.geometry import parse_norm

    problem, norm = Problem(config.rows, config.cols, config.width), parse_norm(SPECTRAL)
    order = sorted(range(len(trials)), key=lambda i: -trials[i].num_steps)
    running = [trials[i] for i in order]
    moments = sorted({trial.moment for trial in trials})
    row = torch.tensor([moments.index(trial.moment) for trial in running])
    start = torch.stack([stream.start() for stream in streams])
    weights = start.expand(len(trials), *start.shape).clone()
    points, momenta = weights.clone(), torch.zeros_like(weights)
    duals: list[list[Tensor]] = [[] for _ in trials]
    for step in range(running[0].num_steps):
        while running[-1].num_steps <= step:
            running.pop()
        n, part = len(running), step % NOISE_STEPS
        if part == 0:
            end = step + min(NOISE_STEPS, running[0].num_steps - step)
            noise = torch.stack(  # [steps, moments, S, r, c]
                [
                    torch.stack([stream.noise(p, begin=step, end=end) for stream in streams], dim=1)
                    for p in moments
                ],
                dim=1,
            )
        due = [i for i, trial in enumerate(running) if step % trial.stride == 0]
        if due:
            exact = norm.dual(problem.gradient(weights[due]).flatten(0, 1)).double().view(len(due), -1)
            for i, values in zip(due, exact, strict=True):
                duals[order[i]].append(values)
        gradients = problem.gradient(points[:n]).add_(noise[part][row[:n]])
        points = step_together(running, weights[:n], gradients, momenta[:n], step=step + 1)
    return [torch.stack(values) for values in duals]


# --- tuning ---


class Constants(NamedTuple):
    """What was best at the tuning horizon, and whether it lies on the rim of the grid."""

    average: float
    lr: float
    dual: float
    on_rim: bool


def tune(config: SyntheticConfig) -> dict[float, dict[str, Any]]:
    """Of each p: mean dual norms [averages][step lengths] of both rules, and what each contender picks."""
    import torch

    num_steps = 2**config.tuning_horizon
    averages = [2**k for k in range(LONGEST_AVERAGE.bit_length()) if 2 ** (k + 1) <= num_steps]
    lrs = [config.distance * length for length in STEP_LENGTHS]
    grid = [
        (p, moved, average, lr)
        for p in config.moments
        for moved in (False, True)
        for average in averages
        for lr in lrs
    ]
    trials = [
        make_trial(transported=moved, average=average, lr=lr, num_steps=num_steps, moment=p)
        for p, moved, average, lr in grid
    ]
    streams = [Stream(config, f"tuning{i}") for i in range(config.tuning_seeds)]
    means = torch.stack([values.mean() for values in simulate(config, trials, streams)])
    means = means.view(len(config.moments), 2, len(averages), len(lrs))
    result: dict[float, dict[str, Any]] = {}
    for p, (plain, moved) in zip(config.moments, means, strict=True):
        result[p] = {
            "averages": averages,
            "lrs": lrs,
            "batched": plain.tolist(),
            "transported": moved.tolist(),
        }
        result[p]["picks"] = {
            name: _best(
                moved if contender.tuned_as_transported else plain,
                averages,
                lrs,
                shortest=1 if contender.any_average else config.shortest_average,
            )
            for name, contender in CONTENDERS.items()
        }
        result[p]["picks"]["transported_any_average"] = _best(moved, averages, lrs, shortest=1)
    return result


def _best(duals: "Tensor", averages: Sequence[int], lrs: Sequence[float], *, shortest: int) -> Constants:
    first = averages.index(shortest)
    i, j = divmod(int(duals[first:].argmin()), len(lrs))
    shortest_taken = i == 0 and shortest > 1  # fewer than one gradient cannot be averaged
    on_rim = shortest_taken or first + i == len(averages) - 1 or j in (0, len(lrs) - 1)
    return Constants(averages[first + i], lrs[j], duals[first + i, j].item(), on_rim)


# --- slopes ---


def slopes(horizons: Sequence[int], means: np.ndarray) -> np.ndarray:
    """Least squares of log mean against log T: [...] of means [horizons, ...]."""
    x = np.log(np.asarray(horizons, dtype=float))
    x = x - x.mean()
    return np.tensordot(x, np.log(means), axes=1) / (x @ x)


def resample(num_seeds: int, *, seed: int = 0, count: int = RESAMPLES) -> np.ndarray:
    """[count, seeds] of indices, with replacement: shared by all statistics, so that these stay paired."""
    return np.random.default_rng(seed).integers(num_seeds, size=(count, num_seeds))


def with_interval(statistic: Callable[[np.ndarray], np.ndarray], draws: np.ndarray) -> list[float]:
    """[value, low, high]: of all seeds once each, and the middle 95% over the resampled ones.

    statistic: [k, seeds] of indices -> [k]. Percentile intervals of means of n seeds are about √(1 - 1/n) as
    wide as they ought to be, and then some: of 16, 92% hold the true slope and not 95%.
    """
    value = statistic(np.arange(draws.shape[1])[None])[0]
    low, high = np.quantile(statistic(draws), (0.025, 0.975))
    return [float(value), float(low), float(high)]


def slope_with_interval(horizons: Sequence[int], values: np.ndarray, draws: np.ndarray) -> list[float]:
    """[slope, low, high] of values [horizons, seeds]."""
    return with_interval(lambda index: slopes(horizons, values[:, index].mean(-1)), draws)


def ratio_with_interval(above: np.ndarray, below: np.ndarray, draws: np.ndarray) -> list[float]:
    """[ratio of means, low, high] of [seeds] each, paired."""
    return with_interval(lambda index: above[index].mean(-1) / below[index].mean(-1), draws)


def run_synthetic(config: SyntheticConfig, *, report: Report = print) -> dict[str, Any]:
    """Tune, run every contender at every horizon, fit. On one core, in one thread.

    Args:
        report: told what happens, a line at a time.

    Returns:
        JSON-ready: "config", "problem" (its constants), "horizons" in gradients, "seconds", and "moments": of
        each p its "noise_bound" σ_*, "tuning", "contenders" (by name: theory, duals [horizon][seed] over all
        iterates and over the later half, slopes as [value, low, high]), "gain" (of each horizon, the ratio of
        Transported's mean dual norm to the other's) and "slope_difference" (Transported's minus Batched's).
    """
    import torch

    began, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # of such small matrices a second thread only waits
    try:
        tuning = tune(config)
        report(
            f"synthetic: tuned at 2^{config.tuning_horizon} gradients, {time.perf_counter() - began:.0f} s"
        )
        horizons = [2**k for k in range(config.horizons[0], config.horizons[1] + 1)]
        kinds = [(p, name, horizon) for p in config.moments for name in CONTENDERS for horizon in horizons]
        trials = [_scheduled(config, tuning, *kind) for kind in kinds]
        streams = [Stream(config, f"run{i}") for i in range(config.seeds)]
        duals = dict(zip(kinds, simulate(config, trials, streams), strict=True))
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - began
    report(f"synthetic: {len(trials)} kinds of runs up to 2^{config.horizons[1]} gradients, {seconds:.0f} s")
    problem = Problem(config.rows, config.cols, config.width)
    starts = problem.value(torch.stack([stream.start() for stream in streams])).mean().item()
    return {
        "config": {**asdict(config), "moments": list(config.moments), "horizons": list(config.horizons)},
        "problem": {
            "gradient_lipschitz": problem.gradient_lipschitz,
            "hessian_lipschitz": problem.hessian_lipschitz,
            "start_value": starts,
        },
        "horizons": horizons,
        "seconds": seconds,
        "moments": [
            {
                "p": p,
                "noise_bound": noise_bound(config, p),
                "tuning": {**tuning[p], "picks": {k: v._asdict() for k, v in tuning[p]["picks"].items()}},
                **_fits(
                    p,
                    horizons,
                    {name: [duals[p, name, horizon] for horizon in horizons] for name in CONTENDERS},
                    {name: trials[kinds.index((p, name, horizons[-1]))].lr for name in CONTENDERS},
                    start_value=starts,
                ),
            }
            for p in config.moments
        ],
    }


def _scheduled(config: SyntheticConfig, tuning: dict[float, Any], p: float, name: str, horizon: int) -> Trial:
    """The contender's run of this horizon: its constants carried there by its exponents."""
    constants, contender = tuning[p]["picks"][name], CONTENDERS[name]
    longer, theory = horizon / 2**config.tuning_horizon, contender.theory(p)
    return make_trial(
        transported=contender.transported,
        average=max(1.0, constants.average * longer**theory.average),
        lr=constants.lr * longer**-theory.step,
        num_steps=horizon,
        moment=p,
    )


def _fits(
    p: float,
    horizons: list[int],
    duals: "dict[str, list[Tensor]]",
    longest_lrs: dict[str, float],
    *,
    start_value: float,
) -> dict[str, Any]:
    """Slopes and ratios with their intervals, from [points, seeds] of each contender and horizon."""
    means = {name: np.stack([x.mean(0).numpy() for x in runs]) for name, runs in duals.items()}
    later = {name: np.stack([x[len(x) // 2 :].mean(0).numpy() for x in runs]) for name, runs in duals.items()}
    draws = resample(next(iter(means.values())).shape[1])
    half = len(horizons) // 2
    contenders = {
        name: {
            "theory": -CONTENDERS[name].theory(p).rate,
            "duals": means[name].tolist(),
            "later_duals": later[name].tolist(),
            "intervals": [ratio_with_interval(x, np.ones_like(x), draws) for x in means[name]],
            "slope": slope_with_interval(horizons, means[name], draws),
            "later_slope": slope_with_interval(horizons, later[name], draws),
            "longer_half_slope": slope_with_interval(horizons[half:], means[name][half:], draws),
            "travel_share": start_value / (longest_lrs[name] * horizons[-1]) / float(means[name][-1].mean()),
        }
        for name in CONTENDERS
    }

    def difference(index: np.ndarray) -> np.ndarray:
        each = [slopes(horizons, means[name][:, index].mean(-1)) for name in ("transported", "batched")]
        return each[0] - each[1]

    return {
        "contenders": contenders,
        "gain": {
            name: [
                ratio_with_interval(a, b, draws)
                for a, b in zip(means["transported"], means[name], strict=True)
            ]
            for name in CONTENDERS
            if name != "transported"
        },
        "slope_difference": with_interval(difference, draws),
    }


# --- text and picture ---


def slope_verdict(slope: Sequence[float], theory: float) -> str:
    """[value, low, high] against the exponent of an upper bound."""
    _, low, high = slope
    if high < theory:
        return "steeper than the bound, which is for the worst case"
    if low > theory:
        return "shallower than the bound at these horizons"
    return "as the theory says, within the interval"


def gain_verdict(ratio: Sequence[float], other: str) -> str:
    """[Transported's mean dual norm over the other's, low, high]."""
    value, low, high = ratio
    interval = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    if high < 1:
        return f"{interval}: Transported Scion is lower than {other}"
    if low > 1:
        return f"{interval}: Transported Scion is higher than {other}"
    return f"{interval}: no difference from {other} within the interval"


def describe(result: dict[str, Any]) -> str:
    """Markdown: the problem, the slopes, the ratios, the tuning, and what all this does not show."""
    sections = (_problem_text, _slope_table, _gain_list, _tuning_text, _limits_text)
    return "\n\n".join("\n".join(section(result)) for section in sections) + "\n"


def _problem_text(result: dict[str, Any]) -> list[str]:
    config, problem = result["config"], result["problem"]
    tail = "" if config["noise"] == "gaussian" else f" of tail index p + {config['tail_margin']:g}"
    horizons = ", ".join(map(str, result["horizons"]))
    return [
        f"F(X) = δ² Σ log cosh(X/δ), X {config['rows']}x{config['cols']}, δ = {config['width']:g}, from "
        f"entries of RMS {config['distance']:g}. In the spectral norm its gradient has Lipschitz constant "
        f"{problem['gradient_lipschitz']:g}, its Hessian {problem['hessian_lipschitz']:.3g}. Noise: "
        f"{config['noise']}{tail}, {'skewed' if config['skewed'] else 'symmetric'}, scale "
        f"{config['scale']:g} per entry. {config['seeds']} seeds at each of T = {horizons} gradients; "
        "momentum and step length as the theory scales them with T, their constants tuned once at "
        f"T = {2 ** config['tuning_horizon']}. Slopes: log of the mean dual norm of the exact gradient "
        "against log T, with 95% intervals, bootstrapped over seeds. The theory of the control is that of "
        "its lag alone."
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _slope_table(result: dict[str, Any]) -> list[str]:
    header = (
        "p",
        "method",
        "theory: slope, gradients to ε",
        "slope, all iterates",
        "measured: gradients to ε",
        "slope, later half of each run",
        "slope, longer half of T",
        "all iterates against the theory",
    )
    rows = []
    for moment in result["moments"]:
        for name, row in moment["contenders"].items():
            theory, slope = row["theory"], row["slope"]
            rows.append(
                (
                    f"{moment['p']:g}",
                    CONTENDERS[name].title,
                    f"{theory:.3f}, ε^{1 / theory:.2f}",
                    _interval(slope),
                    f"ε^{1 / slope[0]:.2f}" if slope[0] < 0 else "never",
                    _interval(row["later_slope"]),
                    _interval(row["longer_half_slope"]),
                    slope_verdict(slope, theory),
                )
            )
    return _table(header, rows)


def _interval(values: Sequence[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*(round(value, 3) + 0.0 for value in values))  # no -0.000


def _gain_list(result: dict[str, Any]) -> list[str]:
    lines = [f"Ratios of mean dual norms at T = {result['horizons'][-1]}, paired by seed:", ""]
    for moment in result["moments"]:
        p, rows = moment["p"], moment["contenders"]
        for name, ratios in moment["gain"].items():
            other = CONTENDERS[name].title.removeprefix("control: ")
            lines.append(f"- p = {p:g}: {gain_verdict(ratios[-1], other)}.")
        low, high = moment["slope_difference"][1:]
        told = "not distinct" if low <= 0 <= high else "distinct"
        theory = rows["transported"]["theory"] - rows["batched"]["theory"]
        lines.append(
            f"- p = {p:g}: Transported Scion's slope less Batched Scion's is "
            f"{_interval(moment['slope_difference'])}, {told}; the theory says {theory:.3f}."
        )
    return lines


def _tuning_text(result: dict[str, Any]) -> list[str]:
    config, grid = result["config"], result["moments"][0]["tuning"]
    averages, lrs = grid["averages"], grid["lrs"]
    header = ("p", "rule", *map(str, averages), "taken: average, η", "best of all")
    rows, bound = [], []
    for moment in result["moments"]:
        tuning = moment["tuning"]
        picks = tuning["picks"]
        for name, free in (("batched", "any_average"), ("transported", "transported_any_average")):
            least = [f"{min(duals):.2f}" for duals in tuning[name]]
            taken = (_taken(picks[name]), _taken(picks[free]))
            rows.append((f"{moment['p']:g}", CONTENDERS[name].title, *least, *taken))
        if picks["any_average"]["dual"] < picks["batched"]["dual"]:
            bound.append(f"p = {moment['p']:g}")
    lines = [
        f"Tuning at T = {2 ** config['tuning_horizon']} with {config['tuning_seeds']} seeds of its own: "
        f"averages of 1/(1-β) = {', '.join(map(str, averages))} gradients by step lengths "
        f"η = {', '.join(f'{lr:g}' for lr in lrs)}, {len(averages) * len(lrs)} pairs for each rule. Averages "
        f'below {config["shortest_average"]} could be taken by "{CONTENDERS["any_average"].title}" only. '
        "Least mean dual norm over η, by average:",
        "",
        *_table(header, rows),
    ]
    if bound:
        lines += [
            "",
            f"That bound costs Batched Scion something at {' and '.join(bound)}: for practice the fair "
            f'comparison is the one with "{CONTENDERS["any_average"].title}".',
        ]
    return lines


def _taken(pick: dict[str, Any]) -> str:
    return f"{pick['average']:g}, {pick['lr']:g}" + (" (rim of the grid)" if pick["on_rim"] else "")


def _limits_text(result: dict[str, Any]) -> list[str]:
    shares = ", ".join(
        f"{moment['contenders'][name]['travel_share']:.0%} ({CONTENDERS[name].title}, p = {moment['p']:g})"
        for moment in result["moments"]
        for name in ("batched", "transported")
    )
    return [
        "What this does not show: the rates are upper bounds for the worst problem, and this one is convex, "
        "and quadratic around its minimum. The parameters are the theory's, not the best of each horizon. "
        "The way down, F(θ_0)/(ηT), has the theory's slope whatever the noise; of the mean over all iterates "
        f"at the longest T it is {shares}. The later half is free of it. A slope shallower than that of an "
        "upper bound is no breach of it: at short T the mean lies far below the bound, and what keeps it "
        "there fades as slowly as ε itself (the lag is ηβ/(1-β), not η/(1-β); the way down takes a share of "
        "the run that shrinks with T). Intervals hold the spread over seeds, not the bend of the curves."
    ]


def plot(result: dict[str, Any], path: Path) -> Path:
    """Mean dual norm against T, log-log, a panel for each p; dashed: the theory's slopes. Writes `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    horizons, moments = np.array(result["horizons"], dtype=float), result["moments"]
    figure, panels = plt.subplots(1, len(moments), figsize=(6 * len(moments), 5), dpi=120, squeeze=False)
    for axes, moment in zip(panels[0], moments, strict=True):
        for color, (name, row) in enumerate(moment["contenders"].items()):
            value, low, high = np.array(row["intervals"]).T
            label = f"{CONTENDERS[name].title}: {row['slope'][0]:.3f} (theory {row['theory']:.3f})"
            style = {"color": f"C{color}", "alpha": 1.0 if name in ("batched", "transported") else 0.5}
            axes.errorbar(
                horizons, value, (value - low, high - value), fmt="o", markersize=4, label=label, **style
            )
            anchor = np.exp(np.log(value).mean() - row["theory"] * np.log(horizons).mean())
            axes.plot(horizons, anchor * horizons ** row["theory"], linestyle="--", linewidth=1, **style)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", title=f"p = {moment['p']:g}")
        axes.set(xlabel="T (gradients)", ylabel="mean dual norm of the gradient")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13))  # off the points
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
