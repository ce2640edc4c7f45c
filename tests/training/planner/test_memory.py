"""Planned memory against autograd's count, the engine's tensors, and peaks on a CPU, an H100 and an H200."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from cluster import files
from tests.commands import ROOT
from tests.gpu.sweep import CHECKPOINTED
from tests.ranks import spawn
from tests.training.planner.peaks import peaks_of_steps
from training import config as training_config
from training.config import TrainConfig
from training.model import shapes
from training.model.llama import Llama, initialize
from training.optim_config import MATRIX_RULES
from training.plan import resolve_shape
from training.planner.memory import (
    WORKSPACE_BYTES,
    Form,
    activation_bytes,
    form_of,
    kept_bytes,
    memory,
    state_bytes,
)
from training.run.context import Context
from training.run.engine import build_deepspeed_engine, make_rules, peak_lrs

SMALL = (
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.ffn_size=160",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.vocab_size=300",
    "batch.sequence_length=64",
    "batch.micro_sequences=2",
)
WITHIN = 0.10  # of every peak that was measured
CARDS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")


def measured(block: str, column: str) -> list:
    """(card, row) of every row of a block of the GPU kit that has this column, to parametrize with."""
    found = []
    for card in CARDS:
        file = ROOT / f"tests/baselines/{files.slug(card)}_gpu.json"
        rows = json.loads(file.read_text())["blocks"][block]["rows"]
        found += [pytest.param(card, row, id=f"{card}: {row['case']}") for row in rows if column in row]
    return found


def saved_bytes(model: Llama, tokens: torch.Tensor) -> int:
    """Bytes of distinct storages that autograd saves in one forward pass with loss, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens[:, :-1], tokens[:, 1:].contiguous())
    return sum(storages.values())


@pytest.mark.parametrize("qk_norm", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_what_autograd_keeps(precision: str, qk_norm: str, monkeypatch) -> None:
    # As on a GPU: without the widened copies that a CPU without bf16 arithmetic makes.
    monkeypatch.setattr("optim.precision.cpu_has_bf16", lambda: True)
    config = training_config.load(dotlist=[*SMALL, f"precision={precision}", f"model.qk_norm={qk_norm}"])
    shape = resolve_shape(config)
    model = Llama(shape)
    initialize(model, seed=1)
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    found = saved_bytes(model, torch.randint(300, (2, 65)))
    assert kept_bytes(shape, 2 * 64, form_of(config)) == pytest.approx(found, rel=0.02)


def kept_tensors(context: Context, rules: tuple[str, ...]) -> list[dict[str, int]]:
    """By rule: bytes of this rank's weights, masters, and other state of the optimizer."""
    found = []
    for rule in rules:
        config = training_config.load(dotlist=[*SMALL, "precision=bf16", f"optim.matrix.rule={rule}"])
        model = Llama(resolve_shape(config))
        initialize(model, seed=1)
        engine, optimizer, _ = build_deepspeed_engine(model, config, micro_batch=2, accumulation=1)
        counts: Counter[str] = Counter()
        for _, _, tensors in optimizer.shards():
            for name, tensor in tensors.items():
                counts["master" if name == "master" else "state"] += tensor.nbytes * (name != "point")
        found.append({"weights": sum(p.nbytes for p in engine.module.parameters()), **counts})
    return found


def test_weights_masters_and_state_are_those_of_the_engine() -> None:
    """A point ahead lies where the weights do, and takes no memory of its own."""
    rules = ("normuon", "transported_scion", "adamw")
    ranks = spawn(kept_tensors, rules, world_size=2)
    for rule, kept in zip(rules, zip(*ranks, strict=True), strict=True):
        config = training_config.load(dotlist=[*SMALL, "precision=bf16", f"optim.matrix.rule={rule}"])
        planned = memory(config, resolve_shape(config), num_workers=2).points["after load"]
        assert all(rank["weights"] == planned["weights"] for rank in kept)
        for name, part in (("master", "master weights (fp32)"), ("state", "momentum and moments")):
            assert abs(sum(rank[name] for rank in kept) - 2 * planned[part]) <= 2, (rule, part)


@pytest.mark.parametrize(
    "keys",
    [
        *([f"rule={rule}"] for rule in MATRIX_RULES),
        ["rule=normuon", "lines=larger", "ahead=ema_nesterov"],
        ["rule=muon", "ahead=transport"],
        ["rule=aurora", "lines=larger", "polar_steps=7"],
    ],
    ids=str,
)
def test_planned_state_and_work_are_those_of_each_rule(keys: list[str]) -> None:
    """The planner cannot import the rules, which need torch, so the configuration says what each keeps."""
    config = training_config.load(dotlist=[*SMALL, *(f"optim.matrix.{key}" for key in keys)])
    shape = resolve_shape(config)
    matrices = shape.matrices().items()
    elements = sum(rows * cols * count for (rows, cols), count in matrices)
    rules = make_rules(config.optim)
    assert peak_lrs(config.optim).keys() == rules.keys()
    of_others = next(iter(rules.values()))  # of every norm of Scion's, or AdamW
    of_matrices = rules.get("matrix", of_others)
    numbers = elements * len(of_matrices.state_names)
    numbers += sum(of_matrices.num_lines(*size) * count for size, count in matrices)
    numbers += (shape.num_parameters - elements) * len(of_others.state_names)
    assert state_bytes(config, shape) == 4 * numbers
    for size, _ in matrices:  # and how often it orthogonalises
        assert config.optim.matrix.polar_steps_of(*size) == of_matrices.polar_steps(*size)


# --- peaks on a CPU -----------------------------------------------------------------------------------------

WIDER = (
    "model.num_layers=4",
    "model.hidden_size=128",
    "model.ffn_size=352",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.vocab_size=1024",
    "batch.sequence_length=64",
    "batch.micro_sequences=4",
    "batch.tokens=512",  # two micro-batches of one worker
    "workers.count=1",
    "precision=auto",  # bf16, but fp32 where it would be widened, and copies kept that no plan counts
    "zero.bucket_elements=20000",
)
ON_CPU = (
    ("zero.stage=0",),
    ("zero.stage=1",),
    ("zero.stage=2",),
    ("zero.stage=3",),
    ("zero.stage=1", "model.activation_checkpointing=true"),
    ("zero.stage=1", "model.activation_checkpointing=true", "model.checkpoint_every=2"),
    ("zero.stage=1", "precision=fp32", "optim.matrix.rule=adamw"),
    ("zero.stage=2", "precision=fp32"),
)


@pytest.fixture(scope="module")
def on_cpu() -> list[dict[str, int]]:
    [found] = spawn(peaks_of_steps, [(*WIDER, *keys) for keys in ON_CPU], 2, world_size=1)
    return found


@pytest.mark.parametrize("number", range(len(ON_CPU)), ids=[" ".join(keys) for keys in ON_CPU])
def test_peaks_of_a_step_on_a_cpu_are_those_planned(number: int, on_cpu) -> None:
    """The exchange is part of the engine's backward pass. A GPU's step runs in other kernels."""
    config = training_config.load(dotlist=[*WIDER, *ON_CPU[number]])
    planned = memory(config, resolve_shape(config), num_workers=1).points
    sums = {point: sum(parts.values()) for point, parts in planned.items()}
    assert sums["forward"] == pytest.approx(on_cpu[number]["forward"], rel=WITHIN)
    assert max(sums["backward"], sums["exchange"]) == pytest.approx(on_cpu[number]["backward"], rel=WITHIN)


@pytest.mark.parametrize(("workers", "accumulation"), [(2, 1), (4, 2)])
def test_stage_2_in_fp32_collects_a_shard_and_only_where_it_accumulates(
    workers: int, accumulation: int
) -> None:
    """The bound tells a shard from all gradients with four workers, and from none with two.

    Gloo's threads hold what they sent for as long as the system leaves them waiting: the least of five steps.
    """
    keys = (*WIDER, "zero.stage=2", "precision=fp32", f"workers.count={workers}")
    keys += (f"batch.tokens={256 * workers * accumulation}",)
    ranks = spawn(peaks_of_steps, [keys] * 5, accumulation, world_size=workers)
    config = training_config.load(dotlist=[*keys])
    parts = memory(config, resolve_shape(config), num_workers=workers).points["backward"]
    measured = max(min(found["backward"] for found in steps) for steps in ranks)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.06)


