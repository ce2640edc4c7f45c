"""What the laptop makes of the head's answers."""

import shutil
import subprocess

import pytest

from cluster import remote
from cluster.cli import RunError
from cluster.inventory import Inventory
from cluster.ssh import Ssh, rsync

SITE = Inventory(head="10.0.0.1")
RECORD = {"id": "night-1", "run": "night", "token": "0a1b2c3d", "log": "/x"}


@pytest.mark.parametrize("name", ["../../.ssh/x", "/etc/x", "..", ".hidden", "a b", "", "a\n", "-x"])
@pytest.mark.parametrize("key", ["id", "run", "token"])
def test_a_name_from_the_head_that_would_leave_the_folder_is_refused(tmp_path, monkeypatch, key, name):
    monkeypatch.setattr(remote.inventory, "load", lambda cluster: SITE)
    monkeypatch.setattr(remote, "ask", lambda site, script: RECORD | {key: name})
    for go in (
        lambda: remote.pull(tmp_path / "x.yaml", "night", target=tmp_path / "outputs"),
        lambda: remote.attach(tmp_path / "x.yaml", "night"),
    ):
        with pytest.raises(RunError, match=r"^10\.0\.0\.1: answers with a run called "):
            go()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_a_link_that_leads_out_of_a_run_is_not_brought_here(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "wandb/run").mkdir(parents=True)
    (source / "wandb/latest").symlink_to("run")
    (source / "away").symlink_to("../elsewhere")
    (source / "wandb/etc").symlink_to("/etc")
    command = rsync(Ssh(SITE, SITE.head), str(source), target, exclude=())
    local = [part.removeprefix(f"{SITE.ssh.user}@{SITE.head}:") for part in command]
    subprocess.run(local, check=True, capture_output=True)
    assert {str(path.relative_to(target)) for path in target.rglob("*")} == {
        "wandb", "wandb/run", "wandb/latest",
    }  # fmt: skip
