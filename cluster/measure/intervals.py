"""Intervals from repeated runs: of a rate, and of the ratio of two. Pure.

Rates are compared by ratio, so everything happens in logarithms. An interval covers the true value in at
least 95 of 100 cases if the runs scatter independently and log-normally, however many there are; with two or
three it is wide. What was measured once has no interval, and neither has anything divided by it. Ceilings
scatter to one side only; there an interval of two measurements covers at least 93 (tests/cluster/measure).
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
    """The centre and its bounds. Bounds are None after a single measurement, which shows no scatter.

    Attributes:
        exact: it is arithmetic, and its bounds are its centre.
    """

    centre: float
    low: float | None
    high: float | None
    exact: bool = False

    def within(self, share: float) -> bool:
        """Whether all of it lies in [1/(1 + share), 1 + share]; False without bounds."""
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
    """Of ours / theirs, from independent runs of each: times or divided by exp(√Σ(t_i·s_i)²).

    s_i is the standard error of part i, and t_i Student's t at that part's own degrees of freedom. This never
    covers less than 95 of 100 cases; Welch's interval covers 89 with 2 runs against 10.

    Args:
        exact: which side is arithmetic, and adds no uncertainty. A measured side of one run leaves no bounds.
        divisors: what the sides were divided by, as measured; empty where that is exact. A single measurement
            leaves no bounds. The best was used, so its uncertainty is that of one, and not of their mean.

    Source: S. K. Banerjee, Sankhya 22 (1960), 357-358.
    """
    sides = [[math.log(value) for value in side] for side in (ours, theirs)]
    centre = statistics.mean(sides[0]) - statistics.mean(sides[1])
    means = [side for side, certain in zip(sides, exact, strict=True) if not certain]
    singles = [[math.log(value) for value in values] for values in divisors if values]
    if any(len(part) < 2 for part in (*means, *singles)):
        return Interval(math.exp(centre), None, None)
    if not means and not singles:
        return Interval(math.exp(centre), math.exp(centre), math.exp(centre), exact=True)
    squares = [_t(len(side)) ** 2 * statistics.variance(side) / len(side) for side in means]
    squares += [_t(len(values)) ** 2 * statistics.variance(values) for values in singles]
    half = math.sqrt(sum(squares))
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def of_mean(values: Sequence[float]) -> Interval:
    """Of the mean of independent, normal values, such as differences: plus or minus t·s/√n."""
    centre = statistics.fmean(values)
    if len(values) < 2:
        return Interval(centre, None, None)
    half = _t(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(centre, centre - half, centre + half)


def of_median(values: Sequence[float]) -> Interval:
    """Of the median of independent values from one distribution, of any shape: between two of the values.

    The bounds are the k-th smallest and the k-th largest, with the largest k for which fewer than k of n fair
    coins show heads in at most 2.5 of 100 cases. Below six values there is none.

    Source: https://online.stat.psu.edu/stat415/lesson/19/19.1
    """
    ordered, number = sorted(values), len(values)
    tail, place = 1 / 2**number, 0
    while tail <= 0.025:
        place += 1
        tail += math.comb(number, place) / 2**number
    centre = statistics.median(ordered)
    return Interval(centre, ordered[place - 1], ordered[-place]) if place else Interval(centre, None, None)


def _t(number: int) -> float:
    """Student's t for this many values (n - 1 degrees of freedom); beyond 30 degrees that of 30."""
    return _T[min(number - 1, len(_T)) - 1]
