"""The optimizer contract (DESIGN.md, "The optimizer step") on real ranks, against the one-process oracle."""

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.config import load
from optim import rules
from optim.groups import partition
from optim.zero import ZeroOptimizer
from tests.ranks import spawn
from training import checkpoint
from training.checkpoint import Checkpoint
from training.config import TrainConfig
from training.context import Context
from training.engine import DTYPES, make_engine, make_rules, zero_init

pytestmark = pytest.mark.stack

NUM_STEPS, MICRO_BATCH, LENGTH, VOCABULARY = 3, 4, 5, 16
STAGES = [(0, False), (1, False), (2, False), (3, False), (3, True)]
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


class Network(nn.Module):
    """Every kind of parameter, in shapes that shard borders cut: table, bias, norm, square, tall and wide.

    `idle` takes no part, so it never has a gradient: only decay moves it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)
        self.square = nn.Linear(12, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.idle = nn.Linear(7, 3, bias=False)
        self.lm_head = nn.Linear(12, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        h = self.embed_tokens(tokens)
        h = self.norm(h + self.down(torch.tanh(self.up(h)))) + self.square(h)
        return F.cross_entropy(self.lm_head(h).float().flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Case:
    stage: int
    init: bool = False
    accumulation: int = 1
    clip: float = 0.0
    precision: str = "fp32"
    nesterov: bool = True

    def config(self) -> TrainConfig:
        keys = {
            "zero.stage": self.stage,
            "zero.init": str(self.init).lower(),
            "optim.clip": self.clip,
            "precision": self.precision,
            "optim.matrix.dtype": self.precision,
            "optim.matrix.nesterov": str(self.nesterov).lower(),
            "optim.vector.weight_decay": 0.05,
        }
        return load(TrainConfig, dotlist=[f"{name}={value}" for name, value in keys.items()])


CASES = [
    *(Case(*stage, num, clip) for stage in STAGES for num in (1, 4) for clip in (0.0, 0.05)),
    *(Case(*stage, accumulation=4, clip=0.05, precision="bf16") for stage in STAGES),
    Case(2, nesterov=False),
]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """The same weights for every case, whole or partitioned."""
    import deepspeed

    for index, (_, parameter) in enumerate(model.named_parameters()):
        drawn = torch.randn(getattr(parameter, "ds_shape", parameter.shape), generator=seeded(index)) * 0.3
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.copy_(drawn)
        else:
            parameter.copy_(drawn)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(case: Case, world_size: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, each [step, micro-batch, rank, sequence, position]."""
    size = (NUM_STEPS, case.accumulation, world_size, MICRO_BATCH, LENGTH)
    return (torch.randint(VOCABULARY, size, generator=seeded(seed)) for seed in (98, 99))


def build(case: Case):
    with zero_init(case.config()):
        model = Network()
    fill(model)
    return make_engine(model, case.config(), micro_batch=MICRO_BATCH, accumulation=case.accumulation)


def run_case(context: Context, case: Case) -> dict:
    """This rank's shards, gradient norms and counts after NUM_STEPS steps under DeepSpeed."""
    engine, optimizer, _ = build(case)
    keys = sorted(name for _, _, tensors in optimizer.shards() for name in tensors)
    tokens, targets = batches(case, context.world_size)
    norms = []
    for step in range(NUM_STEPS):
        for micro in range(case.accumulation):
            loss = engine(tokens[step, micro, context.rank], targets[step, micro, context.rank])
            engine.backward(loss)
            engine.step()
        norms.append(optimizer.gradient_norm)
    whole = engine.module.named_parameters() if case.stage < 3 else ()
    return {
        "shards": copied_shards(optimizer),
        "norms": norms,
        "transforms": optimizer.num_transforms,
        "imbalance": [plan.imbalance for plan in optimizer.plans],
        "state_keys": keys,
        "weights": {name: parameter.detach().clone() for name, parameter in whole},
    }


def copied_shards(optimizer: ZeroOptimizer) -> list[tuple[str, int, dict[str, Tensor]]]:
    return [
        (name, start, {key: tensor.clone() for key, tensor in tensors.items()})
        for name, start, tensors in optimizer.shards()
    ]


def run_cases(context: Context, cases: list[Case]) -> list[dict]:
    return [run_case(context, case) for case in cases]


