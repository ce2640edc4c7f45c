import pytest

from cluster.measure import hardware
from cluster.record import provenance


@pytest.mark.parametrize(
    ("name", "bf16_tflops", "shared_kib"),
    [
        ("NVIDIA A40", 149.7, 99),
        ("A40", 149.7, 99),
        ("NVIDIA RTX A6000", 154.8, 99),
        ("NVIDIA A100-SXM4-40GB", 312, 163),
        ("A100-SXM4-80GB", 312, 163),
        ("NVIDIA L40S", 362.05, 99),
        ("NVIDIA H100 80GB HBM3", 989, 227),
        ("NVIDIA H100 PCIe", 756, 227),
        ("NVIDIA H200", 989, 227),
    ],
)
def test_driver_names_find_their_datasheet(name, bf16_tflops, shared_kib):
    device = hardware.lookup(name)
    assert device.bf16_tflops == bf16_tflops
    assert device.shared_memory_per_block_bytes == shared_kib * 1024


@pytest.mark.parametrize(
    "name",
    ["NVIDIA RTX A400", "NVIDIA RTX A4000", "NVIDIA A4", "NVIDIA A40-48Q", "NVIDIA A100 80GB PCIe",
     "NVIDIA L40", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "", "cpu"],
)  # fmt: skip
def test_a_name_that_only_resembles_one_has_no_datasheet(name):
    assert hardware.lookup(name) is None


def test_the_a40_and_h100_are_as_the_design_states_them():
    a40, h100 = hardware.lookup("NVIDIA A40"), hardware.lookup("NVIDIA H100 80GB HBM3")
    assert (a40.memory_gb_per_s, a40.memory_gb, a40.power_watts) == (696, 48, 300)
    assert (h100.memory_gb_per_s, h100.memory_gb, h100.power_watts) == (3350, 80, 700)
    assert (a40.compute_capability, h100.compute_capability) == ((8, 6), (9, 0))
    assert all(device.source.startswith("https://") for device in hardware.DEVICES)


def test_tensor_core_peaks_follow_from_sms_clock_and_flops_per_clock():
    """Dense bf16 FLOPs per SM and clock: 1024 on pro GA102 and AD102, 2048 on GA100, 4096 on GH100."""
    sms_boost_ghz_flops = {
        "NVIDIA A40": (84, 1.740, 1024),
        "NVIDIA RTX A6000": (84, 1.800, 1024),
        "NVIDIA A100-SXM4-80GB": (108, 1.410, 2048),
        "NVIDIA L40S": (142, 2.520, 1024),
        "NVIDIA H100 80GB HBM3": (132, 1.830, 4096),
        "NVIDIA H100 PCIe": (114, 1.620, 4096),
    }
    for name, (sms, ghz, flops) in sms_boost_ghz_flops.items():
        assert hardware.lookup(name).bf16_tflops == pytest.approx(sms * ghz * flops / 1e3, rel=0.02), name


def test_mfu_and_mbu_on_figures_worked_by_hand():
    rate = {"tokens_per_second": 7000, "flops_per_token": 9e9, "num_devices": 1, "peak_tflops": 150}
    assert hardware.mfu(**rate) == pytest.approx(0.42)
    assert hardware.mfu(**{**rate, "num_devices": 2}) == pytest.approx(0.21)
    assert hardware.mbu(bytes_per_step=2.8e9, step_seconds=0.008, gb_per_s=700) == pytest.approx(0.5)


def test_secrets_are_masked_and_token_counts_are_not():
    command = ["train", "batch.tokens=8192", "data.tokenizer=train", "WANDB_API_KEY=abc", "--token", "abc",
               "a", "--hf-token=abc", "redis://user:abc@head:1", "sample_tokens=3"]  # fmt: skip
    masked = provenance.mask_secrets(command)
    assert masked == ["train", "batch.tokens=8192", "data.tokenizer=train", "WANDB_API_KEY=***", "--token",
                      "***", "a", "--hf-token=***", "redis://***@head:1", "sample_tokens=3"]  # fmt: skip


def test_provenance_names_versions_and_time():
    found = provenance.collect(command=["x"], data_fingerprint="f00", packages=("numpy", "no-such-package"))
    assert found["packages"]["no-such-package"] == "not installed"
    assert found["packages"]["numpy"][0].isdigit()
    assert found["time"].endswith("+00:00") and found["data_fingerprint"] == "f00"


def test_a_copy_without_git_takes_its_commit_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    monkeypatch.delenv("ASUNCION_COMMIT", raising=False)
    unknown = provenance.code_version()
    assert unknown["commit"] == "unknown" and unknown["dirty"] is None
    assert "not a git repository" in unknown["commit_problem"]
    assert provenance.commit_environment() == {}
    monkeypatch.setenv("ASUNCION_COMMIT", "abc123+dirty")
    assert provenance.code_version() == {"commit": "abc123", "dirty": True}
    assert provenance.commit_environment() == {"ASUNCION_COMMIT": "abc123+dirty"}
    monkeypatch.undo()
    monkeypatch.setenv("ASUNCION_COMMIT", "abc123")  # also where the copy lies over another commit's folder
    assert provenance.code_version() == {"commit": "abc123", "dirty": False}
