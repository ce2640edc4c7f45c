"""An engine in a process of its own, beside the one that answers HTTP. No torch on this side.

    python -m serving.engine.process FD    the engine's side; `EngineProcess` starts it

Each process has its own interpreter, so writing events does not delay the engine's steps. If the engine's
process dies (out of memory, a fault in native code, an abort of CUDA), the HTTP process tells its clients and
starts another. One socket connects the two: requests are sent as they arrive, and all that a step delivers
returns in one message. When either end of the socket closes, the engine's process ends.
"""

import faulthandler
import itertools
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from cluster.cli import RunError
from cluster.process import Child
from serving.checkpoints import Served
from serving.config import ServeConfig
from serving.engine.protocol import (
    Deliver,
    Engine,
    EngineFailed,
    EngineInfo,
    EngineStats,
    Sampling,
    Ticket,
    Token,
    admit,
    check,
)

Factory = Callable[[ServeConfig, Served], Engine]
# A request's number, and its new tokens, as tuples that pickle fast, or the error that ended it.
_Delivery = tuple[int, list[tuple[Any, ...]] | EngineFailed]

ANSWER_SECONDS = 60.0  # to a question that needs no step; a busy machine may stand still for some
NO_MEMORY = "if `dmesg` says that memory ran out, lower engine.cache_tokens"


def make_engine(config: ServeConfig, served: Served) -> Engine:
    """The engine of a configuration, in this process. Add other engines here."""
    from serving.engine.torch_engine import make_torch_engine  # needs torch

    return make_torch_engine(config, served)


# --- the client's side ------------------------------------------------------------------------------------


