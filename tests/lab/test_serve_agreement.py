"""The paced engine, the referees' reports, and the comparison of our load generator with theirs.

The referees cannot be installed into this environment (see `tests.lab.serve_agreement`); a script stands in.
"""

import asyncio
import json
import stat
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.cli import RunError
from cluster.measure import turns
from serving.bench.latency import RequestOutcome
from serving.bench.loadgen import Lag
from serving.engine.protocol import EngineFailed, RequestError, Sampling, Stream
from tests.lab import paced_engine, referees
from tests.lab import serve_agreement as agreement
from tests.lab.paced_engine import CONTEXT, Pace, PacedEngine
from tests.lab.referees import FIGURES, LoadCase
from tests.lab.serve_agreement import ToolTurn
from tests.waiting import PATIENCE_SECONDS

CASE = LoadCase(5, concurrency=2, output_tokens=4)
QUICK = Pace(first=(0.02, 0.04), gap=(0.005, 0.01))
TWO_TOKENS = Sampling(max_tokens=2)


# --- the paced engine -------------------------------------------------------------------------------------


def test_tokens_are_due_by_the_number_of_the_request_alone_and_within_bounds():
    pace = Pace(first=(1.0, 3.0), gap=(0.1, 0.2))
    due = [pace.due(number, 50) for number in range(100)]
    assert due == [pace.due(number, 50) for number in range(100)]
    assert pace.due(7, 10) == due[7][:10]  # a longer answer begins as a shorter one
    assert Pace(seed=1).due(0, 2) != Pace(seed=0).due(0, 2)
    ordered = sorted(times[0] for times in due)
    assert max(later - earlier for earlier, later in pairwise(ordered)) < 0.05  # 2.0 s / 100, spread evenly
    firsts = [times[0] for times in due]
    gaps = [later - earlier for times in due for earlier, later in pairwise(times)]
    assert 1.0 <= min(firsts) < 1.2 and 2.8 < max(firsts) <= 3.0
    assert 0.1 - 1e-9 <= min(gaps) < 0.101 and 0.199 < max(gaps) <= 0.2 + 1e-9


