"""Reports of a study and of a parity, built from what these commands write, without a network or a key."""

from pathlib import Path

import pytest

from cluster.cli import UserError
from cluster.config import to_dict
from cluster.parity import command as parity
from cluster.review import wandb_reports
from cluster.review.dashboard import spec_of
from tests.cluster.parity import sides
from tests.cluster.review.panel_keys import shown, shown_by
from tests.training.study import made_up
from training.study.plan import StudyPlan
from training.study.plots import plot_study
from training.study.report import describe_study
from training.study.results import write_tables


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the study command writes of a made-up study."""
    folder = tmp_path_factory.mktemp("study")
    plan = StudyPlan(made_up.load(folder))
    results = made_up.study_of(plan)
    write_tables(results, folder, about={"study": to_dict(plan.config)})
    (folder / "report.md").write_text(describe_study(results, about=made_up.about()))
    plot_study(results, folder / "figures")
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the parity command writes of two made-up machines."""
    folder = tmp_path_factory.mktemp("parity")
    a = sides.write(folder, sides.A40, [sides.figure(sides.A40, "training", 0.4)])
    b = sides.write(folder, sides.H100, [sides.figure(sides.H100, "training", 0.5)])
    out = folder / """a40's "and" h100's"""
    assert parity.main([str(a), str(b), "--output", str(out), "--wandb", "disabled"]) == 0
    return out


def text_of(blocks: list[dict]) -> list[str]:
    """Headings, Markdown and the call-out, in order."""
    found = []
    for block in blocks:
        if block["type"] == "markdown-block":
            found.append(block["content"])
        elif block["type"] in ("heading", "callout-block"):
            found.append(str(block["children"]))
    return found


def grid_of(blocks: list[dict]) -> dict:
    [grid] = [block for block in blocks if block["type"] == "panel-grid"]
    return grid["metadata"]


def test_the_report_of_a_study_asks_shows_its_runs_and_says_what_report_md_says(study: Path):
    report = wandb_reports.build(study, project="asuncion")
    assert report.title == "Study s"
    blocks = spec_of(report)["blocks"]
    question, *rest = text_of(blocks)
    assert "AdamW, Muon, scion reaches the lowest validation loss" in question and "loss of AdamW" in question
    text = "\n".join(rest)
    for line in (study / "report.md").read_text().splitlines():
        if line.startswith(("|", "- ")):
            assert line in text
    assert "figures/" not in text  # pictures beside report.md, which W&B does not have
    grid = grid_of(blocks)
    assert [grid["runSets"][0]["filters"]["filters"][0]["key"]["name"], filter_of(grid)] == ["group", "s"]
    keys = {key for key in shown(grid) if key[0] != "run"}
    assert {("table", "study/rules"), ("image", "study/loss_rate")} < keys <= shown_by("study")


def filter_of(grid: dict) -> str:
    [one] = grid["runSets"][0]["filters"]["filters"]
    assert one["op"] == "="
    return one["value"]


def test_the_report_of_a_parity_shows_its_table_and_its_run(compared: Path):
    report = wandb_reports.build(compared, project="asuncion")
    blocks = spec_of(report)["blocks"]
    text = "\n".join(text_of(blocks))
    assert "share of its own ceiling" in text and "**contradicted**" in text and "6·N_matmul" in text
    grid = grid_of(blocks)
    assert "" not in text_of(blocks)  # a section that was only a picture
    assert filter_of(grid) == compared.name  # with its spaces and quotes
    assert {key for key in shown(grid) if key[0] != "run"} <= shown_by("parity")


@pytest.mark.parametrize("which", ["study", "compared"])
def test_a_report_is_the_same_each_time_and_its_panels_do_not_overlap(which, request):
    folder = request.getfixturevalue(which)
    one, other = (spec_of(wandb_reports.build(folder, project="p")) for _ in range(2))
    assert one == other
    panels = [panel["layout"] for panel in grid_of(one["blocks"])["panelBankSectionConfig"]["panels"]]
    taken = [(p["x"] + i, p["y"] + j) for p in panels for i in range(p["w"]) for j in range(p["h"])]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) < 24


def test_a_study_that_has_no_report_yet_is_refused_with_its_folder(tmp_path: Path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"no study .* and no parity"):
        wandb_reports.read(tmp_path)
