"""Checkpoints behind an fsspec URL: killed uploads, what is kept there, and failures."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from cluster import files
from cluster.cli import UserError
from cluster.process import Child
from cluster.record import events
from cluster.runs import COMPLETE
from cluster.session import free_ports
from tests.training.run.test_checkpoint import OneRank
from tests.waiting import wait_until
from training import config as training_config
from training.config import TrainConfig
from training.data.urls import file_system
from training.run.checkpoint import STATE, Checkpoint, step_directory
from training.run.state import remote, rewinds, writer
from training.run.state.remote import PARTS, Remote, Uploads, restore

SHARD = "rank-00000-of-00001.safetensors"
MOTO = "ASUNCION_MOTO_SERVER"  # from 5.2.1 to 5.2.5 it does not answer as pyarrow expects (moto issue 10055)


def configure(folder: Path, url: str, *keys: str) -> TrainConfig:
    given = [f"run.directory={folder}", "run.name=r", f"checkpoint.upload={url}", *keys]
    return training_config.load(dotlist=given)


def write(config: TrainConfig, *steps: int, value: float = 0.0) -> list[Path]:
    paths = [step_directory(config.run_directory / "checkpoints", step) for step in steps]
    for path, step in zip(paths, steps, strict=True):
        shards = [("weight", 0, {"master": torch.full((1000,), step + value)})]
        writer.save(path, shards=shards, state={"step": step}, context=OneRank())
    return paths


def remote_of(config: TrainConfig) -> Remote:
    found = Remote.of(config)
    assert found is not None
    return found


def restored(config: TrainConfig, *, newest: Path | None, report: Callable[[str], None]) -> Path | None:
    return restore(config, Remote.of(config), newest=newest, report=report)


@pytest.fixture(params=["file", "s3"])
def far(request, tmp_path, monkeypatch) -> Iterator[tuple[str, type[AbstractFileSystem]]]:
    """A URL, and the class of its file system."""
    if request.param == "file":
        yield f"file:{tmp_path}/far", LocalFileSystem
        return
    program = os.environ.get(MOTO)
    if program is None:
        pytest.skip(f"no S3 server: set {MOTO} to the moto_server of an environment with moto[server]<5.2")
    [port] = free_ports(1)
    with Child([program, "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL):
        wait_until(lambda: listens(port))
        about = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}
        about["ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        for name, value in about.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        urlopen(Request(f"{about['ENDPOINT_URL']}/bucket", method="PUT")).close()
        yield "s3://bucket/far", ArrowFSWrapper


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_an_upload_that_was_killed_goes_on_and_a_fresh_machine_continues_from_it(tmp_path, far, monkeypatch):
    url, system_class = far
    config = configure(tmp_path / "here", url)
    [path] = write(config, 7)
    (config.run_directory / "metrics.jsonl").write_text('{"step": 7}\n')
    put, sent = system_class.put_file, []

    def killed_halfway(system: AbstractFileSystem, here: str, there: str, **options: object) -> None:
        if here.endswith(SHARD):
            file = system.open(there, "wb")
            file.write(Path(here).read_bytes()[:1000])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        put(system, here, there, **options)

    if (child := os.fork()) == 0:
        system_class.put_file = killed_halfway
        try:
            remote_of(config).send(path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    system, there = file_system(f"{url}/r/checkpoints/step-0000007")
    found = sorted(Path(file).name for file in system.ls(there, detail=False))
    assert [name for name in found if name != SHARD] == [PARTS, STATE]  # on S3 a half of a file is none

    elsewhere = configure(tmp_path / "elsewhere", url)
    assert restored(elsewhere, newest=None, report=print) is None  # it is not complete
    monkeypatch.setattr(
        system_class,
        "put_file",
        lambda system, here, to, **options: (sent.append(Path(here).name), put(system, here, to)),
    )
    assert remote_of(config).send(path) and not remote_of(config).send(path)
    assert sent == [SHARD, "metrics.jsonl"]  # and state.json not again
    told: list[str] = []
    found = restored(elsewhere, newest=None, report=told.append)
    assert found == elsewhere.run_directory / "checkpoints/step-0000007"
    assert told == [f"fetching step 7 from {url}/r"]
    Checkpoint(found).verify()
    assert {f.name: f.read_bytes() for f in found.iterdir()} == {
        f.name: f.read_bytes() for f in path.iterdir()
    }
    assert (elsewhere.run_directory / "metrics.jsonl").read_text() == '{"step": 7}\n'
    assert restored(elsewhere, newest=found, report=told.append) == found and len(told) == 1


def test_what_was_flipped_there_is_not_taken(tmp_path):
    config = configure(tmp_path / "here", f"file:{tmp_path}/far")
    [path] = write(config, 7)
    remote_of(config).send(path)
    file = tmp_path / "far/r/checkpoints/step-0000007" / SHARD
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    shutil.rmtree(config.run_directory)
    with pytest.raises(UserError, match=r"checkpoint.upload: .*step-0000007: .*is not what was sent"):
        restored(config, newest=None, report=print)
    assert not list(config.run_directory.glob(f"*/*/{COMPLETE}"))


@pytest.fixture
def memory():
    """Behind memory:, which lives as long as this process."""
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_as_many_are_kept_there_and_what_a_rewind_dropped_goes(tmp_path, memory):
    config = configure(tmp_path, "memory://far", "checkpoint.every_steps=2", "checkpoint.keep_every_steps=4")
    with Uploads(config, Remote.of(config), note=print):
        write(config, 2, 4, 6, 8, 10)
    there = remote_of(config)
    assert there.steps() == {4: True, 8: True, 10: True}
    for step in (8, 10):
        shutil.rmtree(step_directory(config.run_directory / "checkpoints", step))
    files.write_json(config.run_directory / rewinds.FILE, [{"from_step": 11, "to_step": 6}])
    assert restored(config, newest=write(config, 6)[0], report=print).name == "step-0000006"
    with Uploads(config, Remote.of(config), note=print):
        write(config, 8, value=0.5)
    assert there.steps() == {4: True, 6: True, 8: True}
    elsewhere = replace(config, run=replace(config.run, directory=str(tmp_path / "elsewhere")))
    found = restored(elsewhere, newest=None, report=print)
    assert Checkpoint(found).read("weight", "master", 0, 1) == 8.5


def test_a_failure_is_one_event_and_the_next_try_sends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.01)
    config = configure(tmp_path / "here", f"file:{tmp_path}/far")
    config.run_directory.mkdir(parents=True)
    (tmp_path / "far").write_text("no folder")

    def kinds() -> list[str]:
        return [event["kind"] for event in events.read(config.run_directory)]

    with Uploads(config, Remote.of(config), note=print):
        write(config, 7)
        wait_until(kinds)
        (tmp_path / "far").unlink()
        wait_until(lambda: "uploaded" in kinds())
    assert kinds() == ["upload_failed", "uploaded"]
    assert "step-0000007 could not be sent to file:" in events.read(config.run_directory)[0]["text"]
    notes: list[str] = []
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)
    broken = configure(tmp_path / "here", f"file:{tmp_path}/here/r/events.jsonl")
    with Uploads(broken, Remote.of(broken), note=notes.append):
        pass
    assert "step-0000007 is not at file:" in notes[-1] and "the same command sends it" in notes[-1]


@pytest.mark.parametrize(
    ("url", "why"),
    [("nowhere://x", "Protocol not known: nowhere"), ("file:/proc/x", "Error")],
)
def test_a_url_that_cannot_be_used_is_refused_before_the_run(tmp_path, url, why):
    with pytest.raises(UserError, match=f"^checkpoint.upload: {url}.*{why}"):
        restored(configure(tmp_path, url), newest=None, report=print)
