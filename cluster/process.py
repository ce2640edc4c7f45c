"""Child processes that end when their parent ends, however it ends, together with all that they started.

    python -IS cluster/process.py guard FD whole_tree|command       what `Child` starts
    python -IS cluster/process.py watch PID SESSION TEXT            what `no_leftovers` starts

Between a parent and its command stands a guard: a small process that holds the read end of a pipe, whose
write end closes when the parent is gone. Then the guard kills the command and its descendants.

PR_SET_PDEATHSIG alone is not enough. It fires when the *thread* that started the child ends, code between
fork and exec is unsafe in a process with threads, and it reaches one process: torchrun, killed by it, leaves
its ranks, which are in sessions of their own. The guard has one thread and is a subreaper, so that every
orphan among the descendants becomes its child.
"""

import ctypes
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NO_COMMAND = 127  # the exit code of a shell that cannot run a command


class Child(subprocess.Popen[Any]):
    """`subprocess.Popen` in a session of its own; the process ends with this one, or with this object.

    `send_signal` and `terminate` reach the command's process group, `kill` everything that it started.
    The exit code is the command's. As a context manager it ends what still runs. `pid` is the guard's.

    Args:
        command: the program and its arguments; a relative path is relative to this process's folder.
        whole_tree: descendants that leave the command's process group end with it too. False for ssh, whose
            shared connection must outlive the command that opened it.
        options: of `subprocess.Popen`.

    Raises:
        FileNotFoundError: there is no such program.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        whole_tree: bool = True,
        pass_fds: Sequence[int] = (),
        **options: Any,
    ) -> None:
        theirs, ours = os.pipe()
        self._let_go = weakref.finalize(self, os.close, ours)
        self._lifeline = ours
        what = "whole_tree" if whole_tree else "command"
        try:
            if shutil.which(command[0]) is None:
                raise FileNotFoundError(errno.ENOENT, "no such program", command[0])
            # -I and -S: it starts in 20 ms and ignores PYTHONPATH, which the command inherits
            guard = [sys.executable, "-IS", __file__, "guard", str(theirs), what]
            super().__init__(guard, pass_fds=(*pass_fds, theirs), start_new_session=True, **options)
        finally:
            os.close(theirs)
        # Not as arguments, so that a list of processes shows each command once.
        with suppress(BrokenPipeError), os.fdopen(os.dup(ours), "wb") as pipe:
            pipe.write(json.dumps(list(command)).encode() + b"\n")

    def send_signal(self, sig: int) -> None:
        """Send a signal to the command's process group, if it still runs."""
        if self.poll() is None and self._let_go.alive:
            with suppress(BrokenPipeError):
                os.write(self._lifeline, bytes([sig]))

    def kill(self) -> None:
        """Kill the command and everything that it started."""
        self._let_go()

    def end(self, patience_seconds: float = 0.0) -> None:
        """SIGTERM, then after `patience_seconds` (0: at once) SIGKILL; returns when the process has ended."""
        if patience_seconds and self.poll() is None:
            self.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.wait(patience_seconds)
        self.kill()
        self.wait()

    def __exit__(self, *error: Any) -> None:
        self.end()
        super().__exit__(*error)

    def __del__(self) -> None:
        self.kill()
        super().__del__()


def run(
    command: Sequence[str], *, timeout: float | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a command as a `Child` to its end, and return its exit code and output as text.

    Raises:
        subprocess.TimeoutExpired: it did not end within `timeout` seconds, and was killed.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Child(command, text=True, **{**pipes, **options}) as child:
        out, problem = child.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, child.returncode, out, problem)


