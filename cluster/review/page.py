"""`make report RUN=...`: one HTML page of a run, which needs no network and no W&B.

    python -m cluster.review.page RUN [--output FILE.html]

RUN is a run directory, or the name of a run under outputs/. The page is written to RUN/report.html.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cluster import cli, runs
from cluster.cli import UserError
from cluster.display import duration
from cluster.record import lineage
from cluster.record.events import INFO
from cluster.review import requests_section, training_charts
from cluster.review.charts import Mark
from cluster.review.document import Page, PageTable, Section, write
from cluster.review.outcome import Outcome, sentence
from cluster.review.run_reader import STATE_OF_END, Run
from cluster.review.words import amount, commit, plain

LONG_BYTES = 50_000_000  # of metrics.jsonl; reading them takes seconds
MOST_MARKS = 30  # on the curves; more would hide them
PAGE = "report.html"
Made = TypeVar("Made")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser("python -m cluster.review.page", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="a run directory, or a run's name under outputs/")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="where to write the page")
    options = parser.parse_args(arguments)

    def body() -> None:
        run = find(options.run)
        if run.metrics.exists() and (size := run.metrics.stat().st_size) > LONG_BYTES:
            print(f"reading {size / 1e6:,.0f} MB of {run.metrics}", file=sys.stderr, flush=True)
        page = make_page(run)
        path = write(page, options.output or run.directory / PAGE)
        print(f"{page.sentence}\npage: {path.absolute()}")

    return cli.run(body)


def find(name: str) -> Run:
    """The run of this directory, or of this name under outputs/. Raises `UserError` if there is none."""
    return Run(runs.named(name, fits=Path.is_dir, lacks="no such run directory"))


def make_page(run: Run) -> Page:
    """The page of a run of any kind and state. A part whose files hold nonsense is left out and named."""
    problems: list[str] = []

    def part(name: str, make: Callable[[], Made], instead: Any) -> Made:
        try:
            return make()
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            problems.append(f"{name}: not shown: a file holds an unexpected value ({error!r})")
            return instead

    marked = part("marks of events", lambda: numbered(run), {})
    sections = [
        *part("requests", lambda: requests_section.sections(run), []),
        *part("curves", lambda: training_charts.sections(run, marks=list(marked.values())), []),
    ]
    for make in (samples_section, lineage_section, config_section, system_section):
        name = make.__name__.removesuffix("_section")
        sections.append(part(name, partial(make, run), Section(name.capitalize())))
    at = next((place + 1 for place, section in enumerate(sections) if section.title == "Curves"), 0)
    events = part("events", lambda: events_section(run, marked), Section("Events"))
    sections.insert(at, events)  # what happened stands where its marks are
    state = run.state.name
    return Page(
        title=run.name,
        state=state,
        sentence=part("outcome", lambda: _sentence(run), state.capitalize()),
        facts=part("figures", lambda: facts(run), []),
        sections=[section for section in sections if section],
        notices=[*run.problems, *problems, *part("first alarm", lambda: _first_alarm(run), [])],
    )


def _first_alarm(run: Run) -> list[str]:
    """The first warning or error, which often explains the others. The end has a sentence of its own."""
    passed = {"info", *STATE_OF_END}
    alarms = [event for event in run.events if not passed & {event.get("level", "info"), event.get("kind")}]
    if not alarms:
        return []
    step = alarms[0].get("step")
    at = f"Step {amount(step)}: " if step is not None else ""
    more = f" ({len(alarms) - 1:,} more in Events)" if len(alarms) > 1 else ""
    return [f"{at}{alarms[0].get('text')}{more}"]


def _sentence(run: Run) -> str:
    return sentence(run, measured=requests_section.sentence(run) if run.serving else "")


def facts(run: Run) -> list[tuple[str, str]]:
    """The figures at the top of the page; what is unknown is left out."""
    summary, about, config = run.summary or {}, run.provenance, run.config
    host = about.get("host") or {}
    outcome = Outcome(run)
    found: list[tuple[str, Any]] = []
    if outcome.loss is not None:
        also = f" (best {amount(outcome.best)})" if outcome.best not in (None, outcome.loss) else ""
        found.append(("Validation loss, nats per token", f"{amount(outcome.loss)}{also}"))
    if run.latest.get("loss") is not None:
        found.append(("Training loss", amount(run.latest["loss"])))
    found.append(("Tokens", _known(run.latest.get("tokens"))))
    found.append(("Tokens per second", _known(outcome.tokens_per_second, digits=3)))
    if "mfu" in run.latest:
        mfu = summary.get("mfu", run.latest.get("mfu"))
        found.append(("MFU", f"{mfu:.1%}" if mfu is not None else f"unknown: {run.latest.get('mfu_reason')}"))
    if outcome.seconds and not run.serving:
        found.append(("Time", _time_parts(run, duration(outcome.seconds))))
    found.append(("Parameters", _known(summary.get("num_parameters"))))
    found.append(("Model", _served(summary.get("model"))))
    found.append(("Optimizer", config.get("optim.matrix.rule")))
    number_of = config.get("workers.count")
    workers = f"{number_of} worker{'s' * (number_of != 1)} on " if isinstance(number_of, int) else ""
    gpus = host.get("gpus") or []
    device = gpus[0] if gpus and config.get("workers.gpu", True) else host.get("cpu")
    found.append(("Hardware", f"{workers}{device}" if device else None))
    found.append(("Commit", _commits(about)))
    found.append(
        ("Data", f"{config.get('data.source', '')} {str(about.get('data_fingerprint') or '')[:12]}".strip())
    )
    found.append(("Last start", str(about.get("time") or "").replace("T", " ").replace("+00:00", " UTC")))
    found.append(("Weights & Biases", summary.get("wandb_status")))
    return [(name, str(value)) for name, value in found if value not in (None, "", "-")]


def _commits(about: dict[str, Any]) -> str | None:
    """Of the last start; those of the earlier starts that had others."""
    if not about.get("commit"):
        return None
    last = commit(about)
    others = dict.fromkeys(map(commit, about.get("earlier_starts", [])))
    earlier = [each for each in others if each != last]
    return f"{last}; earlier starts: {', '.join(earlier)}" if earlier else last


def _served(model: Any) -> str | None:
    """Name, engine, device and dtype of the model of a serving run."""
    if not isinstance(model, dict) or not model.get("id"):
        return None
    about = model.get("engine_info") or {}
    return ", ".join(
        str(each) for each in (model["id"], *map(about.get, ("engine", "device", "dtype"))) if each
    )


def _known(value: Any, *, digits: int = 5) -> str | None:
    return None if value is None else amount(value, digits=digits)


def _time_parts(run: Run, total: str) -> str:
    """The time of all starts, and its parts; those of a resumed run are the last start's only."""
    summary = run.summary or {}
    names = ("start", "training", "evaluation", "noise", "checkpoint", "sample")
    parts = {name: summary.get(f"{name}_seconds") or 0.0 for name in names}
    said = ", ".join(f"{name} {duration(value)}" for name, value in parts.items() if value >= 0.5)
    of = "the last start: " if run.provenance.get("earlier_starts") else ""
    return f"{total} ({of}{said})" if said else total


