import math
import random

import pytest

from cluster.intervals import of_rate, of_ratio


def test_of_three_runs_it_is_students_t_worked_by_hand():
    """ln 1, ln e, ln e²: mean 1, standard deviation 1, t(2) = 4.303."""
    interval = of_rate([1.0, math.e, math.e**2])
    half = 4.303 / math.sqrt(3)
    assert interval.centre == pytest.approx(math.e)
    assert (interval.low, interval.high) == pytest.approx((math.exp(1 - half), math.exp(1 + half)))


def test_one_run_has_no_bounds_and_shows_nothing():
    interval = of_rate([7.0])
    assert (interval.centre, interval.low, interval.high) == (pytest.approx(7.0), None, None)
    assert not interval.within(1e9)


def test_a_ratio_of_equal_scatter_is_welch():
    """Both sides ln ±1 about 0: variance 2/2 each, freedom (1+1)²/(1+1) = 2."""
    interval = of_ratio([math.e, 1 / math.e], [math.e, 1 / math.e])
    assert interval.centre == pytest.approx(1.0)
    assert interval.high == pytest.approx(math.exp(4.303 * math.sqrt(2)))


def test_against_a_constant_it_is_the_interval_of_the_other_side():
    runs = [3.0, 3.3, 2.9, 3.1]
    ratio, rate = of_ratio(runs, [2.0], exact=(False, True)), of_rate(runs)
    assert (ratio.low, ratio.high) == pytest.approx((rate.low / 2, rate.high / 2))


def test_a_single_measured_run_leaves_a_ratio_without_bounds():
    ratio = of_ratio([1.0, 1.01, 0.99], [1.0])
    assert (ratio.low, ratio.high) == (None, None) and not ratio.within(1.0)


def test_what_is_arithmetic_is_exact():
    assert of_rate([2.0], exact=True).within(1.1) and of_rate([2.0], exact=True).high == pytest.approx(2.0)


@pytest.mark.parametrize("number", [2, 3, 5, 40])
def test_it_covers_the_truth_in_95_of_100_cases(number):
    chance = random.Random(number)
    draws = 4000
    covered = 0
    for _ in range(draws):
        interval = of_rate([math.exp(chance.gauss(0, 0.2)) for _ in range(number)])
        covered += interval.low <= 1.0 <= interval.high
    assert 0.935 < covered / draws < 0.965


def test_what_is_parity_within_a_tolerance():
    near, far = of_rate([1.0, 1.01, 0.99]), of_rate([2.0, 2.01, 1.99])
    assert near.within(0.1) and not far.within(0.1) and not of_rate([0.5, 2.0, 1.0]).within(0.1)
