"""Runs of the synthetic problem: tune, run every method at every horizon, fit slopes (`run_synthetic`).

**Tuning** finds the constants of a and η once, at the tuning horizon, on streams of its own, from one grid
for both rules. It tries and reports averages (1/a) of fewer than `shortest_average` gradients but does not
choose them: the theory lets a → 0, and without an average there is nothing to transport. "Scion, any average"
may choose them. It shows what a practitioner loses by following the theory.

**What slopes can show.** F is convex, so the mean over all iterates is at least (F(θ_0) - F(θ_T)) / (ηT).
This descent term falls as the theory says, whatever the noise. A slope can be shallower, where lag or noise
fall more slowly, but not steeper in the long run. The mean over the later half does not contain the descent.
Neither slope says what the best parameters of each horizon would reach: near its minimum F is strongly
convex. Intervals are bootstrapped over seeds, each with its own start, signs and noise. They contain no error
of the power law itself; the slope over the longer half of the horizons shows how much the curve bends.

**Transport from zero momentum** (`optim.rules.new_state`) is exact with β/(1-β)·(1-β^t) after step t: the
weighted mean of all points is then θ_t. The full factor from the first step on overshoots for 1/a steps.
`ramp_steps` = 1/a, used here, comes close to the exact factor. It matters: at T = 512 and p = 2, averages of
256 end at a mean dual norm of 2.1 with it and 6.8 without, where Scion has 6.2.

**Results** with the defaults (the report prints current numbers): slopes at p = 2 and 1.5 are -0.256 and
-0.223 for Transported, -0.206 and -0.175 for Batched, -0.187 and -0.153 for the control: the order that the
theory predicts. Against it:

- The gains are those of long averages. Against Scion that may average a single gradient, Transported ends 18%
  lower at p = 2 and 7% higher at p = 1.5.
- With `skewed=false` Scion is best with no average at all; at p = 1.5 Transported ends 17% above it.
- With `scale=5 width=2` noise dominates. Batched comes closer to its theory, -0.226 and -0.190; Transported
  has -0.200 and -0.190 and gains nothing (ratios 1.06 and 1.00). The noise of an average moves the weights by
  η/a in one direction, so they settle near √(Lη/a · σ_* a^((p-1)/p)). With Transported's parameters this
  falls three quarters as fast as ε until the lag Lη/a exceeds the noise; until then transport gains nothing.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from training.study.synthetic.config import LONGEST_AVERAGE, SyntheticConfig
from training.study.synthetic.problem import SPECTRAL, VARIANTS, NoiseStream, Problem, noise_bound

if TYPE_CHECKING:
    from torch import Tensor

    from optim.rules import Rule

STEP_LENGTHS = tuple(2.0**-k for k in range(1, 7))  # η of the tuning grid, over the starting distance
NUM_POINTS = 64  # iterates at which the exact gradient is measured, evenly over a run
NOISE_STEPS = 256  # gradients of a stream drawn at a time
RESAMPLES = 4000
Report = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """`num_steps` steps of a rule, for every stream at once."""

    rule: "Rule"
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

    from optim.rules import scion
    from optim.rules import transported as transport

    momentum = 1 - 1 / average
    exact: dict[str, Any] = {"norm": SPECTRAL, "method": "exact", "dtype": torch.float32}
    exact["momentum"] = momentum
    rule = transport(scion(**exact), ramp_steps=round(average)) if transported else scion(**exact)
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
        point = trial.rule.apply(weight, unit, lr=trial.lr, scale=scale, step=step, state={})
        points.append(weight if point is None else point)
    return torch.stack(points)


def simulate(
    config: SyntheticConfig, trials: Sequence[Trial], streams: Sequence[NoiseStream]
) -> "list[Tensor]":
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
            drawn = [[stream.noise(p, begin=step, end=end) for stream in streams] for p in moments]
            noise = torch.stack(
                [torch.stack(of_p, dim=1) for of_p in drawn], dim=1
            )  # [steps, moments, S, r, c]
        due = [i for i, trial in enumerate(running) if step % trial.stride == 0]
        if due:
            exact = norm.dual(problem.gradient(weights[due]).flatten(0, 1)).double().view(len(due), -1)
            for i, values in zip(due, exact, strict=True):
                duals[order[i]].append(values)
        gradients = problem.gradient(points[:n]).add_(noise[part][row[:n]])
        points = step_together(running, weights[:n], gradients, momenta[:n], step=step + 1)
    return [torch.stack(values) for values in duals]


class Constants(NamedTuple):
    """The best constants at the tuning horizon, and whether they lie on the rim of the grid."""

    average: float
    lr: float
    dual: float
    on_rim: bool


def tune(config: SyntheticConfig) -> dict[float, dict[str, Any]]:
    """Of each p: mean dual norms [averages][step lengths] of both rules, and what each method picks."""
    import torch

    num_steps = 2**config.tuning_horizon
    averages = [2**k for k in range(LONGEST_AVERAGE.bit_length()) if 2 ** (k + 1) <= num_steps]
    lrs = [config.distance * length for length in STEP_LENGTHS]
    trials = [
        make_trial(transported=moved, average=average, lr=lr, num_steps=num_steps, moment=p)
        for p, moved, average, lr in itertools.product(config.moments, (False, True), averages, lrs)
    ]
    streams = [NoiseStream(config, f"tuning{i}") for i in range(config.tuning_seeds)]
    means = torch.stack([values.mean() for values in simulate(config, trials, streams)])
    means = means.view(len(config.moments), 2, len(averages), len(lrs))
    result: dict[float, dict[str, Any]] = {}
    for p, (plain, moved) in zip(config.moments, means, strict=True):
        picks = {
            name: _best(
                moved if method.tuned_as_transported else plain,
                averages,
                lrs,
                shortest=1 if method.any_average else config.shortest_average,
            )
            for name, method in VARIANTS.items()
        }
        picks["transported_any_average"] = _best(moved, averages, lrs, shortest=1)
        result[p] = {
            "averages": averages,
            "lrs": lrs,
            "batched": plain.tolist(),
            "transported": moved.tolist(),
            "picks": picks,
        }
    return result


def _best(duals: "Tensor", averages: Sequence[int], lrs: Sequence[float], *, shortest: int) -> Constants:
    first = averages.index(shortest)
    i, j = divmod(int(duals[first:].argmin()), len(lrs))
    shortest_taken = i == 0 and shortest > 1  # fewer than one gradient cannot be averaged
    on_rim = shortest_taken or first + i == len(averages) - 1 or j in (0, len(lrs) - 1)
    return Constants(averages[first + i], lrs[j], duals[first + i, j].item(), on_rim)


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
    """Tune, run every method at every horizon, fit. On one core, in one thread.

    Args:
        report: called with each progress line.

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
        kinds = [(p, name, horizon) for p in config.moments for name in VARIANTS for horizon in horizons]
        trials = [_scheduled(config, tuning, *kind) for kind in kinds]
        streams = [NoiseStream(config, f"run{i}") for i in range(config.seeds)]
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
                    {name: [duals[p, name, horizon] for horizon in horizons] for name in VARIANTS},
                    {name: trials[kinds.index((p, name, horizons[-1]))].lr for name in VARIANTS},
                    start_value=starts,
                ),
            }
            for p in config.moments
        ],
    }


