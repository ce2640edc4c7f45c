"""The race against LitGPT and transformers without them: what is asked, refused and made of the answers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import RunError
from cluster.display import Table
from cluster.measure import benchmark
from training import config as training_config
from training.bench import contenders, race
from training.bench.command import main
from training.bench.race import CASES, Measured, TrainingTurn
from training.plan import make_plan


def about(precision: str, *, num_parameters: int = 10_007_808, first_loss: float = 9.0) -> dict:
    return {"precision": precision, "num_parameters": num_parameters, "first_loss": first_loss}


def measured() -> Measured:
    """Two rounds, in which ours takes 1 and 2 s a step, and LitGPT in fp32 1.5 and 2 s."""
    config = training_config.load(dotlist=race.our_keys(CASES["10m_adamw"], (), threads=2, rule="adamw"))
    turns = {
        "ours": [TrainingTurn(1.0, 0.1, 7.0, 0.0), TrainingTurn(2.0, 0.3, 6.0, 0.0)],
        "litgpt": [TrainingTurn(1.5, None, 7.0, 0.0), TrainingTurn(2.0, None, 6.0, 0.5)],
    }
    found = {"ours": about("bf16"), "litgpt": about("32-true")}
    return Measured(make_plan(config), {"bfloat16": 1.0, "float32": 0.25}, turns, found)


def test_shares_and_ratios_are_taken_within_a_round():
    found = race.case_result("10m_adamw", CASES["10m_adamw"], measured())
    assert found["speedup_litgpt_10m_adamw"] == pytest.approx(1.25)
    assert found["spread_litgpt_10m_adamw"] == [1.0, 1.5]
    assert found["spread_tokens_per_second_ours_10m_adamw"] == [2048, 4096]
    assert found["optimizer_share_ours_10m_adamw"] == pytest.approx(0.2)
    assert "optimizer_share_litgpt_10m_adamw" not in found
    flops = measured().plan.flops_per_token
    shares = found["spread_share_of_ceiling_ours_10m_adamw"]
    assert shares == pytest.approx([flops * 2048 / 1e12, flops * 4096 / 1e12])
    # LitGPT multiplies in fp32, so its ceiling is a quarter
    assert found["spread_share_of_ceiling_litgpt_10m_adamw"][0] == pytest.approx(4 * shares[0])
    assert isinstance(benchmark.table(found), Table)


@pytest.mark.parametrize(
    "changed",
    [{"num_parameters": 9_000_000}, {"first_loss": 4.0}, {"first_loss": float("nan")}],
)
def test_an_entrant_that_does_other_work_is_refused(changed):
    found = measured()
    race.require_same_work("c", CASES["10m_adamw"], found)
    found.about["litgpt"] = about("32-true", **changed)
    with pytest.raises(RunError, match=r"c: litgpt has .* do not do the same work"):
        race.require_same_work("c", CASES["10m_adamw"], found)


def test_an_entrant_that_does_not_learn_is_refused():
    found = measured()
    found.turns["litgpt"].append(TrainingTurn(1.0, None, 9.1, 0.0))
    with pytest.raises(RunError, match=r"a loss of 9\.00 to 9\.10"):
        race.require_same_work("c", CASES["10m_adamw"], found)


def test_the_cases_are_two_shapes_two_rules_and_muon_beside_adamw_at_32k_tokens():
    rules = {name: {entrant.rule for entrant in case.entrants.values()} for name, case in CASES.items()}
    assert rules == {
        f"{shape}_{end}": each for shape in ("10m", "60m")
        for end, each in {"adamw": {"adamw"}, "muon": {"muon"}, "32k": {"adamw", "muon"}}.items()
    }  # fmt: skip
    sizes = {"10m": 10_007_808, "60m": 58_073_600}
    for case in CASES.values():
        plan = make_plan(training_config.load(dotlist=race.our_keys(case, (), threads=2, rule="muon")))
        assert (plan.shape.num_parameters, plan.num_workers) == (sizes[case.shape], 1)
        assert plan.tokens_per_step == case.tokens
    assert (CASES["60m_32k"].tokens, CASES["60m_32k"].ours) == (32_768, "muon")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "--litgpt: missing"),
        (["--litgpt", "/no/python"], "--litgpt: /no/python"),
        (["--only", "70m"], "--only: '70m' is not one of 10m_adamw"),
        (["--only", "60m_32k", "--config", "a.yaml"], "--config: leave it out"),
        (["workers.count=2", "--only", "60m_32k"], "workers.count=2: leave it out"),
    ],
)
def test_what_cannot_be_raced_is_refused(arguments, names, capsys):
    assert main(["--peers", "--dry-run", *arguments]) == 2
    assert names in capsys.readouterr().err


def test_a_dry_run_says_who_races_and_needs_no_peer_that_does_not(capsys):
    assert main(["--peers", "--dry-run", "--only", "60m_32k"]) == 0
    assert capsys.readouterr().out == "60m_32k: adamw, muon; 60m, 32,768 tokens a step\n"


class Scripted(contenders.Peer):
    """A peer that is fastest in the second of its precisions; its losses count them."""

    precisions = ("slow", "fast", "slower")

    def build(self, precision):
        import torch

        self.clock.append(precision)
        return lambda: torch.tensor(float(len(self.clock))), 7

    def describe(self):
        return {"kind": "scripted"}


@pytest.fixture
def clock(monkeypatch) -> Iterator[list[str]]:
    """The precisions that a `Scripted` has built; a step takes as long as the newest one's name says."""
    built: list[str] = []
    steps = {"slow": 3.0, "fast": 1.0, "slower": 5.0}
    now = [0.0]

    def perf_counter() -> float:
        now[0] += steps[built[-1]] if built else 0.0
        return now[0]

    monkeypatch.setattr(contenders.time, "perf_counter", perf_counter)
    monkeypatch.setattr(Scripted, "clock", built, raising=False)
    return built


