"""The keys of a projection (`python -m training.projection`). No torch."""

from dataclasses import dataclass

from cluster.config import key, require
from cluster.record.record import WANDB_MODES
from training.model.shapes import SHAPES
from training.optim_config import MUON_RULES

# 25 GbE: what NHR@FAU's nodes of 8 A40 have (https://doc.nhr.fau.de/clusters/alex/); 25/8 = 3.1 GB/s.
NODE_GB_PER_S = 3.1


@dataclass(frozen=True)
class LinkConfig:
    # PCIe 4.0 x16 carries 31.5 GB/s each way. optim.bench assumes 20 too; `make preflight` measures it.
    pcie_gb_per_s: float = key(
        20.0, "bus bandwidth of a node's ring over PCIe 4.0 x16, GB/s; 31.5 at the most", above=0
    )
    # Four links of 14.0625 GB/s each way: NVIDIA GA102 whitepaper, "Third-Generation NVLink".
    nvlink_gb_per_s: float = key(56.25, "NVLink bridge between two A40, GB/s each way (datasheet)", above=0)
    node_gb_per_s: float | None = key(
        None,
        "network of a node, GB/s each way; null: the preflight's measurement in the baseline, "
        f"else {NODE_GB_PER_S}: 25 GbE at its best",
        above=0,
    )


@dataclass(frozen=True)
class AssumedConfig:
    mfu: float = key(0.4, "forward and backward pass, as a fraction of the datasheet's peak", above=0, most=1)
    product_fraction: float = key(
        0.6, "orthogonalisation, as a fraction of the datasheet's peak", above=0, most=1
    )
    memory_fraction: float = key(0.8, "passes over memory, as a fraction of its bandwidth", above=0, most=1)


@dataclass(frozen=True)
class ProjectionConfig:
    baseline: str | None = key(
        None,
        "file of `make baseline`; null: tests/baselines/*_baseline.json of this device, else the datasheet",
    )
    baseline_shape: str | None = key(None, "shape of the baseline's training cell; null: that of `shape`")
    device: str = key("A40", "GPU, by its name in cluster/measure/hardware.py or in the baseline")
    gpus_per_node: int = key(8, "GPUs of a node", least=1)
    nodes: tuple[int, ...] = key((1, 8, 64, 512), "numbers of nodes, a table for each", least=1)
    stages: tuple[int, ...] = key((1, 2, 3), "ZeRO stages", choices=(1, 2, 3))
    shape: str = key("llama-1b4", "model, as in training/model/shapes.py", choices=tuple(SHAPES))
    rule: str = key("muon", "rule of the hidden matrices", choices=(*MUON_RULES, "adamw"))
    tokens: float = key(28e9, "tokens to train on: 20 per parameter of llama-1b4", least=1)
    batch_tokens: int = key(
        524_288, "tokens per optimizer step, at least; it grows to one sequence per GPU", least=1
    )
    sequence_length: int = key(2048, "tokens per sequence", least=1)
    micro_sequences: int = key(4, "sequences per GPU and forward pass, at most", least=1)
    bucket_elements: int = key(200_000_000, "zero.bucket_elements of the run", least=1)
    activation_checkpointing: bool = key(
        False, "counted in the memory only; the baseline contains its extra compute"
    )
    wandb: str = key("auto", "W&B: auto is online with a key, else offline", choices=WANDB_MODES)
    project: str = key("asuncion", "W&B project")
    directory: str = key("outputs/projection", "its run directory")
    links: LinkConfig = key(LinkConfig, "what the GPUs send through")
    assumed: AssumedConfig = key(AssumedConfig, "without a baseline")

    def __post_init__(self) -> None:
        for name in ("nodes", "stages"):
            require(bool(getattr(self, name)), name, "is empty; name at least one, as in [1]")
        aligned = self.batch_tokens % self.sequence_length == 0
        require(aligned, "batch_tokens", f"{self.batch_tokens} is not a multiple of {self.sequence_length=}")
