"""A study without running it: configuration, runs and names, resumption."""

import json
import math
from pathlib import Path

import pytest

from cluster import config as layered
from cluster.config import ConfigError
from tests.training.study.made_up import BUDGET, about, load, result, study_of
from training import config as training_config
from training.study import command
from training.study.plan import StudyPlan, describe_plan
from training.study.report import (
    describe_study,
)
from training.study.results import (
    DIVERGED,
    FAILED,
    NOT_RUN,
    RunFailure,
    StudyResults,
    divergence,
    read_result,
)
from training.study.runs import REPORT, TUNING, StudyRun, is_finished

# --- configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotlist", "message"),
    [
        (["nme=x"], "unknown key 'nme'"),
        (["only=[muons]"], "only: 'muons' is not one of adamw, muon, scion, w"),
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
    text = str(describe_plan(plan, {}, parallel=2))
    assert "27 = 18 tuning + 9 report" in text and "4,096 in 8 steps" in text
    assert "assuming 40 GFLOP/s per CPU" in text
    text = str(describe_plan(plan, {"w32": 30.0, "w64": 60.0}, parallel=2))
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
