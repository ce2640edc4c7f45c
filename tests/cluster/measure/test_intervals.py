import math
import random
from collections.abc import Callable

import pytest

from cluster.measure.intervals import Interval, of_mean, of_median, of_rate, of_ratio


def test_of_three_runs_it_is_students_t_worked_by_hand():
    """ln 1, ln e, ln e²: mean 1, standard deviation 1, t(2) = 4.303."""
    interval = of_rate([1.0, math.e, math.e**2])
    half = 4.303 / math.sqrt(3)
    assert interval.centre == pytest.approx(math.e)
    assert (interval.low, interval.high) == pytest.approx((math.exp(1 - half), math.exp(1 + half)))


def test_the_mean_of_differences_has_bounds_on_both_sides():
    """Mean -1, standard deviation 1, t(2) = 4.303."""
    half = 4.303 / math.sqrt(3)
    interval = of_mean([-2.0, -1.0, 0.0])
    assert (interval.centre, interval.low, interval.high) == pytest.approx((-1, -1 - half, -1 + half))
    assert of_mean([3.0]) == Interval(3.0, None, None)


def test_one_run_has_no_bounds_and_shows_nothing():
    interval = of_rate([7.0])
    assert (interval.centre, interval.low, interval.high) == (pytest.approx(7.0), None, None)
    assert not interval.within(1e9)


def test_each_part_of_a_ratio_counts_with_its_own_t_worked_by_hand():
    """ln ±1: variance 2, of the mean of two 1; ln 1, ln e, ln e²: variance 1, of the mean of three 1/3."""
    two, three = [math.e, 1 / math.e], [1.0, math.e, math.e**2]
    interval = of_ratio(two, three)
    assert interval.centre == pytest.approx(1 / math.e)
    assert interval.high == pytest.approx(math.exp(-1 + math.sqrt(12.706**2 + 4.303**2 / 3)))
    divided = of_ratio(two, [1.0], exact=(False, True), divisors=[three])
    assert divided.high == pytest.approx(math.exp(math.sqrt(12.706**2 + 4.303**2)))  # of the best one alone


def test_against_a_constant_it_is_the_interval_of_the_other_side():
    runs = [3.0, 3.3, 2.9, 3.1]
    ratio, rate = of_ratio(runs, [2.0], exact=(False, True)), of_rate(runs)
    assert (ratio.low, ratio.high) == pytest.approx((rate.low / 2, rate.high / 2))


def test_a_single_measured_run_leaves_a_ratio_without_bounds():
    ratio = of_ratio([1.0, 1.01, 0.99], [1.0])
    assert (ratio.low, ratio.high) == (None, None) and not ratio.within(1.0)


def test_what_is_divided_by_a_single_measurement_has_no_bounds():
    runs = [3.0, 3.3, 2.9]
    for divisors in ([[5.0]], [[], [5.0]], [[5.0, 5.1], [5.0]]):
        ratio = of_ratio(runs, [1.0], exact=(False, True), divisors=divisors)
        assert ratio.centre == pytest.approx(of_rate(runs).centre) and (ratio.low, ratio.high) == (None, None)
    assert of_ratio(runs, [1.0], exact=(False, True), divisors=[[], []]) == of_rate(runs)  # of a datasheet
    measured = of_ratio([2.0], [1.0], exact=(True, True), divisors=[[5.0, 5.1]])
    assert not measured.exact and measured.low < 2.0 < measured.high


def test_what_is_arithmetic_is_exact():
    assert of_rate([2.0], exact=True).within(1.1) and of_rate([2.0], exact=True).high == pytest.approx(2.0)


DRAWS = 1000
LEAST = 0.95 - 3 * 0.0069  # and so much 1000 draws scatter
SCATTERS = [(0.1, 0.05), (0.05, 0.05), (0.05, 0.1)]


def share_covered(draw: Callable[[random.Random], Interval]) -> float:
    chance = random.Random(5)
    found = [draw(chance) for _ in range(DRAWS)]
    return sum(each.low <= 1.0 <= each.high for each in found) / DRAWS


@pytest.mark.parametrize("number", [2, 3, 40])
def test_of_one_rate_it_covers_the_truth_in_95_of_100_cases(number):
    covered = share_covered(lambda chance: of_rate([math.exp(chance.gauss(0, 0.2)) for _ in range(number)]))
    assert LEAST < covered < 0.95 + 3 * 0.0069


@pytest.mark.parametrize("numbers", [(2, 2), (2, 10), (3, 10)])
def test_of_a_ratio_it_covers_the_truth_in_at_least_95_of_100_cases(numbers):
    for scatter in SCATTERS:
        covered = share_covered(
            lambda chance, scatter=scatter: of_ratio(
                *(
                    [math.exp(chance.gauss(0, s)) for _ in range(n)]
                    for n, s in zip(numbers, scatter, strict=True)
                )
            )
        )
        assert covered > LEAST, scatter


@pytest.mark.parametrize("number", [2, 3])
def test_of_shares_of_ceilings_that_something_may_disturb_it_covers_the_truth_too(number):
    """A ceiling is never exceeded, and the best of its measurements is used: it scatters to one side."""

    def parity(chance: random.Random, rates: float, ceilings: float) -> Interval:
        shares, measured = [], []
        for _ in range(2):
            peaks = [math.exp(-abs(chance.gauss(0, ceilings))) for _ in range(number)]
            shares.append([math.exp(chance.gauss(0, rates)) / max(peaks) for _ in range(number)])
            measured.append(peaks)
        return of_ratio(*shares, divisors=measured)

    for scatter in SCATTERS:
        assert share_covered(lambda chance, scatter=scatter: parity(chance, *scatter)) > LEAST, scatter


def test_what_is_parity_within_a_tolerance():
    near, far = of_rate([1.0, 1.01, 0.99]), of_rate([2.0, 2.01, 1.99])
    assert near.within(0.1) and not far.within(0.1) and not of_rate([0.5, 2.0, 1.0]).within(0.1)


def test_of_a_median_it_lies_between_the_values_of_the_sign_tests_table():
    """The 95% values of the table are the second of 9 and 10, and the 40th of 100; five values show none."""
    assert of_median([5.0, 1.0, 2.0, 4.0, 3.0]) == Interval(3.0, None, None)
    assert of_median([float(value) for value in range(1, 11)]) == Interval(5.5, 2.0, 9.0)
    assert of_median([float(value) for value in range(1, 101)]) == Interval(50.5, 40.0, 61.0)
    assert of_median([1.0] * 3000).high == 1.0
