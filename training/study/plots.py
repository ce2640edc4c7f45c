"""Figures of a study, made from its results."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.display import figure, save
from cluster.measure.intervals import of_mean
from training.study.config import StudyConfig
from training.study.results import Result, StudyResults, losses, mean_curve, token_ratio

PANEL_INCHES = (5.0, 4.0)
COSTS_FILE = "loss_costs.png"


def plot_study(study: StudyResults, directory: Path) -> list[Path]:
    """Write every figure, for each noise, as a PNG file in `directory`."""
    directory.mkdir(exist_ok=True)
    paths: list[Path | None] = []
    for noise in study.plan.config.noises:
        for name, plot in FIGURES.items():
            path = directory / figure_file(name, study.plan.config, noise=noise)
            paths.append(plot(study, path, noise=noise))
        for grid in study.plan.config.grids:
            path = directory / figure_file(f"grid-{grid}", study.plan.config, noise=noise)
            paths.append(plot_grid(study, path, grid=grid, noise=noise))
    paths.append(plot_costs(study, directory / COSTS_FILE))
    return [path for path in paths if path is not None]


def figure_file(name: str, config: StudyConfig, *, noise: str) -> str:
    """The file name of a figure of FIGURES under a noise."""
    return f"{name}.png" if len(config.noises) == 1 else f"{name}-{noise}.png"


def plot_losses(study: StudyResults, path: Path, *, noise: str) -> Path:
    """Validation loss over tokens: for each rule the mean over its seeds, in a band from min to max."""
    drawn, [axes] = _panels(1)
    for rule in study.plan.config.rules:
        curve = [(t, s) for t, s in mean_curve(study.finished(rule, noise=noise)) if t > 0]
        if not curve:
            continue
        tokens = [tokens for tokens, _ in curve]
        [line] = axes.plot(tokens, [s.mean for _, s in curve], label=study.plan.config.title(rule))
        low, high = [s.low for _, s in curve], [s.high for _, s in curve]
        axes.fill_between(tokens, low, high, alpha=0.25, color=line.get_color(), linewidth=0)
    axes.set(xlabel="tokens", ylabel="validation loss (nats per token)", title="band: all seeds")
    _legend(axes)
    return save(drawn, path)


def plot_grid(study: StudyResults, path: Path, *, grid: str, noise: str) -> Path:
    """Final loss of each row of a grid, a line for each column: means with 95% intervals over the seeds."""
    config = study.plan.config.grids[grid]
    drawn, [axes] = _panels(1)
    cells = config.cells(grid)
    rows, columns = (list(dict.fromkeys(places)) for places in zip(*cells, strict=True))
    for shift, column in enumerate(columns):
        means = {}
        for place, row in enumerate(rows):
            if found := losses(study.finished(cells[row, column][0], noise=noise)):
                means[place + 0.05 * shift] = of_mean(found)
        x, intervals = list(means), list(means.values())
        errors = [0.0 if each.high is None else each.high - each.centre for each in intervals]
        centres = [each.centre for each in intervals]
        axes.errorbar(x, centres, errors, marker="o", markersize=4, capsize=3, label=column)
    axes.set_xticks(range(len(rows)), rows)
    axes.set(ylabel="validation loss (nats per token)", title=config.title or grid)
    _legend(axes)
    return save(drawn, path)


def plot_costs(study: StudyResults, path: Path) -> Path:
    """Validation loss over gradients, and over seconds: a column for each noise, a line for each rule.

    Seconds are gradients times the median step's seconds over the rule's seeds, so that other work on the
    machine does not bend the curves; evaluations do not count.
    """
    config = study.plan.config
    noises, width = list(config.noises), 0.7 * PANEL_INCHES[0]
    drawn, panels = figure(width * len(noises) + 1, 7.0, columns=len(noises), rows=2, sharey="col")
    for place, noise in enumerate(noises):
        for rule in config.rules:
            finished = study.finished(rule, noise=noise)
            curve = [(t, s) for t, s in mean_curve(finished) if t > 0]
            times = [result.step_seconds for result in finished if result.step_seconds]
            if not curve or not times:
                continue
            per_step = study.plan.plan_of(finished[0].run).tokens_per_step
            steps = [tokens / per_step for tokens, _ in curve]
            seconds = [step * statistics.median(times) for step in steps]
            for axes, x in ((panels[place], steps), (panels[len(noises) + place], seconds)):
                [line] = axes.plot(x, [s.mean for _, s in curve], label=config.title(rule))
                low, high = [s.low for _, s in curve], [s.high for _, s in curve]
                axes.fill_between(x, low, high, alpha=0.25, color=line.get_color(), linewidth=0)
        panels[place].set(xlabel="gradients", title=f"noise: {noise}")
        panels[len(noises) + place].set(xlabel="seconds of steps")
    for first in (panels[0], panels[len(noises)]):
        first.set_ylabel("validation loss (nats per token)")
    _legend(panels[0])
    return save(drawn, path)


def plot_rates(study: StudyResults, path: Path, *, noise: str) -> Path:
    """Tuning loss over learning rate: a panel for each rule, a line for each width, its lowest marked."""
    config = study.plan.config
    drawn, panels = _panels(len(config.rules), share=True)
    for axes, rule in zip(panels, config.rules, strict=True):
        for of_noise, width in study.plan.settings:
            results = study.tuning(rule, noise=noise, width=width) if of_noise == noise else []
            for ratio in config.rules[rule].vector_ratios:
                name = width if len(config.rules[rule].vector_ratios) == 1 else f"{width} x{ratio:g}"
                _plot_rates_of(axes, [r for r in results if r.run.vector_ratio == ratio], name)
        axes.set(xscale="log", xlabel="learning rate", title=config.title(rule))
        _legend(axes)
    panels[0].set_ylabel("tuning loss (nats per token)")
    return save(drawn, path)


def _plot_rates_of(axes: Any, results: Sequence[Result], name: str) -> None:
    points = [(r.tuning_loss, r.run.lr) for r in results if r.ok and r.tuning_loss is not None]
    if not points:
        return
    y, rates = zip(*points, strict=True)
    [line] = axes.plot(rates, y, marker="o", markersize=4, label=name)
    loss, rate = min(points)
    axes.plot(rate, loss, marker="o", markersize=11, fillstyle="none", color=line.get_color())


def plot_token_ratios(study: StudyResults, path: Path, *, noise: str) -> Path | None:
    """Tokens to the reference's mean final loss, as shares of its budget: over the seeds, min to max."""
    config = study.plan.config
    reference = config.claims.reference
    if reference is None:
        return None
    drawn, [axes] = _panels(1)
    others = study.finished(reference, noise=noise)
    for position, rule in enumerate(config.rules):
        ratio = token_ratio(study.finished(rule, noise=noise), reference=others)
        spread = ratio.spread if ratio else None
        if ratio and spread:
            errors = [[spread.mean - spread.low], [spread.high - spread.mean]]
            axes.bar(position, spread.mean, yerr=errors, capsize=6, width=0.6, alpha=0.8)
        if ratio and ratio.num_unreached:
            axes.text(position, 1.02, f"{ratio.num_unreached} never", ha="center", fontsize=8)
    axes.axhline(1, color="gray", linewidth=1)
    axes.axhline(config.claims.token_ratio, color="gray", linewidth=1, linestyle="--")
    titles = [config.title(rule) for rule in config.rules]
    axes.set_xticks(range(len(titles)), titles, fontsize=8)
    name = config.title(reference)
    axes.set(ylabel=f"tokens / {name}'s budget", title=f"tokens to {name}'s mean final loss")
    return save(drawn, path)


