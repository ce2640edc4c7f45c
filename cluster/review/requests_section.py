"""The sections of a serving benchmark's run: its loads, its slowest requests, and latency over time."""

import heapq
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from cluster.review.charts import Charts, Curve
from cluster.review.document import PageTable, Section
from cluster.review.run_reader import Run
from cluster.review.words import amount

MOST_SLOW = 15
MOST_FAILED = 10  # rows, each of one load and one error
COLUMNS = (  # head, key of a load's row
    ("Load", "load"),
    ("Succeeded", "counts"),
    ("Requests/s", "requests_per_second"),
    ("Output tokens/s", "output_tokens_per_second"),
    ("TTFT p50", "ttft_p50_ms"),
    ("TTFT p99", "ttft_p99_ms"),
    ("TPOT p50", "tpot_p50_ms"),
    ("TPOT p99", "tpot_p99_ms"),
    ("E2E p50", "e2e_p50_ms"),
    ("E2E p99", "e2e_p99_ms"),
    ("Goodput/s", "goodput_per_second"),
    ("SLO met", "attainment"),
)
REQUEST_COLUMNS = (  # head, key of a request
    ("Load", "load"),
    ("Request", "index"),
    ("Arrived, s", "arrived"),
    ("Sent late, ms", "late"),
    ("Prompt tokens", "prompt_tokens"),
    ("Output tokens", "output_tokens"),
    ("TTFT, ms", "ttft"),
    ("TPOT, ms", "tpot"),
    ("E2E, ms", "e2e"),
    ("Longest gap, ms", "gap"),
    ("Missed", "missed"),
)


def sentence(run: Run) -> str:
    """What was measured, in a few words."""
    points = _points(run)
    best = max((point.get("goodput_per_second") or 0.0 for point in points), default=0.0)
    loads = f"{len(points)} load{'s' * (len(points) != 1)} measured"
    return f"{loads}, at most {amount(best, digits=3)} requests per second within the SLO"


def sections(run: Run) -> list[Section]:
    """ "Loads" and "Slow requests"; none for a run without requests.jsonl."""
    if not run.serving:
        return []
    slo = (run.summary or {}).get("slo") or {}
    limits = {key: slo[f"{key}_ms"] for key in ("ttft", "tpot", "e2e") if slo.get(f"{key}_ms")}
    return [_loads(run, limits), _slow(run, limits)]


def _loads(run: Run, limits: dict[str, float]) -> Section:
    section = Section("Loads")
    if points := _points(run):
        named = ", ".join(f"{key.upper()} {amount(limit)} ms" for key, limit in limits.items())
        section.paragraphs.append(
            f"Latencies in milliseconds, from the scheduled arrival. SLO: {named or 'unknown'}."
        )
        rows = [[_cell(key, point.get(key)) for _, key in COLUMNS] for point in points]
        section.tables.append(PageTable([head for head, _ in COLUMNS], rows, figures=range(1, len(COLUMNS))))
    return section


def _slow(run: Run, limits: dict[str, float]) -> Section:
    """Of the last attempt at each load: the slowest requests with what they missed, and how many failed."""
    section = Section("Slow requests")
    every = [one for one in _requests(run) if one["measured"]]
    last = {one["load"]: one["attempt"] for one in every}
    requests = [one for one in every if one["attempt"] == last[one["load"]]]
    if not requests:
        section.paragraphs.append("No measured request was recorded.")
        return section
    for one in requests:
        over = [key.upper() for key, limit in limits.items() if (one[key] or 0.0) > limit]
        one["missed"] = ", ".join([one["error"]] if one["error"] else over)
    failed, missed = (sum(bool(one[key]) for one in requests) for key in ("error", "missed"))
    slowest = heapq.nlargest(MOST_SLOW, requests, key=lambda one: one["e2e"] or 0.0)
    section.paragraphs.append(
        f"{len(requests):,} measured request{'s' * (len(requests) != 1)}; {failed:,} failed, "
        f"{missed - failed:,} more missed the SLO. The table shows the {len(slowest):,} slowest. “Sent late” "
        "is the load generator's own delay; latencies contain it."
    )
    section.charts = _charts(requests)
    shown = [[_shown(one[key]) for _, key in REQUEST_COLUMNS] for one in slowest]
    classes = ["error" if one["error"] else "warning" if one["missed"] else "" for one in slowest]
    head = [name for name, _ in REQUEST_COLUMNS]
    if failed:
        section.tables.append(_failed(requests))
    section.tables.append(PageTable(head, shown, figures=range(1, len(head) - 1), classes=classes))
    return section


def _failed(requests: list[dict[str, Any]]) -> PageTable:
    """How many requests of each load failed, and how: the most frequent first."""
    failed = sorted((one for one in requests if one["error"]), key=lambda one: one["arrived"])
    counts = Counter((one["load"], one["error"]) for one in failed)
    first = {(one["load"], one["error"]): one for one in reversed(failed)}
    rows = [
        [*key, f"{count:,}", f"{_shown(first[key]['index'])} at {_shown(first[key]['arrived'])} s"]
        for key, count in counts.most_common(MOST_FAILED)
    ]
    return PageTable(
        ["Load", "Failed with", "Requests", "First"], rows, figures=(2,), classes=["error"] * len(rows)
    )


def _points(run: Run) -> list[dict[str, Any]]:
    """The measured loads: of the summary, or else of the rows so far."""
    points = (run.summary or {}).get("points")
    return points if isinstance(points, list) else list(run.iterate(run.metrics))


def _requests(run: Run) -> Iterator[dict[str, Any]]:
    """Each request with its latencies in milliseconds, as `serving.bench.latency` defines them."""
    for one in run.iterate(run.requests):
        scheduled, tokens = one.get("scheduled", 0.0), one.get("tokens") or []
        output = one.get("output_tokens")
        spread = tokens[-1] - tokens[0] if tokens else 0.0
        yield {
            **{key: one.get(key) for key in ("load", "index", "prompt_tokens", "output_tokens", "error")},
            "measured": one.get("measured", True),
            "attempt": one.get("attempt", 1),
            "arrived": scheduled,
            "late": 1e3 * (one["sent"] - scheduled) if one.get("sent") is not None else None,
            "ttft": 1e3 * (tokens[0] - scheduled) if tokens else None,
            "e2e": 1e3 * (tokens[-1] - scheduled) if tokens else None,
            "tpot": 1e3 * spread / (output - 1) if tokens and output and output > 1 else None,
            "gap": 1e3 * max((b - a for a, b in pairwise(tokens)), default=0.0),
        }


def _charts(requests: list[dict[str, Any]]) -> list[Any]:
    """TTFT and E2E of every request over its arrival, a colour for each load."""
    charts, made = Charts("seconds since the load began"), []
    loads = list(dict.fromkeys(one["load"] for one in requests))
    for title, key in (("Time to first token", "ttft"), ("End to end", "e2e")):
        curves = []
        for place, load in enumerate(loads):
            of_load = [one for one in requests if one["load"] == load and one[key] is not None]
            of_load.sort(key=lambda one: one["arrived"])
            x, y = [one["arrived"] for one in of_load], [one[key] for one in of_load]
            curves += [Curve(str(load), x, y, style="dots", color=place)] if x else []
        if curves:
            made.append(charts.line(title, curves, unit="milliseconds"))
    return made


def _cell(key: str, value: Any) -> str:
    return f"{value:.0%}" if key == "attainment" and isinstance(value, float) else _shown(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else amount(value, digits=3)
