"""The keys of a study: rules, learning rates, widths, noise and seeds (`python -m training.study`).

A fragment is a list of key=value pairs of a training run (`training.config`). The fragments of a run are
merged in the order common, width, noise, rule, phase, smoke. OWN_KEYS come last; the study sets them.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import config as layered
from cluster.config import ConfigError, key, require
from cluster.record.record import WANDB_MODES
from cluster.session import ROOT, SessionConfig
from training.config import SEEDS
from training.study.synthetic.config import SyntheticConfig, smoke

DEFAULT_FILE = ROOT / "training" / "configs" / "study.yaml"
OWN_KEYS = (  # of a training run; the study sets them
    *("launcher", "workers.count", "workers.cpus", "workers.gpu", "optim.matrix.lr", "optim.vector.lr"),
    *("run.name", "run.directory", "run.seed", "record.wandb", "record.project", "record.group"),
    *("model.hidden_size", "model.ffn_size", "model.num_heads", "model.num_kv_heads"),
)
SMOKE_SEEDS, SMOKE_RATES = 2, 2
NO_NOISE = "none"


@dataclass(frozen=True)
class RuleConfig:
    keys: tuple[str, ...] = key((), "fragment that makes the rule, such as optim.matrix.rule=scion")
    grid: tuple[float, ...] = key((), "learning rates to try, as optim.matrix.lr; ascending")
    vector_ratios: tuple[float, ...] = key(
        (1.0,), "optim.vector.lr as shares of optim.matrix.lr; each is tried with each rate of the grid"
    )
    title: str | None = key(None, "the rule's name in text and figures")

    @property
    def num_points(self) -> int:
        """Tuning runs in one setting."""
        return len(self.grid) * len(self.vector_ratios)


@dataclass(frozen=True)
class GridConfig(RuleConfig):
    rows: tuple[str, ...] = key((), "variants of the rule, each 'name: key=value key=value' or 'name:'")
    columns: tuple[str, ...] = key((), "the same; every row with every column is a rule of its own")

    def cells(self, name: str) -> dict[tuple[str, str], tuple[str, RuleConfig]]:
        """(row, column) -> the rule's name, such as `moved.m0.9.cap2`, and the rule."""
        found = {}
        for row, column in itertools.product(self.rows, self.columns):
            (of_row, _, first), (of_column, _, second) = row.partition(":"), column.partition(":")
            found[of_row, of_column] = (
                f"{name}.{of_row}.{of_column}",
                RuleConfig(
                    keys=(*self.keys, *first.split(), *second.split()),
                    grid=self.grid,
                    vector_ratios=self.vector_ratios,
                    title=f"{self.title or name} {of_row} {of_column}",
                ),
            )
        return found


@dataclass(frozen=True)
class WidthConfig:
    hidden_size: int = key(128, "model.hidden_size")
    ffn_size: int = key(344, "model.ffn_size")
    num_heads: int = key(4, "model.num_heads")
    num_kv_heads: int = key(4, "model.num_kv_heads")


@dataclass(frozen=True)
class StudyNoiseConfig:
    keys: tuple[str, ...] = key((), "fragment that adds the noise; empty: the gradient's own")


@dataclass(frozen=True)
class ClaimsConfig:
    reference: str | None = key(None, "rule whose mean final validation loss the others are to reach")
    rule: str | None = key(None, "rule that is to need fewer tokens to reach that loss")
    token_ratio: float = key(
        0.75, "target of that rule: at most this share of the reference's tokens", above=0, most=1
    )
    challenger: str | None = key(None, "rule whose final loss is compared with that of `baseline`")
    baseline: str | None = key(None, "rule that the challenger is to equal within the band of the seeds")


