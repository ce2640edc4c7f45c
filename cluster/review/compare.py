"""`make compare RUNS=a,b,c`: one HTML page of several runs: which is better, by how much, and what differs.

    python -m cluster.review.compare RUN RUN ... [--output FILE.html]

Runs whose configurations differ in nothing but seed, name and bookkeeping are seeds of one setting.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from cluster import cli, runs
from cluster.cli import UserError
from cluster.display import duration
from cluster.measure import intervals
from cluster.review import page as run_page
from cluster.review.charts import Chart, Charts, Curve
from cluster.review.document import Page, PageTable, Section, write
from cluster.review.outcome import Outcome, loss_at, tokens_to
from cluster.review.run_reader import FINISHED, Run
from cluster.review.words import amount, commit, plain

BOOKKEEPING = ("run.", "record.", "session.", "checkpoint.", "data.directory", "launcher")  # make no setting
PAGE = "compare.html"


@dataclass(frozen=True)
class Setting:
    """Runs of one configuration, which differ in their seeds. `place`: its colour on the charts."""

    name: str
    outcomes: tuple[Outcome, ...]
    place: int

    def losses(self, tokens: float) -> dict[Any, float]:
        """Seed -> finite validation loss of its run at these tokens; without a seed, a key of its own."""
        found: dict[Any, float] = {}
        for place, outcome in enumerate(self.outcomes):
            loss = loss_at(outcome.curve, tokens)
            if loss is not None and math.isfinite(loss):
                seed = outcome.run.config.get("run.seed")
                found[f"run {place}" if seed is None or seed in found else seed] = loss
        return found


@dataclass(frozen=True)
class Difference:
    """Mean validation loss of a setting minus that of another, in nats per token, with its 95% interval.

    Bounds are None if a setting has a single run, which shows no spread between seeds.

    Attributes:
        apart: every loss of the first setting is above every loss of the other.
        paired: the interval is of the differences between runs of equal seed, which share their initial
            weights and the order of their data.
    """

    mean: float
    low: float | None
    high: float | None
    apart: bool
    paired: bool

    @classmethod
    def of(cls, ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> "Difference":
        """From the losses of each, by seed. The interval is that of the ratio of their perplexities."""
        paired = len(ours) > 1 and ours.keys() == theirs.keys()
        if paired:
            ratio = intervals.of_rate([math.exp(ours[seed] - theirs[seed]) for seed in ours])
        else:
            ratio = intervals.of_ratio(
                *([math.exp(loss) for loss in side.values()] for side in (ours, theirs))
            )
        low, high = (None if bound is None else math.log(bound) for bound in (ratio.low, ratio.high))
        apart = min(ours.values()) > max(theirs.values())
        return cls(math.log(ratio.centre), low, high, apart, paired)

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.low > 0

    @property
    def interval(self) -> str:
        """ "-0.080 to -0.020"; "unknown" from single runs."""
        return "unknown" if self.low is None or self.high is None else f"{self.low:+.3f} to {self.high:+.3f}"


class Comparison:
    """Several runs, grouped by setting and compared at the tokens that all of them have reached."""

    def __init__(self, compared: Sequence[Run]) -> None:
        self.runs = list(compared)
        self.names = _names(self.runs)
        self.outcomes = {id(run): Outcome(run) for run in self.runs}
        self.settings = list(self._settings())
        ends = [self.outcomes[id(run)].curve for run in self.runs]
        self.tokens = min((curve[-1][0] for curve in ends if curve), default=None)
        ranked = [setting for setting in self.settings if self.losses(setting)]
        self.ranked = sorted(ranked, key=lambda setting: statistics.mean(self.losses(setting)))

    def losses(self, setting: Setting) -> list[float]:
        """At the tokens of the comparison."""
        return [] if self.tokens is None else list(setting.losses(self.tokens).values())

    @property
    def target(self) -> float | None:
        """The mean loss of the worst setting, which the others reach with fewer tokens."""
        return statistics.mean(self.losses(self.ranked[-1])) if self.ranked else None

    def difference(self, setting: Setting) -> Difference | None:
        """To the best setting; None for itself and without a loss."""
        if self.tokens is None or not self.losses(setting) or setting is self.ranked[0]:
            return None
        return Difference.of(*(each.losses(self.tokens) for each in (setting, self.ranked[0])))

    def sentence(self) -> str:
        """Which is better, by how much, and whether the seeds are enough to decide it."""
        if len(self.ranked) < 2 or self.tokens is None:
            if self.ranked and len(self.settings) == 1:
                losses = self.losses(self.ranked[0])
                spread = f"{amount(min(losses))} to {amount(max(losses))}" if losses else "unknown"
                return f"All {len(self.runs)} runs have one configuration: validation losses {spread}."
            return "There is nothing to compare: fewer than two of the runs have a finite validation loss."
        best, second = self.ranked[:2]
        difference = self.difference(second)
        assert difference is not None
        if difference.mean == 0:
            return f"{best.name} and {second.name} have the same validation loss."
        verdict = "is better than" if difference.decided else "has a lower validation loss than"
        said = (
            f"{best.name} {verdict} {second.name}, by {amount(difference.mean, digits=3)} nats per token "
            f"({amount(100 * -math.expm1(-difference.mean), digits=2)}% lower perplexity) at "
            f"{amount(self.tokens)} tokens"
        )
        goal = statistics.mean(self.losses(second))
        needed = [tokens_to(outcome.curve, goal) for outcome in best.outcomes]
        reached = [tokens for tokens in needed if tokens is not None]
        if len(reached) == len(needed) and min(reached) > 0:  # at 0 the untrained model is already that good
            share = statistics.mean(reached) / self.tokens
            said += f", and reaches {second.name}'s loss with {share:.0%} of the tokens"
        return f"{said}. {self._certainty(best, second, difference)}"

    def _certainty(self, best: Setting, second: Setting, difference: Difference) -> str:
        few = [setting.name for setting in (best, second) if len(self.losses(setting)) < 2]
        if difference.low is None:
            one = f"{few[0]} ran with one seed" if len(few) == 1 else "each ran with one seed"
            return f"Not decided: {one}, so the spread between seeds is unknown."
        how = f"95% interval of the difference{' between equal seeds' if difference.paired else ''}"
        if difference.decided:
            chosen = f", not corrected for being the best of {len(self.ranked)}" * (len(self.ranked) > 2)
            return f"The seeds confirm this: the {how} is {difference.interval} nats{chosen}."
        apart = f", although every run of {best.name} is below every run of {second.name}" * difference.apart
        return f"Not decided: the {how}, {difference.interval} nats, includes zero{apart}; run more seeds."

    def _settings(self) -> Iterator[Setting]:
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            kept = {key: value for key, value in run.config.items() if not key.startswith(BOOKKEEPING)}
            key = repr(sorted(kept.items())) if kept else str(run.directory)
            groups.setdefault(f"{key} {run.provenance.get('data_fingerprint')}", []).append(run)
        taken: set[str] = set()
        for place, members in enumerate(groups.values()):
            names = [self.names[id(run)] for run in members]
            stem = _common(names) if len(names) > 1 else names[0]
            name = stem if stem and stem not in taken else f"{names[0]} and {len(names) - 1} more"
            taken.add(name)
            yield Setting(name, tuple(self.outcomes[id(run)] for run in members), place)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser("python -m cluster.review.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or names under outputs/")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help=f"default: {runs.OUTPUTS / PAGE}")
    options = parser.parse_args(arguments)

    def body() -> None:
        names = [name for text in options.runs for name in text.split(",") if name]
        compared = [run_page.find(name) for name in dict.fromkeys(names)]
        if len(compared) < 2:
            raise UserError("RUNS: name two runs or more, such as RUNS=a,b")
        if serving := [run.name for run in compared if run.serving]:
            raise UserError(f"RUNS: {', '.join(serving)}: a serving run has no loss; name training runs")
        comparison = Comparison(compared)
        path = write(make_page(comparison), options.output or runs.OUTPUTS / PAGE)
        print(f"{comparison.sentence()}\npage: {path.absolute()}")

    return cli.run(body)


def make_page(comparison: Comparison) -> Page:
    """The page of a comparison."""
    return Page(
        title=" · ".join(setting.name for setting in comparison.settings),
        sentence=comparison.sentence(),
        notices=list(_notices(comparison)),
        sections=[section for section in _sections(comparison) if section],
    )


def _notices(comparison: Comparison) -> Iterator[str]:
    """What makes a comparison unfair, or not what it seems."""
    for run in comparison.runs:
        name = comparison.names[id(run)]
        if run.state.name != FINISHED:
            yield f"{name} has not finished: {run.state.name}. {run.state.reason}"
        yield from (f"{name}: {problem}" for problem in run.problems)
    for key, what in (
        ("data_fingerprint", "The runs saw different data, so their losses are not comparable."),
        ("commit", "The runs are of different commits."),
        ("host", "The runs ran on different machines, so their times are not comparable."),
    ):
        if len({repr(run.provenance.get(key)) for run in comparison.runs}) > 1:
            yield what


def _sections(comparison: Comparison) -> Iterator[Section]:
    yield Section("Outcomes", tables=[*_settings_table(comparison), _runs_table(comparison)])
    yield Section("Over tokens", charts=list(_charts(comparison, over="tokens")))
    yield Section("Over time", charts=list(_charts(comparison, over="seconds")))
    yield _config_section(comparison)
    head = ("Run", "Commit", "Data", "Hardware", "Started (UTC)")
    rows = []
    for run in comparison.runs:
        about, host = run.provenance, run.provenance.get("host")
        host = host if isinstance(host, dict) else {}
        device = ", ".join(host.get("gpus") or []) or host.get("cpu", "-")
        data, started = str(about.get("data_fingerprint") or "-")[:12], str(about.get("time") or "-")[:19]
        rows.append((comparison.names[id(run)], commit(about), data, device, started.replace("T", " ")))
    yield Section("Where they come from", tables=[PageTable(head, rows)])


def _settings_table(comparison: Comparison) -> Iterator[PageTable]:
    """A row for each setting, the best first; only where a setting has several runs."""
    if all(len(setting.outcomes) == 1 for setting in comparison.settings):
        return
    rows = []
    for setting in comparison.ranked:
        losses, difference = comparison.losses(setting), comparison.difference(setting)
        spread = f"{min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else "-"
        mean = f"{statistics.mean(losses):.4f}"
        to_best = (f"{difference.mean:+.4f}", difference.interval) if difference else ("-", "-")
        rows.append((setting.name, str(len(losses)), mean, spread, *to_best))
    head = ("Setting", "Seeds", "Mean loss", "Lowest to highest", "To the best", "95% interval")
    caption = f"Validation loss in nats per token at {amount(comparison.tokens)} tokens."
    classes = ["best" if setting is comparison.ranked[0] else "" for setting in comparison.ranked]
    yield PageTable(head, rows, figures=(1, 2, 3, 4, 5), caption=caption, classes=classes)


def _runs_table(comparison: Comparison) -> PageTable:
    """A row for each run, the lowest loss first; last those without one."""
    target, at = comparison.target, comparison.tokens
    together = all(outcome.tokens == at for outcome in comparison.outcomes.values())
    best = min((loss for setting in comparison.settings for loss in comparison.losses(setting)), default=None)
    losses = [
        None if at is None else loss_at(comparison.outcomes[id(run)].curve, at) for run in comparison.runs
    ]
    ranked = sorted(zip(comparison.runs, losses, strict=True), key=lambda pair: _rank(pair[1]))
    rows, classes = [], []
    for run, loss in ranked:
        outcome = comparison.outcomes[id(run)]
        reached = None if target is None else tokens_to(outcome.curve, target)
        share = f" ({reached / at:.0%})" if reached is not None and at else ""
        rows.append(
            (
                comparison.names[id(run)],
                run.state.name,
                plain(run.config.get("run.seed")),
                "-" if loss is None else f"{loss:.4f}",
                f"{loss - best:+.4f}" if loss is not None and best is not None and loss > best else "-",
                *(() if together else (amount(outcome.loss), amount(outcome.tokens))),
                "never" if reached is None else f"{amount(round(reached))}{share}",
                "-" if outcome.seconds is None else duration(outcome.seconds),
                amount(outcome.tokens_per_second, digits=3),
            )
        )
        classes.append("best" if loss is not None and loss == best else "")
    head = ["Run", "State", "Seed", f"Loss at {amount(at)} tokens", "To the best"]
    head += [] if together else ["Last loss", "Tokens"]
    head += [f"Tokens to {amount(target, digits=4)}", "Time", "Tokens/s"]
    return PageTable(head, rows, figures=range(2, len(head)), classes=classes)


def _rank(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss


def _charts(comparison: Comparison, *, over: str) -> Iterator[Chart]:
    scale, label = 1.0, over
    if over == "seconds":
        ends = (outcome.seconds or 0.0 for outcome in comparison.outcomes.values())
        longest = max(ends, default=0.0)
        scale, label = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 300 else (1, over)
    charts = Charts(label)
    keys = [("Validation loss", "validation_loss", "nats per token", "points")]
    keys += [("Training loss", "loss", "nats per token", "line")]
    if over == "tokens":
        keys += [("Gradient norm", "gradient_norm", "before clipping", "line")]
        keys += [("Throughput", "tokens_per_second", "tokens per second", "line")]
    for title, key, unit, style in keys:
        curves = []
        for setting in comparison.settings:
            for outcome in setting.outcomes:
                x, y = outcome.run.curve(key, over=over)
                if len(x):
                    x_scaled = [value / scale for value in x] if scale != 1 else x
                    curves.append(Curve(setting.name, x_scaled, y, style=style, color=setting.place))
        if curves:
            yield charts.line(title, curves, unit=unit, height=320)


def _config_section(comparison: Comparison) -> Section:
    """The keys that differ, a column for each setting."""
    section = Section("Differences of the configurations")
    firsts = [setting.outcomes[0].run.config for setting in comparison.settings]
    keys = dict.fromkeys(key for config in firsts for key in config if not key.startswith(BOOKKEEPING))
    rows = []
    for key in keys:
        values = [plain(config[key]) if key in config else "-" for config in firsts]
        if len(set(values)) > 1:
            rows.append((key, *values))
    if rows:
        section.tables.append(PageTable(("Key", *(setting.name for setting in comparison.settings)), rows))
    else:
        section.paragraphs.append("None, apart from seeds, names and bookkeeping.")
    return section


def _common(names: Sequence[str]) -> str:
    """What names of runs that differ in their seeds begin with: "muon" of muon-seed1 and muon-seed2."""
    alike = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))
    return re.sub(r"[-_. ]+(?:seed|s)?[-_. ]*$", "", names[0][:alike])


def _names(compared: Sequence[Run]) -> dict[int, str]:
    """A name for each run; with the folder above where two would be alike."""
    short = [run.name for run in compared]
    long = [f"{run.directory.parent.name}/{run.name}" for run in compared]
    unique = long if len(set(short)) < len(short) else short
    return {id(run): name for run, name in zip(compared, unique, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
