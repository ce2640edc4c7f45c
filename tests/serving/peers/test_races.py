"""Races of engines: what is asked and made of the answers, how processes are kept, and one small real race.

vLLM is not raced here: it does not go into this environment (`python -m serving.bench bench.compare=vllm`).
"""

import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cluster.cli import RunError, UserError
from cluster.measure import benchmark, contender
from serving.peers import contender_process, races
from serving.peers.contender_process import RaceTurn, running
from serving.peers.races import CASES, Race, RaceCase, decode_case
from tests.waiting import PATIENCE_SECONDS, wait_until
from training.model.llama import load_hf
from training.model.shapes import LlamaShape

MINI = LlamaShape(
    vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96,
    tied=True,
)  # fmt: skip


# --- what is asked, and what is made of the answers -------------------------------------------------------


def test_the_lengths_are_those_of_the_case_in_every_round_and_the_ids_are_new():
    case = CASES["requests_c16"]
    (prompts, num_new), (others, others_new) = (
        races.work("requests_c16", case, vocab_size=50, round_number=number) for number in (0, 1)
    )
    lengths = [len(prompt) for prompt in prompts]
    assert lengths == [len(prompt) for prompt in others] and num_new == others_new
    assert prompts != others
    assert (prompts, num_new) == races.work("requests_c16", case, vocab_size=50, round_number=0)
    assert len(prompts) == 48 and 64 <= min(lengths) < 130 and 440 < max(lengths) <= 512
    assert 48 <= min(num_new) < max(num_new) <= 80 and abs(sum(num_new) / 48 - 64) < 4
    assert {token for prompt in prompts for token in prompt} == set(range(50))


def test_the_cases_are_those_that_were_asked_for():
    assert [(case.num_requests, case.concurrency) for case in CASES.values()] == [
        (1, 1), (8, 8), (32, 32), (48, 16), (4, 4),
    ]  # fmt: skip
    assert [case.measured for case in CASES.values()] == ["decode"] * 3 + ["requests", "prefill"]
    prompts, num_new = races.work("decode_b8", CASES["decode_b8"], vocab_size=9, round_number=0)
    assert [len(prompt) for prompt in prompts] == [64] * 8 and num_new == [128] * 8


def test_decoding_in_step_counts_all_tokens_but_the_first_of_each():
    assert races.decode_rate([[5.0, 6.0, 7.0, 9.0]] * 3) == 3 * 3 / 4.0


def test_decoding_leaves_out_what_is_made_while_others_read_their_prompt_or_have_ended():
    early, late = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 5.5, 6.0]
    assert races.decode_rate([early, late]) == 2 * 2 / 2.0  # from 3 to 5: steady steps of one second
    with pytest.raises(RunError, match="longer answers"):
        races.decode_rate([[1.0, 2.0], [2.0, 3.0]])


def test_whole_requests_count_from_the_start_to_the_last_token():
    assert races.request_rate([[1.0, 2.0], [3.0, 4.0, 8.0]]) == 5 / 8.0
    times = [[1.0, 2.0, 4.0], [2.0, 3.0, 5.0]]
    assert CASES["requests_c16"].rate(times, [[0]] * 2) == races.request_rate(times) == 6 / 5
    assert decode_case(1).rate(times, [[0]] * 2) == races.decode_rate(times)
    assert CASES["prefill_b4"].rate([[1.0], [2.0]], [[0] * 6] * 2) == 12 / 2


def two_rounds(*, theirs: list[int]) -> Race:
    """Ours at 10 and 20 tokens/s, the peer at 5 and 5; ours always says 7."""
    race = Race()
    for ours_rate in (10.0, 20.0):
        race.add("c", "ours", ours_rate, RaceTurn([], [[7, 1], [7, 1]], others_cores=0.5))
        race.add("c", "peer", 5.0, RaceTurn([], [[token, 2] for token in theirs], others_cores=0.0))
    return race


def test_a_speedup_is_the_peers_time_over_ours_within_a_round():
    found = races.race_result(two_rounds(theirs=[7, 7]))
    assert (found["speedup_peer_c"], found["spread_peer_c"]) == (3.0, [2.0, 4.0])
    assert found["tokens_per_second_ours_c"] == 15.0 and found["tokens_per_second_peer_c"] == 5.0
    assert found["first_token_agreement_peer"] == 1.0
    assert (found["others_cores_ours"], found["others_cores_peer"]) == (0.5, 0.0)
    assert "speedup_peer_c" in str(benchmark.table(found)) and "speedup_ours_c" not in found


def test_contenders_that_do_other_work_are_not_compared():
    with pytest.raises(RunError, match="50% of the first tokens of peer"):
        races.race_result(two_rounds(theirs=[7, 8]))


@pytest.mark.parametrize(
    ("peers", "names"),
    [
        ({"sglang": sys.executable}, "'sglang' is not one of"),
        ({"vllm": "/no/python"}, "bench.python: /no/"),
    ],
)
def test_peers_that_cannot_be_had_are_refused_before_anything_starts(peers, names, monkeypatch):
    monkeypatch.setattr(races, "running", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(UserError, match=names):
        races.race(peers, num_rounds=1, threads=1, report=print)


def test_a_random_model_is_what_training_begins_with(tmp_path):
    races.write_random_model(tmp_path / "model", MINI, seed=3)
    model = load_hf(tmp_path / "model", dtype=torch.bfloat16)
    assert model.shape == MINI and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.unique().tolist() == [1.0]
    assert model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.05)


