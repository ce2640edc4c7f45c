"""A study without running it: configuration, runs and names, resumption, choices, claims, report, tables."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest

from cluster import config as layered
from cluster.config import ConfigError
from training import config as training_config
from training.study import command
from training.study.config import RuleConfig, StudyConfig
from training.study.config import load as load_study
from training.study.plan import StudyPlan, describe_plan
from training.study.plots import plot_study
from training.study.report import (
    About,
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
    NOT_RUN,
    Choice,
    Result,
    RunFailure,
    Spread,
    StudyResults,
    TokenRatio,
    choose,
    difference,
    divergence,
    mean_curve,
    read_result,
    token_ratio,
    tokens_to,
    write_tables,
)
from training.study.runs import REPORT, TUNING, StudyRun, is_finished

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


@pytest.fixture
def fresh(tmp_path: Path) -> StudyPlan:
    """The study's plan, in a folder of its own."""
    return StudyPlan(load(tmp_path))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> StudyPlan:
    """The same for tests that write no run: it keeps the configurations that it has loaded."""
    return StudyPlan(load(tmp_path_factory.mktemp("study")))


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
    return Result(
        run, plan.configs.of(run).run.name, status, loss, loss + 0.01, BUDGET, 2.0, error, "c0ffee", curve
    )  # fmt: skip


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


# --- configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotlist", "message"),
    [
        (["nme=x"], "unknown key 'nme'"),
        (
            ["rules.muon.gird=[1]"],
            "unknown key 'rules.muon.gird'; keys here: keys, grid, vector_ratios, title",
        ),
        (["rules=3"], "rules: is a mapping of names to RuleConfig"),
        (["name=a/b"], "name: 'a/b' must be letters"),
        (
            ["rules.muon.grid=[0.1]"],
            "rules: the grids have unequal numbers of points (adamw 3, muon 1, scion 3)",
        ),
        (["rules.muon.grid=[]"], "rules.muon.grid: is empty"),
        (
            ["rules.muon.grid=[0.1,0.2,0.2]"],
            "rules.muon.grid: [0.1, 0.2, 0.2] must be positive and ascending",
        ),
        (["rules.muon.grid=[0,0.2,0.3]"], "rules.muon.grid: [0.0, 0.2, 0.3] must be positive"),
        (["rules.muon.grid=[a]"], "could not be converted to Float"),
        (["rules.muon.vector_ratios=[0]"], "rules.muon.vector_ratios: [0.0] must be positive"),
        (["rules.muon.vector_ratios=[1,2]"], "unequal numbers of points (adamw 3, muon 6, scion 3)"),
        (["seeds=[]"], "seeds: is empty"),
        (["seeds=[1,1]"], "seeds: [1, 1] names one twice"),
        (["tuning_seed=2"], "tuning_seed: 2 is one of seeds=[1, 2, 3]"),
        (
            ["common_keys=[run.seed=3]"],
            "common_keys: run.seed=3: leave it out; the study sets run.seed itself",
        ),
        (["rules.muon.keys=[optim.matrix.lr=3]"], "rules.muon.keys: optim.matrix.lr=3: leave it out"),
        (["noise.x.keys=[clip]"], "noise.x.keys: 'clip': expected key=value"),
        (["noise.a-b.keys=[]"], "noise: the name 'a-b' must be letters"),
        (["claims.reference=sgd"], "claims.reference: 'sgd' is not one of the rules: adamw, muon, scion"),
        (["claims.token_ratio=0"], "claims.token_ratio: must lie in (0, 1]"),
        (["wandb=maybe"], "wandb: 'maybe' is not one of"),
        (["parallel_runs=0"], "parallel_runs: must be at least 1"),
        (["cpus_per_run=0"], "cpus_per_run: must be positive"),
        (["gpus_per_run=2"], "gpus_per_run: 2 is not one of: 0, 1"),
    ],
)
def test_a_configuration_that_makes_no_study_is_refused(tmp_path, dotlist, message):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, *dotlist)
    assert message in str(raised.value)


