"""Who watches a run: the launcher shows its rows and its alarms, and each rank reports its own failure."""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.cli import RunError
from cluster.masking import mask
from cluster.progress import Progress
from cluster.record import events
from cluster.record.alarms import DiskAlarm, LossAlarms, ProgressAlarm, StragglerAlarm
from cluster.record.record import follow, read_metrics
from cluster.review.run_reader import Run
from training.config import TrainConfig
from training.run.checkpoint import CheckpointError, step_of
from training.run.spent import SUFFIX, Startup
from training.run.start import PARTITION, newest_of
from training.run.workers import LOST

if TYPE_CHECKING:
    from torch import Tensor

    from optim.step.zero import ZeroOptimizer
    from training.run.context import Context

MOST_REASON = 300  # letters of an error that is not ours
STARTING = "the part start"  # of a worker, until it has its model and checkpoint (`Heartbeat.place`)
MOST_CAUSE = 120  # of these, in a message of ours
NO_MEMORY = r"DefaultCPUAllocator|std::bad_alloc|[Oo]ut of memory"
RANK_LOST = (
    r"gloo.*(closed by peer|reset by peer|Read error|Write error|Broken pipe|timed out)"
    r"|ncclRemoteError|NCCL communicator was aborted"
)
# Among the infos; the warnings and errors are shown anyway.
SHOWN = ("waiting", "first_step", "progress", "node_joined")
NOT_SHOWN = (*events.ENDS, "restarted")  # the launcher has lines of its own for these


class ShowRows:
    """Shows rows in the progress line; before the first, how the parameters were divided."""

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._partition = config.run_directory / PARTITION
        self._progress = progress
        self._any = False

    def __call__(self, row: dict[str, Any]) -> None:
        if not self._any:
            self._progress.note(self._partition.read_text().rstrip())
            self._any = True
        self._progress.update(row)


