"""What two machines' figures say of each other, once each is set against its own hardware. Pure: reads files.

A side is a file of `make baseline`, or a datasheet's roofline ("datasheet:h100"). Every figure is a rate of
one device (tokens/s), the FLOPs and the least bytes that one token takes, and one value per run. From these:

    roofline   1 / max(FLOPs / peak, bytes / bandwidth, sent bytes / link): the rate that the device allows,
               and what bounds it
    share      rate / roofline: MFU where compute bounds it, MBU where the memory does, share of link where
               the link does
    parity     A's share / B's share, with an interval from the runs of both (`cluster.measure.intervals`)

A measured peak is void if a figure of its side exceeds it, or if a machine of the same name measured another
one. Claims that rest on a void peak are not decided, nor are claims about a CPU that was busy.

Peaks are the datasheet's where both sides have one, else those that `cluster.measure.probe` measured on each.
The link is that between the ranks of a node, or the network between nodes where a figure is of several. Its
peak is always the measured one; where a side has none that its figure could be set against, that figure's
link is left out on both.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import files
from cluster.cli import UserError
from cluster.measure import benchmark, hardware
from cluster.measure.benchmark import BASELINE_FORMAT
from cluster.measure.hardware import Device
from cluster.measure.intervals import Interval, of_rate, of_ratio
from cluster.measure.probe import LINK_PEAK, PEAKS

KINDS = ("training", "prefill", "decode")
DATASHEET = "datasheet:"
VERDICTS = ("supported", "contradicted", "not decided")
CEILINGS = ("compute", "bandwidth", "link", "network")
SHARE = {"compute": "MFU", "bandwidth": "MBU", "link": "share of link"}
FIGURE_KEYS = {"bytes", "joules_per_token", "cost_per_million_tokens", "command", "peak_memory_bytes"}
SAME_FLOPS = 1e-6  # relative; more apart, and the two did not do the same work
SAME_SETTING = ("tokens_per_step", "precision")  # of training: where they differ, the work does
LIKE_SETTING = {
    "devices": "devices",
    "nodes": "number of nodes",
    "zero_stage": "ZeRO stage",
    "micro_sequences": "sequences per pass",
}
SAME_BYTES = 0.02  # the mean context of decoding steps differs a little from run to run


@dataclass(frozen=True)
class Link:
    """What ranks of one node send through, or nodes: bytes/s by the bus bandwidth of an all-reduce.

    Attributes:
        ends: ranks, or nodes with one rank on each, that it was measured with.
        bytes_per_s_of_rounds: of each; of a network, which is measured once, the slowest and the fastest, and
            one value where these are the same.
    """

    bytes_per_s: float
    ends: int
    bytes_per_s_of_rounds: tuple[float, ...]


@dataclass(frozen=True)
class Peaks:
    """What a side is measured against: FLOP/s, bytes/s, and where both come from; links, if measured."""

    flops: float
    bytes_per_s: float
    source: str
    is_datasheet: bool
    flops_of_rounds: tuple[float, ...] = ()
    bytes_per_s_of_rounds: tuple[float, ...] = ()
    link: Link | None = None
    network: Link | None = None

    def link_of(self, figure: Mapping[str, Any]) -> Link | None:
        """What the ranks of a figure send through."""
        return self.network if figure.get("nodes", 1) > 1 else self.link

    def measurements(self, figure: Mapping[str, Any], bound: str) -> tuple[float, ...]:
        """Of the peak that bounds a figure, one per round; empty where it is a datasheet's."""
        if bound == "link":
            link = self.link_of(figure)
            assert link is not None
            return link.bytes_per_s_of_rounds
        return self.flops_of_rounds if bound == "compute" else self.bytes_per_s_of_rounds


