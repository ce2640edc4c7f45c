"""The keys of the synthetic problem (section `synthetic` of a study). No torch."""

import math
from dataclasses import dataclass, replace

from cluster.config import key, require, require_choice

NOISES = ("gaussian", "student", "stable")  # of optim/noise.py
LONGEST_AVERAGE = 256  # gradients, of the tuning grid


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
