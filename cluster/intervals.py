"""Intervals from repeated runs: of a rate, and of the ratio of two. Pure.

Rates are compared by ratio, so everything happens in logarithms. An interval covers the true centre in 95 of
100 cases if the runs scatter independently and log-normally; with three runs it is honest and wide.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95%, for 1 to 30 degrees of freedom.
# Source: https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_T_LARGE = 1.960


@dataclass(frozen=True)
class Interval:
    """The centre and its bounds; both bounds are None where there was one run only."""

    centre: float
    low: float | None
    high: float | None

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two have a value in common. One without bounds is a point."""
        low, high = (self.low or self.centre), (self.high or self.centre)
        return low <= (other.high or other.centre) and (other.low or other.centre) <= high

    def within(self, share: float) -> bool:
        """Whether all of it lies in [1/(1 + share), 1 + share]. One run shows nothing."""
        if self.low is None or self.high is None:
            return False
        return 1 / (1 + share) <= self.low and self.high <= 1 + share


def of_rate(values: Sequence[float]) -> Interval:
    """Of positive rates, one per run: their geometric mean, times or divided by exp(t·s/√n)."""
    logs = [math.log(value) for value in values]
    centre = statistics.mean(logs)
    if len(logs) < 2:
        return Interval(math.exp(centre), None, None)
    half = _t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def of_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of ours / theirs, from independent runs of each (Welch). A single run adds no uncertainty.

    Source: B. L. Welch, Biometrika 34 (1947), 28-35.
    """
    sides = [[math.log(value) for value in side] for side in (ours, theirs)]
    centre = statistics.mean(sides[0]) - statistics.mean(sides[1])
    parts = [(statistics.variance(side) / len(side), len(side) - 1) for side in sides if len(side) > 1]
    if not parts:
        return Interval(math.exp(centre), None, None)
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / spread if spread else max(freedom for _, freedom in parts)
    half = _t(freedom) * math.sqrt(variance)
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def _t(freedom: float) -> float:
    """Of the next lower whole number of degrees, which is the wider."""
    return _T[max(1, int(freedom)) - 1] if freedom < len(_T) + 1 else _T_LARGE