@dataclass(frozen=True)
class Side:
    """One machine. `content` is its file, empty for a datasheet; `origin` is what the command named."""

    name: str
    origin: str
    datasheet: Device | None
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_roofline(self) -> bool:
        return not self.content

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """By id."""
        return {figure["id"]: figure for figure in self.content.get("figures", ())}

    @property
    def busy(self) -> str | None:
        """That this machine had other work, or None; also where its load was not recorded."""
        load, about = self.content.get("load_average_before"), self.content.get("hardware", {})
        return None if load is None else benchmark.busy(load, cores=about.get("cpu_cores"))

    @property
    def disturbed(self) -> str | None:
        """That what was measured here decides nothing: on the cores that had other work."""
        return self.busy if self.content and self.content["hardware"].get("kind") == "cpu" else None

    def peaks(self, *, datasheet: bool) -> Peaks:
        """Of the datasheet, or as measured on this machine."""
        if datasheet or self.is_roofline:
            assert self.datasheet is not None
            sheet = self.datasheet
            return Peaks(
                sheet.bf16_tflops * 1e12,
                sheet.memory_gb_per_s * 1e9,
                f"datasheet, {sheet.source}",
                True,
                link=self._link("links"),
                network=self._link("links_between_nodes"),
            )
        ceilings = self.content["ceilings"]
        return Peaks(
            ceilings["product_tflops"]["best"] * 1e12,
            ceilings["read_gb_per_s"]["best"] * 1e9,
            f"measured by cluster.measure.probe in {ceilings['product_dtype']}, in {self.origin}",
            False,
            self._of_rounds(PEAKS[0]),
            self._of_rounds(PEAKS[1]),
            self._link("links"),
            self._link("links_between_nodes"),
        )

    def _link(self, key: str) -> Link | None:
        links = (self.content.get("ceilings") or {}).get(key) or {}
        if LINK_PEAK not in links:  # not measured, or the problem that kept it from being
            return None
        peak, rounds = links[LINK_PEAK], self._of_rounds(LINK_PEAK)
        if key == "links_between_nodes":
            rounds = tuple(dict.fromkeys(peak["spread"]))
        return Link(peak["best"] * 1e9, links["num_ranks"], rounds)

    def _of_rounds(self, name: str) -> tuple[float, ...]:
        return tuple(row[name] for row in self.content["peaks_of_rounds"] if name in row)


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


@dataclass(frozen=True)
class Claim:
    """A sentence and whether the figures bear it: "supported", "contradicted" or "not decided"."""

    text: str
    verdict: str
    because: str


@dataclass(frozen=True)
class Parity:
    """All that two sides say of each other."""

    sides: tuple[Side, Side]
    peaks: tuple[Peaks, Peaks]
    comparisons: list[Comparison]
    claims: list[Claim]
    missing: list[str]


def read_side(origin: str) -> Side:
    """A file of `make baseline`, or "datasheet:NAME".

    Raises:
        UserError: no such file or datasheet, or a file that is none of `make baseline`.
    """
    if origin.startswith(DATASHEET):
        device = hardware.by_short_name(origin.removeprefix(DATASHEET))
        if device is None:
            known = ", ".join(f"{DATASHEET}{name}" for name in hardware.SHORT_NAMES)
            raise UserError(f"{origin}: no such datasheet; there are {known}")
        return Side(f"{device.name} (roofline of its datasheet)", origin, device)
    path = Path(origin)
    if not path.is_file():
        raise UserError(f"{origin}: no such file; `make baseline` writes one, or say {DATASHEET}h100")
    content = files.read_json(path)
    if not isinstance(content, dict) or "figures" not in content or "hardware" not in content:
        raise UserError(f"{origin}: not a file of `make baseline`")
    if content.get("format") != BASELINE_FORMAT:
        raise UserError(
            f"{origin}: format {content.get('format')!r}, not {BASELINE_FORMAT}; run `make baseline` again"
        )
    problem = _problem(content)
    if problem is not None:
        raise UserError(f"{origin}: {problem}; run `make baseline` again on that machine")
    about = content["hardware"]
    number = "" if about["num_devices"] == 1 else f"{about['num_devices']} x "
    return Side(f"{number}{about['name']}", origin, hardware.lookup(about["name"]), content)


