"""A study's own run in W&B: its tables, figures and report, in the group of its training runs. No torch."""

from pathlib import Path
from typing import Any

from cluster import config as layered
from cluster.record import origins
from cluster.record.result import ColumnsAndRows, record_result
from training.study.report import About
from training.study.results import COLUMNS, Spread, StudyResults, losses, token_ratio

RULES = (
    *("noise", "rule", "lr", "vector_ratio", "tuning_loss", "edge", "seeds"),
    *("validation_loss_mean", "validation_loss_min", "validation_loss_max"),
    *("token_share_mean", "token_share_min", "token_share_max", "seeds_that_miss"),
)


def publish_study(study: StudyResults, *, about: About, data: Path) -> str:
    """Record the study as a run in its directory. Returns W&B's status.

    The run keeps its W&B id: the same command again renews its tables. data: what all runs were trained on.
    """
    config = study.plan.config
    directory, missing = config.study_directory, study.rules_without_a_result()
    rows = [result.row() for result in study.results.values()]
    return record_result(
        directory,
        job_type="study",
        name=config.full_name,
        group=config.full_name,
        project=config.project,
        wandb_mode=config.wandb,
        config=layered.to_dict(config),
        provenance=about.provenance,
        inputs=[origins.of_dataset(data, about.data_fingerprint)],
        tags=list(config.rules),
        summary=_summary(study),
        tables={
            "rules": rules_table(study),
            "runs": (COLUMNS, [[row[column] for column in COLUMNS] for row in rows]),
        },
        images={path.stem: path for path in sorted((directory / "figures").glob("*.png"))},
        attachments=[directory / name for name in ("report.md", "results.csv", "results.json")],
        same_run=True,
        exit_code=int(bool(missing)),
    )


def rules_table(study: StudyResults) -> ColumnsAndRows:
    """Columns RULES and a row for each noise and rule: its rate, its losses, its tokens to the reference.

    Losses are in nats per token over the seeds that finished; tokens are shares of the reference's budget.
    """
    config, rows = study.plan.config, []
    for noise in config.noises:
        for rule in config.rules:
            choice = study.choice(rule, noise=noise, width=config.widest)
            finished = study.finished(rule, noise=noise)
            rate: list[Any] = [None] * 4
            if choice is not None:
                rate = [choice.lr, choice.vector_ratio, choice.tuning_loss, choice.edge]
            reference = config.claims.reference
            ratio = reference and token_ratio(finished, reference=study.finished(reference, noise=noise))
            shares = [*_ends(ratio.spread), ratio.num_unreached] if ratio else [None] * 4
            rows.append([noise, rule, *rate, len(finished), *_ends(Spread.of(losses(finished))), *shares])
    return RULES, rows


def _ends(spread: Spread | None) -> list[float | None]:
    return [None] * 3 if spread is None else [spread.mean, spread.low, spread.high]


def _summary(study: StudyResults) -> dict[str, Any]:
    """Totals, and the figures of `rules_table` by noise and rule."""
    results = list(study.results.values())
    columns, rows = rules_table(study)
    by_rule: dict[str, dict[str, Any]] = {}
    for noise, rule, *values in rows:
        by_rule.setdefault(noise, {})[rule] = dict(zip(columns[2:], values, strict=True))
    return {
        "num_runs": len(results),
        "num_failed": len(study.failed()),
        "tokens": sum(result.tokens or 0 for result in results),
        "training_seconds": sum(result.seconds or 0.0 for result in results),
        "by_noise": by_rule,
    }