def oracle(case: Case, world_size: int) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """The same steps in one process on whole fp32 parameters: name -> tensors, and gradient norms."""
    config, model = case.config(), Network()
    fill(model)
    model = model.to(DTYPES[case.precision])
    kinds = {member.name: member.kind for member in partition(model.named_parameters())}
    by_kind = make_rules(config.optim)
    lrs = {
        "matrix": config.optim.matrix.lr,
        "table": config.optim.vector.lr,
        "vector": config.optim.vector.lr,
    }
    masters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    masters = {name: master.clone() for name, master in masters.items()}
    states = {name: rules.new_state(by_kind[kinds[name]], master) for name, master in masters.items()}
    tokens, targets = batches(case, world_size)
    norms = []
    for step in range(NUM_STEPS):
        gradients = {name: torch.zeros_like(master) for name, master in masters.items()}
        for micro in range(case.accumulation):
            for rank in range(world_size):
                model.zero_grad()
                model(tokens[step, micro, rank], targets[step, micro, rank]).backward()
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        gradients[name] += parameter.grad.float() / (case.accumulation * world_size)
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()])).item()
        norms.append(norm)
        scale = min(1.0, case.clip / (norm + 1e-6)) if case.clip else 1.0
        for name, parameter in model.named_parameters():
            kind = kinds[name]
            rules.step(
                by_kind[kind],
                masters[name],
                gradients[name] * scale,
                states[name],
                lr=lrs[kind],
                step=step + 1,
            )
            with torch.no_grad():
                parameter.copy_(masters[name])
    return {name: {"master": master, **states[name]} for name, master in masters.items()}, norms


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
WORLDS = {2: CASES, 3: [Case(*stage, accumulation=4, clip=0.05) for stage in STAGES]}
CASES_OF_WORLDS = [(world_size, case) for world_size, cases in WORLDS.items() for case in cases]


@functools.cache
def outcomes(world_size: int) -> dict[Case, list[dict]]:
    """Each case's results of all ranks. One set of processes runs all cases of a world size."""
    cases = WORLDS[world_size]
    per_rank = spawn(run_cases, cases, world_size=world_size)
    return {case: [results[i] for results in per_rank] for i, case in enumerate(cases)}


