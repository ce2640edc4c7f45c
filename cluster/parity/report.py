"""The report of a parity, in Markdown and as one HTML file."""

import base64
import html
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.display import markdown, number, span
from cluster.measure.probe import LINK_PEAK
from cluster.parity import public
from cluster.parity.baseline_file import Side, commit_of, origin_of
from cluster.parity.claims import SHARE, VERDICTS, show
from cluster.parity.comparison import Comparison
from cluster.parity.parity import Parity
from cluster.record import lineage

FORMULAS = (  # name, formula, where it stands
    ("rate", "tokens / seconds / devices, the median step of a run",
     "training/baseline/steps.py, serving/bench/steps.py"),
    (
        "FLOPs per token, training",
        "6·N_matmul + 12·L·d·s, forward and backward; the whole attention matrix counts, recomputation does "
        "not (PaLM, arXiv 2204.02311, appendix B)",
        "training/model/shapes.py, flops_per_token",
    ),
    ("FLOPs per token, prefill", "(2·(N_hidden - N_last)·S + 2·N_last + 2·V·h + 2·(L - 1)·d·S² + 4·d·S) / S, "
     "causal; of the last layer, N_last (queries, output, MLP) for the last token alone",
     "training/model/shapes.py, prefill_flops"),
    ("FLOPs per token, decode", "2·N_matmul + 4·L·d·context", "training/model/shapes.py, decode_flops"),
    ("bytes per token, decode", "(weights + batch·context·KV bytes) / batch",
     "training/model/shapes.py, decode_bytes"),
    ("bytes per token, prefill", "weights / (batch·prompt): read once at the least",
     "training/baseline/command.py"),
    ("sent bytes per token, training", "bytes that the busiest rank sends in a step by its ZeRO stage, "
     "counted as bus bandwidth counts them, / tokens of a device",
     "training/projection/traffic.py, training/baseline/command.py"),
    ("roofline", "1 / max(FLOPs / peak, bytes / bandwidth, sent bytes / link)",
     "cluster/measure/hardware.py, roofline_seconds"),
    ("share", "rate / roofline: MFU where compute bounds, MBU where bandwidth does, share of link where the "
     "link between ranks does", "cluster/parity/comparison.py"),
    ("share of link during communication alone", "sent bytes of a step / seconds in which collectives ran "
     "and nothing else / link", "training/baseline/command.py"),
    ("parity", "A's share / B's share", "cluster/parity/comparison.py"),
    ("interval", "at least 95%, from the logarithms of the runs' values: Student's t, Banerjee's for ratios",
     "cluster/measure/intervals.py"),
)  # fmt: skip
FIGURES_RIGHT = (1, 2, 3, 5, 6, 7)  # columns of numbers
FORMULAS_HEAD = ("name", "formula", "stands in")
STYLE = """\
body{font:16px/1.5 system-ui,sans-serif;color:#1d2125;background:#fff;max-width:64rem;margin:2.5rem auto;
padding:0 1.25rem}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.25rem;margin-top:2.4rem;border-bottom:1px solid #d9dde1}
blockquote{margin:1.25rem 0;padding:.6rem 1.1rem;border-left:4px solid #1b6ca8;background:#f2f7fb;
font-size:1.15rem}
blockquote p{margin:.3rem 0}
table{border-collapse:collapse;font-size:.84rem;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.3rem .6rem;border-bottom:1px solid #e4e7ea;text-align:left;vertical-align:top}
th{background:#f4f6f8}td{font-variant-numeric:tabular-nums}.n{white-space:nowrap;color:#5b6168;font-weight:400}
td[style*=right] .n{display:block}
.supported{color:#2c6e2f}.contradicted{color:#a33520}.undecided{color:#5b6168}
img{display:block;width:100%;max-width:42rem;margin:0 auto}
code{font-size:.84em;background:#f4f6f8;padding:.1em .25em;overflow-wrap:anywhere}
@media(max-width:40rem){body{margin:1rem auto;padding:0 .8rem}h1{font-size:1.3rem}
blockquote{font-size:1.05rem}
td:first-child,th:first-child{position:sticky;left:0;background:#fff;min-width:5.5rem}
th:first-child{background:#f4f6f8}}
@media print{body{font-size:10pt;margin:0;max-width:none}table{display:table;font-size:6.5pt}
th,td{padding:.15rem .25rem}
img{max-width:14cm}h2,img,tr{break-inside:avoid}h2{break-after:avoid}}
"""


