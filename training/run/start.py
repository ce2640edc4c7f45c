"""What a run begins with: made once, before there are workers, and handed to every rank."""

import errno
import fcntl
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import config as layered
from cluster import files
from cluster.cli import UserError
from cluster.config import ConfigError
from cluster.record import events
from cluster.record.row_format import LAUNCHER_LOCK, is_being_written
from cluster.runs import CONFIG_FILE
from training import config as training_config
from training.config import TrainConfig
from training.data.dataset import MANIFEST_FILE, TokenDataset, require_tuning_sequences
from training.data.mixture import describe
from training.data.prepare import prepare
from training.model.chat_template import TEMPLATE_FILE, read_template
from training.plan import Plan, make_plan, run_identity
from training.run.checkpoint import Checkpoint, newest_complete, newest_sound, prune, step_of
from training.run.state.hf_weights import HuggingFaceWeights, require_same_tokens, require_tokenizer
from training.run.state.remote import Remote, Uploads, restore
from training.run.state.seam import describe_seam

if TYPE_CHECKING:
    from training.run.context import Context

PARTITION = "partition.txt"  # in the run directory: which rule each parameter got
STOP = "stop"  # in the run directory, while it runs: its workers are asked to stop
WORKERS_END_SECONDS = 120.0  # in which workers end after their launcher was killed
TOKENIZER = "tokenizer"  # in the run directory: the data's manifest and tokenizer, for exports


@dataclass(frozen=True)
class Start:
    """Configuration, plan, opened data, and the checkpoint to continue from (None: from step 0)."""

    config: TrainConfig
    plan: Plan
    train_set: TokenDataset
    validation_set: TokenDataset
    checkpoint: Path | None = None

    @classmethod
    def of(cls, config: TrainConfig, plan: Plan, data: Path, *, checkpoint: Path | None = None) -> "Start":
        """Opens the prepared folder `data`. Raises `DataError`."""
        train_set, validation_set = (
            TokenDataset.open(data, split=split, sequence_length=config.batch.sequence_length)
            for split in ("train", "validation")
        )
        return cls(config, plan, train_set, validation_set, checkpoint)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """`run_identity` of this run."""
        return run_identity(self.config, self.plan, fingerprint=self.train_set.manifest.fingerprint)

    def on_ranks(self, context: "Context") -> "Start":
        """This start for the workers that Ray has really started. Collective.

        They may be fewer than `workers.count` (`workers.min_count`), and after a restart there is a newer
        checkpoint than the launcher saw. Rank 0 looks for it, so that all continue from the same.
        """
        newest = newest_of(self.config, report=lambda _: None) if context.is_main else None
        if newest and newest != self.checkpoint:  # which the launcher has verified
            newest = newest_sound(newest.parent, report=lambda _: None)
        plan = self.plan
        if plan.num_workers != context.world_size:
            plan = make_plan(self.config, num_workers=context.world_size)
        return replace(self, plan=plan, checkpoint=context.gather(newest)[0])


