"""What follows from a configuration before anything runs: steps, accumulation, memory, seconds. No torch.

    python -m training.plan [--config FILE] [key=value ...]

prints the plan, and the fastest configuration that fits the GPU. So does --dry-run of `make train`.
"""

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from cluster import cli
from cluster.config import ConfigError
from cluster.display import Table, pairs, show
from cluster.measure import hardware
from training import config as training_config
from training.config import ModelConfig, TrainConfig
from training.model import shapes
from training.model.shapes import LlamaShape
from training.planner.memory import Memory, memory
from training.planner.proposal import Proposal, propose
from training.planner.seconds import rates_of, step_seconds

TESTED_MACHINES = ("x86_64", "AMD64")
DEFAULT_DEVICE = "A40"  # 48 GB: what is proposed for where workers.accelerator names no GPU


@dataclass(frozen=True)
class Plan:
    """Derived quantities of a run.

    Attributes:
        is_bf16: weights and activations are bf16, else fp32.
        accumulation: micro-batches per worker and optimizer step.
        memory: of one worker, by point of the step and part.
        device: the accelerator the memory must fit, if the configuration names a known one.
        config: from which all this follows.
    """

    shape: LlamaShape
    is_bf16: bool
    num_workers: int
    accumulation: int
    samples_per_step: int
    tokens_per_step: int
    num_steps: int
    flops_per_token: int
    memory: Memory
    device: hardware.Device | None
    config: TrainConfig = field(repr=False)

    @property
    def memory_bytes(self) -> Mapping[str, int]:
        """Part -> bytes per worker, at the point of the step that needs the most."""
        return self.memory.parts

    @property
    def total_memory_bytes(self) -> int:
        """Bytes per worker at that point."""
        return self.memory.total

    @cached_property
    def seconds(self) -> Mapping[str, float]:
        """Part -> seconds of one optimizer step; empty for a device without datasheet."""
        if self.device is None:
            return {}
        return step_seconds(self.config, self.shape, rates_of(self.device), num_workers=self.num_workers)

    def proposal(self) -> Proposal:
        """What fits this GPU, or one of DEFAULT_DEVICE, and is fastest."""
        device = self.device or hardware.lookup(DEFAULT_DEVICE)
        assert device is not None
        return propose(self.config, self.shape, device, num_workers=self.num_workers)

    def outlook(self) -> list[str | Table]:
        """The plan, and on GPUs the proposal: texts and tables for people."""
        if not self.config.workers.gpu:
            return [self.table()]
        found = self.proposal()
        device = f"{found.device.name}, {found.device.memory_gb:g} GB"
        title = f"\nproposed for {device}; ceilings {found.rates.source}"
        return [self.table(), title, found.table(), found.reason()]

    def describe(self) -> str:
        """The plan for people, as text."""
        return str(self.table())

    def table(self) -> Table:
        """The plan as a table for people."""
        rows = [
            ("parameters", f"{self.shape.num_parameters:,} ({self.shape.num_parameters / 1e9:.4f}B)"),
            ("precision", "bf16, with fp32 master weights" if self.is_bf16 else "fp32"),
            ("workers", f"{self.num_workers}"),
            (
                "tokens per step",
                f"{self.tokens_per_step:,} = {self.samples_per_step} sequences, "
                f"{self.accumulation} micro-batches per worker",
            ),
            ("steps", f"{self.num_steps:,} ({self.num_steps * self.tokens_per_step:,} tokens)"),
            ("FLOPs per token", f"{self.flops_per_token:,} = 6*N_matmul + 12*layers*heads*head_dim*sequence"),
            ("training time", self._time()),
            *((f" {part}", f"{seconds:.3f} s") for part, seconds in self.seconds.items() if seconds),
            ("memory per worker", f"{self.total_memory_bytes / 1e9:.2f} GB, most in: {self.memory.largest}"),
            *((f" {part}", f"{size / 1e9:.2f} GB") for part, size in self.memory_bytes.items()),
            *(
                (f"memory, {point}", f"{sum(parts.values()) / 1e9:.2f} GB")
                for point, parts in self.memory.points.items()
            ),
        ]
        if (machine := platform.machine()) not in TESTED_MACHINES:
            rows.append(("not tested", f"nothing here has run on {machine} yet"))
        if self.device:
            rows.append(("memory available", f"{self.device.memory_gb:g} GB ({self.device.name})"))
        return pairs((f"{name:<22}", value) for name, value in rows)

    def _time(self) -> str:
        if self.device is None:
            return "not known before it is measured (no datasheet for this device)"
        step = sum(self.seconds.values())
        share = hardware.mfu(
            tokens_per_second=self.tokens_per_step / step, flops_per_token=self.flops_per_token,
            num_devices=self.num_workers, peak_tflops=self.device.bf16_tflops,
        )  # fmt: skip
        ceilings = rates_of(self.device).source
        if "optimizer" not in self.seconds:
            ceilings += "; without the optimizer step, which is not counted for this rule or stage"
        return (
            f"{step * self.num_steps / 86400:.1f} days: {step:.3f} s per step, an MFU of {share:.0%}; "
            f"ceilings {ceilings}"
        )