def report(parity: Parity, plots: dict[str, str], tolerance: float) -> str:
    """The report in Markdown; `plots` maps a title to a path beside it, the first opens the report."""
    a, b = parity.sides
    (opening, *others) = plots.items()
    sections: list[Iterator[str]] = [
        _figures(parity),
        _public(),
        _claims(parity, tolerance),
        *(_plot(title, path) for title, path in others),
        _divisors(parity.comparisons),
        _shares(parity.comparisons),
        _costs(parity),
        _ceilings(parity),
        _missing(parity),
        _sources(parity),
    ]
    head = [
        f"# Parity: {a.name} (A) against {b.name} (B)",
        "",
        f"> {parity.finding}",
        "",
        f"![{opening[0]}]({opening[1]})",
    ]
    return "\n".join([*head, *(line for section in sections for line in ("", *section))]) + "\n"


def _claims(parity: Parity, tolerance: float) -> Iterator[str]:
    yield from ("## What may be said", "")
    rows = ((f"**{claim.verdict}**", claim.text, claim.because) for claim in parity.claims)
    yield from markdown(("verdict", "claim", "because"), rows)
    yield ""
    yield (
        f"Supported: the whole interval lies within {tolerance:.0%} of what is claimed. Contradicted: all of "
        "it lies outside. Not decided: the runs are too few or too scattered to tell, a ceiling is exceeded, "
        "or the machine had other work."
    )


def _figures(parity: Parity) -> Iterator[str]:
    yield from ("## Figures", "")
    yield from markdown(_figures_head("A", "B"), map(_figure, parity.comparisons), right=FIGURES_RIGHT)
    yield ""
    yield (
        "Each rate is divided by what the resource that bounds it allows (MFU where compute does, MBU where "
        "memory bandwidth does, share of link where the link between ranks or nodes does), and the two "
        "shares by each other. 1 is parity. Absolute rates stand beside, because a normalised figure trains "
        "no model. Rates are of one device; in brackets 95% intervals from the rounds of one session, where "
        "rates and measured ceilings scatter; what differs from session to session is not in them. Shares "
        "are of these ceilings:"
    )
    yield ""
    rows = (
        (letter, f"{peaks.flops / 1e12:,.4g}", f"{peaks.bytes_per_s / 1e9:,.4g}", peaks.source, _links(side))
        for letter, peaks, side in zip("AB", parity.peaks, parity.sides, strict=True)
    )
    yield from markdown(
        ("", "peak TFLOP/s", "bandwidth GB/s", "from", "measured link GB/s"), rows, right=(1, 2)
    )


def _figures_head(a: str, b: str) -> tuple[str, ...]:
    rates = (f"{a} tokens/s", f"{b} tokens/s", f"{a} / {b} absolute")
    return ("figure", "parity", f"{a}'s share", f"{b}'s share", "bound", *rates)


def _figure(each: Comparison) -> tuple[str, ...]:
    bounded = zip(each.bounds, each.shares, strict=True)
    shares = [f"{SHARE[bound]} {_percent(share)}" for bound, share in bounded]
    bounds = " / ".join(dict.fromkeys(each.bounds))
    parity = f"**{show(each.parity)}**{'; decides nothing, see below' if any(each.voids) else ''}"
    return (each.id, parity, *shares, bounds, *map(show, (*each.rates, each.absolute)))


