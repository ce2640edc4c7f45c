"""What follows from a configuration before anything runs: steps, accumulation, memory, FLOPs. No torch."""

import platform
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from cluster.config import ConfigError
from cluster.display import Table, pairs
from cluster.measure import hardware
from training.config import MUON_RULES, SCION_RULES, TrainConfig
from training.model import shapes
from training.model.shapes import LlamaShape

GPU_RESERVE_BYTES = (
    2.0e9  # CUDA context, NCCL buffers and the allocator's fragmentation: an allowance, not a count
)
TESTED_MACHINES = ("x86_64", "AMD64")
ASSUMED_MFU = 0.4  # for the time estimate only; the run measures its own


@dataclass(frozen=True)
class Plan:
    """Derived quantities of a run.

    Attributes:
        is_bf16: weights and activations are bf16, else fp32.
        accumulation: micro-batches per worker and optimizer step.
        memory_bytes: part -> bytes per worker, at its peak.
        device: the accelerator the memory must fit, if the configuration names a known one.
    """

    shape: LlamaShape
    is_bf16: bool
    num_workers: int
    accumulation: int
    samples_per_step: int
    tokens_per_step: int
    num_steps: int
    flops_per_token: int
    memory_bytes: dict[str, int]
    device: hardware.Device | None

    @property
    def total_memory_bytes(self) -> int:
        return sum(self.memory_bytes.values())

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
            ("memory per worker", f"{self.total_memory_bytes / 1e9:.2f} GB"),
        ]
        rows += [(f" {part}", f"{size / 1e9:.2f} GB") for part, size in self.memory_bytes.items()]
        if (machine := platform.machine()) not in TESTED_MACHINES:
            rows.append(("not tested", f"nothing here has run on {machine} yet"))
        if self.device:
            rows.append(("memory available", f"{self.device.memory_gb:g} GB ({self.device.name})"))
        return pairs((f"{name:<22}", value) for name, value in rows)

    def _time(self) -> str:
        if self.device is None:
            return "not known before it is measured (no datasheet for this device)"
        flops = self.flops_per_token * self.num_steps * self.tokens_per_step
        days = flops / (self.num_workers * self.device.bf16_tflops * 1e12 * ASSUMED_MFU) / 86400
        peak = f"{self.device.bf16_tflops:g} TFLOP/s per GPU"
        return f"{days:.1f} days at an assumed MFU of {ASSUMED_MFU:.0%} of {peak}"


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
        memory_bytes=memory_bytes(config, shape, num_workers=workers),
        device=_device(config),
    )
    if plan.device and plan.total_memory_bytes > plan.device.memory_gb * 1e9:
        raise ConfigError(
            f"this run needs {plan.total_memory_bytes / 1e9:.1f} GB per GPU, but workers.accelerator="
            f"{config.workers.accelerator} has {plan.device.memory_gb:g} GB; lower "
            f"batch.micro_sequences (now {batch.micro_sequences}), "
            f"set model.activation_checkpointing=true, "
            f"raise zero.stage (now {config.zero.stage}) or use more workers.count (now {workers})\n"
            f"{plan.describe()}"
        )
    return plan


def _require_room_ahead(config: TrainConfig) -> None:
    """Refuse what `optim.step.zero.ZeroOptimizer.bind` would: no copy of the weights beside the masters."""
    if not config.optim.looks_ahead:
        return
    rule, zero = config.optim.matrix.rule, config.zero
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
    """
    return {
        "data fingerprint": fingerprint,
        "run.seed": config.run.seed,
        "batch.tokens": config.batch.tokens,
        "batch.sequence_length": config.batch.sequence_length,
        "optim.matrix.rule": config.optim.matrix.rule,
        "model": asdict(plan.shape),
    }


def resolve_shape(config: TrainConfig) -> LlamaShape:
    """The model's shape, with the overrides of `config.model`. Raises `ConfigError`."""
    overrides = asdict(config.model)
    name = overrides.pop("shape")
    for other in ("activation_checkpointing", "compile", "loss_tokens"):
        overrides.pop(other)
    try:
        return shapes.resolve(name, **overrides)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _device(config: TrainConfig) -> hardware.Device | None:
    if config.workers.accelerator is None:
        return None
    device = hardware.lookup(config.workers.accelerator)
    if device is None:
        known = ", ".join(device.name.removeprefix("NVIDIA ") for device in hardware.DEVICES)
        raise ConfigError(
            f"workers.accelerator: {config.workers.accelerator!r} has no datasheet entry, so its memory and "
            f"peak are unknown; known: {known}. Leave the key out to train without a memory check"
        )
    return device