@contextmanager
def _sole_writer(config: TrainConfig, *, report: Callable[[str], None]) -> Iterator[None]:
    """The sole right to write the run directory, for the launcher of a run.

    A lock of the file system, which also holds between nodes on storage that has such locks, and which ends
    with its owner, however it dies. Workers that outlive a killed launcher still hold `metrics.jsonl`: this
    waits until they have ended.

    Raises:
        UserError: another launcher holds it, or such workers do not end.
    """
    directory = config.run_directory
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((directory / LAUNCHER_LOCK).open("a+"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = (directory / LAUNCHER_LOCK).read_text().strip() or "another process"
            raise UserError(
                f"{directory} is being written by {owner}; wait for it, or give this run another run.name"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise UserError(
                    f"{directory}: cannot be written ({error.strerror}); set run.directory"
                ) from error
            report(f"{directory}: this storage has no locks; make sure that no second process writes there")
        else:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}\n")
            lock.flush()
            _wait_for_workers(directory, report=report)
        (directory / STOP).unlink(missing_ok=True)
        yield


def _wait_for_workers(directory: Path, *, report: Callable[[str], None]) -> None:
    until = time.monotonic() + WORKERS_END_SECONDS
    metrics = directory / "metrics.jsonl"
    if is_being_written(metrics):
        report(f"waiting for the workers of the start before to end: they hold {metrics}")
    while is_being_written(metrics):
        if time.monotonic() > until:
            raise UserError(
                f"{metrics} is still being written, by workers of an earlier start; end them, or give this "
                "run another run.name"
            )
        time.sleep(0.2)


def newest_of(config: TrainConfig, *, report: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a run; each newer one that is half-written is reported."""
    return newest_complete(config.run_directory / "checkpoints", report=report)


@contextmanager
def open_run(config: TrainConfig, plan: Plan, *, report: Callable[[str], None]) -> Iterator[Start | None]:
    """The start of a run, or None if it is already complete.

    During the block no other process may write the run directory, and its checkpoints are uploaded.
    """
    with _sole_writer(config, report=report):
        remote = Remote.of(config)
        start = _prepare_run(config, plan, remote, report=report)
        with Uploads(config, remote, note=report):
            yield start


def _prepare_run(
    config: TrainConfig, plan: Plan, remote: Remote | None, *, report: Callable[[str], None]
) -> Start | None:
    """Everything before the first worker: data, run directory, and the checkpoint to continue from."""
    directory = config.run_directory
    damaged: list[str] = []
    newest = newest_sound(config.run_directory / "checkpoints", report=damaged.append)
    for line in damaged:
        report(line)
    newest = restore(config, remote, newest=newest, report=report)
    saved = Checkpoint(newest) if newest else None
    _tidy(config)
    if saved and saved.state["step"] >= plan.num_steps and (directory / "summary.json").exists():
        report(f"{directory} is complete at step {saved.state['step']}; to train on, raise schedule.tokens")
        text = "the last step was taken; the start that took it was killed before it said so"
        events.end(directory, "finished", text, step=saved.state["step"])
        return None
    require_tokenizer(config)
    if config.load_directory and not saved:
        HuggingFaceWeights(config.load_directory, plan.shape)  # refused here rather than in a worker
    start = Start.of(config, plan, prepare(config.data, report=report).absolute(), checkpoint=newest)
    num_samples = plan.num_steps * plan.samples_per_step
    for line in describe(start.train_set, samples=num_samples, seed=config.run.seed):
        report(line)
    require_tuning_sequences(
        start.validation_set,
        sequences=config.evaluation.sequences,
        tuning_sequences=config.evaluation.tuning_sequences,
    )
    data, vocab_size = start.train_set.directory, start.train_set.manifest.vocab_size
    if config.load_directory and (note := require_same_tokens(config.load_directory, start.train_set)):
        report(note)
    if vocab_size > plan.shape.vocab_size:
        raise UserError(
            f"model.vocab_size: {plan.shape.vocab_size}, but the tokenizer of {data} has {vocab_size} "
            f"tokens; {'set data.tokenizer' if config.load else 'set model.vocab_size to at least that'}"
        )
    seam = None
    if saved:
        saved.check_identity(start.identity)
        report(f"resuming {directory} from step {saved.state['step']}")
        seam = _seam(config, saved)
        if seam:
            report(seam)
    elif (metrics := directory / "metrics.jsonl").exists():
        report(f"{directory} broke off before its first checkpoint: starting again from step 0")
        metrics.unlink()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files.write_text(directory / CONFIG_FILE, layered.to_yaml(config))
        _keep_tokenizer(start.train_set, directory / TOKENIZER, given=config.data.tokenizer)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); set run.directory") from error
    except ValueError as error:
        raise UserError(f"{error}; copy it again, or remove it") from error
    _require_writable(directory / "checkpoints")
    _tell_start(start, damaged, seam)
    return start


def _require_writable(checkpoints: Path) -> None:
    """The folder may be storage of its own; better known now than at the first checkpoint."""
    try:
        checkpoints.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=checkpoints):
            pass
    except OSError as error:
        raise UserError(
            f"{checkpoints}: no checkpoint can be written there ({error.strerror}); make it writable, or set "
            "run.directory"
        ) from error


def _seam(config: TrainConfig, saved: Checkpoint) -> str | None:
    """`describe_seam`, by the configuration of the start before, if it can still be read."""
    with suppress(ConfigError):
        before = training_config.load(file=config.run_directory / CONFIG_FILE, settle=False)
        return describe_seam(before, config, applied_steps=saved.state["applied_steps"])
    return None


def _tidy(config: TrainConfig) -> None:
    """Delete what a start left that was killed while it replaced a file or before it dropped a checkpoint."""
    keep, every = config.checkpoint.keep, config.checkpoint.keep_every_steps
    with suppress(OSError):
        for folder in (config.run_directory, config.run_directory / TOKENIZER):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        prune(config.run_directory / "checkpoints", keep=keep, keep_every_steps=every)


def _tell_start(start: Start, damaged: list[str], seam: str | None) -> None:
    """The event that begins this start. A resumed run keeps its events, a fresh one replaces them.

    Args:
        damaged: lines about the checkpoints that could not be used.
        seam: what the learning rate does, if its schedule has changed.
    """
    directory, saved, num_steps = start.config.run_directory, start.checkpoint, start.plan.num_steps
    if saved is None:
        (directory / events.FILE).unlink(missing_ok=True)
        text = f"a run of {num_steps:,} steps begins"
        if start.config.load:
            text += f", from the weights of {start.config.load}"
        events.append(directory, "started", text, step=0, num_steps=num_steps)
    else:
        found = events.read(directory)
        if not any((event["kind"], event["step"]) == ("checkpoint", step_of(saved)) for event in found):
            report_checkpoint(saved)  # the start before was killed between the two
        if not events.has_ended(found):
            text = "the start before did not report its end: it was killed, or its node was lost"
            events.end(directory, "killed", text)
        text, step = f"the run continues from {saved.name}{f'; {seam}' if seam else ''}", step_of(saved)
        events.append(directory, "resumed", text, step=step, num_steps=num_steps)
    for line in damaged:
        events.append(directory, "checkpoint_damaged", line)


def report_checkpoint(folder: Path) -> None:
    """Append the event that a checkpoint of the run around `folder` is complete."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    text = f"{folder.name} is complete, {files.size_text(size)}"
    events.append(folder.parent.parent, "checkpoint", text, step=step_of(folder), size_bytes=size)


def _keep_tokenizer(data: TokenDataset, target: Path, *, given: str) -> None:
    """With the chat template beside the tokenizer that was given, for exports."""
    target.mkdir(exist_ok=True)
    template = None if given == "train" else read_template(Path(given).expanduser().parent)
    if template is not None:
        files.write_text(target / TEMPLATE_FILE, template.text)
    for name in (data.manifest.tokenizer_file, MANIFEST_FILE):
        files.write_text(target / name, (data.directory / name).read_bytes().decode())  # not its line ends
