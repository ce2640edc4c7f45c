"""Transport on the row problem: a step by hand, and the whole in miniature."""

import json

import pytest
import torch

from optim.polar import polar_factor
from training.study.synthetic import transport
from training.study.synthetic.command import main
from training.study.synthetic.config import RowNormsConfig
from training.study.synthetic.row_norms import targets
from training.study.synthetic.transport import FORMS, NOISES, best_of, curves, draw, gain

CONFIG = RowNormsConfig(transport_steps=50)
NAMES = ["a", "b"]
BETA1 = (0.0, 0.9)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_is_transported_muon_written_out(ahead):
    """At γ = 0.1 beside another γ; the noise is added at the point, its average moves the weights."""
    goals, noise, beta = targets(CONFIG, 32, NAMES), draw(CONFIG, "student 2.5", NAMES), 0.9
    found, _ = curves("muon", beta, ahead, (0.03, 0.1), goals, noise, num_steps=50)
    for seed, goal in enumerate(goals.double()):
        weight = point = momentum = torch.zeros_like(goal)
        for step in range(50):
            momentum = beta * momentum + (1 - beta) * (point - goal + noise[step, seed])
            lr = 0.1 * (1 + torch.cos(torch.tensor(torch.pi * step / 50))) / 2
            before, weight = weight, weight - lr * polar_factor(momentum)
            reach = beta / (1 - beta) * min(1, (step + 1) / 10) if ahead else 0
            point = weight + reach * (weight - before)
        expected = 2 * torch.log10(goal.norm() / (weight - goal).norm())
        assert found[-1, 1, seed].item() == pytest.approx(expected.item(), abs=1e-3)


def test_noise_has_streams_of_its_own_and_a_tail():
    student, again = (draw(CONFIG, "student 2.5", ["a"]) for _ in range(2))
    assert student.equal(again) and not student.equal(draw(CONFIG, "student 2.5", ["b"]))
    assert draw(CONFIG, "none", ["a"]) is None
    assert student.abs().pow(1.5).mean().item() ** (1 / 1.5) == pytest.approx(0.02, rel=0.1)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("transport") / "t.json"
    few = ["transport=true", "transport_steps=50", "tuning_seeds=1", "seeds=2", "wandb=disabled"]
    with pytest.MonkeyPatch.context() as patch:  # fewer points of the grids, which take most of the time
        patch.setattr(transport, "BETA1", BETA1)
        patch.setattr(transport, "GAMMAS", transport.GAMMAS[10:])
        assert main([*few, f"output={output}"]) == 0
    assert output.with_suffix(".png").stat().st_size > 5000
    return json.loads(output.read_text())


def test_every_case_is_there_and_without_an_average_there_is_nothing_to_transport(result):
    assert len(result["cases"]) == len(NOISES) * len(FORMS) * 2 * len(BETA1)
    for noise in NOISES:
        for form in FORMS:
            still, moved = (
                best_of(result, noise=noise, form=form, beta1=0.0, ahead=ahead) for ahead in (False, True)
            )
            assert still["final"] == moved["final"] and still["gamma"] == moved["gamma"]


def test_transport_takes_the_lag_out_of_a_long_average(result):
    """F is quadratic: with β1 = 0.9 and exact gradients the point makes up for the average's age."""
    for form in FORMS:
        assert gain(result, noise="none", form=form, beta1=0.9).centre > 1
