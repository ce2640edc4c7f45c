"""Results of a study's runs, read from their files, and the arithmetic of the claims. No torch."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import files
from cluster.measure.intervals import Interval, of_mean
from cluster.review.outcome import LossCurve, Outcome, tokens_to
from cluster.review.run_reader import Run
from training.config import TrainConfig
from training.data.frequency import NUM_DECILES
from training.study.config import RuleConfig
from training.study.plan import StudyPlan
from training.study.runs import REPORT, StudyRun, is_finished

FINISHED, DIVERGED, FAILED, NOT_RUN = "finished", "diverged", "failed", "not run"
COLUMNS = (
    *("run", "phase", "rule", "lr", "vector_ratio", "width", "noise", "seed", "status"),
    *("validation_loss", "tuning_loss", "tokens", "seconds", "error"),
)


@dataclass(frozen=True)
class RunFailure:
    """A run that ended without a summary: its exit code (None: its node was lost) and the end of its log."""

    exit_code: int | None
    last_lines: str

    def __str__(self) -> str:
        how = "lost" if self.exit_code is None else f"exit code {self.exit_code}"
        return f"{how}: {self.last_lines}"


@dataclass(frozen=True)
class Result:
    """The result of one run. Losses are means in nats per token; all evaluations use the same sequences.

    Attributes:
        seconds: of the training loop, over all starts of the run, without repeated steps.
        step_seconds: the median of its steps.
        deciles: the final loss by how frequent a token is, the most frequent first
            (`evaluation.frequency_deciles`); None for a decile without tokens.
        error: why it failed or counts as diverged.
    """

    run: StudyRun
    name: str
    status: str
    validation_loss: float | None = None
    tuning_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    error: str | None = None
    commit: str | None = None
    curve: LossCurve = ()
    step_seconds: float | None = None
    deciles: tuple[float | None, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the losses count."""
        return self.status == FINISHED

    def row(self) -> dict[str, Any]:
        """The result under the names in COLUMNS, JSON-ready."""
        fields = {**vars(self), **vars(self.run), "run": self.name}
        return {name: fields[name] for name in COLUMNS}


def read_result(plan: StudyPlan, run: StudyRun, failure: RunFailure | None = None) -> Result:
    """From the run's directory. `failure`: how the run ended, if it ended without a summary."""
    config = plan.configs.of(run)
    directory, name = config.run_directory, config.run.name
    if is_finished(directory):
        return _of_finished(run, config, directory)
    if failure is None:
        return Result(run, name, NOT_RUN)
    return Result(run, name, FAILED, error=str(failure), curve=Outcome(Run(directory)).curve)


def _of_finished(run: StudyRun, config: TrainConfig, directory: Path) -> Result:
    files_of_run = Run(directory)
    summary, curve = files.read_json(directory / "summary.json"), Outcome(files_of_run).curve
    loss, start = summary.get("validation_loss"), curve[0][1] if curve else math.inf
    problem = divergence(loss, start=start)
    return Result(
        run,
        config.run.name,
        DIVERGED if problem else FINISHED,
        validation_loss=loss,
        tuning_loss=summary.get("tuning_loss"),
        tokens=summary["tokens"],
        seconds=summary["wall_seconds"],
        error=problem,
        commit=files_of_run.commit,
        curve=curve,
        step_seconds=summary.get("median_step_seconds"),
        deciles=_deciles(summary),
    )


def _deciles(summary: Mapping[str, Any]) -> tuple[float | None, ...]:
    found = [summary.get(f"validation_loss_decile_{i}") for i in range(1, NUM_DECILES + 1)]
    return tuple(found) if any(found) else ()


def divergence(loss: float | None, *, start: float) -> str | None:
    """Why a final validation loss does not count: it is not finite (null in a summary), or did not fall."""
    if loss is None or not math.isfinite(loss):
        return "the final validation loss is not finite"
    if loss >= start:
        return f"the final validation loss {loss:.3f} is not below {start:.3f}, that of the untrained model"
    return None


