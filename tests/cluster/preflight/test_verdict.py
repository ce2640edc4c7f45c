"""The preflight's verdict on simulated probe results: each fault names its node and a remedy."""

import copy

import pytest

from cluster.preflight import command as preflight
from cluster.preflight.command import PreflightConfig, ring_rounds
from cluster.preflight.verdict import (
    ExpectConfig,
    LimitsConfig,
    NodeExpectConfig,
    judge,
    measured_tflops,
    table,
)
from tests.cluster.review.panel_keys import missing

NODES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
EXPECT = ExpectConfig(nodes=3, gpus=2, accelerator="A40")


def ceiling(best):
    return {"best": best, "spread": (best, best)}


def links(rate=20.0):
    names = ("all_reduce_gb_per_s", "all_to_all_gb_per_s")
    return {**{name: ceiling(rate) for name in names}, "all_reduce_latency_us": 30.0}


def sound():
    """Three nodes of two A40 each, nothing wrong with them."""

    def gpu(index):
        facts = {"index": index, "name": "NVIDIA A40", "memory_gib": 45.0, "driver": "570.1", "pcie": "4x16"}
        return facts | {"ecc_errors": 0, "persistence": True, "throttled": False}

    def folder():
        return {"problem": None, "free_gb": 900.0, "write_gb_per_s": 1.0, "read_gb_per_s": 2.0}

    def node(number):
        rates = {"product_tflops": ceiling(120.0), "copy_gb_per_s": ceiling(600.0), "device": "NVIDIA A40"}
        return {
            "hostname": f"n{number}",
            "versions": {"torch": "2.13.0", "code": "abc"},
            "gpus_problem": None,
            "drained_gpus": 0,
            "toolchain_problem": None,
            "gpus": [gpu(0), gpu(1)],
            "scratch": folder(),
            "storage": {**folder(), "sees": ["n1", "n2", "n3"]},
            "ceilings": [rates, copy.deepcopy(rates)],
            "clock_skew_seconds": 0.001,
            "links": links(),
        }

    found = {address: node(number) for number, address in enumerate(NODES, 1)}
    pairs = ("10.0.0.1 10.0.0.2", "10.0.0.2 10.0.0.3", "10.0.0.3 10.0.0.1")
    return {"nodes": found, "links": links(2.5), "pairs": {pair: links(2.8) for pair in pairs}}


def verdict(found, *, expect=EXPECT, **limits):
    return judge(found, expect, LimitsConfig(**limits))


def test_sound_nodes_pass():
    assert verdict(sound()) == []
    assert all(node in str(table(sound(), [])[0]) for node in NODES)


def fall_off_the_bus(node):
    del node["gpus"][1]
    del node["ceilings"][1]


FAULTS = {  # what is done to the second node -> what is said of it
    "1 GPUs (index 0) and not 2": fall_off_the_bus,
    "nvidia-smi: it hangs": lambda node: node.update(gpus_problem="nvidia-smi: it hangs"),
    "Triton needs a C compiler": lambda node: node.update(
        toolchain_problem="Triton needs a C compiler: `apt install gcc`"
    ),
    "GPU 1 is a NVIDIA H200, not A40": lambda node: node["gpus"][1].update(
        name="NVIDIA H200", memory_gib=139
    ),
    "GPU 0 has 20.0 GiB": lambda node: node["gpus"][0].update(memory_gib=20.0),
    "GPU 0: 3 uncorrected ECC errors": lambda node: node["gpus"][0].update(ecc_errors=3),
    "GPU 1 is throttled": lambda node: node["gpus"][1].update(throttled=True),
    "driver is 535.2, and 570.1": lambda node: node["gpus"][0].update(driver="535.2"),
    "torch is 2.12.0, and 2.13.0": lambda node: node["versions"].update(torch="2.12.0"),
    "code is older, and abc": lambda node: node["versions"].update(code="older"),
    "scratch: 3.0 GB free": lambda node: node["scratch"].update(free_gb=3.0),
    "scratch: /x: No space left": lambda node: node["scratch"].update(problem="/x: No space left on device"),
    "storage is another place than that of n1, n3": lambda node: node["storage"].update(sees=["n2"]),
    "its clock is off by +7.0 s": lambda node: node.update(clock_skew_seconds=7.0),
    "GPU 1 reaches 90.0 TFLOP/s where the median is 120": lambda node: node["ceilings"][1].update(
        product_tflops=ceiling(90.0)
    ),
    "GPU 0 reaches 300 GB/s, below 60%": lambda node: node["ceilings"][0].update(
        copy_gb_per_s=ceiling(300.0)
    ),
    "all-reduce within it: 5.00 GB/s": lambda node: node.update(links=links(5.0)),
    "all-reduce within the node failed: timeout": lambda node: node.update(links={"problem": "timeout"}),
}


@pytest.mark.parametrize("told", FAULTS)
def test_a_fault_of_one_node_is_said_of_that_node_alone(told):
    found = sound()
    FAULTS[told](found["nodes"]["10.0.0.2"])
    findings = verdict(found)
    assert {finding.node for finding in findings} == {"10.0.0.2"}
    assert any(told in finding.message and finding.is_failure for finding in findings)
    assert all(len(finding.message) > len(told) + 10 for finding in findings)  # and a remedy
    assert "10.0.0.2" in str(table(found, findings)[0])


def test_one_slow_cable_is_that_node_and_not_its_neighbours():
    found = sound()
    for pair in ("10.0.0.1 10.0.0.2", "10.0.0.2 10.0.0.3"):
        found["pairs"][pair] = links(0.1)
    assert [finding.node for finding in verdict(found)] == ["10.0.0.2"]


