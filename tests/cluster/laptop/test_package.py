"""The code that travels to a cluster."""

import io
import os
import shutil
import subprocess
import zipfile

import pytest
import yaml

from cluster.cli import UserError
from cluster.laptop import package


def checkout(folder):
    """A git checkout with a tracked file of ours, an ignored one, and one outside our rooms."""
    subprocess.run(["git", "init", "-q", folder], check=True)
    (folder / "cluster").mkdir()
    (folder / "cluster/tool.py").write_text("pass\n")
    (folder / "cluster/wandb.key").write_text("secret")
    (folder / "outputs").mkdir()
    (folder / "outputs/run.bin").write_text("data")
    (folder / ".gitignore").write_text("*.key\n")
    return track(folder)


def track(folder):
    """`git add` everything."""
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    return folder


def names(packed):
    return zipfile.ZipFile(io.BytesIO(packed.data)).namelist()


def test_code_travels_and_neither_data_nor_what_git_ignores(tmp_path):
    packed = package.pack(root=checkout(tmp_path), more={"run.yaml": "a: 1\n"})
    assert names(packed) == ["cluster/tool.py", "run.yaml"]


def test_the_same_code_has_the_same_digest_and_another_has_another(tmp_path):
    first = package.pack(root=checkout(tmp_path))
    (tmp_path / "cluster/tool.py").touch()
    assert package.pack(root=tmp_path) == first
    (tmp_path / "cluster/tool.py").write_text("pass  # changed\n")
    assert package.pack(root=tmp_path).digest != first.digest


def test_without_git_our_rooms_travel(tmp_path):
    (tmp_path / "cluster/__pycache__").mkdir(parents=True)
    (tmp_path / "cluster/tool.py").write_text("pass\n")
    (tmp_path / "cluster/__pycache__/tool.pyc").write_text("")
    assert names(package.pack(root=tmp_path)) == ["cluster/tool.py"]


