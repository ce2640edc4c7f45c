"""Folders and the token that other users of a machine could read, change or plant."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import private
from tests.commands import ROOT

OTHER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def own(path: Path, bits: int) -> Path:
    path.mkdir(parents=True)
    path.chmod(bits)
    return path


def test_a_new_folder_is_closed_to_others_and_an_own_one_gets_closed(tmp_path):
    for umask in (0o000, 0o022, 0o077):
        before = os.umask(umask)
        try:
            private.make_folder(tmp_path / f"site{umask}")
        finally:
            os.umask(before)
        assert mode(tmp_path / f"site{umask}") == 0o700
    private.make_folder(own(tmp_path / "open", 0o755))
    assert mode(tmp_path / "open") == 0o700


@pytest.mark.parametrize("bits", [0o777, 0o757, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, bits):
    site = own(tmp_path / "site", bits)
    with pytest.raises(PermissionError, match="others can write to it") as caught:
        private.make_folder(site)
    assert caught.value.filename == str(site)


def test_a_link_and_a_file_in_the_folders_place_are_refused(tmp_path):
    own(tmp_path / "elsewhere", 0o755)
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name in ("link", "dangling"):
        with pytest.raises(PermissionError, match="symbolic link"):
            private.make_folder(tmp_path / name)
    with pytest.raises(PermissionError, match="is not a folder"):
        private.make_folder(tmp_path / "file")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_above_that_others_can_write_to_is_refused_unless_only_owners_rename_there(tmp_path):
    above = own(tmp_path / "scratch", 0o777)
    with pytest.raises(PermissionError, match=r"`chmod go-w` or `chmod \+t` it"):
        private.make_folder(above / "site")
    assert not (above / "site").exists()
    above.chmod(0o1777)
    private.make_folder(above / "site")


@needs_root
def test_what_belongs_to_another_user_is_refused_at_every_level(tmp_path):
    site = own(tmp_path / "above/site", 0o755)
    os.chown(site, OTHER, OTHER)
    with pytest.raises(PermissionError, match=f"belongs to user {OTHER}, not to you"):
        private.make_folder(site)
    os.chown(site, 0, 0)
    os.chown(site.parent, OTHER, OTHER)
    with pytest.raises(PermissionError, match=f"lies above .* belongs to user {OTHER}"):
        private.make_folder(site)
    (tmp_path / "link").symlink_to("above")
    os.chown(tmp_path / "link", OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(PermissionError, match="link"):
        private.make_folder(tmp_path / "link/site")


@needs_root
def test_a_link_of_the_sites_above_is_followed_to_what_it_names(tmp_path):
    """/scratch is often a link to a disk; what it leads to has to be as safe."""
    disk = own(tmp_path / "disk", 0o755)
    (tmp_path / "scratch").symlink_to(disk)
    private.make_folder(tmp_path / "scratch/site")
    assert mode(disk / "site") == 0o700
    disk.chmod(0o777)
    with pytest.raises(PermissionError, match="others can write to it"):
        private.make_folder(tmp_path / "scratch/site")


@needs_root
def test_a_group_counts_as_others_unless_it_is_the_users_own(tmp_path):
    site = own(tmp_path / "site", 0o775)
    private.require_safe(site)
    os.chown(site, 0, 1234)
    with pytest.raises(PermissionError, match="others can write to it"):
        private.require_safe(site)


def test_the_token_is_closed_from_the_start_and_stays_what_it_is(home):
    before = os.umask(0)
    try:
        private.make_token()
    finally:
        os.umask(before)
    token = private.read_token()
    assert len(token) == 64 and (mode(home / ".ray"), mode(home / ".ray/auth_token")) == (0o700, 0o600)
    private.make_token()
    assert private.read_token() == token
    private.make_token(b"another")
    assert private.read_token() == b"another" and mode(home / ".ray/auth_token") == 0o600
    assert [file.name for file in (home / ".ray").iterdir()] == ["auth_token"]


@pytest.mark.parametrize("bits", [0o644, 0o640, 0o604, 0o755])
def test_a_token_that_others_can_read_is_mended(home, bits):
    own(home / ".ray", 0o755)
    (home / ".ray/auth_token").write_text("secret")
    (home / ".ray/auth_token").chmod(bits)
    private.make_token()
    assert private.read_token() == b"secret"
    assert (mode(home / ".ray"), mode(home / ".ray/auth_token")) == (0o700, 0o600)


def test_an_empty_token_is_replaced(home):
    own(home / ".ray", 0o700)
    (home / ".ray/auth_token").touch(0o600)
    private.make_token()
    assert len(private.read_token()) == 64


def test_a_token_that_others_may_have_put_there_is_refused(home):
    place = own(home / ".ray", 0o700) / "auth_token"
    place.write_text("planted")
    place.chmod(0o666)
    with pytest.raises(PermissionError, match="may be the token of another user; remove it"):
        private.make_token()
    place.unlink()
    (home / "mine").write_text("planted")
    place.symlink_to(home / "mine")
    for given in (b"", b"new"):
        with pytest.raises(PermissionError, match="symbolic link; remove it"):
            private.make_token(given)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(PermissionError, match="remove it"):
        private.read_token()
    assert (home / "mine").read_text() == "planted"


@needs_root
def test_another_users_token_or_folder_for_it_is_refused(home):
    place = own(home / ".ray", 0o700) / "auth_token"
    place.write_text("planted")
    os.chown(place, OTHER, OTHER)
    with pytest.raises(PermissionError, match="may be the token of another user"):
        private.make_token()
    os.chown(home / ".ray", OTHER, OTHER)
    with pytest.raises(PermissionError, match=f"belongs to user {OTHER}"):
        private.make_token()


def test_many_at_once_make_one_token(home):
    command = [sys.executable, private.__file__, "token"]
    running = [subprocess.Popen(command, env={**os.environ, "HOME": str(home)}) for _ in range(6)]
    assert [one.wait() for one in running] == [0] * 6
    assert len(private.read_token()) == 64 and os.listdir(home / ".ray") == ["auth_token"]


def test_the_command_runs_from_its_source_alone_and_names_what_it_refuses(tmp_path):
    """As a node runs it before there is any code there, by an old Python's rules (-I: nothing of ours)."""
    command = [sys.executable, "-I", "-c", Path(private.__file__).read_text(), "folder"]
    done = subprocess.run([*command, str(tmp_path / "site")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    own(tmp_path / "open", 0o777)
    done = subprocess.run([*command, str(tmp_path / "open")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"{tmp_path}/open: others can write to it")
    assert done.stderr.count("\n") == 1


def test_a_container_that_shows_root_as_nobody_is_no_reason_to_refuse(tmp_path):
    """Rootless containers have no root of their own: `/` belongs to 65534 there."""
    script = f"""import os, sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from cluster import private
from tests.commands import ROOT
private.require_safe_above(Path("/tmp/x")); print(Path("/").stat().st_uid)"""
    done = subprocess.run(["unshare", "-U", sys.executable, "-c", script], capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip("this machine forbids user namespaces")
    assert (done.stdout, done.stderr) == (f"{OTHER}\n", "")