def _public() -> Iterator[str]:
    """The row of public evidence, with the formulas of the other rows."""
    found = public.evidence()
    a, b = (public.STEP_MS[name] for name in ("a40", "h100"))
    yield from ("## Public evidence, not measured by this project", "")
    yield from markdown(_figures_head("A40", "H100"), [_figure(found)], right=FIGURES_RIGHT)
    yield ""
    yield (
        f"One training script on {public.DEVICES} x A40 at {a:,} ms and on {public.DEVICES} x H100 SXM at "
        f"{b:,} ms per step: the H100 is {number(a / b)} times as fast, and its bf16 peak is "
        f"{number(found.divisors['per peak FLOP/s'] / found.absolute.centre)} times as high. "
        f"{' '.join(public.CAVEATS)} [Source: modded-nanogpt]({public.SOURCE}), "
        f"{public.TOKENS_PER_STEP:,} tokens per step, {public.flops_per_token():,} FLOPs per token by the "
        "formula below."
    )


def _plot(title: str, path: str) -> Iterator[str]:
    yield from (f"## {title}", "", f"![{title}]({path})")


def _section(
    title: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    text: str = "",
    right: Sequence[int] = (),
) -> Iterator[str]:
    """A title, a text if there is one, and a table, if it has rows; `right`: see `markdown`."""
    rows = list(rows)
    if not rows:
        return
    yield from (f"## {title}", "")
    if text:
        yield from (text, "")
    yield from markdown(head, rows, right=right)


def _divisors(comparisons: Sequence[Comparison]) -> Iterator[str]:
    text = (
        "A's rate per unit of each divisor over B's. They disagree: choosing the divisor can make parity. At "
        "equal MBU an A40 decodes 1.37 times an H100's tokens/s per peak FLOP/s (6.61 / 4.81), for no reason "
        "but the divisor."
    )
    names = list(dict.fromkeys(name for each in comparisons for name in each.divisors))
    rows = (
        (each.id, number(each.parity.centre),
         *(number(each.divisors[name]) if name in each.divisors else None for name in names))
        for each in comparisons
    )  # fmt: skip
    head = ("figure", "own bound (parity)", *names)
    right = range(1, len(head))
    return _section("What other divisors would have said", head, rows, text=text, right=right)


def _shares(comparisons: Sequence[Comparison]) -> Iterator[str]:
    text = (
        "Medians. `MFU` and `MBU` of the datasheet where there is one, of what a square product and a large "
        "read reached here, and of the model's own products, there and back. Of the link: over a whole step, "
        "and during communication alone (where a GPU computes beside it, its bytes count and its time does "
        "not: above 100% something was hidden)."
    )
    rows = (
        (each.id, letter, ", ".join(f"{name} {statistics.median(part):.1%}" for name, part in listed.items()))
        for each in comparisons
        for letter, figure in zip("AB", each.figures, strict=True)
        if (listed := figure.get("shares"))
    )
    return _section("Shares of every ceiling", ("figure", "side", "shares"), rows, text=text)


def _costs(parity: Parity) -> Iterator[str]:
    rows = (
        (each.id, letter, *_cost(figure, is_roofline=side.is_roofline))
        for each in parity.comparisons
        for letter, side, figure in zip("AB", parity.sides, each.figures, strict=True)
    )
    head = ("figure", "side", "mJ per token", "price of 1M tokens", "peak memory of the process", "latency")
    return _section("Energy, money, memory, latency", head, rows)


def _cost(figure: Any, *, is_roofline: bool) -> tuple[str | None, ...]:
    """Cells: energy, price, memory and latency."""
    joules, cost = figure["joules_per_token"], figure["cost_per_million_tokens"]
    energy = number(1e3 * statistics.median(joules)) if joules else "not measured"
    price = None if cost is None else f"{number(cost)} {figure.get('cost_of', '')}"
    if is_roofline:
        return f"{energy} at the power limit, not measured", price, None, None
    latency = None
    for key, name in (("ttft_ms", "TTFT"), ("itl_ms", "ITL")):
        if key in figure:
            latency = f"{name} {number(statistics.median(figure[key]))} ms"
    if "step_seconds" in figure:
        spread = span([*figure["step_seconds_p10"], *figure["step_seconds_p90"]])
        latency = f"step {number(statistics.median(figure['step_seconds']))} s (p10 to p90: {spread})"
    return energy, price, f"{figure['peak_memory_bytes'] / 1e9:.2f} GB", latency