# --- peaks on GPUs ------------------------------------------------------------------------------------------

SHAPE = shapes.resolve("llama-1b4")


def alone(row) -> tuple[int, Form]:
    """(micro-batch, form) of a row of block 5. The H200's rows are of a time of chunks of 2048 tokens."""
    layers, loss, micro, *rest = row["case"].split(", ")
    every = next(n for n, name in CHECKPOINTED.items() if name == "".join(f", {each}" for each in rest))
    chunk = row.get("chunk_tokens", 2048) if loss == "loss chunked" else None
    form = Form(2, layers == "compiled layers", checkpointing=every, chunk_tokens=chunk)
    return int(micro.removeprefix("micro-batch ")), form


@pytest.mark.parametrize(("card", "row"), measured("5", "peak_allocated_gb"))
def test_peaks_of_forward_and_backward_on_gpus_are_those_planned(card, row) -> None:
    micro, form = alone(row)
    weights = 2 * SHAPE.num_parameters
    activations = activation_bytes(SHAPE, 2048 * micro, form, gradients=weights)
    planned = weights + max(activations) + WORKSPACE_BYTES
    assert planned / 1e9 == pytest.approx(row["peak_allocated_gb"], rel=WITHIN)


def on_one_gpu(*keys: str) -> TrainConfig:
    """The recipe of the A40, on one GPU."""
    file = ROOT / "training/configs/a40_1b4.yaml"
    alone = ("workers.count=1", "workers.min_count=null", "workers.accelerator=null", "batch.tokens=16384")
    return training_config.load(file=Path(file), dotlist=[*alone, *keys])


@pytest.mark.parametrize(("card", "row"), measured("3", "planned_gb"))
def test_the_peak_of_a_training_step_on_gpus_is_the_one_planned(card, row) -> None:
    planned = memory(on_one_gpu(*row["keys"].split()), SHAPE, num_workers=1).allocated
    assert planned / 1e9 == pytest.approx(row["gb"], rel=WITHIN)