@pytest.fixture
def late_clock(monkeypatch) -> None:
    """A clock that goes on while the engine waits, and then by a millisecond more."""
    clock = SimpleNamespace(now=0.0)

    class Condition(threading.Condition):  # type: ignore[misc]
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is None:
                return super().wait()
            clock.now += timeout + 0.001
            return False

    monkeypatch.setattr(paced_engine, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(
        paced_engine, "threading", SimpleNamespace(Condition=Condition, Thread=threading.Thread)
    )


@pytest.mark.usefixtures("late_clock")
def test_no_token_is_early_and_lateness_does_not_add_up():
    found: list[RequestOutcome] = []
    engine = PacedEngine(QUICK, observe=found.append)

    async def ask(num_tokens: int) -> list[str | None]:
        stream = Stream(engine, [1, 2, 3], Sampling(max_tokens=num_tokens))
        return [token.finish async for tokens in stream for token in tokens]

    async def all_at_once() -> list[list[str | None]]:
        return await asyncio.gather(*(ask(num_tokens) for num_tokens in (1, 30, 12)))

    answers = asyncio.run(all_at_once())
    engine.close()
    assert answers == [[None] * (n - 1) + ["length"] for n in (1, 30, 12)]
    assert sorted(outcome.index for outcome in found) == [0, 1, 2]
    for outcome in found:
        due = QUICK.due(outcome.index, outcome.output_tokens)
        late = [at - outcome.sent - seconds for at, seconds in zip(outcome.tokens, due, strict=True)]
        assert min(late) >= 0 and max(late) < 0.0011  # that of 30 waits would be up to 30 ms
        assert outcome.prompt_tokens == 3 and outcome.error is None
    stats = engine.stats()
    assert (stats.finished, stats.generated_tokens, stats.prompt_tokens, stats.running) == (3, 43, 9, 0)


def test_a_cancelled_request_gets_no_more_and_is_no_part_of_the_truth():
    found: list[RequestOutcome] = []
    even = Pace(first=(0.02, 0.02), gap=(0.005, 0.005))  # the cancelled one would be first
    engine, arrived, other = PacedEngine(even, observe=found.append), [], threading.Event()
    with engine._changed:  # before it is due, however late this is
        engine.submit([1], TWO_TOKENS, arrived.append).cancel()
    engine.submit([1], TWO_TOKENS, lambda tokens: other.set() if tokens[-1].finish else None)
    assert other.wait(PATIENCE_SECONDS)
    engine.close()
    assert arrived == [] and [outcome.index for outcome in found] == [1]
    assert engine.stats().cancelled == 1


def test_what_it_cannot_do_is_refused_and_closing_ends_what_runs():
    engine, arrived = PacedEngine(Pace(first=(1e6, 1e6)), observe=lambda outcome: None), []
    with pytest.raises(RequestError, match="echo, logprobs"):
        engine.submit([1], Sampling(max_tokens=1, logprobs=True), arrived.append)
    with pytest.raises(RequestError, match="max_tokens"):
        engine.submit([1], Sampling(max_tokens=CONTEXT), arrived.append)
    engine.submit([1], TWO_TOKENS, arrived.append)
    engine.submit([1], TWO_TOKENS, arrived.append).cancel()
    assert engine.failure() is None
    engine.close()
    assert [type(item) for item in arrived] == [EngineFailed]
    assert engine.failure() == "the engine is closed"
    with pytest.raises(EngineFailed):
        engine.submit([1], TWO_TOKENS, arrived.append)


# --- reports ----------------------------------------------------------------------------------------------


def summary(*, p50: float, p90: float, p99: float) -> dict:
    """What GuideLLM 0.8.1 writes for a metric, but for what we do not read."""
    percentiles = {"p25": 0.0, "p50": p50, "p75": 0.0, "p90": p90, "p95": 0.0, "p99": p99, "p999": 9e9}
    found = {"mean": 0.0, "count": 5, "percentiles": percentiles, "pdf": None}
    return {"successful": found, "errored": {**found, "percentiles": {}}, "incomplete": {}, "total": {}}


def guidellm_report(*, successful: int = 5, least: float = 4.0) -> dict:
    sizes = {"successful": {"min": least, "max": 4.0, "mean": 4.0, "percentiles": {}}}
    metrics = {
        "request_totals": {"successful": successful, "errored": 0, "incomplete": 0, "total": successful},
        "request_latency": summary(p50=1e3, p90=1e3, p99=1e3),  # until the connection is closed: not E2E
        "output_token_count": sizes,
        "time_to_first_token_ms": summary(p50=200.0, p90=280.0, p99=298.0),
        "inter_token_latency_ms": summary(p50=80.0, p90=96.0, p99=99.0),
        "time_per_output_token_ms": summary(p50=110.0, p90=120.0, p99=125.0),
        "slo_attainment": None,
    }
    return {"metadata": {"guidellm_version": "0.8.1"}, "benchmarks": [{"config": {}, "metrics": metrics}]}


def vllm_report(*, completed: int = 5, total_output_tokens: int = 20) -> dict:
    values = {"ttft": 200.0, "tpot": 80.0, "itl": 79.0, "e2el": 440.0}
    found = {f"p{p}_{name}_ms": value + p for name, value in values.items() for p in (50, 90, 99)}
    return {**found, "completed": completed, "failed": 0, "total_output_tokens": total_output_tokens}


def test_guidellm_s_report_is_brought_to_our_definitions():
    assert referees.guidellm_figures(guidellm_report(), CASE) == {
        "ttft_p50_ms": 200.0, "ttft_p90_ms": 280.0, "ttft_p99_ms": 298.0,
        "tpot_p50_ms": 80.0, "tpot_p90_ms": 96.0, "tpot_p99_ms": 99.0,
        "e2e_p50_ms": 440.0, "e2e_p90_ms": 480.0, "e2e_p99_ms": 500.0,  # four tokens each
    }  # fmt: skip


def test_vllm_s_report_has_every_figure():
    found = referees.vllm_figures(vllm_report(), CASE)
    assert list(found) == FIGURES
    assert (found["ttft_p50_ms"], found["itl_p90_ms"], found["e2e_p99_ms"]) == (250.0, 169.0, 539.0)


@pytest.mark.parametrize(
    ("figures", "report", "says"),
    [
        (
            referees.guidellm_figures,
            guidellm_report(successful=4),
            r"guidellm reports 4 answers .*not 5 of 4",
        ),
        (referees.guidellm_figures, guidellm_report(least=3.0), r"of \[3.0, 4.0\] tokens, not 5 of 4"),
        (referees.vllm_figures, vllm_report(completed=0, total_output_tokens=0), "vllm reports 0 answers"),
        (referees.vllm_figures, vllm_report(total_output_tokens=19), r"of \[3.8\] tokens, not 5 of 4"),
    ],
)
def test_a_referee_that_put_another_load_is_refused(figures, report, says):
    with pytest.raises(RunError, match=says):
        figures(report, CASE)


def test_the_commands_ask_for_the_load_of_the_case():
    places = {"url": "http://h:1", "tokenizer": Path("/t"), "report": Path("/r/report.json")}
    closed = " ".join(referees.guidellm_command("g", CASE, **places))
    assert "kind=concurrent,streams=2" in closed and "kind=max_requests,count=5" in closed
    assert "prompt_tokens=64,output_tokens=4" in closed and "target=http://h:1" in closed
    open_loop = LoadCase(7, rate=1.5)
    assert "kind=poisson,rate=1.5" in " ".join(referees.guidellm_command("g", open_loop, **places))
    words = referees.vllm_command("v", CASE, **places)
    assert words[words.index("--max-concurrency") + 1] == "2" and "--request-rate" not in words
    assert words[words.index("--metric-percentiles") + 1] == "50,90,99"
    words = referees.vllm_command("v", open_loop, **places)
    assert words[words.index("--request-rate") + 1] == "1.5" and "--max-concurrency" not in words


# --- the comparison ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "agrees"),
    [
        (104.9, 100.0, True),
        (105.1, 100.0, False),
        (94.9, 100.0, False),
        (11.9, 10.0, True),
        (7.9, 10.0, False),
    ],
)
def test_figures_agree_within_a_share_or_two_milliseconds(ours, theirs, agrees, monkeypatch):
    monkeypatch.setattr(agreement, "CASES", {"closed": CASE})
    medians = {
        "ttft_p50_ms_ours_closed": ours,
        "ttft_p50_ms_ours_closed_true": 9.0,
        "itl_p50_ms_ours_closed": 5.0,  # which this referee does not have
        "ttft_p50_ms_other_closed": theirs,
        "ttft_p50_ms_other_closed_true": 8.0,
    }
    [row] = agreement.compare(medians, ["other"])
    assert (row["case"], row["referee"], row["figure"]) == ("closed", "other", "ttft_p50")
    assert row["agrees"] is agrees
    assert row["difference_ms"] == pytest.approx(ours - theirs)
    assert row["difference_percent"] == pytest.approx(100 * (ours / theirs - 1))
    assert (row["ours_less_true_ms"], row["referee_less_true_ms"]) == (
        pytest.approx(ours - 9.0),
        pytest.approx(theirs - 8.0),
    )


