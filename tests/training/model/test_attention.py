"""Attention within documents; the largest logit, by hand, and without a trace in the model."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.data.dataset import document_starts
from training.model import attention_native
from training.model.attention import LogitProbe, causal_attention, kernel, largest_logits, varlen_unsupported
from training.model.llama import Llama, compile_layers, initialize
from training.model.shapes import resolve

CPU = torch.device("cpu")


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
    assert largest_logits(q, k).amax().item() == pytest.approx(by_hand(q, k), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float32, 1e-6)], ids=["bf16", "fp32"]
)
@pytest.mark.parametrize("tier", attention_native.DTYPES, indirect=True)
def test_the_compiled_attention_of_cpus_is_that_of_torch_in_fp64(tier, dtype, tolerance):
    """Sequences and heads that fill no panel, several bands of keys, shared keys, and any strides."""
    if dtype not in attention_native.DTYPES[tier]:
        assert "stay with torch" in attention_native.unsupported(CPU, dtype, heads=1)
        return
    if (reason := attention_native.unsupported(CPU, dtype, heads=1)) is not None:
        pytest.skip(reason)
    draw = torch.Generator().manual_seed(0)
    for batch, heads, kv_heads, length, size in ((2, 2, 2, 1, 8), (1, 4, 2, 33, 20), (2, 3, 1, 170, 72)):
        q, k, v, up = (
            torch.randn(batch, length, each, size, generator=draw).to(dtype).transpose(1, 2)
            for each in (heads, kv_heads, kv_heads, heads)
        )
        v = v.mT.contiguous().mT  # elements of a token lie apart
        given = [each.detach().requires_grad_() for each in (q, k, v)]
        mixed = causal_attention(0, *given)
        found = [mixed, *torch.autograd.grad(mixed, given, up)]
        exact = [each.detach().double().requires_grad_() for each in given]
        shared = [each.repeat_interleave(heads // kv_heads, dim=1) for each in exact[1:]]
        wide = F.scaled_dot_product_attention(exact[0], *shared, is_causal=True)
        expected = [wide, *torch.autograd.grad(wide, exact, up.double())]
        for own, other in zip(found, expected, strict=True):
            assert own.dtype == dtype and own.shape == other.shape
            # A single token's logit has no gradient.
            assert (own - other).norm() < tolerance * max(other.norm(), 1)


def test_the_compiled_attention_hides_no_nan(tier):
    q = torch.zeros(1, 1, 40, 8, dtype=torch.bfloat16)
    if (reason := attention_native.unsupported(CPU, q.dtype, heads=1)) is not None:
        pytest.skip(reason)
    for value in (math.nan, math.inf):
        broken = q.clone()
        broken[0, 0, 35, 3] = value
        for tensors in ((broken, q + 1, q), (q + 1, broken, q), (q, q, broken)):
            mixed = attention_native.attention(*tensors)
            assert not mixed[0, 0, 35:].isfinite().all() and mixed[0, 0, :32].isfinite().all()


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


# --- documents ----------------------------------------------------------------------------------------------

END = 0


def packed(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [2, 41] of many documents, of one token too, and where these begin in the first 40 of a row."""
    tokens = torch.randint(8, (2, 41), generator=torch.Generator().manual_seed(seed))
    tokens[0, 5:7] = tokens[1, -2] = END
    starts = document_starts(tokens[:, :-1].numpy(), end_of_text=END)
    return tokens, torch.from_numpy(starts)