@dataclass(frozen=True)
class StudyConfig:
    name: str = key(
        "study",
        "the study; the same name again finishes what is left of it",
        pattern=(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "must be letters, digits, '-', '_' and '.'"),
    )
    directory: str = key("outputs", "where studies are kept; on a cluster, storage that every node sees")
    smoke: bool = key(
        False, f"in miniature: smoke_keys, {SMOKE_SEEDS} seeds, {SMOKE_RATES} rates of each grid"
    )
    rules: dict[str, RuleConfig] = key(dict, "the rules, by name")
    grids: dict[str, GridConfig] = key(dict, "rules varied in two ways, by name; the report has their table")
    widths: dict[str, WidthConfig] = key(dict, "the sizes of the model, by name; claims are of the widest")
    noise: dict[str, StudyNoiseConfig] = key(
        dict, f"the noise settings, by name; default: '{NO_NOISE}', without a fragment"
    )
    only: tuple[str, ...] = key(
        (),
        "a part of the study: names of rules and grids, of widths, of noise settings; of each of these three "
        "kinds all are run unless one of its names stands here",
    )
    seeds: tuple[int, ...] = key((1, 2, 3), "run.seed of the runs that the claims are made of")
    tuning_seed: int = key(0, "run.seed of the runs that choose the rates; not one of `seeds`")
    equal_effort: bool = key(True, "every rule must have as many points, rates x ratios, as the others")
    common_keys: tuple[str, ...] = key((), "fragment of every run")
    tuning_keys: tuple[str, ...] = key((), "fragment of the runs that choose the rates")
    smoke_keys: tuple[str, ...] = key((), "fragment of every run where smoke=true")
    claims: ClaimsConfig = key(ClaimsConfig, "")
    synthetic: SyntheticConfig = key(SyntheticConfig, "")
    wandb: str = key(
        "auto",
        "record.wandb of every run; the runs are one Weights & Biases group, named as the study",
        choices=WANDB_MODES,
    )
    project: str = key("asuncion", "record.project of every run")
    parallel_runs: int | None = key(
        None, "runs at once on an embedded Ray; by default as many as CPUs allow", least=1
    )
    cpus_per_run: float = key(1.0, "CPUs that Ray reserves for a run; also its threads", above=0)
    gpus_per_run: int = key(0, "GPUs that Ray reserves for a run", choices=(0, 1))
    keep_checkpoints: bool = key(False, "keep the checkpoints of finished runs")
    session: SessionConfig = key(SessionConfig, "")

    @property
    def study_directory(self) -> Path:
        """`<directory>/<name>`, absolute; `-smoke` is appended to the name of a miniature."""
        return (Path(self.directory).expanduser() / self.full_name).absolute()

    @property
    def full_name(self) -> str:
        """The name, with `-smoke` appended for a miniature."""
        return self.name + "-smoke" * self.smoke

    @property
    def widest(self) -> str:
        """The name of the width with the largest hidden size."""
        return max(self.widths, key=lambda name: self.widths[name].hidden_size)

    @property
    def noises(self) -> dict[str, StudyNoiseConfig]:
        """The noise settings; at least one, which may add no noise."""
        return self.noise or {NO_NOISE: StudyNoiseConfig()}

    def title(self, rule: str) -> str:
        """The rule's name in text and figures."""
        return self.rules[rule].title or rule


def load(*, file: Path | None = None, dotlist: Sequence[str] = ()) -> StudyConfig:
    """The study's configuration: defaults <- `file` <- `dotlist`, reduced where `smoke` is set.

    Raises:
        ConfigError: as `cluster.config.load`; or rules, seeds, grids or claims that cannot be used.
    """
    config = _with_grids(_chosen(layered.load(StudyConfig, file=file, dotlist=dotlist)))
    _check_names(config)
    _check_grids(config)
    _check_seeds(config)
    _check_fragments(config)
    _check_claims(config)
    return _shrunk(config) if config.smoke else config


def _chosen(config: StudyConfig) -> StudyConfig:
    """The part that `only` names."""
    kinds = (("rules", "grids"), ("widths",), ("noise",))
    parts: dict[str, Any] = {}
    known = [name for kind in kinds for section in kind for name in getattr(config, section)]
    for name in config.only:
        require(name in known, "only", f"{name!r} is not one of {', '.join(known)}")
    for kind in kinds:
        if any(name in getattr(config, section) for section in kind for name in config.only):
            for section in kind:
                all_of_it = getattr(config, section)
                parts[section] = {name: all_of_it[name] for name in all_of_it if name in config.only}
    return dataclasses.replace(config, **parts)