def _ceilings(parity: Parity) -> Iterator[str]:
    a, b = (dict(_measured(side)) for side in parity.sides)
    rows = ((name, a.get(name), b.get(name)) for name in a | b)
    return _section("Ceilings, measured", ("", "A", "B"), rows)


def _measured(side: Side) -> Iterator[tuple[str, str]]:
    if side.is_roofline:
        return
    ceilings = side.content["ceilings"]
    yield f"square {ceilings['product_dtype']} product, TFLOP/s", _rate(ceilings["product_tflops"])
    for shape, rate in ceilings["products_tflops"].items():
        yield f"products of {shape}, TFLOP/s", _rate(rate)
    yield "reading memory, GB/s", _rate(ceilings["read_gb_per_s"])
    yield "copying memory, GB/s", _rate(ceilings["copy_gb_per_s"])
    for key, ends in (("links", "ranks"), ("links_between_nodes", "nodes")):
        links = ceilings.get(key) or {}
        if "num_ranks" in links:
            among = f"{links['num_ranks']} {ends}"
            yield f"all-reduce, {among}, bus GB/s", _rate(links["all_reduce_gb_per_s"])
            yield f"all-to-all, {among}, bus GB/s", _rate(links["all_to_all_gb_per_s"])
            yield f"all-reduce of 4 bytes, {among}, µs", number(links["all_reduce_latency_us"])
    for what in ("write", "read"):
        yield f"disk {what}, GB/s", _rate(ceilings["disk"][f"{what}_gb_per_s"])


def _missing(parity: Parity) -> Iterator[str]:
    yield from ("## What was not measured, or not compared", "")
    yield from (f"- {line}" for line in parity.missing or ["nothing"])


def _sources(parity: Parity) -> Iterator[str]:
    yield from ("## Where each number comes from", "", "### Formulas", "", *markdown(FORMULAS_HEAD, FORMULAS))
    yield from ("", "### Files", "")
    for letter, side in zip("AB", parity.sides, strict=True):
        yield f"- {letter}: `{side.origin}`; {commit_of(side)}"
        yield from ("", "```", lineage.describe(origin_of(side)), "```", "")
    yield from ("", "### Attention, by figure", "")
    kernels = (
        (each.id, *(figure.get("attention_kernel", "not recorded") for figure in each.figures))
        for each in parity.comparisons
    )
    yield from markdown(("figure", "A", "B"), kernels)
    yield from ("", "### Commands, by figure", "")
    rows = (
        (
            each.id,
            letter,
            lineage.brief(figure.get("input")),
            f"`{figure['command']}`",
            "; ".join(number(value, digits=4) for value in figure["values"]),
        )
        for each in parity.comparisons
        for letter, figure in zip("AB", each.figures, strict=True)
    )
    yield from markdown(("figure", "side", "of", "command", "runs"), rows)


def _links(side: Side) -> str | None:
    found = []
    for key, ends in (("links", "ranks"), ("links_between_nodes", "nodes")):
        if (link := side.link(key)) is not None:
            rate = _rate(side.content["ceilings"][key][LINK_PEAK])
            found.append(f"{rate}, all-reduce bus bandwidth, {link.ends} {ends}")
    return "; ".join(found) or None


def _rate(rate: Any) -> str:
    return f"{number(rate['best'])} ({span(rate['spread'])})"


def _percent(interval: Any) -> str:
    if interval.low is None or interval.exact:
        return f"{interval.centre:.1%}"
    return f"{interval.centre:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def to_html(text: str, folder: Path) -> str:
    """The Markdown as one HTML file, with the pictures of `folder` inside it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for picture in sorted((folder / "plots").glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        body = body.replace(f'src="plots/{picture.name}"', f'src="data:image/png;base64,{data}"')
    body = re.sub(
        r" (\[(?:[\d.,% ]+|one run)\])", r' <span class="n">\1</span>', body
    )  # intervals, in one line
    for verdict in VERDICTS:
        name = verdict.removeprefix("not ").replace("decided", "undecided")
        body = body.replace(f"<strong>{verdict}</strong>", f'<strong class="{name}">{verdict}</strong>')
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n{body}</body></html>\n"
    )
