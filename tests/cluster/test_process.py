"""cluster/process.py: what a child is to its parent, and that it ends with it, whoever dies how."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from cluster import process
from cluster.process import Child
from cluster.session import ROOT
from tests.waiting import PATIENCE_SECONDS, wait_until

SLEEP = ["sleep", "600"]


def below(pid: int, *, number: int) -> list[psutil.Process]:
    """The descendants of a process, once there are as many."""

    def enough() -> list[psutil.Process]:
        found = psutil.Process(pid).children(recursive=True)
        return found if len(found) >= number else []

    return wait_until(enough, told=f"{number} processes below {pid}")


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has just ended
        return False


def alive(
    processes: list[psutil.Process], *, within_seconds: float = PATIENCE_SECONDS
) -> list[psutil.Process]:
    """Those that have not ended in that time."""
    deadline = time.monotonic() + within_seconds
    while left := [one for one in processes if runs(one)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return left


# --- as subprocess.Popen ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("kill -KILL $$", -signal.SIGKILL),
        ("kill -SEGV $$", -signal.SIGSEGV),
        ("kill -TERM $$", -signal.SIGTERM),
    ],
)
def test_the_exit_code_is_the_command_s(script, code):
    assert process.run(["sh", "-c", script]).returncode == code


def test_input_output_folder_and_environment_are_the_command_s(tmp_path):
    script = "cat; pwd; echo $NAME; echo trouble >&2"
    done = process.run(["sh", "-c", script], cwd=tmp_path, env=os.environ | {"NAME": "a b"})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}\na b\n", "trouble\n")
    with Child(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.communicate("to and fro")[0] == "to and fro" and child.wait() == 0


def test_arguments_are_handed_on_as_they_are():
    given = ["", "two words", "line\nbreak", "é", os.fsdecode(b"\xff")]
    done = process.run([sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *given])
    assert done.stdout.strip() == ascii(given)


def test_signals_that_python_ignores_are_not_ignored_by_the_command():
    """As with subprocess.Popen: else `yes | head -1` would go on for ever."""
    assert process.run(["sh", "-c", "kill -PIPE $$"]).returncode == -signal.SIGPIPE


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="'/no/program'"):
        Child(["/no/program"])


def test_a_command_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    mark = str(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.run(["sh", "-c", f"setsid sh -c 'sleep 600; : {mark}' & sleep 600; : {mark}"], timeout=1.0)
    assert [
        one for one in psutil.process_iter(["cmdline"]) if mark in " ".join(one.info["cmdline"] or [])
    ] == []


def test_a_signal_reaches_the_command_and_its_group():
    script = "trap 'echo here; exit 5' USR1; sleep 600 & echo ready; wait"
    with Child(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGUSR1)
        assert child.stdout.readline() == "here\n" and child.wait(PATIENCE_SECONDS) == 5
        child.send_signal(signal.SIGUSR1)  # to nobody


def test_the_end_is_orderly_if_there_is_patience_for_it(tmp_path):
    file = tmp_path / "file"
    script = f"trap 'echo orderly > {file}; exit 0' TERM; echo ready; sleep 600 & wait"
    with Child(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.end(patience_seconds=PATIENCE_SECONDS)
    assert child.returncode == 0 and file.read_text() == "orderly\n"
    with Child(["sh", "-c", "trap '' TERM; echo ready; sleep 600"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.end(patience_seconds=0.2)
    assert child.returncode == -signal.SIGKILL


def test_what_a_command_leaves_running_ends_with_it():
    child = Child(["sh", "-c", "setsid sleep 600 & sleep 600"])
    started = below(child.pid, number=3)
    [command] = psutil.Process(child.pid).children()
    command.kill()
    assert child.wait(PATIENCE_SECONDS) == -signal.SIGKILL and alive(started) == []


HEADLESS = """
import ctypes, subprocess, threading, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
threading.Thread(target=time.sleep, args=(600,)).start()
print(child.pid, flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.parametrize("attempt", range(12))  # a race: one in six showed the fault
def test_a_process_whose_first_thread_has_ended_is_not_taken_for_ended(attempt):
    """It looks like a zombie while its other threads live, and its children are orphans only after them."""
    with Child([sys.executable, "-c", HEADLESS], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        orphan = psutil.Process(int(child.stdout.readline()))
        [command] = psutil.Process(child.pid).children()
        wait_until(lambda: command.status() == psutil.STATUS_ZOMBIE)
        child.kill()
        assert child.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        assert alive([orphan], within_seconds=0.0) == []


def test_ssh_s_shared_connection_outlives_the_command_that_opened_it(tmp_path):
    file = tmp_path / "pid"
    daemon_then_end = (
        f"setsid sh -c 'echo $$ > {file}; exec sleep 600' & until [ -s {file} ]; do sleep 0.05; done"
    )
    with Child(["sh", "-c", daemon_then_end], whole_tree=False) as child:
        assert child.wait(PATIENCE_SECONDS) == 0
    [daemon] = alive([psutil.Process(int(file.read_text()))], within_seconds=0.2)
    daemon.kill()


# --- parents that die -------------------------------------------------------------------------------------

PARENT = """
import sys, threading, time
from cluster.process import Child
thread = threading.Thread(target=lambda: globals().update(child=Child({command!r})))
thread.start(), thread.join()
print("started", flush=True)
time.sleep(600)
"""


def parent(command: list[str]) -> "subprocess.Popen[str]":
    """A process that starts the command, in a thread that ends at once."""
    code = PARENT.format(command=command)
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "started\n"
    return started


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_child_outlives_the_thread_that_started_it_but_not_the_process(how):
    with parent(["sh", "-c", "setsid sleep 600 & sleep 600"]) as started:
        children = below(started.pid, number=4)  # the guard, sh, and two that sleep
        assert alive(children, within_seconds=0.3) == children
        started.send_signal(how)
        assert alive(children) == []


def test_a_stopped_child_ends_with_its_parent():
    with parent(SLEEP) as started:
        guard, command = below(started.pid, number=2)
        command.suspend()
        started.kill()
        assert alive([guard, command]) == []


def test_a_child_ends_with_its_guard():
    with parent(SLEEP) as started:
        guard, command = below(started.pid, number=2)
        guard.kill()
        assert alive([command]) == []
        started.kill()


def test_a_child_ends_when_nobody_holds_it_any_more():
    child = Child(SLEEP)
    started = [psutil.Process(child.pid), *below(child.pid, number=1)]
    del child
    assert alive(started) == []


def test_children_that_threads_start_at_once_do_not_keep_each_other_alive():
    """A guard that had inherited another one's pipe would keep that one waiting."""
    children: list[Child] = []
    threads = [threading.Thread(target=lambda: children.append(Child(SLEEP))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for child in children:
        child.kill()
        assert child.wait(PATIENCE_SECONDS) == -signal.SIGKILL


# --- what libraries start ---------------------------------------------------------------------------------


def test_what_a_library_leaves_is_killed_after_the_block_and_nothing_else(tmp_path):
    folder, other = tmp_path / "session" / "logs", tmp_path / "other"
    folder.mkdir(parents=True)
    with (
        (folder / "log").open("w") as log,
        other.open("w") as elsewhere,
        process.no_leftovers("session/logs/"),
    ):
        leftover = subprocess.Popen(SLEEP, stdout=log)
        bystander = subprocess.Popen(SLEEP, stdout=elsewhere)
        stranger = subprocess.Popen(SLEEP, stdout=log, start_new_session=True)  # somebody reads the log
    assert leftover.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert bystander.poll() is None and stranger.poll() is None
    for one in (bystander, stranger):
        one.kill()
        one.wait()


LIBRARY = """
import os, subprocess, sys, time
from cluster.process import no_leftovers
with no_leftovers("/library.log"):
    subprocess.Popen(["sleep", "600"], stdout=open(sys.argv[1] + "/library.log", "w"))
    print("started", flush=True)
    time.sleep(600)
"""


def test_what_a_library_leaves_is_killed_if_we_are(tmp_path):
    command = [sys.executable, "-c", LIBRARY, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stdout.readline() == "started\n"
        children = below(started.pid, number=2)
        assert [one.name() for one in children].count("sleep") == 1
        started.kill()
        assert alive(children) == []


def test_the_guard_needs_nothing_but_the_standard_library(tmp_path):
    """It runs with -S and -I, so it would see neither our packages nor a module that shadows another."""
    (tmp_path / "signal.py").write_text("raise SystemExit('shadowed')")
    done = process.run(
        ["echo", "fine"], cwd=tmp_path, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
