"""What the synthetic problem showed, in Markdown and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.display import COLORS, figure, markdown, number, save
from training.study.synthetic.problem import VARIANTS


def slope_verdict(slope: Sequence[float], theory: float) -> str:
    """[value, low, high] against the exponent of an upper bound."""
    _, low, high = slope
    if high < theory:
        return "steeper than the bound, which is for the worst case"
    if low > theory:
        return "shallower than the bound at these horizons"
    return "as the theory says, within the interval"


def gain_verdict(ratio: Sequence[float], other: str) -> str:
    """[Transported's mean dual norm over the other's, low, high]."""
    value, low, high = ratio
    interval = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    if high < 1:
        return f"{interval}: Transported Scion is lower than {other}"
    if low > 1:
        return f"{interval}: Transported Scion is higher than {other}"
    return f"{interval}: no difference from {other} within the interval"


def describe(result: dict[str, Any]) -> str:
    """Markdown: the problem, the slopes, the ratios, the tuning, and what they do not show."""
    sections = (_problem_text, _slope_table, _gain_list, _tuning_text, _limits_text)
    return "\n\n".join("\n".join(section(result)) for section in sections) + "\n"


def _problem_text(result: dict[str, Any]) -> list[str]:
    config, problem = result["config"], result["problem"]
    tail = "" if config["noise"] == "gaussian" else f" of tail index p + {config['tail_margin']:g}"
    horizons = ", ".join(map(str, result["horizons"]))
    return [
        f"F(X) = δ² Σ log cosh(X/δ), X {config['rows']}x{config['cols']}, δ = {config['width']:g}, from "
        f"entries of RMS {config['distance']:g}. In the spectral norm its gradient has Lipschitz constant "
        f"{problem['gradient_lipschitz']:g}, its Hessian {number(problem['hessian_lipschitz'])}. Noise: "
        f"{config['noise']}{tail}, {'skewed' if config['skewed'] else 'symmetric'}, scale "
        f"{config['scale']:g} per entry. {config['seeds']} seeds at each of T = {horizons} gradients; "
        "momentum and step length as the theory scales them with T, their constants tuned once at "
        f"T = {2 ** config['tuning_horizon']}. Slopes: log of the mean dual norm of the exact gradient "
        "against log T, with 95% intervals, bootstrapped over seeds. The control's theory is that of its lag."
    ]


def _slope_table(result: dict[str, Any]) -> list[str]:
    header = (
        "p",
        "method",
        "theory: slope, gradients to ε",
        "slope, all iterates",
        "measured: gradients to ε",
        "slope, later half of each run",
        "slope, longer half of T",
        "all iterates against the theory",
    )
    rows = []
    for moment in result["moments"]:
        for name, row in moment["contenders"].items():
            theory, slope = row["theory"], row["slope"]
            rows.append(
                (
                    f"{moment['p']:g}",
                    VARIANTS[name].title,
                    f"{theory:.3f}, ε^{1 / theory:.2f}",
                    _interval(slope),
                    f"ε^{1 / slope[0]:.2f}" if slope[0] < 0 else "never",
                    _interval(row["later_slope"]),
                    _interval(row["longer_half_slope"]),
                    slope_verdict(slope, theory),
                )
            )
    return list(markdown(header, rows))


def _interval(values: Sequence[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*(round(value, 3) + 0.0 for value in values))  # no -0.000


def _gain_list(result: dict[str, Any]) -> list[str]:
    lines = [f"Ratios of mean dual norms at T = {result['horizons'][-1]}, paired by seed:", ""]
    for moment in result["moments"]:
        p, rows = moment["p"], moment["contenders"]
        for name, ratios in moment["gain"].items():
            other = VARIANTS[name].title.removeprefix("control: ")
            lines.append(f"- p = {p:g}: {gain_verdict(ratios[-1], other)}.")
        low, high = moment["slope_difference"][1:]
        verdict = "not distinct" if low <= 0 <= high else "distinct"
        theory = rows["transported"]["theory"] - rows["batched"]["theory"]
        lines.append(
            f"- p = {p:g}: Transported Scion's slope minus Batched Scion's is "
            f"{_interval(moment['slope_difference'])}, {verdict}; the theory says {theory:.3f}."
        )
    return lines


def _tuning_text(result: dict[str, Any]) -> list[str]:
    config, grid = result["config"], result["moments"][0]["tuning"]
    averages, lrs = grid["averages"], grid["lrs"]
    header = ("p", "rule", *map(str, averages), "taken: average, η", "best of all")
    rows, bound = [], []
    for moment in result["moments"]:
        tuning = moment["tuning"]
        picks = tuning["picks"]
        for name, free in (("batched", "any_average"), ("transported", "transported_any_average")):
            least = [f"{min(duals):.2f}" for duals in tuning[name]]
            taken = (_taken(picks[name]), _taken(picks[free]))
            rows.append((f"{moment['p']:g}", VARIANTS[name].title, *least, *taken))
        if picks["any_average"]["dual"] < picks["batched"]["dual"]:
            bound.append(f"p = {moment['p']:g}")
    lines = [
        f"Tuning at T = {2 ** config['tuning_horizon']} with {config['tuning_seeds']} seeds of its own: "
        f"averages of 1/(1-β) = {', '.join(map(str, averages))} gradients by step lengths "
        f"η = {', '.join(f'{lr:g}' for lr in lrs)}, {len(averages) * len(lrs)} pairs for each rule. Averages "
        f'below {config["shortest_average"]} could be taken by "{VARIANTS["any_average"].title}" only. '
        "Least mean dual norm over η, by average:",
        "",
        *markdown(header, rows),
    ]
    if bound:
        lines += [
            "",
            f"That bound costs Batched Scion something at {' and '.join(bound)}: for practice the fair "
            f'comparison is the one with "{VARIANTS["any_average"].title}".',
        ]
    return lines


def _taken(pick: dict[str, Any]) -> str:
    return f"{pick['average']:g}, {pick['lr']:g}" + (" (rim of the grid)" if pick["on_rim"] else "")


def _limits_text(result: dict[str, Any]) -> list[str]:
    shares = ", ".join(
        f"{moment['contenders'][name]['travel_share']:.0%} ({VARIANTS[name].title}, p = {moment['p']:g})"
        for moment in result["moments"]
        for name in ("batched", "transported")
    )
    return [
        "What this does not show: the rates are upper bounds for the worst problem. This problem is "
        "convex, and quadratic around its minimum. The parameters are those of the theory, not the best "
        "of each horizon. The descent term F(θ_0)/(ηT) has the theory's slope whatever the noise. Its "
        f"share of the mean over all iterates at the longest T is {shares}. The later half does not "
        "contain it. A slope shallower than that of an upper bound does not contradict the bound. At "
        "short T the mean lies far below the bound, and the terms that keep it there fade as slowly as ε "
        "itself: the lag is ηβ/(1-β), not η/(1-β), and the descent takes a share of the run that shrinks "
        "with T. Intervals show the spread over seeds, not the bend of the curves."
    ]


def plot(result: dict[str, Any], path: Path) -> Path:
    """Mean dual norm against T, log-log, a panel for each p; dashed: the theory's slopes. Writes `path`."""
    horizons, moments = np.array(result["horizons"], dtype=float), result["moments"]
    drawn, panels = figure(6 * len(moments), 5, columns=len(moments))
    for axes, moment in zip(panels, moments, strict=True):
        for color, (name, row) in enumerate(moment["contenders"].items()):
            value, low, high = np.array(row["intervals"]).T
            label = f"{VARIANTS[name].title}: {row['slope'][0]:.3f} (theory {row['theory']:.3f})"
            style = {"color": COLORS[color], "alpha": 1.0 if name in ("batched", "transported") else 0.5}
            axes.errorbar(
                horizons, value, (value - low, high - value), fmt="o", markersize=4, label=label, **style
            )
            anchor = np.exp(np.log(value).mean() - row["theory"] * np.log(horizons).mean())
            axes.plot(horizons, anchor * horizons ** row["theory"], linestyle="--", linewidth=1, **style)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", title=f"p = {moment['p']:g}")
        axes.set(xlabel="T (gradients)", ylabel="mean dual norm of the gradient")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13))  # off the points
    return save(drawn, path)
