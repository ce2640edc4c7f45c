"""Runs of `training.launch` that are forked from a process which has imported everything: 1 s each."""

import atexit
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tests.rank_imports
import training.run.loop
import training.run.plots
from cluster.session import free_ports
from tests.commands import _become, tiny
from tests.faults.arm import arm
from tests.listening import listening
from tests.test_secrets import CANARIES

__all__ = ["tests", "training"]  # imported for the processes that are forked
Command = Callable[[list[str]], None]
NUM_STEPS, KEEP = 10, 2
PATIENCE_SECONDS = 300.0  # in which ranks end by themselves, on a busy machine too
# After a rank was killed, the others are ended after so long, as torchrun does at once: a rank that begins to
# look for a killed one waits for it for half an hour.
AGENT_SECONDS = 60.0
WATCHER_SECONDS = 20.0  # in which a rank's watcher ends after its rank, on a busy machine too
TINY = {
    "batch__tokens": 128,
    "schedule__tokens": 128 * NUM_STEPS,
    "checkpoint__every_steps": 2,
    "checkpoint__keep": KEEP,
    "evaluation__sequences": 4,
    "optim__inspect_every_steps": 4,
}
SETUPS: dict[str, dict[str, Any]] = {
    "one": {"workers__count": 1},
    "lines": {"workers__count": 1, "record__every_steps": 3, "zero__stage": 0},
    "two": {"workers__count": 2},
    "zero-2": {"workers__count": 2, "zero__stage": 2, "record__every_steps": 2},
    "zero-3": {"workers__count": 2, "zero__stage": 3},
    "spike": {"workers__count": 2, "checkpoint__max_rewinds": 1},
    "spike-lines": {"workers__count": 1, "checkpoint__max_rewinds": 1, "record__every_steps": 3},
}
# In these setups a batch has a high loss, in every start and rank, and the run goes back once.
SPIKED = {"fault": "spike", "group": "start", "at": 0, "batch": 7}
WENT_BACK = {"spike": {"from_step": 8, "to_step": 6}, "spike-lines": {"from_step": 9, "to_step": 6}}


@dataclass
class Outcome:
    """How the ranks of one start ended."""

    codes: list[int]  # exit codes; -9: killed
    out: str  # of rank 0
    err: str  # of all ranks
    leftovers: list[str] = field(default_factory=list)  # processes and sockets that it should not have had
    late: bool = False  # a rank did not end by itself

    @property
    def done(self) -> bool:
        """Whether it says so: rank 0 does."""
        return self.codes[0] == 0


@dataclass(frozen=True)
class Place:
    """Where a run of a campaign lives: a folder with a corpus and data, the run's name and its setup."""

    folder: Path
    name: str
    setup: str

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.folder / "outputs" / self.name

    @property
    def num_ranks(self) -> int:
        """The workers of its setup."""
        return SETUPS[self.setup]["workers__count"]

    @property
    def dropped(self) -> range:
        """Steps whose checkpoints the run deletes when it goes back."""
        back = WENT_BACK.get(self.setup)
        return range(back["to_step"] + 1, back["from_step"] + 1) if back else range(0)

    def keys(self, **more: Any) -> list[str]:
        """The arguments of the command."""
        return tiny(self.folder, run__name=self.name, **{**TINY, **SETUPS[self.setup], **more})