def beside(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """A process of ours that ends itself once its standard input closes, as it does when this one ends."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, **options)


@contextmanager
def no_leftovers(text: str) -> Iterator[None]:
    """For libraries that start processes themselves: what they leave is killed after the block or our death.

    Ray's own precautions are not enough (2.60): when its driver is killed, an embedded Ray's agents stay for
    over 40 s, and Serve's HAProxy stays for ever and keeps the port.

    Args:
        text: part of the path of a file that such a process keeps open, such as its log. Only processes of
            this process's session (`setsid`) are killed.
    """
    command = [sys.executable, "-IS", __file__, "watch", str(os.getpid()), str(os.getsid(0)), text]
    with beside(command, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.communicate()  # closes its input; without us the kernel does


# --- the guard's side -------------------------------------------------------------------------------------


def _guard(lifeline: int, whole_tree: bool) -> int:
    """Run the command that comes over the pipe until it ends or the pipe closes. Returns its wait status."""
    command = _read_command(lifeline)
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    if whole_tree:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)  # a child that ends wakes the loop below
    signal.signal(signal.SIGCHLD, lambda *_: None)
    guard, pid = os.getpid(), os.fork()
    if pid == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the guard itself be killed
        if os.getppid() == guard:
            _become(command, lifeline)
        os._exit(NO_COMMAND)
    with suppress(PermissionError):  # it has done so itself, and runs the command
        os.setpgid(pid, pid)
    for forwarded in FORWARDED:
        signal.signal(forwarded, lambda received, _: os.killpg(pid, received))
    _close_all_but(lifeline, wake, waker)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(wake, select.POLLIN)
    status = None
    while status is None:
        ready = [fd for fd, _ in poll.poll()]
        if wake in ready:
            os.read(wake, 4096)
        if lifeline in ready:
            signals = os.read(lifeline, 4096)
            if not signals:  # the parent is gone, or wants an end
                break
            for number in signals:
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)
        status = _reap(pid)
    return _kill(pid, status, whole_tree)


def _read_command(lifeline: int) -> list[str]:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(lifeline, 1)
        if not byte:  # the parent is gone already
            os._exit(NO_COMMAND)
        line += byte
    return json.loads(line)


def _become(command: list[str], lifeline: int) -> None:
    """Replace this process by the command, as `subprocess.Popen` would have started it."""
    os.setpgid(0, 0)
    os.set_inheritable(lifeline, False)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores the last two
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)


def _close_all_but(*kept: int) -> None:
    """The command's files are the command's alone: whoever reads from it sees their end with its own."""
    for fd in [int(name) for name in os.listdir("/dev/fd")]:
        if fd not in (*kept, 2):
            with suppress(OSError):
                os.close(fd)


def _reap(pid: int) -> int | None:
    """Collect every child that has ended. Returns the wait status of `pid` if it is among them."""
    found = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                found = ended[1]
    return found


def _kill(pid: int, status: int | None, whole_tree: bool) -> int:
    """Kill the command if it still runs, and with `whole_tree` its descendants. Returns its wait status."""
    with suppress(ProcessLookupError):
        if whole_tree:
            os.killpg(pid, signal.SIGKILL)
        elif status is None:
            os.kill(pid, signal.SIGKILL)
    while whole_tree or status is None:
        for child in _children() if whole_tree else ():
            os.kill(child, signal.SIGKILL)
        try:
            ended, found = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # and nobody's children can become ours any more
            break
        if ended == pid:
            status = found
        if not ended:
            time.sleep(0.005)
    assert status is not None
    return status


def _children() -> list[int]:
    """The children of this process, on Linux; also those that have ended and are not collected."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            if int(file.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(file.parent.name))
    return found


def _end_like(status: int) -> int:
    """End with the same exit code, or by the same signal, without a second core file."""
    if os.WIFSIGNALED(status):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


# --- the watcher's side -----------------------------------------------------------------------------------


def _watch(pid: int, session: int, text: str) -> None:
    """Wait for the end of the standard input, then kill until nothing of that session is left but `pid`."""
    sys.stdin.read()
    while leftovers := [one for one in _holders(text, session) if one != pid]:
        for one in leftovers:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.05)


def _holders(text: str, session: int) -> list[int]:
    """Processes of the session, on Linux, that have a file open whose path contains `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is another user's
            if os.getsid(int(folder.name)) == session and any(text in file for file in _open_files(folder)):
                found.append(int(folder.name))
    return found


def _open_files(folder: Path) -> Iterator[str]:
    for file in (folder / "fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            yield os.readlink(file)


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        sys.exit(_end_like(_guard(int(sys.argv[2]), sys.argv[3] == "whole_tree")))
    _watch(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
