"""The projection by hand: bytes, seconds of collectives, a baseline's shares, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import config as layered
from cluster.cli import UserError
from cluster.config import ConfigError
from optim.geometry import NORMS, Entries, Lines
from optim.groups import TABLE_BLOCK_ROWS
from optim.step.ownership import make_plan
from training.model.shapes import SHAPES, LlamaShape
from training.projection import basis as projection_basis
from training.projection import command as projection
from training.projection import step_model, traffic
from training.projection.basis import basis_of, link_choices
from training.projection.command import divide
from training.projection.config import LinkConfig, ProjectionConfig
from training.projection.step_model import (
    Basis,
    Interconnect,
    Network,
    basis_from_row,
    exchange_seconds,
    optimizer_work,
    ring_seconds,
    step_seconds,
)
from training.projection.traffic import (
    Exchange,
    Job,
    collectives,
    exchange,
    exchange_of,
    node_bytes,
    ownership,
    sent_bytes,
)

# 80 elements in two tables, 12 in three norms, 4 squares of 16 and 3 rectangles of 24 in one layer.
TINY = LlamaShape(
    vocab_size=10, hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=2, ffn_size=6
)
ONE_PROTOCOL = ((5e-6, 50e-6, 1.0),)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def job(stage: int, num_ranks: int, **other: Any) -> Job:
    given = {"shape": TINY, "accumulation": 1, "bucket_elements": 10**6, **other}
    return Job(stage=stage, num_ranks=num_ranks, **given)


def links(gb_per_s: float, node_gb_per_s: float = 1e9, protocols: Any = ONE_PROTOCOL) -> Interconnect:
    rates = dict.fromkeys(KINDS, gb_per_s * 1e9)
    return Interconnect(
        name="x", bytes_per_s=rates, node_bytes_per_s=node_gb_per_s * 1e9, protocols=protocols
    )


# --- bytes ------------------------------------------------------------------------------------------------


def test_stage_1_reduces_once_and_gathers_once_with_its_padding():
    assert TINY.num_parameters == 228
    gradients, weights = collectives(job(1, 2, accumulation=5))
    assert (gradients.kind, gradients.num_bytes, gradients.hidden_by) == ("all_reduce", 2 * 228, None)
    assert (weights.kind, weights.num_bytes, weights.calls) == ("all_gather", 2 * 228, 3)
    assert gradients.sent_bytes(2) == 456 and weights.sent_bytes(2) == 228
    # On 3 ranks flat tensors are padded to multiples of 6: 80 -> 84, 12, 136 -> 138.
    assert collectives(job(1, 3))[0].num_bytes == 2 * (84 + 12 + 138)


def test_stage_2_reduces_in_every_micro_batch_beside_the_backward_pass():
    gradients, weights = collectives(job(2, 2, accumulation=5))
    assert (gradients.kind, gradients.num_bytes) == ("all_reduce", 5 * 2 * 228)
    assert gradients.hidden_by == "backward" and weights.hidden_by is None
    assert collectives(job(2, 2, accumulation=5, bucket_elements=100))[0].calls == 5 * 3


def test_stage_3_gathers_small_weights_after_the_step_and_large_ones_in_every_pass():
    gradients, small = collectives(job(3, 4, accumulation=2))
    assert (gradients.kind, gradients.num_bytes) == ("reduce_scatter", 2 * 2 * 228)
    assert (small.num_bytes, small.calls, small.hidden_by) == (2 * 228, 12, None)
    large = {
        each.name: each
        for each in collectives(job(3, 8, shape=SHAPES["llama-1b4"], bucket_elements=2 * 10**8))
    }
    all_of_it = 1_420_396_544 - 49 * 2048  # but for the norms
    assert large["weights, forward"].num_bytes == 2 * all_of_it
    # The lookahead has gathered all before any layer is over: the embedding alone was released by then.
    assert large["weights, backward"].num_bytes == 2 * 50_304 * 2048


def test_stage_3_gathers_again_what_is_used_again_too_far_away():
    """By twice the elements that follow: 500M are kept, and the parameter at their border."""
    found = {
        each.name: each for each in collectives(job(3, 8, shape=SHAPES["llama-1b4"], reuse_distance=10**9))
    }
    layer, head = 4 * 2048**2 + 3 * 2048 * 5504, 50_304 * 2048
    kept = found["weights, forward"].num_bytes / 2 - found["weights, backward"].num_bytes / 2
    assert head + 7 * layer < kept <= 500_000_000 + 2048 * 5504


def test_one_rank_sends_nothing():
    for stage in (1, 2, 3):
        assert sent_bytes(job(stage, 1)) == [0.0]


def test_an_elementwise_rule_exchanges_no_matrix():
    assert ownership(job(3, 4, whole_matrices=False)) == []
    common = sum(each.sent_bytes(4) for each in collectives(job(3, 4)))
    assert sent_bytes(job(3, 4, whole_matrices=False)) == [common] * 4
    assert min(sent_bytes(job(3, 4))) > common


def test_the_exchange_of_one_matrix_over_two_nodes():
    """16 elements in 4 pieces, on ranks 0, 1 | 2, 3: the owner gets 12, of which 8 from the other node."""
    plan = make_plan([ownership(job(3, 4))[0].matrices[0]], world_size=4)
    [owner] = plan.owners
    found = exchange([plan], element_bytes=2, num_ranks=4, ranks_per_node=2)
    assert found.worst_rank_bytes == 24 and found.worst_node_bytes == 16 and found.peers == 3
    assert [found.sent_bytes[rank] for rank in range(4)] == [24 if rank == owner else 8 for rank in range(4)]


def test_under_scion_every_norm_is_a_group_and_those_of_rows_cut_tables():
    shape = replace(TINY, vocab_size=1100)
    norms = (("*embed_tokens*", "column:embedding"), ("*lm_head*", "sign@60"), ("*", "spectral"))
    found = job(1, 4, shape=shape, norms=norms).groups()
    assert {label: group.whole for label, group in found.items()} == {
        "column:embedding": True, "sign@60": False, "spectral": True,
    }  # fmt: skip
    assert found["column:embedding"].blocks == [(512, 512, 76)]
    plans = ownership(job(1, 4, shape=shape, norms=norms))
    assert [len(plan.matrices) for plan in plans] == [
        3,
        3 + 7,
    ]  # three norms of n x 1, and the layer's matrices
    for plan in plans:
        assert all(sum(map(matrix.held_by, range(4))) == matrix.numel for matrix in plan.matrices)


def test_its_norms_are_those_of_the_rules():
    """traffic.py knows them without torch."""
    entries = {name for name, (ball, _) in NORMS.items() if isinstance(ball, Entries)}
    rows = {name for name, (ball, _) in NORMS.items() if ball == Lines(dim=-1)}
    assert (set(traffic.ENTRY_NORMS), set(traffic.ROW_NORMS)) == (entries, rows)
    assert traffic.TABLE_BLOCK_ROWS == TABLE_BLOCK_ROWS


def test_across_the_border_of_a_node_a_ring_goes_once_and_matrices_there_and_back():
    """By the plan of four ranks in two nodes; a node of one rank has that rank's border."""
    common = sum(each.sent_bytes(4) for each in collectives(job(3, 4)))
    over = 2 * exchange_of(job(3, 4), ranks_per_node=2).worst_node_bytes
    assert node_bytes(job(3, 4), ranks_per_node=2) == common + over > common
    assert node_bytes(job(3, 4), ranks_per_node=4) == common
    assert node_bytes(job(3, 4, whole_matrices=False), ranks_per_node=2) == common
    alone = 2 * exchange_of(job(3, 4), ranks_per_node=1).worst_rank_bytes
    assert node_bytes(job(3, 4), ranks_per_node=1) == common + alone


