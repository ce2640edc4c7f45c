"""Two folders of results beside each other, from numbers chosen by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from serving.bench import compare


def folder(path: Path, *points: tuple[str, float, float], **about: Any) -> Path:
    """A folder whose summary has these points: load, output tokens per second, TTFT p50 in milliseconds."""
    path.mkdir()
    rows = [
        {"load": load, "succeeded": 9, "output_tokens_per_second": rate, "ttft_p50_ms": ttft}
        for load, rate, ttft in points
    ]
    refused = {"load": "8 in flight", "refused": "it lagged"}
    (path / "summary.json").write_text(json.dumps({"points": [*rows, refused], **about}))
    return path


def test_ratios_have_intervals_from_repeats_and_a_verdict(tmp_path, capsys):
    one = folder(tmp_path / "a", ("1 in flight", 100, 10), ("1 in flight", 101, 11), ("2.00/s", 50, 5))
    other = folder(
        tmp_path / "b", ("1 in flight", 200, 10), ("1 in flight", 202, 12), ("4.00/s", 50, 5), slo=1
    )
    assert compare.main([str(one), str(other)]) == 0
    out = capsys.readouterr().out
    result = json.loads((other / "compare.json").read_text())
    assert {load: set(found) for load, found in result["loads"].items()} == {
        "1 in flight": {"out tok/s", "TTFT p50"}
    }
    centre, low, high = result["loads"]["1 in flight"]["out tok/s"]
    assert centre == pytest.approx(2) and 1.5 < low < 2 < high < 2.5
    alone = "measured on one side alone: 2.00/s, 4.00/s"
    assert result["notes"] == [alone, "not asked alike: slo is None and 1"]
    assert out.splitlines()[-1] == "b against a, 1 loads, 2 figures: 1 better, 0 worse, 1 not decided."
    assert compare.main([str(other), str(one)]) == 0
    assert "0 better, 1 worse, 1 not decided." in capsys.readouterr().out


def test_a_single_measurement_decides_nothing(tmp_path, capsys):
    sides = [str(folder(tmp_path / name, ("1 in flight", rate, 10))) for name, rate in (("a", 1), ("b", 9))]
    assert compare.main(sides) == 0
    out = capsys.readouterr().out
    assert "9.000" in out
    assert out.splitlines()[-1].endswith("2 not decided; load.repeats=5 gives intervals.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "b/summary.json: missing; name a folder"),
        ("[]", "b/summary.json: is no summary of `make serve-bench`"),
        ('{"points": [3]}', "b/summary.json: is no summary of `make serve-bench`"),
        ('{"points": []}', "no load in common: 1 in flight and none; measure both"),
    ],
)
def test_what_cannot_be_compared_is_one_message(tmp_path, capsys, content, message):
    one = folder(tmp_path / "a", ("1 in flight", 100, 10))
    (tmp_path / "b").mkdir()
    if content is not None:
        (tmp_path / "b/summary.json").write_text(content)
    assert compare.main([str(one), str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "b/compare.json").exists()
