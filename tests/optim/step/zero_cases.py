"""What ZeRO's stages are tried on: cases, a run of each on real ranks, and the one-process oracle."""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.config import load
from optim import rules
from optim.groups import Member, attention_splits
from optim.step.zero import ZeroOptimizer
from tests.ranks import spawn
from training.config import TrainConfig
from training.run import engine
from training.run.context import Context
from training.run.engine import (
    DTYPES,
    assign,
    build_deepspeed_engine,
    make_noise,
    make_rules,
    peak_lrs,
    zero_init,
)

NUM_STEPS, MICRO_BATCH, LENGTH, VOCABULARY = 3, 4, 5, 16


STAGES = [(0, False), (1, False), (2, False), (3, False), (3, True)]


HEADS = {"num_heads": 3, "num_kv_heads": 1}  # of 4 rows each, in `Network.qkv_proj`


class Network(nn.Module):
    """Every kind of parameter, in shapes that shard borders cut: table, bias, norm, square, tall and wide.

    `qkv_proj` is three maps one above the other. `idle` takes no part, so it never has a gradient: only
    decay moves it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 12)
        self.up = nn.Linear(12, 20)
        self.qkv_proj = nn.Linear(12, 20, bias=False)
        self.down = nn.Linear(20, 12, bias=False)
        self.square = nn.Linear(12, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.idle = nn.Linear(7, 3, bias=False)
        self.lm_head = nn.Linear(12, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        h = self.embed_tokens(tokens)
        h = self.norm(h + self.down(torch.tanh(self.up(h)) + self.qkv_proj(h))) + self.square(h)
        return F.cross_entropy(self.lm_head(h).float().flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class ZeroCase:
    """A run of NUM_STEPS.

    Attributes:
        sub_group: elements of one of stage 3's sub-groups, each a call of `step`; 0 is DeepSpeed's default.
        matrix: more keys of optim.matrix.
        by_name: optim.by_name.
        after: after each step rows of `square` are scaled, and an average of the weights is kept.
    """

    stage: int
    init: bool = False
    accumulation: int = 1
    clip: float = 0.0
    precision: str = "fp32"
    nesterov: bool = True
    offload: bool = False
    per_head: bool = False
    sub_group: int = 0
    rule: str = "muon"
    noise: str = "none"
    matrix: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()
    after: bool = False

    def __str__(self) -> str:
        fields = [f for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default]
        return "-".join([f"stage {self.stage}", *(f"{f.name}={getattr(self, f.name)}" for f in fields)])

    def config(self) -> TrainConfig:
        return configuration(self)

    def members(self) -> list[Member]:
        splits = attention_splits(**HEADS, head_dim=4, per_head=self.per_head)
        return assign(self.config().optim, Network().named_parameters(), splits=splits)

    @property
    def row_factors(self) -> dict[str, Tensor]:
        return {"square.weight": torch.linspace(0.5, 1, 12)} if self.after else {}

    @property
    def num_matrices(self) -> int:
        by_label = make_rules(self.config().optim)
        return sum(len(member.blocks) for member in self.members() if by_label[member.label].whole)


@functools.cache
def configuration(case: ZeroCase) -> TrainConfig:
    keys = {
        "zero.stage": case.stage,
        "zero.init": str(case.init).lower(),
        "zero.offload_optimizer": str(case.offload).lower(),
        "optim.clip": case.clip,
        "precision": case.precision,
        "optim.matrix.dtype": case.precision,
        "optim.matrix.rule": case.rule,
        "optim.matrix.nesterov": str(case.nesterov).lower(),
        "optim.matrix.per_head": str(case.per_head).lower(),
        "optim.vector.weight_decay": 0.05,
        "optim.noise.inject": case.noise,
        "optim.noise.scale": 0.1,
        "optim.average_decay": 0.6 * case.after,
        "model.hidden_size": 12,
        **{f"model.{name}": number for name, number in HEADS.items()},
    }
    if case.precision == "bf16":  # a sign turns with a small gradient's rounding; far ahead, so does all
        keys["optim.scion.transport_cap"] = 2
        keys["optim.scion.norms"] = (
            "['*embed_tokens.weight=column:embedding','*lm_head.weight=row','*=spectral']"
        )
    if case.by_name:
        keys["optim.by_name"] = str(list(case.by_name))
    matrix = [f"optim.matrix.{key}" for key in case.matrix]
    return load(TrainConfig, dotlist=[*(f"{name}={value}" for name, value in keys.items()), *matrix])


LARGER = ("lines=larger", "row_divisor=max", "row_length=kept", "cautious=true", "polar_steps=7")


BY_NAME = ("up*: rule=normuon lr=0.01", "*qkv*: rule=muon_plus lines=column_row scale=rms", "idle*: rule=sgd")


OFFLOADED = [(1, False), (2, False), (3, False), (3, True)]


CASES = [
    *(ZeroCase(*stage, num, clip) for stage in STAGES for num in (1, 4) for clip in (0.0, 0.05)),
    *(ZeroCase(*stage, accumulation=4, clip=0.05, precision="bf16") for stage in STAGES),
    *(ZeroCase(*stage, accumulation=4, clip=0.05, offload=True) for stage in OFFLOADED),
    *(ZeroCase(*stage, accumulation=4, clip=0.05, precision="bf16", offload=True) for stage in OFFLOADED),
    *(ZeroCase(*stage, per_head=True) for stage in STAGES),
    *(ZeroCase(3, init, sub_group=150) for init in (False, True)),
    ZeroCase(2, nesterov=False),
    # Every other rule in one stage, and those with a state or a point of another kind in more.
    *(ZeroCase(2, clip=0.05, rule=rule) for rule in ("scion", "muon_plus", "sgd", "signum", "adamw")),
    *(ZeroCase(1, rule=rule) for rule in ("muon_eq", "aurora", "mars")),
    *(ZeroCase(stage, rule="normuon", matrix=LARGER) for stage in (0, 1, 3)),
    *(ZeroCase(stage, rule="normuon", matrix=("ahead=transport",)) for stage in (2, 3)),
    *(ZeroCase(stage, by_name=BY_NAME) for stage in (0, 1, 3)),
    ZeroCase(3, rule="mars", by_name=("*qkv*: rule=adamw",), precision="bf16"),
    *(ZeroCase(*stage, after=True) for stage in STAGES),
    ZeroCase(3, precision="bf16", matrix=("ahead=transport",), after=True),
    ZeroCase(1, offload=True, after=True),
    ZeroCase(2, rule="scion", by_name=("square*: rule=transported_scion lr=0.01",)),
    *(ZeroCase(*stage, clip=0.05, rule="transported_scion") for stage in STAGES[1:]),
    *(ZeroCase(*stage, precision="bf16", rule="transported_scion") for stage in STAGES),
    *(ZeroCase(stage, offload=True, rule="transported_scion") for stage in (2, 3)),
    ZeroCase(3, sub_group=150, rule="transported_scion"),
    ZeroCase(1, rule="ema_nesterov"),
    *(ZeroCase(*stage, noise="student") for stage in STAGES),
    ZeroCase(2, offload=True, noise="stable"),
    ZeroCase(3, precision="bf16", rule="ema_nesterov"),
]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """The same weights for every case, whole or partitioned."""
    for index, (_, parameter) in enumerate(model.named_parameters()):
        drawn = torch.randn(getattr(parameter, "ds_shape", parameter.shape), generator=seeded(index)) * 0.3
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.copy_(drawn)
        else:
            parameter.copy_(drawn)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(case: ZeroCase, world_size: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, each [step, micro-batch, rank, sequence, position]."""
    size = (NUM_STEPS, case.accumulation, world_size, MICRO_BATCH, LENGTH)
    return (torch.randint(VOCABULARY, size, generator=seeded(seed)) for seed in (98, 99))


