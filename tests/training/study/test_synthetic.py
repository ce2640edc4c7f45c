"""The synthetic problem's runs against the rules' oracle, its statistics and text."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster import config as layered
from cluster.config import ConfigError
from optim.rules import new_state, scion, transported
from optim.rules import step as oracle_step
from tests.commands import ROOT
from tests.training.study.test_synthetic_problem import NORM, TINY, normal
from tests.waiting import PATIENCE_SECONDS
from training.study.config import StudyConfig
from training.study.synthetic.config import SyntheticConfig, smoke
from training.study.synthetic.problem import (
    VARIANTS,
    NoiseStream,
    Problem,
    batched_theory,
    transported_theory,
)
from training.study.synthetic.report import describe, gain_verdict, plot, slope_verdict
from training.study.synthetic.trials import (
    _best,
    _scheduled,
    make_trial,
    ratio_with_interval,
    resample,
    run_synthetic,
    simulate,
    slope_with_interval,
    slopes,
    step_together,
)

# --- runs ---


def trials(num_steps: int = 40, average: float = 8.0, lr: float = 0.1, p: float = 2.0):
    return [
        make_trial(transported=moved, average=average, lr=lr, num_steps=num_steps, moment=p)
        for moved in (False, True)
    ]


def test_a_batched_step_has_the_bits_of_the_oracle():
    config, num_streams = SyntheticConfig(), 9
    pair = [*trials(average=8.0), *trials(average=1.0)]
    weights = normal(4, num_streams, 4, 16, seed=0).float()
    momenta = torch.zeros_like(weights)
    alone = weights.clone()
    states = [
        [new_state(trial.rule, alone[i, s]) for s in range(num_streams)] for i, trial in enumerate(pair)
    ]
    for step in range(1, 26):
        gradients = config.scale * normal(4, num_streams, 4, 16, seed=step).float()
        if step == 7:
            gradients[:, 0] = 0
        points = step_together(pair, weights, gradients, momenta, step=step)
        for i, trial in enumerate(pair):
            for s in range(num_streams):
                point = oracle_step(
                    trial.rule, alone[i, s], gradients[i, s], states[i][s], lr=trial.lr, step=step
                )
                assert torch.equal(points[i, s], point)
        assert torch.equal(weights, alone)
        assert all(torch.equal(momenta[i, s], states[i][s]["momentum"]) for i in range(4) for s in range(9))


@pytest.mark.parametrize("p", [2.0, 1.5])
def test_a_simulation_is_the_loop_written_out(p):
    config, num_steps = replace(TINY, scale=2.0), 270  # more than one chunk of noise
    problem = Problem(config.rows, config.cols, config.width)
    streams = [NoiseStream(config, f"s{i}") for i in range(3)]
    pair = trials(num_steps, p=p)
    for trial, found in zip(pair, simulate(config, pair, streams), strict=True):
        assert found.shape == (68, 3) and found.dtype == torch.float64
        for s, stream in enumerate(streams):
            weight = stream.start()
            state, point = new_state(trial.rule, weight), weight.clone()
            noise = stream.noise(p, begin=0, end=num_steps)
            for step in range(num_steps):
                if step % 4 == 0:
                    assert found[step // 4, s] == NORM.dual(problem.gradient(weight[None])).item()
                gradient = problem.gradient(point) + noise[step]
                point = oracle_step(trial.rule, weight, gradient, state, lr=trial.lr, step=step + 1).clone()


def test_trials_do_not_notice_each_other():
    """Other horizons, moments and rules in lock-step leave the bits alone, across chunks of noise too."""
    streams = [NoiseStream(TINY, f"s{i}") for i in range(2)]
    many = [
        *trials(num_steps=64),
        *trials(num_steps=300, p=1.5, average=30),
        *trials(num_steps=300, average=3),
        *trials(num_steps=17),
    ]
    together = simulate(TINY, many, streams)
    for trial, found in zip(many, together, strict=True):
        assert torch.equal(found, simulate(TINY, [trial], streams)[0])
    assert [len(found) for found in together] == [64, 64, 75, 75, 75, 75, 17, 17]


def test_no_transport_is_scion_bit_for_bit():
    scion, moved = trials(num_steps=100)
    still = replace(moved, rule=replace(moved.rule, ahead=None))
    streams = [NoiseStream(TINY, f"s{i}") for i in range(2)]
    plain, none, full = simulate(TINY, [scion, still, moved], streams)
    assert torch.equal(plain, none) and not torch.equal(plain, full)


def test_transport_from_zero_momentum_is_exact_with_the_factor_of_the_text():
    """The weighted mean of the points is the weights, on any path; the rule's ramp comes close."""
    beta, steps = 0.9, 60
    path = normal(steps + 1, 5, seed=0).cumsum(0)
    ramped = transported(scion(momentum=beta), ramp_steps=10)
    plain = transported(scion(momentum=beta))
    errors = {}
    for name, factor in {
        "exact": lambda t: beta / (1 - beta) * (1 - beta**t),
        "ramp": lambda t: ramped.finish(lr=1, scale=1, step=t).ahead if t else 0,
        "full": lambda t: plain.finish(lr=1, scale=1, step=t).ahead if t else 0,
    }.items():
        mean, worst = torch.zeros(5, dtype=torch.float64), 0.0
        for t in range(steps):
            point = path[t] + factor(t) * (path[t] - path[max(t - 1, 0)])
            mean = beta * mean + (1 - beta) * point
            worst = max(worst, (mean / (1 - beta ** (t + 1)) - path[t]).norm().item())
        errors[name] = worst
    assert errors["exact"] < 1e-12
    assert errors["ramp"] < 0.6 * errors["full"]


