"""What goes wrong inside of a run: called in a rank's process before its command begins.

A point is a number among the events of one group, counted in this process:

    call        the beginning or end of a forward pass, a backward pass, a step, a collective
    exchange    the same of the collectives in which matrices and gradients travel
    file        a file or folder of the run directory is made, opened for writing, renamed or deleted
    checkpoint  the same below `checkpoints/`
    tensors     a piece of a shard of a checkpoint is written, and not yet synced
    group       before and after the process group is formed
    start       once, before the command begins

`count` counts them in an undisturbed run, so that a campaign can choose any one of them.
"""

import atexit
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
COLLECTIVES = ("all_to_all_single", "all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "reduce")
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
Fault = Callable[[], None]


def arm(specs: Sequence[dict[str, Any]], run: Path) -> None:
    """Let each `spec["fault"]` happen at event `spec["at"]` of `spec["group"]`, once, or count all events."""
    events: Counter[str] = Counter()
    for spec in specs:
        if spec["fault"] == "count":
            atexit.register(lambda to=spec["to"]: Path(to).write_text(json.dumps(events)))

    def happened(group: str) -> None:
        events[group] += 1
        for spec in specs:
            if group == spec.get("group") and events[group] - 1 == spec["at"]:
                FAULTS[spec["fault"]](spec, run)

    happened("start")
    watch_files(run, happened)
    watch_calls(happened)


def watch_files(run: Path, happened: Callable[[str], None]) -> None:
    """Events `file`, `checkpoint` and `tensors` of this process."""
    from training.run.state import shard

    prefix, sync = f"{run}{os.sep}", os.fdatasync
    shard.PIECE_BYTES = 64 << 10  # so that these small shards have some

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in CHANGES or (name == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
            if str(path).startswith(prefix):
                happened("file")
                if "/checkpoints" in str(path):
                    happened("checkpoint")

    def sync_piece(descriptor: int) -> None:
        happened("tensors")
        sync(descriptor)

    os.fdatasync = sync_piece
    sys.addaudithook(hook)


def watch_calls(happened: Callable[[str], None]) -> None:
    """Events `call` and `exchange` of this process."""
    import torch.distributed as dist
    from deepspeed.runtime.engine import DeepSpeedEngine

    def wrap(owner: Any, name: str, *groups: str) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: Any, **named: Any) -> Any:
            for group in groups:
                happened(group)
            result = inner(*arguments, **named)
            for group in groups:
                happened(group)
            return result

        setattr(owner, name, outer)

    for name in ("forward", "backward", "step"):
        wrap(DeepSpeedEngine, name, "call")
    for name in COLLECTIVES:
        wrap(dist, name, "call", "exchange")
    wrap(dist, "all_gather_object", "call")
    wrap(dist, "init_process_group", "group")


# --- the faults


def kill(_spec: dict[str, Any], _run: Path) -> None:
    """SIGKILL of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(_spec: dict[str, Any], _run: Path) -> None:
    """SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def stand_still(_spec: dict[str, Any], _run: Path) -> None:
    """The thread does nothing more."""
    while True:
        time.sleep(1)


def stop(_spec: dict[str, Any], _run: Path) -> None:
    """SIGSTOP of this process: no thread of it does anything more."""
    os.kill(os.getpid(), signal.SIGSTOP)


def lose_node(_spec: dict[str, Any], _run: Path) -> None:
    """SIGKILL of the raylet of this worker of Ray, and of the worker; not on the head node."""
    if b"--head" not in Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0"):
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def read_only(_spec: dict[str, Any], run: Path) -> None:
    """The checkpoints can no longer be written. Who started this undoes it."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    mount(str(folder), str(folder), None, MS_BIND, None)
    mount(None, str(folder), None, MS_REMOUNT | MS_BIND | MS_RDONLY, None)


def use_up_memory(_spec: dict[str, Any], _run: Path) -> None:
    """An allocation of torch's that no machine can satisfy."""
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def use_up_cgroup(spec: dict[str, Any], _run: Path) -> None:
    """The kernel kills this process: its control group has no memory left. Who started this removes that."""
    group = Path(spec["cgroup"])
    group.mkdir()
    limit = group / "memory.limit_in_bytes"  # of version 1
    (limit if limit.exists() else group / "memory.max").write_text(str(64 << 20))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    taken = []
    while True:
        taken.append(b"x" * (16 << 20))


def make_gradients_nan(_spec: dict[str, Any], _run: Path) -> None:
    """Each gradient from now on is NaN."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward
    DeepSpeedEngine.backward = lambda engine, loss, **named: backward(engine, loss * float("nan"), **named)


def spike(spec: dict[str, Any], _run: Path) -> None:
    """Batch `spec["batch"]` has a high loss and gradient; alarms need fewer losses before it than usual."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from cluster.record import alarms
    from training.run.loop import Trainer

    alarms.LEAST_HISTORY = 2
    take_step, forward, factor = Trainer.take_step, DeepSpeedEngine.forward, 1.0

    def take(trainer: Trainer, **options: Any) -> Any:
        nonlocal factor
        batch = trainer.step + trainer.rewinds.passed_over(trainer.step)
        factor = 100.0 if batch == spec["batch"] else 1.0
        loss = take_step(trainer, **options)
        factor = 1.0
        return loss

    Trainer.take_step = take
    DeepSpeedEngine.forward = lambda *given, **named: forward(*given, **named) * factor


def pass_over(spec: dict[str, Any], _run: Path) -> None:
    """The batches that the run would go back for, and skip, are not read in the first place."""
    from training.run.state.rewinds import Rewinds

    skipped = spec["from_step"] - spec["to_step"]
    Rewinds.passed_over = lambda _rewinds, step: skipped * (step >= spec["to_step"])


def move_clock(spec: dict[str, Any], _run: Path) -> None:
    """The clock jumps by `spec["seconds"]`."""
    clock = time.time
    time.time = lambda: clock() + spec["seconds"]


def limit_files(spec: dict[str, Any], _run: Path) -> None:
    """No file of this process may have more than `spec["bytes"]`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (spec["bytes"], spec["bytes"]))


def nothing(_spec: dict[str, Any], _run: Path) -> None:
    """The run only counts."""


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    """mount(2). Raises `OSError`."""
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(words[0], words[1], words[2], flags, words[3]):
        raise OSError(ctypes.get_errno(), f"mount {target}")


FAULTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "count": nothing, "kill": kill, "terminate": terminate, "stand still": stand_still, "stop": stop,
    "read-only": read_only, "memory": use_up_memory, "cgroup": use_up_cgroup,
    "nan": make_gradients_nan, "clock": move_clock, "file size": limit_files,
    "node": lose_node, "spike": spike, "pass over": pass_over,
}  # fmt: skip
