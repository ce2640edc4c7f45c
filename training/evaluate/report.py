"""The result of an evaluation: eval.json, the table, the last line. No torch."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import display
from cluster.record import provenance
from cluster.record.origins import Origin
from training.evaluate import harness
from training.evaluate.scoring import TaskScore

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
        notes: lm_eval's warnings.
        failed: task or group without scores -> why.
    """

    scores: list[TaskScore] = field(default_factory=list)
    held_out: "HeldOut | None" = None
    setting: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def to_json(
    measured: Measured,
    *,
    model: Mapping[str, Any],
    endpoint: Mapping[str, Any] | None,
    left_out: str | None,
    config: Mapping[str, Any],
    inputs: Sequence[Origin],
) -> dict[str, Any]:
    """The content of eval.json.

    Args:
        model: name, directory and run.
        endpoint: that was evaluated, if any.
        left_out: why there is no perplexity, if there is none.
        config: the resolved keys.
        inputs: origins of the model and of the data.
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
        "failed": measured.failed,
        "config": config,
        "provenance": {
            **provenance.collect(
                command=sys.argv,
                data_fingerprint=held_out.data_fingerprint if held_out else None,
                packages=(*provenance.PACKAGES, *harness.PACKAGES),
            ),
            "inputs": list(inputs),
        },
    }


def table(result: Mapping[str, Any]) -> tuple[display.Table, str]:
    """The result for people: a line per metric, the perplexity first."""
    rows: list[tuple[Any, ...]] = []
    held_out = result["perplexity"]
    if "left_out" in held_out:
        ending = f"perplexity left out: {held_out['left_out']}"
    else:
        samples = f"{held_out['num_sequences']}/{held_out['of_sequences']}"
        value, stderr = _figure(held_out["perplexity"]), _figure(held_out["perplexity_stderr"])
        rows.append(("validation", None, None, samples, "perplexity", "none", value, stderr))
        size = f"{held_out['tokens']:,} tokens in sequences of {held_out['sequence_length']}"
        ending = f"perplexity of {size}: exp({held_out['loss']:.4f})"
    for score in result["scores"]:
        rows.append(
            (
                *(score[name] for name in ("task", "version", "num_fewshot")),
                None if score["samples"] is None else f"{score['samples']}/{score['of_samples']}",
                *(score[name] for name in ("metric", "filter")),
                *(_figure(score[name]) for name in ("value", "stderr")),
            )
        )
    return display.table(HEADERS, rows, left=(0, 4, 5)), ending


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:,.4f}"


def last_line(result: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The result in one object: {"model", "perplexity", "scores": {"task/metric,filter": value}, "file"}."""
    return {
        "model": result["model"]["name"],
        "perplexity": result["perplexity"].get("perplexity"),
        "scores": {f"{s['task']}/{s['metric']},{s['filter']}": s["value"] for s in result["scores"]},
        "file": str(output),
    }