@dataclass(frozen=True)
class Choice:
    """The point of one rule's grid, in one setting, with the lowest tuning loss.

    Attributes:
        edge: "lowest" or "highest" if it is an end of the grid, "only" if the grid has one point: a better
            one may lie beyond. Else None.
    """

    lr: float
    vector_ratio: float
    tuning_loss: float
    edge: str | None
    ratio_edge: str | None = None  # the same for the ratios; None also if only one was tried, by design


def choose(results: Iterable[Result], *, rule: RuleConfig) -> Choice | None:
    """The choice among the tuning runs of one rule in one setting; None if no run finished."""
    tried = [
        (r.tuning_loss, r.run.lr, r.run.vector_ratio) for r in results if r.ok and r.tuning_loss is not None
    ]
    if not tried:
        return None
    loss, lr, ratio = min(tried)
    ratio_edge = _edge(ratio, rule.vector_ratios) if len(rule.vector_ratios) > 1 else None
    return Choice(lr, ratio, loss, _edge(lr, rule.grid), ratio_edge)


def _edge(value: float, tried: Sequence[float]) -> str | None:
    if len(tried) == 1:
        return "only"
    return {tried[0]: "lowest", tried[-1]: "highest"}.get(value)


@dataclass(frozen=True)
class StudyResults:
    """The results of a study so far."""

    plan: StudyPlan
    results: Mapping[StudyRun, Result]

    def tuning(self, rule: str, *, noise: str, width: str) -> list[Result]:
        """The available tuning results of one rule in one setting, by ascending rate."""
        runs = self.plan.tuning_of(noise=noise, width=width, rule=rule)
        return [self.results[run] for run in runs if run in self.results]

    def choice(self, rule: str, *, noise: str, width: str) -> Choice | None:
        """The rule's rate in that setting, from the available results."""
        return choose(self.tuning(rule, noise=noise, width=width), rule=self.plan.config.rules[rule])

    def report(self, rule: str, *, noise: str) -> list[Result]:
        """The available report results of a rule under a noise, in the order of the seeds."""
        runs = self.report_runs(rule, noise=noise)
        return [self.results[run] for run in runs if run in self.results]

    def report_runs(self, rule: str, *, noise: str) -> list[StudyRun]:
        """The report runs of a rule under a noise; none before it has a rate."""
        choice = self.choice(rule, noise=noise, width=self.plan.config.widest)
        if choice is None:
            return []
        rates = {"lr": choice.lr, "vector_ratio": choice.vector_ratio}
        return self.plan.report_runs(rule, **rates, noise=noise)

    def finished(self, rule: str, *, noise: str) -> list[Result]:
        """The finished report results."""
        return [result for result in self.report(rule, noise=noise) if result.ok]

    def next_runs(self) -> list[StudyRun]:
        """Runs without a result that can start: tuning runs, and report runs of rules with a rate chosen."""
        plan = self.plan
        due = [run for run in plan.tuning_runs() if run not in self.results]
        for noise in plan.config.noises:
            for rule in plan.config.rules:
                tuning = plan.tuning_of(noise=noise, width=plan.config.widest, rule=rule)
                if all(run in self.results for run in tuning):
                    report = self.report_runs(rule, noise=noise)
                    due += [run for run in report if run not in self.results]
        return due

    def failed(self) -> list[Result]:
        """Every run that failed or diverged."""
        return [result for result in self.results.values() if result.status in (FAILED, DIVERGED)]

    def rules_without_a_result(self) -> list[str]:
        """Rules without a finished report run under any noise."""
        config = self.plan.config
        return [
            rule
            for rule in config.rules
            if not any(self.finished(rule, noise=noise) for noise in config.noises)
        ]


