"""Grids of variants, and the tables of differences, grids and rare tokens."""

import dataclasses

import pytest

from cluster.config import ConfigError
from cluster.measure.intervals import Interval
from tests.training.study.made_up import REPORTED, TUNED, load, study_of
from training.study.comparisons import comparisons, interval_text, verdict
from training.study.plan import StudyPlan, describe_plan
from training.study.plots import plot_grid

GRID = {
    "keys": ["optim.matrix.rule=transported_scion"],
    "grid": [0.01, 0.02, 0.04],
    "title": "Moved",
    "rows": ["m0.5: optim.matrix.momentum=0.5", "m0.9: optim.matrix.momentum=0.9 optim.matrix.ramp_steps=3"],
    "columns": ["cap1: optim.scion.transport_cap=1", "free:"],
}


def test_every_row_with_every_column_of_a_grid_is_a_rule(tmp_path):
    plan = StudyPlan(load(tmp_path, grids={"moved": GRID}))
    assert list(plan.config.rules)[3:] == [f"moved.m0.{m}.{c}" for m in (5, 9) for c in ("cap1", "free")]
    plan.check()
    assert "; 2 x 2 variants of moved [0.01, 0.02, 0.04] x 1\n" in str(describe_plan(plan, {}, parallel=1))
    [run, *_] = plan.tuning_of(noise="none", width="w64", rule="moved.m0.9.cap1")
    optim = plan.configs.of(run).optim
    assert (optim.matrix.momentum, optim.matrix.ramp_steps, optim.scion.transport_cap) == (0.9, 3, 1)
    assert plan.config.title("moved.m0.9.free") == "Moved m0.9 free"
    assert load(tmp_path, "smoke=true", grids={"moved": GRID}).rules["moved.m0.5.free"].grid == (0.01, 0.02)
    part = load(
        tmp_path,
        "only=[muon,moved]",
        "claims.reference=muon",
        "claims.baseline=muon",
        "claims.challenger=null",
        grids={"moved": GRID},
    )
    assert (
        len(part.rules) == 5 and list(part.rules)[:2] == ["muon", "moved.m0.5.cap1"] and len(part.widths) == 2
    )


@pytest.mark.parametrize("rows", [[], ["a: x=1", "a: x=2"]])
def test_rows_without_names_of_their_own_are_refused(tmp_path, rows):
    with pytest.raises(ConfigError, match=r"grids\.moved\.rows"):
        load(tmp_path, grids={"moved": GRID | {"rows": rows}})


def test_differences_are_paired_by_seed_with_students_interval(tmp_path):
    """Scion minus Muon: 0, -0.05, -0.1; s = 0.05, t = 4.303, so 0.05 * 4.303 / sqrt(3) = 0.1242."""
    [heading, text] = comparisons(study_of(StudyPlan(load(tmp_path))), noise="none")
    assert heading == "### Against the baseline" and "minus that of Muon" in text
    row = next(line for line in text.splitlines() if line.startswith("| scion"))
    assert "-0.0500 ± 0.1242" in row and "not decided" in row
    row = next(line for line in text.splitlines() if line.startswith("| AdamW"))
    assert "higher" in row and "+0.9000 ± 0.4303" in row  # of 1, 1 and 0.7


def test_a_grid_is_a_table_with_its_lowest_loss_in_bold_and_a_figure(tmp_path, monkeypatch):
    plan = StudyPlan(load(tmp_path, grids={"moved": GRID}))
    for number, rule in enumerate(list(plan.config.rules)[3:]):
        monkeypatch.setitem(TUNED, rule, (3.0, 2.0, 2.5))
        monkeypatch.setitem(REPORTED, rule, (3.0 - number / 10,) * 3)
    found = comparisons(study_of(plan), noise="none")
    assert found[2] == "### Grid: Moved"
    *_, first, second, _, picture = found[3].splitlines()
    assert [cell.strip() for cell in first.split("|")[1:-1]] == ["m0.5", "3.0000 ± 0.0000", "2.9000 ± 0.0000"]
    assert "**2.7000 ± 0.0000**" in second and "(figures/grid-moved.png)" in picture
    path = plot_grid(study_of(plan), tmp_path / "grid.png", grid="moved", noise="none")
    assert path.stat().st_size > 5000


def test_rare_tokens_have_a_table_where_they_were_logged(tmp_path):
    study = study_of(StudyPlan(load(tmp_path)))
    results = {
        run: dataclasses.replace(r, deciles=(*[r.validation_loss] * 9, None))
        for run, r in study.results.items()
    }
    found = comparisons(dataclasses.replace(study, results=results), noise="none")
    assert found[2] == "### Frequent and rare tokens"
    muon = next(line for line in found[3].splitlines() if line.startswith("| Muon"))
    scion = next(line for line in found[3].splitlines() if line.startswith("| scion"))
    assert muon.count("3.1000") == 9 and scion.count("-0.0500 ± 0.1242") == 9 and scion.endswith("- |")


def test_words_of_an_interval():
    assert interval_text(None) == "-" and interval_text(Interval(0.5, None, None)) == "+0.5000"
    verdicts = [verdict(Interval(0, low, high)) for low, high in ((-2, -1), (-1, 1), (1, 2), (None, None))]
    assert verdicts == ["lower", "not decided", "higher", "not decided"]
