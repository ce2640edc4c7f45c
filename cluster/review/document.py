"""The page itself: a heading, facts, sections of charts, tables and texts, in one HTML file.

`page.html` beside this file lays it out. Every text that a run wrote is escaped there, and the page may load
nothing: its Content-Security-Policy forbids it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import files
from cluster.review.charts import Chart


@dataclass(frozen=True)
class PageTable:
    """A table. Cells are text already.

    Attributes:
        figures: places of the columns that hold numbers, which are aligned right.
        classes: of each row: "", "best", "warning" or "error".
        folded: what to click on to see the table; "" shows it at once.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figures: Sequence[int] = ()
    caption: str = ""
    classes: Sequence[str] = ()
    folded: str = ""


@dataclass
class Section:
    """A part of the page. `texts`: (heading, preformatted text)."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.paragraphs or self.charts or self.tables or self.texts)


@dataclass
class Page:
    """What a page says, from top to bottom. `state`: of `run_reader`, or ""."""

    title: str
    sentence: str
    state: str = ""
    notices: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


HINT = (
    "Drag across a chart to zoom into all, double-click to zoom out, click a legend entry to hide its curve."
)


def write(page: Page, path: Path) -> Path:
    """Write the page to `path`, which is replaced. Returns `path`.

    Raises:
        OSError: the file cannot be written.
    """
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    figures = [chart.figure for section in page.sections for chart in section.charts]
    script, divs = components(figures) if figures else ("", ())
    library = Resources(mode="inline", components=["bokeh"]).render_js() if figures else ""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["id"] = id
    html = environment.get_template("page.html").render(
        page=page,
        places=dict(zip(map(id, figures), divs, strict=True)),
        scripts=library + script,
        made=f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from the run's files. {HINT if figures else ''}",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, html)
    return path
