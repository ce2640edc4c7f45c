"""Which runs a study consists of, and how long they take. No torch.

Two phases. `tuning`: every rule on every rate of its grid, with one seed, on each width under the first noise
and on the widest width under every other noise. `report`: on the widest width, under each noise, the rate of
each rule with the lowest tuning loss, with every seed of the claims.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from operator import attrgetter

from cluster.config import require
from cluster.display import Table, pairs
from training.data.config import DataConfig
from training.model.shapes import LlamaShape
from training.plan import Plan, make_plan
from training.study.config import RuleConfig, StudyConfig
from training.study.runs import REPORT, TUNING, RunConfigs, StudyRun

# For the estimate before anything is measured: what one core of a server does with matrices this small.
ASSUMED_GFLOPS_PER_CPU = 40.0
ASSUMED_START_SECONDS = 8.0
SHARED_KEYS = (
    *("data", "batch.sequence_length", "evaluation.sequences", "evaluation.tuning_sequences"),
    "schedule.tokens",
)


class StudyPlan:
    """The runs of a study."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.configs = RunConfigs(config)

    @cached_property
    def settings(self) -> list[tuple[str, str]]:
        """(noise, width) under which every rule is tuned; the widest first, as its runs take longest."""
        config = self.config
        first, widest = next(iter(config.noises)), config.widest
        narrower = [(first, width) for width in config.widths if width != widest]
        return [(noise, widest) for noise in config.noises] + narrower

    def tuning_runs(self) -> list[StudyRun]:
        """Every rule on every rate, in every setting, with the tuning seed."""
        return [run for noise, width in self.settings for run in self.tuning_of(noise=noise, width=width)]

    def tuning_of(self, *, noise: str, width: str, rule: str | None = None) -> list[StudyRun]:
        """The tuning runs of one setting, of one rule or of all."""
        return [
            StudyRun(TUNING, name, lr, ratio, width, noise, self.config.tuning_seed)
            for name in (self.config.rules if rule is None else [rule])
            for ratio in self.config.rules[name].vector_ratios
            for lr in self.config.rules[name].grid
        ]

    def report_runs(self, rule: str, *, lr: float, vector_ratio: float, noise: str) -> list[StudyRun]:
        """One rule at one rate on the widest width, with every seed of the claims."""
        widest = self.config.widest
        return [StudyRun(REPORT, rule, lr, vector_ratio, widest, noise, seed) for seed in self.config.seeds]

    def typical_runs(self) -> list[StudyRun]:
        """As many runs as the study has, report runs at the first rate of their grid: none is chosen yet."""
        report = [
            run
            for noise in self.config.noises
            for name, rule in self.config.rules.items()
            for run in self.report_runs(
                name, lr=rule.grid[0], vector_ratio=rule.vector_ratios[0], noise=noise
            )
        ]
        return [*self.tuning_runs(), *report]

    def plan_of(self, run: StudyRun) -> Plan:
        """Steps and cost of a run. Raises `ConfigError`."""
        return make_plan(self.configs.of(run))

    def shape_of(self, width: str) -> LlamaShape:
        """The model of a width; no noise changes it."""
        noise = next(iter(self.config.noises))
        return self.plan_of(self.tuning_of(noise=noise, width=width)[0]).shape

    @property
    def data_config(self) -> DataConfig:
        """The corpus, which every run shares."""
        return self.configs.template(self.tuning_runs()[0]).data

    def check(self) -> None:
        """Raise a `ConfigError` unless every run has a plan and all are measured alike."""
        first = self.configs.of(self.tuning_runs()[0])
        for run in self._examples():
            config = self.configs.of(run)
            self.plan_of(run)
            require(config.evaluation.tuning_sequences > 0, "common_keys", _NO_TUNING_SEQUENCES)
            for path in SHARED_KEYS:
                mine, others = attrgetter(path)(config), attrgetter(path)(first)
                require(mine == others, path, f"{mine} in {run.label}, but {others} in other runs; {_WHY}")

    def _examples(self) -> list[StudyRun]:
        """A tuning and a report run of each rule and setting: those that can differ in more than rates."""
        settings = [(n, w, rule) for n, w in self.settings for rule in self.config.rules]
        tuning = [self.tuning_of(noise=n, width=w, rule=rule)[0] for n, w, rule in settings]
        widest = [run for run in tuning if run.width == self.config.widest]
        return tuning + [replace(run, phase=REPORT, seed=self.config.seeds[0]) for run in widest]


_NO_TUNING_SEQUENCES = (
    "evaluation.tuning_sequences must be above 0: rates are chosen by the loss on sequences that the claims "
    "do not use"
)
_WHY = "the runs of a study must be measured alike"


def describe_plan(plan: StudyPlan, seconds_of: Mapping[str, float], *, parallel: int) -> Table:
    """The plan for people. `seconds_of`: width -> measured seconds of a run, where there are any."""
    config, runs = plan.config, plan.typical_runs()
    num_tuning, widest = len(plan.tuning_runs()), plan.plan_of(runs[0])
    rows = [
        ("runs", f"{len(runs)} = {num_tuning} tuning + {len(runs) - num_tuning} report"),
        ("rules", "; ".join(_rules(config))),
        ("widths", ", ".join(_width(plan, width) for width in config.widths)),
        ("noise", ", ".join(config.noises)),
        ("seeds", f"{list(config.seeds)}; rates are chosen on {config.tuning_seed}"),
        ("tokens per run", f"{widest.num_steps * widest.tokens_per_step:,} in {widest.num_steps} steps"),
        ("runs at once", f"{parallel}"),
        ("time", _time(plan, runs, seconds_of, parallel=parallel)),
        ("study directory", str(config.study_directory)),
    ]
    return pairs(rows)


def _rules(config: StudyConfig) -> Iterator[str]:
    """The rules with their rates, those of a grid in one."""
    cells = {rule for name, grid in config.grids.items() for rule, _ in grid.cells(name).values()}
    yield from (_grid(name, rule) for name, rule in config.rules.items() if name not in cells)
    for name, grid in config.grids.items():
        yield f"{len(grid.rows)} x {len(grid.columns)} variants of {_grid(name, grid)}"


def _grid(name: str, rule: RuleConfig) -> str:
    """The grid of a rule, such as `muon [0.01, 0.02] x 0.15`."""
    ratios = rule.vector_ratios
    return f"{name} {list(rule.grid)} x {f'{ratios[0]:g}' if len(ratios) == 1 else list(ratios)}"


def _width(plan: StudyPlan, width: str) -> str:
    return f"{width} ({plan.shape_of(width).num_parameters:,} parameters)"


def _time(
    plan: StudyPlan, runs: Iterable[StudyRun], seconds_of: Mapping[str, float], *, parallel: int
) -> str:
    seconds = sum(seconds_of.get(run.width) or assumed_seconds(plan, run) for run in runs) / parallel
    basis = (
        f"as measured on the finished runs of {', '.join(seconds_of)}"
        if seconds_of
        else f"assuming {ASSUMED_GFLOPS_PER_CPU:g} GFLOP/s per CPU, {ASSUMED_START_SECONDS:g} s to start"
    )
    return f"about {seconds / 60:.0f} minutes in all, {basis}"


def assumed_seconds(plan: StudyPlan, run: StudyRun) -> float:
    """Seconds of a run by the assumptions above; on a GPU it is no better than a guess."""
    planned = plan.plan_of(run)
    flops = planned.flops_per_token * planned.tokens_per_step * planned.num_steps
    return ASSUMED_START_SECONDS + flops / (plan.config.cpus_per_run * ASSUMED_GFLOPS_PER_CPU * 1e9)
