"""Bad input and broken surroundings: one clear message, a non-zero exit code, and nothing lost."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.cli import BAD_INPUT, FAILED
from cluster.record.record import read_metrics
from cluster.runs import COMPLETE
from tests.commands import python, tiny, write_corpus
from training import launch
from training.run.checkpoint import Checkpoint, newest_complete

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a finished run `run` of 8 steps, with checkpoints at 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("errors")
    write_corpus(folder)
    done = python("training.launch", *tiny(folder, run__name="run", checkpoint__keep=5))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that broke off at its end: no summary yet, and its last checkpoint is the newest."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "outputs" / "run" / "summary.json").unlink()
    return folder


def refusal(capsys, *arguments: str) -> str:
    """The message of a command that must end with BAD_INPUT, before any training."""
    assert launch.main(list(arguments)) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    return error[error.index("error: ") :]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"batch__tokns": 3}, ["batch.tokns", "unknown key", "sequence_length"]),
        ({"batch__tokens": "many"}, ["batch.tokens", "Integer"]),
        ({"batch__tokens": 500}, ["batch.tokens: 500", "not a multiple of 64", "use 448 or 512"]),
        ({"schedule__tokens": 100}, ["schedule.tokens: 100", "batch.tokens=512"]),
        ({"zero__stage": 4}, ["zero.stage", "0, 1, 2, 3"]),
        ({"model__shape": "llama-9t"}, ["llama-9t", "llama-1b4"]),
        ({"model__num_kv_heads": 3}, ["num_kv_heads", "3"]),
        ({"model__num_layers": 10**9}, ["num_layers: 1,000,000,000 is above 10,000"]),
        ({"model__hidden_size": 2 * 10**5, "model__ffn_size": 10**7}, ["hidden_size: ", "e+13 parameters"]),
        ({"model__vocab_size": 256}, ["model.vocab_size: 256", "320 tokens"]),
        ({"workers__accelerator": "A400"}, ["workers.accelerator", "A400", "A40"]),
        ({"workers__count": 2}, ["workers.count: 2", "torchrun started 1"]),
        ({"data__source": "/nowhere/x.jsonl"}, ["/nowhere/x.jsonl"]),
        (
            {"batch__sequence_length": 4096, "batch__tokens": 8192, "schedule__tokens": 8192},
            ["sequence_length"],
        ),
    ],
    ids=str,
)
def test_a_bad_key_is_one_message_that_names_it(finished: Path, capsys, changes, parts) -> None:
    message = refusal(capsys, *tiny(finished, run__name="refused", **changes))
    for part in parts:
        assert part in message
    assert not (finished / "outputs" / "refused" / "checkpoints").exists()


def test_a_directory_that_cannot_be_written_is_named(finished: Path, capsys) -> None:
    (finished / "file").write_text("not a folder")
    message = refusal(capsys, *tiny(finished, run__directory=finished / "file"))
    assert str(finished / "file") in message and "run.directory" in message


def test_a_place_for_checkpoints_that_cannot_be_written_is_named_before_the_first_step(
    finished: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to("/proc/self/fdinfo")  # where nobody may make a file, root neither
    message = refusal(capsys, *tiny(finished, run__name="run", run__directory=tmp_path))
    assert f"{run / 'checkpoints'}: no checkpoint can be written there (" in message
    assert not (run / "metrics.jsonl").exists()


def test_other_data_than_the_checkpoint_saw_is_refused(unfinished: Path, capsys) -> None:
    message = refusal(capsys, *tiny(unfinished, run__name="run", data__vocab_size=310))
    assert "data fingerprint" in message and "run.name" in message


def test_another_seed_than_the_checkpoint_had_is_refused(unfinished: Path, capsys) -> None:
    message = refusal(capsys, *tiny(unfinished, run__name="run", run__seed=5))
    assert "run.seed was 1234 and is now 5" in message


def shard_of_the_only_checkpoint(folder: Path) -> Path:
    checkpoints = folder / "outputs/run/checkpoints"
    newest = checkpoints / "step-0000008"
    for each in set(checkpoints.iterdir()) - {newest}:
        shutil.rmtree(each)
    return next(newest.glob("rank-*"))


def test_a_missing_shard_of_a_complete_checkpoint_is_named(unfinished: Path, capsys) -> None:
    shard = shard_of_the_only_checkpoint(unfinished)
    shard.unlink()
    message = refusal(capsys, *tiny(unfinished, run__name="run"))
    assert f"{shard}: missing shard" in message and "delete" in message


def test_a_truncated_shard_is_named(unfinished: Path, capsys) -> None:
    shard = shard_of_the_only_checkpoint(unfinished)
    os.truncate(shard, 1000)
    assert f"{shard}: 1000 bytes instead of" in refusal(capsys, *tiny(unfinished, run__name="run"))


@pytest.mark.parametrize("name", ["rewinds.json", "provenance.json"])
def test_a_damaged_file_of_the_run_is_one_message(unfinished: Path, name: str) -> None:
    file = unfinished / "outputs" / "run" / name
    file.write_text("{torn")
    done = python("training.launch", *tiny(unfinished, run__name="run"))
    assert done.returncode == FAILED and "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{file}: not valid JSON" in message


@pytest.mark.parametrize("damage", ["half-written", "damaged"])
def test_an_unusable_checkpoint_is_skipped_for_the_one_before(unfinished: Path, damage: str) -> None:
    run = unfinished / "outputs" / "run"
    newest = run / "checkpoints/step-0000008"
    said = f"skipping {newest}: half-written"
    if damage == "half-written":
        (newest / COMPLETE).unlink()
    else:
        shard = next(newest.glob("rank-*"))
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)
        said = f"{shard}: SHA-256 "
    before = [row["loss"] for row in read_metrics(run / "metrics.jsonl")[1:]]
    done = python("training.launch", *tiny(unfinished, run__name="run"))
    assert done.returncode == 0, done.stderr
    assert said in done.stderr and "from step 6" in done.stderr
    assert [row["loss"] for row in read_metrics(run / "metrics.jsonl")[1:]] == before


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of limited size needs root")
def test_a_full_disk_ends_the_run_with_one_message_and_loses_nothing(finished: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("this machine does not let tests mount a file system")
    try:
        keys = tiny(finished, run__name="run", run__directory=disk, checkpoint__keep=5)
        failed = python("training.launch", *keys)
        assert failed.returncode not in (0, None)
        assert failed.stderr.count("error: ") == 1 and "Traceback" not in failed.stderr
        assert str(disk) in failed.stderr and "No space left on device" in failed.stderr
        newest = newest_complete(disk / "run" / "checkpoints", report=print)
        assert newest is not None and Checkpoint(newest).state["step"] in (3, 6)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        done = python("training.launch", *keys)
        assert done.returncode == 0, done.stderr
        reference = read_metrics(finished / "outputs/run/metrics.jsonl")
        assert [r.get("loss") for r in read_metrics(disk / "run/metrics.jsonl")] == [
            r.get("loss") for r in reference
        ]
    finally:
        subprocess.run(["umount", disk], check=True)