def make_plan(config: TrainConfig, *, num_workers: int | None = None) -> Plan:
    """Derive the plan, for `workers.count` workers or the number that is really there.

    Raises:
        ConfigError: no such shape, a batch that does not divide, fewer tokens than one step, a rule that has
            nowhere to keep its point ahead, an unknown accelerator, or more memory than the accelerator has.
            Names the keys to change.
    """
    _require_room_ahead(config)
    workers, batch = num_workers or config.workers.count, config.batch
    shape = resolve_shape(config)
    if config.optim.qk_clip and shape.qk_norm:
        raise ConfigError("optim.qk_clip: queries and keys are normalised (model.qk_norm); set it to 0")
    tokens_per_pass = workers * batch.micro_sequences * batch.sequence_length
    if batch.tokens % tokens_per_pass:
        lower = batch.tokens // tokens_per_pass * tokens_per_pass
        choices = " or ".join(str(choice) for choice in (lower, lower + tokens_per_pass) if choice)
        raise ConfigError(
            f"batch.tokens: {batch.tokens} is not a multiple of {tokens_per_pass} = {workers} workers x "
            f"batch.micro_sequences={batch.micro_sequences} x batch.sequence_length={batch.sequence_length}; "
            f"use {choices}, or change one of these"
        )
    num_steps = config.schedule.tokens // batch.tokens
    if num_steps == 0:
        raise ConfigError(
            f"schedule.tokens: {config.schedule.tokens} is less than one step of batch.tokens={batch.tokens}"
        )
    plan = Plan(
        shape=shape,
        is_bf16=config.is_bf16,
        num_workers=workers,
        accumulation=batch.tokens // tokens_per_pass,
        samples_per_step=batch.tokens // batch.sequence_length,
        tokens_per_step=batch.tokens,
        num_steps=num_steps,
        flops_per_token=shape.flops_per_token(batch.sequence_length),
        memory=memory(config, shape, num_workers=workers),
        device=_device(config),
        config=config,
    )
    if plan.device and plan.total_memory_bytes > plan.device.memory_gb * 1e9:
        raise ConfigError(
            f"this run needs {plan.total_memory_bytes / 1e9:.1f} GB per GPU, most of it in: "
            f"{plan.memory.largest}; but workers.accelerator="
            f"{config.workers.accelerator} has {plan.device.memory_gb:g} GB; lower "
            f"batch.micro_sequences (now {batch.micro_sequences}), "
            f"set model.activation_checkpointing=true, "
            f"raise zero.stage (now {config.zero.stage}) or use more workers.count (now {workers}). "
            f"{plan.proposal().reason()}\n{plan.describe()}"
        )
    return plan


