"""What `make down` removes of a node's access, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.head import forget

KEY = "ssh-ed25519 AAAA asuncion lab head"


@pytest.fixture
def node(tmp_path):
    """A node on which the clusters lab and other, of one user, have been up."""
    home = tmp_path / "home"
    for folder in (".ssh", ".ray", "dotfiles"):
        (home / folder).mkdir(parents=True)
    (home / ".ssh/authorized_keys").write_text(f"ssh-rsa BBBB me\n{KEY}\nssh-rsa CCCC asuncion other head")
    (home / ".ssh/authorized_keys").chmod(0o600)
    lines = [f"[ -O {tmp_path}/{name} -a -O {tmp_path}/{name}/activate ] && . x  # asuncion" for name in "ab"]
    (home / "dotfiles/bashrc").write_text("\n".join(["alias a=b", *lines, "export C=d\n"]))
    (home / ".bashrc").symlink_to(home / "dotfiles/bashrc")
    (home / ".ray/auth_token").write_text("secret")
    for name in ("asuncion_lab", "asuncion_lab.pub", "asuncion_other"):
        (home / ".ssh" / name).write_text(name)
    for name in "ab":
        (tmp_path / name / "env").mkdir(parents=True)
        (tmp_path / name / "started").write_text("x")
    return tmp_path


def run(node, name, scratch, key):
    command = [sys.executable, "-I", "-", name, str(node / scratch), key]
    done = subprocess.run(
        command,
        input=Path(forget.__file__).read_bytes(),
        env={"HOME": str(node / "home")},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["removed"]


def test_a_cluster_is_forgotten_and_everything_else_stays(node):
    removed = run(node, "lab", "a", KEY)
    assert len(removed) == 5 and "the head's key, from authorized_keys" in removed
    home = node / "home"
    assert (home / ".ssh/authorized_keys").read_text() == "ssh-rsa BBBB me\nssh-rsa CCCC asuncion other head"
    assert (home / ".ssh/authorized_keys").stat().st_mode & 0o777 == 0o600
    left = (home / ".bashrc").read_text().splitlines()
    assert len(left) == 3 and f"-O {node}/b " in left[1] and (home / ".bashrc").is_symlink()
    assert sorted(os.listdir(home / ".ssh")) == ["asuncion_other", "authorized_keys"]
    assert (home / ".ray/auth_token").exists()  # the other cluster's
    assert not (node / "a/started").exists() and (node / "a/env").is_dir() and (node / "b/started").exists()
    run(node, "other", "b", "ssh-rsa CCCC asuncion other head")
    assert not (home / ".ray/auth_token").exists() and "asuncion" not in (home / ".bashrc").read_text()


def test_a_bashrc_that_is_not_utf_8_stays_as_it_is(node):
    bashrc = node / "home/dotfiles/bashrc"
    before = bashrc.read_bytes() + b"alias caf\xe9=ls\n"
    bashrc.write_bytes(before)
    run(node, "lab", "nowhere", "")
    assert bashrc.read_bytes() == before


def test_nothing_there_is_nothing_to_forget(node):
    run(node, "lab", "a", KEY)
    assert run(node, "lab", "a", KEY) == []
    assert run(node, "lab", "nowhere", "") == []