def test_without_rules_or_widths_there_is_no_study(tmp_path):
    for section in ("rules", "widths"):
        with pytest.raises(ConfigError, match=f"{section}: is empty"):
            load(tmp_path, **{section: {}, "claims": {}})


def test_unequal_grids_can_be_allowed_and_the_report_says_so(tmp_path):
    plan = StudyPlan(load(tmp_path, "rules.muon.grid=[0.1]", "equal_effort=false"))
    text = describe_study(StudyResults(plan, {}), about=about())
    assert "allowed to be unequal: points per grid are AdamW 3, Muon 1, scion 3" in text


def test_a_wrong_key_of_a_run_is_named_with_its_rule(tmp_path):
    plan = StudyPlan(load(tmp_path, "rules.muon.keys=[optim.matrix.momentom=0.9]"))
    with pytest.raises(ConfigError, match=r"rule 'muon', width 'w64': .*unknown key 'optim.matrix.momentom'"):
        plan.check()


def test_rates_must_be_chosen_on_sequences_of_their_own(tmp_path):
    plan = StudyPlan(load(tmp_path, "smoke=true", smoke_keys=["evaluation.tuning_sequences=0"]))
    with pytest.raises(ConfigError, match=r"tuning_sequences must be above 0"):
        plan.check()


@pytest.mark.parametrize("pair", ["data.vocab_size=400", "evaluation.sequences=9", "schedule.tokens=512"])
def test_the_runs_of_a_study_are_measured_alike(tmp_path, pair):
    plan = StudyPlan(load(tmp_path, f"rules.muon.keys=[{pair}]"))
    with pytest.raises(ConfigError, match="must be measured alike"):
        plan.check()


def test_the_miniature_is_smaller_and_lies_elsewhere(tmp_path):
    full, small = StudyPlan(load(tmp_path)), StudyPlan(load(tmp_path, "smoke=true"))
    assert small.config.seeds == (1, 2) and {len(r.grid) for r in small.config.rules.values()} == {2}
    assert small.config.study_directory == tmp_path / "s-smoke" != full.config.study_directory
    assert small.plan_of(small.tuning_runs()[0]).num_steps == 2
    assert full.plan_of(full.tuning_runs()[0]).num_steps == 8
    text = describe_study(StudyResults(small, {}), about=about())
    assert "This is the miniature" in text and "schedule.tokens=1024" in text and "2 seed(s) make no" in text


# --- runs ---------------------------------------------------------------------------------------------


def test_every_rule_is_tuned_on_every_width_with_one_seed_that_no_claim_uses(plan):
    runs = plan.tuning_runs()
    assert len(runs) == len(set(runs)) == 3 * 3 * 2
    assert {run.seed for run in runs} == {0} and {run.phase for run in runs} == {TUNING}
    assert [run.width for run in runs] == ["w64"] * 9 + ["w32"] * 9  # the longest first
    assert {run.lr for run in runs if run.rule == "muon"} == {0.01, 0.02, 0.04}


def test_other_noise_is_tuned_on_the_widest_only(tmp_path):
    plan = StudyPlan(load(tmp_path, noise={"none": {}, "heavy": {"keys": ["optim.clip=0.5"]}}))
    assert plan.settings == [("none", "w64"), ("heavy", "w64"), ("none", "w32")]
    runs = plan.tuning_of(noise="heavy", width="w64", rule="muon")
    assert [plan.configs.of(run).optim.clip for run in runs] == [0.5] * 3
    assert runs[0].label == "muon-w64-heavy-lr0.01-x0.1-seed0"
    assert len(plan.typical_runs()) - len(plan.tuning_runs()) == 2 * 3 * 3


def test_a_run_is_configured_as_its_command_line_says(plan):
    report = plan.report_runs("muon", lr=0.03, vector_ratio=0.1, noise="none")
    for run in (plan.tuning_runs()[4], report[1]):
        config = plan.configs.of(run)
        assert training_config.load(dotlist=plan.configs.arguments(run)) == config
        assert config.optim.matrix.lr == run.lr and config.run.seed == run.seed
        assert config.launcher == "torch" and config.workers.count == 1
        assert (
            config.record.group == "s" and config.run_directory.parent == plan.config.study_directory / "runs"
        )
    assert config.optim.vector.lr == pytest.approx(0.003)
    assert config.model.hidden_size == 64 and config.model.num_heads == 4