def _require_room_ahead(config: TrainConfig) -> None:
    """Refuse what `optim.step.zero.ZeroOptimizer.bind` would: no copy of the weights beside the masters."""
    rule, zero = config.optim.looks_ahead, config.zero
    if rule is None:
        return
    if zero.stage == 0 and not config.is_bf16:
        raise ConfigError(
            f"optim.matrix.rule: {rule} takes gradients ahead of the weights, and with zero.stage=0 in fp32 "
            "there is no second copy of them to hold that point; use zero.stage=1 or precision=bf16"
        )
    if zero.stage == 3 and zero.offload_optimizer and config.workers.gpu:
        raise ConfigError(
            f"optim.matrix.rule: {rule} takes gradients ahead of the weights, and the step on the CPU cannot "
            "write that point to the GPU in zero.stage=3; use zero.offload_optimizer=false or zero.stage=2"
        )


def run_identity(config: TrainConfig, plan: Plan, *, fingerprint: str) -> dict[str, Any]:
    """What must stay the same for a run to be resumed: key or name -> value, JSON-ready.

    The rest may change between the start of a run and its resumption: workers, ZeRO stage, learning rates.
    What is younger than some checkpoints is named only if it is on.
    """
    model = asdict(plan.shape)
    for name in ("qk_norm", "qkv_bias", "out_bias", "mlp_bias"):
        if not model[name]:
            del model[name]
    optim = config.optim
    younger: dict[str, Any] = {}
    if config.batch.document_masks:
        younger["batch.document_masks"] = True
    if optim.average_decay:
        younger["optim.average_decay above 0"] = True
    if optim.by_name:
        younger["optim.by_name"] = [[pattern, each.rule] for pattern, each in optim.matrices.items()]
    if optim.matrix.ahead:
        younger["optim.matrix.ahead"] = optim.matrix.ahead
    return {
        "data fingerprint": fingerprint,
        "run.seed": config.run.seed,
        "batch.tokens": config.batch.tokens,
        "batch.sequence_length": config.batch.sequence_length,
        "optim.matrix.rule": config.optim.matrix.rule,
        "model": model,
        **younger,
    }


def resolve_shape(config: TrainConfig) -> LlamaShape:
    """The model's shape, with the overrides of `config.model`; with `load`, that of the weights.

    Raises:
        ConfigError: there is no such shape, or a key of `config.model` asks for another than `load` has.
    """
    overrides = asdict(config.model)
    name = overrides.pop("shape")
    for other in ("activation_checkpointing", "checkpoint_every", "compile", "loss_tokens"):
        overrides.pop(other)
    given = {size: value for size, value in overrides.items() if value is not None}
    try:
        if config.load_directory is None:
            return shapes.resolve(name, **overrides)
        shape = shapes.resolve(config.load_directory)
        asked = given if name == ModelConfig().shape else vars(shapes.resolve(name, **overrides))
    except ValueError as error:
        raise ConfigError(f"{'load' if config.load else 'model'}: {error}") from error
    for size, value in asked.items():
        if (loaded := getattr(shape, size)) != value:
            key = f"model.{size if size in given else 'shape'}"
            problem = f"{size} is {value}, but {loaded} in {config.load}"
            raise ConfigError(f"{key}: {problem}; leave the key out: the weights have their own shape")
    return shape


def _device(config: TrainConfig) -> hardware.Device | None:
    if config.workers.accelerator is None:
        return None
    name = config.workers.accelerator  # Ray's: H100 for each of its models
    device = hardware.by_short_name(name) or hardware.lookup(name)
    if device is None:
        known = ", ".join(name.upper() for name in hardware.SHORT_NAMES)
        raise ConfigError(
            f"workers.accelerator: {config.workers.accelerator!r} has no datasheet entry, so its memory and "
            f"peak are unknown; known: {known}. Leave the key out to train without a memory check"
        )
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.plan", description=__doc__.splitlines()[0], keys=TrainConfig())
    options = parser.parse_args(arguments)

    def body() -> None:
        config = training_config.load(file=options.config, dotlist=options.overrides)
        show(*make_plan(config).outlook())

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
