"""The check of the projection, with commands that answer at once."""

import pytest

from tests.lab import projection_check
from tests.lab.projection_ranks import COLLECTIVES
from tests.training.projection.test_command import row
from training import config as training_config
from training.plan import make_plan


def test_the_check_predicts_from_one_worker_and_what_many_get_at_once():
    config = training_config.load(dotlist=[*projection_check.DEFAULTS, "precision=bf16"])
    alone = {"products_tflops": 0.2, "passes_gb_per_s": 20.0}
    together = {"products_tflops": 0.1, "passes_gb_per_s": 10.0, "all_reduce_latency_us": 0.0}
    together |= dict.fromkeys((f"{kind}_gb_per_s" for kind in COLLECTIVES), 1.0)
    given = row(num_workers=1, tokens_per_step=1024)
    step = projection_check.predict(config, given, stage=2, workers=2, alone=alone, together=together)
    num_parameters = make_plan(config).shape.num_parameters
    assert step.seconds["compute"] == pytest.approx(2 * 1.75 * 0.8)
    # two micro-batches of an all-reduce, one all-gather; the plan cuts no matrix on two ranks
    assert step.seconds["intra-node link"] == pytest.approx((2 * 2 + 1) * num_parameters / 1e9, rel=1e-3)
    # half of the shard at half the rate, but orthogonalised once, by one of two
    assert step.seconds["optimizer"] == pytest.approx(0.5 * 0.8, rel=0.05)


@pytest.mark.parametrize("key", ["workers.count=2", "zero.stage=1", "launcher=ray"])
def test_the_check_refuses_what_it_sets_itself(key, capsys):
    assert projection_check.main([key]) == 2
    assert f"{key}: leave it out" in capsys.readouterr().err


def test_the_check_refuses_a_rule_whose_products_are_not_modelled(capsys):
    assert projection_check.main(["optim.matrix.rule=scion", "--dry-run"]) == 2
    assert "what scion computes is not modelled" in capsys.readouterr().err


def test_the_check_says_what_it_would_run(capsys):
    assert projection_check.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()[-9:]
    assert all("training.baseline.steps" in line for line in lines)
    assert (
        "--nproc-per-node=3" in lines[-1] and "zero.stage=3" in lines[-1] and "batch.tokens=3072" in lines[-1]
    )


def test_the_check_compares_prediction_and_measurement(monkeypatch, capsys):
    """With commands that answer at once: the same step for any number of workers, links that cost nothing."""
    rates = dict.fromkeys((f"{kind}_gb_per_s" for kind in COLLECTIVES), 1e9)
    probe = {"num_ranks": 0, "products_tflops": 0.2, "passes_gb_per_s": 20.0, "all_reduce_latency_us": 0.0}
    answers = []

    def answer(command):
        answers.append(command)
        return (
            probe | rates
            if "tests.lab.projection_ranks" in command
            else row(num_workers=1, tokens_per_step=1024)
        )

    monkeypatch.setattr(projection_check, "_last_line", answer)
    config = training_config.load(dotlist=projection_check.DEFAULTS)
    result = projection_check.check(config, projection_check.DEFAULTS, num_rounds=2, steps=1)
    assert len(answers) == 2 * 3 * 3 * 2
    # compute and data as measured; the optimizer's part is halved, of 2.0 s in which it took a fifth
    assert result["error_percent_zero2_2_workers"] == pytest.approx(
        100 * (1.6 * 0.875 + 0.2) / 2 - 100, abs=2
    )
    assert result["measured_seconds_zero3_1_worker"] == 2.0 and len(result["runs"]) == 18
    assert "NOT within 15%" in projection_check.table(result)
    assert "round 2/2 ZeRO-3, 3 workers" in capsys.readouterr().err
