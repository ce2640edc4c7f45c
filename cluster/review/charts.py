"""Charts that one can hover and zoom, by Bokeh, for a page that loads nothing from a network.

    charts = Charts("step")
    curves = [Curve("training", xs, ys)]
    chart = charts.line("Loss", curves, unit="nats per token", marks=[Mark(120, "1", "the loss rose")])

All charts of one `Charts` zoom together along x. `cluster.review.document` puts them on a page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.display import COLORS
from cluster.review.words import amount, shortened

MOST_POINTS = 2000  # of a curve; a chart is at most about 1,000 pixels wide
PALETTE = (*COLORS[:4], "#7b4fa0", "#2a9d8f", "#8d6e63", "#d1495b", "#3d405b", "#6c757d")
LEVEL_COLORS = {"info": "#6c757d", "warning": "#b7791f", "error": "#c0392b"}
MOST_DOTS = 200  # of a curve that is joined too
MOST_LETTERS = 32  # of a label; the legend has to fit on a phone
PHONE_PIXELS = 300  # of a chart's width on a phone
LEGEND_ROW_PIXELS = 32  # a chart with more than two rows is as much higher
WIDE_RATIO = 30.0  # of the largest to the median positive value, above which the y axis is logarithmic


class Curve:
    """A named series. Values that are not finite leave a gap.

    Args:
        label: in the legend and the tooltip.
        x, y: of equal length, y in the unit of its chart.
        style: "line"; "points", which joins and marks every value; "dots", which does not join them; or
            "faint", a line in the background.
        color: index in PALETTE; None: that of the curve's place in its chart.
        factor: y is multiplied by it.
    """

    def __init__(
        self,
        label: str,
        x: Sequence[float],
        y: Sequence[float],
        *,
        style: str = "line",
        color: int | None = None,
        factor: float = 1.0,
    ) -> None:
        self.label, self.style, self.color = shortened(label, most=MOST_LETTERS), style, color
        self.x, self.y = np.asarray(x, dtype=float), factor * np.asarray(y, dtype=float)

    def notes(self, x_label: str) -> list[str]:
        """What a reader has to know: values that are not finite, and values that are not drawn."""
        said = []
        places = np.flatnonzero(~np.isfinite(self.y))
        if len(places):
            parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
            spans = [(amount(self.x[part[0]]), amount(self.x[part[-1]])) for part in parts[:3]]
            where = ", ".join(low if low == high else f"{low} to {high}" for low, high in spans)
            more = " and later" if len(parts) > 3 else ""
            values = "value is" if len(places) == 1 else "values are"
            said.append(f"{self.label}: {len(places):,} {values} not finite ({x_label} {where}{more})")
        if len(self.x) > MOST_POINTS:
            stretch = math.ceil(2 * len(self.x) / MOST_POINTS)
            said.append(
                f"{self.label}: {len(self.x):,} values, drawn as the lowest, the median and the highest "
                f"of each {stretch:,}"
            )
        return said


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`: its number in the page's table of events, and what happened there."""

    x: float
    number: str
    text: str
    level: str = "warning"


@dataclass(frozen=True)
class Chart:
    """A chart on a page: Bokeh's figure, and notes that stand below it."""

    title: str
    figure: Any
    notes: tuple[str, ...] = ()


