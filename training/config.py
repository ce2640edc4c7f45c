"""The keys of a training run. The defaults are the embedded run: small, on CPU, a few minutes long.

`training/configs/*.yaml` change what differs elsewhere. Quantities that follow from these (steps,
accumulation, memory, FLOPs) are derived in `training.plan`, not configured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import config as layered
from cluster.config import key, require
from cluster.record.record import WANDB_MODES
from cluster.session import SessionConfig
from training.data.config import DataConfig
from training.optim_config import OptimConfig

LAUNCHERS = ("ray", "torch")
SEEDS = range(1 << 63)  # every generator takes these, each for a stream of its own
PRECISIONS = ("auto", "bf16", "fp32")
DECAYS = ("linear", "cosine")


@dataclass(frozen=True)
class RunConfig:
    name: str = key(
        "first-light",
        "the run; the same name again resumes it",
        pattern=(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "must be letters, digits, '-', '_' and '.'"),
    )
    directory: str = key("outputs", "where runs are kept; on a cluster, storage that every node sees")
    seed: int = key(1234, "initial weights, sample order and sampled text", least=0, below=SEEDS.stop)


@dataclass(frozen=True)
class ModelConfig:
    shape: str = key("llama-5m", "a name from training/model/shapes.py, or a Hugging Face config.json")
    num_layers: int | None = key(None, "replaces the shape's number of layers")
    hidden_size: int | None = key(None, "replaces the shape's hidden size")
    ffn_size: int | None = key(None, "replaces the shape's feed-forward size")
    num_heads: int | None = key(None, "replaces the shape's number of query heads")
    num_kv_heads: int | None = key(None, "replaces the shape's number of key and value heads")
    vocab_size: int | None = key(None, "replaces the shape's vocabulary")
    qk_norm: bool | None = key(None, "normalise each head's queries and keys, as Qwen3; default: the shape's")
    activation_checkpointing: bool = key(False, "recompute each layer in the backward pass to save memory")
    checkpoint_every: int = key(
        1, "with activation_checkpointing: recompute only every N-th layer, from the first", least=1
    )
    compile: bool | None = key(None, "compile layers with torch.compile; default: on GPUs")
    loss_tokens: int | None = key(
        None, "tokens whose logits exist at one time; 0: all, by autograd; default: 4096", least=0
    )

    @property
    def recomputed_every(self) -> int:
        """N, where every N-th layer is recomputed in the backward pass; 0: none is."""
        return self.checkpoint_every if self.activation_checkpointing else 0


@dataclass(frozen=True)
class BatchConfig:
    tokens: int = key(4096, "tokens per optimizer step, over all workers", least=1)
    sequence_length: int = key(256, "tokens per sequence", least=1)
    micro_sequences: int = key(4, "sequences per worker and forward pass; sets the accumulation", least=1)
    document_masks: bool = key(
        False, "in a sequence of several documents no token sees another document; in validation too"
    )


@dataclass(frozen=True)
class ScheduleConfig:
    tokens: int = key(409_600, "tokens to train on; rounded down to whole steps", least=1)
    warmup_fraction: float = key(
        0.03, "share of the steps in which the learning rate rises linearly", least=0, most=1
    )
    decay_fraction: float = key(0.5, "share of the steps, at the end, in which it falls", least=0, most=1)
    decay: str = key("linear", "form of the fall", choices=DECAYS)
    final_fraction: float = key(0.05, "learning rate at the end, as a share of the peak", least=0, most=1)

    def __post_init__(self) -> None:
        total = self.warmup_fraction + self.decay_fraction
        problem = f"with schedule.decay_fraction makes {total:g}, above 1"
        require(total <= 1, "schedule.warmup_fraction", problem)


@dataclass(frozen=True)
class ZeroConfig:
    stage: int = key(1, "DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    init: bool = key(False, "stage 3: partition the weights while the model is built (zero.Init)")
    offload_optimizer: bool = key(False, "keep master weights and optimizer state in CPU memory")
    bucket_elements: int = key(50_000_000, "elements per communication bucket", least=1)
    communication_dtype: str = key(
        "auto",
        "dtype in which workers exchange gradients, which are accumulated in fp32; auto: that of the weights",
        choices=PRECISIONS,
    )

    def __post_init__(self) -> None:
        require(not self.init or self.stage == 3, "zero.init", "needs zero.stage=3")
        require(not self.offload_optimizer or self.stage > 0, "zero.offload_optimizer", "needs zero.stage>=1")


@dataclass(frozen=True)
class WorkersConfig:
    count: int = key(2, "training workers (ranks)", least=1)
    gpu: bool = key(False, "one GPU per worker (NCCL); otherwise CPU (gloo)")
    cpus: float = key(1.0, "CPUs that Ray reserves per worker; also the worker's threads on CPU", above=0)
    accelerator: str | None = key(None, "Ray accelerator type to ask for, such as A40")
    max_failures: int = key(
        0, "times that Ray restarts the workers from the newest checkpoint after a failure", least=0
    )
    hang_seconds: float = key(
        45.0,
        "the run fails if a part of a step takes this many seconds longer than the longest before, or if "
        "anything else makes no progress for so long; 0: never",
        least=0,
    )
    min_count: int | None = key(
        None, "workers with which a run goes on if a node is lost; null: it waits until all can run again"
    )

    def __post_init__(self) -> None:
        within = self.min_count is None or 1 <= self.min_count <= self.count
        require(within, "workers.min_count", f"must lie between 1 and workers.count={self.count}")


URL = r"[a-z][a-z0-9+.-]*:(?!//[^/]*@).+"  # with its protocol


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = key(25, "steps between checkpoints; one more is written at the end", least=1)
    keep: int = key(2, "newest complete checkpoints to keep", least=1)
    keep_every_steps: int = key(
        0,
        "also keep the checkpoint of every N-th step for ever, a multiple of checkpoint.every_steps; 0: none",
        least=0,
    )
    upload: str | None = key(
        None,
        "also send each complete checkpoint to this fsspec URL, such as s3://bucket/folder, in the "
        "background; a run whose newest one is there, and not here, continues from it",
        pattern=(URL, "must be an fsspec URL without credentials, such as s3://bucket/folder"),
    )
    background: bool = key(
        True,
        "write while training goes on; it takes host memory for a copy of master weights and optimizer state",
    )
    max_rewinds: int = key(
        0,
        "times that a run goes back to the newest checkpoint before a loss spike (record.spike_deviations) "
        "and skips the batches since; 0: never",
        least=0,
    )

    def __post_init__(self) -> None:
        multiple = self.keep_every_steps % self.every_steps == 0
        problem = f"must be a multiple of checkpoint.every_steps={self.every_steps}"
        require(multiple, "checkpoint.keep_every_steps", problem)


@dataclass(frozen=True)
class EvaluationConfig:
    every_steps: int = key(
        25, "steps between validation losses; also taken at step 0 and at the end", least=1
    )
    sequences: int = key(64, "held-out sequences in each, the same every time", least=1)
    tuning_sequences: int = key(
        0, "more held-out sequences, for choosing settings; above 0, tuning_loss is logged", least=0
    )
    frequency_deciles: bool = key(False, "log the loss by how frequent a token is in the training data")
    prompts: tuple[str, ...] = key(("The name of the", "Returns a list of"), "prompts continued at the end")
    sample_tokens: int = key(48, "tokens sampled for each prompt; 0 turns sampling off", least=0)


@dataclass(frozen=True)
class RecordConfig:
    every_steps: int = key(
        1,
        "steps between lines of metrics.jsonl with a loss, which is the mean over these steps; evaluations "
        "in between have lines of their own",
        least=1,
    )
    ceilings: str | None = key(
        None, "report of cluster.preflight; mfu_of_measured is a share of the product that its GPUs reached"
    )
    spike_deviations: float = key(
        7.0,
        "report loss_spike for a loss this many robust standard deviations above the median of the last 50 "
        "lines; 0: never",
        least=0,
    )
    stalled_minutes: float = key(
        10.0,
        "report no_progress after this many minutes without a new line or checkpoint; 0: never",
        least=0,
    )
    straggler_fraction: float = key(
        0.25,
        "report a rank whose forward pass is slower than the median by this fraction for a minute; 0: never",
        least=0,
    )
    disk_free_gb: float = key(
        2.0,
        "report disk_nearly_full if less than this, or than two checkpoints, is free at run.directory",
        least=0,
    )
    profile_steps: tuple[int, ...] = key(
        (), "steps of which a trace (Perfetto) and, on GPUs, a snapshot of memory are written to profiles/"
    )
    wandb: str = key("auto", "W&B: auto is online with a key, else offline", choices=WANDB_MODES)
    upload_checkpoints: bool = key(
        False, "send the files of every checkpoint to W&B; false: only where they lie, and their hash"
    )
    project: str = key("asuncion", "Weights & Biases project")
    group: str | None = key(None, "Weights & Biases group")


@dataclass(frozen=True)
class TrainConfig:
    launcher: str = key(
        "ray", "ray: Ray Train; torch: torchrun or one process. The loop is the same", choices=LAUNCHERS
    )
    precision: str = key(
        "auto",
        "weights and activations: bf16 (with fp32 master weights) or fp32; auto: bf16, but fp32 on CPUs "
        "without bf16 arithmetic",
        choices=PRECISIONS,
    )
    load: str | None = key(
        None,
        "start from these weights, with a new schedule: hf:DIR, a Hugging Face directory",
        pattern=(r"hf:.+", "must be hf:DIR"),
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
        whole = self.zero.stage < 3 or not self.optim.noise.measure_every_steps
        problem = "needs whole weights on every worker: zero.stage<=2"
        require(whole, "optim.noise.measure_every_steps", problem)
        paired = self.optim.gradients_per_update == 1 or not self.checkpoint.max_rewinds
        require(paired, "checkpoint.max_rewinds", "would part the pairs of gradients of mars; set it to 0")
        sees = self.record.spike_deviations > 0 or not self.checkpoint.max_rewinds
        require(
            sees, "checkpoint.max_rewinds", "needs record.spike_deviations above 0, which sees the spikes"
        )

    @property
    def is_bf16(self) -> bool:
        """Whether weights and activations are bf16, and not fp32."""
        assert self.precision != "auto", "training.config.load settles it"
        return self.precision == "bf16"

    @property
    def load_directory(self) -> Path | None:
        """DIR of load=hf:DIR, absolute."""
        return Path(self.load.removeprefix("hf:")).expanduser().absolute() if self.load else None

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
    from optim.precision import cpu_has_bf16

    return replace(config, precision="bf16" if config.workers.gpu or cpu_has_bf16() else "fp32")
