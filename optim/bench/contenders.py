"""Who takes part in the race under ZeRO: optimizers under one DeepSpeed configuration, ready to step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.bench.step_race import LR, MOMENTUM, WEIGHT_DECAY, Shapes
from optim.bench.traffic import Traffic
from optim.groups import partition
from optim.rules import muon


@dataclass(frozen=True)
class BenchedOptimizer:
    """An optimizer under one DeepSpeed configuration.

    Attributes:
        kind: "ours", "null" (an optimizer that does nothing), "adamw" or "deepspeed_muon_<method>".
        setup: of the configuration: "" is DeepSpeed's default, bf16 gradients; with "_bf16_optimizer" they
            accumulate in fp32, for which DeepSpeed 0.19.8 has another class in stage 1.
    """

    kind: str
    setup: str

    @property
    def name(self) -> str:
        return self.kind + self.setup

    @property
    def null(self) -> str:
        """Whose backward is subtracted: computing and reducing the gradient under the same configuration."""
        return f"null{self.setup}"

    @property
    def ours(self) -> str:
        """Who is compared: ours under the same configuration."""
        return f"ours{self.setup}"

    @property
    def is_peer(self) -> bool:
        return self.kind not in ("ours", "null")


def contenders(stage: int) -> dict[str, BenchedOptimizer]:
    """Who races in a ZeRO stage, by name."""
    kinds = ("null", "ours", "deepspeed_muon_standard", "deepspeed_muon_gram", "adamw")
    setups = ("", "_bf16_optimizer") if stage == 1 else ("",)
    everyone = [BenchedOptimizer(kind, setup) for setup in setups for kind in kinds]
    return {contender.name: contender for contender in everyone}


class _Matrix(nn.Module):
    """One weight [r, c] and a loss ⟨weight, direction⟩, whose gradient is dense and costs one pass."""

    def __init__(self, shape: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.direction = torch.randn(shape[0] * shape[1], generator=generator).bfloat16()

    def forward(self) -> Tensor:
        return torch.dot(self.weight.view(-1), self.direction)


class _Matrices(nn.Module):
    """All matrices; their names do not look like tables, so DeepSpeed's Muon takes them."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.layers = nn.ModuleList(_Matrix(shape, generator) for shape in shapes)

    def forward(self) -> Tensor:
        return torch.stack([layer() for layer in self.layers]).sum()


class _Null(torch.optim.Optimizer):
    """Does nothing: what remains is DeepSpeed's own work around any optimizer."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


@dataclass
class _Count:
    """Of one step over all ranks: bytes sent in backward, and with the step; matrices orthogonalised."""

    backward_bytes: float
    whole_bytes: float
    newton_schulz: int


class Entry:
    """A contender that stands ready on this rank: its engine, and its optimizer if that is a client's."""

    def __init__(self, contender: BenchedOptimizer, shapes: Shapes, stage: int) -> None:
        import deepspeed

        self.contender = contender
        model = _Matrices(shapes)
        self.optimizer = _client_optimizer(contender.kind, model)
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=_deepspeed_config(contender, stage),
            dist_init_required=False,
        )
        if contender.kind == "ours":
            self.optimizer.bind(self.engine)

    def turn(self) -> tuple[float, float]:
        """One step. Seconds of backward and step, and of backward; of the slowest rank."""
        loss = self.engine()
        dist.barrier()
        started = time.perf_counter()
        self.engine.backward(loss)
        backward = time.perf_counter() - started
        self.engine.step()
        slowest = torch.tensor([time.perf_counter() - started, backward], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        whole, backward = slowest.tolist()
        return whole, backward

    def count(self, traffic: Traffic) -> _Count:
        """One step without the clock."""
        before = self.optimizer.num_transforms if self.contender.kind == "ours" else 0
        loss = self.engine()
        with _calls_of_deepspeeds_muon() as calls, traffic.counting():
            self.engine.backward(loss)
            backward_bytes = traffic.sent_bytes
            self.engine.step()
        if self.contender.kind == "ours":
            calls.append(self.optimizer.num_transforms - before)
        totals = torch.tensor([backward_bytes, traffic.sent_bytes, sum(calls)], dtype=torch.float64)
        dist.all_reduce(totals)
        backward_bytes, whole_bytes, newton_schulz = totals.tolist()
        return _Count(backward_bytes, whole_bytes, round(newton_schulz))

    def weights(self) -> Tensor:
        """All weights, whole, end to end: [elements] fp32."""
        import deepspeed

        parameters = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            return torch.cat([p.detach().float().view(-1) for p in parameters])


def _client_optimizer(kind: str, model: nn.Module) -> Any:
    """The optimizer to hand to DeepSpeed; None where its configuration names one."""
    from optim.step.zero import ZeroOptimizer

    if kind == "ours":
        rule = muon(momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, method="jordan", update_scale="jordan")
        members = partition(model.named_parameters())
        return ZeroOptimizer(members, rules={"matrix": rule}, peak_lr={"matrix": LR}, clip=0.0)
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return _Null(model.parameters(), {"lr": LR}) if kind == "null" else None


def _deepspeed_config(contender: BenchedOptimizer, stage: int) -> dict[str, Any]:
    """The same for all contenders of one setup, but for the name of DeepSpeed's own optimizer."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,  # its default of 1 would clip the orthogonalised updates of its own Muon
        # DeepSpeed's Muon refuses ZeRO-3's default, which reduces each gradient to its shards alone; so all
        # contenders all-reduce there, and it is not charged for that.
        "zero_optimization": {"stage": stage, "reduce_scatter": stage != 3, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if contender.setup:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    kind, _, method = contender.kind.rpartition("_")
    if kind == "deepspeed_muon":
        config["optimizer"] = {
            "type": "Muon",
            "params": {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "ns_method": method},
        }
    return config


def differences(entries: Mapping[str, Entry]) -> dict[str, float]:
    """Of each Muon that has taken one step: how far its update is from ours."""
    found = {}
    for name, entry in entries.items():
        if entry.contender.kind.startswith("deepspeed_muon"):
            ours = entries[entry.contender.ours].weights()
            found[name] = ((entry.weights() - ours).norm() / ours.norm()).item()
    return found


@contextmanager
def _calls_of_deepspeeds_muon() -> Iterator[list[int]]:
    """A list that gets a 1 for each matrix that DeepSpeed orthogonalises on this rank."""
    from deepspeed.runtime.zero.muon import original_muon

    calls: list[int] = []
    muon_update = original_muon.muon_update

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return muon_update(*args, **kwargs)

    original_muon.muon_update = counted  # its callers import it by name at each step
    try:
        yield calls
    finally:
        original_muon.muon_update = muon_update
