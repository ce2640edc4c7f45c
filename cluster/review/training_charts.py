"""The charts of a training run: which keys of metrics.jsonl stand together, under which name and unit."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.review.charts import Chart, Charts, Curve, Mark
from cluster.review.columns import AXES
from cluster.review.document import PageTable, Section
from cluster.review.run_reader import Run
from cluster.review.words import amount

MOST_OTHERS = 24  # charts of keys that this version does not know


@dataclass(frozen=True)
class Group:
    """A chart: the keys that match, with the label and the style of each.

    Attributes:
        keys: (regular expression, label; "" makes one of the key, style).
        factor: by which values are multiplied to be in `unit`.
        needed: a pattern of keys of which one has to be there, and not zero all along.
    """

    title: str
    unit: str
    keys: Sequence[tuple[str, str, str]]
    factor: float = 1.0


CURVES = (
    Group(
        "Loss",
        "nats per token",
        (
            ("loss", "training", "faint"),
            ("validation_loss", "validation", "points"),
            ("tuning_loss", "tuning", "points"),
        ),
    ),
    Group("Gradient norm", "norm before clipping", (("gradient_norm", "gradient norm", "line"),)),
    Group(
        "Learning rate",
        "learning rate",
        (("lr", "hidden matrices", "line"), ("lr_vector", "all else", "line")),
    ),
    Group("Skipped steps", "steps since the start", (("skipped_steps", "skipped steps", "line"),)),
)
SPEED = (
    Group("Throughput", "tokens per second", (("tokens_per_second", "tokens per second", "line"),)),
    Group(
        "MFU",
        "% of peak",
        (("mfu", "of the datasheet's peak", "line"), ("mfu_of_measured", "of the measured product", "line")),
        100.0,
    ),
    Group("Step time", "seconds", (("step_seconds", "whole step", "line"),)),
    Group(
        "Phases of a step",
        "milliseconds",
        (
            (r"optimizer_(.+)_seconds", "", "line"),
            (r"((?:data|compute|communication)\w*)_seconds", "", "line"),
        ),
        1000.0,
    ),
    Group("Memory", "GB", ((r"(\w*memory\w*)_bytes", "", "line"),), 1e-9),
    Group("Memory", "GiB", ((r"(\w*memory\w*)_gib", "", "line"),)),
)
HEALTH = (
    Group(
        "Orthogonality of the updates",
        "‖OOᵀ - I‖ / √n",
        (
            ("optimizer_orthogonality_error", "mean over matrices", "line"),
            ("optimizer_orthogonality_error_max", "largest", "line"),
        ),
    ),
    Group("Size of the updates", "root mean square", (("optimizer_update_rms", "update RMS", "line"),)),
    Group("Attention logits", "largest", (("optimizer_attention_logit_max", "largest logit", "line"),)),
    Group("Work of the ranks", "imbalance", (("optimizer_imbalance", "imbalance", "line"),)),
    Group(
        "Noise: tail index", "median over matrices", (("noise_tail_index_median", "tail index", "points"),)
    ),
    Group(
        "Noise to signal",
        "median over matrices, dual norm",
        (("noise_to_signal_dual_median", "noise to signal", "points"),),
    ),
)
ZERO_IS_NOTHING = ("skipped_steps", "optimizer_imbalance")  # not shown while they are zero all along
HEALTH_KEYS = ("optimizer_", "noise_")  # what these begin belongs there, also if it is new
NO_CURVES = (*AXES, "optimizer_orthogonalisations")


def sections(run: Run, *, marks: Sequence[Mark]) -> list[Section]:
    """The sections "Curves", "Speed and memory", "Optimizer health" and "Other measurements"; some empty."""
    if run.serving:
        return []
    charts = Charts("step")
    seen: set[str] = set(NO_CURVES)
    made = {
        title: Section(title, charts=list(_charts(run, charts, groups, marks, seen)))
        for title, groups in (("Curves", CURVES), ("Speed and memory", SPEED), ("Optimizer health", HEALTH))
    }
    health = [_group(key) for key in run.columns if key not in seen and key.startswith(HEALTH_KEYS)]
    made["Optimizer health"].charts += _charts(run, charts, health, marks, seen)
    made["Speed and memory"].paragraphs += _reasons(run)
    made["Optimizer health"].tables += _layers(run)
    if not run.columns:
        made["Curves"].paragraphs.append("metrics.jsonl holds no row yet.")
    others = [key for key in run.columns if key not in seen]
    rest = map(_group, others[:MOST_OTHERS])
    other = Section("Other measurements", charts=list(_charts(run, charts, rest, marks, seen)))
    if len(others) > MOST_OTHERS:
        other.paragraphs.append(f"Not drawn: {', '.join(others[MOST_OTHERS:])}.")
    return [*made.values(), other]


def _charts(
    run: Run, charts: Charts, groups: Iterable[Group], marks: Sequence[Mark], seen: set[str]
) -> Iterable[Chart]:
    for group in groups:
        curves = []
        for pattern, label, style in group.keys:
            for key in run.columns:
                match = re.fullmatch(pattern, key)
                if match is None or key in seen:
                    continue
                seen.add(key)
                x, y = run.curve(key)
                if len(x) and not (key in ZERO_IS_NOTHING and not any(y)):
                    name = label or _label(match[match.lastindex or 0])
                    curves.append(Curve(name, x, y, style=style, factor=group.factor))
        if curves:
            yield charts.line(group.title, curves, unit=group.unit, marks=marks)


def _group(key: str) -> Group:
    """A chart of a key that no group above names."""
    label = _label(key.removeprefix("optimizer_")).capitalize()
    return Group(label, "", ((re.escape(key), label, "line"),))


def _label(key: str) -> str:
    return key.replace("_", " ")


def _reasons(run: Run) -> list[str]:
    """Why a figure is missing or in doubt."""
    named = {"mfu_reason": "MFU", "mfu_of_measured_reason": "MFU of the measured product"}
    return [f"{name}: {run.latest[key]}." for key, name in named.items() if run.latest.get(key)]


def _layers(run: Run) -> list[PageTable]:
    """The newest values of each layer, of keys that hold a mapping of layers."""
    found = []
    for key, layers in run.latest.items():
        if not isinstance(layers, dict) or not all(isinstance(each, dict) for each in layers.values()):
            continue
        names = list(dict.fromkeys(name for each in layers.values() for name in each))
        rows: list[list[Any]] = [
            [layer, *(amount(values.get(name)) for name in names)] for layer, values in layers.items()
        ]
        head = ["Layer", *map(_label, names)]
        figures = range(1, len(head))
        found.append(
            PageTable(head, rows, figures=figures, folded=f"{_label(key).capitalize()} of each layer, newest")
        )
    return found