def test_transport_removes_the_lag_of_long_averages():
    """Where noise is small, only the lag is left; and on averages of one there is nothing to transport."""
    config = replace(TINY, scale=0.1)
    streams = [NoiseStream(config, f"s{i}") for i in range(4)]
    for average, better in ((64.0, 0.4), (1.0, None)):
        scion, moved = simulate(config, trials(512, average, 0.1), streams)
        if better is None:
            assert torch.equal(scion, moved)
        else:
            assert moved[32:].mean() < better * scion[32:].mean()


# --- tuning ---


def test_the_best_of_a_grid_and_its_rim():
    grid = torch.tensor([[1.0, 9, 9, 9], [9, 9, 2, 9], [9, 3, 9, 9], [9, 9, 9, 4]])
    averages, lrs = [1, 2, 4, 8], [0.8, 0.4, 0.2, 0.1]
    assert _best(grid, averages, lrs, shortest=1) == (1, 0.8, 1.0, True)
    assert _best(grid, averages, lrs, shortest=2) == (2, 0.2, 2.0, True)  # shorter ones were not allowed
    assert _best(grid, averages, lrs, shortest=8) == (8, 0.1, 4.0, True)
    grid[0, 0] = 9
    assert _best(grid, averages, lrs, shortest=1) == (2, 0.2, 2.0, False)
    grid[0, 1] = 0
    assert _best(grid, averages, lrs, shortest=1) == (1, 0.4, 0.0, False)  # no average is below one


def test_constants_are_carried_to_other_horizons_by_the_theory():
    grid = torch.full((5, 4), 9.0)
    grid[4, 1], grid[0, 2] = 1.0, 0.5
    picks = {
        name: _best(grid, [1, 2, 4, 8, 16], [0.8, 0.4, 0.2, 0.1], shortest=1 if row.any_average else 8)
        for name, row in VARIANTS.items()
    }
    config, tuning = replace(TINY, tuning_horizon=5), {2.0: {"picks": picks}}
    for name, factor in (("batched", batched_theory), ("transported", transported_theory)):
        same, longer = (_scheduled(config, tuning, 2.0, name, horizon) for horizon in (32, 512))
        average, step, _ = factor(2.0)
        assert (same.rule.direction.beta, same.lr) == (pytest.approx(1 - 1 / 16), 0.4)
        assert 1 - longer.rule.direction.beta == pytest.approx(16**-average / 16)
        assert longer.lr == pytest.approx(0.4 * 16**-step) and longer.num_steps == 512
        assert same.rule.looks_ahead == (name == "transported")
    moved, control = (_scheduled(config, tuning, 2.0, name, 512) for name in ("transported", "control"))
    assert (moved.lr, moved.rule.direction) == (control.lr, control.rule.direction)
    assert moved.rule.ahead.ramp_steps == round(16 * 16 ** (4 / 7))
    assert not control.rule.looks_ahead
    free = _scheduled(config, tuning, 2.0, "any_average", 16)
    assert (free.rule.direction.beta, free.lr) == (0.0, pytest.approx(0.2 * 2**0.75))  # less than one is one


# --- statistics ---


@pytest.mark.parametrize("power", [-0.25, -2 / 9, 0.5])
def test_the_slope_of_a_power_law_is_its_power(power):
    horizons = [64, 128, 512, 4096]
    values = 3 * np.array(horizons, dtype=float)[:, None] ** power * np.array([1.0, 2.0, 0.5, 7.0, 1.5])
    assert slopes(horizons, values.mean(1)) == pytest.approx(power)
    fit = slope_with_interval(horizons, values, resample(5))
    assert fit == pytest.approx([power] * 3)  # seeds differ by factors alone