def test_a_changed_key_makes_another_run_and_where_it_is_kept_does_not(tmp_path):
    def name(*dotlist: str) -> str:
        plan = StudyPlan(load(tmp_path, *dotlist))
        return plan.configs.of(plan.tuning_runs()[0]).run.name

    assert name() == name("project=p", "wandb=disabled", "directory=/elsewhere", "seeds=[5]")
    assert name().startswith("adamw-w64-lr0.001-seed0-")
    names = {name(), name("rules.adamw.vector_ratios=[2]"), name("rules.adamw.keys=[optim.clip=2]"),
             name("widths.w64.num_kv_heads=2"), name("tuning_keys=[evaluation.every_steps=7]")}  # fmt: skip
    assert len(names) == 5


def test_the_plan_says_what_is_to_come(plan):
    text = describe_plan(plan, {}, parallel=2)
    assert "27 = 18 tuning + 9 report" in text and "4,096 in 8 steps" in text
    assert "assuming 40 GFLOP/s per CPU" in text
    text = describe_plan(plan, {"w32": 30.0, "w64": 60.0}, parallel=2)
    assert f"about {(9 * 30 + 18 * 60) / 2 / 60:.0f} minutes in all, as measured" in text


# --- resumption ---------------------------------------------------------------------------------------


def leave(
    plan: StudyPlan, run: StudyRun, *, loss: float | None = 3.0, summary: bool = True, start: float = 5.0
) -> Path:
    """The files that a run leaves in its directory."""
    directory = plan.configs.directory(run)
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(layered.to_yaml(plan.configs.of(run)))
    rows = [{"step": 0, "tokens": 0, "validation_loss": start}, {"step": 4, "tokens": 2048, "loss": 4.0}]
    rows.append({"step": 8, "tokens": BUDGET, "validation_loss": loss})
    if loss is None:
        rows[-1]["validation_loss_nonfinite"] = "nan"
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (directory / "provenance.json").write_text('{"commit": "c0ffee", "dirty": true}')
    if summary:
        content = {"validation_loss": loss, "tuning_loss": 3.1, "tokens": BUDGET, "wall_seconds": 7.0}
        (directory / "summary.json").write_text(json.dumps(content))
    return directory


def test_a_run_is_finished_by_its_summary_under_its_very_configuration(fresh, tmp_path):
    run = fresh.tuning_runs()[0]
    assert not is_finished(fresh.configs.directory(run))
    directory = leave(fresh, run, summary=False)
    assert not is_finished(directory)
    (directory / "summary.json").write_text("{}")
    assert is_finished(directory)
    other = StudyPlan(load(tmp_path, "rules.adamw.keys=[optim.matrix.rule=adamw,optim.clip=0.5]"))
    assert not is_finished(other.configs.directory(run)) and run.label in other.configs.directory(run).name


def test_a_finished_run_is_read_from_its_files(fresh):
    run = fresh.tuning_runs()[0]
    leave(fresh, run)
    found = read_result(fresh, run)
    assert found.ok and (found.validation_loss, found.tuning_loss, found.tokens) == (3.0, 3.1, BUDGET)
    assert (
        found.curve == ((0, 5.0), (BUDGET, 3.0)) and found.commit == "c0ffee+dirty" and found.seconds == 7.0
    )


def test_what_did_not_finish_is_told_apart(fresh):
    run, other, third, fourth = fresh.tuning_runs()[:4]
    assert read_result(fresh, run).status == NOT_RUN
    leave(fresh, other, summary=False)
    failed = read_result(fresh, other, RunFailure(1, "error: disk full"))
    assert failed.status == FAILED and failed.error == "exit code 1: error: disk full" and not failed.ok
    leave(fresh, third, loss=None)
    assert read_result(fresh, third).status == DIVERGED
    leave(fresh, fourth, loss=5.5)
    worse = read_result(fresh, fourth)
    assert worse.status == DIVERGED and "5.500 is not below 5.000" in worse.error


