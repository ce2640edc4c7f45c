"""Tables of a study: differences with intervals, grids of variants, losses of rare tokens. No torch."""

from collections.abc import Callable, Sequence
from functools import partial

from cluster.display import markdown
from cluster.measure.intervals import Interval, of_mean
from training.data.frequency import NUM_DECILES
from training.study.plots import figure_file
from training.study.results import Result, StudyResults, losses, paired

ABOUT = (
    "Final validation loss minus that of {baseline}, seed by seed, in nats per token: the mean and Student's "
    "95% interval over {seeds} seeds (of three seeds 2.5 standard deviations to each side). Below zero is "
    "better."
)


def comparisons(study: StudyResults, *, noise: str) -> list[str]:
    """Headings and Markdown, for those of the three tables for which there is something to show."""
    config, found = study.plan.config, []
    if baseline := config.claims.baseline or config.claims.reference:
        about = ABOUT.format(baseline=config.title(baseline), seeds=len(config.seeds))
        picture = f"![final_losses](figures/{figure_file('final_losses', config, noise=noise)})"
        text = f"{about}\n\n{_differences(study, baseline, noise=noise)}\n\n{picture}"
        found += ["### Against the baseline", text]
    for name in config.grids:
        picture = f"![grid-{name}](figures/{figure_file(f'grid-{name}', config, noise=noise)})"
        text = f"{_grid(study, name, noise=noise)}\n\n{picture}"
        found += [f"### Grid: {config.grids[name].title or name}", text]
    return found + _rare(study, noise=noise)


def interval_text(interval: Interval | None, *, sign: bool = True) -> str:
    """Such as "-0.0120 ± 0.0040"; a dash for None."""
    if interval is None:
        return "-"
    centre = f"{interval.centre:{'+' if sign else ''}.4f}"
    return centre if interval.high is None else f"{centre} ± {interval.high - interval.centre:.4f}"


def verdict(interval: Interval | None) -> str:
    """Of a difference of losses: on which side of zero the whole interval lies."""
    if interval is None or interval.low is None or interval.high is None:
        return "not decided"
    if interval.high < 0:
        return "lower"
    return "higher" if interval.low > 0 else "not decided"


def _final(result: Result) -> float | None:
    return result.validation_loss


def _of_decile(result: Result, *, number: int) -> float | None:
    return result.deciles[number] if result.deciles else None


def _differences(study: StudyResults, baseline: str, *, noise: str) -> str:
    config, theirs = study.plan.config, study.finished(baseline, noise=noise)
    rows = []
    for rule in config.rules:
        mine = study.finished(rule, noise=noise)
        own = losses(mine)
        against = None if rule == baseline else paired(mine, theirs, _final)
        mean = interval_text(of_mean(own) if own else None, sign=False)
        beside = "" if rule == baseline else verdict(against)
        rows.append([config.title(rule), mean, interval_text(against), beside])
    return _table(["rule", "loss", "difference", "verdict"], rows)


def _grid(study: StudyResults, name: str, *, noise: str) -> str:
    """A cell is the loss of its variant at its own best rate; the lowest in bold."""
    grid = study.plan.config.grids[name]
    cells = {
        place: losses(study.finished(rule, noise=noise)) for place, (rule, _) in grid.cells(name).items()
    }
    intervals = {place: of_mean(found) for place, found in cells.items() if found}
    least = min((each.centre for each in intervals.values()), default=None)
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = []
    for row in dict.fromkeys(row for row, _ in cells):
        texts = []
        for column in columns:
            interval = intervals.get((row, column))
            text = interval_text(interval, sign=False)
            texts.append(f"**{text}**" if interval and interval.centre == least else text)
        rows.append([row, *texts])
    return _table(["", *columns], rows)


def _rare(study: StudyResults, *, noise: str) -> list[str]:
    config = study.plan.config
    baseline = config.claims.baseline or config.claims.reference
    rules = [rule for rule in config.rules if any(r.deciles for r in study.finished(rule, noise=noise))]
    if baseline not in rules:
        return []
    theirs = study.finished(baseline, noise=noise)
    rows = []
    for rule in rules:
        mine = study.finished(rule, noise=noise)
        values = [partial(_of_decile, number=i) for i in range(NUM_DECILES)]
        texts = [
            _mean(theirs, value) if rule == baseline else interval_text(paired(mine, theirs, value))
            for value in values
        ]
        rows.append([config.title(rule), *texts])
    about = (
        "The same differences by token frequency. Each column is a tenth of the training text, the most "
        f"frequent tokens first. The row of {config.title(baseline)} shows its loss."
    )
    head = ["rule", *map(str, range(1, NUM_DECILES + 1))]
    return ["### Frequent and rare tokens", f"{about}\n\n{_table(head, rows)}"]


def _mean(results: Sequence[Result], value: Callable[[Result], float | None]) -> str:
    found = [each for each in map(value, results) if each is not None]
    return f"{of_mean(found).centre:.4f}" if found else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown(head, rows))