def numbered(run: Run) -> dict[int, Mark]:
    """Place in `run.events` -> its mark on the curves: warnings, errors, and starts after the first."""
    marks: dict[int, Mark] = {}
    for place, event in enumerate(run.events):
        step, level = event["step"], event["level"]
        if not isinstance(step, int) or (level == INFO and event["kind"] not in ("resumed", "restarted")):
            continue
        if len(marks) < MOST_MARKS:
            marks[place] = Mark(step, str(len(marks) + 1), event["text"], level)
    return marks


def events_section(run: Run, marked: dict[int, Mark]) -> Section:
    """What happened, with the loss and the gradient norm there; routine events are folded."""
    section = Section("Events")
    head = ("No.", "Step", "What", "Loss", "Gradient norm", "Level", "Time (UTC)")
    rows = [(place, event) for place, event in enumerate(run.events)]
    alarms = [pair for pair in rows if pair[0] in marked or pair[1]["level"] != INFO]
    others = [pair for pair in rows if pair not in alarms]
    around = {key: _around(run, key) for key in ("loss", "gradient_norm")}

    def cells(place: int, event: dict[str, Any]) -> list[str]:
        step, when = event["step"], event["time"][:19].replace("T", " ")
        moved = [around[key](step) for key in ("loss", "gradient_norm")]
        numbered = marked[place].number if place in marked else ""
        at = amount(step) if step is not None else "-"
        return [numbered, at, event["text"], *moved, event["level"], when]

    if alarms:
        section.paragraphs.append(
            "The dashed lines on the curves carry these numbers. Loss and gradient norm: the median of the "
            "ten rows before the event, and the highest value from there to five rows later."
        )
        classes = [event["level"] for _, event in alarms]
        rows_shown = [cells(place, event) for place, event in alarms]
        section.tables.append(PageTable(head, rows_shown, figures=(1, 3, 4), classes=classes))
    else:
        section.paragraphs.append("No warning and no error was recorded.")
    if others:
        folded = f"{len(others):,} routine event{'s' * (len(others) > 1)}"
        shown = [[row[1], row[2], row[6]] for row in (cells(*pair) for pair in others)]
        section.tables.append(PageTable((head[1], head[2], head[6]), shown, figures=(0,), folded=folded))
    return section