@pytest.mark.parametrize(
    ("loss", "diverged"), [(4.9, False), (5.0, True), (math.nan, True), (math.inf, True)]
)
def test_divergence(loss, diverged):
    assert (divergence(loss, start=5.0) is not None) == diverged


def test_report_runs_wait_for_all_tuning_runs_of_their_rule_on_the_widest_width(plan):
    whole = study_of(plan, num_report=0)
    assert StudyResults(plan, {}).next_runs() == plan.tuning_runs()
    results = dict(whole.results)
    for run in plan.tuning_of(noise="none", width="w32"):
        del results[run]
    last = plan.tuning_of(noise="none", width="w64", rule="muon")[-1]
    del results[last]
    due = StudyResults(plan, results).next_runs()
    report = [run for run in due if run.phase == REPORT]
    assert last in due and {run.rule for run in report} == {"adamw", "scion"}
    assert {(run.lr, run.width) for run in report if run.rule == "adamw"} == {(0.002, "w64")}
    assert [run.seed for run in report if run.rule == "adamw"] == [1, 2, 3]
    assert study_of(plan).next_runs() == []


def test_a_failed_run_does_not_hold_the_others_up_and_a_rule_without_a_rate_has_no_report_run(plan):
    results = dict(study_of(plan, num_report=0).results)
    for run in plan.tuning_of(noise="none", width="w64", rule="adamw"):
        results[run] = result(plan, run, 9.0, status=FAILED)
    study = StudyResults(plan, results)
    assert {run.rule for run in study.next_runs()} == {"muon", "scion"}
    assert "adamw" in study.rules_without_a_result()
    assert study_of(plan).rules_without_a_result() == []


def test_finished_runs_are_taken_in_and_lead_to_the_next_without_being_made_again(fresh):
    for run in fresh.tuning_runs():
        directory = leave(fresh, run)
        (directory / "checkpoints").mkdir()
    results: dict = {}
    left = command._read_finished(fresh, results)
    assert set(results) == set(fresh.tuning_runs())
    assert len(left) == 9 and {run.phase for run in left} == {REPORT}
    assert not (directory / "checkpoints").exists()
    leave(fresh, left[0])
    assert len(command._read_finished(fresh, results, running={left[1]})) == 7
    assert left[0] in results


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


def about() -> About:
    host = {"cpu": "Abacus", "cpu_cores": 2}
    provenance = {"commit": "c0ffee", "dirty": False, "packages": {"torch": "2.13.0"}, "host": host}
    return About(command="python -m training.study name=s", data_fingerprint="f" * 64, provenance=provenance)


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
    assert [path.name for path in paths] == ["loss_tokens.png", "loss_rate.png", "tokens_to_reference.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


def test_without_a_reference_no_tokens_are_counted(tmp_path):
    plan = StudyPlan(load(tmp_path, claims={}))
    assert "Tokens to" not in describe_study(study_of(plan), about=about())
    assert len(plot_study(study_of(plan), tmp_path / "figures")) == 2


# --- the command's small parts ------------------------------------------------------------------------


def test_the_last_step_is_that_of_the_last_whole_row(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert command.last_step(metrics) == 0
    rows = "".join(f'{{"step": {i}, "filling": "{"x" * 50}"}}\n' for i in range(300))
    metrics.write_text(rows + '{"step": 300, "fil')
    assert command.last_step(metrics) == 299
    metrics.write_text('{"step"')
    assert command.last_step(metrics) == 0


def test_the_last_words_of_a_log_are_its_error(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("step 1\nerror: old\n--- again\nstep 2\nerror: the disk\nis full\n\n")
    assert command.last_lines(log) == "error: the disk | is full"
    log.write_text("".join(f"line {i}\n" for i in range(20)))
    assert command.last_lines(log).split(" | ") == [f"line {i}" for i in range(12, 20)]


def test_runs_at_once_follow_the_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert command.parallel_runs(load(tmp_path)) == 6
    assert command.parallel_runs(load(tmp_path, "cpus_per_run=4")) == 1
    assert command.parallel_runs(load(tmp_path, "parallel_runs=3")) == 3
