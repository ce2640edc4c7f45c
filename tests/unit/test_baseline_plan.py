import dataclasses
import json
from types import SimpleNamespace

import pytest

from cluster.config import ConfigError
from training import baseline_plan
from training.baseline_plan import Machine, describe, make_cells
from training.ceilings import better
from training.shapes import SHAPES, to_hf_config
from training.steps import covered, exposed

A40_NODE = Machine(gpu=True, num_devices=8, memory_bytes=47e9, tflops=110.0, gb_per_s=600.0)
LAPTOP = Machine(gpu=False, num_devices=1, memory_bytes=20e9, tflops=0.2, gb_per_s=20.0)


def cells(machine, *keys):
    return {cell.id: cell for cell in make_cells(baseline_plan.load(dotlist=keys), machine)}


def test_a_node_of_a40s_measures_every_size_on_all_its_gpus():
    found = cells(A40_NODE)
    assert list(found)[:2] == ["training/llama-60m/adamw", "training/llama-60m/muon"]
    assert not any(cell.skipped for cell in found.values())
    large = found["training/llama-1b4/muon"].command
    assert "--nproc-per-node=8" in large and "workers.gpu=true" in large
    assert {"batch.sequence_length=1024", "batch.tokens=131072"} <= set(large)
    assert "1,8,32" in found["serving/llama-3.1-8b"].command


def test_what_does_not_fit_is_left_out_by_count_and_says_so():
    one = dataclasses.replace(A40_NODE, num_devices=1, memory_bytes=12e9)
    found = cells(one)
    assert "out of memory by count" in found["training/llama-1b4/adamw"].skipped
    assert "of 11.0 GB" in found["serving/llama-2-7b"].skipped
    assert found["training/llama-60m/adamw"].skipped is None


def test_micro_batches_are_halved_until_they_fit():
    tight = dataclasses.replace(A40_NODE, memory_bytes=24e9)
    keys = [part for part in cells(tight)["training/llama-1b4/muon"].command if "micro" in part]
    roomy = [part for part in cells(A40_NODE)["training/llama-1b4/muon"].command if "micro" in part]
    assert int(keys[0].split("=")[1]) < int(roomy[0].split("=")[1])


def test_what_takes_too_long_is_left_out_and_the_plan_says_why():
    found = cells(LAPTOP, "most_seconds=20")
    assert "above most_seconds" in found["training/llama-350m/adamw"].skipped
    text = describe(list(found.values()), rounds=3)
    assert "left out: takes at least" in text and "3 rounds" in text
    assert found["training/llama-60m/adamw"].skipped is None


def test_the_floor_is_flops_over_the_ceiling_by_hand():
    """Adam at 60M on a CPU: (1 warm-up + 4 + 3 + 1) steps of 1024 tokens."""
    cell = cells(LAPTOP)["training/llama-60m/adamw"]
    flops = 9 * 1024 * SHAPES["llama-60m"].flops_per_token(256)
    assert cell.floor_seconds == pytest.approx(flops / 0.2e12)


def test_a_config_file_is_a_shape_too(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(SHAPES["llama-5m"], dtype="bfloat16")))
    found = cells(LAPTOP, f"train.shapes=[{folder}/config.json]", f"serve.models=[{folder}/config.json]")
    assert list(found) == ["training/mine/adamw", "training/mine/muon", "serving/mine"]
    assert "model.weights=random" in found["serving/mine"].command


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.shapes=[llama-9t]", "train.shapes"),
        ("serve.models=[/nowhere]", "serve.models: /nowhere: no such config.json"),
        ("rounds=0", "rounds: must be at least 1"),
        ("serve.batches=[0]", "serve.batches"),
        ("cost.kwh=-1", "cost.kwh"),
    ],
)
def test_bad_keys_are_named(argument, message):
    with pytest.raises(ConfigError, match=message):
        make_cells(baseline_plan.load(dotlist=[argument]), LAPTOP)


def test_of_two_measurements_of_a_ceiling_the_higher_counts():
    before = {"bf16_tflops": {"best": 2.0, "spread": [1.0, 2.0]}, "links": None, "kind": "cpu"}
    now = {"bf16_tflops": {"best": 1.5, "spread": [0.5, 1.5]}, "links": {"num_ranks": 2}, "kind": "cpu"}
    assert better(before, now) == {
        "bf16_tflops": {"best": 2.0, "spread": [0.5, 2.0]}, "links": {"num_ranks": 2}, "kind": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spans", "apart_from", "length"),
    [
        ([(0, 2), (1, 3)], [], 3),
        ([(0, 2), (5, 6)], [], 3),
        ([(0, 4)], [(1, 2), (1.5, 3)], 2),
        ([(0, 1)], [(0, 1)], 0),
        ([], [(0, 1)], 0),
        ([(2, 1)], [], 0),
    ],
)
def test_the_union_of_spans_apart_from_others(spans, apart_from, length):
    assert covered(spans, apart_from) == pytest.approx(length)


def event(name, begin, end, *, device="CPU", annotation=False):
    """As torch's profiler gives them, in microseconds."""
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=begin * 1e6, end=end * 1e6),
        device_type=SimpleNamespace(name=device), is_user_annotation=annotation,
    )  # fmt: skip


def test_on_a_gpu_a_collective_counts_where_no_kernel_runs_and_annotations_are_no_kernels():
    events = [
        event("part:compute", 0, 10),
        event("part:compute", 0, 10, device="CUDA", annotation=True),
        event("Optimizer.step#Adam", 10, 14, device="CUDA", annotation=True),
        event("part:optimizer", 10, 14),
        event("ncclDevKernel_AllReduce", 6, 9, device="CUDA"),
        event("sm80_gemm", 0, 7, device="CUDA"),
        event("nccl:all_reduce", 6, 9),  # the host's side of it
        event("ncclDevKernel_AllGather", 11, 13, device="CUDA"),
    ]
    assert exposed(events, gpu=True) == {"compute": pytest.approx(2), "optimizer": pytest.approx(2)}


def test_on_a_cpu_a_collective_counts_while_it_runs():
    events = [event("part:compute", 0, 10), event("gloo:all_reduce", 4, 6), event("aten::mm", 0, 10)]
    assert exposed(events, gpu=False) == {"compute": pytest.approx(2)}