def start(
    place: Place,
    *,
    specs: dict[int, dict[str, Any]] | None = None,
    everywhere: dict[str, Any] | None = None,
    meddle: Callable[[list[int]], None] = lambda pids: None,
    environment: dict[str, str] | None = None,
    command: Command | None = None,
    num_ranks: int | None = None,
    on_loopback: bool = True,
    **more: Any,
) -> Outcome:
    """One start of a run, to its end.

    Args:
        specs: rank -> what goes wrong in it (`tests.faults.arm`).
        everywhere: what goes wrong in every rank; by default that of the setup.
        meddle: called with the process ids again and again while ranks run.
        command: is given the keys, in place of `training.launch`.
        num_ranks: processes to start, if they are not the workers.
        on_loopback: they must listen there alone. In a cluster Ray's driver does not: cluster/README.md.
        more: keys that differ in this start.
    """
    port = free_ports(1)[0]
    logs = place.folder / "logs" / place.name
    logs /= f"start-{len(list(logs.glob('start-*')))}"
    logs.mkdir(parents=True)
    pids = []
    if place.setup in WENT_BACK:
        everywhere = everywhere or SPIKED
    for rank in range(num_ranks or place.num_ranks):
        pid = os.fork()
        if not pid:
            variables = _group(rank, num_ranks or place.num_ranks, port) | (environment or {})
            armed = [spec for spec in (everywhere, (specs or {}).get(rank)) if spec]
            _run(place, armed, variables, logs / str(rank), place.keys(**more), command)
        pids.append(pid)
    codes, late, sockets = _wait(pids, meddle, port=port)
    left = [] if command else _left(pids)  # who gives a command sees to what it has started
    leftovers = [*(sockets if on_loopback else ()), *(f"process {pid}: {name}" for pid, name in left)]
    for pid, _ in left:
        os.kill(pid, signal.SIGKILL)
    texts = {
        name: [(logs / f"{rank}.{name}").read_text() for rank in range(len(pids))] for name in ("out", "err")
    }
    return Outcome(codes, texts["out"][0], "\n".join(texts["err"]), leftovers, late)


def _group(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The environment variables by which ranks find each other."""
    if num_ranks == 1:
        return {}
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    return {name: str(value) for name, value in group.items()} | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }  # fmt: skip


def _run(
    place: Place, specs: list[dict[str, Any]], more: dict[str, str], log: Path, keys: list[str],
    command: Command | None,
) -> None:  # fmt: skip
    """A rank's process, which has just been forked."""
    os.setsid()
    atexit._clear()  # the parent's: one deletes its temporary folder
    planted = {name: canary for name, canary in CANARIES.items() if name.isupper()}
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    variables = {**ours, **planted, **more}
    code = 1
    try:
        if specs:
            arm(specs, place.directory)
        _become(["training.launch", *keys], variables, Path(f"{log}.out"), Path(f"{log}.err"), command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(
    pids: list[int], meddle: Callable[[list[int]], None], *, port: int
) -> tuple[list[int], bool, list[str]]:
    """Exit codes, whether a rank had to be killed, and addresses beyond loopback on which a rank listened."""
    codes: dict[int, int] = {}
    sockets: set[str] = set()
    until, looked = time.monotonic() + PATIENCE_SECONDS, 0.0
    late, killed = False, 0.0
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        alive = [pid for pid in pids if pid not in codes]
        if -signal.SIGKILL in codes.values():
            killed = killed or time.monotonic()
            if time.monotonic() > killed + AGENT_SECONDS:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
        meddle(alive)
        if time.monotonic() > looked + 1:
            looked = time.monotonic()
            for pid in alive:
                sockets |= {
                    f"{name} listens on {at}:{number}"
                    for name, at, number in listening(pid)
                    if at != "127.0.0.1" and number != port  # torchrun's store: training/README.md
                }
        if alive and time.monotonic() > until:
            late, until = True, time.monotonic() + PATIENCE_SECONDS
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids], late, sorted(sockets)


def _left(pids: list[int]) -> list[tuple[int, str]]:
    """`_sessions`, once a rank's watcher has had the time to see that its rank is gone."""
    until = time.monotonic() + WATCHER_SECONDS
    while (left := _sessions(pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _sessions(pids: list[int]) -> list[tuple[int, str]]:
    """(process id, command) of what is left of the sessions that began with these processes."""
    return [(pid, command) for pid, session, command in _processes() if session in pids]


def _processes() -> Iterator[tuple[int, int, str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            command = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if state != "Z":
            yield int(entry.name), int(session), command


def forget(place: Place) -> None:
    """Delete a run and its logs."""
    shutil.rmtree(place.directory, ignore_errors=True)
    shutil.rmtree(place.folder / "logs" / place.name, ignore_errors=True)