def _with_grids(config: StudyConfig) -> StudyConfig:
    """With the cells of every grid among the rules."""
    cells = [cell for name, grid in config.grids.items() for cell in grid.cells(name).values()]
    return dataclasses.replace(config, rules={**config.rules, **dict(cells)})


def _shrunk(config: StudyConfig) -> StudyConfig:
    """In miniature: the middle of each grid, the first seeds. `training.study.runs` adds `smoke_keys`."""
    rules = {
        name: dataclasses.replace(rule, grid=_middle(rule.grid), vector_ratios=rule.vector_ratios[:1])
        for name, rule in config.rules.items()
    }
    return dataclasses.replace(
        config,
        rules=rules,
        seeds=config.seeds[:SMOKE_SEEDS],
        synthetic=smoke(config.synthetic),
    )


def _middle(grid: tuple[float, ...]) -> tuple[float, ...]:
    first = max(len(grid) - SMOKE_RATES, 0) // 2
    return grid[first : first + SMOKE_RATES]


def _check_names(config: StudyConfig) -> None:
    for name, grid in config.grids.items():
        for axis in ("rows", "columns"):
            levels = getattr(grid, axis)
            named = len({level.partition(":")[0] for level in levels}) == len(levels) > 0
            require(named, f"grids.{name}.{axis}", "must name one or more variants, all different")
    for section in ("rules", "widths"):
        require(bool(getattr(config, section)), section, "is empty; name at least one")
    for section in ("rules", "widths", "noise"):
        for name in getattr(config, section):
            plain = re.fullmatch(r"[A-Za-z0-9_.]+", name) is not None
            require(plain, section, f"the name {name!r} must be letters, digits, '_' and '.'")


def _check_grids(config: StudyConfig) -> None:
    for name, rule in config.rules.items():
        for path, tried in (("grid", rule.grid), ("vector_ratios", rule.vector_ratios)):
            where = f"rules.{name}.{path}"
            require(bool(tried), where, "is empty; give the values to try")
            ascending = all(a < b for a, b in itertools.pairwise(tried))
            require(tried[0] > 0 and ascending, where, f"{list(tried)} must be positive and ascending")
    sizes = {name: rule.num_points for name, rule in config.rules.items()}
    if config.equal_effort and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"rules: the grids have unequal numbers of points ({listed}), which is unequal tuning effort; "
            "make them equal, or set equal_effort=false, which the report will say"
        )


def _check_seeds(config: StudyConfig) -> None:
    require(bool(config.seeds), "seeds", "is empty; at least 3 make a band")
    for name, seeds in (("seeds", config.seeds), ("tuning_seed", (config.tuning_seed,))):
        for seed in seeds:
            require(seed in SEEDS, name, f"{seed} must lie in [0, 2^63)")
    require(len(set(config.seeds)) == len(config.seeds), "seeds", f"{list(config.seeds)} names one twice")
    require(
        config.tuning_seed not in config.seeds,
        "tuning_seed",
        f"{config.tuning_seed} is one of seeds={list(config.seeds)}; the rates must be chosen on another",
    )


def _check_fragments(config: StudyConfig) -> None:
    fragments = {name: getattr(config, name) for name in ("common_keys", "tuning_keys", "smoke_keys")}
    fragments |= {f"rules.{name}.keys": rule.keys for name, rule in config.rules.items()}
    fragments |= {f"noise.{name}.keys": noise.keys for name, noise in config.noise.items()}
    for path, fragment in fragments.items():
        for pair in fragment:
            name, equals, _ = pair.partition("=")
            require(bool(equals and name), path, f"{pair!r}: expected key=value")
            require(name not in OWN_KEYS, path, f"{pair}: leave it out; the study sets {name} itself")


def _check_claims(config: StudyConfig) -> None:
    for name in ("reference", "rule", "challenger", "baseline"):
        label = getattr(config.claims, name)
        known = label is None or label in config.rules
        require(known, f"claims.{name}", f"{label!r} is not one of the rules: {', '.join(config.rules)}")
