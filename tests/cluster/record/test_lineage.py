"""What each thing says of where it comes from, `make lineage`, and the same as artifacts in W&B."""

import json
import shutil

import pytest

from cluster import files
from cluster.record import origins, wandb_artifacts
from cluster.record.lineage import brief, describe, find, main
from cluster.record.record import Record
from tests.cluster.record.test_record import wandb_records

DATA = "d" * 64
COMMIT, LATER = "a" * 40, "b" * 40


def open_record(directory, *, commit=COMMIT, wandb_mode="disabled", resume_step=None, **how):
    return Record.open(
        directory, config={}, wandb_mode=wandb_mode, project="asuncion", group=None, name=directory.name,
        provenance={"commit": commit, "dirty": commit == LATER, "time": "2026-11-26T12:00:00+00:00"},
        resume_step=resume_step, **how,
    )  # fmt: skip


def checkpoint_of(run, step):
    folder = run / f"checkpoints/step-{step:07d}"
    folder.mkdir(parents=True)
    state = {"step": step, "files": {"rank-0.safetensors": {"bytes": 3, "sha256": "c" * 64}}}
    files.write_json(folder / "state.json", {**state, "lineage": origins.of_writer(run)})
    files.write_text(folder / "COMPLETE", "")
    return folder


def export_of(checkpoint, folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(checkpoint.name.encode())
    origins.write_export(folder, origins.of_checkpoint(checkpoint))
    return folder


def baseline_of(file, *inputs, hardware="an A40"):
    about = {"commit": LATER, "dirty": True, "time": "2026-11-26T13:00:00+00:00", "inputs": list(inputs)}
    files.write_json(file, {"hardware": {"name": hardware}, "cells": [], "figures": [], "provenance": about})
    return file


def artifacts(directory):
    """Of the offline W&B run of a directory."""
    return [each["artifact"] for each in wandb_records(directory) if each["type"] == "artifact"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`outputs/first` in the working directory: two checkpoints, and an export of the second."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs/first"
    with open_record(run, inputs=[origins.of_dataset(tmp_path / "data/corpus", DATA)]) as record:
        record.output(origins.of_checkpoint(checkpoint_of(run, 5)))
    export_of(checkpoint_of(run, 10), run / "export")
    return run


def test_a_parity_report_leads_back_to_the_checkpoint_the_commit_and_the_data(run, tmp_path, capsys):
    (tmp_path / "data/corpus").mkdir(parents=True)
    file = baseline_of(tmp_path / "mine.json", origins.of_model(run / "export"))
    sides = [origins.of_results(file), origins.origin("datasheet", "NVIDIA H100")]
    with open_record(tmp_path / "outputs/mine-h100", job_type="parity", inputs=sides):
        pass
    fingerprint = origins.of_checkpoint(run / "checkpoints/step-0000010")["fingerprint"]
    assert main(["mine-h100"]) == 0
    shown = [line.lstrip("│├└─ ") for line in capsys.readouterr().out.splitlines()]
    written = origins.of_checkpoint(run / "checkpoints/step-0000010")["time"].replace("T", " ")
    assert [line for line in shown if not line.startswith(("at ", "step "))] == [
        "parity mine-h100",
        "commit aaaaaaaaaaaa, 2026-11-26 12:00:00 UTC",
        "baseline mine",
        "an A40, commit bbbbbbbbbbbb with uncommitted changes, 2026-11-26 13:00:00 UTC",
        f"fingerprint {files.sha256_of(file)[:12]}",
        "export first",
        f"fingerprint {find('outputs/first/export')['fingerprint'][:12]}",
        "checkpoint first/step-0000010",
        f"commit aaaaaaaaaaaa, {written.removesuffix('+00:00')} UTC",
        f"fingerprint {fingerprint[:12]}",
        "run first",
        "commit aaaaaaaaaaaa, 2026-11-26 12:00:00 UTC",
        "dataset corpus",
        "fingerprint dddddddddddd",
        "datasheet NVIDIA H100",
    ]
    assert f"at {run}/checkpoints/step-0000010" in shown and f"at {file}" in shown
    assert brief(origins.of_model(run / "export")) == (
        "export first, step 10, run at commit aaaaaaaaaaaa, data dddddddddddd"
    )


def test_a_run_says_what_was_made_from_it(run):
    shown = describe(find("first")).splitlines()
    assert shown[0] == "run first" and shown[3] == "│  holds step-0000005, step-0000010, export"


def test_an_export_that_was_copied_elsewhere_still_knows_its_run_when_that_is_gone(run, tmp_path):
    copy = shutil.copytree(run / "export", tmp_path / "elsewhere/model")
    shutil.rmtree(run)
    shown = describe(find(str(copy)))
    assert f"at {copy}" in shown and "commit aaaaaaaaaaaa" in shown and "fingerprint dddddddddddd" in shown
    gone = f"(deleted, moved, or on another machine); these facts are from {copy}"
    assert f"the run directory is not there {gone}" in shown
    assert f"not there (pruned, {gone[1:]}" in shown  # the checkpoint
    assert shown.count("not there") == 3  # and the data


def test_a_run_that_was_moved_or_pulled_is_found_by_its_id(run, tmp_path):
    copy = shutil.copytree(run / "export", tmp_path / "model")
    run.rename(tmp_path / "outputs/pulled")
    assert f"its run directory here is {tmp_path}/outputs/pulled" in describe(find(str(copy)))
    assert describe(find("pulled")).startswith("run pulled\n")


def test_another_run_of_that_name_is_not_taken_for_the_one_that_is_gone(run, tmp_path):
    copy = shutil.copytree(run / "export", tmp_path / "model")
    with open_record(run, commit=LATER):
        pass
    assert "another run has taken that directory since" in describe(find(str(copy)))


def test_what_was_written_anew_is_not_taken_for_what_was_measured(run, tmp_path):
    file = baseline_of(tmp_path / "mine.json", origins.of_model(run / "export"))
    assert "written anew" not in describe(find("mine.json"))
    shutil.rmtree(run / "export")
    export_of(run / "checkpoints/step-0000005", run / "export")
    shown = describe(find(str(file)))
    assert f"written anew since; these facts are from {file}" in shown and "step 10" in shown
    (run / "export/model.safetensors").write_bytes(b"other weights")
    changed = origins.of_model(run / "export")
    assert changed["fingerprint"] is None
    assert changed["note"] == "changed since it was exported: model.safetensors"


def test_a_resumed_run_names_the_commits_of_its_earlier_starts(run):
    with open_record(run, commit=LATER, resume_step=5):
        pass
    newer = checkpoint_of(run, 15)
    assert "commit bbbbbbbbbbbb with uncommitted changes" in describe(find(str(run)))
    assert "resumed; commits of the earlier starts: aaaaaaaaaaaa" in describe(find(str(run)))
    assert origins.of_checkpoint(newer)["commit"] == LATER
    assert origins.of_checkpoint(run / "checkpoints/step-0000010")["commit"] == COMMIT


def test_what_comes_from_no_run_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"1234")
    theirs = origins.of_model(tmp_path)
    assert "which run or publisher it comes from is not recorded" in describe(theirs)
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"123")
    assert origins.of_model(tmp_path)["fingerprint"] != theirs["fingerprint"]
    (tmp_path / "lineage.json").write_text("[1]")
    assert origins.of_model(tmp_path)["note"] == "lineage.json is damaged: not an origin: [1]"
    assert describe(origins.random_weights("llama-5m")) == (
        "model llama-5m\n   random weights: trained by no run, on no data"
    )


