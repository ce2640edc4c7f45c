"""The training loop: one step after another, whatever launched it.

Everything it leaves behind is in the run directory: the record, the checkpoints, the plot. A run that
starts where checkpoints are resumes from the newest complete one.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from cluster import config as layered
from cluster import files, provenance
from cluster.cli import RunError
from cluster.preflight.verdict import measured_tflops
from cluster.record import Record
from optim import groups
from optim.geometry import parse_norm
from optim.schedule import lr_factor
from training.config import TrainConfig
from training.data.dataset import SampleOrder, TokenDataset, micro_batch, validation_batches
from training.model.attention import for_changing_lengths
from training.model.llama import IGNORED_TARGET, Llama, generate, initialize
from training.plan import Plan, make_plan, run_identity
from training.run import checkpoint
from training.run.checkpoint import Checkpoint
from training.run.context import Context
from training.run.engine import make_engine, zero_init
from training.run.meter import Meter
from training.run.noise_probe import measure_noise
from training.run.spent import Spent, spent_on

MAX_CONSECUTIVE_SKIPS = 20  # steps with a non-finite gradient, after which the run is given up
PARTITION = "partition.txt"  # in the run directory: which rule each parameter got
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.7, 40

Observe = Callable[[dict[str, Any]], None]
Phase = Callable[[str], AbstractContextManager[Any]]


class TrainingError(RunError):
    """The run cannot go on; the message says what happened and what to change."""


def train(config: TrainConfig, *, data: Path, command: list[str], context: Context, observe: Observe) -> None:
    """Run, or resume, `config` to its last step on this rank.

    Args:
        data: the prepared data set (`training.data.prepare`).
        command: the command line, for the record.
        observe: called on rank 0 with every row of `metrics.jsonl`.
    """
    trainer = Trainer(config, data=data, context=context)
    if context.is_main:
        files.write_text(config.run_directory / PARTITION, trainer.describe_optimizer())
    with trainer.open_record(command) if context.is_main else nullcontext() as record:
        summary = trainer.run(Output(record, observe))
        if record is not None:
            record.finish(summary)


@dataclass(frozen=True)
class Output:
    """Where rows and notes go: the record on rank 0, nowhere on the others."""

    record: Record | None
    observe: Observe

    def row(self, row: dict[str, Any]) -> None:
        if self.record is not None:
            self.record.log(row)
            self.observe(row)


class Trainer:
    """One rank's model, optimizer, data and position. Collective: every rank builds and runs its own."""

    def __init__(self, config: TrainConfig, *, data: Path, context: Context) -> None:
        self.spent = Spent()
        with self.spent.part("start"):
            self._build(config, data=data, context=context)

    def _build(self, config: TrainConfig, *, data: Path, context: Context) -> None:
        self.config = config
        self.context = context
        self.plan: Plan = make_plan(config, num_workers=context.world_size)
        length = config.batch.sequence_length
        self.train_set = TokenDataset.open(data, split="train", sequence_length=length)
        self.validation_set = TokenDataset.open(data, split="validation", sequence_length=length)
        self.tokenizer = Tokenizer.from_file(str(data / self.train_set.manifest.tokenizer_file))
        self.identity = run_identity(config, self.plan, fingerprint=self.train_set.manifest.fingerprint)
        self.order = SampleOrder(self.train_set.num_samples, seed=config.run.seed)
        self.meter = Meter(
            tokens_per_step=self.plan.tokens_per_step,
            flops_per_token=self.plan.flops_per_token,
            num_devices=context.world_size,
            device_name=context.device_name,
            measured_tflops=_measured_tflops(config),
        )
        with zero_init(config), context.device:  # on a GPU the weights are drawn there, which is faster
            model = Llama(self.plan.shape, activation_checkpointing=config.model.activation_checkpointing)
        initialize(model, seed=config.run.seed)
        self.engine, self.optimizer, self.members = make_engine(
            model, config, micro_batch=config.batch.micro_sequences, accumulation=self.plan.accumulation
        )
        self.step = 0  # optimizer steps taken, skipped ones included
        self.consecutive_skips = 0
        self.resumed_from: int | None = None
        # Of the steps since the last line with a loss: means over the ranks, then those of this rank alone.
        self._losses: list[float] = []
        self._own_losses: list[Tensor] = []
        self._wall_seconds = 0.0  # of the loop, up to the step that this start continues
        self._resume()

    # --- the run ------------------------------------------------------------------------------------------

    def run(self, output: Output) -> dict[str, Any]:
        """All remaining steps. Returns the summary of the run."""
        started = time.monotonic()
        held_out: dict[str, float] = {}
        if self.step == 0:
            output.row({"step": 0, "tokens": 0, **self.validate()})
        self._start_meter()
        while self.step < self.plan.num_steps:
            self._own_losses.append(self.take_step())
            self.meter.count_step()
            last = self.step == self.plan.num_steps
            logging, evaluating, saving = (
                last or self._due(section.every_steps)
                for section in (self.config.record, self.config.evaluation, self.config.checkpoint)
            )
            probing = self._due(self.config.optim.noise.measure_every_steps)
            if not (logging or evaluating or saving or probing or self.optimizer.inspect):
                continue
            self._pause_meter()
            row = self.row() if logging else {}
            if self.optimizer.inspect:
                row |= self.optimizer_health()
            if evaluating:
                row |= (held_out := self.validate())
            if probing:
                row |= self.measure_noise()
            if row:
                output.row({"step": self.step, "tokens": self.step * self.plan.tokens_per_step, **row})
            if saving:
                self.save(wall_seconds=self._wall_seconds + time.monotonic() - started)
                self.context.report({"step": self.step})
            self._start_meter()
        return {
            "step": self.step,
            "tokens": self.step * self.plan.tokens_per_step,
            "skipped_steps": self.step - self.optimizer.applied_steps,
            **(held_out or self.validate()),
            "wall_seconds": self._wall_seconds + time.monotonic() - started,
            "resumed_from_step": self.resumed_from,
            "num_parameters": self.plan.shape.num_parameters,
            "flops_per_token": self.plan.flops_per_token,
            **self.meter.summary(),
            "samples": self.sample(),
            **self.spent.summary(),
        }

    def take_step(self, *, phase: Phase = nullcontext) -> Tensor:
        """One optimizer step: forward and backward of this rank's micro-batches. Returns its mean loss.

        Args:
            phase: a context for each part of the step, told its name: "data", "compute" (with whatever ZeRO
                sends meanwhile) or "optimizer".
        """
        applied = self.optimizer.applied_steps
        schedule = {name: value for name, value in asdict(self.config.schedule).items() if name != "tokens"}
        self.optimizer.set_lr_factor(lr_factor(applied, num_steps=self.plan.num_steps, **schedule))
        self.engine.train()
        self.optimizer.inspect = (self.step + 1) % self.config.optim.inspect_every_steps == 0
        total = torch.zeros((), device=self.context.device)
        for micro_step in range(self.plan.accumulation):
            with phase("data"):
                inputs, targets = self._micro_batch(micro_step)
            with phase("compute"):
                loss = self.engine(inputs, targets)
                self.engine.backward(loss)
            with phase("optimizer"):
                self.engine.step()  # steps the optimizer on the last micro-batch
            total += loss.detach()
        self.step += 1
        self._count_skips(skipped=self.optimizer.applied_steps == applied)
        return total / self.plan.accumulation

    def row(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of the steps since the last such line, and of the newest."""
        losses, self._losses = self._losses_since_line(), []
        return {
            "loss": statistics.fmean(losses),
            "gradient_norm": self.optimizer.gradient_norm,
            "lr": self.optimizer.lr("matrix"),
            "lr_vector": self.optimizer.lr("vector"),
            "skipped_steps": self.step - self.optimizer.applied_steps,
            **self.meter.line(),
        }

    def _losses_since_line(self) -> list[float]:
        """Mean losses, over all ranks, of the steps since the last line with a loss. Collective.

        The sums are in float64, so that the same steps give the same mean whether a checkpoint came between
        them or not.
        """
        if self._own_losses:
            own = torch.stack(self._own_losses).double()
            self._losses += (self.context.sum(own) / self.context.world_size).tolist()
            self._own_losses = []
        return self._losses

    def optimizer_health(self) -> dict[str, float | None]:
        """What the last step's optimizer did, for the row: phases, quality of the updates, balance."""
        health = self.optimizer.health()
        return {f"optimizer_{name}": value for name, value in health.items()}

    @spent_on("noise")
    def measure_noise(self) -> dict[str, Any]:
        """The noise of the gradients at this point, on the micro-batches that come next."""
        config = self.config.optim.noise
        accumulation = self.plan.accumulation
        batches = [
            self._micro_batch(i % accumulation, steps_ahead=i // accumulation) for i in range(config.samples)
        ]
        return measure_noise(
            self.engine.module,
            self.members,
            batches,
            norm=parse_norm(config.norm),
            context=self.context,
        )

    @spent_on("evaluation")
    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses in nats per token over held-out sequences, the same ones every time.

        `validation_loss`, and where the configuration asks for tuning sequences, which are others,
        `tuning_loss`.
        """
        evaluation = self.config.evaluation
        with self.optimizer.at_weights():
            losses = {"validation_loss": self._held_out_loss(evaluation.sequences)}
            if tuning := evaluation.tuning_sequences:
                losses["tuning_loss"] = self._held_out_loss(tuning, apart_from=evaluation.sequences)
        return losses

    def _held_out_loss(self, sequences: int, *, apart_from: int = 0) -> float:
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64)  # summed loss, sequences
        for tokens, weights in validation_batches(
            self.validation_set,
            sequences=sequences,
            apart_from=apart_from,
            rank=self.context.rank,
            world_size=self.context.world_size,
            micro_sequences=self.config.batch.micro_sequences,
        ):
            batch = torch.from_numpy(tokens).to(self.context.device)
            real = torch.from_numpy(weights).to(self.context.device)
            # Rows of weight 0 only keep the collective forward passes of ZeRO-3 in step.
            targets = batch[:, 1:].masked_fill((real == 0)[:, None] & bool(real.any()), IGNORED_TARGET)
            loss = self.engine(batch[:, :-1].contiguous(), targets).item()
            totals += torch.tensor([loss * weights.sum(), weights.sum()], dtype=torch.float64)
        self.context.sum(totals := totals.to(self.context.device))
        return (totals[0] / totals[1]).item()

    @spent_on("sample")
    @torch.no_grad()
    def sample(self) -> dict[str, str]:
        """Prompt -> text that the model writes after it. Every rank takes part."""
        if not self.config.evaluation.sample_tokens:
            return {}
        self.engine.eval()
        with self.optimizer.at_weights(), for_changing_lengths():
            return {prompt: self._continued(prompt) for prompt in self.config.evaluation.prompts}

    def _continued(self, prompt: str) -> str:
        tokens = generate(
            self.engine,
            torch.tensor(self.tokenizer.encode(prompt).ids, device=self.context.device),
            num_tokens=self.config.evaluation.sample_tokens,
            temperature=SAMPLE_TEMPERATURE,
            top_k=SAMPLE_TOP_K,
            seed=self.config.run.seed,
        )
        return self.tokenizer.decode(tokens.tolist())

    # --- checkpoints and the record -----------------------------------------------------------------------

    @spent_on("checkpoint")
    def save(self, *, wall_seconds: float) -> None:
        """Write a checkpoint of the current step and drop the ones that are no longer kept.

        wall_seconds: that the loop has taken until now, in this and in earlier starts.
        """
        root = self.config.run_directory / "checkpoints"
        checkpoint.save(
            checkpoint.step_directory(root, self.step),
            shards=self.optimizer.shards(),
            state={
                "step": self.step,
                "applied_steps": self.optimizer.applied_steps,
                "consecutive_skips": self.consecutive_skips,
                "identity": self.identity,
                "world_size": self.context.world_size,
                "zero_stage": self.config.zero.stage,
                "wall_seconds": wall_seconds,
                # as text: JSON has no way to write those of a run that diverges
                "losses_since_line": [str(loss) for loss in self._losses_since_line()],
            },
            context=self.context,
        )
        if self.context.is_main:
            checkpoint.prune(root, keep=self.config.checkpoint.keep)

    def _resume(self) -> None:
        path = checkpoint.newest_complete(self.config.run_directory / "checkpoints", report=lambda _: None)
        if path is None:
            return
        saved = Checkpoint(path)
        saved.check_identity(self.identity)
        self.optimizer.load_shards(saved.read, applied_steps=saved.state["applied_steps"])
        self.step = self.resumed_from = saved.state["step"]
        self.consecutive_skips = saved.state.get("consecutive_skips", 0)
        self._wall_seconds = saved.state.get("wall_seconds", 0.0)
        self._losses = [float(loss) for loss in saved.state.get("losses_since_line", ())]

    def open_record(self, command: list[str]) -> Record:
        """The record of this run, on rank 0."""
        config, directory = self.config, self.config.run_directory
        return Record.open(
            directory,
            config=layered.to_dict(config),
            provenance=provenance.collect(
                command=command, data_fingerprint=self.train_set.manifest.fingerprint
            ),
            wandb_mode=config.record.wandb,
            project=config.record.project,
            group=config.record.group,
            name=config.run.name,
            resume_step=self.resumed_from,
        )

    def describe_optimizer(self) -> str:
        """Which kind of rule each parameter got, and what the matrices' owners exchange, as text."""
        return f"{groups.describe(self.members)}\n{self.optimizer.describe()}\n"

    # --- details ------------------------------------------------------------------------------------------

    def _micro_batch(self, micro_step: int, *, steps_ahead: int = 0) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(
            micro_batch(
                self.train_set,
                self.order,
                consumed_samples=(self.step + steps_ahead) * self.plan.samples_per_step,
                micro_step=micro_step,
                rank=self.context.rank,
                world_size=self.context.world_size,
                micro_sequences=self.config.batch.micro_sequences,
            )
        ).to(self.context.device, non_blocking=True)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _due(self, every_steps: int) -> bool:
        """Whether something falls on this step; 0: it never does."""
        return every_steps > 0 and self.step % every_steps == 0

    def _pause_meter(self) -> None:
        self._synchronize()
        self.meter.pause()

    def _start_meter(self) -> None:
        self._synchronize()
        self.meter.start()

    def _synchronize(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()

    def _count_skips(self, *, skipped: bool) -> None:
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        if self.consecutive_skips == MAX_CONSECUTIVE_SKIPS:
            raise TrainingError(
                f"step {self.step}: the gradient was not finite in {MAX_CONSECUTIVE_SKIPS} steps on end; "
                "lower optim.matrix.lr and optim.vector.lr, or set optim.clip, and run again: "
                "it resumes from the newest checkpoint"
            )


def _measured_tflops(config: TrainConfig) -> float | None:
    """Of the preflight's GPUs; None where there has been none, and on CPUs, whose workers share them."""
    report = Path(config.record.ceilings or "")
    return measured_tflops(files.read_json(report)) if config.workers.gpu and report.is_file() else None