def load_command(folder: Path, **other: object) -> dict:
    (folder / "tokens.bin").write_bytes(bytes(range(256)) * 4)
    return {
        "tokens": {"file": str(folder / "tokens.bin"), "dtype": "uint16"}, "micro_sequences": 2,
        "sequence_length": 8, "accumulation": 1, "precision": None, **other,
    }  # fmt: skip


def test_a_peer_takes_its_fastest_precision_or_the_one_that_is_asked_for(clock, tmp_path):
    peer = Scripted(load_command(tmp_path))
    assert (peer.precision, peer.num_parameters, peer.first_loss) == ("fast", 7, 2.0)
    assert clock == ["slow", "fast", "slower"]
    assert min(peer.tried, key=peer.tried.__getitem__) == "fast" and len(peer.tried) == 3
    assert Scripted(load_command(tmp_path, precision="slower")).precision == "slower"
    assert clock[3:] == ["slower"]


def test_micro_batches_of_a_peer_are_windows_of_the_corpus_with_their_next_tokens(tmp_path):
    tokens = contenders.Tokens(load_command(tmp_path))
    inputs, targets = tokens.next()
    assert inputs.shape == targets.shape == (2, 8)
    assert inputs.flatten()[1:].tolist() == targets.flatten()[:-1].tolist()
    following, _ = tokens.next()
    assert following[0, 0] == targets[1, -1]


def test_turns_are_medians_of_steps_and_the_optimizers_share():
    class Process:
        def ask(self, command, *, within_seconds):
            seconds = {"step_seconds": [1.0, 4.0, 2.0], "optimizer_seconds": [0.1, 0.4, 0.2]}
            return {**seconds, "loss": 5.0, "cpu_seconds": 1e9}

    taken = race.take_turn(Process())
    assert taken == replace(taken, step_seconds=2.0, loss=5.0, others_cores=0.0)
    assert taken.optimizer_share == pytest.approx(0.1)