# --- seconds ----------------------------------------------------------------------------------------------


def test_a_ring_in_one_node():
    spent = ring_seconds("all_reduce", 1e9, calls=3, num_ranks=8, num_nodes=1, links=links(20))
    assert spent.transfer == pytest.approx(2 * 7 / 8 * 1 / 20)
    assert spent.latency == pytest.approx(3 * 14 * 5e-6)
    assert not spent.crosses


def test_a_ring_over_nodes_is_bounded_by_their_network():
    spent = ring_seconds("all_gather", 1e9, calls=1, num_ranks=8, num_nodes=2, links=links(20, 3.1))
    assert spent.transfer == pytest.approx(7 / 8 * 1 / 3.1) and spent.crosses
    assert spent.latency == pytest.approx(6 * 5e-6 + 1 * 50e-6)
    fast = ring_seconds("all_gather", 1e9, calls=1, num_ranks=8, num_nodes=2, links=links(20, 50))
    assert fast.transfer == pytest.approx(7 / 8 * 1 / 20) and not fast.crosses


def test_the_quicker_protocol_counts():
    two = links(10, protocols=((10e-6, 10e-6, 1.0), (1e-6, 1e-6, 0.25)))
    small = ring_seconds("all_gather", 1e3, calls=1, num_ranks=101, num_nodes=1, links=two)
    assert small.latency == pytest.approx(100e-6)
    large = ring_seconds("all_gather", 1e9, calls=1, num_ranks=101, num_nodes=1, links=two)
    assert large.latency == pytest.approx(1e-3) and large.transfer == pytest.approx(100 / 101 * 0.1)


