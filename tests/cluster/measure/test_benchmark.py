"""The shared half of the benches: ratios within a round, medians with spreads, the table, the file's name."""

import json

import pytest

from cluster import files
from cluster.cli import RunError, UserError
from cluster.measure import benchmark
from tests.cluster.review.panel_keys import missing


def test_a_ratio_is_taken_within_its_round():
    assert benchmark.ratios([3.0, 1.0], [1.5, 4.0]) == [2.0, 0.25]
    with pytest.raises(ValueError, match="zip"):
        benchmark.ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize("ours", [[1.0, 0.0], [-0.001, 1.0]])
def test_a_time_of_ours_that_is_not_above_zero_stops_the_bench_with_a_remedy(ours):
    with pytest.raises(RunError, match=r"too busy to measure it.*--rounds"):
        benchmark.ratios([1.0, 1.0], ours)


def test_a_spread_stands_beside_its_median_and_loses_speedup_from_its_key():
    found = benchmark.medians({"speedup_peer_case": [3.0, 1.0, 2.5], "ms_case": [4.0, 2.0], "gone": None})
    assert found == {
        "speedup_peer_case": 2.5,
        "spread_peer_case": [1.0, 3.0],
        "ms_case": 3.0,
        "spread_ms_case": [2.0, 4.0],
        "gone": None,
        "spread_gone": None,
    }


def test_the_table_has_a_dash_where_nothing_was_measured():
    found = {"rounds": 3, **benchmark.medians({"a": [1.0, 2.0, 4.0], "b": None})}
    lines = str(benchmark.table(found)).splitlines()
    assert [line.split() for line in lines] == [
        ["median", "min", "max"],
        ["a", "2.000", "1.000", "4.000"],
        ["b", "-", "-", "-"],
    ]
    assert len(set(map(len, lines))) == 1


def test_the_baseline_names_the_gpus_where_there_are_some():
    host = {"cpu": "AMD EPYC 7713", "cpu_cores": 64}
    assert benchmark.baseline_path(host, "optim").name == "amd-epyc-7713-64-cores_optim.json"
    held = benchmark.baseline_path(host | {"cpu_held_to": "avx2"}, "optim").name
    assert held == "amd-epyc-7713-64-cores-held-to-avx2_optim.json"
    host["gpus"] = ["NVIDIA A40"] * 8
    path = benchmark.baseline_path(host, "optim")
    assert path.name == "amd-epyc-7713-64-cores-nvidia-a40-8-gpus_optim.json"


def test_a_number_of_rounds_without_a_median_is_refused():
    benchmark.require_rounds(1)
    with pytest.raises(UserError, match="--rounds: 0"):
        benchmark.require_rounds(0)


def test_what_is_published_is_the_last_line_and_the_file_adds_its_origin(tmp_path, capsys):
    output = benchmark.prepare_output(tmp_path / "new" / "x.json", "optim")
    result = {"speedup_a_b": 2.0, "spread_a_b": [1.5, 2.5]}
    benchmark.publish(
        result, output, job_type="race", wandb_mode="offline", config={"rounds": 2}, data_fingerprint="f00d"
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    written = files.read_json(output)
    about = written.pop("provenance")
    assert written == result
    assert about["data_fingerprint"] == "f00d" and about["packages"]["torch"].startswith("2.13")
    run = tmp_path / "new" / "x"
    assert files.read_json(run / "provenance.json")["command"] == about["command"]
    assert files.read_json(run / "summary.json")["speedup_a_b"] == 2.0
    [table] = (run / "wandb").glob("offline-run-*/files/media/table/bench/medians*.json")
    assert files.read_json(table)["data"] == [["speedup_a_b", 2.0, 1.5, 2.5]]
    assert len(list((run / "wandb").glob("offline-run-*/files/x.json"))) == 1
    assert missing(run, "bench") == set()


def test_the_record_of_a_committed_baseline_lies_in_outputs(tmp_path):
    assert benchmark.record_directory(tmp_path / "x.json") == tmp_path / "x"
    baseline = benchmark.baseline_path({"cpu": "c", "cpu_cores": 2}, "optim")
    assert benchmark.record_directory(baseline) == benchmark.ROOT / "outputs" / "c-2-cores_optim"


def test_a_busy_machine_is_said_by_its_cores(monkeypatch, capsys):
    assert benchmark.busy(0.5, cores=2) is None and benchmark.busy(15.9, cores=64) is None
    assert benchmark.busy(0.6, cores=2) == "busy before it was measured (load average 0.6 on 2 cores)"
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: 2)
    for load, said in (
        (0.4, ""),
        (3.0, "this machine was busy before it was measured (load average 3.0 on 2"),
    ):
        monkeypatch.setattr(benchmark.os, "getloadavg", lambda load=load: (load, 9.0, 9.0))
        assert benchmark.load_average() == load
        assert capsys.readouterr().err.startswith(said)