def _around(run: Run, key: str) -> Any:
    """A function of a step: "before -> after" of this key, in words; "-" where it is unknown."""
    import numpy as np

    steps, values = (np.asarray(part) for part in run.curve(key))

    def said(step: Any) -> str:
        if not isinstance(step, int) or not len(steps):
            return "-"
        at = int(np.searchsorted(steps, step))
        before, after = values[max(0, at - 10) : at], values[at : at + 6]
        before, after = before[np.isfinite(before)], after
        if not len(after):
            return "-"
        high = after.max() if np.isfinite(after).all() else float(after[~np.isfinite(after)][0])
        return (
            f"{amount(float(np.median(before)), digits=4)} → {amount(float(high), digits=4)}"
            if len(before)
            else amount(float(high), digits=4)
        )

    return said


def samples_section(run: Run) -> Section:
    """What the model wrote."""
    samples = (run.summary or {}).get("samples")
    texts = samples.items() if isinstance(samples, dict) else ()
    return Section("Samples", texts=[(f"“{prompt}”", str(text)) for prompt, text in texts])


def lineage_section(run: Run) -> Section:
    """Which commit, data and checkpoint it comes from, and which checkpoints it holds."""
    section = Section("Lineage")
    if run.provenance:
        try:
            section.texts.append(("", lineage.describe(lineage.find(str(run.directory)))))
        except UserError as error:
            section.paragraphs.append(str(error))
    return section


def config_section(run: Run) -> Section:
    """What differs from the defaults; the whole configuration, folded."""
    section = Section("Configuration")
    if run.changes is None and run.config:
        section.paragraphs.append(
            "This run did not record which keys differ from the defaults of its version."
        )
    elif run.changes:
        rows = [(key, value, default) for key, (default, value) in run.changes.items()]
        head = ("Key", "This run", "Default")
        section.tables.append(PageTable(head, [tuple(map(plain, row)) for row in rows]))
    elif run.config:
        section.paragraphs.append("All keys have their defaults.")
    if run.config:
        every = [(key, plain(value)) for key, value in run.config.items()]
        section.tables.append(PageTable(("Key", "Value"), every, folded=f"All {len(every)} keys"))
    return section


def _command(provenance: dict[str, Any]) -> str:
    return " ".join(map(str, provenance.get("command") or []))


def system_section(run: Run) -> Section:
    """Machine, versions and command."""
    about = run.provenance
    section = Section("System")
    host = {key: value for key, value in (about.get("host") or {}).items() if value not in (None, [], "")}
    rows = [(name.replace("_", " "), plain(value)) for name, value in host.items()]
    rows += [("python", about["python"])] if about.get("python") else []
    rows += [(name, value) for name, value in (about.get("packages") or {}).items()]
    if rows:
        section.tables.append(PageTable(("", ""), rows))
    if command := _command(about):
        section.texts.append(("Command", command))
    if earlier := about.get("earlier_starts"):
        starts = [(str(start.get("time")), commit(start), _command(start)) for start in earlier]
        section.tables.append(PageTable(("Started", "Commit", "Command"), starts, caption="Earlier starts"))
    return section


if __name__ == "__main__":
    sys.exit(main())
