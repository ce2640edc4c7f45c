"""Two result folders of `make serve-bench` beside each other: the ratio of every figure, load by load.

    python -m serving.bench.compare FOLDER FOLDER

Ratios are second / first. With `load.repeats` of 2 or more on both sides they have 95% intervals; a ratio
whose interval holds 1, or that has none, decides nothing. The result is also written to the second folder, as
compare.json.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import cli, display, files
from cluster.cli import UserError
from cluster.display import Table, show
from cluster.measure import intervals
from serving.bench.report import SUMMARY_FILE

COMPARE_FILE = "compare.json"
FIGURES = {  # header -> key of a point, and whether more is better
    "out tok/s": ("output_tokens_per_second", True),
    "goodput/s": ("goodput_per_second", True),
    "TTFT p50": ("ttft_p50_ms", False),
    "TTFT p99": ("ttft_p99_ms", False),
    "TPOT p50": ("tpot_p50_ms", False),
    "TPOT p99": ("tpot_p99_ms", False),
    "J/token": ("joules_per_token", False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.bench.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER", help="such as outputs/serve-bench")
    options = parser.parse_args(arguments)

    def body() -> None:
        first, second = (read(folder.expanduser()) for folder in options.folders)
        result = compare(first, second)
        file = options.folders[1].expanduser() / COMPARE_FILE
        files.write_json(
            file, {"first": str(options.folders[0]), "second": str(options.folders[1]), **result}
        )
        show(table(result["loads"]), "", *result["notes"], f"result: {file}")
        print(finding(result["loads"], [folder.name for folder in options.folders]))

    return cli.run(body)


def read(folder: Path) -> dict[str, Any]:
    """The summary of a run directory. Raises `UserError`: it has none, or that is no benchmark's."""
    file = folder / SUMMARY_FILE
    if not file.is_file():
        raise UserError(f"{file}: missing; name a folder that `make serve-bench` finished")
    summary = files.read_json(file)
    points = summary.get("points") if isinstance(summary, dict) else None
    if not isinstance(points, list) or not all(isinstance(p, dict) and "load" in p for p in points):
        raise UserError(f"{file}: is no summary of `make serve-bench`; name a folder that it wrote")
    return summary


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """`loads`: load -> figure -> [ratio, low, high] of second / first; bounds are None where one side has one
    repeat. `notes`: loads of one side alone, and what the two did not ask alike.

    Raises:
        UserError: they have no load in common.
    """
    sides = [_by_load(summary) for summary in (first, second)]
    common = [load for load in sides[0] if load in sides[1]]
    if not common:
        had = " and ".join(", ".join(side) or "none" for side in sides)
        raise UserError(f"no load in common: {had}; measure both with the same keys")
    loads = {
        load: {
            header: [ratio.centre, ratio.low, ratio.high]
            for header, (key, _) in FIGURES.items()
            if (ratio := _ratio(sides[0][load], sides[1][load], key)) is not None
        }
        for load in common
    }
    alone = [load for load in (*sides[0], *sides[1]) if load not in common]
    notes = [f"measured on one side alone: {', '.join(alone)}"] if alone else []
    for name in ("slo", "dialect"):
        if first.get(name) != second.get(name):
            notes.append(f"not asked alike: {name} is {first.get(name)} and {second.get(name)}")
    return {"loads": loads, "notes": notes}


def _by_load(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for point in summary["points"]:
        if point.get("succeeded"):
            found.setdefault(str(point["load"]), []).append(point)
    return found


def _ratio(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], key: str
) -> intervals.Interval | None:
    values: list[list[Any]] = [[point.get(key) for point in side] for side in (first, second)]
    if not all(isinstance(value, int | float) and value > 0 for side in values for value in side):
        return None
    return intervals.of_ratio(values[1], values[0])


def table(loads: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Table:
    """Ratios second / first with their intervals, a load and a figure a line."""
    rows = []
    for load, figures in loads.items():
        for header, (centre, low, high) in figures.items():
            bounds = None if low is None else f"{low:.3f} to {high:.3f}"
            rows.append((load, header, f"{centre:.3f}", bounds, _verdict(header, low, high)))
    return display.table(("load", "figure", "second / first", "95% interval", "second is"), rows, left=(0, 1))


def _verdict(header: str, low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 1 <= high:
        return "not decided"
    return "better" if (low > 1) == FIGURES[header][1] else "worse"


def finding(loads: Mapping[str, Mapping[str, Sequence[float | None]]], names: Sequence[str]) -> str:
    """The result in one sentence."""
    verdicts = [
        _verdict(header, low, high)
        for figures in loads.values()
        for header, (_, low, high) in figures.items()
    ]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in ("better", "worse", "not decided"))
    more = "" if any(each != "not decided" for each in verdicts) else "; load.repeats=5 gives intervals"
    return f"{names[1]} against {names[0]}, {len(loads)} loads, {len(verdicts)} figures: {counts}{more}."


if __name__ == "__main__":
    sys.exit(main())
