"""Two machines compared, each normalised by its own hardware. Pure: reads files.

A side is a file of `make baseline`, or a datasheet's roofline ("datasheet:h100"). Every figure is a rate of
one device (tokens/s), the FLOPs and the least bytes that one token takes, and one value per run. From these:

    roofline   1 / max(FLOPs / peak, bytes / bandwidth, sent bytes / link): the rate that the device allows,
               and what bounds it
    share      rate / roofline: MFU where compute bounds it, MBU where the memory does, share of link where
               the link does
    parity     A's share / B's share, with an interval from the runs of both (`cluster.measure.intervals`)

A measured peak is void if a figure of its side exceeds it, or if a machine of the same name measured another
one. Claims that rest on a void peak are not decided, nor are claims about a CPU that was busy.
"""

from dataclasses import dataclass
from typing import Any

from cluster.cli import UserError
from cluster.measure.intervals import Interval
from cluster.parity.baseline_file import KINDS, Peaks, Side
from cluster.parity.claims import Claim, finding, make_claims
from cluster.parity.comparison import (
    Comparison,
    ceilings_apart,
    compare_figures,
    link_reasons,
    pairs,
    voids_of,
)


@dataclass(frozen=True)
class Parity:
    """The comparison of two sides. `finding` says its result in one sentence."""

    finding: str
    sides: tuple[Side, Side]
    peaks: tuple[Peaks, Peaks]
    comparisons: list[Comparison]
    claims: list[Claim]
    missing: list[str]


def compare(a: Side, b: Side, *, tolerance: float) -> Parity:
    """Compare A with B.

    Args:
        tolerance: what still counts as parity: 0.1 is within 10%.

    Raises:
        UserError: two datasheets, or nothing in common.
    """
    if a.is_roofline and b.is_roofline:
        raise UserError(f"{a.origin} and {b.origin}: two datasheets have nothing measured; give one file")
    datasheets = a.datasheet is not None and b.datasheet is not None
    peaks = (a.peaks(datasheet=datasheets), b.peaks(datasheet=datasheets))
    apart = ceilings_apart((a, b), peaks, tolerance)
    voids = (apart | voids_of(peaks[0], a), apart | voids_of(peaks[1], b))
    missing: list[str] = []
    comparisons = []
    for name, *figures in pairs(a, b, peaks, missing.append):
        without = link_reasons(figures, peaks, (a, b))
        if without:
            missing.append(f"{name}: the link, left out of both rooflines: {'; '.join(without)}")
        pair = (figures[0], figures[1])
        comparisons.append(compare_figures(name, pair, peaks, (a, b), link=not without, voids=voids))
    if not comparisons:
        raise UserError(
            f"{a.origin} and {b.origin} have no figure in common ({'; '.join(missing[:3])}); run "
            "`make baseline` on both with the same train.shapes, train.rules and serve.models"
        )
    comparisons.sort(key=lambda each: KINDS.index(each.kind))
    missing += [line for side in (a, b) for line in _unmeasured(side)]
    return Parity(
        finding=finding(comparisons, (a, b), tolerance),
        sides=(a, b),
        peaks=peaks,
        comparisons=comparisons,
        claims=make_claims(comparisons, (a, b), tolerance),
        missing=missing,
    )


def _unmeasured(side: Side) -> list[str]:
    if side.is_roofline:
        return [f"{side.name}: nothing; it is arithmetic"]
    found = []
    if not side.content.get("complete"):
        found.append(f"{side.origin}: `make baseline` was broken off; rounds are missing")
    if side.content.get("load_average_before") is None:
        found.append(f"{side.name}: whether it had other work")
    for cell in side.content.get("cells", ()):
        if cell["status"] != "measured":
            found.append(f"{side.name}, {cell['id']}: {cell['status']}: {cell['reason']}")
    if short := side.energy_in_doubt:
        found.append(f"{side.name}: energy of {', '.join(short)}: the driver's counter is too coarse for it")
    elif all(figure["joules_per_token"] is None for figure in side.figures.values()):
        found.append(f"{side.name}: energy, because NVML gives none")
    if side.content["ceilings"].get("links") is None:
        found.append(f"{side.name}: links between devices")
    elif problem := side.content["ceilings"]["links"].get("problem"):
        found.append(f"{side.name}: links between devices: {problem}")
    if side.content["ceilings"].get("links_between_nodes") is None:
        found.append(f"{side.name}: links between nodes: no report of a preflight was given")
    return found


def as_json(parity: Parity) -> dict[str, Any]:
    """For `summary.json`: the finding; by figure parity, shares and absolute ratio, with intervals."""

    def plain(interval: Interval) -> list[float | None]:
        return [interval.centre, interval.low, interval.high]

    return {
        "a": parity.sides[0].origin,
        "b": parity.sides[1].origin,
        "finding": parity.finding,
        "figures": {
            each.id: {
                "parity": plain(each.parity),
                "absolute": plain(each.absolute),
                "share_a": plain(each.shares[0]),
                "share_b": plain(each.shares[1]),
                "bounds": list(each.bounds),
                "voids": list(each.voids),
            }
            for each in parity.comparisons
        },
        "claims": [[claim.verdict, claim.text, claim.because] for claim in parity.claims],
    }
