"""Claims about two machines' figures, each supported, contradicted or not decided."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.display import number, span
from cluster.measure.intervals import Interval, of_ratio
from cluster.parity.baseline_file import KINDS, Side
from cluster.parity.comparison import Comparison

VERDICTS = ("supported", "contradicted", "not decided")
SHARE = {"compute": "MFU", "bandwidth": "MBU", "link": "share of link"}
LIKE_SETTING = {
    "devices": "devices",
    "nodes": "number of nodes",
    "zero_stage": "ZeRO stage",
    "micro_sequences": "sequences per pass",
}


@dataclass(frozen=True)
class Claim:
    """A sentence, and whether the figures support it: one of VERDICTS."""

    text: str
    verdict: str
    because: str


def make_claims(comparisons: Sequence[Comparison], sides: tuple[Side, Side], tolerance: float) -> list[Claim]:
    """Every claim, those that are not decided last."""
    found: list[Claim] = []
    for kind in KINDS:
        if group := [each for each in comparisons if each.kind == kind]:
            if any(side.is_roofline for side in sides):
                found += _together(kind, [_against_roofline(each, sides, tolerance) for each in group])
            else:
                found += [_throughout(kind, group, tolerance)]
                found += [_of_one(each, tolerance) for each in group]
    for letter, side in zip("AB", sides, strict=True):
        found += _scaling(letter, side, tolerance)
        if side.busy:
            found.append(Claim(f"{letter} had nothing else to do", "contradicted", side.busy))
    found += [caveat for each in comparisons for caveat in _caveats(each)]
    return sorted(found, key=lambda claim: claim.verdict == "not decided")


def finding(comparisons: Sequence[Comparison], sides: tuple[Side, Side], tolerance: float) -> str:
    """The result of the comparison in one sentence."""
    groups = {kind: [each for each in comparisons if each.kind == kind] for kind in KINDS}
    groups = {kind: group for kind, group in groups.items() if group}
    if any(side.is_roofline for side in sides):
        measured = 1 if sides[0].is_roofline else 0
        shares = [
            f"{_percents([each.shares[measured].centre for each in group])} in {kind}"
            for kind, group in groups.items()
        ]
        decided = [_against_roofline(each, sides, tolerance).verdict for each in comparisons]
        known = f"{decided.count('supported')} of {len(decided)} figures are known to within {tolerance:.0%}"
        if all(each.shares[measured].low is None for each in comparisons):
            known = "each measured once, so that none has an interval"
        reached = f"{sides[measured].name} reaches {_listed(shares)} of its own roofline"
        return f"{reached} ({known})."
    found: dict[str, list[str]] = {}
    for kind, group in groups.items():
        parities = span([each.parity.centre for each in group])
        verdict = _throughout(kind, group, tolerance).verdict
        found.setdefault(verdict, []).append(f"{kind} ({parities})")
    parts = [f"{verdict} in {_listed(found[verdict])}" for verdict in VERDICTS if verdict in found]
    rates = span([each.absolute.centre for each in comparisons])
    return (
        f"Parity within {tolerance:.0%} between {sides[0].name} (A) and {sides[1].name} (B), each against "
        f"its own hardware, is {_listed(parts)}; in absolute terms a device of A runs at {rates} times the "
        "rate of one of B."
    )


def _percents(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _scaling(letter: str, side: Side, tolerance: float) -> Iterator[Claim]:
    """How much of its one-node rate a device keeps on several nodes."""
    for name, figure in side.figures.items():
        alone = side.figures.get(name.rpartition("/")[0])
        if figure.get("nodes", 1) > 1 and alone is not None:
            kept = of_ratio(figure["values"], alone["values"])
            text = f"{name}: a device of {letter} keeps {show(kept)} of its rate on one node"
            num_runs = min(len(figure["values"]), len(alone["values"]))
            yield _known(text, kept, num_runs, tolerance, void=side.disturbed or "")


def _known(text: str, found: Interval, num_runs: int, tolerance: float, *, void: str) -> Claim:
    """A claim that states a figure: supported if the figure is known within the tolerance and not void."""
    if void:
        return Claim(text, "not decided", void)
    if found.low is None or found.high is None:
        return Claim(text, "not decided", "what was measured once shows no scatter")
    if found.high <= found.low * (1 + tolerance) ** 2:
        return Claim(text, "supported", f"{num_runs} runs; known to within {tolerance:.0%}")
    return Claim(text, "not decided", f"{num_runs} runs scatter more")


def _against_roofline(each: Comparison, sides: tuple[Side, Side], tolerance: float) -> Claim:
    """The share of its own roofline that the measured side reaches."""
    measured = 1 if sides[0].is_roofline else 0
    share = each.shares[measured]
    text = f"{each.id}: {'AB'[measured]} reaches {show(share)} of its own roofline ({each.bounds[measured]})"
    num_runs = len(each.figures[measured]["values"])
    return _known(text, share, num_runs, tolerance, void=each.voids[measured])


def _together(kind: str, claims: Sequence[Claim]) -> Iterator[Claim]:
    """The claims, with those that stay open for the same reason as one."""
    reasons = [claim.because for claim in claims if claim.verdict == "not decided"]
    alike = {reason for reason in reasons if reasons.count(reason) > 1}
    yield from (claim for claim in claims if claim.because not in alike)
    for reason in sorted(alike):
        text = f"{kind}: the share of its own roofline, in {reasons.count(reason)} of {len(claims)} figures"
        yield Claim(text, "not decided", reason)


def _throughout(kind: str, group: Sequence[Comparison], tolerance: float) -> Claim:
    verdicts = [_decided(each, tolerance) for each in group]
    centres = [each.parity.centre for each in group]
    overall = next((worst for worst in ("contradicted", "not decided") if worst in verdicts), "supported")
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS)
    because = f"of {len(group)} figures {counts}; parities {span(centres)}"
    return Claim(f"{kind}: parity within {tolerance:.0%} throughout", overall, because)


def _of_one(each: Comparison, tolerance: float) -> Claim:
    same = each.bounds[0] == each.bounds[1]
    share = SHARE[each.bounds[0]] if same else "share of its own roofline"
    because = f"A at {show(each.parity)} of B's {share}, {_runs(each)}{_void(each)}"
    return Claim(f"{each.id}: parity of {share} within {tolerance:.0%}", _decided(each, tolerance), because)


def _decided(each: Comparison, tolerance: float) -> str:
    """The verdict on a figure's parity, which rests on both of its shares."""
    return "not decided" if any(each.voids) else verdict(each.parity, tolerance)


def verdict(parity: Interval, tolerance: float) -> str:
    """Whether a ratio is 1 to within the tolerance, as far as its interval can tell."""
    if parity.within(tolerance):
        return "supported"
    if parity.low is None or parity.high is None:
        return "not decided"
    outside = parity.high < 1 / (1 + tolerance) or parity.low > 1 + tolerance
    return "contradicted" if outside else "not decided"


def _void(each: Comparison) -> str:
    return "".join(f"; {letter}: {void}" for letter, void in zip("AB", each.voids, strict=True) if void)


def _caveats(each: Comparison) -> list[Claim]:
    """What a reader might wrongly assume of a figure."""
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
    """For example "0.874 [0.851, 0.897]", or "0.874 [one run]"."""
    if interval.exact:
        return number(interval.centre)
    if interval.low is None or interval.high is None:
        return f"{number(interval.centre)} [one run]"
    return f"{number(interval.centre)} [{number(interval.low)}, {number(interval.high)}]"
