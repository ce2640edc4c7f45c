"""What the driver says of GPUs. The answers are those of a stand-in: there is no GPU here."""

import pytest

from cluster.preflight import inspection

SOUND = "{0}, NVIDIA A40, 46068 MiB, 570.86.15, 0, Enabled, 4, 16"


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Makes nvidia-smi print these lines, or fail."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(*lines, code=0):
        said = "\n".join(lines)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return write


def test_a_sound_node(answer):
    answer(SOUND.format(0), SOUND.format(1))
    found = inspection.gpus()
    assert found["gpus_problem"] is None and [gpu["index"] for gpu in found["gpus"]] == [0, 1]
    gpu = found["gpus"][1]
    assert (gpu["name"], gpu["driver"], gpu["pcie"]) == ("NVIDIA A40", "570.86.15", "4x16")
    assert gpu["memory_gib"] == 45.0 and gpu["ecc_errors"] == 0 and gpu["persistence"]


def test_ecc_that_is_off_is_no_error(answer):
    answer(SOUND.format(0).replace(", 0, Enabled", ", [N/A], Disabled"))
    (gpu,) = inspection.gpus()["gpus"]
    assert gpu["ecc_errors"] is None and not gpu["persistence"]


@pytest.mark.parametrize(
    "line",
    [
        "1, [GPU is lost], [GPU is lost], [GPU is lost], [GPU is lost], [GPU is lost], [N/A], [N/A]",
        "Unable to determine the device handle for GPU 0000:41:00.0: Unknown Error",
    ],
)
def test_a_lost_gpu_is_a_problem_and_the_others_are_counted(answer, line):
    answer(SOUND.format(0), line, SOUND.format(2))
    found = inspection.gpus()
    assert [gpu["index"] for gpu in found["gpus"]] == [0, 2]
    assert line.partition(",")[0] in found["gpus_problem"]


def test_a_driver_that_does_not_answer_is_a_problem(answer):
    answer("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    found = inspection.gpus()
    assert found["gpus"] == [] and "couldn't communicate" in found["gpus_problem"]


def test_without_nvidia_smi_there_are_no_gpus_and_no_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert inspection.gpus() == {"gpus": [], "gpus_problem": None}


def test_throttled_is_what_is_active_and_not_what_is_not(answer):
    answer("0, Not Active, Not Active", "1, Not Active, Active")
    assert inspection._throttled() == {1}