def test_a_lagging_generator_of_ours_is_refused():
    with pytest.raises(RunError, match=r"lagged by 30\.0 ms"):
        agreement.quietest(lambda: ToolTurn({}, {}, Lag(0.030, 0.0), 0.0))


def test_a_missing_referee_is_refused_with_the_remedy(capsys, tmp_path):
    assert agreement.main(["--guidellm", str(tmp_path / "none")]) == 2
    assert "--guidellm: " in (said := capsys.readouterr().err) and "pip install guidellm" in said
    assert agreement.main([]) == 2
    assert "--vllm: pip install vllm" in capsys.readouterr().err
    assert agreement.main(["--vllm", "python", "--rounds", "0"]) == 2


def test_a_dry_run_prints_the_commands_and_starts_nothing(capsys):
    assert agreement.main(["--guidellm", "g", "--vllm", "v", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("g run --disable-console") == said.count("v -c import argparse") == len(agreement.CASES)


FAKE = """#!{python}
import json, sys, urllib.request
words = dict(zip(sys.argv, sys.argv[1:]))
url = words["--backend"].split("target=")[1].split(",")[0]
for _ in range({number}):
    body = {{"model": "paced", "prompt": "hello", "max_tokens": 4, "stream": True}}
    headers = {{"content-type": "application/json"}}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    urllib.request.urlopen(request).read()
print("sent", flush=True)
open(words["--output"].split("path=")[1], "w").write('''{report}''')
sys.exit({code})
"""


def fake(folder: Path, *, number: int = 2, code: int = 0) -> str:
    """A program that takes GuideLLM's options, puts `number` requests, and always reports the same."""
    program = folder / "guidellm"
    report = json.dumps(guidellm_report(successful=2))
    program.write_text(FAKE.format(python=sys.executable, number=number, code=code, report=report))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.fixture
def undisturbed(monkeypatch):
    """One take for a turn, and no lag too long: the machine may be busy with other tests."""
    monkeypatch.setattr(turns, "DISTURBING_CORES", 1e9)
    monkeypatch.setattr(agreement, "MOST_LAG_SECONDS", 1e9)


@pytest.mark.stack
@pytest.mark.usefixtures("undisturbed")
def test_a_whole_comparison_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "CASES", {"poisson": LoadCase(2, rate=20.0, output_tokens=4)})
    output = tmp_path / "agreement.json"
    command = ["--guidellm", fake(tmp_path), "--rounds", "1", "--output", str(output)]
    assert agreement.main(command) == 0
    result, said = json.loads(output.read_text()), capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == {k: v for k, v in result.items() if k != "provenance"}
    assert len(result["rows"]) == result["compared"] == 9
    for figure in (name for name in FIGURES if name.startswith(("ttft", "e2e"))):
        true = result[f"{figure}_ours_poisson_true"]
        assert 100 <= true <= result[f"{figure}_ours_poisson"]  # sent before it arrived, read after it left
    assert result["ttft_p50_ms_guidellm_poisson_true"] >= 100
    assert result["ttft_p50_ms_guidellm_poisson"] == 200.0
    assert "of 9 agree within 5% or 2 ms" in said


@pytest.mark.stack
@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"code": 3}, "guidellm ended with exit code 3; its log ends:\nsent"),
        ({"number": 1}, "the engine reports 1 answers"),
    ],
)
def test_a_referee_that_fails_is_named_with_its_log(fault, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "CASES", {"closed": LoadCase(2, concurrency=1, output_tokens=4)})
    monkeypatch.setattr(agreement, "TURN_SECONDS", None)  # nothing waits for the end of a turn
    output = str(tmp_path / "agreement.json")
    assert agreement.main(["--guidellm", fake(tmp_path, **fault), "--rounds", "1", "--output", output]) == 1
    assert says in capsys.readouterr().err and not Path(output).exists()
