"""What follows from a study's configuration before anything runs: its runs, names and cost. No torch.

Two phases. `tuning`: every rule on every rate of its grid, with one seed: on each width under the first
noise, and on the widest width under every other. `report`: on the widest, under each noise, the rate of each
rule with the lowest tuning loss, with every seed that the claims are made of.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.config import ConfigError, require
from training import config as training_config
from training.config import TrainConfig
from training.data.prepare import Request
from training.plan import Plan, make_plan
from training.study.config import NO_NOISE, RuleConfig, StudyConfig

TUNING, REPORT = "tuning", "report"
NOT_IDENTITY = ("run", "record", "session", "checkpoint")  # sections of a run that do not change its losses
# For the estimate before anything is measured: what one core of a server does with matrices this small.
ASSUMED_GFLOPS_PER_CPU = 40.0
ASSUMED_START_SECONDS = 8.0


@dataclass(frozen=True)
class Run:
    """One training run of a study. `rule`, `width` and `noise` are names in its configuration."""

    phase: str
    rule: str
    lr: float  # optim.matrix.lr
    vector_ratio: float  # optim.vector.lr as a share of it
    width: str
    noise: str
    seed: int


class StudyPlan:
    """The runs of a study, each with its configuration, its name and its place."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self._configs: dict[Run, TrainConfig] = {}
        self._templates: dict[tuple[str, str, str, str], TrainConfig] = {}

    # --- which runs -------------------------------------------------------------------------------------

    @cached_property
    def settings(self) -> list[tuple[str, str]]:
        """(noise, width) under which every rule is tuned; the widest first, as its runs take longest."""
        config = self.config
        first, widest = next(iter(config.noises)), config.widest
        narrower = [(first, width) for width in config.widths if width != widest]
        return [(noise, widest) for noise in config.noises] + narrower

    def tuning_runs(self) -> list[Run]:
        """Every rule on every rate, in every setting, with the tuning seed."""
        return [run for noise, width in self.settings for run in self.tuning_of(noise=noise, width=width)]

    def tuning_of(self, *, noise: str, width: str, rule: str | None = None) -> list[Run]:
        """The tuning runs of one setting, of one rule or of all."""
        rules = self.config.rules if rule is None else [rule]
        return [
            Run(TUNING, name, lr, ratio, width, noise, self.config.tuning_seed)
            for name in rules
            for ratio in self.config.rules[name].vector_ratios
            for lr in self.config.rules[name].grid
        ]

    def report_runs(self, rule: str, *, lr: float, vector_ratio: float, noise: str) -> list[Run]:
        """One rule at one rate on the widest width, with every seed of the claims."""
        widest = self.config.widest
        return [Run(REPORT, rule, lr, vector_ratio, widest, noise, seed) for seed in self.config.seeds]

    @property
    def num_report_runs(self) -> int:
        """The number of report runs, if every rule gets a rate."""
        return len(self.config.noises) * len(self.config.rules) * len(self.config.seeds)

    # --- one run ----------------------------------------------------------------------------------------

    def config_of(self, run: Run) -> TrainConfig:
        """The configuration of a run, complete. Raises `ConfigError`, which says of which rule."""
        if run not in self._configs:
            matrix_lr, vector_lr = self._rates(run)
            config = self._template(run)
            matrix = dataclasses.replace(config.optim.matrix, lr=matrix_lr)
            vector = dataclasses.replace(config.optim.vector, lr=vector_lr)
            config = dataclasses.replace(
                config,
                optim=dataclasses.replace(config.optim, matrix=matrix, vector=vector),
                run=dataclasses.replace(config.run, seed=run.seed),
            )
            named = dataclasses.replace(config.run, name=f"{label(run)}-{self._identity(config)}")
            self._configs[run] = dataclasses.replace(config, run=named)
        return self._configs[run]

    def arguments(self, run: Run) -> list[str]:
        """The key=value pairs with which `training.launch` makes this run."""
        matrix_lr, vector_lr = self._rates(run)
        return [
            *self._keys(run),
            f"optim.matrix.lr={matrix_lr!r}",
            f"optim.vector.lr={vector_lr!r}",
            f"run.seed={run.seed}",
            f"run.name={self.config_of(run).run.name}",
        ]

    def directory_of(self, run: Run) -> Path:
        """`<study>/runs/<run>`."""
        return self.config_of(run).run_directory

    def _rates(self, run: Run) -> tuple[float, float]:
        """optim.matrix.lr and optim.vector.lr."""
        return run.lr, run.lr * run.vector_ratio

    def _template(self, run: Run) -> TrainConfig:
        """The configuration but for rates, seed and name: loading it takes a while, and few runs differ."""
        of = (run.phase, run.rule, run.width, run.noise)
        if of not in self._templates:
            try:
                self._templates[of] = training_config.load(dotlist=self._keys(run))
            except ConfigError as error:
                raise ConfigError(f"rule {run.rule!r}, width {run.width!r}: {error}") from error
        return self._templates[of]

    def _keys(self, run: Run) -> list[str]:
        """The key=value pairs of a run, but for its rates, seed and name."""
        study = self.config
        rule, width = study.rules[run.rule], study.widths[run.width]
        return [
            *study.common_keys,
            *(f"model.{name}={value}" for name, value in dataclasses.asdict(width).items()),
            *study.noises[run.noise].keys,
            *rule.keys,
            *(study.tuning_keys if run.phase == TUNING else ()),
            *(study.smoke_keys if study.smoke else ()),
            "launcher=torch",
            "workers.count=1",
            f"workers.cpus={study.cpus_per_run!r}",
            f"workers.gpu={str(bool(study.gpus_per_run)).lower()}",
            f"run.directory={study.study_directory / 'runs'}",
            f"record.wandb={study.wandb}",
            f"record.project={study.project}",
            f"record.group={study.full_name}",
        ]

    def _identity(self, config: TrainConfig) -> str:
        """8 hex digits of all that determines the losses of a run.

        They end its name: a changed key, default or corpus makes another run, in another directory, and never
        continues or takes for finished the old one.
        """
        asked = [_relevant(config), config.run.seed, self._data_key]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]

    @cached_property
    def _data_key(self) -> str:
        return Request.of(self.data_config).key

    # --- the whole --------------------------------------------------------------------------------------

    @cached_property
    def data_config(self) -> training_config.DataConfig:
        """The corpus, which every run shares."""
        return self._template(self.tuning_runs()[0]).data

    def check(self) -> None:
        """Raise a `ConfigError` unless every run makes a plan and all are held to the same losses."""
        first = self.config_of(self.tuning_runs()[0])
        for run in self._examples():
            config = self.config_of(run)
            self.plan_of(run)
            require(config.evaluation.tuning_sequences > 0, "common_keys", _NO_TUNING_SEQUENCES)
            for path, mine, others in _shared(config, first):
                require(mine == others, path, f"{mine} in {label(run)}, but {others} in other runs; {_WHY}")

    def _examples(self) -> list[Run]:
        """A tuning and a report run of each rule and setting: those that can differ in more than rates."""
        settings = [(n, w, rule) for n, w in self.settings for rule in self.config.rules]
        tuning = [self.tuning_of(noise=n, width=w, rule=rule)[0] for n, w, rule in settings]
        return tuning + [
            dataclasses.replace(run, phase=REPORT, seed=self.config.seeds[0])
            for run in tuning
            if run.width == self.config.widest
        ]

    def plan_of(self, run: Run) -> Plan:
        """Steps and cost of a run. Raises `ConfigError`."""
        return make_plan(self.config_of(run))

    def typical_runs(self) -> list[Run]:
        """As many runs as the study has, with the first rates in place of those not chosen yet."""
        report = [
            run
            for noise in self.config.noises
            for rule in self.config.rules
            for run in self._first_report_runs(rule, noise=noise)
        ]
        return [*self.tuning_runs(), *report]

    def _first_report_runs(self, rule: str, *, noise: str) -> list[Run]:
        tried = self.config.rules[rule]
        return self.report_runs(rule, lr=tried.grid[0], vector_ratio=tried.vector_ratios[0], noise=noise)

    def describe(self, seconds_of: Mapping[str, float], *, parallel: int) -> str:
        """The plan for people. `seconds_of`: width -> measured seconds of a run, as far as there are any."""
        config, runs = self.config, self.typical_runs()
        num_tuning, widest = len(self.tuning_runs()), self.plan_of(runs[0])
        rows = [
            ("runs", f"{len(runs)} = {num_tuning} tuning + {self.num_report_runs} report"),
            ("rules", "; ".join(grid_text(name, rule) for name, rule in config.rules.items())),
            ("widths", ", ".join(self._width(width) for width in config.widths)),
            ("noise", ", ".join(config.noises)),
            ("seeds", f"{list(config.seeds)}; rates are chosen on {config.tuning_seed}"),
            ("tokens per run", f"{widest.num_steps * widest.tokens_per_step:,} in {widest.num_steps} steps"),
            ("runs at once", f"{parallel}"),
            ("time", self._time(runs, seconds_of, parallel=parallel)),
            ("study directory", str(config.study_directory)),
        ]
        return "\n".join(f"{name:<18}{value}" for name, value in rows)

    def _width(self, width: str) -> str:
        noise = next(iter(self.config.noises))
        shape = self.plan_of(self.tuning_of(noise=noise, width=width)[0]).shape
        return f"{width} ({shape.num_parameters:,} parameters)"

    def _time(self, runs: Iterable[Run], seconds_of: Mapping[str, float], *, parallel: int) -> str:
        seconds = sum(seconds_of.get(run.width) or self.assumed_seconds(run) for run in runs) / parallel
        basis = (
            f"as measured on the finished runs of {', '.join(seconds_of)}"
            if seconds_of
            else f"assuming {ASSUMED_GFLOPS_PER_CPU:g} GFLOP/s per CPU, {ASSUMED_START_SECONDS:g} s to start"
        )
        return f"about {seconds / 60:.0f} minutes in all, {basis}"

    def assumed_seconds(self, run: Run) -> float:
        """Seconds of a run by the assumptions above; on a GPU it is no better than a guess."""
        plan = self.plan_of(run)
        flops = plan.flops_per_token * plan.tokens_per_step * plan.num_steps
        return ASSUMED_START_SECONDS + flops / (self.config.cpus_per_run * ASSUMED_GFLOPS_PER_CPU * 1e9)


