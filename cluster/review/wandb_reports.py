"""A W&B report of a study or a parity: the text of its own report.md, with live panels of its runs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr

from cluster import files
from cluster.cli import UserError
from cluster.review import views

MADE_BY = "Made by `make dashboard` from {name}. The next `make dashboard` replaces changes made here."
PICTURE = re.compile(
    r"^!\[[^]]*\]\([^)]*\)\n*", re.MULTILINE
)  # a file beside report.md, which W&B does not have
MOST_TITLE = 128  # letters, by W&B
GRID_WIDTH, PANEL_HEIGHT = 24, 8  # in the units of a report's grid
CHARTS = (wr.LinePlot, wr.ScatterPlot, wr.ParallelCoordinatesPlot)


@dataclass(frozen=True)
class Source:
    """What a folder says: its question, its report.md by sections, and its runs in W&B.

    Attributes:
        sections: title and Markdown of each.
        runs: W&B's filter expression for them.
        panels: what W&B draws of these runs.
    """

    name: str
    title: str
    question: str
    intro: str
    sections: list[tuple[str, str]]
    runs: str
    panels: list[Any]


def read(folder: Path) -> Source:
    """The study or parity in a folder. Raises `UserError` if there is neither, or no report.md yet."""
    results, summary, report = (folder / name for name in ("results.json", "summary.json", "report.md"))
    panels: list[Any]
    if report.is_file() and results.is_file():
        study = files.read_json(results)["study"]
        name = study["name"] + "-smoke" * study["smoke"]
        question, runs = _study_question(study), f"Group == {name!r}"
        panels = views.study_panels(sorted(path.stem for path in (folder / "figures").glob("*.png")))
    elif report.is_file() and summary.is_file() and "claims" in files.read_json(summary):
        name = folder.absolute().name
        question = "What share of its own ceiling does each machine reach, and how do these shares compare?"
        runs, panels = f"Name == {name!r}", views.parity_panels()
    else:
        raise UserError(
            f"{folder}: no study (report.md, results.json) and no parity (report.md, summary.json) is here; "
            "name a folder that `make study` or `make parity` has written"
        )
    head, *rest = re.split(r"^## (.+)\n", PICTURE.sub("", report.read_text()), flags=re.MULTILINE)
    title, _, intro = head.partition("\n")
    pairs = zip(rest[::2], rest[1::2], strict=True)
    sections = [(heading, body.strip()) for heading, body in pairs if body.strip()]  # else it was a picture
    return Source(
        name,
        title.removeprefix("# ")[:MOST_TITLE],
        question,
        intro.strip(),
        sections,
        runs=runs,
        panels=panels,
    )


def build(folder: Path, *, project: str, entity: str | None = None) -> wr.Report:
    """The report of the study or parity in a folder.

    Args:
        entity: None offline. Otherwise the runs are looked up in W&B when the report is serialised.
    """
    source = read(folder)
    runs = wr.Runset(name=source.name, filters=source.runs)
    if entity:
        runs.entity, runs.project = entity, project
    runs._id = views.id_of("report", source.name)
    _lay_out(source)
    return wr.Report(
        project=project,
        entity=entity or "",
        title=source.title,
        description=MADE_BY.format(name=source.name),
        width="fluid",
        blocks=[
            wr.CalloutBlock(text=source.question),
            *([wr.MarkdownBlock(text=source.intro)] if source.intro else []),
            *_sections(source.sections[:1]),
            wr.H2(text="The runs"),
            wr.PanelGrid(runsets=[runs], panels=source.panels),
            *_sections(source.sections[1:]),
        ],
    )


def _lay_out(source: Source) -> None:
    """Charts beside each other, tables and pictures over the whole width; the ids stay the same."""
    x = y = 0
    for number, panel in enumerate(source.panels):
        width = GRID_WIDTH // 2 if isinstance(panel, CHARTS) else GRID_WIDTH
        if x + width > GRID_WIDTH:
            x, y = 0, y + PANEL_HEIGHT
        panel.layout = wr.Layout(x=x, y=y, w=width, h=PANEL_HEIGHT)
        panel._id = views.id_of("report", source.name, str(number))
        x += width


def _sections(sections: list[tuple[str, str]]) -> list[Any]:
    return [
        block
        for title, markdown in sections
        for block in (wr.H2(text=title), wr.MarkdownBlock(text=markdown))
    ]


def _study_question(study: dict[str, Any]) -> str:
    titles = {name: rule["title"] or name for name, rule in study["rules"].items()}
    asked = (
        f"At equal tuning effort, which of {', '.join(titles.values())} reaches the lowest validation loss"
    )
    if reference := study["claims"]["reference"]:
        return f"{asked}, and how many tokens does each need to reach the loss of {titles[reference]}?"
    return f"{asked}?"
