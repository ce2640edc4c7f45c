"""The environment of processes that compute."""

import os
import subprocess
import sys

import pytest

from cluster.session import ALLOCATOR_NAMES, GPU_ENVIRONMENT, worker_environment

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
