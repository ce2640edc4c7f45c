"""The optimizer's bench: statistics, forecasts by hand, refusals, and one tiny race of each kind."""

import json

import pytest
import torch
import torch.distributed as dist

from cluster import files
from cluster.cli import RunError
from cluster.measure import benchmark, hardware
from cluster.session import worker_environment
from optim.bench import command as bench
from optim.bench import contenders, share, step_race, zero_race
from optim.bench.share import layers
from optim.bench.step_race import StepRace
from optim.bench.traffic import Traffic
from optim.bench.zero_race import ZeroRace
from tests.ranks import spawn
from training.model.shapes import SHAPES

SIMPLE = {"peak_flops": 1000.0, "memory_bytes_per_s": 100.0}
PLAIN = {**SIMPLE, "link_bytes_per_s": 10.0, "mfu": 0.5, "fraction_of_peak": 0.25}

EVERYONE = contenders.contenders(2)
# Two rounds. Added: null 1 and 2, ours 2 and 4, one DeepSpeed 6 and 6, the other 8 and 20, AdamW 1 and 1.
RACE = ZeroRace(
    gflops=10.0,
    whole={
        "null": [5.0, 6.0],
        "ours": [6.0, 8.0],
        "deepspeed_muon_standard": [10.0, 10.0],
        "deepspeed_muon_gram": [12.0, 24.0],
        "adamw": [5.0, 5.0],
    },
    backward={name: [4.0, 4.0] if name == "null" else [9.0, 9.0] for name in EVERYONE},
    phases={"start": [0.1, 0.3], "orthogonalize": [1.0, 2.0]},
    sent=dict.fromkeys(EVERYONE, 2e6),
    newton_schulz=dict.fromkeys(EVERYONE, 70),
    differences={"deepspeed_muon_standard": 0.01},
)


# --- statistics and tables --------------------------------------------------------------------------------


def test_what_is_added_is_the_whole_less_the_backward_of_null_in_the_same_round():
    found = bench.zero_result("c", RACE, EVERYONE)
    assert found["ms_ours_added_c"] == 3000.0 and found["spread_ms_ours_added_c"] == [2000.0, 4000.0]
    assert found["ms_ours_backward_step_c"] == 7000.0
    assert found["spread_deepspeed_muon_standard_c"] == [1.5, 3.0]
    assert found["speedup_deepspeed_muon_standard_c"] == 2.25
    assert found["speedup_deepspeed_muon_gram_c"] == 4.5
    assert found["speedup_adamw_c"] == pytest.approx(0.375)
    assert "speedup_null_c" not in found and "speedup_ours_c" not in found
    assert found["ms_start_ours_c"] == pytest.approx(200.0)


def test_deepspeeds_muon_counts_by_its_contender_that_comes_closest():
    found = bench.zero_result("c", RACE, EVERYONE)
    assert found["closest_deepspeed_muon_c"] == "deepspeed_muon_standard"
    assert (found["speedup_deepspeed_muon_c"], found["spread_deepspeed_muon_c"]) == (2.25, [1.5, 3.0])


def test_a_contender_is_compared_with_ours_under_its_own_configuration():
    everyone = contenders.contenders(1)
    assert [name for name, c in everyone.items() if c.kind == "null"] == ["null", "null_bf16_optimizer"]
    other = {f"{name}_bf16_optimizer": values for name, values in RACE.whole.items()}
    other["ours_bf16_optimizer"] = [14.0, 14.0]  # 10 are added, by its own null
    race = ZeroRace(
        whole=RACE.whole | other,
        backward=RACE.backward | {f"{name}_bf16_optimizer": [4.0, 4.0] for name in EVERYONE},
    )
    found = bench.zero_result("c", race, everyone)
    assert found["speedup_deepspeed_muon_standard_c"] == 2.25
    assert found["speedup_deepspeed_muon_standard_bf16_optimizer_c"] == pytest.approx(0.6)
    assert found["closest_deepspeed_muon_c"] == "deepspeed_muon_standard_bf16_optimizer"


