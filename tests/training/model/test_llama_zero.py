"""Our LLaMA under real ZeRO-3 ranks: the tied head and zero.Init are where partitioned weights go wrong."""

import pytest
import torch

from optim.step.layout import quiet_deepspeed
from tests.ranks import spawn
from training.model.attention import LogitProbe
from training.model.llama import Llama, generate, initialize
from training.model.shapes import resolve
from training.run.context import Context

CASES = [(tied, zero_init) for tied in (False, True) for zero_init in (False, True)]
STEPS = 3
WORLD_SIZE = 2


def build(*, tied: bool, activation_checkpointing: bool = False) -> Llama:
    sizes = {"vocab_size": 256, "hidden_size": 64, "ffn_size": 96, "num_layers": 2}
    shape = resolve("llama-5m", tied=tied, qk_norm=tied, **sizes)
    return Llama(shape, activation_checkpointing=activation_checkpointing)


def micro_batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets), each int64 [2, 32], for every rank."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randint(0, 256, (WORLD_SIZE, 2, 33), generator=generator)
    return [(tokens[:, :-1], tokens[:, 1:]) for tokens in batch]


def train(context: Context) -> list[tuple[list[float], list[int]]]:
    """Losses of this rank's micro-batches, and a sample at the end, of each case."""
    import deepspeed

    quiet_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # the default of DeepSpeed 0.19.8 is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    outcomes = []
    for tied, zero_init in CASES:
        # No dtype argument: on CPU, DeepSpeed 0.19.8 takes any as bf16. It follows `config` correctly.
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=zero_init):
            model = build(tied=tied, activation_checkpointing=zero_init)
        initialize(model, seed=5)
        probe = LogitProbe(model.model, when=lambda: True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        losses = []
        for step in range(STEPS):
            loss = engine(*micro_batches(step)[context.rank])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        sample = generate(engine, torch.arange(4), num_tokens=3, seed=1)
        outcomes.append((losses, sample.tolist()))
        seen = probe.read(context.gather)
        assert seen["attention_logit_max"] == max(
            x["attention_logit_max"] for x in seen["attention"].values()
        )
        assert list(seen["attention"]) == ["layers.0", "layers.1"]
    return outcomes


def train_in_one_process(*, tied: bool) -> tuple[list[list[float]], list[int]]:
    """Losses [step][rank] and a sample of plain SGD on the mean loss of all ranks' micro-batches."""
    model = build(tied=tied)
    initialize(model, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    history = []
    for step in range(STEPS):
        losses = torch.stack([model(*micro_batch) for micro_batch in micro_batches(step)])
        history.append(losses.tolist())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return history, generate(model, torch.arange(4), num_tokens=3, seed=1).tolist()


@pytest.mark.stack
def test_zero_3_trains_and_samples_as_one_process_does() -> None:
    for rank, outcomes in enumerate(spawn(train, world_size=WORLD_SIZE)):
        for (tied, _), (losses, sample) in zip(CASES, outcomes, strict=True):
            expected, expected_sample = train_in_one_process(tied=tied)
            assert losses == pytest.approx([step[rank] for step in expected], rel=1e-6)
            assert sample == expected_sample
