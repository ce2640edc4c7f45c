"""Bytes and seconds of a step by hand."""

from dataclasses import replace
from typing import Any

import pytest

from optim.geometry import NORMS, Entries, Lines
from optim.groups import TABLE_BLOCK_ROWS
from optim.step.ownership import make_plan
from training.model.shapes import SHAPES, LlamaShape
from training.optim_config import MatrixOptimConfig
from training.projection import traffic
from training.projection.step_model import (
    Basis,
    Interconnect,
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
ADAMW = MatrixOptimConfig(rule="adamw")
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
    assert ownership(job(3, 4, matrix=ADAMW)) == []
    common = sum(each.sent_bytes(4) for each in collectives(job(3, 4)))
    assert sent_bytes(job(3, 4, matrix=ADAMW)) == [common] * 4
    assert min(sent_bytes(job(3, 4))) > common


def test_the_exchange_of_one_matrix_over_two_nodes():
    """16 elements in 4 pieces, on ranks 0, 1 | 2, 3: the owner gets 12, of which 8 from the other node."""
    plan = make_plan([ownership(job(3, 4))[0].matrices[0]], world_size=4)
    [owner] = plan.owners
    found = exchange(job(3, 4), [plan], ranks_per_node=2)
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
    assert node_bytes(job(3, 4, matrix=ADAMW), ranks_per_node=2) == common
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
    assert optimizer_work(job(2, 2, matrix=ADAMW), []) == (0.0, 28 * 114 + 12 * 114)
    # One rank: 4 squares of 15n³ + 5n³ and 3 rectangles, 4 x 6 so not above 1.5 to 1: 15n²m + 5n³.
    alone = job(1, 1)
    flops, _ = optimizer_work(alone, ownership(alone))
    assert flops == 4 * 20 * 4**3 + 3 * (15 * 16 * 6 + 5 * 64)
    # Seven iterations; and Aurora's second factor of the two matrices of 6 x 4.
    seven = job(1, 1, matrix=MatrixOptimConfig(polar_steps=7))
    assert optimizer_work(seven, ownership(seven))[0] == 7 * flops / 5
    aurora = job(1, 1, matrix=MatrixOptimConfig(rule="aurora"))
    assert optimizer_work(aurora, ownership(aurora))[0] == flops + 2 * (15 * 16 * 6 + 5 * 64)
    # Under mars every second step orthogonalises, and sends.
    mars = job(3, 4, matrix=MatrixOptimConfig(rule="mars"), gradients_per_update=2)
    assert optimizer_work(mars, ownership(mars))[0] == optimizer_work(job(3, 4), ownership(job(3, 4)))[0] / 2
    common = sum(each.sent_bytes(4) for each in collectives(mars))
    each = zip(sent_bytes(mars), sent_bytes(job(3, 4)), strict=True)
    assert all(half - common == (whole - common) / 2 > 0 for half, whole in each)


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


def test_the_shares_are_those_that_the_optimizers_bench_counts():
    bench = pytest.importorskip("optim.bench.traffic")
    for kind, share in traffic.SHARES.items():
        given = bench.Traffic.SHARES[kind][1](4)
        # of a rank's own part there, of the whole buffer here
        assert share(4) * (4 if kind == "all_gather" else 1) == given
