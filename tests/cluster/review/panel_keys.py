"""Which keys a workspace or a report shows, read from what W&B would store of it; which keys a run logged."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.review import views
from cluster.review.dashboard import spec_of

Key = tuple[str, str]  # kind and name: "history", "table", "image", "summary", "config", "system", "run"
SHOWN_AS = {"table-file": "table", "image-file": "image", "histogram": "history"}  # W&B's types of values
RUN_FIELDS = {  # of W&B itself
    *("displayName", "name", "group", "state", "jobType", "createdAt", "tags", "_step", "_absolute_runtime"),
}


def shown(spec: dict[str, Any]) -> set[Key]:
    """Every key of the panels, the columns and the filters."""
    return set(_panels(spec)) | set(_runs(spec))


def shown_by(*slugs: str) -> set[Key]:
    """Every key of these views, or of all."""
    chosen = [view for view in views.VIEWS if not slugs or view.slug in slugs]
    return {key for view in chosen for key in shown(spec_of(views.build(view, entity="", project="p")))}


def missing(directory: Path, *sections: str) -> set[Key]:
    """What the views show of these sections of W&B's keys, and the offline run in `directory` did not log."""
    wanted = {key for key in shown_by() if key[1].partition("/")[0] in sections}
    assert {name.partition("/")[0] for _, name in wanted} == set(sections), "no view shows a section"
    return wanted - logged(directory)


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from _walk(each)


def _panels(spec: dict[str, Any]) -> Iterator[Key]:
    for panel in (node for node in _walk(spec) if "viewType" in node):
        kind, config = panel["viewType"], panel["config"]
        if kind == "Run History Line Plot":
            yield from (_history(name) for name in (config["xAxis"], *config["metrics"]))
            if group := config.get("groupBy"):
                yield "config", _without_value(group)
        elif kind == "Bar Chart":
            yield from (("summary", name) for name in config["metrics"])
        elif kind == "Scatter Plot":
            yield from (_accessor(config[axis]) for axis in ("xAxis", "yAxis", "zAxis") if axis in config)
        elif kind == "Parallel Coordinates Plot":
            yield from (_accessor(column["accessor"]) for column in config["columns"])
        elif kind == "Media Browser":
            yield from (("image", name) for name in config["mediaKeys"])
        elif kind == "Weave":
            [key] = [node["val"] for node in _walk(config) if node.get("nodeType") == "const"]
            yield "table", key
        else:
            assert kind in ("Markdown Panel", "Run Comparer"), f"say which keys a {kind} shows"


def _runs(spec: dict[str, Any]) -> Iterator[Key]:
    for runs in (node for node in _walk(spec) if "runFeed" in node):
        yield from (_accessor(name) for name in runs["runFeed"]["columnOrder"])
        for node in _walk(runs["filters"]):
            if "key" in node:
                yield _accessor(f"{node['key']['section']}:{node['key']['name']}")


def _history(name: str) -> Key:
    if name.startswith("system/"):
        return "system", name.removeprefix("system/")
    return ("run", name) if name in RUN_FIELDS else ("history", name)


def _accessor(name: str) -> Key:
    section, _, rest = name.partition(":")
    if section == "tags":
        return "run", "tags"
    return section, _without_value(rest) if section == "config" else rest


def _without_value(name: str) -> str:
    """W&B puts `.value` after the first part of a key of the configuration."""
    first, value, *rest = name.split(".")
    assert value == "value", name
    return ".".join([first, *rest])


def logged(directory: Path) -> set[Key]:
    """Every key of the only offline W&B run in a run directory, by W&B's own reader."""
    [offline_run] = (directory / "wandb").glob("offline-run-*")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", offline_run]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: set[Key] = set()
    kinds: dict[str, str] = {}  # of what a key held last, which is what W&B shows
    for line in answer.splitlines():
        record = json.loads(line)
        content = record.get(record["type"], {})
        if record["type"] == "history":
            # W&B's reader lists the parts of a table, a picture or a histogram: `a/b._type`, `a/b.path`.
            kinds |= {name: "history" for name in content["item"] if "." not in name.rpartition("/")[2]}
            typed = {name: kind for name, kind in content["item"].items() if name.endswith("._type")}
            kinds |= {name.removesuffix("._type"): SHOWN_AS[kind] for name, kind in typed.items()}
        elif record["type"] == "summary":
            found |= {("summary", name) for name in _dotted(content.get("update", {}))}
        elif record["type"] == "run":
            found |= {("config", name) for name in _dotted(content["config"]["update"])}
        elif record["type"] == "stats":
            found |= {("system", name) for name in content["item"]}
    return found | {(kind, name) for name, kind in kinds.items()}


def _dotted(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
