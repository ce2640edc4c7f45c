"""What an evaluation came to: eval.json, the table, the last line. No torch."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import provenance
from training.evaluate import harness
from training.evaluate.harness import Score

if TYPE_CHECKING:
    from training.evaluate.perplexity import HeldOut

HEADERS = ("task", "version", "shots", "samples", "metric", "filter", "value", "stderr")


@dataclass(frozen=True)
class Measured:
    """The numbers.

    Attributes:
        scores: of the tasks.
        held_out: the perplexity, if there is one.
        setting: parameters, dtype and device, where the model ran here.
        notes: what lm_eval warned of.
    """

    scores: list[Score] = field(default_factory=list)
    held_out: "HeldOut | None" = None
    setting: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def to_json(
    measured: Measured,
    *,
    model: Mapping[str, Any],
    endpoint: Mapping[str, Any] | None,
    left_out: str | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of eval.json.

    Args:
        model: name, directory and run.
        endpoint: through which it was asked, if any.
        left_out: why there is no perplexity, if there is none.
        config: the resolved keys.
    """
    held_out = measured.held_out
    entry: dict[str, Any] = {"left_out": left_out}
    if held_out is not None:
        entry = {**dataclasses.asdict(held_out), "perplexity_stderr": held_out.perplexity_stderr}
    return {
        "model": {**model, **measured.setting},
        "endpoint": endpoint,
        "perplexity": entry,
        "scores": [dataclasses.asdict(score) for score in measured.scores],
        "lm_eval": provenance.versions(harness.PACKAGES)["lm_eval"],
        "notes": measured.notes,
        "config": config,
        "provenance": provenance.collect(
            command=sys.argv,
            data_fingerprint=held_out.data_fingerprint if held_out else None,
            packages=(*provenance.PACKAGES, *harness.PACKAGES),
        ),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result for people: a line for each metric, the perplexity first."""
    rows = [HEADERS]
    held_out = result["perplexity"]
    if "left_out" not in held_out:
        samples = f"{held_out['num_sequences']}/{held_out['of_sequences']}"
        value, stderr = _figure(held_out["perplexity"]), _figure(held_out["perplexity_stderr"])
        rows.append(("validation", "-", "-", samples, "perplexity", "none", value, stderr))
    for score in result["scores"]:
        rows.append(
            (
                score["task"],
                score["version"] or "-",
                "-" if score["num_fewshot"] is None else str(score["num_fewshot"]),
                "-" if score["samples"] is None else f"{score['samples']}/{score['of_samples']}",
                score["metric"],
                score["filter"],
                _figure(score["value"]),
                _figure(score["stderr"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if "left_out" in held_out:
        lines.append(f"perplexity left out: {held_out['left_out']}")
    else:
        size = f"{held_out['tokens']:,} tokens in sequences of {held_out['sequence_length']}"
        lines.append(f"perplexity of {size}: exp({held_out['loss']:.4f})")
    return "\n".join(line.rstrip() for line in lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def last_line(result: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The result in one object: {"model", "perplexity", "scores": {"task/metric,filter": value}, "file"}."""
    return {
        "model": result["model"]["name"],
        "perplexity": result["perplexity"].get("perplexity"),
        "scores": {f"{s['task']}/{s['metric']},{s['filter']}": s["value"] for s in result["scores"]},
        "file": str(output),
    }
