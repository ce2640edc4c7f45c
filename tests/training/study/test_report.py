"""Results of a study: choices, claims, report, tables and figures."""

import csv
import dataclasses
import json
import math

import pytest

from tests.training.study.made_up import BUDGET, STUDY, about, load, result, study_of
from training.study.config import RuleConfig
from training.study.plan import StudyPlan
from training.study.plots import plot_study
from training.study.report import (
    claim_of_difference,
    claim_of_tokens,
    claims,
    describe_study,
    edge_text,
    transfer_text,
)
from training.study.results import (
    DIVERGED,
    FAILED,
    FINISHED,
    Choice,
    Result,
    Spread,
    StudyResults,
    TokenRatio,
    choose,
    difference,
    mean_curve,
    token_ratio,
    tokens_to,
    write_tables,
)
from training.study.runs import REPORT, TUNING, StudyRun

# --- choices and arithmetic ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuned", "expected"),
    [
        ({1: 3.0, 2: 2.0, 4: 2.5}, Choice(2, 1, 2.0, None)),
        ({1: 1.0, 2: 2.0, 4: 2.5}, Choice(1, 1, 1.0, "lowest")),
        ({1: 3.0, 2: 2.0, 4: 1.5}, Choice(4, 1, 1.5, "highest")),
        ({1: 3.0, 2: None, 4: 3.5}, Choice(1, 1, 3.0, "lowest")),
        ({2: 2.0, 4: None}, Choice(2, 1, 2.0, None)),  # beside one that failed, but inside the grid
        ({1: None, 2: None, 4: None}, None),
    ],
)
def test_the_rate_with_the_lowest_tuning_loss_is_chosen(plan, tuned, expected):
    results = []
    for lr, loss in tuned.items():
        run = StudyRun(TUNING, "muon", lr, 1, "w64", "none", 0)
        results.append(Result(run, "r", FINISHED if loss else FAILED, validation_loss=0.0, tuning_loss=loss))
    assert choose(results, rule=RuleConfig(grid=(1, 2, 4))) == expected


def test_the_choice_ignores_the_validation_loss(plan):
    runs = plan.tuning_of(noise="none", width="w64", rule="muon")
    results = [Result(run, "r", FINISHED, 9.0 - i, 1.0 + i) for i, run in enumerate(runs)]
    assert choose(results, rule=plan.config.rules["muon"]).lr == 0.01
    assert choose(results[:1], rule=RuleConfig(grid=(0.01,))).edge == "only"


def test_the_ratio_of_the_vectors_rate_is_a_second_dimension_of_the_grid(tmp_path):
    tried = [f"rules.{name}.vector_ratios=[1,2,3]" for name in STUDY["rules"]]
    plan = StudyPlan(load(tmp_path, *tried, "rules.muon.vector_ratios=[0.1,0.2,0.4]"))
    runs = plan.tuning_of(noise="none", width="w64", rule="muon")
    assert len(runs) == 9
    assert plan.configs.of(runs[3]).optim.vector.lr == pytest.approx(0.01 * 0.2)
    assert runs[3].label == "muon-w64-lr0.01-x0.2-seed0"
    results = {run: result(plan, run, 3.0 - 0.1 * (run.lr == 0.02) * i) for i, run in enumerate(runs)}
    study = StudyResults(plan, results)
    choice = study.choice("muon", noise="none", width="w64")
    assert (choice.lr, choice.vector_ratio, choice.edge, choice.ratio_edge) == (0.02, 0.4, None, "highest")
    assert "vector ratio, 0.4, is the highest of those tried" in edge_text(choice, "Muon", width="w64")
    assert {run.vector_ratio for run in study.report_runs("muon", noise="none")} == {0.4}
    text = describe_study(study, about=about())
    assert "w64 x0.4" in text and "optim.vector.lr = 0.1 or 0.2 or 0.4 of it" in text
    assert plot_study(study, tmp_path / "figures")


@pytest.mark.parametrize(
    ("target", "expected"),
    [(5.0, 100.0), (4.5, 150.0), (4.0, 200.0), (3.0, 275.0), (2.0, 350.0), (1.9, None), (7.0, 0.0)],
)
def test_tokens_to_a_loss_are_interpolated_between_evaluations(target, expected):
    curve = ((0, 6.0), (100, 5.0), (200, 4.0), (250, 4.5), (300, 2.5), (400, 2.0), (500, 2.1))
    # from 250 on: down from 4.5 to 2.5 within 50 tokens, then to 2.0 at 400
    expected = {3.0: 287.5, 2.0: 400.0}.get(target, expected)
    found = tokens_to(curve, target)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_a_curve_with_a_loss_that_is_not_finite_reaches_no_target_there():
    assert tokens_to(((0, 6.0), (100, math.nan), (200, 5.0)), 5.5) is not None
    assert tokens_to(((0, 6.0), (100, math.nan)), 5.5) is None