def medians(x: Any, y: Any, *, most: int = MOST_POINTS) -> tuple[Any, Any]:
    """The median of the finite values of each stretch of `thin`, at the middle of its x."""
    parts = [part[np.isfinite(y[part])] for part in np.array_split(np.arange(len(x)), most // 2)]
    found = [(x[part[len(part) // 2]], np.median(y[part])) for part in parts if len(part)]
    x_found, y_found = np.array(found, dtype=float).reshape(-1, 2).T
    return x_found, y_found


def thin(x: Any, y: Any, *, most: int = MOST_POINTS) -> tuple[Any, Any]:
    """At most `1.5 * most` points: the lowest and the highest of each of `most / 2` equal stretches.

    So no spike is lost. A stretch with values that are not finite keeps the first of them, as a gap.
    """
    if len(x) <= most:
        return x, y
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(x)), most // 2):
        values = y[part]
        finite, gaps = part[np.isfinite(values)], part[~np.isfinite(values)]
        if len(finite):
            kept |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
        kept |= {int(place) for place in gaps[:1]}
    places = sorted(kept)
    return x[places], y[places]


class Charts:
    """Makes charts over one x axis, which they share. `x_label`: "step", "tokens" or "hours"."""

    def __init__(self, x_label: str) -> None:
        self.x_label = x_label
        self._x_range: Any = None
        self._pointer: Any = None  # one vertical line over all charts

    def line(
        self,
        title: str,
        curves: Sequence[Curve],
        *,
        unit: str,
        marks: Sequence[Mark] = (),
        notes: Sequence[str] = (),
        height: int = 260,
    ) -> Chart:
        """A chart of these curves. `unit`: the label of the y axis."""
        drawn = [thin(curve.x, curve.y) for curve in curves]
        logarithmic = _is_wide(np.concatenate([y for _, y in drawn]))
        figure = self._figure(", ".join(filter(None, (unit, "log scale" * logarithmic))), logarithmic, height)
        for place, (curve, (x, y)) in enumerate(zip(curves, drawn, strict=True)):
            color = PALETTE[(place if curve.color is None else curve.color) % len(PALETTE)]
            self._draw(figure, curve, x, y, color)
        _mark(figure, marks)
        _place_legend(figure, [curve.label for curve in curves])
        said = [note for curve in curves for note in curve.notes(self.x_label)]
        return Chart(title, figure, tuple(dict.fromkeys([*notes, *said])))

    def _figure(self, unit: str, logarithmic: bool, height: int) -> Any:
        from bokeh import models
        from bokeh.models.annotations import Span
        from bokeh.plotting import figure as new

        zoom = models.BoxZoomTool(dimensions="width")
        shared = {} if self._x_range is None else {"x_range": self._x_range}
        made = new(
            height=height,
            sizing_mode="stretch_width",
            y_axis_type="log" if logarithmic else "linear",
            tools=[zoom, models.PanTool(), models.WheelZoomTool(), models.ResetTool(), models.SaveTool()],
            toolbar_location="above",
            toolbar_inner=True,
            x_axis_label=self.x_label,
            y_axis_label=unit,
            outline_line_color=None,
            min_border_right=12,
            **shared,
        )
        if self._pointer is None:
            self._pointer = Span(dimension="height", line_color="#9aa0a6", line_width=1)
        made.add_tools(models.CrosshairTool(overlay=self._pointer, dimensions="height", visible=False))
        made.toolbar.logo, made.toolbar.autohide = None, True
        made.toolbar.active_drag, made.toolbar.active_scroll = zoom, None
        self._x_range = made.x_range
        made.js_on_event("doubletap", models.CustomJS(args={"figure": made}, code="figure.reset.emit()"))
        for axis in (*made.xaxis, *made.yaxis):
            axis.axis_label_text_font_style = "normal"
            axis.axis_label_text_color = axis.major_label_text_color = "#333333"
            axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
            axis.axis_line_color = axis.major_tick_line_color = "#999999"
            axis.minor_tick_line_color = None
            axis.formatter = _formatter()
        made.xgrid.grid_line_color = made.ygrid.grid_line_color = "#e6e6e6"
        return made

    def _draw(self, figure: Any, curve: Curve, x: Any, y: Any, color: str) -> None:
        from bokeh.models import ColumnDataSource, HoverTool

        shown = {"x_shown": [amount(value) for value in x], "y_shown": [amount(value) for value in y]}
        finite = np.where(np.isfinite(y), y, np.nan)
        source = ColumnDataSource({"x": x, "y": finite, **shown})
        joined, thinned = curve.style != "dots", len(x) < len(curve.x)
        alpha, width = (0.45, 1.2) if curve.style == "faint" or thinned else (1.0, 1.8)
        look = {"source": source, "color": color, "legend_label": curve.label}
        drawn = [figure.line("x", "y", alpha=alpha, line_width=width, **look)] if joined else []
        if not joined or len(x) == 1 or (curve.style == "points" and len(x) <= MOST_DOTS):
            drawn.append(figure.scatter("x", "y", size=5, **look))
        if joined and thinned:
            figure.line(*medians(curve.x, curve.y), color=color, line_width=1.8, legend_label=curve.label)
        tooltips = [(self.x_label, "@x_shown"), (_plain(curve.label), "@y_shown")]
        mode: Any = "vline" if joined else "mouse"
        figure.add_tools(HoverTool(renderers=drawn[:1], tooltips=tooltips, mode=mode, visible=False))


def _place_legend(figure: Any, labels: Sequence[str]) -> None:
    """Above the chart, in as many columns as a phone has room for."""
    legend = figure.legend[0]
    if len(labels) == 1:
        legend.visible = False
        return
    figure.add_layout(legend, "above")
    columns = max(1, min(len(labels), int(PHONE_PIXELS / max(6.5 * len(label) + 40 for label in labels))))
    legend.orientation, legend.click_policy, legend.ncols = "horizontal", "hide", columns
    figure.height += LEGEND_ROW_PIXELS * max(0, math.ceil(len(labels) / columns) - 2)
    legend.location, legend.border_line_color = "left", None
    legend.padding, legend.margin, legend.spacing = 0, 4, 12
    legend.label_text_font_size = "12px"


def _mark(figure: Any, marks: Sequence[Mark]) -> None:
    from bokeh.models import ColumnDataSource, HoverTool
    from bokeh.models.annotations import Label

    if not marks:
        return
    source = ColumnDataSource(
        {
            "x": [mark.x for mark in marks],
            "text": [mark.text for mark in marks],
            "number": [mark.number for mark in marks],
            "color": [LEVEL_COLORS.get(mark.level, LEVEL_COLORS["info"]) for mark in marks],
        }
    )
    spans = figure.vspan("x", source=source, line_color="color", line_dash="dashed", line_width=1.2)
    figure.add_tools(HoverTool(renderers=[spans], tooltips=[("event @number", "@text")], visible=False))
    for mark in marks:
        figure.add_layout(
            Label(
                x=mark.x,
                y=2,
                y_units="screen",
                x_offset=3,
                text=mark.number,
                text_font_size="11px",
                text_color=LEVEL_COLORS.get(mark.level, LEVEL_COLORS["info"]),
            )
        )


def _is_wide(y: Any) -> bool:
    """Whether a linear axis would flatten the curves: all positive, over some orders of magnitude."""
    finite = y[np.isfinite(y)]
    return len(finite) > 0 and bool(finite.min() > 0 and finite.max() > WIDE_RATIO * np.median(finite))


def _formatter() -> Any:
    """Ticks as people write them: 6,500, 1.2M and 1·10²³, not 6.5e+3."""
    from bokeh.models import CustomJSTickFormatter

    return CustomJSTickFormatter(
        code="""
        const size = Math.abs(tick)
        if (size >= 1e15 || (size > 0 && size < 1e-6)) {
            const [mantissa, power] = Number(tick.toPrecision(6)).toExponential().split("e")
            const raised = [...String(Number(power))].map(c => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)])
            return mantissa + "·10" + raised.join("")
        }
        for (const [scale, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
            if (size >= scale && size >= 1e4)
                return (tick / scale).toLocaleString("en", {maximumFractionDigits: 3}) + suffix
        return tick.toLocaleString("en", {maximumSignificantDigits: 6})
        """
    )


def _plain(label: str) -> str:
    """Bokeh takes "@" and "{" of a tooltip as fields."""
    return label.replace("@", "(at)").replace("{", "(").replace("}", ")").replace("$", "")