def test_too_much_is_refused_with_the_largest_file_named(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MAX_BYTES", 300)
    folder = checkout(tmp_path)
    (folder / "cluster/weights.py").write_text("".join(f"{i * 7919 % 10007}" for i in range(500)))
    track(folder)
    with pytest.raises(UserError, match=r"cluster/weights\.py .*\.gitignore"):
        package.pack(root=folder)


def test_what_git_does_not_track_stays_here_and_is_named(tmp_path):
    folder = checkout(tmp_path)
    for name in (".env", "id_ed25519", "new.py"):
        (folder / "cluster" / name).write_text("canary")
    (folder / "cluster/link.py").symlink_to("id_ed25519")
    packed = package.pack(root=folder)
    assert names(packed) == ["cluster/tool.py"]
    assert set(packed.untracked) == {
        f"cluster/{name}" for name in (".env", "id_ed25519", "new.py", "link.py")
    }
    assert "not in git, so not sent: cluster/.env, " in str(packed) and "cluster/new.py" in str(packed)
    assert "wandb.key" not in str(packed)  # ignored: nobody expects it to travel


@pytest.mark.parametrize("tracked", [True, False])
def test_a_link_travels_only_as_a_file_that_travels_too(tmp_path, tracked):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (checkout if tracked else rooms)(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    for place in (outside, folder):
        (place / "secret.py").write_text("canary")
    (folder / "cluster/same.py").symlink_to("tool.py")
    if tracked:
        track(folder)
    found = zipfile.ZipFile(io.BytesIO(package.pack(root=folder).data))
    assert found.read("cluster/same.py") == b"pass\n"
    for target in (outside / "secret.py", "../secret.py", "../outputs/run.bin"):
        (folder / "cluster/leads.py").unlink(missing_ok=True)
        (folder / "cluster/leads.py").symlink_to(target)
        if tracked:
            track(folder)
        with pytest.raises(UserError, match=r"cluster/leads\.py: leads to .*; put a copy"):
            package.pack(root=folder)
    (folder / "cluster/leads.py").unlink()
    (folder / "cluster").rename(outside / "cluster")
    (folder / "cluster").symlink_to(outside / "cluster")  # a folder whose files git may still list
    with pytest.raises(UserError, match=r"cluster.*: leads to .*outside"):
        package.pack(root=folder)


def rooms(folder):
    """A copy without git."""
    (folder / "cluster").mkdir()
    (folder / "cluster/tool.py").write_text("pass\n")
    (folder / "outputs").mkdir()
    (folder / "outputs/run.bin").write_text("data")
    return folder


KEYS = ("secrets.yaml", "hf_token.sh", "api-key.yaml", "aws_credentials.yaml")


@pytest.mark.parametrize(
    "name", [*KEYS, ".env", "id_ed25519", "id_rsa.pub", "id_rsa_work", "host_rsa_key", "tls.pem", "token"]
)
def test_a_tracked_file_whose_name_says_key_is_refused(tmp_path, name):
    folder = checkout(tmp_path)
    (folder / "cluster" / name).write_text("canary")
    with pytest.raises(UserError, match=rf"cluster/{name}: by its name .* move it out"):
        package.pack(root=track(folder))


def test_without_git_code_travels_by_its_suffix_and_keys_are_refused(tmp_path):
    folder = rooms(tmp_path)
    for name in (".env", ".hidden.py", "id_ed25519", "notes.txt", "tool.py~", "model.safetensors"):
        (folder / "cluster" / name).write_text("canary")
    (folder / "training/configs").mkdir(parents=True)
    (folder / "training/configs/small.yaml").write_text("a: 1\n")
    (folder / "constraints.txt").write_text("torch\n")
    assert names(package.pack(root=folder)) == [
        "cluster/tool.py", "constraints.txt", "training/configs/small.yaml",
    ]  # fmt: skip
    for name in KEYS:
        (folder / "cluster" / name).write_text("canary")
        with pytest.raises(UserError, match=rf"cluster/{name}: by its name .* move it out"):
            package.pack(root=folder)
        (folder / "cluster" / name).unlink()


def test_a_git_that_does_not_answer_is_an_error_and_no_reason_to_send_everything(tmp_path, monkeypatch):
    folder = checkout(tmp_path)
    (folder / ".git/index").write_bytes(b"damaged")
    with pytest.raises(UserError, match="git cannot say which files may travel"):
        package.pack(root=folder)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cannot run"):
        package.pack(root=folder)


def test_our_own_code_is_well_below_the_cap():
    packed = package.pack()
    assert len(packed.data) < package.MAX_BYTES / 5
    assert {
        "cluster/head/setup.sh",
        "cluster/machine/simd.h",
        "optim/kernels/native.cpp",
        "pyproject.toml",
    } <= set(names(packed))
    assert not any(name.startswith(("tests/", ".git", "outputs/", "data/")) for name in names(packed))


def test_a_checkout_that_tracks_no_code_is_refused(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    rooms(tmp_path)
    with pytest.raises(UserError, match=r"no code to send: cluster, .* git does not track them"):
        package.pack(root=tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_a_checkout_of_another_user_is_listed_and_runs_nothing(tmp_path):
    folder = checkout(tmp_path)
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    subprocess.run(["git", "config", "core.fsmonitor", hook], cwd=folder, check=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    assert names(package.pack(root=folder)) == ["cluster/tool.py"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_rays_own_launcher_leaves_out_what_the_gitignore_calls_a_key(tmp_path):
    from ray.autoscaler._private.command_runner import SSHCommandRunner

    options = yaml.safe_load((package.ROOT / "cluster/asuncion.yaml").read_text())
    filters = SSHCommandRunner._create_rsync_filter_args(None, options)
    room, there = tmp_path / "checkout/cluster", tmp_path / "there"
    (room / "deeper").mkdir(parents=True)
    shutil.copy(package.ROOT / ".gitignore", tmp_path / "checkout")
    for name in ("tool.py", ".env", "id_ed25519", "tls.pem", "wandb.key", "deeper/id_rsa", "hf_token.txt"):
        (room / name).write_text("x")
    subprocess.run(["rsync", "-az", *filters, f"{room}/", f"{there}/"], check=True)
    assert [file.name for file in there.rglob("*") if file.is_file()] == ["tool.py"]
    key = tmp_path / "home/.ssh/id_ed25519"  # which this launcher has to copy
    key.parent.mkdir(parents=True)
    key.write_text("x")
    subprocess.run(["rsync", "-az", *filters, key, there / "key.pem"], check=True)
    assert (there / "key.pem").exists()