class Background:
    """`run` in a thread for the length of a `with` block; it returns once `stop` is set."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join()


class RunWatch(Background):
    """Raises the alarms that the loop cannot raise itself (`cluster.record.alarms`), and shows all alarms.

    Args:
        observer: the process in which this runs, for the events.
        note: shows a line. None: only watch whether the run makes progress; another process shows the rest.
    """

    POLL_SECONDS = 2.0

    def __init__(self, config: TrainConfig, *, observer: str, note: Callable[[str], None] | None) -> None:
        super().__init__()
        directory, record = config.run_directory, config.record
        self._directory = directory
        self._note = note
        self._progress = ProgressAlarm(directory, minutes=record.stalled_minutes, observer=observer)
        self._disk = DiskAlarm(directory, gigabytes=record.disk_free_gb)
        self._straggler = StragglerAlarm(directory, fraction=record.straggler_fraction)
        _, self._position = events.read_from(directory, 0)
        self._problem = ""

    def run(self) -> None:
        before = time.monotonic()
        while not self.stop.wait(self.POLL_SECONDS):
            now = time.monotonic()
            # this process may have been stopped too: only the time in which it looked counts
            self._look(seconds=min(now - before, 2 * self.POLL_SECONDS))
            before = now
        self._show()

    def _look(self, *, seconds: float) -> None:
        try:
            self._progress.check(seconds=seconds)
            if self._note:
                self._disk.check()
                self._straggler.check(seconds=seconds)
        except OSError as error:
            if self._note and str(error) != self._problem:
                self._note(f"the run directory cannot be watched: {error}")
            self._problem = str(error)
        self._show()

    def _show(self) -> None:
        try:
            found, self._position = events.read_from(self._directory, self._position)
        except OSError:  # the next look tries again
            return
        if self._note is None:
            return
        for event in found:
            if event["kind"] in SHOWN or (event["level"] != events.INFO and event["kind"] not in NOT_SHOWN):
                self._note(events.describe(event))


class NodeWatch(Background):
    """Reports which nodes are lost or have joined while a run is going, and what the run does about it."""

    POLL_SECONDS = 2.0

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self._directory = config.run_directory
        self._workers = config.workers

    def run(self) -> None:
        before = self._alive()
        while not self.stop.wait(self.POLL_SECONDS):
            now = self._alive()
            for node in sorted(before - now):
                text = f"node {node} is lost, {len(now)} left; {self._consequence()}"
                events.append(self._directory, "node_lost", text, node=node)
            for node in sorted(now - before):
                text = f"node {node} has joined, {len(now)} now"
                events.append(self._directory, "node_joined", text, node=node)
            before = now

    def _consequence(self) -> str:
        if self._workers.max_failures == 0:
            return "if it had workers, the run ends (workers.max_failures=0); the same command resumes it"
        if self._workers.min_count is None:
            return "if it had workers, the run waits until all can run again (workers.min_count is null)"
        return f"the run goes on with the workers that fit, at least {self._workers.min_count}"

    def _alive(self) -> set[str]:
        import ray

        return {node["NodeName"] for node in ray.nodes() if node["Alive"]}


class Follower(Background):
    """Shows the rows of `metrics.jsonl` while the workers write it, from the step after `first_step` on.

    When Ray restarts the workers, the record goes back to their checkpoint; this reports it and follows.
    """

    def __init__(self, config: TrainConfig, progress: Progress, *, first_step: int) -> None:
        super().__init__()
        self._config = config
        self._note = progress.note
        self._show = ShowRows(config, progress)
        self._first_step = first_step

    def run(self) -> None:
        last = -1
        for row in follow(self._config.run_directory / "metrics.jsonl", stop=self.stop.is_set):
            if row["step"] <= last:
                newest = newest_of(self._config, report=self._note)
                step = step_of(newest) if newest else 0
                why = events.newest(events.read(self._config.run_directory), ("rewound", *events.WORKERS))
                if why != "rewound":  # which has a line of its own
                    self._note(f"the workers were restarted, and go on from step {step}")
                self._first_step = step + 1 if newest else 0
            last = row["step"]
            if row["step"] >= self._first_step:
                self._show(row)


@contextmanager
def report_failure(
    config: TrainConfig,
    *,
    rank: int | None = None,
    where: Callable[[], str] = lambda: "",
    final: bool = True,
) -> Iterator[None]:
    """Append an event for an error or a signal in the block, and raise it again. One process reports it.

    Args:
        rank: of this process, if it is one of the workers.
        where: what the worker does, such as "the forward of step 3".
        final: it ends the run, and not only this worker, which may be started again.

    Raises:
        TrainingError: in place of an error of torch's that says that memory or another rank is gone.
    """
    directory, who = config.run_directory, "" if rank is None else f"rank {rank}: "
    try:
        yield
    except KeyboardInterrupt:
        if final:
            text = "a user or a signal ended the run; the same command resumes it"
            events.end(directory, "stopped", text, step=Run(directory).last_step)
        raise
    except Exception as error:
        known = explained(error, who=who, where=where()) if who else None
        _report_end_of_worker(config, reason(known) if known else f"{who}{reason(error)}", final=final)
        if known:
            raise known from error
        raise


def _report_end_of_worker(config: TrainConfig, text: str, *, final: bool) -> None:
    directory = config.run_directory
    if final:
        events.end(directory, "failed", text, step=Run(directory).last_step)
    else:
        since = (*events.STARTS, *events.WORKERS)
        events.append_first(directory, "worker_failed", text, among=("worker_failed",), since=since)


def explained(error: Exception, *, who: str, where: str) -> "TrainingError | None":
    """What an error of torch's means, and what to change; None for any other error."""
    if isinstance(error, RunError):  # which says all that there is to say
        return None
    import torch

    from training.run.context import StoreLost

    text = reason(error)
    if isinstance(error, CheckpointError) and where != STARTING:  # it could be written, or read, before
        return TrainingError(f"{who}{error}")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(NO_MEMORY, text):
        return TrainingError(
            f"{who}out of memory in {where} ({text}); lower batch.micro_sequences, set "
            "model.activation_checkpointing=true or raise zero.stage, and run again: it resumes from the "
            "newest checkpoint"
        )
    lost = isinstance(error, StoreLost)
    if lost or (isinstance(error, RuntimeError) and re.search(RANK_LOST, text)):
        return TrainingError(
            f"{who}{LOST} in {where}: its process was killed, or its node was lost ({text[:MOST_CAUSE]}); "
            "the same command resumes the run from its newest checkpoint"
        )
    return None


def reason(error: BaseException) -> str:
    """An error in one line: the message of ours, or class and first line of another's."""
    if isinstance(error, RunError):
        return mask(str(error))
    lines = [line.strip() for line in mask(str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:MOST_REASON]}" if lines else type(error).__name__


def report_workers(config: TrainConfig, context: "Context", *, step: int) -> LossAlarms:
    """Append the event that the workers go on from `step`. Returns the alarms for their losses.

    Call it before the record opens, which drops the lines after `step`.
    """
    directory, rows = config.run_directory, _rows(config)
    kept = [row for row in rows if row["step"] <= step]
    num = context.world_size
    text = f"{num} worker{'s' * (num > 1)} ({context.device_name}, {context.launcher}) from step {step} on"
    if len(rows) > len(kept):
        text += f"; steps {step + 1} to {rows[-1]['step']} are taken again"
    since = events.newest(events.read(directory), (*events.STARTS, *events.WORKERS))
    kind = "restarted" if since in events.WORKERS else "workers"
    if kind == "restarted":
        text = f"Ray started the workers again: {text}"
    events.append(directory, kind, text, step=step, world_size=context.world_size)
    return _alarms_after(config, kept)