_NO_TUNING_SEQUENCES = (
    "evaluation.tuning_sequences must be above 0: rates are chosen by the loss on sequences that the claims "
    "do not use"
)
_WHY = "the runs of a study must be measured alike"


def _shared(config: TrainConfig, other: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(key, value, value in the other) of what all runs must share."""
    pairs: list[tuple[str, Any, Any]] = [
        ("data", config.data, other.data),
        ("batch.sequence_length", config.batch.sequence_length, other.batch.sequence_length),
        ("evaluation.sequences", config.evaluation.sequences, other.evaluation.sequences),
        (
            "evaluation.tuning_sequences",
            config.evaluation.tuning_sequences,
            other.evaluation.tuning_sequences,
        ),
        ("schedule.tokens", config.schedule.tokens, other.schedule.tokens),
    ]
    return pairs


def _relevant(config: TrainConfig) -> dict[str, Any]:
    """What determines the losses of a run."""
    sections = dataclasses.asdict(config)
    sections["data"].pop("directory")
    return {name: value for name, value in sections.items() if name not in NOT_IDENTITY}


def label(run: Run) -> str:
    """The run's name without its identity, such as `muon-w128-lr0.02-seed1`."""
    noise = "" if run.noise == NO_NOISE else f"-{run.noise}"
    ratio = "" if run.vector_ratio == 1 else f"-x{run.vector_ratio:g}"
    return f"{run.rule}-{run.width}{noise}-lr{run.lr:g}{ratio}-seed{run.seed}"


def grid_text(name: str, rule: RuleConfig) -> str:
    """The grid of a rule in words, such as `muon [0.01, 0.02] x 0.15`."""
    ratios = rule.vector_ratios
    return (
        f"{name} {list(rule.grid)} x {ratios[0]:g}"
        if len(ratios) == 1
        else (f"{name} {list(rule.grid)} x {list(ratios)}")
    )


def is_finished(directory: Path) -> bool:
    """Whether the run in this directory, whose name stands for its configuration, has finished."""
    return (directory / "summary.json").exists()
