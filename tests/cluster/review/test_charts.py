import math

import numpy as np
import pytest

from cluster.review.charts import MOST_POINTS, Charts, Curve, Mark, medians, thin
from cluster.review.words import amount, plain
from tests.cluster.review.browser import CHROMIUM, run_script


def test_thinning_two_million_values_keeps_every_spike_and_every_gap():
    x = np.arange(2_000_000.0)
    y = np.sin(x / 1000)
    y[[7, 999_999, 1_999_998]] = [-50.0, 80.0, 3.0]
    y[500_000:500_010] = math.nan
    x_kept, y_kept = thin(x, y)
    assert len(x_kept) <= 1.5 * MOST_POINTS
    assert {7.0, 500_000.0, 999_999.0, 1_999_998.0} <= set(x_kept.tolist())
    assert (np.diff(x_kept) > 0).all() and np.isnan(y_kept).sum() == 1
    assert all(
        y[int(place)] == value or math.isnan(value) for place, value in zip(x_kept, y_kept, strict=True)
    )


def test_the_middle_of_a_thinned_curve_is_the_median_of_what_is_finite():
    y = np.tile([1.0, 5.0, 2.0, math.nan], 1000)
    y[:4] = math.inf
    x, middle = medians(np.arange(4000.0), y, most=2000)
    assert len(x) == 999 and set(middle) == {2.0} and (np.diff(x) > 0).all()


def test_a_short_curve_is_drawn_as_it_is():
    x, y = np.arange(5.0), np.array([1.0, math.nan, 2.0, math.inf, 3.0])
    assert thin(x, y)[0] is x and thin(x, y)[1] is y


def test_charts_of_one_axis_zoom_together():
    charts = Charts("step")
    curve = Curve("loss", [1, 2], [3, 4])
    first, second = (charts.line(name, [curve], unit="nats", marks=[Mark(1, "1", "x")]) for name in "ab")
    assert first.figure.x_range is second.figure.x_range
    assert Charts("tokens").line("c", [curve], unit="nats").figure.x_range is not first.figure.x_range


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 2, 3, 1000], "log"),
        ([1, 2, 3, 20], "linear"),
        ([0, 2, 3, 1000], "linear"),
        ([math.nan], "linear"),
    ],
)
def test_an_axis_is_logarithmic_where_a_linear_one_would_flatten_the_curve(values, scale):
    chart = Charts("step").line("a", [Curve("a", range(len(values)), values)], unit="x")
    assert ("log scale" in chart.figure.yaxis[0].axis_label) == (scale == "log")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_ticks_are_written_as_people_write_them(tmp_path):
    axis = Charts("step").line("a", [Curve("a", [1], [2])], unit="x").figure.yaxis[0]
    values = [0, 0.25, 6500, 1.2e6, 1.0000000000000001e23, -1e15, 2.5e-7]
    script = f"document.body.textContent = {values}.map(tick => {{{axis.formatter.code}}}).join(' | ')"
    written = run_script(script, folder=tmp_path)
    assert written == "0 | 0.25 | 6,500 | 1.2M | 1·10²³ | -1·10¹⁵ | 2.5·10⁻⁷"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (6500, "6,500"),
        (6500.4, "6,500"),
        (5.13604, "5.136"),
        (0.02, "0.02"),
        (0.00015, "0.00015"),
        (1.2e-7, "1.2000·10⁻⁷"),
        (1_420_400_000, "1,420,400,000"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (None, "-"),
        (0.0, "0"),
        (True, "True"),
    ],
)
def test_numbers_are_written_as_people_write_them(value, written):
    assert amount(value) == written


def test_values_of_a_configuration_are_written_as_one_types_them():
    assert [plain(value) for value in (None, True, 0.02, ["a", 1], [])] == [
        "null",
        "true",
        "0.02",
        "a, 1",
        "[]",
    ]