def test_who_cannot_run_has_none_for_every_figure_and_no_line():
    whole = {name: values for name, values in RACE.whole.items() if not name.startswith("deepspeed")}
    race = ZeroRace(whole=whole, backward=RACE.backward, sent=RACE.sent, newton_schulz=RACE.newton_schulz)
    race.skipped = {"deepspeed_muon_standard": "no compiler", "deepspeed_muon_gram": "no compiler"}
    found = bench.zero_result("c", race, EVERYONE)
    for name in ("deepspeed_muon", "deepspeed_muon_standard", "deepspeed_muon_gram"):
        assert found[f"speedup_{name}_c"] is None and found[f"spread_{name}_c"] is None
    assert found["closest_deepspeed_muon_c"] is None
    assert found["skipped_c"]["deepspeed_muon_gram"] == "no compiler"
    lines = str(bench.contest_table("c", found, EVERYONE)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["null", "ours", "adamw"]


def test_a_round_in_which_ours_took_no_time_stops_the_bench():
    race = ZeroRace(whole=RACE.whole | {"ours": [4.0, 8.0]}, backward=RACE.backward)
    with pytest.raises(RunError, match="too busy"):
        bench.zero_result("c", race, EVERYONE)


def test_the_contest_table_has_what_is_added_the_ratio_the_bytes_and_the_count():
    table = str(bench.contest_table("c", bench.zero_result("c", RACE, EVERYONE), EVERYONE))
    cells = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert cells["ours"] == ["3000.0", "2000.0", "4000.0", "-", "-", "-", "2.00", "70"]
    ratio = ["2.25", "1.50", "3.00"]
    assert cells["deepspeed_muon_standard"] == ["6000.0", "6000.0", "6000.0", *ratio, "2.00", "70"]
    assert len(set(map(len, table.splitlines()))) == 1


def test_whole_steps_are_compared_by_variant():
    race = StepRace({"ours": [1.0, 2.0], "ours_x": [2.0, 2.0], "torch_muon": [3.0, 3.0]}, "torch_muon", 0.01)
    found = bench.step_result("c", race)
    assert (found["speedup_torch_muon_c"], found["spread_torch_muon_c"]) == (2.25, [1.5, 3.0])
    assert (found["speedup_torch_muon_c_x"], found["ms_ours_x_c"]) == (1.5, 2000.0)


def test_targets_are_met_or_not_met_by_the_median():
    result = {
        "speedup_torch_muon_step_10m": 1.2, "spread_torch_muon_step_10m": [0.9, 2.0],
        "speedup_deepspeed_muon_zero3_3ranks": 2.49, "spread_deepspeed_muon_zero3_3ranks": [2.0, 9.0],
        "speedup_deepspeed_muon_zero1_2ranks": None, "spread_deepspeed_muon_zero1_2ranks": None,
        "plan": {"NVIDIA A40": {"share_zero1": 0.005, "share_zero3": 0.0051}},
    }  # fmt: skip
    lines = str(bench.target_table(result)).splitlines()[1:]
    verdicts = [not line.endswith("not met") and line.endswith("met") for line in lines]
    assert verdicts == [True, False, True, False]
    assert bench.TARGETS == {
        "torch_muon_step_10m": 1.2, "torch_muon_step_100m": 1.2,
        "torch_fp32_step_10m": 1.3, "torch_fp32_step_100m": 1.3,
        "deepspeed_muon_zero1_2ranks": 1.5, "deepspeed_muon_zero1_3ranks": 1.5,
        "deepspeed_muon_zero2_2ranks": 1.5, "deepspeed_muon_zero2_3ranks": 1.5,
        "deepspeed_muon_zero3_2ranks": 2.5, "deepspeed_muon_zero3_3ranks": 2.5,
    }  # fmt: skip


def test_the_ceiling_is_printed_with_the_least_time_at_its_rate(capsys):
    # Of a 2 x 3 by symmetric products: 15 n²m + 5 n³ = 15*12 + 5*8.
    found = bench.ceiling("c", [(2, 3), (3, 2)], 2.0, "2 threads", dtype="fp32")
    assert found == {
        "gemm_gflops_c": 2.0, "gemm_dtype_c": "fp32", "floor_ms_c": pytest.approx(1e3 * 440 / 2e9)
    }  # fmt: skip
    assert capsys.readouterr().out.startswith("ceiling: 2 GFLOP/s in fp32 products")


@pytest.mark.parametrize("difference", [0.051, float("nan")])
def test_contenders_that_do_other_work_are_not_compared(difference):
    bench.require_same_work("c", {"peer": 0.05})
    with pytest.raises(RunError, match="ours and of peer differ"):
        bench.require_same_work("c", {"peer": difference})


# --- forecasts --------------------------------------------------------------------------------------------


def test_the_models_elements_and_flops_are_those_that_training_counts():
    shape = SHAPES["llama-1b4"]
    for length in (1024, 2048):
        assert share.train_flops_1b4(length) == shape.flops_per_token(length)
    counts = {size: share.MATRICES_1B4.count(size) for size in share.MATRICES_1B4}
    assert counts == shape.matrices()


def test_a_forecast_on_one_gpu_by_hand():
    # Four 2 x 2, two 4 x 2 and a 2 x 4: 40 elements. Orthogonalised by 20 n³ = 160 and 6 n²m + 20 n³ = 256.
    found = share.estimate(layers(2, 4, 1), train_flops=3 * 396, num_gpus=1, **PLAIN)
    assert found["train_ms"] == pytest.approx(1e3 * 3 * 396 / (0.5 * 1000))
    assert found["owned_flops"] == 4 * 160 + 3 * 256
    assert found["orthogonalize_ms"] == pytest.approx(1e3 * (4 * 160 + 3 * 256) / (0.25 * 1000))
    assert found["passes_ms"] == pytest.approx(1e3 * 24 * 40 / 100)
    assert found["adamw_ms"] == pytest.approx(1e3 * 28 * 40 / 100)
    assert found["exchange_zero1_ms"] == found["exchange_zero3_ms"] == 0
    cost = found["orthogonalize_ms"] + found["passes_ms"]
    assert found["share_zero1"] == found["share_zero3"] == pytest.approx(cost / (cost + found["train_ms"]))


def test_the_exchange_between_two_gpus_by_hand():
    """Seven 4 x 4: the border between the shards halves the fourth. ZeRO-3 halves them all."""
    found = share.estimate(layers(4, 4, 1), train_flops=600, num_gpus=2, **PLAIN)
    assert found["shard_elements"] == 7 * 16 / 2 and found["owned_flops"] == 4 * 20 * 4**3
    assert found["sent_bytes_zero1"] == 2 * 8  # half a matrix, to its owner or back
    # Four halves go back to where the weights lie, three halves go to the owner.
    assert found["sent_bytes_zero3"] == 2 * (4 + 3) * 8
    assert found["exchange_zero3_ms"] == pytest.approx(1e3 * 2 * 56 / 10)
    cost = found["orthogonalize_ms"] + found["passes_ms"] + found["exchange_zero3_ms"]
    assert found["share_zero3"] == pytest.approx(cost / (cost + found["train_ms"]))


def test_the_1b4_on_eight_a40_by_hand():
    """12 squares and 9 rectangles per GPU, 3 whole layers in each shard of ZeRO-1: nothing travels."""
    sheet = hardware.lookup("NVIDIA A40")
    assumed = bench.Assumptions()
    found = bench.plan_case(assumed)["NVIDIA A40"]
    n, m, peak = 2048, 5504, sheet.bf16_tflops * 1e12
    assert found["owned_flops"] == 12 * 20 * n**3 + 9 * (6 * n * n * m + 20 * n**3)
    assert found["orthogonalize_ms"] == pytest.approx(54.0, abs=0.05)
    shard = 3 * (4 * n * n + 3 * n * m)
    assert found["shard_elements"] == shard
    assert found["passes_ms"] == pytest.approx(1e3 * 24 * shard / 696e9)
    assert found["sent_bytes_zero1"] == 0
    assert found["sent_bytes_zero3"] == 2 * 2 * shard * 7 / 8  # in bf16, there and back, all but an eighth
    assert found["exchange_zero3_ms"] == pytest.approx(1e3 * found["sent_bytes_zero3"] / 20e9)
    assert found["train_ms"] == pytest.approx(
        1e3 * SHAPES["llama-1b4"].flops_per_token(2048) * 524288 / 8 / (0.4 * peak)
    )
    assert found["share_zero1"] == pytest.approx(0.0059, abs=1e-4)


def test_the_plan_prints_every_term_on_a_line_of_its_own_and_the_verdict(capsys):
    bench.plan_case(bench.Assumptions(fraction_of_peak=1.0, mfu=0.2))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    terms = ["train", "orthogonalize", "passes", "adamw", "exchange_zero1", "exchange_zero3"]
    assert [line[0] for line in lines] == ["NVIDIA", "a", *terms, "share,", "share,"] * 2
    assert lines[8][:3] == ["share,", "ZeRO-1", "0.19%"] and lines[8][-1] == "met"


def test_the_least_time_of_a_step_by_hand():
    assert share.floor_seconds([(2, 2), (2, 4)], **SIMPLE) == pytest.approx(
        (160 + 208) / 1000 + 24 * 12 / 100
    )


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--rounds", "0"], "--rounds: 0"),
        (["--cases", "step_10m,zero4"], "--cases: 'zero4' is not one of: step_10m"),
        (["--cases", ""], "--cases: '' is not one of"),
        (["--cases", "plan,gpu"], "--cases: gpu needs a CUDA device"),
        (["mfu=0"], "mfu: must lie in (0, 1], not 0.0"),
        (["fraction_of_peak=1.5"], "fraction_of_peak: must lie in (0, 1], not 1.5"),
        (["num_gpus=-1"], "num_gpus: must be positive, not -1"),
        (["link=3"], "unknown key 'link'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, names, capsys, monkeypatch):
    monkeypatch.setattr(bench, "has_cuda", lambda: False)
    monkeypatch.setattr(bench, "bench", lambda *_, **__: pytest.fail("it ran"))
    assert bench.main(arguments) == 2
    assert names in capsys.readouterr().err


@pytest.mark.parametrize("cuda", [False, True])
def test_by_default_all_cases_run_that_can(cuda, monkeypatch):
    monkeypatch.setattr(bench, "has_cuda", lambda: cuda)
    assert bench.choose_cases(None) == [case for case in bench.CASES if cuda or case != "gpu"]
    assert bench.choose_cases("plan,step_10m") == ["step_10m", "plan"]


def test_a_dry_run_lists_the_cases_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bench, "bench", lambda *_, **__: pytest.fail("it ran"))
    assert bench.main(["--dry-run", "--cases", "plan,zero1", "num_gpus=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "num_gpus: 16" in lines
    assert [line.split()[0] for line in lines[-2:]] == ["zero1", "plan"]


def test_a_failed_race_is_one_message_that_names_the_case(capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("a rank failed: out of memory")

    monkeypatch.setattr(zero_race, "race_zero", fail)
    assert bench.main(["--cases", "zero2", "--output", str(tmp_path / "x.json")]) == 1
    assert "error: zero2_2ranks: a rank failed: out of memory" in capsys.readouterr().err


def test_the_last_line_is_the_result_and_the_file_adds_where_it_comes_from(tmp_path, monkeypatch, capsys):
    races = []

    def race_zero(shapes, *, stage, world_size, num_rounds, environment):
        assert len(shapes) == 70 and environment["OMP_NUM_THREADS"] == "1"
        races.append((stage, world_size, num_rounds))
        return RACE

    seconds = {"ours": [1.0], "ours_polar_express": [1.0], "torch_muon": [1.5]}
    monkeypatch.setattr(step_race, "gemm_gflops", lambda shapes, device: 100.0)
    monkeypatch.setattr(step_race, "race_steps", lambda *_, **__: StepRace(seconds, "torch_muon", 0.02))
    monkeypatch.setattr(zero_race, "race_zero", race_zero)
    output = tmp_path / "new" / "result.json"
    given = ["--rounds", "2", "--cases", "step_100m,zero2,plan", "--output", str(output)]
    assert bench.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    result, written = json.loads(lines[-1]), files.read_json(output)
    assert result["compiled_step"] == step_race.compiled_step()
    assert written.pop("provenance")["packages"]["deepspeed"] == "0.19.8"
    assert written == result
    assert races == [(2, 2, 2), (2, 3, 2)]
    for key in ("torch_muon_step_100m", "deepspeed_muon_zero2_2ranks", "deepspeed_muon_zero2_3ranks"):
        low, high = result[f"spread_{key}"]
        assert low <= result[f"speedup_{key}"] <= high
    assert set(result["plan"]) == set(bench.PLANNED)
    case = lines.index(next(line for line in lines if line.startswith("step_100m")))
    assert lines[case + 1].startswith("ceiling: 100 GFLOP/s") and lines[case + 2].startswith("floor:")


def test_the_baseline_is_named_after_the_hardware():
    name = benchmark.baseline_path({"cpu": "AMD EPYC", "cpu_cores": 2}, "optim").name
    assert name == "amd-epyc-2-cores_optim.json"


# --- races ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("has_bf16", "peer"), [(True, "torch_muon"), (False, "torch_fp32")])
def test_ours_and_the_peer_take_turns_at_the_same_work(has_bf16, peer, monkeypatch):
    """On a CPU without bf16 arithmetic the peer is ours in torch, which the compiled step has no part in."""
    monkeypatch.setattr("optim.precision.cpu_has_bf16", lambda: has_bf16)
    shapes = [(32, 32), (48, 32), (32, 80)]
    methods = {"ours": "jordan", "ours_polar_express": "polar_express"}
    race = step_race.race_steps(shapes, methods, num_rounds=3, device=torch.device("cpu"))
    assert race.peer == peer
    assert set(race.seconds) == {"ours", "ours_polar_express", peer}
    assert all(len(values) == 3 and min(values) > 0 for values in race.seconds.values())
    assert 0 < race.difference < bench.MAX_DIFFERENCE
    with monkeypatch.context() as patch:  # with a clock on which everything takes a millisecond
        ticks = iter(range(1000))
        patch.setattr(step_race.time, "perf_counter", lambda: next(ticks) * 1e-3)
        found = step_race.gemm_gflops(shapes, torch.device("cpu"))
    flops = 2 * (32 * 32 * 32 + 32 * 48 * 32 + 32 * 32 * 80)
    assert found == pytest.approx(flops / 3e-3 / 1e9)


@pytest.mark.stack
def test_a_race_under_zero_on_real_ranks():
    """Two ranks, two matrices; the border between the shards cuts the second. Without torch.compile."""
    environment = {**worker_environment(gpu=False, threads=1), "TORCHDYNAMO_DISABLE": "1"}
    shapes = [(128, 128), (256, 128)]
    race = zero_race.race_zero(shapes, stage=1, world_size=2, num_rounds=2, environment=environment)
    everyone = contenders.contenders(1)
    muons = [name for name in everyone if name.startswith("deepspeed_muon")]
    assert len(muons) == 4 and race.compiled == 0 and race.gflops > 0
    if not step_race.multiplies_bf16(torch.device("cpu")):
        assert list(race.skipped) == muons and "multiplies in bf16" in race.skipped[muons[0]]
        everyone = {name: contender for name, contender in everyone.items() if name not in muons}
        muons = []
    else:
        assert race.skipped == {}
    for found in (race.whole, race.backward, race.sent, race.newton_schulz):
        assert set(found) == set(everyone)
    for name in everyone:
        whole, backward = race.whole[name], race.backward[name]
        assert len(whole) == len(backward) == 2
        assert all(w > b > 0 for w, b in zip(whole, backward, strict=True))
    assert set(race.phases) == {"start", "exchange", "orthogonalize", "finish"}

    assert set(race.differences) == set(muons)
    assert all(0 < difference < bench.MAX_DIFFERENCE for difference in race.differences.values())
    counts = race.newton_schulz
    assert counts["ours"] == counts["ours_bf16_optimizer"] == 2  # each matrix once
    assert {counts[name] for name in muons} <= {3}  # DeepSpeed does the cut one on both ranks
    assert counts["adamw"] == counts["null"] == 0
    # Everyone gathers the other rank's half of 49,152 bf16 weights. Ours sends a quarter of the second matrix
    # to its owner and back, in bf16, and all-reduces the square of its norm, in fp64.
    assert race.sent["null_bf16_optimizer"] == race.sent["adamw_bf16_optimizer"] == 2 * 24_576 * 2
    assert race.sent["ours_bf16_optimizer"] - race.sent["null_bf16_optimizer"] == 2 * 8_192 * 2 + 2 * 8


def use_collectives(context):
    """Bytes counted on this rank for each collective on 12 fp32 elements, and what a failed attempt says."""
    traffic, found, world = Traffic(), {}, context.world_size
    ours, everyone = torch.zeros(12), torch.zeros(12 * world)
    splits = [2 * world] + [(12 - 2 * world) // (world - 1)] * (world - 1)  # what goes to each rank
    received = torch.zeros(world * splits[context.rank])
    uses = {
        "all_reduce": lambda: dist.all_reduce(ours),
        "broadcast": lambda: dist.broadcast(ours, src=0),
        "reduce": lambda: dist.reduce(ours, dst=0),
        "all_gather": lambda: dist.all_gather(list(everyone.split(12)), ours),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(everyone, ours),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(ours, everyone),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.zeros(12), ours),
        "uneven": lambda: dist.all_to_all_single(received, ours, [splits[context.rank]] * world, splits),
    }
    for name, use in uses.items():
        with traffic.counting():
            use()
        found[name] = traffic.sent_bytes
    uses["all_reduce"]()  # not counted
    found["after"] = traffic.sent_bytes
    problem = zero_race._attempt(lambda: 1 / (context.rank - 1))
    return found, problem, zero_race._attempt(lambda: None)


@pytest.mark.stack
def test_bytes_are_counted_by_collective_and_a_problem_of_one_rank_is_known_to_all():
    results = spawn(use_collectives, world_size=3)
    for rank, (found, problem, none) in enumerate(results):
        assert found == {
            "all_reduce": 48 * 2 * 2 / 3,
            "broadcast": 48 * 2 / 3,
            "reduce": 48 * 2 / 3,
            "all_gather": 48 * 2,
            "all_gather_into_tensor": 48 * 2,
            "reduce_scatter_tensor": 3 * 48 * 2 / 3,
            "all_to_all_single": 48 * 2 / 3,
            "uneven": 48 - (24 if rank == 0 else 12),  # 6, 3 and 3 elements, of which its own stay
            "after": found["uneven"],
        }
        assert problem == "ZeroDivisionError: division by zero" and none is None
