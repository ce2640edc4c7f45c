"""`make parity A=FILE B=FILE`: how two machines compare, once each is set against its own hardware.

    python -m cluster.parity A B [--output FOLDER] [--tolerance 0.1] [--wandb MODE]

A and B are files of `make baseline`; B (or A) may be a datasheet's roofline, "datasheet:a40" or
"datasheet:h100". Writes report.md, report.html (one file, pictures inside), plots/*.png and summary.json.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import cli, files
from cluster.cli import UserError
from cluster.display import pairs, show
from cluster.measure.intervals import Interval
from cluster.parity import plots
from cluster.parity.baseline_file import Side, origin_of, read_side
from cluster.parity.parity import Parity, as_json, compare
from cluster.parity.report import report, to_html
from cluster.record import provenance
from cluster.record.record import WANDB_MODES
from cluster.record.result import record_result

FIGURES = (
    *("figure", "parity", "low", "high", "absolute", "absolute_low", "absolute_high"),
    *("bound_a", "bound_b"),
)
CLAIMS = ("verdict", "claim", "because")


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
        claims = [(claim.verdict, f"{claim.text} ({claim.because})") for claim in parity.claims]
        show(parity.finding, pairs(claims), f"report: {folder / 'report.html'}")
        print(json.dumps(as_json(parity)["figures"]))

    return cli.run(body)


def _stem(side: Side) -> str:
    """The named file as part of a folder's name. Includes its path: files of one name get two folders."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", side.origin.removesuffix(".json")).strip("-.")


def write(parity: Parity, folder: Path, *, tolerance: float, wandb_mode: str) -> None:
    """Write the report, its plots and its record to `folder`; the record is mirrored to W&B."""
    about = provenance.collect(command=sys.argv, data_fingerprint=None)
    drawn = plots.draw(parity, folder / "plots")
    text = report(parity, {title: f"plots/{path.name}" for title, path in drawn.items()}, tolerance)
    files.write_text(folder / "report.md", text)
    files.write_text(folder / "report.html", to_html(text, folder))
    figures = [[c.id, *_ends(c.parity), *_ends(c.absolute), *c.bounds] for c in parity.comparisons]
    claims = [[claim.verdict, claim.text, claim.because] for claim in parity.claims]
    record_result(
        folder, job_type="parity", name=folder.name, provenance=about, wandb_mode=wandb_mode,
        inputs=[origin_of(side) for side in parity.sides],
        config={"a": parity.sides[0].origin, "b": parity.sides[1].origin, "tolerance": tolerance},
        summary=as_json(parity), tables={"parity": (FIGURES, figures), "claims": (CLAIMS, claims)},
        images={f"{path.stem}_plot": path for path in drawn.values()}, attachments=[folder / "report.html"],
    )  # fmt: skip


def _ends(interval: Interval) -> list[float | None]:
    return [interval.centre, interval.low, interval.high]


if __name__ == "__main__":
    sys.exit(main())
