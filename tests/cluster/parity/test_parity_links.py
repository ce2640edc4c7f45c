"""Parity of what a link bounds: ranks on a node, and several nodes."""

import json

import pytest

from cluster.parity import command as parity
from cluster.parity.baseline_file import read_side
from cluster.parity.parity import compare
from tests.cluster.parity.sides import A40, H100, SCATTER, claims, figure, write


def test_a_network_that_was_measured_once_leaves_its_share_without_bounds(tmp_path):
    a, b = (several_nodes(tmp_path, device, rate=2500.0, gb_per_s=10.0) for device in (A40, H100))
    content = json.loads(a.read_text())
    content["ceilings"]["links_between_nodes"]["all_reduce_gb_per_s"]["spread"] = [10.0, 10.0]
    a.write_text(json.dumps(content))
    found = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1)
    across = found.comparisons[1]
    assert across.shares[0].low is None and across.shares[1].low is not None and across.parity.low is None
    claim = claims(found)["training/llama-1b4/muon/2 nodes: parity of share of link within 10%"]
    assert claim.verdict == "not decided"


def linked(folder, device, *, rate, gb_per_s=10.0, num_ranks=8, **changes):
    """A file with one training figure of 8 ranks that send 2 MB per token, and a link of this speed or none.

    An A40 computes a token in 57 µs and an H100 in 8.6; 2 MB take 200 µs at 10 GB/s.
    """
    values = [rate * factor for factor in SCATTER]
    told = {"devices": 8, "ranks": 8, "link_bytes": 2e6, "values": values} | changes
    file = write(folder, device, [figure(device, "training", 0.1, **told)])
    if gb_per_s:
        content = json.loads(file.read_text())
        best = {"best": gb_per_s, "spread": [gb_per_s / 2, gb_per_s]}
        content["ceilings"]["links"] = {
            "num_ranks": num_ranks, "all_reduce_gb_per_s": best, "all_to_all_gb_per_s": best,
            "all_reduce_latency_us": 50.0,
        }  # fmt: skip
        for row, scatter in zip(content["peaks_of_rounds"], (0.99, 1.0, 1.0), strict=True):
            row["all_reduce_gb_per_s"] = gb_per_s * scatter
        file.write_text(json.dumps(content))
    return file


def test_a_step_that_mostly_sends_is_set_against_the_link_by_hand(tmp_path):
    """2500 tokens/s of 2 MB are 5 GB/s: half of A's link; 20,000 are 40 GB/s, four fifths of B's."""
    a = read_side(str(linked(tmp_path, A40, rate=2500.0)))
    b = read_side(str(linked(tmp_path, H100, rate=20_000.0, gb_per_s=50.0)))
    found = compare(a, b, tolerance=0.1)
    (training,) = found.comparisons
    assert training.bounds == ("link", "link")
    centre = (0.99 * 1.01) ** (1 / 3)  # the geometric mean of the scatter
    assert training.shares[0].centre == pytest.approx(0.5 * centre)
    assert training.shares[1].centre == pytest.approx(0.8 * centre)
    assert training.parity.centre == pytest.approx(0.5 / 0.8)
    assert training.divisors["per byte/s of the measured link"] == pytest.approx(2500 / 20_000 * 5)
    texts = {claim.text: claim for claim in found.claims}
    claim = texts["training/llama-1b4/muon: parity of share of link within 10%"]
    assert claim.verdict == "contradicted" and "of B's share of link" in claim.because
    assert not any("the link" in line for line in found.missing if "left out" in line)


def test_a_link_that_is_fast_enough_bounds_nothing_and_one_that_scatters_widens_the_share(tmp_path):
    fast = read_side(str(linked(tmp_path, A40, rate=2500.0, gb_per_s=36.0)))  # 2 MB in 55.6 µs; 56.8 compute
    slow = linked(tmp_path, H100, rate=2500.0, gb_per_s=10.0)
    (training,) = compare(fast, read_side(str(slow)), tolerance=0.1).comparisons
    assert training.bounds == ("compute", "link")
    steady = training.shares[1]
    content = json.loads(slow.read_text())
    content["peaks_of_rounds"][0]["all_reduce_gb_per_s"] = 7.0
    slow.write_text(json.dumps(content))
    found = compare(fast, read_side(str(slow)), tolerance=0.1)
    assert found.comparisons[0].shares[1].high > 1.3 * steady.high
    texts = [claim.because for claim in found.claims]
    assert "compute on A, link on B: parity here compares MFU with share of link" in texts


def several_nodes(folder, device, *, rate, gb_per_s, num_nodes=2, alone=None):
    """A file of training on one node and on two of 8 ranks, which send 2 MB per token to each other."""
    told = {"devices": 16, "ranks": 16, "nodes": 2, "link_bytes": 2e6}
    name = "training/llama-1b4/muon"
    across = figure(device, "training", 0.1, id=f"{name}/2 nodes", values=[rate * s for s in SCATTER], **told)
    here = figure(device, "training", 0.1, values=[(alone or rate) * s for s in SCATTER], ranks=1, nodes=1)
    file = write(folder, device, [here, across])
    content = json.loads(file.read_text())
    best = {"best": gb_per_s, "spread": [gb_per_s * 0.9, gb_per_s]}
    content["ceilings"]["links_between_nodes"] = {
        "num_ranks": num_nodes, "all_reduce_gb_per_s": best, "all_to_all_gb_per_s": best,
        "all_reduce_latency_us": 80.0,
    }  # fmt: skip
    file.write_text(json.dumps(content))
    return file