def _problem(content: Mapping[str, Any]) -> str | None:
    """What of a file's figures and ceilings is not as `make baseline` writes it."""
    ceilings = content.get("ceilings") or {}
    rates = {name: ceilings.get(name) for name in ("product_tflops", "read_gb_per_s", "copy_gb_per_s")}
    rates |= {f"disk.{name}": rate for name, rate in (ceilings.get("disk") or {}).items()}
    for key in ("links", "links_between_nodes"):
        if LINK_PEAK in (links := ceilings.get(key) or {}):
            rates[f"{key}.{LINK_PEAK}"] = links[LINK_PEAK]
    problems = ceilings.get("problems") or {}
    for name, rate in rates.items():
        if rate is None and name in problems:
            return f"ceilings.{name} could not be measured ({problems[name]})"
        values = [rate.get("best"), *rate.get("spread", ())] if isinstance(rate, dict) else []
        if len(values) != 3 or not all(map(_positive, values)):
            return f"ceilings.{name}: {rate!r} is no rate with its spread"
    if not content.get("peaks_of_rounds"):
        return "has no peaks_of_rounds"
    if not all(_positive(value) for row in content["peaks_of_rounds"] for value in row.values()):
        return "peaks_of_rounds must be positive numbers"
    if not isinstance(content.get("load_average_before") or 0.0, int | float):
        return f"load_average_before: {content['load_average_before']!r} is no number"
    for figure in content["figures"]:
        name = figure.get("id", "a figure without id")
        if figure.get("kind") not in KINDS:
            return f"{name}: kind {figure.get('kind')!r} is none of {', '.join(KINDS)}"
        if not figure.get("values") or not all(map(_positive, [*figure["values"], figure.get("flops")])):
            return f"{name}: values and flops must be positive numbers"
        if figure.get("link_bytes") is not None and not _positive(figure.get("ranks")):
            return f"{name}: link_bytes need a positive number of ranks"
        if left := FIGURE_KEYS - figure.keys():
            return f"{name}: has no {', '.join(sorted(left))}"
    return None


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


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
    apart = _ceilings_apart((a, b), peaks, tolerance)
    voids = (apart | _voids(peaks[0], a), apart | _voids(peaks[1], b))
    missing: list[str] = []
    comparisons = []
    for name, *figures in _pairs(a, b, peaks, missing.append):
        without = _link_reasons(figures, peaks, (a, b))
        if without:
            missing.append(f"{name}: the link, left out of both rooflines: {'; '.join(without)}")
        pair = (figures[0], figures[1])
        comparisons.append(_comparison(name, pair, peaks, (a, b), link=not without, voids=voids))
    if not comparisons:
        raise UserError(f"{a.origin} and {b.origin} have no figure in common: {'; '.join(missing[:3])}")
    comparisons.sort(key=lambda each: KINDS.index(each.kind))
    missing += [line for side in (a, b) for line in _unmeasured(side)]
    return Parity((a, b), peaks, comparisons, _claims(comparisons, (a, b), tolerance), missing)


