"""The environment of processes that compute; the folder, the token and the cluster of a session."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import RunError
from cluster.config import ConfigError
from cluster.head.reap import Process, processes
from cluster.session import (
    ALLOCATOR_NAMES,
    GPU_ENVIRONMENT,
    LONGEST_FOLDER,
    _make_token,
    _own_address,
    _ray_folder,
    free_ports,
    worker_environment,
)

NAME, OLDER_NAME = ALLOCATOR_NAMES


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in ALLOCATOR_NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_gpu_process_joins_again_what_its_allocator_has_cut_up():
    assert worker_environment(gpu=True, threads=1)[NAME] == "expandable_segments:True"
    assert not set(ALLOCATOR_NAMES) & set(worker_environment(gpu=False, threads=1))


@pytest.mark.parametrize("name", ALLOCATOR_NAMES)
def test_what_the_user_has_set_stays_and_reaches_workers_elsewhere(name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    given = worker_environment(gpu=True, threads=1)
    assert {key: given[key] for key in ALLOCATOR_NAMES if key in given} == {name: "max_split_size_mb:128"}


@pytest.mark.parametrize("name", [*ALLOCATOR_NAMES, "PYTORCH_ALLOCATOR_CONF"])
def test_torch_reads_these_names_and_no_other(name):
    """And a torch with CUDA refuses an option that it does not know; one without reads it all the same."""
    value = GPU_ENVIRONMENT[NAME]
    read = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    environment = {**os.environ, name: value}
    found = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == (value if name in ALLOCATOR_NAMES else "") and found.returncode == 0


def test_an_embedded_ray_has_a_folder_and_a_token_that_nobody_else_can_open(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "new"))
    monkeypatch.setattr("cluster.session.LONGEST_FOLDER", 1000)
    before = os.umask(0)
    try:
        with _ray_folder() as folder:
            token = _make_token(folder)
            assert folder.parent == tmp_path / "new"
            assert (folder.stat().st_mode & 0o777, token.stat().st_mode & 0o777) == (0o700, 0o600)
            assert len(token.read_text()) == 64
    finally:
        os.umask(before)
    assert not folder.exists()


def test_rays_folder_stays_after_an_error_for_its_logs_and_after_nothing_else(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    for error, stays in ((RunError("x"), True), (ConfigError("x"), False), (KeyboardInterrupt(), False)):
        with pytest.raises(type(error)), _ray_folder() as folder:
            raise error
        assert folder.exists() == stays
        shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_for_ray_that_is_unsafe_or_too_deep_is_refused(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 60)
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    with pytest.raises(ConfigError, match=f"RAY_TMPDIR: {deep} is too long"), _ray_folder():
        pass
    assert not deep.exists()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(deep))
    with _ray_folder() as folder:
        assert folder.parent == Path("/tmp")
    monkeypatch.setattr("cluster.session.LONGEST_FOLDER", 1000)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("RAY_TMPDIR", str(open_to_all))
    with pytest.raises(PermissionError, match="others can write to it"), _ray_folder():
        pass


def test_the_longest_allowed_folder_leaves_room_for_every_socket_of_ray():
    """107 bytes: Linux's sockaddr_un. Ray's longest names, with the largest process id of Linux."""
    sockets = ("plasma_store", "raylet")
    session = "session_2026-11-26_05-34-43_075141_4194304"
    assert LONGEST_FOLDER + max(len(f"/{session}/sockets/{name}") for name in sockets) == 107


@pytest.mark.parametrize(
    ("commands", "told"),
    [
        ([], "no Ray clusters of yours run"),
        (
            ["/x/raylet --gcs-address=10.0.0.1:6379 --a", "/x/raylet --gcs-address=10.0.0.2:6379"],
            "2 Ray clusters",
        ),
        (["/x/raylet --gcs-address=10.0.0.1:6379 --a", "grep raylet --gcs-address=10.0.0.2:1"], None),
    ],
)
def test_auto_means_the_one_cluster_of_this_user(commands, told, monkeypatch):
    rows = {pid: Process(1, command, b"") for pid, command in enumerate(commands)}
    monkeypatch.setattr("cluster.session.processes", lambda: rows)
    if told is None:
        assert _own_address() == "10.0.0.1:6379"
        return
    with pytest.raises(ConfigError, match=told):
        _own_address()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
@pytest.mark.parametrize(("user", "seen"), [(0, True), (65534, False)])
def test_auto_sees_the_process_table_of_this_user_alone(user, seen):
    """A program that looks like a raylet: Ray's own search takes every user's."""
    address = f"127.0.0.1:{os.getpid() % 60000 + 1}"
    script = "read line; exit # "  # waits for its input
    command = ["sh", "-c", script, "/x/raylet ", f"--gcs-address={address}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, user=user) as process:
        rows = [row for row in processes().values() if f"--gcs-address={address}" in row.command]
        assert bool(rows) == seen
        process.communicate(b"\n")


def test_free_ports_are_free_and_none_that_the_system_gives_to_others():
    ports = free_ports(5)
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 5 and all(20_000 <= port < first for port in ports)
    with socket.socket() as one:
        one.bind(("127.0.0.1", ports[0]))
