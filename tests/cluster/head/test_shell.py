"""Commands through login shells that print, change the folder, and are not bash."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from cluster.head import shell
from cluster.head.shell import BEGIN, PastGreeting, after_greeting, login_command

NOISE = "echo Welcome to node1\nprintf 3.11.2\necho mind >&2\ncd /\n"
SCRIPT = """printf 'first '
pwd; echo "it's" '"quoted"' $((1 + 1)) `echo done`; cat
echo oops >&2
exit 3"""


@pytest.mark.parametrize("name", ["bash", "sh", "dash", "zsh", "ksh", "tcsh", "fish"])
def test_a_script_runs_alike_in_every_login_shell(name, tmp_path):
    if (program := shutil.which(name)) is None:
        pytest.skip(f"no {name} here")
    for file in (".bashrc", ".zshenv", ".tcshrc", ".config/fish/config.fish"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(NOISE)
    # As sshd starts it: then bash reads ~/.bashrc, which is not interactive.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SSH_CLIENT": "1.2.3.4 5 6"}
    command, elsewhere = [program, "-c", login_command(SCRIPT)], tmp_path / "elsewhere"
    elsewhere.mkdir()  # where tcsh writes the file 2, which is its `>&2`
    done = subprocess.run(command, env=environment, cwd=elsewhere, input=b"given", capture_output=True)
    assert done.returncode == 3
    expected = f'first {tmp_path}\nit\'s "quoted" 2 done\ngiven'
    assert after_greeting(done.stdout).decode() == expected
    assert done.stderr.decode().rpartition(f"{BEGIN}\n")[2] == "oops\n"
    if name in ("bash", "tcsh"):  # each reads its file, and once
        assert done.stdout.startswith(b"Welcome to node1\n3.11.2") and done.stdout.count(b"Welcome") == 1


def test_a_login_that_runs_nothing_is_told():
    assert after_greeting(b"This account is currently not available.\n") is None
    assert "'not available'" in shell.not_run(b"not available\n") and "authorized_keys" in shell.not_run(b"")


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_only_what_follows_the_greeting_is_passed_on_however_it_is_cut(size):
    sent = f"hello{BEGIN}\n\x00\xff{BEGIN}\nend".encode("latin1")
    passed = []
    pass_on = PastGreeting(passed.append)
    for start in range(0, len(sent), size):
        pass_on(sent[start : start + size])
    assert b"".join(passed) == f"\x00\xff{BEGIN}\nend".encode("latin1")
    assert pass_on.greeting is None


def test_rsync_gets_past_a_greeting(tmp_path):
    """By rsync itself, with a shell in the place of ssh that greets as a login does."""
    if shutil.which("rsync") is None:
        pytest.skip("no rsync here")
    greeting = tmp_path / "ssh"
    greeting.write_text('#!/bin/sh\necho Welcome; shift; exec sh -c "$*"\n')
    greeting.chmod(0o755)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_bytes(os.urandom(100_000))
    command = [
        "rsync",
        "-a",
        *shell.quiet_rsync([str(greeting)]),
        f"node:{tmp_path}/there/",
        f"{tmp_path}/here/",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here/file").read_bytes() == (tmp_path / "there/file").read_bytes()
    back = ["rsync", "-a", *shell.quiet_rsync([str(greeting)]), f"{tmp_path}/here/", f"node:{tmp_path}/back/"]
    assert subprocess.run(back, capture_output=True).returncode == 0
    assert (tmp_path / "back/file").read_bytes() == (tmp_path / "there/file").read_bytes()
    assert sys.executable in shell.quiet_rsync(["ssh"])[1]


def test_what_rsync_is_slow_to_read_is_passed_on_whole():
    """rsync's end of the socket does not block; a pull onto a slow disk fills it."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    number = 5_000_000
    script = f"import os; os.write(1, b'hello{BEGIN}\\n'); os.write(1, bytes({number}))"
    command = [sys.executable, shell.__file__, sys.executable, "-c", script]
    with ours, subprocess.Popen(command, stdout=theirs) as child:
        theirs.close()
        time.sleep(0.5)  # more comes than the socket holds
        with ours.makefile("rb") as stream:
            assert stream.read() == bytes(number)
    assert child.returncode == 0
