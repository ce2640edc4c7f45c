"""Numbers as people write them, tables of Markdown, tables as plain text and on a pseudo terminal."""

import io
import math
import subprocess
import sys

import pytest
from markdown_it import MarkdownIt

from cluster.display import duration, in_thousands, markdown, number, pairs, show, span, table
from cluster.session import ROOT
from tests.terminal import COLOUR, on_terminal, screen


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


RATES = table(
    ("load", "output tok/s", "TTFT p50", "TTFT p99", "verdict"),
    [("1 in flight", 726, "4.4", "43.9", "supported"), ("8 in flight", None, "13.3", "28.0", "contradicted")],
    left=(0, -1),
)
PLAIN = """\
load         output tok/s  TTFT p50  TTFT p99  verdict
1 in flight           726       4.4      43.9  supported
8 in flight             -      13.3      28.0  contradicted
"""


def test_piped_tables_are_plain_columns():
    stream = io.StringIO()
    show("before", RATES, file=stream)
    show(pairs([("name", "value " * 40), ("other name", 1)]), file=stream)
    lines = stream.getvalue().splitlines()
    assert "\n".join(lines[1:4]) + "\n" == PLAIN and lines[0] == "before"
    assert lines[4] == "name        " + ("value " * 40).rstrip() and lines[5] == "other name  1"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_the_same_columns(columns):
    written = on_terminal(columns, lambda stream: show(RATES, file=stream))
    assert screen(written, columns=columns) == [*PLAIN.splitlines(), ""]


def test_columns_that_do_not_fit_go_on_below_and_long_texts_are_folded():
    def use(stream):
        show(RATES, pairs([("memory", "not known before it is measured on this very device")]), file=stream)

    lines = screen(on_terminal(40, use), columns=40)
    assert max(map(len, lines)) <= 40
    assert lines[:3] == [
        "load         output tok/s  TTFT p50",
        "1 in flight           726       4.4",
        "8 in flight             -      13.3",
    ]
    assert lines[3].split() == ["load", "TTFT", "p99", "verdict"]
    assert lines[6].startswith("memory  not known before") and lines[7].startswith("        ")


def test_verdicts_have_colours_unless_no_color_is_set(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert len(COLOUR.findall(on_terminal(80, lambda stream: show(RATES, file=stream)))) == 2
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.findall(on_terminal(80, lambda stream: show(RATES, file=stream)))


def test_markup_in_a_cell_is_text():
    written = on_terminal(80, lambda stream: show(table(("a",), [("[red]x[/red]",)]), file=stream))
    assert screen(written, columns=80) == ["a", "[red]x[/red]", ""]


@pytest.mark.parametrize("arguments", [["--dry-run", "precision=fp32"], ["no.such=1"], ["--help"]])
def test_where_nobody_looks_neither_rich_nor_torch_is_imported(arguments):
    code = (
        "import contextlib, sys\nfrom training import launch\n"
        f"with contextlib.suppress(SystemExit): launch.main({arguments!r})\n"
        "print(sorted({'rich', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