def build(case: ZeroCase, **zero_keys: Any):
    """`build_deepspeed_engine` of the case, and of DeepSpeed's keys which that does not set."""
    ours = engine.deepspeed_config
    if case.sub_group:
        zero_keys["sub_group_size"] = case.sub_group

    def with_keys(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = ours(*arguments, **options)
        return found | {"zero_optimization": found["zero_optimization"] | zero_keys}

    with mock.patch.object(engine, "deepspeed_config", with_keys):
        with zero_init(case.config()):
            model = Network()
        fill(model)
        return build_deepspeed_engine(
            model, case.config(), micro_batch=MICRO_BATCH, accumulation=case.accumulation
        )


def run_case(context: Context, case: ZeroCase, *, num_steps: int = NUM_STEPS, **zero_keys: Any) -> dict:
    """This rank's shards, gradient norms and counts after `num_steps` steps under DeepSpeed."""
    engine, optimizer, _ = build(case, **zero_keys)
    optimizer.inspect, optimizer.row_factors = True, case.row_factors
    keys = sorted(name for _, _, tensors in optimizer.shards() for name in tensors)
    tokens, targets = batches(case, context.world_size)
    norms = []
    for step in range(num_steps):
        for micro in range(case.accumulation):
            loss = engine(tokens[step, micro, context.rank], targets[step, micro, context.rank])
            engine.backward(loss)
            engine.step()
        norms.append(optimizer.gradient_norm)

    def loss_now() -> float:
        with torch.no_grad():
            return engine(tokens[0, 0, 0], targets[0, 0, 0]).item()

    losses = [loss_now()]
    for averaged in (False, True)[: 1 + case.after]:
        with optimizer.at_weights(averaged=averaged):
            losses.append(loss_now())
    losses.append(loss_now())
    whole = engine.module.named_parameters() if case.stage < 3 else ()
    return {
        "losses": losses,
        "shards": copied_shards(optimizer),
        "norms": norms,
        "transforms": optimizer.num_transforms,
        "calls": len(optimizer.plans),
        "bytes_sent": optimizer.bytes_sent,
        "text": optimizer.describe(),
        "health": optimizer.health(layers=True),
        "state_keys": keys,
        "weights": {name: parameter.detach().clone() for name, parameter in whole},
    }


def copied_shards(optimizer: ZeroOptimizer) -> list[tuple[str, int, dict[str, Tensor]]]:
    return [
        (name, start, {key: tensor.clone() for key, tensor in tensors.items()})
        for name, start, tensors in optimizer.shards()
    ]


def run_cases(context: Context, cases: list[ZeroCase]) -> list[dict]:
    return [run_case(context, case) for case in cases]


@dataclass
class Expected:
    """What one process finds on whole fp32 parameters: name -> tensors, and a value of each step."""

    tensors: dict[str, dict[str, Tensor]]
    norms: list[float]
    update_rms: float = 0.0  # of the last step, over all matrices
    losses: list[float] = field(default_factory=list)  # at the end: at the last point, weights, averages


@functools.cache
def oracle(case: ZeroCase, world_size: int, num_steps: int = NUM_STEPS) -> Expected:
    """The same steps in one process."""
    config, model = case.config(), Network()
    fill(model)
    model = model.to(DTYPES[case.precision])
    members = {member.name: member for member in case.members()}
    by_label, lrs = make_rules(config.optim), peak_lrs(config.optim)
    masters = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    for name, master in masters.items():
        if by_label[members[name].label].whole and master.dim() == 1:
            masters[name] = master[:, None]  # a vector is one column
    own_rule = {name: by_label[each.label] for name, each in members.items()}
    lines = {
        name: [own_rule[name].num_lines(rows, masters[name].shape[1]) for rows in each.blocks]
        for name, each in members.items()
    }
    states = {
        name: rules.new_state(own_rule[name], master, num_lines=sum(lines[name]))
        for name, master in masters.items()
    }
    tokens, targets = batches(case, world_size)
    found = Expected({name: {"master": masters[name], **states[name]} for name in masters}, [])
    for step in range(num_steps):
        gradients = mean_gradients(model, masters, tokens[step].flatten(0, 1), targets[step].flatten(0, 1))
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()])).item()
        found.norms.append(norm)
        scale = min(1.0, case.clip / (norm + 1e-6)) if case.clip else 1.0
        mean_squares = []
        for name, parameter in model.named_parameters():
            member, rule = members[name], own_rule[name]
            lr, rows = lrs[member.label], list(member.blocks)
            gradient, before = gradients[name] * scale, masters[name].clone()
            if injected := make_noise(config):
                pair = step // rule.gradients_per_update
                drawn = injected[0].sample(name, start=0, stop=gradient.numel(), seed=injected[1], step=pair)
                gradient = gradient + drawn.view_as(gradient)
            whole, points = {"master": masters[name], "gradient": gradient, **states[name]}, []
            cut = {key: lines[name] if key in rule.line_state_names else rows for key in whole}
            parts = (each.split(cut[key]) if rows else [each] for key, each in whole.items())
            for block in zip(*parts, strict=True):
                own = dict(zip(whole, block, strict=True))
                master, part = own.pop("master"), own.pop("gradient")
                points.append(rules.step(rule, master, part, own, lr=lr, step=step + 1))
            if member.kind == "matrix" or rule.whole:
                moved = (before * (1 - lr * rule.weight_decay) - masters[name]) / lr
                mean_squares += [block.square().mean() for block in moved.split(rows)]
            if case.after:
                points = after_step(case, name, found.tensors[name], points, step=step + 1)
            with torch.no_grad():
                parameter.copy_((torch.cat(points) if rows else points[0]).view_as(parameter))
            if rule.looks_ahead:
                found.tensors[name]["point"] = parameter.detach().clone()
        found.update_rms = torch.stack(mean_squares).mean().sqrt().item()
    averages = {name: tensors["average"] for name, tensors in found.tensors.items()} if case.after else None
    for shown in ({}, masters, averages)[: 2 + case.after]:
        found.losses.append(loss_at(model, shown, tokens[0, 0, 0], targets[0, 0, 0]))
    return found


