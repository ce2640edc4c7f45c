"""Numbers as people write them, and tables of Markdown."""

import math

import pytest
from markdown_it import MarkdownIt

from cluster.display import duration, in_thousands, markdown, number, span


def test_a_bar_in_a_cell_ends_no_cell():
    text = "\n".join(markdown(("machine", "command|s"), [("A|B", "`a | b`"), (None, 1)]))
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<td>") == 4 and html.count("<th>") == 2
    for cell in ("<th>command|s</th>", "<td>A|B</td>", "<td><code>a | b</code></td>", "<td>-</td>"):
        assert cell in html


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (6503.2, "6,500"), (3_765_100.0, "3,770,000"), (999.6, "1,000"), (98.34, "98.3"), (0.85, "0.850"),
        (-0.04, "-0.0400"), (0.000168, "0.000168"), (0.0000367, "3.67·10⁻⁵"), (1.2e18, "1.20·10¹⁸"), (0, "0"),
        (math.nan, "nan"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_write_them(value, written):
    assert number(value) == written


def test_a_span_of_equal_numbers_is_one():
    assert span([0.31, 0.4384, 0.4]) == "0.310 to 0.438"
    assert span([0.8001, 0.8002]) == "0.800"


def test_rates_and_durations_are_short():
    rates = (0.4, 812, 999.7, 9812, 123_456, 1_234_567)
    assert [in_thousands(rate) for rate in rates] == ["0", "812", "1.0k", "9.8k", "123k", "1.2M"]
    assert [duration(s) for s in (9, 130, 3900, 273_600)] == ["9s", "2m10s", "1h05m", "3d04h"]


def test_columns_of_numbers_are_aligned_right():
    assert list(markdown(("a", "b"), [("x", 1)], right=(1,))) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]
