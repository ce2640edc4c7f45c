"""What is a bad GPU, what a warning, and that each is said once."""

import pytest

from cluster.heart.health import BAD_XIDS, GPU_BAD, GPU_PROBLEM, NODE_PROBLEM, THROTTLED_LOOKS, Judge


def look(*, gpu=None, **more):
    sound = {
        "index": 3, "uuid": "GPU-33", "lost": None, "ecc_errors": 2, "remap_pending": False,
        "remap_failed": False, "throttled": [], "link_errors": 5, "others": [],
    }  # fmt: skip
    node = {"host": "node1", "gpus": [{**sound, **(gpu or {})}], "gpus_problem": None, "xids": []}
    return {**node, "disk_errors": [], "disks": {"/scratch": 10**12}, **more}


@pytest.fixture
def judge():
    judge = Judge()
    assert judge.findings(look()) == []  # errors of before the run are the preflight's
    return judge


@pytest.mark.parametrize(
    ("found", "kind", "text"),
    [
        (look(xids=[[3, 79]]), GPU_BAD, "GPU 3 of node1: Xid 79, it has fallen off the bus"),
        (look(gpu={"lost": "GPU is lost"}), GPU_BAD, "GPU 3 of node1 does not answer any more (GPU is lost)"),
        (look(gpu={"ecc_errors": 3}), GPU_BAD, "GPU 3 of node1: 1 error of its memory that ECC could not"),
        (look(gpu={"remap_failed": True}), GPU_BAD, "could not be replaced"),
        (look(gpu={"remap_pending": True}), GPU_PROBLEM, "waits to be replaced"),
        (look(xids=[[3, 31]]), GPU_PROBLEM, "GPU 3 of node1: Xid 31; see NVIDIA's list"),
        (look(xids=[[None, 79]]), GPU_PROBLEM, "a GPU of node1: Xid 79"),  # of which GPU is not known
        (look(gpu={"link_errors": 8}), GPU_PROBLEM, "3 errors on its PCIe or NVLink since the run began"),
        (look(gpu={"others": [("ana", 77)]}), GPU_PROBLEM, "also used by user ana, pid 77; nothing was done"),
        (look(gpus_problem="NVML: mismatch"), NODE_PROBLEM, "node1: NVML: mismatch"),
        (look(disks={"/scratch": 10**9}), NODE_PROBLEM, "/scratch: 1 GB free; make room there"),
        (look(disks={"/storage": "Stale file handle"}), NODE_PROBLEM, "node1: /storage: Stale file handle"),
        (look(disk_errors=["I/O error, dev sda"]), NODE_PROBLEM, "error of a disk: I/O error, dev sda"),
    ],
)
def test_a_problem_is_found_once_and_again_after_it_has_gone(judge, found, kind, text):
    (finding,) = judge.findings(found)
    assert finding.kind == kind and text in finding.text and finding.host == "node1"
    if kind == GPU_BAD:
        assert (finding.gpu, finding.uuid) == (3, "GPU-33")
    assert judge.findings({**found, "xids": []}) == [] and judge.open
    judge.findings(look(gpu={"ecc_errors": 0, "link_errors": 0}))  # it was reset
    if not found["xids"]:
        assert judge.open == {}


def test_a_counter_that_was_not_answered_once_did_not_grow(judge):
    assert judge.findings(look(gpu={"ecc_errors": None, "link_errors": None})) == []
    assert judge.findings(look()) == []


def test_a_clock_is_off_by_a_second(judge):
    assert judge.findings(look(), clock_seconds=0.9) == []
    (finding,) = judge.findings(look(), clock_seconds=-4)
    assert finding.kind == NODE_PROBLEM and "off by -4.0 s; start chrony" in finding.text


def test_a_gpu_is_throttled_if_it_is_so_at_several_looks_in_a_row(judge):
    hot = look(gpu={"throttled": ["heat"]})
    for _ in range(THROTTLED_LOOKS - 1):
        assert judge.findings(hot) == [] and judge.num_throttled == 1
    judge.findings(look())
    found = [judge.findings(hot) for _ in range(THROTTLED_LOOKS + 2)]
    (finding,) = found[THROTTLED_LOOKS - 1]
    assert "GPU 3 of node1 is throttled by heat" in finding.text and sum(map(len, found)) == 1


def test_what_a_program_does_wrong_drains_no_gpu():
    assert not {13, 31, 43, 45} & set(BAD_XIDS)
