"""What W&B holds of a run: each step once, layers as tables, what the machine did; and that nobody waits."""

import json
import signal

from tests.cluster.record.test_record import in_subprocess, open_record, steps, wandb_records

WRITER = """
resume_step, last = (int(each) or None for each in sys.argv[2:4])
with open_record(Path(sys.argv[1]), wandb_mode="auto", resume_step=resume_step) as run:
    for step in range((resume_step or 0) + 1, last + 1):
        run.log({"step": step, "loss": 1 / step, "start": resume_step or 0})
    if resume_step:
        run.finish({})
    else:
        while True:  # until the test kills it, once W&B's file holds what was logged
            print(run.wandb_status, flush=True)
            time.sleep(0.2)
"""


def history(directory):
    """The rows in W&B's file of the newest start, without its own keys but for `_step`."""
    rows = [r["history"]["item"] for r in wandb_records(directory) if r["type"] == "history"]
    return [{k: v for k, v in row.items() if k == "_step" or not k.startswith("_")} for row in rows]


def killed_at_110(directory, *, home, **environment):
    """A run that logged steps 1 to 110, and was killed once W&B's file held most of them."""
    writer = in_subprocess(WRITER, directory, 0, 110, home=home, **environment)
    for line in writer.stdout:
        if line.startswith("offline") and len(history(directory)) >= 100:
            break
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL


def test_a_run_killed_at_110_and_resumed_from_100_holds_each_step_once(tmp_path):
    run = tmp_path / "run"
    killed_at_110(run, home=tmp_path)
    again = in_subprocess(WRITER, run, 100, 120, home=tmp_path)
    assert again.communicate() == ("", "") and again.returncode == 0
    rows = history(run)
    assert [row["step"] for row in rows] == list(range(1, 121)) == [row["_step"] for row in rows]
    assert [row["train/start"] for row in rows] == [0] * 100 + [100] * 20
    assert steps(run) == list(range(1, 121))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)  # the wall time goes on, it does not begin again
    # `wandb sync` would append the first start's rows to the second's
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert len(list((run / "wandb/earlier").glob("offline-run-*/*.wandb"))) == 1


def test_values_of_layers_are_a_table_and_histograms_and_not_a_curve_each(tmp_path):
    layers = {f"layers.{i}.wq": {"tail_index": 1.5 + i, "ratio": float("nan")} for i in range(3)}
    with open_record(tmp_path, wandb_mode="offline") as record:
        record.log({"step": 1, "noise_tail_index_median": 2.5, "noise": layers})
        record.finish({})
    [row] = history(tmp_path)
    assert {key.partition(".")[0] for key in row} == {
        *("_step", "step", "seconds", "noise/tail_index_median", "noise/layers", "noise/tail_index_by_layer"),
    }
    assert row["noise/layers._type"] == "table-file"
    assert row["noise/tail_index_by_layer._type"] == "histogram"
    assert sum(row["noise/tail_index_by_layer.values"]) == 3
    [table] = (tmp_path / "wandb").glob("offline-run-*/files/media/table/noise/layers*.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["layers", "tail_index", "ratio"]
    assert [cells[:2] for cells in table["data"]] == [[f"layers.{i}.wq", 1.5 + i] for i in range(3)]


def test_a_table_goes_with_the_row_that_follows_and_takes_no_step_of_its_own(tmp_path):
    with open_record(tmp_path, wandb_mode="offline") as record:
        record.log({"step": 1})
        record.table("ablations", ["rule"], [["muon"]])
        record.log({"step": 2})
        record.finish({})
    first, second = history(tmp_path)
    assert (first["_step"], second["_step"]) == (1, 2)
    assert second["train/ablations._type"] == "table-file" and "train/ablations._type" not in first


def test_the_machine_is_sampled_and_says_nothing_of_its_user(tmp_path):
    code = """
with open_record(Path(sys.argv[1]), wandb_mode="auto") as run:
    run.log({"step": 1})
    run.finish({})
"""
    writer = in_subprocess(code, tmp_path / "run", home=tmp_path, SOME_TOKEN="canary-of-the-environment")
    assert writer.communicate() == ("", "")
    records = wandb_records(tmp_path / "run")
    [sample, *_] = [r["stats"]["item"] for r in records if r["type"] == "stats"]
    assert sample["proc.memory.rssMB"] > 0 and "memory_percent" in sample
    assert all(isinstance(value, int | float) for value in sample.values())
    [log] = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert b"canary" not in log.read_bytes() and b"test_record" not in log.read_bytes()