def test_files_from_before_there_were_inputs_still_name_their_data(tmp_path):
    files.write_json(tmp_path / "provenance.json", {"commit": COMMIT, "data_fingerprint": DATA})
    assert "dataset name not recorded\n" in describe(find(str(tmp_path)))
    folder = tmp_path / "checkpoints/step-0000005"
    folder.mkdir(parents=True)
    files.write_json(folder / "state.json", {"step": 5, "files": {"rank-0.safetensors": 12}})
    old = origins.of_checkpoint(folder)
    assert old["commit"] == COMMIT and old["fingerprint_of"].endswith("not the weights")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone", None, "gone: no such file or folder in "),
        ("a.json", "{", "a.json: its lineage cannot be read (DamagedFile: "),
        ("a.json", "[]", "a.json: holds no `provenance`"),
        ("a.json", '{"provenance": {"inputs": [7]}}', "not an origin: 7"),
        ("a.json", '{"provenance": {"inputs": [{"kind": "run"}]}}', "needs a kind and a name"),
        ("a.json", '{"provenance": {"inputs": [{"kind": "run", "name": "x", "commit": 3}]}}', "must be text"),
        ("a.json", '{"provenance": {"inputs": {"kind": 1}}, "cells": []}', "not an origin: kind"),
    ],
)
def test_what_cannot_be_read_is_one_message_that_names_the_file(
    tmp_path, monkeypatch, capsys, name, content, message
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert message in error and name in error and error.count("\n") == 1


def test_names_of_others_do_not_control_the_terminal(tmp_path):
    made = origins.origin("run", "x\x1b[2Jy\n\u202e")
    assert describe(made) == "run x?[2Jy??"


def test_an_endpoint_tells_its_clients_no_folders_of_its_machine(run):
    made = origins.of_model(run / "export")
    public = origins.without_places(made)
    assert str(run.parent) in json.dumps(made) and str(run.parent) not in json.dumps(public)
    assert origins.of_endpoint("first", "http://localhost:1/v1", public) == origins.checked(public)
    assert [each["fingerprint"] for each in origins.flat([public])] == [
        each["fingerprint"] for each in origins.flat([made])
    ]
    theirs = describe(origins.of_endpoint("first", "http://localhost:1/v1", None))
    assert "the endpoint does not say which checkpoint it serves" in theirs
    with pytest.raises(ValueError, match="needs a kind and a name"):
        origins.checked({"kind": "run"})


def test_a_stranger_that_says_nonsense_of_its_model_is_a_stranger():
    deep: list = []
    for _ in range(200):
        deep = [{"kind": "run", "name": "first", "inputs": deep}]
    for inputs in (5, {"a": 1}, "ab", deep):
        said = {"kind": "export", "name": "first", "inputs": inputs}
        found = origins.of_endpoint("first", "http://localhost:1/v1", said)
        assert (found["kind"], found["inputs"]) == ("endpoint", [])


def test_in_wandb_maker_and_user_log_the_same_artifact_without_its_files(run, tmp_path):
    made = origins.of_checkpoint(run / "checkpoints/step-0000010")
    with open_record(tmp_path / "maker", wandb_mode="offline") as record:
        record.output(made)
        record.finish({})
    exported = origins.of_model(run / "export")
    with open_record(tmp_path / "user", wandb_mode="offline", inputs=[exported]) as record:
        record.finish({})
    [theirs] = artifacts(tmp_path / "maker")
    used = {each["name"]: each for each in artifacts(tmp_path / "user")}
    assert list(used) == ["export-first", "checkpoint-first", "dataset-corpus"]
    assert theirs["name"] == "checkpoint-first"
    ours = used["checkpoint-first"]
    assert theirs["digest"] == ours["digest"] != used["export-first"]["digest"]
    assert theirs["aliases"] == ["latest", "step-10"] and not theirs.get("use_after_commit")
    assert ours["use_after_commit"] and "aliases" not in ours
    for each in (theirs, *used.values()):
        [entry] = each["manifest"]["contents"]
        assert "local_path" not in entry and entry["ref"].startswith("file:///")
    about = json.loads(used["export-first"]["metadata"])
    assert [each["kind"] for each in origins.flat([about])] == ["export", "checkpoint", "run", "dataset"]
    assert {each["commit"] for each in origins.flat([about])} >= {COMMIT}
    for role in ("maker", "user"):
        status = json.loads((tmp_path / role / "summary.json").read_text())["wandb_status"]
        assert status.startswith("offline: ") and "not in W&B" not in status


def test_another_content_at_the_same_path_is_another_version(run, tmp_path):
    digests = []
    for step in (5, 10):
        shutil.rmtree(run / "export")
        export_of(run / f"checkpoints/step-{step:07d}", run / "export")
        with open_record(tmp_path / f"{step}", wandb_mode="offline") as record:
            record.output(origins.of_model(run / "export"))
            record.finish({})
        [made] = artifacts(tmp_path / f"{step}")
        digests.append((made["name"], made["digest"]))
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]


def test_an_artifact_that_wandb_cannot_take_is_named_and_stops_nothing(run):
    made = origins.of_model(run / "export")
    [problem] = wandb_artifacts.log(object(), made, used=True)  # a run of another wandb
    assert problem.startswith("export first is not in W&B: AttributeError: ")
    assert wandb_artifacts.log(object(), origins.of_run(run), used=True) == []  # W&B has it as a run
