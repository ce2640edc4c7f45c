"""The figures of a parity report: rooflines with both machines' points, parities, where time goes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import display
from cluster.display import COLORS
from cluster.parity.comparison import Comparison
from cluster.parity.parity import Parity

MARKS = {"training": "s", "prefill": "^", "decode": "o"}
PARTS = dict(zip(("compute", "communication", "optimizer", "data", "other"), COLORS, strict=True))


def draw(parity: Parity, folder: Path) -> dict[str, Path]:
    """Draw every figure that has data. Returns title -> PNG in `folder`, the rooflines first."""
    made = {"Rooflines": _rooflines(parity, folder / "roofline.png")}
    made["Parity of each figure"] = _parities(parity, folder / "parity.png")
    if times := [each for each in parity.comparisons if any("time_shares" in f for f in each.figures)]:
        made["Where the time of a training step goes"] = _times(times, parity, folder / "time.png")
    return made


def _parities(parity: Parity, path: Path) -> Path:
    rows = list(reversed(parity.comparisons))
    figure, [axes] = display.figure(6, 1.2 + 0.36 * len(rows))
    for place, each in enumerate(rows):
        for interval, color, offset, label in (
            (each.parity, "#222222", 0.12, "normalised: A's share / B's"),
            (each.absolute, "#a0a4a8", -0.18, "absolute: A's rate / B's"),
        ):
            low = interval.centre if interval.low is None else interval.low
            high = interval.centre if interval.high is None else interval.high
            axes.plot([low, high], [place + offset] * 2, color=color, lw=2, solid_capstyle="butt")
            axes.plot(
                interval.centre, place + offset, "o", color=color, ms=5, label=label if not place else None
            )
    axes.axvline(1.0, color="#c8553d", lw=1)
    names = [f"{each.id} ({' / '.join(dict.fromkeys(each.bounds))})" for each in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("A / B (1: parity); bars: 95% intervals from the runs")
    axes.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.9 / (0.6 + 0.36 * len(rows))), ncols=2
    )
    return display.save(figure, path)


def _rooflines(parity: Parity, path: Path) -> Path:
    figure, [axes] = display.figure(6.4, 4.2)
    points = [
        (side, each, figure_["flops"] / figure_["bytes"])
        for each in parity.comparisons
        for side, figure_ in enumerate(each.figures)
        if figure_["bytes"]
    ]
    places = [intensity for *_, intensity in points] or [1.0]
    ridges = [peaks.flops / peaks.bytes_per_s for peaks in parity.peaks]
    low, high = min([*places, *ridges]) / 3, max([*places, *ridges]) * 6
    for side, (peaks, ridge) in enumerate(zip(parity.peaks, ridges, strict=True)):
        xs = [low, ridge, high]
        ys = [min(peaks.flops, x * peaks.bytes_per_s) / 1e12 for x in xs]
        name = f"{'AB'[side]}: {parity.sides[side].name}"
        axes.plot(xs, ys, color=COLORS[side], lw=1.8, label=name)
    for side, each, intensity in points:
        if not parity.sides[side].is_roofline:
            rate = each.rates[side].centre * each.figures[side]["flops"] / 1e12
            axes.plot(intensity, rate, MARKS[each.kind], color=COLORS[side], ms=6, alpha=0.75)
    for each in parity.comparisons:  # no bytes are counted for training: at the right edge
        for side, found in enumerate(each.figures):
            if not found["bytes"] and not parity.sides[side].is_roofline:
                rate = each.rates[side].centre * found["flops"] / 1e12
                axes.plot(high / 1.5, rate, MARKS[each.kind], color=COLORS[side], ms=6, alpha=0.75)
                if each.bounds[side] == "link":
                    roof = rate / each.shares[side].centre
                    axes.plot(high / 1.5, roof, "_", color=COLORS[side], ms=14, mew=2)
    if any("link" in each.bounds for each in parity.comparisons):
        axes.plot([], [], "_", color="#555555", ms=14, mew=2, label="what the measured link allows")
    for kind, mark in MARKS.items():
        if any(each.kind == kind for each in parity.comparisons):
            place = " (right edge: bytes not counted)" if kind == "training" else ""
            axes.plot([], [], mark, color="#555555", label=f"{kind}{place}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s of one device")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    return display.save(figure, path)


def _plain_ticks(axis: Any) -> None:
    """Numbers as people write them, also between powers of ten where few of these are in sight."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))

    axis.set_major_formatter(FuncFormatter(lambda value, _: display.number(value, digits=1)))
    axis.set_minor_formatter(NullFormatter())


def _times(rows: Sequence[Comparison], parity: Parity, path: Path) -> Path:
    bars: list[tuple[str, dict[str, float]]] = []
    for each in rows:
        for side, found in zip("AB", each.figures, strict=True):
            if "time_shares" in found and not parity.sides["AB".index(side)].is_roofline:
                bars.append((f"{each.id.removeprefix('training/')} on {side}", found["time_shares"]))
    bars.reverse()
    figure, [axes] = display.figure(6, 1.1 + 0.36 * len(bars))
    for place, (_, times) in enumerate(bars):
        left = 0.0
        for part, color in PARTS.items():
            axes.barh(place, times[part], left=left, color=color, label=None if place else part)
            left += times[part]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set(xlim=(0, 1), xlabel="share of a step, each part waited for")
    axes.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.8 / (0.5 + 0.36 * len(bars))), ncols=3
    )
    return display.save(figure, path)