@pytest.mark.parametrize(("world_size", "case"), CASES_OF_WORLDS, ids=str)
def test_every_stage_equals_the_oracle(world_size: int, case: Case) -> None:
    results = outcomes(world_size)[case]
    expected, norms = oracle(case, world_size)
    found = assemble(results)
    assert found.keys() == expected.keys()
    tolerance = TOLERANCE[case.precision]
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        assert found[name]["master"].numel() == tensors["master"].numel()
        assert relative(found[name]["master"], tensors["master"].flatten()) < tolerance, name
        if case.precision == "fp32":  # in bf16 the gradients themselves differ by their rounding
            for key in tensors:
                assert relative(found[name][key], tensors[key].flatten()) < tolerance, (name, key)
    for result in results:
        assert result["norms"] == pytest.approx(norms, rel=1e-5 if case.precision == "fp32" else 2e-2)
        # The model's own weights are the masters in its precision, on every rank.
        for name, weight in result["weights"].items():
            assert torch.equal(weight.flatten(), found[name]["master"].to(DTYPES[case.precision])), name


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_acts_on_the_gradient_and_not_on_the_update(stage) -> None:
    """Muon's step length does not depend on the gradient's scale, so clipping must not shorten it."""
    clipped, free = (outcomes(2)[Case(*stage, accumulation=4, clip=clip)] for clip in (0.05, 0.0))
    assert min(clipped[0]["norms"]) > 0.1  # the clip is in force
    network = Network()
    fill(network)
    before = network.square.weight.detach().flatten()
    lengths = [(assemble(case)["square.weight"]["master"] - before).norm().item() for case in (clipped, free)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


@pytest.mark.parametrize("world_size", WORLDS)
def test_each_matrix_is_orthogonalised_once(world_size: int) -> None:
    num_matrices = sum(member.kind == "matrix" for member in partition(Network().named_parameters()))
    for case, results in outcomes(world_size).items():
        assert sum(result["transforms"] for result in results) == num_matrices * NUM_STEPS, case


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_state_exists_from_the_start_under_the_same_names(world_size: int) -> None:
    for case, results in outcomes(world_size).items():
        names = set().union(*(result["state_keys"] for result in results))
        assert names == {"master", "momentum", "first_moment", "second_moment"}, case


def poison(context: Context, stages: list[tuple[int, bool, str]]) -> list[dict]:
    """One good step, one with a NaN or inf on a single rank and in one parameter, one good step."""
    outcomes = []
    for stage, init, precision in stages:
        engine, optimizer, _ = build(Case(stage, init, clip=0.05, precision=precision))
        tokens, targets = batches(Case(stage), context.world_size)
        history = []
        for step, bad in enumerate([None, float("nan"), float("inf"), None]):
            before = [t.clone() for _, _, ts in optimizer.shards() for t in ts.values()]
            applied = optimizer.applied_steps
            loss = engine(tokens[step % 3, 0, context.rank], targets[step % 3, 0, context.rank])
            if bad is not None and context.rank == 1:
                loss = loss * bad
            engine.backward(loss)
            engine.step()
            after = [t for _, _, ts in optimizer.shards() for t in ts.values()]
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            history.append((same, optimizer.applied_steps - applied, optimizer.gradient_norm))
        outcomes.append(history)
    return outcomes


@pytest.fixture(scope="module")
def poisoned() -> dict:
    stages = [(*stage, precision) for stage in STAGES for precision in ("fp32", "bf16")]
    ranks = spawn(poison, stages, world_size=2)
    return {stage: [rank[i] for rank in ranks] for i, stage in enumerate(stages)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_a_non_finite_gradient_changes_nothing(poisoned, stage, precision) -> None:
    for history in poisoned[(*stage, precision)]:
        unchanged, applied, norms = zip(*history, strict=True)
        assert applied == (1, 0, 0, 1)
        assert unchanged == (False, True, True, False)
        assert norms[1] == norms[2] == float("inf") and 0 < norms[3] < 100


# --- checkpoints across world sizes and stages ---------------------------------------------------------


def write_checkpoints(context: Context, root: Path, cases: list[Case]) -> None:
    for index, case in enumerate(cases):
        engine, optimizer, _ = build(case)
        tokens, targets = batches(case, context.world_size)
        for step in range(2):
            engine.backward(engine(tokens[step, 0, context.rank], targets[step, 0, context.rank]))
            engine.step()
        state = {"applied_steps": optimizer.applied_steps}
        checkpoint.save(root / f"step-{index}", shards=optimizer.shards(), state=state, context=context)


def read_checkpoints(context: Context, root: Path, sources: int, cases: list[Case]) -> list[dict]:
    results = []
    for source in range(sources):
        saved = Checkpoint(root / f"step-{source}")
        for case in cases:
            engine, optimizer, members = build(case)
            optimizer.load_shards(saved.read, applied_steps=saved.state["applied_steps"])
            weights_match = True
            for member in members if case.stage < 3 else []:
                master = saved.read(member.name, "master", 0, member.parameter.numel())
                rounded = master.to(member.parameter.dtype).view_as(member.parameter)
                weights_match &= torch.equal(member.parameter.detach(), rounded)
            result = {
                "source": source,
                "case": case,
                "applied": optimizer.applied_steps,
                "weights_match": weights_match,
                "shards": copied_shards(optimizer),
            }
            tokens, targets = batches(case, 1)
            with torch.no_grad():
                result["loss"] = engine(tokens[0, 0, 0], targets[0, 0, 0]).item()
            results.append(result)
    return results


WRITERS = [Case(1, precision="bf16"), Case(3, precision="bf16"), Case(1)]
READERS = [Case(stage, init, precision="bf16") for stage, init in STAGES]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Checkpoints of 2 ranks, two steps into a run, one for each writer."""
    root = tmp_path_factory.mktemp("checkpoints")
    spawn(write_checkpoints, root, WRITERS, world_size=2)
    return root


@pytest.mark.parametrize("world_size", [1, 3])
def test_any_world_size_and_stage_resumes_identical_masters_and_state(checkpoints, world_size) -> None:
    per_rank = spawn(read_checkpoints, checkpoints, len(WRITERS), READERS, world_size=world_size)
    losses: dict[int, list[float]] = {}
    for results in zip(*per_rank, strict=True):
        saved = Checkpoint(checkpoints / f"step-{results[0]['source']}")
        for name, tensors in assemble(results).items():
            for key, tensor in tensors.items():
                assert torch.equal(tensor, saved.read(name, key, 0, tensor.numel())), (name, key)
        for result in results:
            assert result["applied"] == 2 and result["weights_match"]
            losses.setdefault(result["source"], []).append(result["loss"])
    # The low-precision weights were refreshed too, under ZeRO-3's partitioning as well: one loss for all,
    # but for the rounding of biases, which zero.Init changes for the rest of its process.
    for values in losses.values():
        assert max(values) - min(values) < 1e-3, losses
