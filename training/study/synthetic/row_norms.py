"""Muon against NorMuon on the problem of arXiv 2609.39114, "The Row Normalization Puzzle in Muon".

F(X) = ½‖X - C/‖C‖_F‖_F², X [m, 8], row i of C is u_i/i with u_i uniform on the unit sphere. X_0 = 0, exact
gradients, exact polar factors, momentum without Nesterov. Muon's updates are as long in every direction
whatever m is; rows of equal length spend most of a step on rows that hold little of C, the more so the more
rows there are. `training.study.synthetic.published` has the paper's figures.

**Grid.** γ = 10^(-5 + j/2), β1 in BETA1, for NorMuon β2 in BETA2. A step has the Frobenius length γ√8: η is γ
for Muon and the practical form, γ/(0.2√m) for Algorithm 1. As M has full rank, both forms are then the same
step but for rounding.

**Tuning.** All points of a grid run on the first seeds. A point whose mean lies 1/√k decades or more behind
the best one's after k seeds is given up: about five standard errors of that difference. `exhaustive` gives up
none.
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from training.study.synthetic.config import RowNormsConfig

if TYPE_CHECKING:
    from torch import Tensor

    from optim.rules import Rule

COLS = 8
BETA1 = (0.0, 0.5, 0.9, 0.95)
BETA2 = (0.0, 0.9, 0.95, 0.99)
FORMS = ("muon", "algorithm_1", "practical")
CHUNK_ELEMENTS = 2**16  # of the matrices that are computed at a time, so that they stay in a core's cache
FIRST_SEEDS = (4, 16)  # of tuning, after which points are given up
Report = Callable[[str], None]


class Table(NamedTuple):
    """How a table of the paper is made: steps, rates, schedule, and what tuning compares."""

    num_steps: int
    num_rates: int
    cosine: bool
    by_mean_log: bool  # the mean reduction; otherwise the mean of the least F

    def rates(self) -> list[float]:
        """The γ of the grid."""
        return [10 ** (-5 + j / 2) for j in range(self.num_rates)]

    def factor(self, step: int) -> float:
        """Of γ, at the step after `step` steps."""
        return cosine(step, num_steps=self.num_steps) if self.cosine else 1.0


TABLES = {"1": Table(1000, 11, False, False), "7": Table(25, 13, True, True)}


def cosine(step: int, *, num_steps: int) -> float:
    """As PyTorch's CosineAnnealingLR. Table 7 depends on it: `optim.schedule` is a step ahead of it."""
    return (1 + math.cos(math.pi * step / num_steps)) / 2


class Point(NamedTuple):
    """A point of a grid."""

    gamma: float
    beta1: float
    beta2: float = 0.0


def grid(form: str, table: Table) -> list[Point]:
    """The paper's grid; Muon has no β2."""
    decays = (0.0,) if form == "muon" else BETA2
    return [Point(*values) for values in itertools.product(table.rates(), BETA1, decays)]


def make_rule(form: str, point: Point) -> "Rule":
    """The rule of a form with exact polar factors and α = 0."""
    import torch

    from optim.rules import muon, normuon

    exact: dict[str, Any] = {"method": "exact", "nesterov": False, "dtype": torch.float32}
    exact |= {"momentum": point.beta1, "update_scale": "rms" if form == "algorithm_1" else "none"}
    if form == "muon":
        return muon(**exact)
    return normuon(**exact, beta2=point.beta2, alpha=0.0, length="kept" if form == "practical" else "full")


def targets(config: RowNormsConfig, m: int, names: Iterable[str]) -> "Tensor":
    """C/‖C‖_F of each seed, fp32 [seeds, m, COLS]; functions of (config.seed, m, name)."""
    import torch

    from optim.noise import Noise

    law = Noise("gaussian", scale=1.0)
    drawn = [
        law.sample(f"rows{m}.{name}", start=0, stop=m * COLS, seed=config.seed, step=0) for name in names
    ]
    rows = torch.stack(drawn).double().view(-1, m, COLS)
    rows /= torch.linalg.vector_norm(rows, dim=-1, keepdim=True) * torch.arange(1, m + 1)[:, None]
    return (rows / torch.linalg.matrix_norm(rows, keepdim=True)).float()


def reductions(form: str, point: Point, table: Table, goals: "Tensor") -> list[float]:
    """log10 F(X_0) - log10 min_t F(X_t), [B] of goals [B, m, COLS], at γ = 1, whatever `point` says.

    Updates do not depend on the gradient's length. A run at γ is therefore γ times one at 1 towards goal/γ,
    and `Runner.run` computes all γ of a grid together.
    """
    import torch

    moved = Moving(make_rule(form, point), goals)
    goals = moved.weights + goals  # in the memory layout of the weights
    gradient = -goals
    first = least = torch.linalg.vector_norm(goals, dim=(-2, -1))  # F is half the square of this distance
    for step in range(table.num_steps):
        moved.step(gradient, lr=table.factor(step))
        gradient = moved.weights - goals
        least = torch.minimum(least, torch.linalg.vector_norm(gradient, dim=(-2, -1)))
    return (2 * (first / least).double().log10()).tolist()


