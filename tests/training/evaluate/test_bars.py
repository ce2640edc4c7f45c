"""The bars of lm_eval and other libraries, as the project shows progress."""

import io
from contextlib import redirect_stderr

from tqdm import tqdm

from training.evaluate import bars


def test_a_librarys_bar_is_our_line_and_nothing_else():
    shown, before = io.StringIO(), (tqdm.display, tqdm.close)
    with redirect_stderr(shown), bars.as_ours():
        assert list(tqdm(range(3), desc="Running loglikelihood requests", mininterval=0)) == [0, 1, 2]
        with tqdm(total=2, desc="Requesting API") as bar:
            bar.update(2)
        list(tqdm(range(3), disable=True))
    assert (tqdm.display, tqdm.close) == before
    lines = shown.getvalue().splitlines()
    assert lines[0] == "request 0/3  Running loglikelihood requests"
    assert [line.split("  ")[:2] for line in lines if "/3" not in line] == [
        ["request 0/2", "Requesting API"],
        ["request 2/2", "Requesting API"],
    ]
    assert any(line.startswith("request 3/3") for line in lines)
    assert "%" not in shown.getvalue() and "\r" not in shown.getvalue()


def test_a_bar_that_an_error_leaves_open_is_closed():
    shown = io.StringIO()
    try:
        with redirect_stderr(shown), bars.as_ours():
            for _ in tqdm(range(3)):
                raise RuntimeError("the endpoint is gone")
    except RuntimeError:
        pass
    assert shown.getvalue() == "request 0/3\n"
