"""One figure on two machines: shares of their rooflines, and what makes a share decide nothing.

The peaks are the datasheet's where both sides have one, else those that `cluster.measure.probe` measured on
each. The link is that between the ranks of a node, or the network between nodes where a figure is of several.
Its peak is always the measured one; where a side has none that its figure could be set against, that figure's
link is left out on both.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.measure import hardware
from cluster.measure.intervals import Interval, of_rate, of_ratio
from cluster.parity.baseline_file import Peaks, Side

CEILINGS = ("compute", "bandwidth", "link", "network")
SAME_FLOPS = 1e-6  # relative; more apart, and the two did not do the same work
SAME_SETTING = ("tokens_per_step", "precision")  # of training: where they differ, the work does
SAME_BYTES = 0.02  # the mean context of decoding steps differs a little from run to run


@dataclass(frozen=True)
class Comparison:
    """One figure on both sides.

    Attributes:
        bounds: what bounds it, on A and on B.
        shares: of the roofline, on A and on B.
        absolute: A's rate / B's.
        parity: A's share / B's share.
        divisors: name of a divisor -> A's rate per unit of it / B's.
        link: whether the link counts among what may bound it.
        voids: on A and on B, why its share decides nothing; empty where it does.
    """

    id: str
    kind: str
    figures: tuple[Mapping[str, Any], Mapping[str, Any]]
    rates: tuple[Interval, Interval]
    bounds: tuple[str, str]
    shares: tuple[Interval, Interval]
    absolute: Interval
    parity: Interval
    divisors: Mapping[str, float]
    link: bool
    voids: tuple[str, str]


def pairs(
    a: Side, b: Side, peaks: tuple[Peaks, Peaks], note: Callable[[str], None]
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Figures of the same work on both sides; a roofline's are made from the other's."""
    figures = (a.figures, b.figures)
    found: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
    for name in dict.fromkeys([*figures[0], *figures[1]]):
        pair: list[Mapping[str, Any] | None] = [side.get(name) for side in figures]
        for place, side in enumerate((a, b)):
            other = pair[1 - place]
            if side.is_roofline and other is not None:
                pair[place] = _roofline_figure(other, peaks[place], side)
        ours, theirs = pair
        if ours is None or theirs is None:
            note(f"{name}: only in {(a if theirs is None else b).origin}")
        elif _apart(ours["flops"], theirs["flops"]) > SAME_FLOPS and ours["kind"] != "decode":
            note(f"{name}: not the same work on both (FLOPs per token differ: other lengths?)")
        elif apart := [key for key in SAME_SETTING if ours.get(key) != theirs.get(key)]:
            apart_by = ", ".join(f"{key} {ours.get(key)} and {theirs.get(key)}" for key in apart)
            note(f"{name}: not the same work on both ({apart_by})")
        elif ours["bytes"] and _apart(ours["bytes"], theirs["bytes"]) > SAME_BYTES:
            note(f"{name}: not the same work on both (bytes per token differ: other precisions or lengths?)")
        else:
            found.append((name, ours, theirs))
    return found


def _apart(ours: float, theirs: float) -> float:
    return abs(ours / theirs - 1)


def link_reasons(
    figures: Sequence[Mapping[str, Any]], peaks: Sequence[Peaks], sides: Sequence[Side]
) -> list[str]:
    """Why a figure cannot be compared with the link, by side; empty if it can, or if nothing is sent."""
    if not any(figure.get("ranks", 1) > 1 for figure in figures):
        return []
    found = []
    for figure, peak, side in zip(figures, peaks, sides, strict=True):
        if side.is_roofline:
            found.append(f"{side.origin} has none")
        elif figure.get("link_bytes") is None:
            found.append(f"bytes sent are not counted in {side.origin}")
        elif figure["ranks"] > 1:
            kind = "nodes" if figure.get("nodes", 1) > 1 else "ranks"
            link = peak.link_of(figure)
            if link is None or link.ends < figure[kind]:
                found.append(f"not measured with {figure[kind]} {kind} in {side.origin}")
    return found


def _roofline_figure(figure: Mapping[str, Any], peaks: Peaks, side: Side) -> dict[str, Any]:
    """The same work at the datasheet's peak; energy at the board's power limit."""
    seconds, _ = _roofline(figure, peaks, link=False)
    assert side.datasheet is not None
    kept = ("id", "kind", "shape", "flops", "bytes", *SAME_SETTING)
    return {
        **{key: figure[key] for key in kept if key in figure},
        "values": [1 / seconds],
        "joules_per_token": [side.datasheet.power_watts * seconds],
        "cost_per_million_tokens": None,
        "command": f"arithmetic: the roofline of {side.origin} (cluster/measure/hardware.py)",
    }


def _roofline(figure: Mapping[str, Any], peaks: Peaks, *, link: bool) -> tuple[float, str]:
    sent, through = (figure.get("link_bytes"), peaks.link_of(figure)) if link else (None, None)
    return hardware.roofline_seconds(
        flops=figure["flops"],
        num_bytes=figure["bytes"],
        peak_flops=peaks.flops,
        bytes_per_s=peaks.bytes_per_s,
        link_bytes=sent or 0.0,
        link_bytes_per_s=through.bytes_per_s if through else math.inf,
    )