def plot_finals(study: StudyResults, path: Path, *, noise: str) -> Path:
    """The final validation loss of each rule: every seed, and the mean with its 95% interval."""
    config = study.plan.config
    found = {rule: losses(study.finished(rule, noise=noise)) for rule in config.rules}
    found = {rule: values for rule, values in reversed(found.items()) if values}
    drawn, [axes] = figure(PANEL_INCHES[0] + 1, 0.28 * len(found) + 1)
    for place, values in enumerate(found.values()):
        interval = of_mean(values)
        error = 0.0 if interval.high is None else interval.high - interval.centre
        [line, *_] = axes.errorbar(interval.centre, place, xerr=error, marker="o", capsize=3)
        axes.plot(values, [place] * len(values), "|", markersize=9, color=line.get_color())
    axes.set_yticks(range(len(found)), map(config.title, found), fontsize=8)
    axes.set(xlabel="final validation loss (nats per token)")
    return save(drawn, path)


FIGURES: dict[str, Callable[..., Path | None]] = {
    "loss_tokens": plot_losses,
    "loss_rate": plot_rates,
    "tokens_to_reference": plot_token_ratios,
    "final_losses": plot_finals,
}


def _panels(count: int, *, share: bool = False) -> tuple[Any, Sequence[Any]]:
    """A figure with `count` panels in a row."""
    width, height = PANEL_INCHES
    return figure((width if count == 1 else 0.7 * width) * count + 1, height, columns=count, sharey=share)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
