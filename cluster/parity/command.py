"""`make parity A=FILE B=FILE`: how two machines compare, once each is set against its own hardware.

    python -m cluster.parity A B [--output FOLDER] [--tolerance 0.1] [--wandb MODE]

A and B are files of `make baseline`; B (or A) may be a datasheet's roofline, "datasheet:a40" or
"datasheet:h100". Writes report.md, report.html (one file, pictures inside), plots/*.png and summary.json.
"""

import argparse
import base64
import html
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster import cli, files, provenance
from cluster.cli import UserError
from cluster.measure.probe import LINK_PEAK
from cluster.parity import plots as parity_plots
from cluster.parity.comparison import (
    SHARE,
    Comparison,
    Parity,
    Peaks,
    Side,
    as_json,
    commit_of,
    compare,
    read_side,
    show,
)
from cluster.record import WANDB_MODES, Record

FORMULAS = (  # name, formula, where it stands
    ("rate", "tokens / seconds / devices, the median step of a run",
     "training/baseline/steps.py, serving/bench/steps.py"),
    (
        "FLOPs per token, training",
        "6·N_matmul + 12·L·d·s, forward and backward; the whole attention matrix counts, recomputation does "
        "not (PaLM, arXiv 2204.02311, appendix B)",
        "training/model/shapes.py, flops_per_token",
    ),
    ("FLOPs per token, prefill", "(2·N_hidden·S + 2·V·h + 2·L·d·S²) / S, causal",
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
FORMULAS_HEAD = ("name", "formula", "stands in")
STYLE = """\
body{font:16px/1.5 system-ui,sans-serif;color:#1d2125;max-width:60rem;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.7rem;line-height:1.25}h2{font-size:1.25rem;margin-top:2.2rem;border-bottom:1px solid #d9dde1}
table{border-collapse:collapse;font-size:.86rem;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.3rem .6rem;border-bottom:1px solid #e4e7ea;text-align:left;vertical-align:top}
th{background:#f4f6f8}td:not(:first-child){font-variant-numeric:tabular-nums}
img{max-width:100%}code{font-size:.84em;background:#f4f6f8;padding:.1em .25em;overflow-wrap:anywhere}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.parity", description=__doc__.splitlines()[0], epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("a", metavar="A", help="file of `make baseline`, or datasheet:NAME")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: outputs/parity-A-B")
    parser.add_argument("--tolerance", type=float, default=0.1, help="what counts as parity (default: 0.1)")
    parser.add_argument("--wandb", choices=WANDB_MODES, default="auto", help="default: auto")
    options = parser.parse_args(arguments)

    def body() -> None:
        if not 0 < options.tolerance < 10:
            raise UserError(
                f"--tolerance: {options.tolerance:g} must lie between 0 and 10; 0.1 is within 10%"
            )
        a, b = read_side(options.a), read_side(options.b)
        parity = compare(a, b, tolerance=options.tolerance)
        folder = options.output or Path("outputs") / f"parity-{_stem(a)}-{_stem(b)}"
        write(parity, folder, tolerance=options.tolerance, wandb_mode=options.wandb)
        for claim in parity.claims:
            print(f"{claim.verdict:<14}{claim.text} ({claim.because})")
        print(f"report: {folder / 'report.html'}")
        print(json.dumps(as_json(parity)["figures"]))

    return cli.run(body)


def _stem(side: Side) -> str:
    """What was named, as part of a folder's name: two files called baseline.json lie in two folders."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", side.origin.removesuffix(".json")).strip("-.")


def write(parity: Parity, folder: Path, *, tolerance: float, wandb_mode: str) -> None:
    """Everything that the report consists of, in `folder`; its W&B run is mirrored as any other's."""
    about = provenance.collect(command=sys.argv, data_fingerprint=None)
    with Record.open(
        folder, config={"a": parity.sides[0].origin, "b": parity.sides[1].origin, "tolerance": tolerance},
        provenance=about, wandb_mode=wandb_mode, project="asuncion", group="parity", name=folder.name,
        resume_step=None,
    ) as record:  # fmt: skip
        plots = parity_plots.draw(parity, folder / "plots")
        text = report(parity, {title: f"plots/{path.name}" for title, path in plots.items()}, tolerance)
        files.write_text(folder / "report.md", text)
        files.write_text(folder / "report.html", to_html(text, folder))
        columns = ["figure", "parity", "low", "high", "absolute", "bound_a", "bound_b"]
        rows = [
            [c.id, c.parity.centre, c.parity.low, c.parity.high, c.absolute.centre, *c.bounds]
            for c in parity.comparisons
        ]
        record.table("parity", columns, rows)
        record.finish(as_json(parity))


# --- the text ----------------------------------------------------------------------------------------------


def report(parity: Parity, plots: dict[str, str], tolerance: float) -> str:
    """The report in Markdown; `plots` maps a title to a path beside it."""
    return "\n".join(_lines(parity, plots, tolerance)) + "\n"


def _lines(parity: Parity, plots: dict[str, str], tolerance: float) -> Iterator[str]:
    a, b = parity.sides
    yield f"# Parity: {a.name} (A) against {b.name} (B)"
    yield ""
    yield (
        "Each machine is set against its own hardware: a rate is divided by what the resource that bounds it "
        "allows (MFU where compute does, MBU where memory bandwidth does, share of link where the link "
        "between ranks or nodes does), and the two shares by each other. 1 is parity. Absolute rates stand "
        "beside, because a normalised figure trains no model."
    )
    yield from ("", "## What may be said", "", "| verdict | claim | because |", "|---|---|---|")
    for claim in parity.claims:
        yield f"| **{claim.verdict}** | {claim.text} | {claim.because} |"
    yield ""
    yield (
        f"Supported: the whole interval lies within {tolerance:.0%} of what is claimed. Contradicted: all of "
        "it lies outside. Not decided: the runs are too few or too scattered to tell, a ceiling is exceeded, "
        "or the machine had other work."
    )
    yield from ("", "## Figures", "")
    yield "| figure | A tokens/s | B tokens/s | A / B absolute | bound | A's share | B's share | **parity** |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in parity.comparisons:
        shares = [
            f"{SHARE[bound]} {_percent(share)}" for bound, share in zip(each.bounds, each.shares, strict=True)
        ]
        rates = [show(rate) for rate in each.rates]
        cells = [each.id, *rates, show(each.absolute), " / ".join(dict.fromkeys(each.bounds)), *shares]
        void = "; decides nothing, see above" if any(each.voids) else ""
        yield f"| {' | '.join(cells)} | **{show(each.parity)}**{void} |"
    yield ""
    yield (
        "Rates are of one device; in brackets 95% intervals from the rounds of one session, where rates and "
        "measured ceilings scatter; what differs from session to session is not in them. Shares are of these "
        "ceilings:"
    )
    yield ""
    yield "| | peak TFLOP/s | bandwidth GB/s | from | measured link GB/s |"
    yield "|---|---|---|---|---|"
    for place, peaks in enumerate(parity.peaks):
        both = f"{peaks.flops / 1e12:.4g} | {peaks.bytes_per_s / 1e9:.4g}"
        yield f"| {'AB'[place]} | {both} | {peaks.source} | {_links(peaks, parity.sides[place])} |"
    for title, path in plots.items():
        yield from ("", f"## {title}", "", f"![{title}]({path})")
    yield from ("", "## What other divisors would have said", "")
    yield (
        "A's rate per unit of each divisor over B's. They disagree: choosing the divisor can make parity. At "
        "equal MBU an A40 decodes 1.37 times an H100's tokens/s per peak FLOP/s (6.61 / 4.81), for no reason "
        "but the divisor."
    )
    names = list(dict.fromkeys(name for each in parity.comparisons for name in each.divisors))
    yield from ("", f"| figure | own bound (parity) | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|")
    for each in parity.comparisons:
        told = (f"{each.divisors[name]:.3g}" if name in each.divisors else "-" for name in names)
        yield f"| {each.id} | {each.parity.centre:.3g} | {' | '.join(told)} |"
    yield from ("", "## Shares of every ceiling", "")
    yield (
        "Medians. `MFU` and `MBU` of the datasheet where there is one, of what a square product and a large "
        "read reached here, and of the model's own products, there and back. Of the link: over a whole step, "
        "and during communication alone (where a GPU computes beside it, its bytes count and its time does "
        "not: above 100% something was hidden)."
    )
    yield from ("", "| figure | side | shares |", "|---|---|---|")
    for each in parity.comparisons:
        for place, figure in enumerate(each.figures):
            if listed := figure.get("shares"):
                told = (f"{name} {statistics.median(part):.1%}" for name, part in listed.items())
                yield f"| {each.id} | {'AB'[place]} | {', '.join(told)} |"
    yield from ("", "## Energy, money, memory, latency", "")
    yield "| figure | side | J/token | price of 1M tokens | peak memory of the process | latency |"
    yield "|---|---|---|---|---|---|"
    for each in parity.comparisons:
        for place, side in enumerate(parity.sides):
            yield _other(each, "AB"[place], each.figures[place], is_roofline=side.is_roofline)
    yield from ("", "## Ceilings, measured", "", *_ceilings(parity))
    yield from ("", "## What was not measured, or not compared", "")
    yield from (f"- {line}" for line in parity.missing or ["nothing"])
    yield from (
        "",
        "## Where each number comes from",
        "",
        "### Formulas",
        "",
        *_table(FORMULAS_HEAD, FORMULAS),
        "",
        "### Files",
        "",
    )
    for place, side in enumerate(parity.sides):
        yield f"- {'AB'[place]}: `{side.origin}`; {commit_of(side)}"
    yield from ("", "### Commands, by figure", "", "| figure | side | command | runs |", "|---|---|---|---|")
    for each in parity.comparisons:
        for letter, figure in zip("AB", each.figures, strict=True):
            values = ", ".join(f"{value:.4g}" for value in figure["values"])
            command = figure["command"].replace("|", "\\|")
            yield f"| {each.id} | {letter} | `{command}` | {values} |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _links(peaks: Peaks, side: Side) -> str:
    found = []
    for link, key, ends in ((peaks.link, "links", "ranks"), (peaks.network, "links_between_nodes", "nodes")):
        if link is not None:
            rate = _rate(side.content["ceilings"][key][LINK_PEAK])
            found.append(f"{rate}, all-reduce bus bandwidth, {link.ends} {ends}")
    return "; ".join(found) or "-"


def _rate(rate: Any) -> str:
    return f"{rate['best']:.4g} ({rate['spread'][0]:.4g} to {rate['spread'][1]:.4g})"


def _percent(interval: Any) -> str:
    if interval.low is None or interval.exact:
        return f"{interval.centre:.1%}"
    return f"{interval.centre:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _other(each: Comparison, letter: str, figure: Any, *, is_roofline: bool) -> str:
    joules = figure["joules_per_token"]
    energy = f"{statistics.median(joules):.3g}" if joules else "not measured"
    if is_roofline:
        energy += " at the power limit, not measured"
    cost = figure["cost_per_million_tokens"]
    memory = f"{figure['peak_memory_bytes'] / 1e9:.2f} GB" if not is_roofline else "-"
    latency = "-"
    if not is_roofline:
        for key, name in (("ttft_ms", "TTFT"), ("itl_ms", "ITL")):
            if key in figure:
                latency = f"{name} {statistics.median(figure[key]):.3g} ms"
        if "step_seconds" in figure:
            spread = f"{min(figure['step_seconds_p10']):.3g} to {max(figure['step_seconds_p90']):.3g}"
            latency = f"step {statistics.median(figure['step_seconds']):.3g} s (p10 to p90: {spread})"
    price = "-" if cost is None else f"{cost:.3g} {figure.get('cost_of', '')}"
    return f"| {each.id} | {letter} | {energy} | {price} | {memory} | {latency} |"


def _ceilings(parity: Parity) -> Iterator[str]:
    yield "| | A | B |"
    yield "|---|---|---|"
    rows: dict[str, list[str]] = {}
    for place, side in enumerate(parity.sides):
        for name, text in _measured(side):
            rows.setdefault(name, ["-", "-"])[place] = text
    yield from (f"| {name} | {cells[0]} | {cells[1]} |" for name, cells in rows.items())


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
            number = f"{links['num_ranks']} {ends}"
            yield f"all-reduce, {number}, bus GB/s", _rate(links["all_reduce_gb_per_s"])
            yield f"all-to-all, {number}, bus GB/s", _rate(links["all_to_all_gb_per_s"])
            yield f"all-reduce of 4 bytes, {number}, µs", f"{links['all_reduce_latency_us']:.4g}"
    for what in ("write", "read"):
        yield f"disk {what}, GB/s", _rate(ceilings["disk"][f"{what}_gb_per_s"])


# --- HTML --------------------------------------------------------------------------------------------------


def to_html(text: str, folder: Path) -> str:
    """The Markdown as one HTML file, with the pictures of `folder` inside it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for picture in sorted((folder / "plots").glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        body = body.replace(f'src="plots/{picture.name}"', f'src="data:image/png;base64,{data}"')
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n{body}</body></html>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
