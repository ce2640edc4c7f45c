"""A small study with made-up results."""

import json
from pathlib import Path

from training.study.config import StudyConfig
from training.study.config import load as load_study
from training.study.plan import StudyPlan
from training.study.report import (
    About,
)
from training.study.results import (
    FINISHED,
    Result,
    StudyResults,
)
from training.study.runs import StudyRun

BUDGET = 4096
STUDY = {
    "name": "s",
    "rules": {
        "adamw": {"keys": ["optim.matrix.rule=adamw"], "grid": [0.001, 0.002, 0.004], "title": "AdamW"},
        "muon": {"grid": [0.01, 0.02, 0.04], "vector_ratios": [0.1], "title": "Muon"},
        "scion": {"keys": ["optim.matrix.rule=scion"], "grid": [0.01, 0.02, 0.04]},
    },
    "widths": {
        "w32": {"hidden_size": 32, "ffn_size": 64, "num_heads": 2, "num_kv_heads": 2},
        "w64": {"hidden_size": 64, "ffn_size": 128, "num_heads": 4, "num_kv_heads": 4},
    },
    "common_keys": [
        *("model.num_layers=1", "model.vocab_size=320", "data.vocab_size=320"),
        *("batch.tokens=512", "batch.sequence_length=32", "batch.micro_sequences=2"),
        *(f"schedule.tokens={BUDGET}", "evaluation.tuning_sequences=4"),
    ],
    "smoke_keys": ["schedule.tokens=1024"],
    "claims": {"reference": "adamw", "rule": "muon", "challenger": "scion", "baseline": "muon"},
}


def load(folder: Path, *dotlist: str, **changes: object) -> StudyConfig:
    """The study above in `folder`, with other sections and keys."""
    file = folder / "given.yaml"
    file.write_text(json.dumps(STUDY | changes))  # JSON is YAML
    return load_study(file=file, dotlist=[f"directory={folder}", *dotlist])


def result(
    plan: StudyPlan,
    run: StudyRun,
    loss: float,
    *,
    curve: tuple = (),
    status: str = FINISHED,
    error: str | None = None,
) -> Result:
    """A made-up result: its tuning loss is its validation loss plus 0.01."""
    name = plan.configs.of(run).run.name
    tuning = loss + 0.01
    return Result(run, name, status, loss, tuning, BUDGET, 2.0, error, "c0ffee", curve, step_seconds=0.25)


def line(final: float) -> tuple:
    """A curve that falls in equal steps from 8 to `final`, evaluated at every quarter of the budget."""
    return tuple((BUDGET * i // 4, 8 + (final - 8) * i / 4) for i in range(5))


# Final losses: tuning, by rule and rate, the same on both widths; report, by rule and seed.
TUNED = {"adamw": (5.0, 4.0, 4.5), "muon": (4.2, 3.8, 3.5), "scion": (3.9, 3.7, 3.8)}
REPORTED = {"adamw": (4.0, 4.1, 3.9), "muon": (3.0, 3.1, 3.2), "scion": (3.0, 3.05, 3.1)}


def study_of(plan: StudyPlan, *, num_report: int = 3) -> StudyResults:
    """A whole study with the losses above."""
    results = {}
    for run in plan.tuning_runs():
        loss = TUNED[run.rule][plan.config.rules[run.rule].grid.index(run.lr)]
        results[run] = result(plan, run, loss, curve=line(loss))
    study = StudyResults(plan, results)
    for rule in plan.config.rules:
        for noise in plan.config.noises:
            choice = study.choice(rule, noise=noise, width="w64")
            rates = {"lr": choice.lr, "vector_ratio": choice.vector_ratio}
            for run in plan.report_runs(rule, **rates, noise=noise)[:num_report]:
                loss = REPORTED[rule][plan.config.seeds.index(run.seed)]
                results[run] = result(plan, run, loss, curve=line(loss))
    return study


def about() -> About:
    host = {"cpu": "Abacus", "cpu_cores": 2}
    provenance = {"commit": "c0ffee", "dirty": False, "packages": {"torch": "2.13.0"}, "host": host}
    return About(command="python -m training.study name=s", data_fingerprint="f" * 64, provenance=provenance)