def test_the_exchange_takes_what_its_busiest_link_takes():
    travels = Exchange((0,), worst_rank_bytes=10**9, worst_node_bytes=10**9, peers=4)
    inside = exchange_seconds(travels, num_nodes=1, links=links(20, 2))
    assert inside.transfer == pytest.approx(2 / 20) and inside.latency == pytest.approx(8 * 5e-6)
    between = exchange_seconds(travels, num_nodes=2, links=links(20, 2))
    assert between.transfer == pytest.approx(2 / 2) and between.latency == pytest.approx(8 * 50e-6)
    assert between.crosses and not inside.crosses


def test_optimizer_work_by_hand():
    # Stage 1 in bf16: 24 bytes for 136 matrix elements and 28 for 92 others, halved; 16 for all 228.
    one = job(1, 2)
    _, num_bytes = optimizer_work(one, ownership(one))
    assert num_bytes == 24 * 68 + 28 * 46 + 16 * 228
    two = job(2, 2)
    assert optimizer_work(two, ownership(two))[1] == 24 * 68 + 28 * 46 + 12 * 114
    assert optimizer_work(job(2, 2, whole_matrices=False), []) == (0.0, 28 * 114 + 12 * 114)
    # One rank: 4 squares of 15n³ + 5n³ and 3 rectangles, 4 x 6 so not above 1.5 to 1: 15n²m + 5n³.
    alone = job(1, 1)
    flops, _ = optimizer_work(alone, ownership(alone))
    assert flops == 4 * 20 * 4**3 + 3 * (15 * 16 * 6 + 5 * 64)


BASIS = Basis(
    source="test",
    compute_seconds_per_token=1e-3,
    product_flops=1e12,
    memory_bytes_per_s=1e12,
    peak_tflops=100.0,
)


def test_a_step_is_the_sum_of_its_parts_and_hides_only_what_overlap_comm_can():
    slow = links(1e-6, protocols=((0.0, 0.0, 1.0),))  # 1 kB/s
    one = step_seconds(job(1, 2), tokens_per_rank=300, ranks_per_node=2, basis=BASIS, links=slow)
    assert one.seconds["compute"] == pytest.approx(0.3)
    assert one.seconds["intra-node link"] >= (456 + 228) / 1e3
    assert one.longest == pytest.approx(sum(one.seconds.values())) and one.hidden_seconds == 0
    assert one.bottleneck == "intra-node link"
    two = step_seconds(job(2, 2), tokens_per_rank=300, ranks_per_node=2, basis=BASIS, links=slow)
    assert two.hidden_seconds == pytest.approx(0.2)  # the reduction takes 0.456 s; two thirds of compute
    two = step_seconds(job(2, 2), tokens_per_rank=3000, ranks_per_node=2, basis=BASIS, links=slow)
    assert two.hidden_seconds == pytest.approx(0.456) and two.bottleneck == "compute"
    assert two.shortest == pytest.approx(two.longest - 0.456)


@pytest.mark.parametrize(
    ("changes", "num_ranks", "ranks_per_node", "bottleneck"),
    [
        ({"links": links(1e-6, 1e-9)}, 4, 2, "inter-node link"),
        ({"links": links(1e6, 1e6, ((1.0, 1.0, 1.0),))}, 4, 2, "latency"),
        ({"basis": replace(BASIS, memory_bytes_per_s=1.0)}, 4, 4, "optimizer"),
    ],
)
def test_the_bottleneck_is_named(changes, num_ranks, ranks_per_node, bottleneck):
    given = {"basis": BASIS, "links": links(1e6, 1e6), **changes}
    step = step_seconds(job(1, num_ranks), tokens_per_rank=1, ranks_per_node=ranks_per_node, **given)
    assert step.bottleneck == bottleneck


