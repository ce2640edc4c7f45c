"""Compiled layers under DeepSpeed, by a backend that only traces; and the rules that keys make."""

import pytest
import torch

from tests.ranks import spawn
from training import config as training_config
from training.model.llama import compile_layers
from training.plan import resolve_shape
from training.run.context import Context
from training.run.engine import build_deepspeed_engine, build_model, make_rules, warm_up

KEYS = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_size=96",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.vocab_size=256",
    "model.loss_tokens=24",
    "optim.z_loss=1e-3",
    "precision=bf16",
)
CHECKPOINTING = "model.activation_checkpointing=true"
CASES = [("zero.stage=1",), ("zero.stage=3", "zero.init=true", "model.qk_norm=true", CHECKPOINTING)]


def micro_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Of two sequences, and documents of 5 to 32 tokens."""
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 5, 32, 64], dtype=torch.int32), 32


def losses(context: Context, *keys: str) -> list[float]:
    """Of two steps of two micro-batches on this rank."""
    config = training_config.load(dotlist=[*KEYS, *keys])
    model = build_model(config, resolve_shape(config), device=context.device)
    if config.model.compile:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_layers(model, backend="eager")
    engine, _, _ = build_deepspeed_engine(model, config, micro_batch=2, accumulation=2)
    if config.model.compile and config.zero.stage < 3:
        warm_up(engine.module, micro_batch(100))
        assert all(parameter.grad is None for parameter in engine.module.parameters())
        assert not any(any(of_group) for of_group in engine.optimizer.fp32_groups_has_gradients)
    found = []
    for step in range(4):
        engine.train()
        loss = engine(*micro_batch(10 * step + context.rank))
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    if config.model.compile:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    return found


def compared(context: Context) -> list[tuple[list[float], list[float]]]:
    return [
        (losses(context, *case, "model.compile=false"), losses(context, *case, "model.compile=true"))
        for case in CASES
    ]


@pytest.mark.stack
def test_compiled_layers_train_as_others_do_in_every_stage_and_with_checkpointing() -> None:
    """Traced and not compiled, a layer computes the same bits."""
    for rank in spawn(compared, world_size=2):
        assert len(rank) == 2
        for plain, compiled in rank:
            assert compiled == plain and plain[-1] != plain[0]


def test_the_keys_of_the_look_ahead_reach_the_rules_that_they_name() -> None:
    """A pattern's rate is the peak of its own schedule."""
    keys = ["matrix.rule=scion", "matrix.momentum=0.75", "matrix.warm_start=true", "matrix.lr=0.1"]
    keys += ["scion.transport_scheduled=true", 'by_name=["*.mlp.*: ahead=transport lr=0.2"]']
    rules = make_rules(training_config.load(dotlist=[f"optim.{key}" for key in keys]).optim)
    still, moved = rules["spectral"], rules["spectral (*.mlp.*)"]
    assert not still.looks_ahead and still.direction.warm_start and moved.direction.warm_start
    found = [moved.finish(lr=lr, scale=1, step=1).ahead for lr in (0.2, 0.05, 0.0)]
    assert found == pytest.approx([3, 0.75, 0])
