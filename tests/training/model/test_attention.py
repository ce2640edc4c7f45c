"""The largest attention logit: against products by hand, and without a trace in the model."""

import math

import pytest
import torch

from training.model.attention import LogitProbe, largest_logit
from training.model.llama import Llama, initialize
from training.model.shapes import resolve


def by_hand(q: torch.Tensor, k: torch.Tensor) -> float:
    """Over every sequence, head, query and key that it sees, one after another."""
    group = q.shape[1] // k.shape[1]
    return max(
        float(q[b, h, i].double() @ k[b, h // group, j].double()) / math.sqrt(q.shape[-1])
        for b in range(q.shape[0])
        for h in range(q.shape[1])
        for i in range(q.shape[2])
        for j in range(i + 1)
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_largest_logit_is_that_of_a_query_and_a_key_that_it_sees(kv_heads):
    generator = torch.Generator().manual_seed(kv_heads)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, kv_heads))
    q[0, 0, 1], k[0, 0, 3] = 100.0, 100.0  # the largest of all, but in the future of that query
    assert largest_logit(q, k).item() == pytest.approx(by_hand(q, k), rel=1e-6)


def small(*, checkpointing: bool) -> Llama:
    shape = resolve("llama-5m", vocab_size=64, hidden_size=32, ffn_size=48, num_layers=2, tied=False)
    model = Llama(shape, activation_checkpointing=checkpointing)
    initialize(model, seed=1)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_is_looked_at_computes_the_same_to_the_bit(checkpointing):
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(2))
    seen, gradients, losses = [], [], []
    for looked_at in (False, True):
        model = small(checkpointing=checkpointing)
        probe = LogitProbe(model.model, when=lambda looked_at=looked_at: looked_at)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters()])
        seen.append(probe.read(lambda tops: [tops]))
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert seen[0] == {} and list(seen[1]["attention"]) == ["layers.0", "layers.1"]


def test_larger_queries_are_seen_and_an_evaluation_is_not():
    tokens = torch.arange(9)[None]
    model = small(checkpointing=False)
    probe = LogitProbe(model.model, when=lambda: True)
    model(tokens)
    before = probe.read(lambda tops: [tops])["attention"]
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(10)
    model.eval()
    model(tokens)
    assert probe.read(lambda tops: [tops])["attention"] == before
    model.train()
    model(tokens)
    after = probe.read(lambda tops: [tops, {0: -1.0, 1: -1.0}])  # the largest over the ranks
    assert after["attention"]["layers.0"] == before["layers.0"]
    top = after["attention"]["layers.1"]["attention_logit_max"]
    assert top == pytest.approx(10 * before["layers.1"]["attention_logit_max"], rel=1e-4)
    assert after["attention_logit_max"] == top
