import json
import subprocess
import sys

import pytest

from cluster.record import events
from tests.commands import ROOT


def test_an_event_is_one_line_of_strict_json_and_is_read_back(tmp_path):
    assert events.read(tmp_path) == []
    events.append(tmp_path, "started", "training begins")
    events.append(tmp_path, "loss_spike", "the loss\nrose", step=7, loss=float("inf"), median=2.5)
    text = (tmp_path / events.FILE).read_text()
    assert text.count("\n") == 2 and "Infinity" not in text
    first, second = events.read(tmp_path)
    assert (first["kind"], first["level"], first["step"]) == ("started", "info", None)
    assert second == {
        "time": second["time"],
        "kind": "loss_spike",
        "level": "warning",
        "step": 7,
        "text": "the loss\nrose",
        "loss": "inf",
        "median": 2.5,
    }
    assert second["time"].endswith("Z") and len(second["time"]) == 20
    assert events.alarms([first, second]) == [second]


def test_a_reader_goes_on_where_it_stopped_and_waits_for_a_line_that_is_being_written(tmp_path):
    assert events.read_from(tmp_path, 0) == ([], 0)
    events.append(tmp_path, "started", "one")
    (first,), position = events.read_from(tmp_path, 0)
    assert events.read_from(tmp_path, position) == ([], position)
    events.append(tmp_path, "finished", "two")
    whole = (tmp_path / events.FILE).read_bytes()
    (tmp_path / events.FILE).write_bytes(whole[:-5])
    assert events.read_from(tmp_path, position) == ([], position)
    (tmp_path / events.FILE).write_bytes(whole)
    (second,), end = events.read_from(tmp_path, position)
    assert (first["text"], second["text"], end) == ("one", "two", len(whole))


def test_a_damaged_line_hides_no_other_event(tmp_path):
    events.append(tmp_path, "started", "one")
    with (tmp_path / events.FILE).open("a") as file:
        file.write('{"time": "20\n[]\n{}\n')
        file.write('{"time": "", "kind": "failed", "level": "error", "text": 5, "step": 1}\n')
        file.write('{"time": "2026-11-26T12:0')  # a disk was full
    events.append(tmp_path, "finished", "two")
    assert [event["text"] for event in events.read(tmp_path)] == ["one", "two"]


def test_secrets_are_masked(tmp_path):
    events.append(tmp_path, "failed", "WANDB_API_KEY=0123456789abcdef refused", where="token=abcdefgh12345")
    (event,) = events.read(tmp_path)
    assert event["text"] == "WANDB_API_KEY=*** refused" and event["where"] == "token=***"


def test_an_event_that_cannot_be_written_is_printed_and_ends_nothing(tmp_path, capsys):
    events.append(tmp_path / "missing", "failed", "the disk is full", step=3)
    said = capsys.readouterr().err
    assert "missing/events.jsonl: No such file" in said and "error: step 3: the disk is full" in said


def test_events_of_several_processes_do_not_mix(tmp_path):
    code = (
        "import sys; from pathlib import Path; from cluster.record import events\n"
        "for i in range(200): events.append(Path(sys.argv[1]), 'checkpoint', sys.argv[2] * 300, step=i)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, letter], cwd=ROOT) for letter in "abc"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    lines = (tmp_path / events.FILE).read_text().splitlines()
    lines = [line for line in lines if line]  # a line may be empty, where two met; readers skip it
    assert len(lines) == 600 and all(json.loads(line) for line in lines)
    for letter in "abc":
        steps = [event["step"] for event in events.read(tmp_path) if event["text"] == letter * 300]
        assert steps == list(range(200))


def test_a_kind_that_the_table_lacks_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError):
        events.append(tmp_path, "loss_spice", "no such kind")


def test_an_event_is_described_in_one_line():
    event = {"time": "2026-11-26T12:05:34Z", "level": "warning", "step": 120, "text": "the loss\nrose"}
    assert events.describe(event) == "2026-11-26 12:05 warning: step 120: the loss rose"
    assert events.describe({**event, "step": None}) == "2026-11-26 12:05 warning: the loss rose"