def test_on_several_nodes_the_network_is_the_link_and_what_they_keep_is_said(tmp_path):
    """2500 tokens/s of 2 MB are half of 10 GB/s, 20,000 four fifths of 50; A keeps 80% of its rate on one."""
    a = several_nodes(tmp_path, A40, rate=2500.0, gb_per_s=10.0, alone=3125.0)
    b = several_nodes(tmp_path, H100, rate=20_000.0, gb_per_s=50.0)
    found = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1)
    alone, across = found.comparisons
    assert alone.bounds == ("compute", "compute") and across.bounds == ("link", "link")
    assert across.parity.centre == pytest.approx(0.5 / 0.8)
    scatter = (0.99 * 1.01) ** (1 / 3)
    assert across.shares[0].centre == pytest.approx(0.5 * scatter)
    assert across.shares[0].low < 0.5 * scatter * 0.9  # the network was measured once, slowest to fastest
    texts = {claim.text: claim.verdict for claim in found.claims}
    kept = [text for text in texts if "keeps" in text]
    assert kept[0].startswith("training/llama-1b4/muon/2 nodes: a device of A keeps 0.800 [")
    assert kept[1].startswith("training/llama-1b4/muon/2 nodes: a device of B keeps 1.00 [")
    assert texts[kept[0]] == "supported"
    folder = tmp_path / "out"
    assert parity.main([str(a), str(b), "--output", str(folder), "--wandb", "disabled"]) == 0
    text = (folder / "report.md").read_text()
    assert "10.0 (9.00 to 10.0), all-reduce bus bandwidth, 2 nodes |" in text
    assert "| all-reduce of 4 bytes, 2 nodes, µs | 80.0 | 80.0 |" in text


def test_a_network_of_fewer_nodes_is_not_that_of_the_figure(tmp_path):
    a = several_nodes(tmp_path, A40, rate=2500.0, gb_per_s=10.0)
    b = several_nodes(tmp_path, H100, rate=20_000.0, gb_per_s=50.0, num_nodes=1)
    found = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1)
    assert found.comparisons[1].bounds == ("compute", "compute")
    assert any(f"not measured with 2 nodes in {b}" in line for line in found.missing)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gb_per_s": None}, "not measured with 8 ranks in"),
        ({"num_ranks": 4}, "not measured with 8 ranks in"),
        ({"link_bytes": None}, "bytes sent are not counted in"),
    ],
)
def test_without_a_link_on_one_side_it_is_left_out_of_both_and_said(tmp_path, changes, reason):
    a = read_side(str(linked(tmp_path, A40, rate=2500.0)))
    b = linked(tmp_path, H100, rate=20_000.0, **changes)
    found = compare(a, read_side(str(b)), tolerance=0.1)
    assert found.comparisons[0].bounds == ("compute", "compute")
    assert "per byte/s of the measured link" not in found.comparisons[0].divisors
    (said,) = (line for line in found.missing if "left out of both" in line)
    assert said == f"training/llama-1b4/muon: the link, left out of both rooflines: {reason} {b}"


def test_a_datasheet_has_no_link_and_a_single_rank_needs_none(tmp_path):
    sending = {"compute": 0.3, "communication": 0.6, "optimizer": 0.1, "data": 0.0, "other": 0.0}
    a = read_side(str(linked(tmp_path, A40, rate=2500.0, time_shares=sending)))
    against = compare(a, read_side("datasheet:h100"), tolerance=0.1)
    assert against.comparisons[0].bounds == ("compute", "compute")
    assert any("datasheet:h100 has none" in line for line in against.missing)
    assert "and is not in the roofline" in against.claims[-1].because
    one = linked(tmp_path, H100, rate=20_000.0, gb_per_s=None, devices=1, ranks=1, link_bytes=0.0)
    assert compare(a, read_side(str(one)), tolerance=0.1).comparisons[0].bounds == ("link", "compute")


def test_the_report_names_the_link_that_a_share_is_of(tmp_path, capsys):
    name = "share of measured link: all-reduce bus bandwidth, 8 ranks"
    shares = {name: [0.5], f"{name}, during communication alone": [0.9]}
    a = linked(tmp_path, A40, rate=2500.0, shares=shares)
    folder = tmp_path / "out"
    assert parity.main([str(a), str(a), "--output", str(folder), "--wandb", "disabled"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).popitem()[1]["bounds"] == ["link", "link"]
    text = (folder / "report.md").read_text()
    for needed in (
        "| share of link 50.0% [", "10.0 (5.00 to 10.0), all-reduce bus bandwidth, 8 ranks |",
        f"{name} 50.0%, {name}, during communication alone 90.0%", "per byte/s of the measured link",
    ):  # fmt: skip
        assert needed in text, needed