def test_tokens_are_counted_to_the_references_mean_loss(plan):
    study = study_of(plan)
    adamw, muon = (study.finished(rule, noise="none") for rule in ("adamw", "muon"))
    ratio = token_ratio(muon, reference=adamw)
    assert ratio.target == pytest.approx(4.0) and ratio.reference_tokens == BUDGET
    # Lines from 8 to 3, 3.1, 3.2 pass 4 after 4/5, 4/4.9 and 4/4.8 of the budget.
    assert ratio.tokens == pytest.approx([BUDGET * 4 / 5, BUDGET * 4 / 4.9, BUDGET * 4 / 4.8])
    assert ratio.spread.low == pytest.approx(0.8) and ratio.spread.high == pytest.approx(4 / 4.8)
    own = token_ratio(adamw, reference=adamw)  # the seed with 4.1 never gets to 4.0
    assert own.num_unreached == 1 and own.spread.num == 2
    assert token_ratio([], reference=adamw) is None and token_ratio(muon, reference=[]) is None


def test_differences_are_taken_seed_by_seed_and_judged_by_the_baselines_band(plan):
    study = study_of(plan)
    scion, muon = (study.finished(rule, noise="none") for rule in ("scion", "muon"))
    found = difference(scion, muon)
    assert found.by_seed.mean == pytest.approx(-0.05) and found.by_seed.low == pytest.approx(-0.1)
    assert found.verdict == "within" and difference(muon, scion).verdict == "within"
    shifted = [dataclasses.replace(r, validation_loss=r.validation_loss + 0.5) for r in scion]
    assert difference(shifted, muon).verdict == "worse" and difference(muon, shifted).verdict == "better"
    assert difference(scion[:2], muon[1:]).by_seed.num == 1
    assert difference(scion[:1], muon[1:]) is None


