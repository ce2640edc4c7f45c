import dataclasses
import json
from types import SimpleNamespace

import pytest

from cluster.cli import UserError
from cluster.config import ConfigError
from cluster.session import ROOT
from training import config as training_config
from training.baseline import command as baseline
from training.baseline import measure, steps
from training.baseline import plan as baseline_plan
from training.baseline.ceilings import better
from training.baseline.figures import faults, figures
from training.baseline.plan import Capacity, describe, make_cells
from training.baseline.steps import covered, exposed
from training.model.shapes import SHAPES, to_hf_config
from training.plan import make_plan
from training.projection import traffic

A40_NODE = Capacity(gpu=True, num_devices=8, memory_bytes=47e9, tflops=110.0, gb_per_s=600.0)
LAPTOP = Capacity(gpu=False, num_devices=1, memory_bytes=20e9, tflops=0.2, gb_per_s=20.0)


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


def test_a_cluster_trains_on_one_node_and_on_all_with_as_much_work_for_each():
    cluster = dataclasses.replace(A40_NODE, num_nodes=4)
    found = cells(cluster, "session.address=auto")
    assert list(found)[:2] == ["training/llama-60m/adamw", "training/llama-60m/adamw/4 nodes"]
    assert found["training/llama-1b4/muon"].command == cells(A40_NODE)["training/llama-1b4/muon"].command
    every = found["training/llama-1b4/muon/4 nodes"]
    assert every.about["nodes"] == 4 and "torch.distributed.run" not in every.command
    assert {"--ray", "session.address=auto", "workers.count=32", "batch.tokens=524288"} <= set(every.command)
    assert every.floor_seconds < 1.1 * found["training/llama-1b4/muon"].floor_seconds
    some = cells(cluster, "train.nodes=[2,4]")
    assert [name for name in some if "1b4/muon" in name] == [
        "training/llama-1b4/muon/2 nodes", "training/llama-1b4/muon/4 nodes",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"train\.nodes: 5 nodes, but there are 4; lower it"):
        cells(cluster, "train.nodes=[1,5]")


def test_of_a_kind_of_gpu_only_its_nodes_count_and_train(tmp_path):
    kinds = {"a": "A40", "b": "H100", "c": "H100", "d": None}
    report = {"found": {"nodes": {name: {"accelerator": kind} for name, kind in kinds.items()}}}
    (tmp_path / "preflight.json").write_text(json.dumps(report))
    keys = (f"preflight={tmp_path}/preflight.json", "session.address=auto")
    for accelerator, number in (("H100", 2), ("A40", 1), ("L40S", 1), ("null", 4)):
        config = baseline_plan.load(dotlist=[*keys, f"accelerator={accelerator}"])
        assert measure.num_nodes(config) == number
    found = cells(dataclasses.replace(A40_NODE, num_nodes=2), *keys, "accelerator=H100")
    assert "workers.accelerator=H100" in found["training/llama-1b4/muon/2 nodes"].command


@pytest.mark.parametrize("content", ["[]", "{}", '{"found": 1}', '{"found": {"nodes": {"a": 1}}}'])
def test_a_preflight_that_is_no_report_is_refused_by_its_key(tmp_path, content):
    (tmp_path / "preflight.json").write_text(content)
    keys = (f"preflight={tmp_path}/preflight.json", "session.address=auto")
    with pytest.raises(UserError, match=r"preflight: .* is no report of `make preflight`"):
        measure.num_nodes(baseline_plan.load(dotlist=keys))


def test_a_cpu_shared_by_ranks_is_a_device_on_every_node():
    found = cells(dataclasses.replace(LAPTOP, num_nodes=3), "train.workers=2")
    every = found["training/llama-60m/muon/3 nodes"].command
    assert {"workers.count=6", "workers.gpu=false", "batch.tokens=6144"} <= set(every)


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
        ("serve.new_tokens=-5", "serve.new_tokens: must be at least 1"),
        ("train.steps=-3", "train.steps: must be at least 1"),
        ("train.rules=[moun]", "train.rules: 'moun' is not one of"),
        ("cost.kwh=-1", "cost.kwh"),
        ("wandb=sometimes", "wandb"),
    ],
)
def test_bad_keys_are_named(argument, message):
    with pytest.raises(ConfigError, match=message):
        make_cells(baseline_plan.load(dotlist=[argument]), LAPTOP)


def test_of_two_measurements_of_a_ceiling_the_higher_counts():
    before = {"product_tflops": {"best": 2.0, "spread": [1.0, 2.0]}, "links": None, "kind": "cpu"}
    now = {"product_tflops": {"best": 1.5, "spread": [0.5, 1.5]}, "links": {"num_ranks": 2}, "kind": "cpu"}
    assert better(before, now) == {
        "product_tflops": {"best": 2.0, "spread": [0.5, 2.0]}, "links": {"num_ranks": 2}, "kind": "cpu",
    }  # fmt: skip