def memory_bytes(config: TrainConfig, shape: LlamaShape, *, num_workers: int) -> dict[str, int]:
    """Peak bytes per worker, by part. N is the number of parameters, W of workers.

    Weights N·p (p bytes each; /W in stage 3, plus what is gathered at one time); gradients in the weights'
    precision plus their fp32 accumulators (/W from stage 2); fp32 masters, momentum and moments (/W from
    stage 1); activations as counted by `activation_bytes`; what the optimizer step holds for a moment.
    """
    stage, bucket = config.zero.stage, config.zero.bucket_elements
    low, n = (2 if config.is_bf16 else 4), shape.num_parameters
    matrix = sum(rows * cols * count for (rows, cols), count in shape.matrices().items())
    rule = config.optim.matrix.rule
    whole, scion = rule in MUON_RULES + SCION_RULES, rule in SCION_RULES
    state = 4 if scion or rule in ("muon", "normuon", "muon_plus", "sgd", "signum") else 8
    row_state = 4 * sum(rows * count for (rows, _), count in shape.matrices().items())
    shard = 1 if stage == 0 else num_workers
    bf16 = low == 2
    gathered = min(n, 2 * bucket + max(prod(size) for size in shape.parameters().values()))
    if stage == 3:
        weights = n * low // num_workers + gathered * low
        gradients = n * 4 // num_workers + gathered * low
    elif stage == 2:
        weights, gradients = n * low, n * 4 // num_workers + min(n, 2 * bucket) * low
    else:
        weights, gradients = n * low, n * low + (n * 4 if stage == 1 and bf16 else 0)
    largest = max(rows * cols for rows, cols in shape.matrices())
    owned = max(matrix // num_workers, largest)
    exchange = {"bf16": 2, "fp32": 4}[config.optim.matrix.dtype]
    parts = {
        "weights": weights,
        "gradients": gradients,
        "master weights (fp32)": 0 if stage == 0 and not bf16 else n * 4 // shard,
        "momentum and moments": (
            matrix * state + (n - matrix) * (4 if scion else 8) + (row_state if rule == "normuon" else 0)
        )
        // shard,
        # fp32 gradient of the shard; its packed pieces; arrived, whole and iterated matrices of the owner
        "optimizer step": 4 * n // shard
        + (((n if scion else matrix) // shard + 5 * owned) * exchange if whole else 0),
        "activations": activation_bytes(config, shape),
        "communication buckets": 0 if num_workers == 1 else 2 * min(n, bucket) * low,
    }
    if config.workers.gpu:
        parts["CUDA, NCCL, fragments"] = int(GPU_RESERVE_BYTES)
    return parts


def activation_bytes(config: TrainConfig, shape: LlamaShape) -> int:
    """Bytes that one micro-batch keeps for its backward pass, logits and loss included.

    Per token and layer, p bytes an element: two norms at (4 + 2p)·h; q, k, v and their mix at
    (2·q + 2·kv)·p, and 4 per head for the softmax; the SwiGLU at 4·ffn·p.
    `tests/training/test_plan.py` holds this against autograd's own count.
    """
    low = 2 if config.is_bf16 else 4
    tokens = config.batch.micro_sequences * config.batch.sequence_length
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden = shape.hidden_size
    norm = (4 + 2 * low) * hidden
    layer = 2 * norm + (2 * q + 2 * kv + 4 * shape.ffn_size) * low + 4 * shape.num_heads
    if config.model.activation_checkpointing:
        layers = shape.num_layers * hidden * low + layer
    else:
        layers = shape.num_layers * layer
    # the head: its input's norm, logits, log-probabilities in fp32, and their gradients
    head = norm + shape.vocab_size * (low + 8)
    return ceil(tokens * (layers + head))
