"""The plan of a run as a user sees it: it fits or is refused, and what is proposed."""

from pathlib import Path

import pytest

from cluster.config import ConfigError
from training import config as training_config
from training import plan as planning
from training.plan import make_plan, run_identity

A40_1B4 = Path("training/configs/a40_1b4.yaml")


def test_the_1b4_run_fits_an_a40_and_says_so_exactly() -> None:
    plan = make_plan(training_config.load(file=A40_1B4))
    assert plan.shape.num_parameters == 1_420_396_544
    assert 20e9 < plan.total_memory_bytes < 46e9
    # Weights and masters by hand: 2 bytes a parameter on each GPU; 4 bytes shared by the workers.
    assert plan.memory_bytes["weights"] == 2 * plan.shape.num_parameters
    assert plan.memory_bytes["master weights (fp32)"] == 4 * plan.shape.num_parameters // plan.num_workers
    scion = make_plan(
        training_config.load(file=A40_1B4, dotlist=["optim.by_name=[]", "optim.matrix.rule=scion"])
    )
    assert "optimizer" in plan.seconds and "without the optimizer step" not in plan.describe()
    assert "optimizer" not in scion.seconds and "without the optimizer step" in scion.describe()
    with pytest.raises(ConfigError, match=r"batch.micro_sequences.*activation_checkpointing.*zero.stage"):
        make_plan(training_config.load(file=A40_1B4, dotlist=["batch.micro_sequences=32"]))


def test_a_run_that_does_not_fit_is_told_what_does(capsys) -> None:
    arguments = ["--config", str(A40_1B4), "batch.micro_sequences=32"]
    assert planning.main(arguments) == 2
    message = capsys.readouterr().err
    [proposed] = [line for line in message.splitlines() if "is the fastest that fits 48 GB" in line]
    assert "most of it in: forward" in proposed
    keys = proposed.partition("). ")[2].partition(" is the fastest")[0].split()
    assert planning.main(["--config", str(A40_1B4), *keys]) == 0
    assert "proposed" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_proposed(capsys) -> None:
    assert planning.main(["precision=fp32"]) == 0
    found = capsys.readouterr().out
    assert "memory, optimizer step" in found and "proposed" not in found
    assert planning.main(["model.shape=llama-9t"]) == 2
    assert capsys.readouterr().err.startswith("error: model: llama-9t: no such config.json")


def test_a_run_from_before_an_option_resumes_and_one_with_it_only_with_it() -> None:
    configs = [training_config.load(dotlist=keys) for keys in ([], ["model.qk_norm=true"])]
    plain, normed = (run_identity(each, make_plan(each), fingerprint="")["model"] for each in configs)
    assert "qk_norm" not in plain and normed == {**plain, "qk_norm": True}
