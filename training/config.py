"""The keys of a training run. The defaults are the embedded run: small, on CPU, a few minutes long.

`training/configs/*.yaml` change what differs elsewhere. Quantities that follow from these (steps,
accumulation, memory, FLOPs) are derived in `training.plan`, not configured.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import config as layered
from cluster.config import ConfigError, key, require, require_choice
from cluster.record import WANDB_MODES
from cluster.session import SessionConfig

LAUNCHERS = ("ray", "torch")
SEEDS = range(1 << 63)  # that every generator takes, each for a stream of its own
PRECISIONS = ("auto", "bf16", "fp32")
DECAYS = ("linear", "cosine")
MUON_RULES = ("muon", "normuon", "muon_plus", "ema_nesterov")
SCION_RULES = ("scion", "transported_scion")  # of all parameters, by norm; the others: of hidden matrices
MATRIX_RULES = (*MUON_RULES, *SCION_RULES, "adamw", "sgd", "signum")
NOISES = ("none", "gaussian", "student", "stable")
LINES = ("row", "column", "row_column", "column_row")
ORTHOGONALISATIONS = ("polar_express", "jordan", "cans")
UPDATE_SCALES = ("spectral", "jordan", "rms")
NORMS = (  # of optim/geometry.py
    *("spectral", "spectral:input", "spectral:plain", "frobenius", "frobenius:rms", "sign", "sign:plain"),
    *("column", "column:normalized", "column:embedding", "row", "row:plain", "row:embedding"),
)


@dataclass(frozen=True)
class RunConfig:
    name: str = key("first-light", "the run; the same name again resumes it")
    directory: str = key("outputs", "where runs are kept; on a cluster, storage that every node sees")
    seed: int = key(1234, "initial weights, sample order and sampled text")

    def __post_init__(self) -> None:
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name) is not None
        require(plain, "run.name", f"{self.name!r} must be letters, digits, '-', '_' and '.'")
        require(self.seed in SEEDS, "run.seed", f"{self.seed} must lie in [0, 2^63)")


@dataclass(frozen=True)
class DataConfig:
    source: str = key(
        "botocore", "'botocore' (embedded corpus) or a file, folder or glob: .txt .jsonl .parquet"
    )
    text_field: str = key("text", "field of a .jsonl line or column of a .parquet file that holds the text")
    tokenizer: str = key("train", "'train' (a byte-level BPE on this corpus) or the path of a tokenizer.json")
    vocab_size: int = key(8192, "vocabulary of a trained tokenizer")
    validation_fraction: float = key(0.01, "share of the documents that is held out, chosen by their hash")
    directory: str = key("data", "where prepared token shards are kept")
    shard_tokens: int = key(100_000_000, "tokens per shard file")

    def __post_init__(self) -> None:
        require(300 <= self.vocab_size <= 1_000_000, "data.vocab_size", "must lie between 300 and 1000000")
        require(0 < self.validation_fraction < 0.5, "data.validation_fraction", "must lie between 0 and 0.5")
        require(self.shard_tokens >= 1000, "data.shard_tokens", "must be at least 1000")


@dataclass(frozen=True)
class ModelConfig:
    shape: str = key(
        "llama-5m", "a name from training/model/shapes.py, or a Hugging Face LLaMA directory's config.json"
    )
    num_layers: int | None = key(None, "replaces the shape's number of layers")
    hidden_size: int | None = key(None, "replaces the shape's hidden size")
    ffn_size: int | None = key(None, "replaces the shape's feed-forward size")
    num_heads: int | None = key(None, "replaces the shape's number of query heads")
    num_kv_heads: int | None = key(None, "replaces the shape's number of key and value heads")
    vocab_size: int | None = key(None, "replaces the shape's vocabulary")
    activation_checkpointing: bool = key(False, "recompute each layer in the backward pass to save memory")


@dataclass(frozen=True)
class BatchConfig:
    tokens: int = key(4096, "tokens per optimizer step, over all workers")
    sequence_length: int = key(256, "tokens per sequence")
    micro_sequences: int = key(4, "sequences per worker and forward pass; accumulation follows")

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence_length", "micro_sequences"):
            require(getattr(self, name) >= 1, f"batch.{name}", "must be at least 1")


@dataclass(frozen=True)
class MatrixOptimConfig:
    rule: str = key("muon", f"rule of the hidden matrices: {', '.join(MATRIX_RULES)}")
    lr: float = key(0.02, "peak learning rate of the hidden matrices; of everything under scion's rules")
    momentum: float = key(0.95, "momentum, of every rule but adamw")
    nesterov: bool = key(True, "Nesterov look-ahead of the momentum: muon and its variants")
    weight_decay: float = key(0.1, "decoupled: each step multiplies the weights by 1 - lr*weight_decay")
    method: str = key("polar_express", "Newton-Schulz coefficients, by name (optim/polar.py)")
    scale: str = key("spectral", "muon's rules: scale of the orthogonal update, by name (optim/rules.py)")
    per_head: bool = key(False, "every attention head's rows of q, k and v are a matrix of their own")
    dtype: str = key("bf16", "precision of exchange and orthogonalisation: bf16 or fp32")
    row_beta2: float = key(0.95, "normuon: decay of the rows' second moments")
    lines: str = key("row", f"muon_plus: what is normalised after orthogonalisation: {', '.join(LINES)}")
    lookahead: float = key(0.6, "ema_nesterov: how far ahead the gradient is taken, in average steps")
    velocity_decay: float = key(0.99, "ema_nesterov: decay of the average step")
    ramp_steps: int = key(0, "ema_nesterov, transported_scion: steps over which the look ahead grows from 0")

    def __post_init__(self) -> None:
        require_choice("optim.matrix.rule", self.rule, MATRIX_RULES)
        require_choice("optim.matrix.method", self.method, ORTHOGONALISATIONS)
        require_choice("optim.matrix.scale", self.scale, UPDATE_SCALES)
        require_choice("optim.matrix.dtype", self.dtype, PRECISIONS)
        require_choice("optim.matrix.lines", self.lines, LINES)
        require(self.lr > 0, "optim.matrix.lr", "must be positive")
        for name in ("momentum", "row_beta2", "velocity_decay"):
            require(0 <= getattr(self, name) < 1, f"optim.matrix.{name}", "must lie in [0, 1)")
        for name in ("weight_decay", "lookahead", "ramp_steps"):
            require(getattr(self, name) >= 0, f"optim.matrix.{name}", "must not be negative")


@dataclass(frozen=True)
class ScionConfig:
    norms: tuple[str, ...] = key(
        (
            "*embed_tokens.weight=column:embedding",
            "*lm_head.weight=sign@60",
            "*norm.weight=frobenius:rms",
            "*bias=frobenius:rms",
            "*=spectral",
        ),
        "'pattern=norm' or 'pattern=norm@radius', quoted; the first that matches a parameter's name counts. "
        f"Norms: {', '.join(NORMS)}, schatten:P",
    )
    constrained: bool = key(False, "keep the weights in the norm's ball of this radius: decay by lr")
    transport: float = key(
        1.0, "transported_scion: c; gradients are taken c*momentum/(1-momentum) steps ahead"
    )
    transport_cap: float = key(1e9, "transported_scion: the most steps ahead")

    def __post_init__(self) -> None:
        for entry in self.norms:
            pattern, norm, radius = parse_norm_entry(entry)
            require(bool(pattern), "optim.scion.norms", f"{entry!r} has no pattern before '='")
            require(is_norm(norm), "optim.scion.norms", f"{norm!r} is none of {', '.join(NORMS)}, schatten:P")
            require(0 < radius < 1e9, "optim.scion.norms", f"the radius of {entry!r} must be positive")
        for name in ("transport", "transport_cap"):
            require(getattr(self, name) >= 0, f"optim.scion.{name}", "must not be negative")


def is_norm(name: str) -> bool:
    """Whether `optim.geometry.parse_norm` knows the name."""
    return name in NORMS or re.fullmatch(r"schatten:(inf|[1-9]\d*(\.\d+)?)", name) is not None


def parse_norm_entry(entry: str) -> tuple[str, str, float]:
    """(pattern, norm, radius) of "pattern=norm@radius". Raises `ConfigError`."""
    pattern, _, rest = entry.partition("=")
    norm, _, radius = rest.partition("@")
    try:
        return pattern, norm, float(radius or 1)
    except ValueError:
        raise ConfigError(f"optim.scion.norms: {radius!r} of {entry!r} is not a number") from None


@dataclass(frozen=True)
class VectorOptimConfig:
    lr: float = key(0.003, "peak learning rate of embeddings, head, norms and biases (AdamW)")
    beta1: float = key(0.9, "decay of the first moment")
    beta2: float = key(0.95, "decay of the second moment")
    eps: float = key(1e-8, "added to the root of the second moment")
    weight_decay: float = key(0.0, "decoupled, on embeddings and head only")

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.vector.lr", "must be positive")
        require(0 <= self.beta1 < 1, "optim.vector.beta1", "must lie in [0, 1)")
        require(0 <= self.beta2 < 1, "optim.vector.beta2", "must lie in [0, 1)")
        require(self.eps > 0, "optim.vector.eps", "must be positive")
        require(self.weight_decay >= 0, "optim.vector.weight_decay", "must not be negative")


@dataclass(frozen=True)
class NoiseConfig:
    inject: str = key("none", f"noise added to the averaged gradient before any rule: {', '.join(NOISES)}")
    tail: float = key(1.8, "injected: degrees of freedom of student, index of stable in (0, 2]")
    moment: float = key(1.5, "injected: p in (1, 2], below the tail; the moment that is set")
    scale: float = key(0.0, "injected: sigma, with E|noise|^p = sigma^p of every entry of the gradient")
    measure_every_steps: int = key(0, "steps between measurements of the gradients' own noise; 0: never")
    samples: int = key(2, "measured: micro-batches per worker")
    norm: str = key("spectral", "measured: the norm, whose dual is measured too, by name (optim/geometry.py)")

    def __post_init__(self) -> None:
        require_choice("optim.noise.inject", self.inject, NOISES)
        require(1 < self.moment <= 2, "optim.noise.moment", f"{self.moment:g} must lie in (1, 2]")
        if self.inject in ("student", "stable"):
            least = f"{self.tail:g} must be above optim.noise.moment={self.moment:g}, or that is infinite"
            require(self.tail > self.moment, "optim.noise.tail", least)
            require(self.inject == "student" or self.tail <= 2, "optim.noise.tail", "is at most 2 for stable")
        for name in ("scale", "measure_every_steps"):
            require(0 <= getattr(self, name) < 1e12, f"optim.noise.{name}", "must not be negative")
        require(self.samples >= 2, "optim.noise.samples", "must be at least 2")
        require(is_norm(self.norm), "optim.noise.norm", f"{self.norm!r} is none of {', '.join(NORMS)}")


@dataclass(frozen=True)
class OptimConfig:
    matrix: MatrixOptimConfig = key(MatrixOptimConfig, "hidden matrices")
    vector: VectorOptimConfig = key(VectorOptimConfig, "everything else")
    scion: ScionConfig = key(ScionConfig, "norms of scion and transported_scion")
    noise: NoiseConfig = key(NoiseConfig, "heavy-tailed noise, injected and measured")
    clip: float = key(1.0, "global norm at which the gradient is clipped, before any rule; 0 turns it off")
    inspect_every_steps: int = key(
        10, "steps between measurements of the optimizer itself: updates and phases"
    )

    def __post_init__(self) -> None:
        require(self.inspect_every_steps >= 1, "optim.inspect_every_steps", "must be at least 1")
        require(self.clip >= 0, "optim.clip", "must not be negative")
        clean = self.noise.inject == "none" or self.clip == 0
        require(clean, "optim.noise.inject", "needs optim.clip=0: the noise comes after clipping")
        sized = self.noise.inject == "none" or self.noise.scale > 0
        require(sized, "optim.noise.scale", f"must be positive for optim.noise.inject={self.noise.inject}")

    @property
    def looks_ahead(self) -> bool:
        """Whether gradients are taken at another point than the weights (`optim.rules.Rule.looks_ahead`)."""
        ahead = {
            "ema_nesterov": self.matrix.lookahead > 0,
            "transported_scion": min(self.scion.transport, self.scion.transport_cap, self.matrix.momentum)
            > 0,
        }
        return ahead.get(self.matrix.rule, False)


@dataclass(frozen=True)
class ScheduleConfig:
    tokens: int = key(409_600, "tokens to train on; rounded down to whole steps")
    warmup_fraction: float = key(0.03, "share of the steps in which the learning rate rises linearly")
    decay_fraction: float = key(0.5, "share of the steps, the last, in which it falls")
    decay: str = key("linear", "form of the fall: linear or cosine")
    final_fraction: float = key(0.05, "learning rate at the end, as a share of the peak")

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "schedule.tokens", "must be at least 1")
        require_choice("schedule.decay", self.decay, DECAYS)
        for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
            require(0 <= getattr(self, name) <= 1, f"schedule.{name}", "must lie between 0 and 1")
        total = self.warmup_fraction + self.decay_fraction
        require(
            total <= 1, "schedule.warmup_fraction", f"with schedule.decay_fraction makes {total:g}, above 1"
        )


@dataclass(frozen=True)
class ZeroConfig:
    stage: int = key(1, "DeepSpeed ZeRO stage: 0, 1, 2 or 3")
    init: bool = key(False, "stage 3: partition the weights while the model is built (zero.Init)")
    offload_optimizer: bool = key(False, "keep master weights and optimizer state in CPU memory")
    bucket_elements: int = key(50_000_000, "elements per communication bucket")

    def __post_init__(self) -> None:
        require(self.stage in (0, 1, 2, 3), "zero.stage", f"{self.stage} is not one of 0, 1, 2, 3")
        require(not self.init or self.stage == 3, "zero.init", "needs zero.stage=3")
        require(not self.offload_optimizer or self.stage > 0, "zero.offload_optimizer", "needs zero.stage>=1")
        require(self.bucket_elements >= 1, "zero.bucket_elements", "must be at least 1")


@dataclass(frozen=True)
class WorkersConfig:
    count: int = key(2, "training workers (ranks)")
    gpu: bool = key(False, "one GPU per worker (NCCL); otherwise CPU (gloo)")
    cpus: float = key(1.0, "CPUs that Ray reserves per worker; also the worker's threads on CPU")
    accelerator: str | None = key(None, "Ray accelerator type to ask for, such as A40")
    max_failures: int = key(
        0, "times that Ray restarts the workers from the newest checkpoint after a failure"
    )
    min_count: int | None = key(
        None, "workers with which a run goes on if a node is lost; null: it waits until all can run again"
    )

    def __post_init__(self) -> None:
        require(self.count >= 1, "workers.count", "must be at least 1")
        require(self.cpus > 0, "workers.cpus", "must be positive")
        within = self.min_count is None or 1 <= self.min_count <= self.count
        require(within, "workers.min_count", f"must lie between 1 and workers.count={self.count}")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = key(25, "steps between checkpoints; one more is written at the end")
    keep: int = key(2, "newest complete checkpoints to keep")

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "checkpoint.every_steps", "must be at least 1")
        require(self.keep >= 1, "checkpoint.keep", "must be at least 1")


@dataclass(frozen=True)
class EvaluationConfig:
    every_steps: int = key(25, "steps between validation losses; also taken at step 0 and at the end")
    sequences: int = key(64, "held-out sequences in each, the same every time")
    tuning_sequences: int = key(
        0, "held-out sequences besides these, for choosing settings; logged as tuning_loss where above 0"
    )
    prompts: tuple[str, ...] = key(("The name of the", "Returns a list of"), "prompts continued at the end")
    sample_tokens: int = key(48, "tokens sampled for each prompt; 0 turns sampling off")

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "evaluation.every_steps", "must be at least 1")
        require(self.sequences >= 1, "evaluation.sequences", "must be at least 1")
        require(self.tuning_sequences >= 0, "evaluation.tuning_sequences", "must not be negative")
        require(self.sample_tokens >= 0, "evaluation.sample_tokens", "must not be negative")


@dataclass(frozen=True)
class RecordConfig:
    every_steps: int = key(
        1,
        "steps between lines of metrics.jsonl with a loss, the mean over them; evaluations that fall "
        "between have lines of their own",
    )
    ceilings: str | None = key(
        None,
        "report of cluster.preflight; mfu_of_measured is a share of what its GPUs reached in a product",
    )
    wandb: str = key("auto", "auto (online with a key, else offline), offline, online or disabled")
    project: str = key("asuncion", "Weights & Biases project")
    group: str | None = key(None, "Weights & Biases group")

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "record.every_steps", "must be at least 1")
        require_choice("record.wandb", self.wandb, WANDB_MODES)


@dataclass(frozen=True)
class TrainConfig:
    launcher: str = key("ray", "ray (Ray Train) or torch (torchrun, or one process): the same loop")
    precision: str = key(
        "auto",
        "weights and activations: bf16 (with fp32 master weights), fp32, or 'auto': bf16, but fp32 on CPUs "
        "without bf16 arithmetic",
    )
    run: RunConfig = key(RunConfig, "")
    data: DataConfig = key(DataConfig, "")
    model: ModelConfig = key(ModelConfig, "")
    batch: BatchConfig = key(BatchConfig, "")
    schedule: ScheduleConfig = key(ScheduleConfig, "")
    optim: OptimConfig = key(OptimConfig, "")
    zero: ZeroConfig = key(ZeroConfig, "")
    workers: WorkersConfig = key(WorkersConfig, "")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "")
    evaluation: EvaluationConfig = key(EvaluationConfig, "")
    record: RecordConfig = key(RecordConfig, "")
    session: SessionConfig = key(SessionConfig, "")

    def __post_init__(self) -> None:
        require_choice("launcher", self.launcher, LAUNCHERS)
        require_choice("precision", self.precision, PRECISIONS)
        whole = self.zero.stage < 3 or not self.optim.noise.measure_every_steps
        require(
            whole, "optim.noise.measure_every_steps", "needs whole weights on every worker: zero.stage<=2"
        )

    @property
    def is_bf16(self) -> bool:
        """Whether weights and activations are bf16, and not fp32."""
        assert self.precision != "auto", "training.config.load settles it"
        return self.precision == "bf16"

    @property
    def run_directory(self) -> Path:
        """`<run.directory>/<run.name>`, absolute."""
        return (Path(self.run.directory).expanduser() / self.run.name).absolute()


def load(*, file: Path | None = None, dotlist: Sequence[str] = (), settle: bool = True) -> TrainConfig:
    """The training configuration: defaults <- `file` <- `dotlist`. Raises `ConfigError`.

    Args:
        settle: let this machine decide what `precision=auto` is. False leaves it to the one that trains.
    """
    config = layered.load(TrainConfig, file=file, dotlist=dotlist)
    return settled(config) if settle else config


def settled(config: TrainConfig) -> TrainConfig:
    """With a precision in place of `auto`: bf16 on GPUs, on CPUs what `optim.precision` says of this one."""
    if config.precision != "auto":
        return config
    if config.workers.gpu:
        return replace(config, precision="bf16")
    import torch

    from optim.precision import compute_dtype

    bf16 = compute_dtype(torch.device("cpu")) == torch.bfloat16
    return replace(config, precision="bf16" if bf16 else "fp32")
