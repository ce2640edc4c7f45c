"""The training loop: one step after another, whatever launched it.

Everything it writes is in the run directory: the record and the checkpoints. If there are checkpoints, it
resumes from the newest complete one (`training.run.start`).
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import files
from cluster.heart.hang import CHECKPOINT, EVALUATION, Heartbeat
from cluster.preflight.verdict import measured_tflops
from optim import groups
from optim.geometry import parse_norm
from optim.schedule import decay_factor, lr_factor
from training.config import TrainConfig
from training.model.attention import LogitProbe
from training.planner.memory import compiles
from training.run import checkpoint
from training.run.batches import Batches
from training.run.checkpoint import Checkpoint
from training.run.context import Context, Stop
from training.run.engine import (
    attention_kernel,
    build_deepspeed_engine,
    build_model,
    describe_compilation,
    warm_up,
)
from training.run.meter import Losses, Meter, Pace
from training.run.noise_probe import measure_noise
from training.run.plots import plot_losses
from training.run.spent import Spent, Startup
from training.run.start import PARTITION, Start, report_checkpoint
from training.run.state.hf_weights import HuggingFaceWeights
from training.run.state.output import Observe, Output, open_record
from training.run.state.profiling import profiled
from training.run.state.rewinds import Rewinds
from training.run.state.writer import Writer
from training.run.validation import Validation
from training.run.watch import (
    Skips,
    report_end,
    report_failure,
    report_first_step,
    report_stop,
    report_workers,
)

LAYERS_EVERY = 10  # inspections of the optimizer, of which one has a value for each matrix

Phase = Callable[[str], AbstractContextManager[Any]]


def train(
    start: Start,
    *,
    command: list[str],
    context: Context,
    heart: Heartbeat,
    observe: Observe,
    asked_to_stop: Callable[[], bool],
    startup: Startup,
) -> bool:
    """Run, or resume, a run on this rank. Returns whether it took its last step; else it was asked to stop.

    Args:
        asked_to_stop: called once a step. All ranks then stop after the same step, with a checkpoint.
        command: the command line, for the record.
        heart: this rank's heartbeat, which already beats.
        observe: called on rank 0 with every row of `metrics.jsonl`.
        startup: the parts of the start until now; the first step is its last part, and reports it.
    """
    config = start.config
    failures = partial(
        report_failure, config, rank=context.rank, where=lambda: heart.place, final=heart.final
    )
    with failures():
        trainer = Trainer(start, context, Stop(asked_to_stop), heart, startup)
        startup.end("model", compile=trainer.spent.seconds.get("compile", 0.0))
        kernel = attention_kernel(config, device=context.device)
        if context.is_main:
            about = f"{groups.describe(trainer.members)}\n{trainer.optimizer.describe()}\n"
            about += describe_compilation(config, trainer.spent.seconds)
            about += f"  attention by {kernel}\n"
            files.write_text(config.run_directory / PARTITION, about)
            alarms = report_workers(config, context, step=trainer.step)
            reopen = partial(open_record, start, command)
            output = Output(reopen(), observe, config.record.upload_checkpoints, alarms, reopen)
        else:
            output = Output(None, observe)
        startup.end("record")
        with output:
            with failures():  # while W&B can still be told
                summary = trainer.run(output)
            heart.close()  # the ranks no longer wait for each other
            record = output.record
            if record is not None and summary is not None:
                record.image("loss_plot", plot_losses(config.run_directory))
                record.table("samples", ("prompt", "text"), list(summary["samples"].items()))
                record.finish(summary | {"attention_kernel": kernel})
                report_end(config, summary)
            elif record is not None:
                report_stop(config, step=trainer.step)
    return summary is not None


class Trainer:
    """One rank's model, optimizer, data and position. Collective: every rank builds and runs its own."""

    def __init__(
        self,
        start: Start,
        context: Context,
        stop: Stop | None = None,
        heart: Heartbeat | None = None,
        startup: Startup | None = None,
    ) -> None:
        self.stop = stop or Stop(lambda: False)
        self.heart = heart or Heartbeat(start.config.run_directory)
        self.startup = startup  # None: the first step is not reported
        self.spent = Spent(on_part=self.heart.mark)
        with self.spent.part("start"):
            self._build(start, context)
        if compiles(start.config) and start.config.zero.stage < 3:
            with self.spent.part("compile"):
                warm_up(self.engine.module, self.batches.micro_batch(0, 0))
                context.synchronize()

    def _build(self, start: Start, context: Context) -> None:
        config, plan = self.config, self.plan = start.config, start.plan
        self.context, self.identity = context, start.identity
        saved = Checkpoint(start.checkpoint) if start.checkpoint else None
        self.rewinds = Rewinds(config, context, saved)
        self.batches = Batches(start, context, passed_over=self.rewinds.passed_over)
        self.meter = _meter(start, context)
        self.losses = Losses(context)
        stage = config.zero.stage
        self.pace = Pace(self.heart, context.device, accumulation=plan.accumulation, zero_stage=stage)
        model = build_model(config, plan.shape, device=context.device)
        self.engine, self.optimizer, self.members = build_deepspeed_engine(
            model, config, micro_batch=config.batch.micro_sequences, accumulation=plan.accumulation
        )
        decoder, clip = self.engine.module.model, config.optim.qk_clip
        self.logits = LogitProbe(decoder, when=lambda: self.optimizer.inspect, clip=clip)
        self.validation = Validation(
            config,
            engine=self.engine,
            optimizer=self.optimizer,
            dataset=start.validation_set,
            training=start.train_set,
            context=context,
            on_batch=partial(self.heart.mark, EVALUATION),
        )
        self.step = 0  # optimizer steps taken, skipped ones included
        self.skips = Skips(config, num_steps=plan.num_steps)
        self.writer = Writer(context)
        self.heart.written = self.writer.moved
        self.resumed_from: int | None = None
        self.wall_seconds = 0.0  # of the loop, in earlier starts
        if saved is not None:
            self._resume(saved)
            self.resumed_from, self.wall_seconds = self.step, saved.state["wall_seconds"]
        elif config.load_directory is not None:
            weights = HuggingFaceWeights(config.load_directory, plan.shape)
            self.optimizer.load_shards(weights.read, applied_steps=0)

    def run(self, output: Output) -> dict[str, Any] | None:
        """All remaining steps. Returns the summary of the run; None if it stopped before its last step."""
        with self.writer:
            return _run(self, output)

    def take_step(self, *, phase: Phase = nullcontext) -> Tensor:
        """One optimizer step: forward and backward of this rank's micro-batches. Returns its mean loss.

        Args:
            phase: gives a context for each part of the step by its name: "data", "compute" (which includes
                what ZeRO sends meanwhile) or "optimizer".
        """
        applied = self.optimizer.applied_steps
        self.optimizer.set_factors(**_factors(self.config, applied, num_steps=self.plan.num_steps))
        self.engine.train()
        self.optimizer.inspect = (self.step + 1) % self.config.optim.inspect_every_steps == 0
        total = torch.zeros((), device=self.context.device)
        mark = partial(self.pace.mark, step=self.step + 1)
        for micro_step in range(self.plan.accumulation):
            mark("data")
            with phase("data"):
                batch = self.batches.micro_batch(self.step, micro_step, skipped=self.step - applied)
            with phase("compute"):
                mark("forward")
                loss = self.engine(*batch)
                mark("backward")
                self.engine.backward(loss)
            mark("optimizer")
            with phase("optimizer"):
                if micro_step == self.plan.accumulation - 1:
                    self.optimizer.row_factors = self.logits.row_factors(self.context.most)
                self.engine.step()  # steps the optimizer on the last micro-batch
            total += loss.detach()
        self.step += 1
        self.skips.count(self.step, applied=self.optimizer.applied_steps)
        if self.startup is not None:
            _end_startup(self, self.startup)
        return total / self.plan.accumulation

    def row(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of the steps since the last such line, and of the newest."""
        return {
            "loss": self.losses.line(),
            "gradient_norm": self.optimizer.gradient_norm,
            "lr": self.optimizer.lr("matrix"),
            "lr_vector": self.optimizer.lr("vector"),
            "skipped_steps": self.step - self.optimizer.applied_steps,
            **self.meter.line(),
            **self.batches.drawn(self.step),
        }

    def optimizer_health(self) -> dict[str, Any]:
        """Of the last step, for the row: the optimizer's phases, updates and balance; attention's logits."""
        last, every = self.step == self.plan.num_steps, LAYERS_EVERY * self.config.optim.inspect_every_steps
        health = self.optimizer.health(layers=last or _due(self.step, every))
        health |= self.logits.read(self.context.gather)
        return {f"optimizer_{name}": value for name, value in health.items() if value != {}}

    def measure_noise(self) -> dict[str, Any]:
        """The noise of the gradients at this point, on the micro-batches that come next."""
        config, accumulation = self.config.optim.noise, self.plan.accumulation
        with self.spent.part("noise"):
            batches = [
                self.batches.micro_batch(self.step + i // accumulation, i % accumulation)
                for i in range(config.samples)
            ]
            norm = parse_norm(config.norm)
            return measure_noise(self.engine.module, self.members, batches, norm=norm, context=self.context)

    def validate(self) -> dict[str, float]:
        """`Validation.losses`."""
        with self.spent.part(EVALUATION):
            return self.validation.losses()

    def sample(self) -> dict[str, str]:
        """`Validation.samples`."""
        with self.spent.part("sample"):
            return self.validation.samples()

    def save(self, output: Output, *, wall_seconds: float, waits: bool) -> None:
        """Begin a checkpoint of the current step; once it is complete, drop those no longer kept.

        Args:
            wall_seconds: that the loop has taken until now, in this and in earlier starts.
            waits: until it is complete, as it also does without `checkpoint.background`.
        """
        path = checkpoint.step_directory(self.config.run_directory / "checkpoints", self.step)
        waits = waits or not self.config.checkpoint.background
        with self.spent.part(CHECKPOINT):
            self.writer.begin(
                path, shards=self.optimizer.shards(), then=partial(self._saved, path, output), copy=not waits,
                state={
                    "step": self.step,
                    "applied_steps": self.optimizer.applied_steps,
                    "consecutive_skips": self.skips.in_a_row,
                    "identity": self.identity,
                    "world_size": self.context.world_size,
                    "zero_stage": self.config.zero.stage,
                    "wall_seconds": wall_seconds,
                    "rewinds": self.rewinds.as_json(),
                    "losses_since_line": self.losses.as_text(),
                },
            )  # fmt: skip
            if waits:
                self.writer.wait()

    def _saved(self, path: Path, output: Output) -> None:
        """On rank 0, in the writer's thread."""
        config = self.config
        report_checkpoint(path)
        output.checkpoint(path)
        keep, every = config.checkpoint.keep, config.checkpoint.keep_every_steps
        checkpoint.prune(path.parent, keep=keep, keep_every_steps=every)

    def _resume(self, saved: Checkpoint) -> None:
        saved.check_identity(self.identity)
        self.optimizer.load_shards(saved.read, applied_steps=saved.state["applied_steps"])
        self.step = saved.state["step"]
        self.skips.resume(saved.state)
        self.losses.restore(saved.state["losses_since_line"])

    def rewind(self, output: Output) -> bool:
        """If the newest row began a loss spike, go back to before it (`checkpoint.max_rewinds`), if possible.

        Returns whether it did. Collective.
        """
        if not self.rewinds.wanted(output.spiked):
            return False
        self.heart.mark(CHECKPOINT)
        self.writer.wait()
        if (path := self.rewinds.go_back(self.step)) is None:
            return False
        self._resume(Checkpoint(path))
        output.go_back(self.config, step=self.step)
        return True

    def start_meter(self) -> None:
        self.context.synchronize()
        self.meter.start()


def _factors(config: TrainConfig, applied: int, *, num_steps: int) -> dict[str, float]:
    """Of learning rate and weight decay in the step that follows `applied` steps."""
    schedule = {name: value for name, value in asdict(config.schedule).items() if name != "tokens"}
    final = config.optim.final_weight_decay
    return {
        "lr": lr_factor(applied, num_steps=num_steps, **schedule),
        "decay": decay_factor(applied, num_steps=num_steps, final_fraction=final),
    }


def _end_startup(trainer: Trainer, startup: Startup) -> None:
    """After the first step."""
    trainer.context.synchronize()
    startup.end("step", evaluation=trainer.spent.seconds.get(EVALUATION, 0.0))
    if trainer.context.is_main:
        report_first_step(trainer.config, startup, step=trainer.step)
    trainer.startup = None


def _run(trainer: Trainer, output: Output) -> dict[str, Any] | None:
    """`Trainer.run`: what is due after which step."""
    config, plan = trainer.config, trainer.plan
    started = time.monotonic()
    held_out: dict[str, float] = {}
    if trainer.step == 0:
        output.row({"step": 0, "tokens": 0, **trainer.validate()})
    trainer.start_meter()
    while trainer.step < plan.num_steps:
        with profiled(config, trainer.context, step=trainer.step + 1):
            trainer.losses.add(trainer.take_step(phase=trainer.meter.phase))
        trainer.meter.count_step()
        trainer.heart.mark("row")
        last = trainer.step == plan.num_steps
        logging, evaluating, saving = (
            last or _due(trainer.step, section.every_steps)
            for section in (config.record, config.evaluation, config.checkpoint)
        )
        stopping = trainer.stop.due(failed=trainer.writer.failed) and not last
        if stopping:
            trainer.heart.mark(CHECKPOINT)
            trainer.writer.wait()  # raises, if that is why
        saving = saving or stopping
        probing = _due(trainer.step, config.optim.noise.measure_every_steps)
        if not (logging or evaluating or saving or probing or trainer.optimizer.inspect):
            continue
        trainer.context.synchronize()
        trainer.meter.pause()
        row = trainer.row() if logging else {}
        if trainer.optimizer.inspect:
            row |= trainer.optimizer_health()
        if evaluating:
            row |= (held_out := trainer.validate())
        if probing:
            row |= trainer.measure_noise()
        if row:
            output.row({"step": trainer.step, "tokens": trainer.step * plan.tokens_per_step, **row})
        if logging and trainer.rewind(output):
            held_out, saving = {}, False
        final = held_out if last else None
        if saving and trainer.skips.sound(trainer.optimizer, trainer.context, final=final):
            wall_seconds = trainer.wall_seconds + time.monotonic() - started
            trainer.save(output, wall_seconds=wall_seconds, waits=last or stopping)
            trainer.context.report({"step": trainer.step})
        if stopping:
            return None
        trainer.start_meter()
    return {
        "step": trainer.step,
        "tokens": trainer.step * plan.tokens_per_step,
        "skipped_steps": trainer.step - trainer.optimizer.applied_steps,
        **(held_out or trainer.validate()),
        "wall_seconds": trainer.wall_seconds + time.monotonic() - started,
        "resumed_from_step": trainer.resumed_from,
        "num_parameters": plan.shape.num_parameters,
        "flops_per_token": plan.flops_per_token,
        **trainer.meter.summary(),
        "samples": trainer.sample(),
        **trainer.spent.summary(),
    }


def _due(step: int, every_steps: int) -> bool:
    """Whether something falls on this step; 0: it never does."""
    return every_steps > 0 and step % every_steps == 0


def _meter(start: Start, context: Context) -> Meter:
    return Meter(
        tokens_per_step=start.plan.tokens_per_step,
        flops_per_token=start.plan.flops_per_token,
        num_devices=context.world_size,
        device_name=context.device_name,
        measured_tflops=_measured_tflops(start.config),
    )


def _measured_tflops(config: TrainConfig) -> float | None:
    """Of the preflight's GPUs; None where there has been none, and on CPUs, whose workers share them."""
    report = Path(config.record.ceilings or "").expanduser()
    workers = config.workers
    is_there = workers.gpu and report.is_file()
    return measured_tflops(files.read_json(report), workers.accelerator) if is_there else None