def test_nvlink_pairs_carry_twice_pcie_unless_the_bridge_is_slower():
    network = Network(2e9, "test")
    given = LinkConfig(pcie_gb_per_s=20, nvlink_gb_per_s=56.25)
    measured, pcie, pairs = link_choices(given, links(7), network)
    assert measured.bytes_per_s["all_reduce"] == 7e9
    assert pcie.bytes_per_s["all_reduce"] == 20e9 and pairs.bytes_per_s["all_reduce"] == 40e9
    assert pairs.bytes_per_s["all_to_all"] == 20e9
    assert pcie.node_bytes_per_s == pairs.node_bytes_per_s == 2e9
    [_, slow] = link_choices(LinkConfig(pcie_gb_per_s=20, nvlink_gb_per_s=30), None, network)
    assert slow.bytes_per_s["all_gather"] == 30e9


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_gpus", "tokens", "micro", "accumulation"),
    [(8, 524_288, 4, 8), (64, 524_288, 4, 1), (24, 24 * 11 * 2048, 1, 11), (512, 512 * 2048, 1, 1),
     (4096, 4096 * 2048, 1, 1)],
)  # fmt: skip
def test_a_batch_grows_to_the_least_that_divides(num_gpus, tokens, micro, accumulation):
    batch = divide(ProjectionConfig(), num_gpus)
    assert (batch.tokens, batch.micro_sequences, batch.accumulation) == (tokens, micro, accumulation)


# --- a baseline -------------------------------------------------------------------------------------------


def row(**changes: Any) -> dict[str, Any]:
    return {
        "num_workers": 2,
        "tokens_per_step": 1000,
        "flops_per_token": SHAPES["llama-1b4"].flops_per_token(2048),
        "accumulation": 1,
        "zero_stage": 1,
        "precision": "bf16",
        "step_seconds": 2.0,
        "phased_step_seconds": 2.5,
        "seconds_compute": 1.5,
        "seconds_data": 0.25,
        "seconds_optimizer": 0.5,
        "seconds_communication": 0.25,
        **changes,
    }


CEILINGS = {"product_tflops": {"best": 100.0}, "copy_gb_per_s": {"best": 500.0}, "links": None}


def baseline(**changes: Any) -> dict[str, Any]:
    cells = [
        {"id": "training/llama-1b4/muon", "kind": "training", "shape": "llama-1b4", "rule": "muon",
         "status": "measured", "reason": None, "rounds": [row()]},
        {"id": "training/llama-2-7b/muon", "kind": "training", "shape": "llama-2-7b", "rule": "muon",
         "status": "out of memory", "reason": "needs 90 GB", "rounds": []},
        {"id": "serving/llama-1b4", "kind": "serving", "shape": "llama-1b4", "status": "measured",
         "rounds": [{}]},
    ]  # fmt: skip
    hardware = {"name": "NVIDIA A40", "kind": "gpu", "num_devices": 8, "num_nodes": 1}
    return {
        "format": 2,
        "hardware": hardware,
        "ceilings": CEILINGS,
        "cells": cells,
        "figures": [],
        "provenance": {},
        **changes,
    }


def write(folder: Path, content: Any) -> str:
    file = folder / "here_baseline.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_shares_of_the_phased_step_scale_the_measured_one():
    one = job(1, 2)
    rows = [row(), row(step_seconds=3.0), row(step_seconds=1.0)]
    basis = basis_from_row(rows, CEILINGS, job=one, source="test", flops_ratio=3.0)
    assert basis.compute_seconds_per_token == pytest.approx(3.0 * 1.75 * (2.0 / 2.5) * 2 / 1000)
    # so that the step it was measured in comes out again
    assert step_model.optimizer_seconds(one, ownership(one), basis) == pytest.approx(0.5 * 2.0 / 2.5)


def test_a_baseline_gives_compute_and_links(tmp_path):
    found = {"num_ranks": 8, "all_reduce_gb_per_s": {"best": 9.0}, "all_to_all_gb_per_s": {"best": 6.0},
             "all_reduce_latency_us": 140.0}  # fmt: skip
    path = write(tmp_path, baseline(ceilings={**CEILINGS, "links": found}))
    basis = basis_of(ProjectionConfig(baseline=path))
    assert basis.compute_seconds_per_token == pytest.approx(1.75 * 0.8 * 2 / 1000)
    assert basis.source.startswith("measured: ") and basis.peak_tflops == 149.7
    assert basis.links.bytes_per_s["all_reduce"] == 9e9 and basis.links.bytes_per_s["all_to_all"] == 6e9
    assert basis.links.protocols[0][0] == pytest.approx(10e-6)