def test_a_measurement_that_failed_leaves_the_one_before():
    links = {"num_ranks": 2, "all_reduce_gb_per_s": {"best": 2.0, "spread": [1.0, 2.0]}}
    assert better({"links": links}, {"links": {"problem": "gloo"}}) == {"links": links}
    assert better({"links": {"problem": "gloo"}}, {"links": links}) == {"links": links}
    assert better({"links": None}, {"links": {"problem": "gloo"}}) == {"links": {"problem": "gloo"}}


def trained(*, ranks, on_gpu, sent, nodes=1, over=None):
    """A measured cell: 1000 tokens in 2 s, of which 0.5 s in collectives alone."""
    row = {
        "num_workers": ranks, "on_gpu": on_gpu, "sent_bytes_per_step": sent, "tokens_per_step": 1000,
        "num_nodes": nodes, "node_bytes_per_step": over,
        "step_seconds": 2.0, "step_seconds_p10": 2.0, "step_seconds_p90": 2.0, "phased_step_seconds": 2.5,
        "seconds_compute": 1.5, "seconds_communication": 0.5, "seconds_optimizer": 0.25, "seconds_data": 0.0,
        "joules_per_step": None, "precision": "bf16", "zero_stage": 1, "micro_sequences": 1,
        "accumulation": 1, "flops_per_token": 1e9, "peak_memory_bytes": 1,
    }  # fmt: skip
    return {"id": "training/a/muon", "kind": "training", "shape": "a", "model": "a", "command": "x",
            "rounds": [row, {**row, "step_seconds": 4.0}]}  # fmt: skip


@pytest.mark.parametrize(
    ("on_gpu", "num_ranks", "link_bytes", "shares"),
    [(True, 4, 4e6, [0.05, 0.025]), (True, 8, 4e6, [0.05, 0.025]), (False, 4, 1e6, [0.05, 0.025]),
     (True, 2, 4e6, None)],
)  # fmt: skip
def test_a_training_figure_has_its_share_of_the_link_by_hand(on_gpu, num_ranks, link_bytes, shares):
    """4 ranks that send 1 GB in 2 s and in 4 s: 5% and 2.5% of 10 GB/s; 20% in half a second of it alone.

    A GPU takes 250 of the 1000 tokens, so a token of its is 4 MB; the ranks of a CPU share one device.
    """
    rate = {"best": 10.0, "spread": [9.0, 10.0]}
    ceilings = {"product_tflops": rate, "read_gb_per_s": rate, "products_tflops": {},
                "links": {"num_ranks": num_ranks, "all_reduce_gb_per_s": rate}}  # fmt: skip
    result = {"ceilings": ceilings, "hardware": {"datasheet": None}}
    cell = trained(ranks=4, on_gpu=on_gpu, sent=1e9)
    (figure,) = figures([cell], result, baseline_plan.load())
    assert (figure["ranks"], figure["link_bytes"]) == (4, link_bytes)
    name = f"share of measured link: all-reduce bus bandwidth, {num_ranks} ranks"
    found = {key: value for key, value in figure["shares"].items() if "link" in key}
    if shares is None:  # measured with fewer ranks than the figure has
        assert found == {}
    else:
        alone = f"{name}, during communication alone"
        assert found == {name: pytest.approx(shares), alone: pytest.approx([0.2, 0.2])}


@pytest.mark.parametrize(("num_nodes", "share"), [(2, [0.1, 0.05]), (4, [0.1, 0.05]), (1, None)])
def test_on_several_nodes_the_network_between_them_is_the_link(num_nodes, share):
    """2 GB cross a node's border in 2 s and in 4 s: 10% and 5% of 10 GB/s. Each of 8 GPUs has 125 tokens."""
    rate = {"best": 10.0, "spread": [9.0, 10.0]}
    network = {"num_ranks": num_nodes, "all_reduce_gb_per_s": rate}
    ceilings = {"product_tflops": rate, "read_gb_per_s": rate, "products_tflops": {}, "links": None,
                "links_between_nodes": network}  # fmt: skip
    result = {"ceilings": ceilings, "hardware": {"datasheet": None}}
    cell = trained(ranks=8, on_gpu=True, sent=1e9, nodes=2, over=2e9)
    (figure,) = figures([cell], result, baseline_plan.load())
    assert (figure["nodes"], figure["devices"], figure["link_bytes"]) == (2, 8, 16e6)
    name = f"share of measured network: all-reduce bus bandwidth, {num_nodes} nodes"
    assert figure["shares"].get(name) == (share and pytest.approx(share))