def test_intervals_hold_the_true_slope_as_often_as_the_text_says():
    """Means of 16 seeds, errors of 30%, independent over horizons: 92% of intervals in 2000 trials."""
    horizons, rng = [2**k for k in range(6, 12)], np.random.default_rng(1)
    held, widths, found = 0, [], []
    for _ in range(300):
        errors = rng.lognormal(-0.045, 0.3, (len(horizons), 16))
        values = np.array(horizons, dtype=float)[:, None] ** -0.25 * errors
        slope, low, high = slope_with_interval(horizons, values, resample(16, count=500))
        held += low <= -0.25 <= high
        widths.append(high - low)
        found.append(slope)
    assert 0.88 <= held / 300 <= 0.965
    assert np.mean(found) == pytest.approx(-0.25, abs=0.004)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(found), rel=0.15)


def test_a_ratio_is_paired():
    below = np.random.default_rng(0).lognormal(0, 1, 16)
    above = 0.8 * below
    assert ratio_with_interval(above, below, resample(16)) == pytest.approx([0.8] * 3)
    value, low, high = ratio_with_interval(above[::-1], below, resample(16))
    assert value == pytest.approx(0.8) and low < 0.6 and high > 1.1


# --- the whole ---


@pytest.fixture(scope="module")
def result():
    torch.set_num_threads(1)
    return run_synthetic(smoke(SyntheticConfig()), report=lambda line: None)


def test_the_result_is_complete_json_and_its_numbers_agree(result):
    assert json.loads(json.dumps(result)) == result
    assert result["horizons"] == [64, 128, 256, 512]
    assert [moment["p"] for moment in result["moments"]] == [2.0, 1.5]
    for moment in result["moments"]:
        for name, row in moment["contenders"].items():
            duals = np.array(row["duals"])
            assert duals.shape == np.array(row["later_duals"]).shape == (4, 6)
            assert (np.diff(duals.mean(1)) < 0).all()
            assert (np.mean(row["later_duals"], 1) < duals.mean(1)).all()  # past the way down
            assert row["slope"][0] == pytest.approx(slopes(result["horizons"], duals.mean(1)))
            assert row["theory"] == pytest.approx(-VARIANTS[name].theory(moment["p"]).rate)
            for value, low, high in (row["slope"], row["later_slope"], *row["intervals"]):
                assert low <= value <= high
            assert 0 < row["travel_share"] < 1  # a lower bound of the mean, F being convex
        moved, batched = (
            np.array(moment["contenders"][name]["duals"]).mean(1) for name in ("transported", "batched")
        )
        np.testing.assert_allclose([ratio for ratio, *_ in moment["gain"]["batched"]], moved / batched)
        assert moment["slope_difference"][0] == pytest.approx(
            moment["contenders"]["transported"]["slope"][0] - moment["contenders"]["batched"]["slope"][0]
        )


def test_the_picks_are_the_best_of_what_was_allowed(result):
    for moment in result["moments"]:
        tuning = moment["tuning"]
        picks, allowed = tuning["picks"], tuning["averages"].index(8)
        assert picks["control"] == picks["transported"]
        for rule, free in (("batched", "any_average"), ("transported", "transported_any_average")):
            assert picks[rule]["dual"] == np.min(tuning[rule][allowed:])
            assert picks[free]["dual"] == np.min(tuning[rule]) <= picks[rule]["dual"]
        assert tuning["batched"][0] == tuning["transported"][0]  # averages of one


def test_transport_wins_where_the_theory_says_so(result):
    """Long averages at equal parameters; the slopes' order; and not against the best Scion at p = 1.5."""
    for moment in result["moments"]:
        rows = moment["contenders"]
        assert moment["gain"]["control"][-1][2] < 0.7
        assert rows["transported"]["slope"][0] < rows["batched"]["slope"][0] < rows["control"]["slope"][0]
    assert result["moments"][1]["gain"]["any_average"][-1][2] > 0.95


def test_runs_repeat_and_threads_are_given_back():
    before, lines = torch.get_num_threads(), []
    torch.set_num_threads(2)
    one, two = (run_synthetic(TINY, report=lines.append) for _ in range(2))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert one.pop("seconds") > 0 and two.pop("seconds") > 0
    assert one == two
    assert len(lines) == 4 and "2^5" in lines[0] and "2^6" in lines[1]
    other = run_synthetic(replace(TINY, seed=1), report=lines.append)
    assert other["moments"][0]["contenders"] != one["moments"][0]["contenders"]


# --- text and picture ---


def test_verdicts_on_a_slope():
    assert (
        slope_verdict([-0.30, -0.32, -0.28], -0.25) == "steeper than the bound, which is for the worst case"
    )
    assert slope_verdict([-0.20, -0.22, -0.18], -0.25) == "shallower than the bound at these horizons"
    assert slope_verdict([-0.24, -0.27, -0.21], -0.25) == "as the theory says, within the interval"


