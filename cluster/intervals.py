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


@dataclass(frozen=True)
class Interval:
    """The centre and its bounds; both are None where one run shows nothing.

    Attributes:
        exact: it is arithmetic, and its bounds are its centre.
    """

    centre: float
    low: float | None
    high: float | None
    exact: bool = False

    def within(self, share: float) -> bool:
        """Whether all of it lies in [1/(1 + share), 1 + share]. One run shows nothing."""
        if self.low is None or self.high is None:
            return False
        return 1 / (1 + share) <= self.low and self.high <= 1 + share


def of_rate(values: Sequence[float], *, exact: bool = False) -> Interval:
    """Of positive rates, one per run: their geometric mean, times or divided by exp(t·s/√n)."""
    return of_ratio(values, [1.0], exact=(exact, True))


def of_ratio(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    exact: tuple[bool, bool] = (False, False),
    divisors: Sequence[Sequence[float]] = (),
) -> Interval:
    """Of ours / theirs, from independent runs of each (Welch).

    Args:
        exact: which side is arithmetic, and adds no uncertainty. A measured side of one run leaves no bounds.
        divisors: what the sides were divided by, as measured several times each. The best was used, so its
            uncertainty is that of one measurement, and not of their mean.

    Source: B. L. Welch, Biometrika 34 (1947), 28-35.
    """
    sides = [[math.log(value) for value in side] for side in (ours, theirs)]
    centre = statistics.mean(sides[0]) - statistics.mean(sides[1])
    measured = [side for side, certain in zip(sides, exact, strict=True) if not certain]
    if any(len(side) < 2 for side in measured):
        return Interval(math.exp(centre), None, None)
    if not measured:
        return Interval(math.exp(centre), math.exp(centre), math.exp(centre), exact=True)
    parts = [(statistics.variance(side) / len(side), len(side) - 1) for side in measured]
    for values in divisors:
        if len(values) > 1:
            parts.append((statistics.variance(map(math.log, values)), len(values) - 1))
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / spread if spread else 1.0
    half = _t(freedom) * math.sqrt(variance)
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def _t(freedom: float) -> float:
    """Of the next lower whole number of degrees, and of 30 beyond 30: the wider."""
    whole = int(freedom + 1e-9)  # Welch's formula gives 2 as 1.9999999999999998
    return _T[min(max(1, whole), len(_T)) - 1]
