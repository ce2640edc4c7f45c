"""The launcher bench without its runs: statistics, command lines, the baseline's name, what it refuses."""

import json
from pathlib import Path

import pytest

from cluster import files
from cluster.measure import benchmark
from training import config as training_config
from training.bench import launchers as bench
from training.bench.command import main
from training.bench.launchers import LAUNCHERS, SETTLING_STEPS, LaunchTimes
from training.plan import make_plan

TINY = [
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.ffn_size=128",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.vocab_size=320",
    "batch.tokens=1024",
    "batch.sequence_length=64",
    "schedule.tokens=8192",
]

# torchrun / Ray: 1.1, 1.0 and 0.8 in the steady step; 0.5, 0.4 and 0.75 to the first.
ROUNDS = [
    {"ray": LaunchTimes(20.0, 1.0), "torchrun": LaunchTimes(10.0, 1.1)},
    {"ray": LaunchTimes(30.0, 3.0), "torchrun": LaunchTimes(12.0, 3.0)},
    {"ray": LaunchTimes(40.0, 2.0), "torchrun": LaunchTimes(30.0, 1.6)},
]


def test_the_steady_step_is_the_median_without_the_first_steps():
    slow = [{"step": step, "step_seconds": 100.0} for step in range(1, SETTLING_STEPS + 1)]
    steady = [{"step": SETTLING_STEPS + 1 + i, "step_seconds": s} for i, s in enumerate((3.0, 1.0, 9.0))]
    assert bench.steady_step_seconds([{"step": 0, "validation_loss": 9.0}, *slow, *steady]) == 3.0


def test_ratios_are_taken_within_a_round_and_their_median_and_spread_are_reported():
    found = bench.compare(ROUNDS)
    assert found["speedup_torchrun_step"] == pytest.approx(1.0)
    assert found["spread_torchrun_step"] == pytest.approx([0.8, 1.1])
    assert found["speedup_torchrun_first_step"] == pytest.approx(0.5)
    assert found["spread_torchrun_first_step"] == pytest.approx([0.4, 0.75])
    assert found["first_step_seconds_ray"] == 30.0
    assert found["spread_first_step_seconds_torchrun"] == [10.0, 30.0]
    assert (found["step_seconds_ray"], found["step_seconds_torchrun"]) == (2.0, 1.6)
    assert found["overhead_ray_percent"] == pytest.approx(0.0)


def test_the_overhead_is_positive_where_ray_is_slower():
    found = bench.compare([{"ray": LaunchTimes(1.0, 1.03), "torchrun": LaunchTimes(1.0, 1.0)}])
    assert found["overhead_ray_percent"] == pytest.approx(3.0)
    assert found["speedup_torchrun_step"] < 1


def test_the_table_has_a_line_for_every_median_and_the_overhead():
    lines = "\n".join(map(str, bench.table({"rounds": 3, **bench.compare(ROUNDS)}))).splitlines()
    assert len(lines) == 1 + 6 + 1
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert cells["step_seconds_ray"] == ["2.000", "1.000", "3.000"]
    assert cells["overhead_ray_percent"] == ["+0.00"]


def test_both_commands_run_the_same_keys_in_a_folder_of_their_own():
    keys = ["a.b=1", "c.d=2"]
    ray, torchrun = (
        bench.command_line(name, keys, num_workers=3, folder=Path("/tmp/x")) for name in LAUNCHERS
    )
    own = ["run.directory=/tmp/x/outputs"]
    assert ray[1:] == ["-m", "training.launch", *keys, "launcher=ray", "run.name=ray", *own]
    assert torchrun[1:4] == ["-m", "torch.distributed.run", "--nproc-per-node=3"]
    assert torchrun[4].startswith("--master-port=") and int(torchrun[4].partition("=")[2]) > 1023
    assert torchrun[5:] == [
        "-m", "training.launch", *keys, "launcher=torch", "run.name=torchrun", *own
    ]  # fmt: skip


def test_the_defaults_are_a_short_run_that_evaluates_only_at_its_ends():
    config = training_config.load(dotlist=bench.run_keys(["batch.tokens=16384"]))
    num_steps = make_plan(config).num_steps
    assert SETTLING_STEPS < num_steps == bench.NUM_STEPS
    assert num_steps < min(config.evaluation.every_steps, config.checkpoint.every_steps)
    assert config.record.wandb == "disabled" and config.record.every_steps == 1


