"""Transport with and without equal rows, under noise without and with heavy tails, on the row problem.

The question that arXiv 2605.18528 (transport) and arXiv 2609.39114 (NorMuon) leave: does transport still help
once rows are normalised? The problem is `row_norms`' with noise on each entry of the gradient, E|noise|^1.5 =
scale^1.5, and a cosine schedule. What counts is F at the end, not the least F on the way. Rules: Muon and
NorMuon (4.1), β2 = 0.95, without Nesterov, each with its gradients at the weights or β1/(1-β1) steps ahead,
ramped over 1/(1-β1) steps. One gradient a step.

F is quadratic: transport then cancels the lag of the average exactly, which is the best case for it.
"""

import itertools
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.display import COLORS, Table, figure, save, table
from cluster.measure.intervals import Interval, of_mean
from training.study.synthetic.config import RowNormsConfig
from training.study.synthetic.row_norms import COLS, Moving, Point, Report, cosine, make_rule, targets

if TYPE_CHECKING:
    from torch import Tensor

ROWS, SCALE = 32, 0.02
GAMMAS = tuple(10 ** (-4 + j / 4) for j in range(13))
BETA1 = (0.0, 0.5, 0.9, 0.95, 0.98, 0.99)
NOISES = {"none": None, "student 2.5": ("student", 2.5), "stable 1.8": ("stable", 1.8)}
FORMS = {"muon": "Muon", "practical": "NorMuon"}
NUM_POINTS = 50  # of a curve
HEAD = ("noise", "rule", "β1: " + ", ".join(f"{b:g}" for b in BETA1), "best", "transport - none, decades")


def draw(config: RowNormsConfig, noise: str, names: list[str]) -> "Tensor | None":
    """fp32 [steps, seeds, ROWS, COLS]; None without noise."""
    import torch

    from optim.noise import Noise

    law = NOISES[noise]
    if law is None:
        return None
    kind, tail = law
    made, size = Noise(kind, tail=tail, moment=1.5, scale=SCALE), config.transport_steps * ROWS * COLS
    drawn = [made.sample(f"{noise}.{n}", start=0, stop=size, seed=config.seed, step=0) for n in names]
    return torch.stack([each.view(-1, ROWS, COLS) for each in drawn], dim=1)