def report_first_step(config: TrainConfig, startup: Startup, *, step: int) -> None:
    """Append the event that the start took its first step. Workers that Ray starts again report none."""
    seconds = {f"{part}{SUFFIX}": round(value, 2) for part, value in startup.seconds.items()}
    what, kind = startup.describe(), "first_step"
    events.append_first(
        config.run_directory, kind, what, among=(kind,), since=events.STARTS, step=step, **seconds
    )


def loss_alarms(config: TrainConfig, *, step: int) -> LossAlarms:
    """The alarms for the losses after `step`, which know the lines until then."""
    return _alarms_after(config, [row for row in _rows(config) if row["step"] <= step])


def _alarms_after(config: TrainConfig, rows: list[dict[str, Any]]) -> LossAlarms:
    alarms = LossAlarms(config.run_directory, deviations=config.record.spike_deviations)
    alarms.replay(rows)
    return alarms


def _rows(config: TrainConfig) -> list[dict[str, Any]]:
    metrics = config.run_directory / "metrics.jsonl"
    return read_metrics(metrics) if metrics.exists() else []


def report_end(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Append the event that the run is finished."""
    text = f"validation loss {summary['validation_loss']:.4f} after {summary['tokens']:,} tokens"
    events.end(config.run_directory, "finished", text, step=summary["step"])


def report_stop(config: TrainConfig, *, step: int) -> None:
    """Append the event that the run stopped because it was asked to."""
    text = f"stopped on request after step {step}; the same command resumes it"
    events.end(config.run_directory, "stopped", text, step=step)


class TrainingError(RunError):
    """The run cannot go on; the message says what happened and what to change."""


class Skips:
    """Watches for a broken run: too many skipped steps, or weights or optimizer state not finite.

    Attributes:
        in_a_row: how many of the newest steps were skipped without one between.
    """

    MOST_IN_A_ROW = 20
    REMEDY = (
        "lower optim.matrix.lr and optim.vector.lr, or set optim.clip, and run again: it resumes from the "
        "newest checkpoint"
    )

    def __init__(self, config: TrainConfig, *, num_steps: int) -> None:
        self._directory, self._share = config.run_directory, config.optim.max_skipped_fraction
        self._num_steps = num_steps
        self._step = self._applied = self.in_a_row = 0

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self._step, self._applied = state["step"], state["applied_steps"]
        self.in_a_row = state["consecutive_skips"]

    def count(self, step: int, *, applied: int) -> None:
        """Take in a step; `applied` of all steps were not skipped. Raises `TrainingError`: too many were."""
        skipped = applied == self._applied
        self._step, self._applied = step, applied
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        said = f"step {step}: the gradient was not finite in"
        if self.in_a_row == self.MOST_IN_A_ROW:
            raise TrainingError(f"{said} {self.in_a_row} steps in a row; {self.REMEDY}")
        if skipped and step - applied > self._share * self._num_steps:
            raise TrainingError(
                f"{said} {step - applied} of {self._num_steps} steps, more than optim.max_skipped_fraction="
                f"{self._share:g} allows; {self.REMEDY}"
            )

    def sound(
        self, optimizer: "ZeroOptimizer", context: "Context", *, final: dict[str, float] | None
    ) -> bool:
        """Whether this state may take the place of an older checkpoint. Collective.

        Args:
            final: the validation losses after the last step; None before it.

        Raises:
            TrainingError: it may not, and it is the last one.
        """
        problem = None
        tensors = (tensor for *_, named in optimizer.shards() for tensor in named.values())
        if not all(context.gather(all(map(is_finite, tensors)))):
            problem = "weights or optimizer state are not finite"
        elif final is None and self.in_a_row:  # it may be about to diverge
            problem = f"the gradient was not finite in the last {self.in_a_row} steps"
        elif final is not None and not all(map(math.isfinite, final.values())):
            problem = "the validation loss is not finite"
        if problem and final is not None:
            raise TrainingError(f"step {self._step}: {problem}, so it has no checkpoint; {self.REMEDY}")
        if problem and context.is_main:
            text = f"no checkpoint at step {self._step}, so that earlier ones stay: {problem}"
            events.append(self._directory, "checkpoint_withheld", text, step=self._step)
        return problem is None


def is_finite(tensor: "Tensor") -> bool:
    """Whether all elements are. A sum takes less time; it may overflow, but it misses nothing."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