def test_one_rank_sends_nothing_and_has_no_share_of_a_link():
    rate = {"best": 10.0, "spread": [9.0, 10.0]}
    links = {"num_ranks": 2, "all_reduce_gb_per_s": rate}
    ceilings = {"product_tflops": rate, "read_gb_per_s": rate, "products_tflops": {}, "links": links}
    for sent, known in ((0.0, links), (None, links), (1e9, None), (1e9, {"problem": "gloo"})):
        result = {"ceilings": {**ceilings, "links": known}, "hardware": {"datasheet": None}}
        cell = trained(ranks=2, on_gpu=False, sent=sent)
        (figure,) = figures([cell], result, baseline_plan.load())
        assert list(figure["shares"]) == ["MFU of measured product"]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_whole_baseline_is_mirrored_to_wandb(tmp_path, mode):
    rate = {"best": 10.0, "spread": [9.0, 10.0]}
    ceilings = {"product_tflops": rate, "read_gb_per_s": rate, "products_tflops": {}, "links": None}
    about = {"datasheet": None, "name": "NVIDIA A40"}
    result = {"ceilings": ceilings, "hardware": about, "config": {"rounds": 2}, "provenance": {"commit": "c"}}
    config = baseline_plan.load(dotlist=[f"directory={tmp_path}", "name=mine", f"wandb={mode}"])
    result["figures"] = figures([trained(ranks=1, on_gpu=True, sent=0.0)], result, config)
    output = tmp_path / "a40_baseline.json"
    output.write_text(json.dumps(result))
    assert baseline.mirror(result, config, output).startswith(mode)
    summary = json.loads((tmp_path / "mine/summary.json").read_text())
    figure = summary["figures"]["training/a/muon"]
    assert figure["tokens_per_second"] == 375.0
    assert figure["shares"] == {"MFU of measured product": pytest.approx(0.0375)}
    runs = tmp_path / "mine/wandb"
    if mode == "disabled":
        assert not runs.exists()
        return
    [table] = runs.glob("offline-run-*/files/media/table/baseline/figures*.json")
    [row] = json.loads(table.read_text())["data"]
    told = "MFU of measured product 3.8%"
    assert row == ["training/a/muon", 375.0, 250.0, 500.0, None, None, told]
    [copy] = runs.glob("offline-run-*/files/a40_baseline.json")
    assert json.loads(copy.read_text()) == result


@pytest.mark.parametrize("key", ["output", "directory"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, key):
    (tmp_path / "file").write_text("")
    places = {"output": tmp_path / "a.json", "directory": tmp_path} | {key: tmp_path / "file/b"}
    config = baseline_plan.load(dotlist=[f"{name}={place}" for name, place in places.items()])
    with pytest.raises(UserError, match=f"{key}: .*cannot be written"):
        baseline._output(config, {})


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        (("workers.count=1",), lambda n: 0),
        (("workers.count=2", "optim.matrix.rule=adamw", "precision=bf16"), lambda n: (1 + 1 / 2) * 2 * n),
        (("workers.count=2", "optim.matrix.rule=adamw", "precision=fp32"), lambda n: (1 + 1 / 2) * 4 * n),
        (("workers.count=2", "optim.matrix.per_head=true"), None),
        (("workers.count=2", "zero.stage=0"), None),
    ],
)
def test_what_the_busiest_rank_sends_in_a_step(keys, sent):
    """Of N parameters in stage 1 on two ranks, a whole all-reduce and half of an all-gather."""
    config = training_config.load(dotlist=["model.shape=llama-5m", *keys])
    plan = make_plan(config)
    found = steps._sent_bytes(config, plan, num_nodes=1)["sent_bytes_per_step"]
    if sent is None:
        assert found is None
    else:
        assert found == pytest.approx(sent(plan.shape.num_parameters), abs=100)  # flat tensors are padded


def test_the_busiest_rank_counts_and_not_the_mean():
    keys = ["model.shape=llama-5m", "workers.count=3", "batch.tokens=6144"]
    config = training_config.load(dotlist=keys)
    plan = make_plan(config)
    job = traffic.job_of(config, plan.shape, num_ranks=3, accumulation=plan.accumulation)
    sent = traffic.sent_bytes(job)
    found = steps._sent_bytes(config, plan, num_nodes=3)
    assert found["sent_bytes_per_step"] == max(sent) > min(sent)
    assert found["node_bytes_per_step"] == traffic.node_bytes(job, ranks_per_node=1) != max(sent)


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


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests/baselines").glob("*_baseline.json")), ids=lambda f: f.stem
)
def test_the_serving_figures_of_a_committed_baseline_are_what_its_rounds_come_to(file):
    content = json.loads(file.read_text())
    committed = {figure["id"]: figure for figure in content["figures"]}
    cells = [cell for cell in content["cells"] if cell["kind"] == "serving" and cell["rounds"]]
    for figure in figures(cells, content, baseline_plan.load()):
        for key in ("values", "flops", "bytes"):
            assert figure[key] == pytest.approx(committed[figure["id"]][key]), (figure["id"], key)
        for name, shares in figure["shares"].items():
            assert shares == pytest.approx(committed[figure["id"]]["shares"][name])
    assert faults(content["figures"]) == content.get("ceiling_faults", [])