def curves(
    form: str, beta1: float, ahead: bool, gammas: tuple[float, ...], goals: "Tensor", noise: "Tensor | None",
    *, num_steps: int,
) -> tuple["Tensor", float]:  # fmt: skip
    """log10 F(X_0)/F(X_t), fp64 [points, gammas, seeds], and CPU seconds per step and matrix."""
    import torch

    from optim.rules import transported

    rule = make_rule(form, Point(1.0, beta1, 0.95))
    if ahead:
        rule = transported(rule, ramp_steps=round(1 / (1 - beta1)))
    factors = 1 / torch.tensor(gammas).view(-1, 1, 1, 1)  # a run at γ is γ times one at 1 (`reductions`)
    goals = (factors * goals).flatten(0, 1)
    moved = Moving(rule, goals)
    goals = moved.weights + goals
    points, first, found = moved.weights, torch.linalg.vector_norm(goals, dim=(-2, -1)), []
    began = time.thread_time()
    for step in range(num_steps):
        gradient = points - goals
        if noise is not None:
            gradient += (factors * noise[step]).flatten(0, 1)
        points = moved.step(gradient, lr=cosine(step, num_steps=num_steps))
        if (step + 1) % (num_steps // NUM_POINTS) == 0:
            found.append(first / torch.linalg.vector_norm(moved.weights - goals, dim=(-2, -1)))
    seconds = (time.thread_time() - began) / num_steps / len(goals)
    return 2 * torch.stack(found).double().log10().view(len(found), len(gammas), -1), seconds


def run_transport(config: RowNormsConfig, *, report: Report = print) -> dict[str, Any]:
    """Tune γ for each noise, rule and β1 on `tuning_seeds`, and run the best on `seeds` others.

    Returns:
        JSON-ready: "config", "seconds", and "cases", each with noise, form, ahead, beta1, gamma, "on_rim",
        "tuned" (mean decades in tuning), "final" (decades, by seed), "curve" (means over the seeds) and
        "step_seconds" (CPU time).
    """
    import torch

    began, threads, cases = time.perf_counter(), torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        seeds = {"tuning": config.tuning_seeds, "run": config.seeds}
        names = {kind: [f"{kind}{i}" for i in range(number)] for kind, number in seeds.items()}
        goals = {kind: targets(config, ROWS, each) for kind, each in names.items()}
        for noise in NOISES:
            drawn = {kind: draw(config, noise, each) for kind, each in names.items()}
            for form, ahead, beta1 in itertools.product(FORMS, (False, True), BETA1):
                given = {"num_steps": config.transport_steps}
                tried, _ = curves(form, beta1, ahead, GAMMAS, goals["tuning"], drawn["tuning"], **given)
                means = tried[-1].mean(-1)
                best = int(means.argmax())
                gammas = (GAMMAS[best],)
                found, seconds = curves(form, beta1, ahead, gammas, goals["run"], drawn["run"], **given)
                cases.append(
                    {
                        "noise": noise, "form": form, "ahead": ahead, "beta1": beta1, "gamma": gammas[0],
                        "on_rim": best in (0, len(GAMMAS) - 1), "tuned": means[best].item(),
                        "final": found[-1, 0].tolist(), "curve": found[:, 0].mean(-1).tolist(),
                        "step_seconds": seconds,
                    }
                )  # fmt: skip
            report(f"transport: noise {noise}, {time.perf_counter() - began:.0f} s")
    finally:
        torch.set_num_threads(threads)
    about: dict[str, Any] = {"rows": ROWS, "cols": COLS, "scale": SCALE, "steps": config.transport_steps}
    about |= {"seeds": config.seeds, "tuning_seeds": config.tuning_seeds, "gammas": list(GAMMAS)}
    return {"config": about, "seconds": time.perf_counter() - began, "cases": cases}


def best_of(result: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """The case among those with these values that was best in tuning."""
    fitting = [c for c in result["cases"] if all(c[name] == value for name, value in wanted.items())]
    return max(fitting, key=lambda case: case["tuned"])


def gain(result: dict[str, Any], **wanted: Any) -> Interval:
    """Decades of F that transport gains, each with its best β1, paired by seed: 95% interval."""
    moved, still = (best_of(result, ahead=ahead, **wanted)["final"] for ahead in (True, False))
    return of_mean([a - b for a, b in zip(moved, still, strict=True)])


def describe(result: dict[str, Any]) -> Table:
    """Decades by which F has fallen after the last gradient, with 95% intervals."""
    rows = []
    for noise, form, ahead in itertools.product(NOISES, FORMS, (False, True)):
        wanted = {"noise": noise, "form": form, "ahead": ahead}
        means = [f"{statistics.fmean(best_of(result, beta1=b, **wanted)['final']):.2f}" for b in BETA1]
        best = best_of(result, **wanted)
        text = f"{_text(of_mean(best['final']))} at {best['beta1']:g}" + " (rim)" * best["on_rim"]
        added = _text(gain(result, noise=noise, form=form), sign="+") if ahead else "-"
        rows.append((noise, FORMS[form] + ", transported" * ahead, ", ".join(means), text, added))
    return table(HEAD, rows, left=(0, 1, 2))


def _text(interval: Interval, *, sign: str = "") -> str:
    assert interval.high is not None
    return f"{interval.centre:{sign}.3f} ± {interval.high - interval.centre:.3f}"


def plot(result: dict[str, Any], path: Path) -> Path:
    """F over gradients, and over CPU seconds of one matrix's steps: a column for each noise."""
    drawn, panels = figure(13, 7, columns=len(NOISES), rows=2, sharey="col")
    for place, noise in enumerate(NOISES):
        for color, (form, ahead) in enumerate(itertools.product(FORMS, (False, True))):
            best = best_of(result, noise=noise, form=form, ahead=ahead)
            every = result["config"]["steps"] / len(best["curve"])
            gradients = [every * (i + 1) for i in range(len(best["curve"]))]
            f = [0.5 * 10**-value for value in best["curve"]]
            style = {"color": COLORS[color], "linestyle": "--" if ahead else "-"}
            label = f"{FORMS[form]}{', transported' * ahead}, β1 = {best['beta1']:g}"
            panels[place].plot(gradients, f, label=label, **style)
            seconds = [best["step_seconds"] * each for each in gradients]
            panels[place + len(NOISES)].plot(seconds, f, **style)
        panels[place].set(title=f"noise: {noise}", xlabel="gradients", yscale="log")
        panels[place].legend(fontsize=7)
        panels[place + len(NOISES)].set(xlabel="CPU seconds of steps", yscale="log")
    for first in (panels[0], panels[len(NOISES)]):
        first.set_ylabel("F (geometric mean over seeds)")
    return save(drawn, path)
