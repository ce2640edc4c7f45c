"""`python -m serving.bench` against scripted endpoints: its record, its search, its refusals."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.record import origins
from serving.bench import command as bench
from serving.bench.config import load
from serving.bench.measure import Search
from tests.cluster.review.panel_keys import missing
from tests.commands import ROOT
from tests.fake_engine import counting_engine
from tests.serving.bench.scripted import FIRST, Behaviour, Write, event, honest, server
from tests.serving.endpoint.server import Server

pytestmark = pytest.mark.stack


LONG = ("slo.ttft_ms=1e6", "slo.tpot_ms=1e6")  # which a busy machine meets too
KEYS = (
    "bench.wandb=disabled", "load.concurrency=[1,3]", "load.requests=6", "load.warm_up=2", "load.rates=[20]",
    "load.seconds=0.5", "load.output_tokens=4", "load.most_lag_ms=1e6", "load.timeout_seconds=600",
    "sweep.points=2", *LONG,
)  # fmt: skip


def exit_code(behaviour: Behaviour, *keys: str, status: int = 200) -> int:
    """Of the command with `keys`, in which URL stands for the address of an endpoint that behaves so."""

    async def body() -> int:
        async with server(behaviour, status=status) as url:
            return await asyncio.to_thread(bench.main, [key.replace("URL", url) for key in keys])

    return asyncio.run(body())


def test_the_benchmark_of_an_endpoint_leaves_its_record(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(honest, "bench.target=URL", *KEYS, "bench.wandb=offline") == 0
    out = capsys.readouterr().out
    run = tmp_path / "outputs/serve-bench"
    summary = json.loads((run / "summary.json").read_text())
    assert [point["load"] for point in summary["points"]][:3] == [
        "1 in flight",
        "3 in flight",
        "20.00/s poisson",
    ]
    assert len(summary["points"]) == 5 and summary["ceilings"] is None  # a stranger: no shares
    assert summary["highest_rate_meeting_slo"] > 0
    assert summary["no_shares"] in out and "does not say what its model weighs" in summary["no_shares"]
    assert summary["points"][0]["requests"] == 6 and summary["points"][0]["ttft_p50_ms"] >= 1e3 * FIRST
    rows = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    assert sum(row["load"] == "1 in flight" for row in rows) == 8  # and then nothing is in flight
    assert sum(row["measured"] for row in rows if row["load"] == "1 in flight") == 6
    assert all(len(row["tokens"]) == 4 for row in rows if row["measured"])
    assert out.splitlines()[-2:] == [f"summary: {run / 'summary.json'}", summary["answer"]]
    rates = [row["rate"] for row in summary["loads"] if row["rate"] is not None]
    assert rates == sorted(rates) and [row["concurrency"] for row in summary["loads"]][:2] == [1, 3]
    heads = [line for line in out.splitlines() if "TTFT p99" in line and "load" in line]
    assert len(heads) == 1 and len(heads[0]) <= 120
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5
    assert (run / "plots/latency.png").is_file() and (run / "config.yaml").is_file()
    assert "serve-bench" in out and "TTFT p50" in out
    assert missing(run, "serve") == set()
    [served] = json.loads((run / "provenance.json").read_text())["inputs"]
    assert served["kind"] == "endpoint" and "does not say which checkpoint" in served["note"]


def test_what_an_endpoint_says_of_its_checkpoint_is_in_the_record(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = origins.origin("run", "first", id="0123abcd", inputs=[origins.origin("dataset", "corpus")])
    served = origins.origin("export", "first", fingerprint="f" * 64, step=7, inputs=[run])
    endpoint = Server(counting_engine(), origin=served)
    try:
        keys = ["load.concurrency=[1]", "load.warm_up=0", "load.requests=2", "load.most_lag_ms=1e6"]
        told = [
            f"bench.target={endpoint.url}",
            "bench.wandb=disabled",
            "load.output_tokens=2",
            "sweep.points=0",
            *keys,
        ]
        assert bench.main(told) == 0
    finally:
        endpoint.close()
    assert json.loads(Path("outputs/serve-bench/provenance.json").read_text())["inputs"] == [served]


def test_the_search_doubles_then_bisects_and_keeps_a_lagging_client_apart_from_the_server():
    search = Search(met=10.0)
    assert search.following(10.0) == 20.0 and "10.00 requests/s; none missed it" in search.describe()
    search.lagged = 40.0
    assert search.following(40.0) == 25.0 and "none missed it; at 40.00 the load gen" in search.describe()
    search.missed = 20.0
    assert search.following(20.0) == 15.0 and "10.00 requests/s; 20.00 missed it" in search.describe()
    assert "no rate could be measured" in Search(lagged=5.0).describe()


def test_the_search_goes_beyond_the_closed_loop_and_says_what_missed(tmp_path, monkeypatch, capsys):
    """A server that takes a few requests in each measurement, and fails those that come after them.

    The first request is one measurement, the closed loop of 8 another. The search begins with as many as that
    put through in a second, and doubles.
    """
    monkeypatch.chdir(tmp_path)
    numbers: list[int] = []  # of requests, by measurement: each begins with that of seed 0

    async def small(body: dict, write: Write) -> None:
        if body["seed"] == 0:
            numbers.append(0)
        numbers[-1] += 1
        await asyncio.sleep(0.05)
        fits = len(numbers) < 4 or body["seed"] < 3 * numbers[2]
        await write((event() if fits else event(error={"message": "full"})) + b"data: [DONE]\n\n")

    keys = (
        "load.concurrency=[1]", "load.requests=8", "load.warm_up=0", "load.arrivals=constant",
        "load.seconds=1", "sweep.points=4", "load.output_tokens=1", "load.most_lag_ms=1e6",
        "load.timeout_seconds=600", "bench.wandb=disabled", *LONG,
    )  # fmt: skip
    assert exit_code(small, "bench.target=URL", *keys) == 0
    out = capsys.readouterr().out
    summary = json.loads(Path("outputs/serve-bench/summary.json").read_text())
    closed = summary["points"][0]["requests_per_second"]
    met, missed = summary["highest_rate_meeting_slo"], summary["lowest_rate_missing_slo"]
    assert max(point["rate"] or 0 for point in summary["points"]) >= 2 * closed
    assert closed <= met < missed
    assert f"highest rate that met the SLO: {met:.2f} requests/s; {missed:.2f} missed it" in out
    assert f"m meets the SLO (TTFT 1e+06 ms, TPOT 1e+06 ms, by 95% of requests) up to {met:.2f}" in out


def test_ctrl_c_keeps_what_was_measured_and_calls_it_no_whole_run(tmp_path: Path):
    async def body() -> tuple[int, str]:
        async with server(honest) as url:
            keys = [key for key in KEYS if not key.startswith("load.rates")]
            child = subprocess.Popen(
                [sys.executable, "-m", "serving.bench", f"bench.target={url}", *keys, "load.rates=[5]",
                 "load.seconds=3600"],
                cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            rows = tmp_path / "outputs/serve-bench/requests.jsonl"
            while not (rows.exists() and "poisson" in rows.read_text()):
                assert child.poll() is None
                await asyncio.sleep(0.05)  # the server above runs in this loop
            child.send_signal(signal.SIGINT)
            out, _ = await asyncio.to_thread(child.communicate)
            return child.returncode, out

    code, out = asyncio.run(body())
    folder = tmp_path / "outputs/serve-bench"
    assert code == 130 and "3 in flight" in out
    assert not (folder / "summary.json").exists() and (folder / "plots/itl.png").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_lagging_client_s_points_are_named_and_not_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fewer = ["load.most_lag_ms=0.0001", "load.rates=[]", "sweep.points=0", "load.requests=2"]
    keys = [key for key in KEYS if "lag" not in key] + fewer
    assert exit_code(honest, "bench.target=URL", *keys) == 1
    captured = capsys.readouterr()
    assert "not reported, because the load generator lagged: 1 in flight, 3 in flight" in captured.err
    points = json.loads(Path("outputs/serve-bench/summary.json").read_text())["points"]
    assert all("ttft_p50_ms" not in point and "refused" in point for point in points)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["bench.target=http://127.0.0.1:1"],
            "bench.target: http://127.0.0.1:1/v1/models does not answer .*refused",
        ),
        (["load.prompt_tokens=many", "--dry-run"], "load.prompt_tokens: 'many' is none of"),
        (["load.rates=[0]"], r"load.rates: must lie in .0, "),
        (["bench.compare=sglang"], "bench.compare: 'sglang' is not one of: serve, transformers, vllm"),
        (
            ["bench.target=URL", "bench.target_model=x"],
            "bench.target_model: 'x' is not served at .*; there are: m",
        ),
        (
            ["load.trace=gone.jsonl", "load.concurrency=[]", "sweep.points=0", "--dry-run"],
            "load.trace: gone.jsonl: no such file",
        ),
    ],
)
def test_bad_input_is_one_message(tmp_path, monkeypatch, capsys, keys, message):
    monkeypatch.chdir(tmp_path)
    assert exit_code(honest, "bench.wandb=disabled", *keys) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ceilings_that_cannot_be_measured_are_missing_and_say_why(capsys):
    model = {"engine_info": {"device": "cuda", "dtype": "bf16", "details": {}}}
    assert bench._ceilings(load(), model) is None
    assert re.search(r"could not be measured: .+", capsys.readouterr().err)