BETWEEN = {"num_ranks": 3, "all_reduce_gb_per_s": {"best": 2.5, "spread": [2.0, 2.5]},
           "all_to_all_gb_per_s": {"best": 2.0, "spread": [1.0, 2.0]}, "all_reduce_latency_us": 60.0,
           "num_bytes": 256_000_000}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "keys", "rate", "source"),
    [
        (
            BETWEEN,
            [],
            2.5e9,
            "measured by the preflight, in here_baseline.json: all-reduce over 3 nodes, one",
        ),
        (BETWEEN, ["links.node_gb_per_s=3.1"], 3.1e9, "as links.node_gb_per_s says"),
        (None, ["links.node_gb_per_s=12"], 12e9, "as links.node_gb_per_s says"),
        (None, [], 3.1e9, "ASSUMED, 25 GbE at its best"),
        ({"problem": "NCCL error"}, [], 3.1e9, "ASSUMED, 25 GbE at its best; the preflight's measurement f"),
    ],
)
def test_the_network_is_the_keys_else_the_preflights_else_assumed(found, keys, rate, source, tmp_path):
    inside = {**BETWEEN, "num_ranks": 8}
    path = write(tmp_path, baseline(ceilings={**CEILINGS, "links": inside, "links_between_nodes": found}))
    config = layered.load(ProjectionConfig, dotlist=[f"baseline={path}", *keys])
    basis = basis_of(config)
    assert basis.network.bytes_per_s == pytest.approx(rate) and basis.network.source.startswith(source)
    assert basis.links.node_bytes_per_s == pytest.approx(rate)
    assert all(
        each.node_bytes_per_s == pytest.approx(rate)
        for each in link_choices(config.links, basis.links, basis.network)
    )


def test_a_baseline_from_before_links_between_nodes_still_counts(tmp_path):
    assert "links_between_nodes" not in CEILINGS
    assert basis_of(ProjectionConfig(baseline=write(tmp_path, baseline()))).network.source.startswith(
        "ASSUMED"
    )


def test_the_measured_network_decides_the_time_between_nodes(tmp_path, capsys):
    """A ring over two nodes sends 15/16 of its buffers twice (or once) through the slower of both."""
    slow = {**BETWEEN, "all_reduce_gb_per_s": {"best": 1.25, "spread": [1.0, 1.25]}}
    seconds = []
    for found in (BETWEEN, slow):
        path = write(tmp_path, baseline(ceilings={**CEILINGS, "links_between_nodes": found}))
        assert projection.main([f"baseline={path}", "nodes=[2]", "stages=[1]", "rule=muon"]) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["between_nodes"].startswith(
            f"{found['all_reduce_gb_per_s']['best']:.3g} GB/s per node each"
        )
        seconds.append(last["projection"][0]["seconds"]["inter-node link"])
    assert seconds[1] == pytest.approx(2 * seconds[0])
    ring = 15 / 16 * (2 + 1) * 2 * 1_420_396_544 / 2.5e9
    assert ring < seconds[0] < 1.5 * ring  # and the matrices to their owners and back


def test_another_shape_of_the_baseline_is_scaled_by_its_flops_and_said_so(tmp_path):
    flops = SHAPES["llama-60m"].flops_per_token(2048)
    content = baseline()
    content["cells"][0] |= {"shape": "llama-60m", "rounds": [row(flops_per_token=flops)]}
    basis = basis_of(ProjectionConfig(baseline=write(tmp_path, content), baseline_shape="llama-60m"))
    ratio = SHAPES["llama-1b4"].flops_per_token(2048) / flops
    assert basis.compute_seconds_per_token == pytest.approx(ratio * 1.75 * 0.8 * 2 / 1000)
    assert "ASSUMED: llama-1b4 at the same FLOP/s" in basis.source