def _pairs(
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
            told = ", ".join(f"{key} {ours.get(key)} and {theirs.get(key)}" for key in apart)
            note(f"{name}: not the same work on both ({told})")
        elif ours["bytes"] and _apart(ours["bytes"], theirs["bytes"]) > SAME_BYTES:
            note(f"{name}: not the same work on both (bytes per token differ: other precisions or lengths?)")
        else:
            found.append((name, ours, theirs))
    return found


def _apart(ours: float, theirs: float) -> float:
    return abs(ours / theirs - 1)


def _link_reasons(
    figures: Sequence[Mapping[str, Any]], peaks: Sequence[Peaks], sides: Sequence[Side]
) -> list[str]:
    """Why a figure cannot be set against the link, by side; empty where it can, or where nothing is sent.

    A figure without `ranks` is of a file from before bytes were counted; of what such a one sent nothing is
    known, so it keeps the link out only where the other side sends something.
    """
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


def _voids(peaks: Peaks, side: Side) -> dict[str, str]:
    """Of CEILINGS -> why no share of it decides anything, where that is so.

    All figures of a side speak of its ceilings, also those that the other side has not.
    """
    if side.is_roofline:
        return {}
    found = {}
    for figure in side.figures.values():
        counted = not _link_reasons([figure], [peaks], [side])
        seconds, bound = _roofline(figure, peaks, link=counted)
        share = statistics.geometric_mean(figure["values"]) * seconds
        if share > 1:
            ceiling = _ceiling(figure, bound)
            found[ceiling] = f"{figure['id']} reaches {share:.0%} of its ceiling, {ceiling}"
    return found | dict.fromkeys(CEILINGS, side.disturbed) if side.disturbed else found


def _ceilings_apart(sides: tuple[Side, Side], peaks: tuple[Peaks, Peaks], tolerance: float) -> dict[str, str]:
    """Ceilings that machines of the same name measured further apart than the tolerance."""
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
    """Of CEILINGS: what a figure is set against where this bounds it."""
    return "network" if bound == "link" and figure.get("nodes", 1) > 1 else bound


def _comparison(
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


# --- what may be said --------------------------------------------------------------------------------------


def verdict(parity: Interval, tolerance: float) -> str:
    """Whether a ratio is 1 to within the tolerance, as far as its interval can tell."""
    if parity.within(tolerance):
        return "supported"
    if parity.low is None or parity.high is None:
        return "not decided"
    outside = parity.high < 1 / (1 + tolerance) or parity.low > 1 + tolerance
    return "contradicted" if outside else "not decided"


def _claims(comparisons: Sequence[Comparison], sides: tuple[Side, Side], tolerance: float) -> list[Claim]:
    found: list[Claim] = []
    for kind in KINDS:
        if group := [each for each in comparisons if each.kind == kind]:
            if any(side.is_roofline for side in sides):
                found += [_against_roofline(each, sides, tolerance) for each in group]
            else:
                found += [_throughout(kind, group, tolerance)]
                found += [_of_one(each, tolerance) for each in group]
    for letter, side in zip("AB", sides, strict=True):
        found += _scaling(letter, side, tolerance)
        if side.busy:
            found.append(Claim(f"{letter} had nothing else to do", "contradicted", side.busy))
    return [*found, *(caveat for each in comparisons for caveat in _caveats(each))]


def _scaling(letter: str, side: Side, tolerance: float) -> Iterator[Claim]:
    """What training on several nodes leaves of a device's rate on one."""
    for name, figure in side.figures.items():
        alone = side.figures.get(name.rpartition("/")[0])
        if figure.get("nodes", 1) > 1 and alone is not None:
            kept = of_ratio(figure["values"], alone["values"])
            text = f"{name}: a device of {letter} keeps {show(kept)} of its rate on one node"
            num_runs = min(len(figure["values"]), len(alone["values"]))
            yield _known(text, kept, num_runs, tolerance, void=side.disturbed or "")


def _known(text: str, found: Interval, num_runs: int, tolerance: float, *, void: str) -> Claim:
    """A claim that says a figure: supported if it is known to the tolerance, and nothing makes it void."""
    if void:
        return Claim(text, "not decided", void)
    if found.low is None or found.high is None:
        return Claim(text, "not decided", "what was measured once shows no scatter")
    if found.high <= found.low * (1 + tolerance) ** 2:
        return Claim(text, "supported", f"{num_runs} runs; known to within {tolerance:.0%}")
    return Claim(text, "not decided", f"{num_runs} runs scatter more")


def _against_roofline(each: Comparison, sides: tuple[Side, Side], tolerance: float) -> Claim:
    """What share of its own roofline the measured side reaches; supported if it is known to the tolerance."""
    measured = 1 if sides[0].is_roofline else 0
    share = each.shares[measured]
    text = f"{each.id}: {'AB'[measured]} reaches {show(share)} of its own roofline ({each.bounds[measured]})"
    num_runs = len(each.figures[measured]["values"])
    return _known(text, share, num_runs, tolerance, void=each.voids[measured])


def _throughout(kind: str, group: Sequence[Comparison], tolerance: float) -> Claim:
    verdicts = [_decided(each, tolerance) for each in group]
    centres = sorted(each.parity.centre for each in group)
    overall = next((worst for worst in ("contradicted", "not decided") if worst in verdicts), "supported")
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS)
    because = f"of {len(group)} figures {counts}; parities from {centres[0]:.3g} to {centres[-1]:.3g}"
    return Claim(f"{kind}: parity within {tolerance:.0%} throughout", overall, because)


def _of_one(each: Comparison, tolerance: float) -> Claim:
    same = each.bounds[0] == each.bounds[1]
    share = SHARE[each.bounds[0]] if same else "share of its own roofline"
    because = f"A at {show(each.parity)} of B's {share}, {_runs(each)}{_void(each)}"
    return Claim(f"{each.id}: parity of {share} within {tolerance:.0%}", _decided(each, tolerance), because)


def _decided(each: Comparison, tolerance: float) -> str:
    """The verdict on a figure's parity, which rests on both of its shares."""
    return "not decided" if any(each.voids) else verdict(each.parity, tolerance)


def _void(each: Comparison) -> str:
    return "".join(f"; {letter}: {void}" for letter, void in zip("AB", each.voids, strict=True) if void)


def _caveats(each: Comparison) -> list[Claim]:
    """What a reader might take for granted of a figure, and what speaks against it."""
    found = []
    if each.bounds[0] != each.bounds[1]:
        shares = " with ".join(SHARE[bound] for bound in each.bounds)
        because = f"{each.bounds[0]} on A, {each.bounds[1]} on B: parity here compares {shares}"
        verdict = "not decided" if any(each.voids) else "contradicted"
        text = f"{each.id}: the same resource bounds it on both"
        found.append(Claim(text, verdict, f"{because}{_void(each)}"))
    for key, name in LIKE_SETTING.items():
        ours, theirs = (figure.get(key) for figure in each.figures)
        if None not in (ours, theirs) and ours != theirs:
            because = f"{ours} on A, {theirs} on B: what that costs is in the parity"
            found.append(Claim(f"{each.id}: the same {name} on both", "contradicted", because))
    for place in (0, 1):
        sending = (each.figures[place].get("time_shares") or {}).get("communication", 0.0)
        if sending > 0.5 and each.bounds[place] != "link":
            without = "the link bounds it, and is not in the roofline"
            counted = each.link and each.figures[place].get("link_bytes")
            because = "the link is not at its bandwidth" if counted else without
            because = f"{sending:.0%} of a step is communication: {because}"
            text = f"{each.id}: compute bounds it on {'AB'[place]}"
            found.append(Claim(text, "contradicted", because))
        if not each.shares[place].exact and each.shares[place].centre > 1:
            because = (
                f"a share of {each.shares[place].centre:.0%}: the ceiling was measured while something "
                "disturbed it, or the work takes fewer bytes or FLOPs than counted"
            )
            found.append(Claim(f"{each.id}: the ceiling of {'AB'[place]} is one", "contradicted", because))
    return found


def _runs(each: Comparison) -> str:
    numbers = [len(figure["values"]) for figure in each.figures]
    return f"{numbers[0]} and {numbers[1]} runs"


def show(interval: Interval) -> str:
    """Such as 0.874 [0.851, 0.897]; without bounds, the centre and that there was one run."""
    if interval.exact:
        return f"{interval.centre:.3g}"
    if interval.low is None or interval.high is None:
        return f"{interval.centre:.3g} [one run]"
    return f"{interval.centre:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


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
    if all(figure["joules_per_token"] is None for figure in side.figures.values()):
        found.append(f"{side.name}: energy, because NVML gives none")
    if side.content["ceilings"].get("links") is None:
        found.append(f"{side.name}: links between devices")
    elif problem := side.content["ceilings"]["links"].get("problem"):
        found.append(f"{side.name}: links between devices: {problem}")
    if side.content["ceilings"].get("links_between_nodes") is None:
        found.append(f"{side.name}: links between nodes: no report of a preflight was given")
    return found


def as_json(parity: Parity) -> dict[str, Any]:
    """For `summary.json`: by figure, its parity, both shares and the absolute ratio, with intervals."""

    def plain(interval: Interval) -> list[float | None]:
        return [interval.centre, interval.low, interval.high]

    return {
        "a": parity.sides[0].origin,
        "b": parity.sides[1].origin,
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


def commit_of(side: Side) -> str:
    """Commit, time and command behind a side's file."""
    if side.is_roofline:
        return "arithmetic on cluster/measure/hardware.py"
    about = side.content["provenance"]
    dirty = ", with uncommitted changes" if about.get("dirty") else ""
    return f"commit {about['commit'][:12]}{dirty}, {about['time']}, `{' '.join(about['command'])}`"
