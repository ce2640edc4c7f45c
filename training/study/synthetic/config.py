"""The keys of the synthetic problem (section `synthetic` of a study). No torch."""

import math
from dataclasses import dataclass, replace

from cluster.config import key, require
from cluster.record.record import WANDB_MODES

NOISES = ("gaussian", "student", "stable")  # of optim/noise.py
LONGEST_AVERAGE = 256  # gradients, of the tuning grid


@dataclass(frozen=True)
class SyntheticConfig:
    enabled: bool = key(False, "measure the convergence rates on the synthetic problem")
    rows: int = key(4, "rows of the matrix", least=1)
    cols: int = key(16, "columns of the matrix", least=1)
    width: float = key(4.0, "δ: F is quadratic below it, linear above it", above=0, below=math.inf)
    distance: float = key(
        1.0, "RMS of the entries at the start; the minimum is at 0", above=0, below=math.inf
    )
    moments: tuple[float, ...] = key((2.0, 1.5), "p: the highest finite moment of the noise", above=1, most=2)
    horizons: tuple[int, int] = key(
        (8, 13), "shortest and longest run, as powers of two; all between are run", least=3, most=20
    )
    tuning_horizon: int = key(
        9, "length of the runs that tune the constants, as a power of two", least=4, most=20
    )
    shortest_average: int = key(
        8,
        "smallest 1/(1-momentum) that tuning may choose, a power of two",
        choices=tuple(2**k for k in range(LONGEST_AVERAGE.bit_length())),
    )
    seeds: int = key(16, "runs of each kind, each with its own start and noise", least=2)
    tuning_seeds: int = key(4, "the same for tuning, on other streams", least=2)
    noise: str = key("student", "distribution of the noise", choices=NOISES)
    tail_margin: float = key(
        0.1, "tail index of the noise minus p; gaussian ignores it", above=0, below=math.inf
    )
    scale: float = key(1.0, "(E|noise|^p)^(1/p) of an entry, before the skew", least=0, below=math.inf)
    skewed: bool = key(True, "one-sided noise minus its mean, with random signs; else symmetric noise")
    seed: int = key(0, "seed of all streams")

    def __post_init__(self) -> None:
        distinct = len(set(self.moments)) == len(self.moments) > 0
        require(distinct, "synthetic.moments", "one or more, all different")
        apart = len(self.horizons) == 2 and self.horizons[0] <= self.horizons[1] - 2
        require(apart, "synthetic.horizons", "two powers, at least two apart: a slope needs three horizons")
        tried = 2 * self.shortest_average <= 2**self.tuning_horizon
        require(tried, "synthetic.shortest_average", "must be at most half of the tuning horizon's gradients")
        if self.noise == "stable":
            fits = max(self.moments) + self.tail_margin <= 2
            require(fits, "synthetic.noise", "stable has tails up to 2, but moments + tail_margin exceeds it")


@dataclass(frozen=True)
class RowNormsConfig:
    tables: tuple[str, ...] = key(("1", "7"), "tables of arXiv 2609.39114 to make")
    sizes: tuple[int, ...] = key((8, 32, 128, 512, 2048), "m: rows of the matrix, at least its 8 columns")
    tuning_seeds: int = key(50, "problems on which the constants are chosen", least=1)
    seeds: int = key(100, "other problems, of which the cells are made", least=2)
    transport: bool = key(False, "instead of the tables: transport with and without equal rows, under noise")
    transport_steps: int = key(1000, "gradients of each of its runs, a multiple of 50", least=50)
    exhaustive: bool = key(False, "run every point of the grids on every tuning seed")
    threads: int | None = key(None, "threads; by default one on each CPU of this process", least=1)
    seed: int = key(0, "seed of all problems")
    output: str | None = key(None, "result, as JSON; default: a file of tests/baselines named for the CPU")
    wandb: str = key("auto", "W&B mode", choices=WANDB_MODES)

    def __post_init__(self) -> None:
        require(self.transport_steps % 50 == 0, "transport_steps", "must be a multiple of 50")
        for name, allowed in (("tables", {"1", "7"}), ("sizes", range(8, 2**20))):
            values = getattr(self, name)
            fits = len(set(values)) == len(values) > 0 and set(values) <= set(allowed)
            require(fits, name, f"{list(values)} must be one or more of {allowed}, all different")


def smoke(config: SyntheticConfig) -> SyntheticConfig:
    """A smaller copy that takes seconds: it shows that everything runs and measures no rate."""
    return replace(
        config,
        horizons=(6, 9),
        tuning_horizon=6,
        shortest_average=min(8, config.shortest_average),
        seeds=6,
        tuning_seeds=2,
    )
