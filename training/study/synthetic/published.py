"""What arXiv 2609.39114 (Zhang & Lin, 1 October 2026) prints of the synthetic problem, beside our results.

Nothing that is computed depends on these numbers.

Each cell is the mean of log10 F(X_0) - log10 min_t F(X_t) over 100 seeds, and two standard errors of it.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from cluster.display import COLORS, Table, figure, save, table


class Cell(NamedTuple):
    """A mean and two standard errors of it, both in decades of F."""

    mean: float
    two_errors: float


SOURCE = "arXiv 2609.39114, tables 1 and 7"
SIZES = (8, 32, 128, 512, 2048)


def _row(means: str, errors: str) -> dict[int, Cell]:
    return dict(zip(SIZES, map(Cell, map(float, means.split()), map(float, errors.split())), strict=True))


CELLS = {  # table -> form (training/study/synthetic/row_norms.py) -> rows m -> cell
    "1": {
        "muon": _row("5.70 5.70 5.70 5.72 5.72", ".03 .02 .02 .03 .03"),
        "algorithm_1": _row("5.70 5.46 5.00 4.12 3.15", ".03 .02 .02 .01 .01"),
        "practical": _row("5.70 5.46 5.00 4.13 3.15", ".03 .02 .01 .01 .01"),
    },
    "7": {
        "muon": _row("5.51 5.57 5.55 5.57 5.57", ".05 .05 .05 .05 .05"),
        "algorithm_1": _row("5.51 4.64 4.75 3.63 3.58", ".05 .05 .05 .05 .05"),
        "practical": _row("5.51 4.64 4.75 3.63 3.58", ".05 .05 .05 .05 .05"),
    },
}
ROUNDING = 0.005  # of what is printed
TITLES = {"muon": "Muon", "algorithm_1": "NorMuon, Algorithm 1", "practical": "NorMuon, (4.1)"}
HEAD = ("table", "method", "m", "ours", "paper", "difference", "verdict", "gamma", "beta1", "beta2")


def verdict(ours: Cell, paper: Cell) -> str:
    """Whether they differ by at most two standard errors: of the paper's mean, or of the difference.

    The paper prints two standard errors after its ±, so this is the whole allowance. It counts only the
    paper's own problems. Ours are drawn too: one fair cell in six lies outside it ("within both").
    """
    apart = abs(ours.mean - paper.mean) - ROUNDING
    if apart <= paper.two_errors:
        return "within"
    return "within both" if apart <= math.hypot(ours.two_errors, paper.two_errors) else "OUTSIDE"


def describe(result: dict[str, Any]) -> Table:
    """`run_row_norms` (training/study/synthetic/row_norms.py) beside the paper; other sizes have dashes."""
    rows = []
    for name, forms in result["tables"].items():
        for form, sizes in forms.items():
            for m, cell in sizes.items():
                ours, paper = Cell(cell["mean"], cell["two_errors"]), CELLS[name][form].get(int(m))
                gamma, *decays = cell["chosen"].values()
                beside = (
                    (_text(paper), f"{ours.mean - paper.mean:+.3f}", verdict(ours, paper))
                    if paper
                    else (None,) * 3
                )
                chosen = f"10^{math.log10(gamma):.1f}" + " (rim)" * cell["on_rim"]
                rows.append((name, TITLES[form], m, _text(ours), *beside, chosen, *map(str, decays)))
    return table(HEAD, rows, left=(1, 6))


def plot(result: dict[str, Any], path: Path) -> Path:
    """Ours as lines with two standard errors, the paper's as squares: a panel for each table."""
    drawn, panels = figure(5 * len(result["tables"]), 4, columns=len(result["tables"]), sharey=True)
    for axes, (name, forms) in zip(panels, result["tables"].items(), strict=True):
        for color, (form, sizes) in zip(COLORS, forms.items(), strict=False):
            at, cells = [int(m) for m in sizes], list(sizes.values())
            errors = [cell["two_errors"] for cell in cells]
            style = {"color": color, "linestyle": "--" if form == "practical" else "-", "capsize": 3}
            axes.errorbar(at, [cell["mean"] for cell in cells], errors, label=TITLES[form], **style)
            paper = {m: CELLS[name][form][m] for m in at if m in CELLS[name][form]}
            marks = {"color": color, "fmt": "s", "fillstyle": "none", "markersize": 8}
            axes.errorbar(list(paper), [each.mean for each in paper.values()], **marks)
        axes.set(xscale="log", xlabel="rows m", title=f"table {name} (squares: the paper)")
        axes.set_xticks(at, map(str, at), minor=False)
    panels[0].set_ylabel("log10 F(X0) - log10 min F")
    panels[0].legend(fontsize=8)
    return save(drawn, path)


def _text(cell: Cell) -> str:
    return f"{cell.mean:.3f} ± {cell.two_errors:.3f}"