def test_launchers_take_turns_in_going_first(monkeypatch):
    order = []

    def one_run(name, *_, **__):
        order.append(name)
        return LaunchTimes(1.0, 1.0)

    monkeypatch.setattr(bench, "one_run", one_run)
    plan = make_plan(training_config.load(dotlist=TINY))
    rounds = bench.measure(plan, [], num_rounds=3)
    assert order == ["ray", "torchrun", "torchrun", "ray", "ray", "torchrun"]
    assert [set(runs) for runs in rounds] == [set(LAUNCHERS)] * 3


def test_the_baseline_is_named_after_the_hardware():
    path = benchmark.baseline_path({"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu_cores": 2}, bench.WHAT)
    assert path.parts[-3:-1] == ("tests", "baselines")
    assert path.name == "intel-r-xeon-r-cpu-2-20ghz-2-cores_train_launcher.json"


def test_the_ceiling_is_measured_for_the_models_products():
    config = training_config.load(dotlist=[*TINY, "precision=fp32"])
    gflops, dtype = bench.gemm_gflops(config, make_plan(config))
    assert dtype == "float32"
    assert 0 < gflops < 1e5


def test_the_last_line_is_the_result_and_the_file_adds_where_it_comes_from(tmp_path, monkeypatch, capsys):
    class NoManifest:
        fingerprint = "f00d"

    monkeypatch.setattr(bench, "prepare", lambda config, report: tmp_path)
    monkeypatch.setattr(bench.Manifest, "read", lambda folder: NoManifest)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: ROUNDS)
    monkeypatch.setattr(bench, "gemm_gflops", lambda config, plan: (50.0, "float32"))
    output = tmp_path / "new" / "result.json"
    assert main(["--rounds", "3", "--output", str(output), *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ceiling: 50.0 GFLOP/s") and lines[1].startswith("floor:")
    result, written = json.loads(lines[-1]), files.read_json(output)
    assert written.pop("provenance")["data_fingerprint"] == "f00d"
    assert written == result
    plan = make_plan(training_config.load(dotlist=TINY))
    assert result["floor_step_seconds"] == pytest.approx(plan.flops_per_token * 1024 / (2 * 50e9))
    assert result["arguments"] == ["schedule.tokens=14336", *bench.DEFAULTS, *TINY]
    assert result["steps_per_run"] == 8  # what is given replaces what the bench would choose
    assert set(result) == {
        *("bench", "arguments", "rounds", "num_workers", "num_parameters", "tokens_per_step"),
        *("steps_per_run", "load_average_before", "gemm_dtype", "gemm_gflops_per_worker"),
        *("floor_step_seconds", "overhead_ray_percent"),
        *(f"{kind}_torchrun_{case}" for kind in ("speedup", "spread") for case in ("step", "first_step")),
        *(f"{case}_seconds_{name}" for case in ("step", "first_step") for name in LAUNCHERS),
        *(f"spread_{case}_seconds_{name}" for case in ("step", "first_step") for name in LAUNCHERS),
    }


def test_a_dry_run_prints_both_commands_and_runs_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "bench", lambda *_, **__: pytest.fail("it ran"))
    file = tmp_path / "c.yaml"
    file.write_text("zero:\n  stage: 2\n")
    assert main(["--dry-run", "--config", str(file), *TINY]) == 0
    ray, torchrun = capsys.readouterr().out.splitlines()[-2:]
    assert f"training.launch --config {file}" in ray and "launcher=ray" in ray
    assert "torch.distributed.run" in torchrun and "launcher=torch" in torchrun


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--rounds", "0"], "--rounds: 0"),
        (["launcher=torch"], "launcher=torch: leave it out"),
        (["run.name=x"], "run.name=x: leave it out"),
        (["batch.tokens=8192", "schedule.tokens=32768"], "schedule.tokens: makes 4 steps"),
        (["batch.tokns=1"], "unknown key 'batch.tokns'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, names, capsys):
    assert main(["--dry-run", *arguments]) == 2
    assert names in capsys.readouterr().err
