"""The plan's activation count against what autograd keeps."""

from collections import Counter

import pytest
import torch

from cluster.config import ConfigError
from tests.ranks import spawn
from training import config as training_config
from training.config import MATRIX_RULES
from training.model.llama import Llama, initialize
from training.plan import activation_bytes, make_plan, memory_bytes, resolve_shape
from training.run.context import Context
from training.run.engine import build_deepspeed_engine, make_rules

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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_what_autograd_keeps(precision: str, monkeypatch) -> None:
    # As on a GPU: without the widened copies that a CPU without bf16 arithmetic makes.
    monkeypatch.setattr("optim.precision.cpu_has_bf16", lambda: True)
    config = training_config.load(dotlist=[*SMALL, f"precision={precision}"])
    shape = resolve_shape(config)
    model = Llama(shape)
    initialize(model, seed=1)
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    found = saved_bytes(model, torch.randint(300, (2, 65)))
    # The plan adds what the backward pass makes of the logits, which autograd has not saved yet.
    logits = 2 * 64 * shape.vocab_size
    low = {"fp32": 4, "bf16": 2}[precision]
    planned = activation_bytes(config, shape) - logits * (low + 4)
    assert planned == pytest.approx(found, rel=0.02)


def kept_bytes(context: Context, rules: tuple[str, ...]) -> list[dict[str, int]]:
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
    rules = ("muon", "normuon", "transported_scion", "adamw")
    ranks = spawn(kept_bytes, rules, world_size=2)
    for rule, kept in zip(rules, zip(*ranks, strict=True), strict=True):
        config = training_config.load(dotlist=[*SMALL, "precision=bf16", f"optim.matrix.rule={rule}"])
        planned = memory_bytes(config, resolve_shape(config), num_workers=2)
        assert all(rank["weights"] == planned["weights"] for rank in kept)
        for name, part in (("master", "master weights (fp32)"), ("state", "momentum and moments")):
            assert abs(sum(rank[name] for rank in kept) - 2 * planned[part]) <= 2, (rule, part)


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_planned_state_is_what_each_rule_keeps(rule: str) -> None:
    """plan.py cannot import the rules, which need torch, so it names those that keep one number each."""
    config = training_config.load(dotlist=[*SMALL, f"optim.matrix.rule={rule}"])
    shape = resolve_shape(config)
    planned = memory_bytes(config, shape, num_workers=1)["momentum and moments"]
    matrices = shape.matrices().items()
    elements = sum(rows * cols * count for (rows, cols), count in matrices)
    num_rows = sum(rows * count for (rows, _), count in matrices)
    rules = make_rules(config.optim)
    of_others = next(iter(rules.values()))  # of every norm of Scion's, or AdamW
    of_matrices = rules.get("matrix", of_others)
    numbers = elements * len(of_matrices.state_names) + num_rows * len(of_matrices.row_state_names)
    numbers += (shape.num_parameters - elements) * len(of_others.state_names)
    assert planned == 4 * numbers


def test_the_1b4_run_fits_an_a40_and_says_so_exactly() -> None:
    from pathlib import Path

    file = Path("training/configs/a40_1b4.yaml")
    plan = make_plan(training_config.load(file=file))
    assert plan.shape.num_parameters == 1_420_396_544
    assert 20e9 < plan.total_memory_bytes < 46e9
    # Weights and masters by hand: 2 bytes a parameter on each GPU; 4 bytes shared by the workers.
    assert plan.memory_bytes["weights"] == 2 * plan.shape.num_parameters
    assert plan.memory_bytes["master weights (fp32)"] == 4 * plan.shape.num_parameters // plan.num_workers
    with pytest.raises(ConfigError, match=r"batch.micro_sequences.*activation_checkpointing.*zero.stage"):
        make_plan(training_config.load(file=file, dotlist=["batch.micro_sequences=32"]))