@dataclass(frozen=True)
class Spread:
    """Mean, minimum and maximum over seeds."""

    mean: float
    low: float
    high: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None without values."""
        return cls(statistics.mean(values), min(values), max(values), len(values)) if values else None


def losses(results: Iterable[Result]) -> list[float]:
    """Final validation losses of the finished runs."""
    return [r.validation_loss for r in results if r.ok and r.validation_loss is not None]


@dataclass(frozen=True)
class TokenRatio:
    """Tokens that the seeds of a rule need to a target loss, as shares of the reference's whole budget.

    Attributes:
        tokens: of each seed; None if it does not reach the target within the budget.
        reference_tokens: the budget, after which the reference has its mean final loss, the target.
    """

    target: float
    reference_tokens: int
    tokens: tuple[float | None, ...]

    @property
    def spread(self) -> Spread | None:
        """The ratios of the seeds that reach the target."""
        return Spread.of([t / self.reference_tokens for t in self.tokens if t is not None])

    @property
    def num_unreached(self) -> int:
        """Seeds that do not reach the target."""
        return sum(t is None for t in self.tokens)


def token_ratio(results: Sequence[Result], *, reference: Sequence[Result]) -> TokenRatio | None:
    """Tokens of each finished run to the mean final validation loss of the finished reference runs."""
    finished, others = [r for r in results if r.ok], [r for r in reference if r.ok]
    if not finished or not others:
        return None
    target = statistics.mean(losses(others))
    budget = others[0].tokens
    assert budget is not None
    return TokenRatio(target, budget, tuple(tokens_to(r.curve, target) for r in finished))


@dataclass(frozen=True)
class Difference:
    """The final validation loss of a challenger minus that of a baseline, in nats per token.

    Attributes:
        by_seed: over the seeds that finished under both.
        baseline, challenger: the losses themselves.
    """

    by_seed: Spread
    baseline: Spread
    challenger: Spread

    @property
    def verdict(self) -> str:
        """Where the challenger's mean lies against the seeds of the baseline: "better", "within", "worse"."""
        if self.challenger.mean < self.baseline.low:
            return "better"
        return "within" if self.challenger.mean <= self.baseline.high else "worse"


def difference(challenger: Sequence[Result], baseline: Sequence[Result]) -> Difference | None:
    """The difference over the seeds that both have finished; None if there is no such seed."""
    mine = {r.run.seed: r.validation_loss for r in challenger if r.ok and r.validation_loss is not None}
    theirs = {r.run.seed: r.validation_loss for r in baseline if r.ok and r.validation_loss is not None}
    seeds = [seed for seed in mine if seed in theirs]
    by_seed = Spread.of([mine[seed] - theirs[seed] for seed in seeds])
    base, own = (Spread.of([found[seed] for seed in seeds]) for found in (theirs, mine))
    return None if by_seed is None or base is None or own is None else Difference(by_seed, base, own)


def paired(
    results: Sequence[Result], baseline: Sequence[Result], value: Callable[[Result], float | None]
) -> Interval | None:
    """95% interval of the mean of value(result) - value(baseline), over the seeds that both have finished."""
    theirs = {r.run.seed: value(r) for r in baseline if r.ok}
    pairs = [(value(r), theirs.get(r.run.seed)) for r in results if r.ok]
    differences = [mine - other for mine, other in pairs if mine is not None and other is not None]
    return of_mean(differences) if differences else None


def mean_curve(results: Sequence[Result]) -> list[tuple[int, Spread]]:
    """(tokens, spread of the validation loss) where every finished run was evaluated."""
    curves = [dict(result.curve) for result in results if result.ok]
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    spreads = [(tokens, Spread.of([curve[tokens] for curve in curves])) for tokens in sorted(shared)]
    return [(tokens, spread) for tokens, spread in spreads if spread is not None]


def write_tables(study: StudyResults, directory: Path, *, about: Mapping[str, Any]) -> None:
    """`results.csv`, one row per run; `results.json`, the same with the curves and `about`."""
    results = [study.results[run] for run in sorted(study.results, key=_order)]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.row() for result in results)
    files.write_text(directory / "results.csv", text.getvalue())
    runs = [_finite(result.row()) | {"curve": _finite_curve(result.curve)} for result in results]
    files.write_json(directory / "results.json", {**about, "runs": runs})


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities; the status of such a run is "diverged"."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _finite_curve(curve: LossCurve) -> list[list[float | None]]:
    return [[tokens, loss if math.isfinite(loss) else None] for tokens, loss in curve]


def _order(run: StudyRun) -> tuple[Any, ...]:
    return (run.phase == REPORT, run.noise, run.width, run.rule, run.vector_ratio, run.lr, run.seed)