def after_step(
    case: ZeroCase, name: str, own: dict[str, Tensor], points: list[Tensor], *, step: int
) -> list[Tensor]:
    """Scaled rows, and the average. Points that are the weights are views of them."""
    if name in case.row_factors:
        factors = case.row_factors[name][:, None]
        own["master"] *= factors
        points = [point * factors for point in points] if case.config().optim.looks_ahead else points
    own.setdefault("average", torch.zeros_like(own["master"])).lerp_(own["master"], max(0.4, 1 / step))
    return points


def mean_gradients(
    model: nn.Module, like: dict[str, Tensor], tokens: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """fp32, over the batches along the first dimension, in the shapes of `like`."""
    gradients = {name: torch.zeros_like(each) for name, each in like.items()}
    for batch in zip(tokens, targets, strict=True):
        model.zero_grad()
        model(*batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] += (parameter.grad.float() / len(tokens)).view_as(gradients[name])
    return gradients


@torch.no_grad()
def loss_at(model: nn.Module, weights: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> float:
    """The loss with these weights in place of the model's."""
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        parameter.copy_(weight.view_as(parameter))
    return model(tokens, targets).item()


def assemble(results: list[dict]) -> dict[str, dict[str, Tensor]]:
    """Whole 1-D tensors from all ranks' shards; fails unless they tile every parameter exactly."""
    pieces: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for result in results:
        for name, start, tensors in result["shards"]:
            for key, tensor in tensors.items():
                pieces.setdefault((name, key), []).append((start, tensor))
    whole: dict[str, dict[str, Tensor]] = {}
    for (name, key), parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        position = 0
        for start, tensor in parts:
            assert start == position, f"{name} {key}: shards leave a gap or overlap at {position}"
            position += tensor.numel()
        whole.setdefault(name, {})[key] = torch.cat([tensor for _, tensor in parts])
    return whole


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


# Three ranks cut every shape unevenly and leave some shards empty; one case for each stage suffices there.
EVERY_STAGE = [ZeroCase(*stage, accumulation=4, clip=0.05) for stage in STAGES]


WORLDS = {
    1: EVERY_STAGE,
    2: CASES,
    3: [*EVERY_STAGE, ZeroCase(1, noise="student"), ZeroCase(2, offload=True), ZeroCase(3, sub_group=150)],
}


@functools.cache
def outcomes(world_size: int) -> dict[ZeroCase, list[dict]]:
    """Each case's results of all ranks. One set of processes runs all cases of a world size."""
    cases = WORLDS[world_size]
    per_rank = spawn(run_cases, cases, world_size=world_size)
    return {case: [results[i] for results in per_rank] for i, case in enumerate(cases)}