# --- processes --------------------------------------------------------------------------------------------

FAKE = """
import json, os, subprocess, sys, time
print("a note", file=sys.stderr, flush=True)
child = subprocess.Popen(["sleep", "100"])
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "load":
        about = {"pid": str(os.getpid()), "child": str(child.pid), "path": os.environ.get("PYTHONPATH", "-")}
        answer = {"about": {**about, "threads": os.environ["OMP_NUM_THREADS"], **command["settings"]}}
    elif command["concurrency"] == 13:
        sys.exit(5)
    elif command["concurrency"] == 14:
        time.sleep(100)
    else:
        made = command["num_new"] if command["concurrency"] == 1 else [1]
        answer = {"times": [[1.0] * n for n in made], "tokens": [[1] * n for n in made], "cpu_seconds": 0.0}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A contender that makes nothing but ones, and has a child."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(contender_process, "SCRIPT", script)
    monkeypatch.setattr(contender, "STOP_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    return running("vllm", sys.executable, threads=3, log=tmp_path / "log")


def state(pid: int, *, until: str) -> str:
    """The letter of a process in /proc, once it is one of `until`; "gone" without the process."""

    def now() -> str:
        try:
            letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            letter = "gone"
        return letter if letter in (*until, "gone") else ""

    return wait_until(now, told=f"process {pid} is not {until}")


def test_a_contender_and_its_children_are_stopped_between_turns_and_ended_with_the_block(fake, tmp_path):
    with fake as contender:
        about = contender.load(tmp_path, {"a": "b"}, slots=2)
        pids = int(about["pid"]), int(about["child"])
        assert [state(pid, until="T") for pid in pids] == ["T", "T"]
        turn = contender.turn(([[1]], [4]), 1)
        assert turn.tokens == [[1, 1, 1, 1]] and turn.times == [[1.0] * 4] and turn.others_cores >= 0
        assert [state(pid, until="T") for pid in pids] == ["T", "T"]
    assert [state(pid, until="Z") in ("Z", "gone") for pid in pids] == [True, True]
    assert about["a"] == "b" and about["threads"] == "3" and about["path"] == "-"


@pytest.mark.parametrize(
    ("concurrency", "problem"),
    [
        (13, r"vllm ended with exit code 5 at 'run'; its log ends:\na note"),
        (14, r"vllm gave no answer in 0 s at 'run'; its log ends:\na note"),
        (15, "vllm did not make as many tokens"),
    ],
)
def test_a_contender_that_fails_is_named_with_its_log_and_ended(
    fake, concurrency, problem, tmp_path, monkeypatch
):
    if concurrency == 14:
        monkeypatch.setattr(contender_process, "RUN_SECONDS", 0.3)
    monkeypatch.setattr(contender, "STOP_SECONDS", 0.1)
    pids = []

    def fail() -> None:
        with fake as contender:
            about = contender.load(tmp_path, {}, slots=2)
            pids.extend([int(about["pid"]), int(about["child"])])
            contender.turn(([[1], [1]], [4, 4]), concurrency)

    with pytest.raises(RunError, match=problem):
        fail()
    assert [state(pid, until="Z") in ("Z", "gone") for pid in pids] == [True, True]


def test_sigterm_leaves_a_race_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), races.sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is here")
def test_an_environment_without_the_peer_is_named_as_such(tmp_path):
    def load() -> None:
        with running("vllm", sys.executable, threads=1, log=tmp_path / "log") as contender:
            contender.load(tmp_path, {}, slots=1)

    with pytest.raises(
        RunError, match=r"bench\.python must be the interpreter of an environment that has vllm"
    ):
        load()


# --- one race ---------------------------------------------------------------------------------------------


@pytest.mark.stack
def test_a_small_race_against_transformers():
    cases = {
        "decode_b3": decode_case(3, prompt_tokens=5, new_tokens=300),
        "requests_c2": RaceCase("", 5, 2, (3, 9), (2, 6), "requests"),
    }
    lines = []
    found = races.race(
        {"transformers": sys.executable},
        num_rounds=1,
        threads=1,
        report=lines.append,
        cases=cases,
        shape=MINI,
        settings={"ours": {"engine.cache_tokens": 2048}},
    )
    for case in cases:
        rates = [found[f"tokens_per_second_{name}_{case}"] for name in ("ours", "transformers")]
        assert found[f"speedup_transformers_{case}"] == pytest.approx(rates[0] / rates[1])
        assert min(rates) > 0
    assert found["first_token_agreement_transformers"] >= 0.8
    assert found["contenders"]["transformers"]["attention"] == "sdpa"
    assert {about["threads"] for about in found["contenders"].values()} == {"1"}
    assert found["contenders"]["transformers"]["dtype"] == races.best_dtype()
    assert json.loads(json.dumps(found)) == found
    assert len(lines) == 2 + 2 * 2 * 2  # ready; rounds of cases of contenders, the first to warm up
    assert lines[-1].startswith("round 1/1, requests_c2, transformers: ")