class _Child:
    """A process that makes an engine."""

    def __init__(self, *arguments: Any) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # The child finds modules where this process does, and inherits the rest of the environment.
            path = os.pathsep.join(filter(None, sys.path))
            self.process = Child(
                [sys.executable, "-m", "serving.engine.process", str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(ours.detach())
        self._arguments = arguments

    def ready(self) -> EngineInfo:
        """Wait until the engine is there. Raises what making it raised; `RunError`: the process ended."""
        try:
            self.connection.send(self._arguments)
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise RunError(f"{self.ending()}, while it made the engine") from None
        if isinstance(answer, Exception):
            self.process.kill()
            self.process.wait()
            raise answer
        return answer

    def ending(self) -> str:
        """How the process ended. Waits for its end, which has come or is near."""
        code = self.process.wait()
        if code >= 0:
            return f"the engine's process ended with exit code {code}; the replica's log says why"
        killed = f"the engine's process was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"{killed}; {NO_MEMORY}" if code == -signal.SIGKILL else killed


class _OpenRequest(NamedTuple):
    prompt: list[int]
    sampling: Sampling
    deliver: Deliver


class EngineProcess:
    """See `serving.engine.protocol.Engine`. The engine is in another process.

    Requests are refused on this side, at once. This is the engine's only client, and it learns of each
    request's end after the engine does, so the engine never has more requests than are open here.

    If the process ends, its requests end with `EngineFailed` and it is started again; requests that arrive
    before the new engine is ready wait for it. A process that ends before it has delivered anything is not
    started again: `failure` says why.

    Args:
        factory: makes the engine, in the other process; pickled by its name.

    Raises:
        RunError: the process ended before there was an engine.
        Exception: whatever `factory` raised.
    """

    def __init__(self, factory: Factory, config: ServeConfig, served: Served) -> None:
        self._arguments = (factory, config, served)
        self._numbers = itertools.count()
        # Guards all that follows, sending and delivering: nothing is delivered once `cancel` has returned.
        # Reentrant, because a delivery may cancel its own request.
        self._lock = threading.RLock()
        self._open: dict[int, _OpenRequest] = {}
        self._failure: str | None = None
        self._answers: queue.SimpleQueue[EngineStats] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._child = _Child(*self._arguments)
        self._info = self._child.ready()
        self._up = True
        self._thread = threading.Thread(target=self._work, name="engine's process", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    def submit(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver) -> Ticket:
        """See `Engine`."""
        check(prompt, sampling, self._info)
        with self._lock:
            if self._failure:
                raise EngineFailed(self._failure)
            admit(len(self._open), self._info)
            number = next(self._numbers)
            self._open[number] = request = _OpenRequest(list(prompt), sampling, deliver)
            self._tell("submit", number, request.prompt, sampling)
        return Ticket(partial(self._cancel, number))

    def stats(self) -> EngineStats:
        """See `Engine`. While a new process starts, all open requests count as waiting.

        Raises:
            EngineFailed: the process does not answer.
        """
        with self._asking:
            with self._lock:
                answers: queue.SimpleQueue[EngineStats] = queue.SimpleQueue()
                self._answers = answers
                if not self._up:
                    return _nothing_but(len(self._open))
                self._tell("stats")
            try:
                return answers.get(timeout=ANSWER_SECONDS)
            except queue.Empty:
                raise EngineFailed(
                    f"the engine's process has not answered for {ANSWER_SECONDS:g} s; it hangs"
                ) from None

    def failure(self) -> str | None:
        return self._failure

    def close(self) -> None:
        with self._lock:
            self._failure = self._failure or "the engine was closed"
            self._child.process.kill()
        self._thread.join()

    def _cancel(self, number: int) -> None:
        with self._lock:
            if self._open.pop(number, None):
                self._tell("cancel", number)

    def _tell(self, *message: Any) -> None:
        """Send a message if the engine is up. Call it under the lock."""
        if self._up:
            with suppress(OSError):  # it has just ended, which `_work` is about to notice
                self._child.connection.send(message)

    def _work(self) -> None:
        """Pass on what the engine sends, process after process."""
        useful = True
        while useful:
            reason, useful = self._hear()
            with self._lock:
                self._up = False
                if not useful:
                    self._failure = self._failure or reason
            self._end_all(self._failure or f"{reason}. Send the request again")
            if self._failure:
                return
            print(f"{reason}. It is started again", file=sys.stderr, flush=True)
            try:
                self._restart()
            except Exception as error:
                with self._lock:
                    again = f"the engine cannot be started again: {type(error).__name__}: {error}"
                    self._failure = self._failure or again
                self._end_all(self._failure)
                return

    def _hear(self) -> tuple[str, bool]:
        """Pass on what the engine sends until it ends. Returns why, and whether there was any token."""
        useful, failure = False, None
        with suppress(EOFError, OSError):
            while failure is None:
                deliveries, answers, failure = self._child.connection.recv()
                useful = useful or any(isinstance(content, list) for _, content in deliveries)
                self._deliver(deliveries)
                for answer in answers:
                    self._answers.put(answer)
            self._child.process.kill()  # its engine has failed
        ending = self._child.ending()
        return failure or ending, useful

    def _deliver(self, deliveries: Sequence[_Delivery]) -> None:
        with self._lock:
            for number, content in deliveries:
                if (request := self._open.get(number)) is None:  # cancelled
                    continue
                arrived = content if isinstance(content, EngineFailed) else [Token(*each) for each in content]
                if isinstance(arrived, EngineFailed) or arrived[-1].finish is not None:
                    del self._open[number]
                request.deliver(arrived)

    def _end_all(self, reason: str) -> None:
        """End every request, and answer who still waits for `stats`."""
        with self._lock:
            self._answers.put(_nothing_but(0))
            for number in list(self._open):
                if request := self._open.pop(number, None):
                    request.deliver(EngineFailed(reason))

    def _restart(self) -> None:
        """Start another process and send it the requests that have arrived since the last one ended."""
        child = _Child(*self._arguments)
        with self._lock:
            self._child = child
            if self._failure:  # closed in between
                child.process.kill()
        child.ready()
        with self._lock:
            self._up = True
            for number, request in self._open.items():
                self._tell("submit", number, request.prompt, request.sampling)


def _nothing_but(waiting: int) -> EngineStats:
    return EngineStats(
        running=0, waiting=waiting, free_cache_tokens=0, prompt_tokens=0, generated_tokens=0, finished=0,
        cancelled=0, steps=0,
    )  # fmt: skip


# --- the engine's side ------------------------------------------------------------------------------------


class _Host:
    """The engine's side of the socket: one thread receives, another sends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._engine: Engine
        self._outbox: queue.SimpleQueue[tuple[int, Sequence[Token] | EngineFailed] | EngineStats]
        self._outbox = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}

    def run(self) -> None:
        """Make the engine, and send what it delivers until it fails."""
        factory, config, served = self._connection.recv()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        try:
            self._engine = factory(config, served)
        except Exception as error:
            traceback.print_exc()
            self._connection.send(_portable(error))
            return
        self._connection.send(self._engine.info)
        failure = None
        while failure is None:
            # All deliveries of a step: the engine's thread has put them in together.
            items = [self._outbox.get(), *(self._outbox.get_nowait() for _ in range(self._outbox.qsize()))]
            failure = self._engine.failure()
            deliveries = [self._delivery(*item) for item in items if isinstance(item, tuple)]
            if failure:  # the client ends its requests itself once it knows of the failure
                deliveries = [one for one in deliveries if isinstance(one[1], list)]
            answers = [item for item in items if isinstance(item, EngineStats)]
            self._connection.send((deliveries, answers, failure))

    def _delivery(self, number: int, arrived: Sequence[Token] | EngineFailed) -> _Delivery:
        ended = isinstance(arrived, EngineFailed) or arrived[-1].finish is not None
        if ended:
            with self._lock:
                self._tickets.pop(number, None)
        return number, arrived if isinstance(arrived, EngineFailed) else [tuple(each) for each in arrived]

    def _listen(self) -> None:
        """Carry out what the client sends. If the client is gone or anything fails here, end the process."""
        handlers: dict[str, Callable[..., None]]
        handlers = {"submit": self._submit, "cancel": self._cancel, "stats": self._stats}
        try:
            while True:
                try:
                    what, *arguments = self._connection.recv()
                except (EOFError, OSError):
                    os._exit(0)
                handlers[what](*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _submit(self, number: int, prompt: Sequence[int], sampling: Sampling) -> None:
        def deliver(arrived: Sequence[Token] | EngineFailed) -> None:
            self._outbox.put((number, arrived))

        with self._lock:
            try:
                self._tickets[number] = self._engine.submit(prompt, sampling, deliver)
            except EngineFailed as error:
                deliver(error)

    def _cancel(self, number: int) -> None:
        with self._lock:
            ticket = self._tickets.pop(number, None)
        if ticket is not None:
            ticket.cancel()

    def _stats(self) -> None:
        self._outbox.put(self._engine.stats())


def _portable(error: Exception) -> Exception:
    """The error, or one with the same text if pickle cannot carry it."""
    with suppress(Exception):
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def main(fd: int) -> None:
    """The engine's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the client; this process ends with it
    faulthandler.enable()
    with suppress(EOFError, OSError):  # the client is gone
        _Host(Connection(fd)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