def test_spread_and_mean_curve(plan):
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, 1.0, 6.0, 3) and Spread.of([]) is None
    results = study_of(plan).finished("muon", noise="none")
    tokens, spread = mean_curve(results)[-1]
    assert tokens == BUDGET and (spread.low, spread.high) == (3.0, 3.2) and spread.num == 3
    shorter = dataclasses.replace(results[0], curve=results[0].curve[:2])
    assert [tokens for tokens, _ in mean_curve([shorter, *results])] == [0, BUDGET // 4]
    assert mean_curve([]) == []


# --- report -------------------------------------------------------------------------------------------


def test_the_claim_of_tokens_says_reached_missed_or_never():
    def said(*shares: float | None, target: float = 0.75) -> str:
        tokens = tuple(None if share is None else share * 1000 for share in shares)
        return claim_of_tokens(TokenRatio(4.25, 1000, tokens), "Muon", "AdamW", target=target)

    text = said(0.5, 0.6, 0.7)
    assert "Muon needs 0.600 of AdamW's tokens (seeds 0.500 to 0.700)" in text and "4.2500 nats" in text
    assert text.endswith("the target, at most 0.75, is reached.")
    assert said(0.5, 0.6, 0.8).endswith("is reached in the mean, but not by every seed.")
    assert said(0.7, 0.8, 0.9).endswith("is missed.")
    assert "never reaches" in said(None, None) and said(None, None).endswith("is missed.")
    assert "in 1 of 3 seeds" in said(0.5, None, 0.6) and said(0.5, None, 0.6).endswith("is missed.")
    assert "not known" in claim_of_tokens(None, "Muon", "AdamW", target=0.75)


def test_the_claim_of_difference_says_plainly_when_it_is_worse(plan):
    study = study_of(plan)
    scion, muon = (study.finished(rule, noise="none") for rule in ("scion", "muon"))
    text = claim_of_difference(difference(scion, muon), "Transported Scion", "Scion")
    assert "Transported Scion minus Scion: -0.0500 nats per token" in text
    assert text.endswith("Transported Scion equals Scion within the seeds' band.")
    worse = [dataclasses.replace(r, validation_loss=r.validation_loss + 1) for r in scion]
    assert "WORSE" in claim_of_difference(difference(worse, muon), "a", "b")
    assert "better than b by more" in claim_of_difference(difference(muon, worse), "a", "b")
    assert "not known" in claim_of_difference(None, "a", "b")


def test_a_rate_at_the_end_of_its_grid_is_said_in_words(plan):
    def said(lr: float, edge: str | None) -> str | None:
        return edge_text(Choice(lr, 1.0, 3.0, edge), "Muon", width="w64")

    assert said(0.02, None) is None
    assert "Muon at w64: the best rate, 0.04, is the highest of its grid" in said(0.04, "highest")
    assert "is the lowest of its grid" in said(0.01, "lowest") and "not tuned" in said(0.01, "only")
    assert "no tuning run finished" in edge_text(None, "Muon", width="w64")
    found = claims(study_of(plan), noise="none")
    assert [text for text in found if "Muon at w64: the best rate, 0.04, is the highest" in text]
    assert not [text for text in found if text.startswith("AdamW at")]


def test_transfer_is_said_of_several_widths(plan):
    study = study_of(plan)
    assert (
        transfer_text(study, "muon", noise="none") == "The best rate is the same on every width: 0.04 x0.1."
    )
    run = plan.tuning_of(noise="none", width="w32", rule="muon")[0]
    moved = StudyResults(plan, {**study.results, run: result(plan, run, 1.0)})
    assert "changes with the width: 0.04 x0.1 on w64, 0.01 x0.1 on w32" in transfer_text(
        moved, "muon", noise="none"
    )


def test_the_report_states_every_grid_budget_failure_and_source(plan):
    study = study_of(plan)
    bad = plan.tuning_of(noise="none", width="w32", rule="scion")[0]
    lost = study.report_runs("muon", noise="none")[2]
    results = {
        **study.results,
        bad: result(plan, bad, 9.0, status=DIVERGED, error="not finite"),
        lost: Result(lost, "muon-lost", FAILED, error="exit code 1: a | b"),
    }
    text = describe_study(StudyResults(plan, results), about=about(), synthetic="slopes here")
    for part in (
        "# Study s",
        "2 of 27.",
        "scion-w32-lr0.01-seed0",
        "not finite",
        "| muon-lost | report | failed | exit code 1: a / b |",  # no pipe that breaks the table
        "optim.matrix.lr in [0.01, 0.02, 0.04], optim.vector.lr = 0.1 of it",
        "all: model.num_layers=1 model.vocab_size=320",
        "4,096 tokens, 8 steps of 512",
        "27 runs (18 tuning + 9 report)",
        "f" * 64,
        "c0ffee",
        "Abacus",
        "python -m training.study name=s",
        "run.name=again",
        "| w64 x0.1 | 4.2100 | 3.8100 | **3.5100** |",
        "slopes here",
        "## What this does not show",
        "tokens per parameter",
    ):
        assert part in text, part
    assert "3.0000, 3.1000, failed" in text


def test_a_study_without_failures_says_so_and_two_states_of_the_code_are_noticed(plan):
    study = study_of(plan)
    assert "None of 27." in describe_study(study, about=about())
    run = next(iter(study.results))
    mixed = {**study.results, run: dataclasses.replace(study.results[run], commit="0ld")}
    text = describe_study(StudyResults(plan, mixed), about=about())
    assert "more than one state of the code: 0ld, c0ffee" in text


def test_an_empty_outcome_has_a_report_too(plan):
    text = describe_study(StudyResults(plan, {}), about=about())
    assert "not known" in text and "no run" in text


def test_noise_has_sections_of_its_own(tmp_path):
    plan = StudyPlan(load(tmp_path, noise={"none": {}, "heavy": {"keys": ["optim.clip=0.5"]}}))
    text = describe_study(study_of(plan), about=about())
    assert "## Claims under noise none" in text and "## Claims under noise heavy" in text
    assert "figures/loss_tokens-heavy.png" in text and "noise heavy: optim.clip=0.5" in text


# --- tables and figures -------------------------------------------------------------------------------


def test_tables_have_a_row_for_every_run(plan, tmp_path):
    study = study_of(plan)
    run = plan.tuning_runs()[0]
    curve = ((0, 5.0), (512, math.nan))
    broken = result(plan, run, math.nan, curve=curve, status=DIVERGED, error="not finite")
    write_tables(StudyResults(plan, {**study.results, run: broken}), tmp_path, about={"study": "s"})
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27 and [row["phase"] for row in rows] == [TUNING] * 18 + [REPORT] * 9
    muon = next(row for row in rows if row["rule"] == "muon" and row["seed"] == "2")
    assert (muon["validation_loss"], muon["tuning_loss"], muon["lr"]) == ("3.1", "3.11", "0.04")
    assert (muon["width"], muon["noise"], muon["tokens"], muon["status"]) == ("w64", "none", "4096", FINISHED)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["study"] == "s" and len(written["runs"]) == 27
    [found] = [row for row in written["runs"] if row["status"] == DIVERGED]
    assert found["validation_loss"] is None and found["curve"] == [[0, 5.0], [512, None]]
    assert found["error"] == "not finite"


@pytest.mark.parametrize("num_report", [0, 3])
def test_figures_are_drawn_of_what_there_is(plan, tmp_path, num_report):
    paths = plot_study(study_of(plan, num_report=num_report), tmp_path / "figures")
    names = ["loss_tokens", "loss_rate", "tokens_to_reference", "final_losses", "loss_costs"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


def test_without_a_reference_no_tokens_are_counted(tmp_path):
    plan = StudyPlan(load(tmp_path, claims={}))
    assert "Tokens to" not in describe_study(study_of(plan), about=about())
    assert len(plot_study(study_of(plan), tmp_path / "figures")) == 4