def sharp(**options: bool) -> Llama:
    """A model whose tokens see each other: its attention is far from uniform."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_size": 48, "num_layers": 2}
    model = Llama(resolve("llama-5m", tied=False, qk_norm=True, **sizes), **options)
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


def losses_alone(model: Llama, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The loss of every token [80], each document by itself, from position 0 on."""
    inputs, targets = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    pairs = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    logits = torch.cat([model(inputs[None, start:stop])[0] for start, stop in pairs])
    return F.cross_entropy(logits.float(), targets, reduction="none")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_every_token_of_a_packed_sequence_has_the_loss_that_it_has_in_its_document_alone(dtype, bound):
    """Though RoPE counts on through the sequence."""
    model, (tokens, starts) = sharp().to(dtype), packed(3)
    logits, crossing = model(tokens[:, :-1], None, starts), model(tokens[:, :-1])
    found, other = (
        F.cross_entropy(each.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        for each in (logits, crossing)
    )
    alone = losses_alone(model, tokens, starts)
    assert (found - alone).abs().max() < bound * alone.abs().max()
    assert (other - alone).abs().max() > 0.5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_documents_alone(checkpointing, compiled):
    """Traced and not compiled, which would take a minute."""
    model, expected, (tokens, starts) = sharp(activation_checkpointing=checkpointing), sharp(), packed(3)
    if compiled:
        torch._dynamo.reset()
        compile_layers(model, backend="eager")
    model(tokens[:, :-1], tokens[:, 1:], starts).backward()
    losses_alone(expected, tokens, starts).mean().backward()
    for (name, own), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        error = (own.grad - other.grad).norm() / other.grad.norm()
        assert error < 2e-5, name


def test_the_largest_logit_is_that_of_a_token_of_the_same_document():
    model, (tokens, starts) = sharp(), packed(3)
    probe = LogitProbe(model.model, when=lambda: True)
    tops = []
    for documents in (starts, None):
        model(tokens[:, :-1], tokens[:, 1:], documents).backward()
        tops.append(probe.read(lambda own: [own])["attention_logit_max"])
    assert tops[0] < tops[1]
    one_row = torch.tensor([0, 40, 80], dtype=torch.int32)
    model(tokens[:, :-1], tokens[:, 1:], one_row)
    assert probe.read(lambda own: [own])["attention_logit_max"] == pytest.approx(tops[1], rel=1e-6)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "cpu is no CUDA device"),
        ("cuda", torch.float32, 64, "does not compute in torch.float32"),
        ("cuda", torch.bfloat16, 20, "heads of 20"),
    ],
)
def test_where_pieces_of_any_length_cannot_be_attended_to_the_reason_is_given(
    device, dtype, head_dim, reason
):
    assert reason in varlen_unsupported(torch.device(device), dtype, head_dim)


def test_the_kernel_is_named_and_with_documents_why_it_has_a_mask():
    options = {"batch": 1, "length": 16, "dtype": torch.float32, "device": torch.device("cpu")}
    compiled = attention_native.unsupported(CPU, torch.float32, heads=2) is None
    expected = attention_native.describe() if compiled else "flash_attention"
    assert kernel(resolve("llama-5m"), documents=False, **options) == expected
    found = kernel(resolve("llama-5m"), documents=True, **options)
    assert found == "flash_attention with a mask: cpu is no CUDA device"
    with sdpa_kernel(SDPBackend.MATH):
        assert kernel(resolve("llama-5m"), documents=False, **options) == "math"


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_clipped_query_and_key_rows_bring_the_largest_logit_down_to_the_clip(kv_heads):
    """Of the passes since the last call, over the ranks; heads below the clip, and their gradients, stay."""
    sizes = {"hidden_size": 32, "ffn_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": kv_heads}
    model = Llama(resolve("llama-5m", vocab_size=64, tied=False, **sizes))
    initialize(model, seed=1)
    first, second = torch.randint(64, (2, 1, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:8].mul_(300)  # head 0
    probe = LogitProbe(model.model, when=lambda: False, clip=2.0)
    model(first), model(second)
    heads = torch.ones(4)
    heads[: 4 // kv_heads] = 0  # share the key of head 0
    factors = probe.row_factors(lambda tops: tops)
    changed = (
        factors.pop("model.layers.1.self_attn.q_proj.weight"),
        factors.pop("model.layers.1.self_attn.k_proj.weight"),
    )
    assert all((each == 1).all() for each in factors.values()) and len(factors) == 2
    assert torch.equal(changed[0].view(4, 8)[:, 0] == 1, heads.bool())
    assert probe.row_factors(lambda tops: tops) == {}  # nothing was seen since
    with torch.no_grad():
        for name, factor in zip("qk", changed, strict=True):
            getattr(model.model.layers[1].self_attn, f"{name}_proj").weight.mul_(factor[:, None])
    probe = LogitProbe(model.model, when=lambda: False, clip=2.0)
    model(first), model(second)
    tops = torch.stack([probe._largest[layer] for layer in range(2)])
    assert tops.amax().item() == pytest.approx(2.0, rel=1e-4) and tops.amax().item() == tops[1, 0].item()
    assert probe.row_factors(lambda tops: tops + 100) != {}
    assert probe.read(lambda tops: [tops])["attention_heads_clipped"] == 8
