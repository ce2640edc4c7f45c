"""A study's own run in W&B."""

from pathlib import Path

from cluster.record.record import read_metrics
from tests.cluster.review.panel_keys import missing
from tests.training.study.made_up import about, load, study_of
from training.study.plan import StudyPlan
from training.study.plots import plot_study
from training.study.publish import publish_study, rules_table
from training.study.report import describe_study
from training.study.results import write_tables


def test_a_study_lands_in_wandb_with_its_rules_runs_and_figures(tmp_path: Path):
    plan = StudyPlan(load(tmp_path, "wandb=offline"))
    study, directory = study_of(plan), plan.config.study_directory
    directory.mkdir()
    write_tables(study, directory, about={})
    (directory / "report.md").write_text(describe_study(study, about=about()))
    plot_study(study, directory / "figures")
    assert publish_study(study, about=about(), data=tmp_path / "data").startswith("offline: ")
    assert missing(directory, "study") == set()
    columns, rows = rules_table(study)
    shares = {row[1]: row[columns.index("token_share_mean")] for row in rows}
    assert shares["muon"] < shares["adamw"] <= 1
    assert read_metrics(directory / "metrics.jsonl") == []