def voids_of(peaks: Peaks, side: Side) -> dict[str, str]:
    """Of CEILINGS -> why no share of it decides anything, where that is so.

    All figures of a side speak of its ceilings, also those that the other side has not.
    """
    if side.is_roofline:
        return {}
    found = {}
    for figure in side.figures.values():
        counted = not link_reasons([figure], [peaks], [side])
        seconds, bound = _roofline(figure, peaks, link=counted)
        share = statistics.geometric_mean(figure["values"]) * seconds
        if share > 1:
            ceiling = _ceiling(figure, bound)
            found[ceiling] = f"{figure['id']} reaches {share:.0%} of its ceiling, {ceiling}"
    return found | dict.fromkeys(CEILINGS, side.disturbed) if side.disturbed else found


def ceilings_apart(sides: tuple[Side, Side], peaks: tuple[Peaks, Peaks], tolerance: float) -> dict[str, str]:
    """Ceilings on which machines of the same name disagree by more than the tolerance."""
    named = [side.content.get("hardware", {}) for side in sides]
    like = all(named) and all(named[0].get(key) == named[1].get(key) for key in ("name", "cpu_cores"))
    if not like or any(peak.is_datasheet for peak in peaks):
        return {}
    measured = {"compute": [p.flops for p in peaks], "bandwidth": [p.bytes_per_s for p in peaks]}
    factors = {name: max(pair) / min(pair) for name, pair in measured.items()}
    return {
        name: f"both are {named[0]['name']}, and measured ceilings of {name} that differ {factor:.3g} times"
        for name, factor in factors.items()
        if factor > 1 + tolerance
    }


def _ceiling(figure: Mapping[str, Any], bound: str) -> str:
    """The member of CEILINGS that bounds a figure."""
    return "network" if bound == "link" and figure.get("nodes", 1) > 1 else bound


def compare_figures(
    name: str,
    figures: tuple[Mapping[str, Any], Mapping[str, Any]],
    peaks: tuple[Peaks, Peaks],
    sides: tuple[Side, Side],
    *,
    link: bool,
    voids: tuple[Mapping[str, str], Mapping[str, str]],
) -> Comparison:
    floors = [_roofline(figure, peak, link=link) for figure, peak in zip(figures, peaks, strict=True)]
    values = [list(figure["values"]) for figure in figures]
    shares = [[rate * seconds for rate in rates] for rates, (seconds, _) in zip(values, floors, strict=True)]
    exact = (sides[0].is_roofline, sides[1].is_roofline)
    divided = [
        peak.measurements(figure, bound)
        for peak, figure, (_, bound) in zip(peaks, figures, floors, strict=True)
    ]
    absolute = of_ratio(*values, exact=exact)
    divisors = {"nothing (absolute)": 1.0}
    if peaks[0].is_datasheet == peaks[1].is_datasheet:
        divisors["per peak FLOP/s"] = peaks[1].flops / peaks[0].flops
        divisors["per peak byte/s"] = peaks[1].bytes_per_s / peaks[0].bytes_per_s
    through = [peak.link_of(figure) for peak, figure in zip(peaks, figures, strict=True)]
    links = [each for each in through if each]
    if link and len(links) == 2 and all(figure.get("link_bytes") for figure in figures):
        divisors["per byte/s of the measured link"] = links[1].bytes_per_s / links[0].bytes_per_s
    if sides[0].datasheet and sides[1].datasheet:
        watts = [side.datasheet.power_watts for side in sides if side.datasheet]
        divisors["per watt of the power limit"] = watts[1] / watts[0]
    found = {divisor: absolute.centre * factor for divisor, factor in divisors.items()}
    joules = [figure["joules_per_token"] for figure in figures]
    if all(joules) and not any(side.is_roofline for side in sides):
        found["per measured joule"] = statistics.median(joules[1]) / statistics.median(joules[0])
    costs = [figure["cost_per_million_tokens"] for figure in figures]
    if all(costs) and figures[0].get("cost_of") == figures[1].get("cost_of"):
        found["per unit of money"] = costs[1] / costs[0]
    return Comparison(
        id=name,
        kind=figures[0]["kind"],
        figures=figures,
        rates=(of_rate(values[0], exact=exact[0]), of_rate(values[1], exact=exact[1])),
        bounds=(floors[0][1], floors[1][1]),
        shares=(
            of_ratio(shares[0], [1.0], exact=(exact[0], True), divisors=divided[:1]),
            of_ratio(shares[1], [1.0], exact=(exact[1], True), divisors=divided[1:]),
        ),
        absolute=absolute,
        parity=of_ratio(*shares, exact=exact, divisors=divided),
        divisors=found,
        link=link,
        voids=(
            voids[0].get(_ceiling(figures[0], floors[0][1]), ""),
            voids[1].get(_ceiling(figures[1], floors[1][1]), ""),
        ),
    )
