"""One run of a study: what it varies, its configuration, its name and its directory. No torch."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.config import ConfigError
from training import config as training_config
from training.config import TrainConfig
from training.data.config import DataConfig
from training.data.prepare import request_of
from training.study.config import NO_NOISE, StudyConfig

TUNING, REPORT = "tuning", "report"
NOT_IDENTITY = ("run", "record", "session", "checkpoint")  # sections of a run that do not change its losses


@dataclass(frozen=True)
class StudyRun:
    """One training run of a study. `rule`, `width` and `noise` are names in its configuration."""

    phase: str
    rule: str
    lr: float  # optim.matrix.lr
    vector_ratio: float  # optim.vector.lr / optim.matrix.lr
    width: str
    noise: str
    seed: int

    @property
    def label(self) -> str:
        """The run's name without its identity, such as `muon-w128-lr0.02-seed1`."""
        noise = "" if self.noise == NO_NOISE else f"-{self.noise}"
        ratio = "" if self.vector_ratio == 1 else f"-x{self.vector_ratio:g}"
        return f"{self.rule}-{self.width}{noise}-lr{self.lr:g}{ratio}-seed{self.seed}"

    @property
    def rates(self) -> tuple[float, float]:
        """optim.matrix.lr and optim.vector.lr."""
        return self.lr, self.lr * self.vector_ratio


class RunConfigs:
    """The configurations of a study's runs, each made once."""

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        self._configs: dict[StudyRun, TrainConfig] = {}
        self._templates: dict[tuple[str, str, str, str], TrainConfig] = {}
        self._data_keys: dict[DataConfig, str] = {}

    def of(self, run: StudyRun) -> TrainConfig:
        """The complete configuration of a run. Raises `ConfigError`, which names the rule."""
        if run not in self._configs:
            config = self.template(run)
            matrix, vector = config.optim.matrix, config.optim.vector
            optim = replace(
                config.optim,
                matrix=replace(matrix, lr=run.rates[0]),
                vector=replace(vector, lr=run.rates[1]),
            )
            config = replace(config, optim=optim, run=replace(config.run, seed=run.seed))
            named = replace(config.run, name=f"{run.label}-{self._identity(config)}")
            self._configs[run] = replace(config, run=named)
        return self._configs[run]

    def arguments(self, run: StudyRun) -> list[str]:
        """The key=value pairs with which `training.launch` makes this run."""
        matrix_lr, vector_lr = run.rates
        return [
            *self._keys(run),
            f"optim.matrix.lr={matrix_lr!r}",
            f"optim.vector.lr={vector_lr!r}",
            f"run.seed={run.seed}",
            f"run.name={self.of(run).run.name}",
        ]

    def directory(self, run: StudyRun) -> Path:
        """`<study>/runs/<run>`."""
        return self.of(run).run_directory

    def template(self, run: StudyRun) -> TrainConfig:
        """The configuration without rates, seed and name. Loading one takes a while, and few runs differ."""
        varied = (run.phase, run.rule, run.width, run.noise)
        if varied not in self._templates:
            try:
                self._templates[varied] = training_config.load(dotlist=self._keys(run))
            except ConfigError as error:
                raise ConfigError(f"rule {run.rule!r}, width {run.width!r}: {error}") from error
        return self._templates[varied]

    def _keys(self, run: StudyRun) -> list[str]:
        """The key=value pairs of a run without its rates, seed and name."""
        study = self._study
        return [
            *study.common_keys,
            *(f"model.{name}={value}" for name, value in asdict(study.widths[run.width]).items()),
            *study.noises[run.noise].keys,
            *study.rules[run.rule].keys,
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
        """8 hex digits of everything that determines the losses of a run; they end its name.

        A changed key, default or corpus makes another run in another directory. It never continues the old
        run or takes it for finished.
        """
        sections = asdict(config)
        sections["data"].pop("directory")
        relevant = {name: value for name, value in sections.items() if name not in NOT_IDENTITY}
        if config.data not in self._data_keys:
            self._data_keys[config.data] = request_of(config.data).key
        content = [relevant, config.run.seed, self._data_keys[config.data]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def is_finished(directory: Path) -> bool:
    """Whether the run in this directory has finished. The directory's name stands for its configuration."""
    return (directory / "summary.json").exists()