def test_without_a_baseline_the_datasheet_counts_and_the_output_says_so(monkeypatch):
    monkeypatch.setattr(projection_basis, "_found_baseline", lambda device: None)
    basis = basis_of(ProjectionConfig())
    assert basis.source.startswith("ASSUMED, nothing measured: MFU 40% of 149.7 TFLOP/s")
    assert basis.compute_seconds_per_token == pytest.approx(9_111_601_152 / (0.4 * 149.7e12))


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (None, {}, "no such file; write one with `make baseline`"),
        ("no json", {}, "cannot be read as JSON"),
        ({"bench": "optim"}, {}, "not a file of `make baseline`"),
        (baseline(format=1), {}, "format 1, not 2; run `make baseline` again"),
        (baseline(), {"rule": "adamw"}, "no measured training cell of llama-1b4 with adamw; it has "
         "llama-1b4 with muon (measured), llama-2-7b with muon (out of memory: needs 90 GB); set baseline_"),
        (baseline(ceilings={"product_tflops": None}), {}, "is incomplete"),
        (baseline(), {"shape": "llama-2-7b"}, "no measured training cell of llama-2-7b with muon"),
        (baseline(), {"baseline_shape": "llama-9t"}, "baseline_shape: 'llama-9t' is not one of"),
        (baseline(), {"device": "NVIDIA H200"}, "was measured on NVIDIA A40, and device is NVIDIA H200"),
    ],
)  # fmt: skip
def test_a_baseline_that_cannot_be_used_is_an_error_with_its_remedy(content, keys, message, tmp_path):
    path = str(tmp_path / "none.json") if content is None else write(tmp_path, content)
    with pytest.raises(UserError) as error:
        basis_of(ProjectionConfig(baseline=path, **keys))
    assert message in str(error.value) and path in str(error.value) + path * ("baseline_shape" in keys)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("assumed.mfu=1.5", "assumed.mfu"),
        ("assumed.mfu=0", "assumed.mfu"),
        ("links.node_gb_per_s=0", "links.node_gb_per_s"),
        ("nodes=[]", "nodes"),
        ("nodes=[0]", "nodes"),
        ("stages=[0]", "stages"),
        ("batch_tokens=5000", "batch_tokens"),
        ("tokens=0", "tokens"),
        ("shape=llama-9t", "shape"),
        ("rule=scion", "rule"),
        ("node=[1]", "unknown key 'node'"),
    ],
)
def test_an_impossible_key_is_named(key, name):
    with pytest.raises(ConfigError, match=name):
        layered.load(ProjectionConfig, dotlist=[key])


def test_a_device_that_nobody_knows_needs_a_baseline():
    with pytest.raises(UserError, match="no datasheet entry and no baseline; known: NVIDIA A40"):
        basis_of(ProjectionConfig(device="NVIDIA A41"))


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_one_json_line(capsys, tmp_path):
    path = write(tmp_path, baseline())
    assert projection.main([f"baseline={path}", "nodes=[1,512]", "stages=[1]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    one, _, many, _ = found["projection"]
    assert (one["gpus"], many["gpus"]) == (8, 4096)
    assert one["seconds"]["compute"] == pytest.approx(65_536 * 1.75 * 0.8 * 2 / 1000)
    assert one["days"] == pytest.approx(28e9 / 524_288 * one["step_seconds"] / 86400)
    assert one["mfu"] == pytest.approx(one["tokens_per_second"] * 9_111_601_152 / (8 * 149.7e12))
    assert one["sent_bytes"]["gradients"] == pytest.approx(2 * 7 / 8 * 2 * 1_420_396_544)
    assert one["bottleneck"] == "compute" and many["batch_tokens"] == 4096 * 2048
    text = "\n".join(lines)
    assert (
        "measured: here_baseline.json" in text
        and "between nodes  3.1 GB/s per node each way: ASSUMED" in text
    )
    assert "batch_tokens=524,288 does not divide over 4,096 GPUs" in text


def test_dry_run_and_bad_input(capsys, tmp_path):
    assert projection.main(["--dry-run", f"baseline={write(tmp_path, baseline())}"]) == 0
    assert "micro_sequences: 4" in capsys.readouterr().out
    assert projection.main([f"baseline={tmp_path / 'none.json'}"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert projection.main(["assumed.mfu=2"]) == 2
    assert "assumed.mfu" in capsys.readouterr().err


def test_the_shares_are_those_that_the_optimizers_bench_counts():
    contenders = pytest.importorskip("optim.bench.traffic")
    for kind, share in traffic.SHARES.items():
        given = contenders.Traffic.SHARES[kind][1](4)
        assert (
            share(4) * (4 if kind == "all_gather" else 1) == given
        )  # of the own part there, of the whole here