def test_verdicts_on_a_gain():
    assert gain_verdict([0.8, 0.7, 0.9], "X") == "0.800 [0.700, 0.900]: Transported Scion is lower than X"
    assert gain_verdict([1.2, 1.1, 1.3], "X") == "1.200 [1.100, 1.300]: Transported Scion is higher than X"
    assert gain_verdict([1.0, 0.9, 1.1], "X").endswith(": no difference from X within the interval")


def test_the_description_holds_every_row_and_says_what_it_does_not_show(result):
    text = describe(result)
    for row in (
        "| 2 | Batched Scion | -0.250, ε^-4.00 |",
        "| 2 | Transported Scion | -0.286, ε^-3.50 |",
        "| 1.5 | Batched Scion | -0.200, ε^-5.00 |",
        "| 1.5 | Transported Scion | -0.222, ε^-4.50 |",
        "| 1.5 | control: Scion at Transported's parameters | -0.111, ε^-9.00 |",
    ):
        assert text.count(row) == 1
    assert "T = 64, 128, 256, 512 gradients" in text and "tuned once at T = 64" in text
    assert "What this does not show" in text and "upper bounds for the worst problem" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables[:10]}) == 1 and len(tables) == 10 + 6


def test_the_description_follows_the_numbers(result):
    changed = copy.deepcopy(result)
    moment = changed["moments"][0]
    moment["contenders"]["batched"]["slope"] = [-0.2, -0.21, -0.19]
    moment["gain"]["any_average"][-1] = [1.1, 1.05, 1.15]
    moment["slope_difference"] = [0.0001, -0.01, 0.01]
    for entry in changed["moments"]:
        entry["tuning"]["picks"]["any_average"] = entry["tuning"]["picks"]["batched"]
    text = describe(changed)
    assert "| -0.250, ε^-4.00 | -0.200 [-0.210, -0.190] | ε^-5.00 |" in text
    assert "p = 2: 1.100 [1.050, 1.150]: Transported Scion is higher than Scion, any average." in text
    assert "0.000 [-0.010, 0.010], not distinct; the theory says -0.036" in text
    assert "for practice the fair comparison" in describe(result)
    assert "for practice the fair comparison" not in text
    moment["slope_difference"] = [-0.00001, -0.0002, -0.00005]
    assert "is 0.000 [0.000, 0.000], distinct" in describe(changed)  # never -0.000


def test_the_picture_is_written(result, tmp_path):
    path = plot(result, tmp_path / "figures" / "rates.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


# --- configuration ---


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("rows=0", "rows: must be at least 1"),
        ("width=0", "width: must lie in (0, inf), not 0.0"),
        ("distance=.nan", "distance: must be finite, not nan"),
        ("tail_margin=-0.1", "tail_margin: must lie in (0, inf)"),
        ("scale=-1", "scale: must lie in [0, inf)"),
        ("seeds=1", "seeds: must be at least 2"),
        ("tuning_seeds=0", "tuning_seeds: "),
        ("moments=[]", "moments: one or more"),
        ("moments=[2,2]", "moments: one or more, all different"),
        ("moments=[2,1]", "moments: must lie in (1, 2]"),
        ("horizons=[8,9]", "horizons: two powers, at least two apart: a slope needs three"),
        ("horizons=[8,40]", "horizons: must lie between 3 and 20"),
        ("tuning_horizon=3", "tuning_horizon: must lie between 4 and 20"),
        ("shortest_average=6", "shortest_average: 6 is not one of: 1, 2, 4"),
        ("shortest_average=64 tuning_horizon=6", "shortest_average: must be at most half"),
        ("noise=levy", "noise: 'levy' is not one of"),
        ("noise=stable", "noise: stable has tails up to 2"),
    ],
)
def test_errors_name_the_key(pairs, message):
    with pytest.raises(ConfigError) as raised:
        layered.load(StudyConfig, dotlist=[f"synthetic.{pair}" for pair in pairs.split()])
    assert f"synthetic.{message}" in str(raised.value)


def test_the_configuration_is_read_and_written_as_others():
    dotlist = ["moments=[1.8,1.3]", "horizons=[6,9]", "noise=stable", "scale=2", "enabled=true"]
    config = layered.load(SyntheticConfig, dotlist=dotlist)
    assert tuple(config.moments) == (1.8, 1.3) and tuple(config.horizons) == (6, 9)
    assert config.enabled and config.scale == 2.0
    assert tuple(layered.to_dict(config)["horizons"]) == (6, 9) and "- 1.3" in layered.to_yaml(config)
    with pytest.raises(ConfigError, match="seeds"):
        layered.load(SyntheticConfig, dotlist=["seeds=many"])
    assert smoke(replace(config, shortest_average=256)).shortest_average == 8


def test_the_configuration_needs_no_torch():
    module = "training.study.synthetic.config"
    code = f"import sys; sys.modules['torch'] = None; import {module} as s; s.SyntheticConfig()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENCE_SECONDS)