def _scheduled(config: SyntheticConfig, tuning: dict[float, Any], p: float, name: str, horizon: int) -> Trial:
    """A method's run at this horizon: its constants, scaled by its exponents."""
    constants, method = tuning[p]["picks"][name], VARIANTS[name]
    longer, theory = horizon / 2**config.tuning_horizon, method.theory(p)
    return make_trial(
        transported=method.transported,
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
    """Slopes and ratios with their intervals, from [points, seeds] of each method and horizon."""
    means = {name: np.stack([x.mean(0).numpy() for x in runs]) for name, runs in duals.items()}
    later = {name: np.stack([x[len(x) // 2 :].mean(0).numpy() for x in runs]) for name, runs in duals.items()}
    draws = resample(next(iter(means.values())).shape[1])
    half = len(horizons) // 2
    contenders = {
        name: {
            "theory": -VARIANTS[name].theory(p).rate,
            "duals": means[name].tolist(),
            "later_duals": later[name].tolist(),
            "intervals": [ratio_with_interval(x, np.ones_like(x), draws) for x in means[name]],
            "slope": slope_with_interval(horizons, means[name], draws),
            "later_slope": slope_with_interval(horizons, later[name], draws),
            "longer_half_slope": slope_with_interval(horizons[half:], means[name][half:], draws),
            "travel_share": start_value / (longest_lrs[name] * horizons[-1]) / float(means[name][-1].mean()),
        }
        for name in VARIANTS
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
            for name in VARIANTS
            if name != "transported"
        },
        "slope_difference": with_interval(difference, draws),
    }
