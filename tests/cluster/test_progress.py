"""The progress line: plain, and on a pseudo terminal."""

import io
import re
import subprocess
import sys

import pytest

from cluster.display import table
from cluster.progress import Progress, fit
from cluster.session import ROOT
from tests.terminal import COLOUR, on_terminal, screen


def row(step, **values):
    return {
        "step": step,
        "loss": 5.1234,
        "tokens_per_second": 9812.0,
        "mfu": 0.412,
        "step_seconds": 1.0,
        **values,
    }


def test_a_plain_line_holds_every_figure_and_its_unit():
    stream = io.StringIO()
    Progress(250, stream=stream).update(row(120, validation_loss=5.4))
    assert stream.getvalue() == "step 120/250  loss 5.123  val 5.400  9.8k tok/s  MFU 41.2%  ETA 2m10s\n"


def test_what_is_unknown_is_left_out_and_the_validation_loss_is_kept():
    stream = io.StringIO()
    now = iter(range(0, 1000, 100))
    progress = Progress(250, stream=stream, clock=lambda: next(now))
    progress.update({"step": 0, "validation_loss": 9.0})
    progress.update(row(1, mfu=None))
    assert stream.getvalue().splitlines() == [
        "step 0/250  val 9.000",
        "step 1/250  loss 5.123  val 9.000  9.8k tok/s  ETA 4m09s",
    ]


def test_plain_lines_come_at_most_every_five_seconds_plus_first_and_last():
    stream, now = io.StringIO(), [0.0]
    with Progress(100, stream=stream, clock=lambda: now[0]) as progress:
        for step in range(1, 101):
            now[0] += 0.25
            progress.update(row(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        "1/100", "21/100", "41/100", "61/100", "81/100", "100/100",
    ]  # fmt: skip


def test_a_run_that_stops_early_still_shows_its_last_step():
    stream = io.StringIO()
    with Progress(100, stream=stream, clock=lambda: 0.0) as progress:
        progress.update(row(1))
        progress.update(row(2))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/100", "2/100"]


def test_one_slow_step_does_not_move_the_eta():
    stream, now = io.StringIO(), iter(range(0, 1000, 10))
    progress = Progress(100, stream=stream, clock=lambda: next(now))
    for step in range(1, 11):
        progress.update(row(step, step_seconds=600.0 if step == 10 else 2.0))
    assert stream.getvalue().splitlines()[-1].endswith("ETA 3m00s")


def shown(columns, use, total=250):
    """What stands on a terminal of that width after `use(progress)`, and all that was written."""

    def draw(stream):
        with Progress(total, stream=stream) as progress:
            use(progress)

    written = on_terminal(columns, draw)
    return screen(written, columns=columns), written


def test_a_narrow_terminal_rewrites_the_line_within_its_width():
    lines, _ = shown(40, lambda progress: [progress.update(row(step)) for step in (119, 120)])
    assert lines == ["step 120/250  loss 5.123  ETA 2m10s", ""]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_wider_terminal_shows_a_bar(columns):
    lines, _ = shown(columns, lambda progress: [progress.update(row(step)) for step in range(1, 126)])
    assert len(lines) == 2 and len(lines[0]) <= columns and lines[1] == ""
    bar, _, text = lines[0].partition(" step 125/250  loss 5.123")
    assert set(bar) <= set("━╸╺") and len(bar) == 20 and text.endswith("ETA 2m05s")


def test_a_note_stands_on_lines_of_its_own():
    def use(progress):
        progress.note("[bold]before[/bold]")
        progress.update(row(1))
        progress.note("checkpoint saved")
        progress.note(table(("a", "b"), [("x", 1)]))
        progress.update(row(2))

    lines, _ = shown(50, use)
    assert lines[:4] == ["[bold]before[/bold]", "checkpoint saved", "a  b", "x  1"]
    assert lines[4].startswith("step 2/250") and lines[5:] == [""]


def test_a_failure_leaves_the_line_whole_and_the_cursor_visible():
    def draw(stream):
        def fail():
            with Progress(250, stream=stream) as progress:
                progress.update(row(1))
                raise KeyError("broken")

        with pytest.raises(KeyError):
            fail()
        print("error: broken", file=stream)

    written = on_terminal(80, draw)
    assert screen(written, columns=80)[1:] == ["error: broken", ""]
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")


def test_colours_only_without_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, coloured = shown(80, lambda progress: progress.update(row(100)))
    monkeypatch.setenv("NO_COLOR", "1")
    _, plain = shown(80, lambda progress: progress.update(row(100)))
    assert re.search(COLOUR, coloured) and not re.search(COLOUR, plain)


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    _, written = shown(80, lambda progress: progress.update(row(120)))
    assert written == "step 120/250  loss 5.123  9.8k tok/s  MFU 41.2%  ETA 2m10s\n"


def test_without_the_seconds_of_a_step_the_eta_comes_from_the_time_so_far():
    stream, now = io.StringIO(), [0.0]
    with Progress(4, unit="cell", stream=stream, clock=lambda: now[0]) as progress:
        progress.advance("decode", by=0)
        now[0] = 30.0
        progress.advance("prefill")
    assert stream.getvalue().splitlines() == ["cell 0/4  decode", "cell 1/4  prefill  ETA 1m30s"]


def test_the_last_line_on_stdout_is_json_and_nothing_else_where_only_stderr_is_a_terminal(tmp_path):
    code = (
        "import json, sys\nfrom cluster.progress import Progress\n"
        "with Progress(3) as progress:\n"
        "    for _ in range(3): progress.advance(); print('a line'); print('aside', file=sys.stderr)\n"
        "print(json.dumps({'value': 1}))"
    )
    out = tmp_path / "out"

    def use(stream):
        with out.open("w") as stdout:
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=stdout, stderr=stream, check=True)

    lines = screen(on_terminal(80, use), columns=80)
    assert out.read_text() == "a line\na line\na line\n" + '{"value": 1}\n'
    assert lines[:3] == ["aside"] * 3 and "step 3/3" in lines[3] and lines[4:] == [""]


def test_an_unknown_total_has_no_eta():
    stream = io.StringIO()
    with Progress(None, unit="document", stream=stream) as progress:
        progress.update({"step": 12_345, "tokens_per_second": 812.0})
    assert stream.getvalue() == "document 12,345  812 tok/s\n"


def test_the_last_but_one_field_is_left_out_first():
    assert fit(["step 1/2", "loss 1", "ETA 1s"], width=200) == "step 1/2  loss 1  ETA 1s"
    assert len(fit(["step 1000/2000", "loss 1", "ETA 1s"], width=10)) == 9