def test_a_missing_node_is_said_of_the_cluster():
    found = sound()
    del found["nodes"]["10.0.0.3"]
    found["pairs"] = {}
    for node in found["nodes"].values():
        node["storage"]["sees"] = ["n1", "n2"]
    (finding,) = verdict(found)
    assert "2 nodes and not 3" in str(finding)


def test_without_persistence_is_a_warning():
    found = sound()
    found["nodes"]["10.0.0.1"]["gpus"][0]["persistence"] = False
    (finding,) = verdict(found)
    assert not finding.is_failure and "nvidia-smi -pm 1" in finding.message


def test_another_users_process_on_a_gpu_is_a_warning():
    found = sound()
    found["nodes"]["10.0.0.1"]["gpus"][1]["others"] = [["ana", 77]]
    (finding,) = verdict(found)
    assert not finding.is_failure and "GPU 1 is used by user ana, pid 77" in finding.message


def test_a_drained_gpu_closes_no_gate_and_the_others_keep_their_names():
    found = sound()
    node = found["nodes"]["10.0.0.2"]
    fall_off_the_bus(node)  # as the node answers without a drained GPU
    node |= {"drained_gpus": 1}
    assert verdict(found) == [] == verdict(found, expect=ExpectConfig())
    node["ceilings"][0] |= {"product_tflops": ceiling(90.0), "gpu": 5}
    (slow,) = verdict(found)
    assert "GPU 5 reaches 90.0" in slow.message


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 5, 8])
def test_the_neighbours_of_a_ring_are_measured_at_once_and_no_node_twice_in_a_round(num_nodes):
    ring = [str(node) for node in range(num_nodes)]
    rounds = ring_rounds(ring)
    pairs = [pair for each in rounds for pair in each]
    assert sorted(pairs) == sorted(
        (a, ring[(i + 1) % num_nodes]) for i, a in enumerate(ring) if num_nodes > 2
    )
    assert all(len({node for pair in each for node in pair}) == 2 * len(each) for each in rounds)
    assert len(rounds) <= 3


def test_each_kind_of_gpu_is_held_against_its_own_kind_and_a_drained_node_is_named():
    found = sound()
    node = found["nodes"]["10.0.0.3"]
    node["gpus"] = [{**gpu, "name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6} for gpu in node["gpus"]]
    fast = {
        "product_tflops": ceiling(800.0),
        "copy_gb_per_s": ceiling(2800.0),
        "device": "NVIDIA H100 80GB HBM3",
    }
    node |= {"ceilings": [fast, copy.deepcopy(fast)], "links": links(300.0)}
    (finding, *_) = verdict(found)
    assert "GPU 0 is a NVIDIA H100 80GB HBM3, not A40" in finding.message
    differs = {"10.0.0.3": NodeExpectConfig(gpus=2, accelerator="H100")}
    expect = ExpectConfig(nodes=3, gpus=2, accelerator="A40", differs=differs, drained=("10.0.0.4",))
    (finding,) = verdict(found, expect=expect)
    assert not finding.is_failure and str(finding).startswith("10.0.0.4: is drained")
    node["ceilings"][1]["product_tflops"] = ceiling(500.0)
    (slow, *_) = verdict(found, expect=expect)
    assert str(slow).startswith("10.0.0.3: GPU 1 reaches 500 TFLOP/s where the median is 650")
    report = {"found": found}
    assert (measured_tflops(report, "A40"), measured_tflops(report, "H100")) == (120.0, 650.0)


def test_a_slow_cpu_is_a_warning_and_other_faults_of_cpu_nodes_are_not():
    found = sound()
    for node in found["nodes"].values():
        node["gpus"] = []
        node["ceilings"] = [{**node["ceilings"][0], "device": "cpu, 2 threads"}]
    slow = found["nodes"]["10.0.0.2"]
    slow["ceilings"][0]["product_tflops"] = ceiling(1.0)
    slow["clock_skew_seconds"] = -9.0
    findings = verdict(found, expect=ExpectConfig(nodes=3, gpus=0))
    assert [finding.is_failure for finding in findings] == [True, False]
    assert "clock" in findings[0].message and "its CPU reaches 1.00 TFLOP/s" in findings[1].message


def test_the_limits_decide():
    found = sound()
    found["nodes"]["10.0.0.2"]["ceilings"][1]["product_tflops"] = ceiling(100.0)
    assert verdict(found, of_median=0.9) != []
    assert verdict(found, of_median=0.8) == []


def test_the_measured_ceiling_is_that_of_the_median_gpu():
    found = sound()
    found["nodes"]["10.0.0.2"]["ceilings"][1]["product_tflops"] = ceiling(10.0)
    assert measured_tflops({"found": found}) == 120.0
    for node in found["nodes"].values():
        node["gpus"] = []
    assert measured_tflops({"found": found}) is None


def test_a_preflight_lands_in_wandb_with_a_row_for_each_node_and_finding(tmp_path):
    config = PreflightConfig(output=str(tmp_path / "preflight.json"), wandb="offline")
    (tmp_path / "preflight.json").write_text("{}")
    found = {
        "passed": False,
        "failures": ["10.0.0.1: slow"],
        "warnings": [],
        "time": "2026-11-26T12:00:00+00:00",
    }
    status = preflight.record(config, tmp_path / "preflight.json", found, sound())
    assert status.startswith("offline: ")
    assert missing(tmp_path / "preflight", "preflight") == set()