class Moving:
    """Weights [B, m, COLS], from 0, that one rule moves: `optim.rules.step` for a batch of matrices.

    Rows lie side by side in memory, so that sums over the short side are fast.
    """

    def __init__(self, rule: "Rule", like: "Tensor") -> None:
        import torch

        from optim.rules import new_state

        self.weights = torch.zeros_like(like.mT.contiguous()).mT
        self._rule, self._steps = rule, 0
        self._state = new_state(rule, self.weights)
        self._lines = {name: like.new_zeros(like.shape[:2]) for name in rule.line_state_names}
        self._norms = like.new_ones(len(like))  # exact polar factors need none
        self._scale = rule.scale(*like.shape[-2:])

    def step(self, gradient: "Tensor", *, lr: float) -> "Tensor":
        """One step of Frobenius length lr·√COLS. Returns the points of the next gradients."""
        self._steps += 1
        update = self._rule.direction(gradient, self._state, step=self._steps)
        update = self._rule.transform(update, norms=self._norms, lines=self._lines)
        point = self._rule.apply(
            self.weights, update, lr=lr / self._scale, scale=self._scale, step=self._steps, state=self._state
        )
        return self.weights if point is None else point


@dataclass(frozen=True)
class Tried:
    """A point of the grid on the first tuning seeds: its reductions in decades, by seed."""

    point: Point
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    def cost(self, table: Table) -> float:
        """What tuning makes smallest."""
        if table.by_mean_log:
            return -self.mean
        return statistics.mean(0.5 * 10**-value for value in self.values)


class Runner:
    """Runs points on seeds, in one thread of torch on each core. A context manager."""

    def __init__(self, config: RowNormsConfig) -> None:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._config = config
        self._pool = ThreadPoolExecutor(
            config.threads or cores, initializer=torch.set_num_threads, initargs=(1,)
        )

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, form: str, points: Sequence[Point], table: Table, goals: "Tensor") -> list[list[float]]:
        """The reductions [seeds] of each point."""
        import torch

        alike: dict[tuple[float, float], list[int]] = {}  # (β1, β2) -> the points that differ in γ alone
        for place, point in enumerate(points):
            alike.setdefault(point[1:], []).append(place)
        jobs, chunk = [], max(1, CHUNK_ELEMENTS // goals[0].numel())
        for places in alike.values():
            scaled = torch.cat([goals / points[place].gamma for place in places])
            jobs += [(points[places[0]], part) for part in scaled.split(chunk)]
        found = self._pool.map(lambda job: reductions(form, job[0], table, job[1]), jobs)
        values = itertools.chain(*found)
        by_place = {place: [next(values) for _ in goals] for places in alike.values() for place in places}
        return [by_place[place] for place in range(len(points))]

    def tune(self, form: str, table: Table, goals: "Tensor") -> list[Tried]:
        """The points that ran on every tuning seed, the best first."""
        tried = [Tried(point, ()) for point in grid(form, table)]
        early = () if self._config.exhaustive else (k for k in FIRST_SEEDS if k < len(goals))
        for num_seeds in (*early, len(goals)):
            done = len(tried[0].values)
            more = self.run(form, [each.point for each in tried], table, goals[done:num_seeds])
            tried = [Tried(t.point, (*t.values, *new)) for t, new in zip(tried, more, strict=True)]
            behind = max(each.mean for each in tried) - 1 / math.sqrt(num_seeds)
            if num_seeds < len(goals):
                tried = [each for each in tried if each.mean > behind]
        return sorted(tried, key=lambda each: each.cost(table))


def run_row_norms(config: RowNormsConfig, *, report: Report = print) -> dict[str, Any]:
    """Tune and run every form of every table at every size.

    Returns:
        JSON-ready: "config", "seconds", and "tables": table -> form -> m -> "mean" and "two_errors" of the
        reduction in decades over the seeds, "chosen" (γ, β1, β2), "on_rim" (the chosen γ is an end of the
        grid), "points" of the grid and how many of them ran on "every_seed".
    """
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with Runner(config) as runner:
        for m, name in itertools.product(config.sizes, config.tables):
            table = TABLES[name]
            tuning = targets(config, m, (f"tuning{i}" for i in range(config.tuning_seeds)))
            goals = targets(config, m, (f"run{i}" for i in range(config.seeds)))
            for form in FORMS:
                tried = runner.tune(form, table, tuning)
                best = tried[0].point
                [values] = runner.run(form, [best], table, goals)
                cell = _cell(values, best, table, num_points=len(grid(form, table)), every_seed=len(tried))
                found.setdefault(name, {}).setdefault(form, {})[str(m)] = cell
                text = f"{cell['mean']:.3f} ± {cell['two_errors']:.3f} with {cell['chosen']}"
                report(f"table {name}, m = {m}, {form}: {text}, {time.perf_counter() - began:.0f} s")
    about = {name: getattr(config, name) for name in ("tuning_seeds", "seeds", "exhaustive", "seed")}
    return {"config": about, "seconds": time.perf_counter() - began, "tables": found}


def _cell(
    values: Sequence[float], best: Point, table: Table, *, num_points: int, every_seed: int
) -> dict[str, Any]:
    rates = table.rates()
    return {
        "mean": statistics.mean(values),
        "two_errors": 2 * statistics.stdev(values) / math.sqrt(len(values)),
        "chosen": best._asdict(),
        "on_rim": best.gamma in (rates[0], rates[-1]),
        "points": num_points,
        "every_seed": every_seed,
    }
