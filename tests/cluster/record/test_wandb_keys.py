import pytest

from cluster.record.wandb_keys import AXES, JOB_TYPES, summary_of, wandb_key


@pytest.mark.parametrize(
    ("job_type", "key", "expected"),
    [
        ("train", "loss", "train/loss"),
        ("train", "lr", "train/lr"),
        ("train", "gradient_norm", "train/gradient_norm"),
        ("train", "validation_loss", "validation/loss"),
        ("train", "tuning_loss", "validation/tuning_loss"),
        ("train", "tokens_per_second", "throughput/tokens_per_second"),
        ("train", "mfu_reason", "throughput/mfu_reason"),
        ("train", "median_step_seconds", "throughput/median_step_seconds"),
        ("train", "checkpoint_seconds", "throughput/checkpoint_seconds"),
        ("train", "optimizer_exchange_seconds", "optimizer/exchange_seconds"),
        ("train", "optimizer_layers", "optimizer/layers"),
        ("train", "noise_tail_index_median", "noise/tail_index_median"),
        ("train", "noise", "noise/layers"),
        ("serve-bench", "ttft_p99_ms", "serve/ttft_p99_ms"),
        ("serve-bench", "seconds", "serve/seconds"),
        ("race", "speedup_vllm_8", "bench/speedup_vllm_8"),
        ("parity", "figures", "parity/figures"),
        ("preflight", "passed", "preflight/passed"),
        ("train", "system/own", "system/own"),
    ],
)
def test_a_key_carries_its_section(job_type, key, expected):
    assert wandb_key(key, job_type=job_type) == expected


def test_what_can_be_the_x_axis_carries_none():
    assert [wandb_key(axis, job_type="train") for axis in AXES] == list(AXES)


def test_an_unknown_job_type_is_refused():
    with pytest.raises(KeyError):
        wandb_key("loss", job_type="trian")
    assert "train" in JOB_TYPES


def test_the_summary_says_best_mean_or_last_on_purpose():
    assert summary_of("validation/loss") == "min,last"
    assert summary_of("throughput/tokens_per_second") == "mean,last"
    assert summary_of("serve/goodput_per_second") == "max,last"
    assert summary_of("train/loss") is None
