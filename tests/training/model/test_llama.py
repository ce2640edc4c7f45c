"""Our LLaMA against transformers', Qwen3 (QK-norm), Qwen2 (biases) and Mistral, and itself in other paths."""

import hashlib
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from training.model import rope
from training.model.attention import LogitProbe
from training.model.hf import save_hf
from training.model.llama import Llama, compile_layers, generate, initialize, load_hf, rotary
from training.model.loss import IGNORED_TARGET
from training.model.rope import LinearScaling, RopeScaling, YarnScaling
from training.model.shapes import LlamaShape

TINY = LlamaShape(
    vocab_size=320,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=96,
    max_positions=512,
)
LLAMA_3 = RopeScaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
VARIANTS = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "tied": {"tied": True},
    "theta": {"rope_theta": 5e5, "norm_eps": 1e-3},
    "llama3": {"rope_scaling": LLAMA_3, "rope_theta": 5e5},
    "head_dim": {"head_dim": 24},
    "qk_norm": {"qk_norm": True, "head_dim": 24, "tied": True},
    "linear": {"rope_scaling": LinearScaling(2.0)},
    "yarn": {"rope_scaling": YarnScaling(4.0, 64, 32, 1, 1.1386294361119891, True), "rope_theta": 5e5},
    "qwen2": {"qkv_bias": True},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
}


def tiny(*, seed: int = 0, activation_checkpointing: int = 0, **changes: object) -> Llama:
    model = Llama(resolve_tiny(**changes), activation_checkpointing=activation_checkpointing)
    initialize(model, seed=seed)
    return model


def resolve_tiny(**changes: object) -> LlamaShape:
    fields = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    return LlamaShape(**(fields | changes))


def tokens(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, size, generator=torch.Generator().manual_seed(seed))


def export(model: Llama, directory: Path, tokenizer_file: Path, **changes: object) -> Path:
    arguments = {
        "shape": model.shape,
        "tensors": model.state_dict(),
        "dtype": torch.float32,
        "tokenizer_file": tokenizer_file,
        "eos_id": 0,
    }
    save_hf(directory, **(arguments | changes))
    return directory


def theirs(shape: LlamaShape) -> PreTrainedModel:
    told = rope.to_hf(shape.rope_scaling) | {"rope_theta": shape.rope_theta}
    kinds: tuple = (LlamaConfig, LlamaForCausalLM)
    biases = {"attention_bias": shape.out_bias, "mlp_bias": shape.mlp_bias}
    if shape.qk_norm:
        kinds = Qwen3Config, Qwen3ForCausalLM
    elif shape.qkv_bias and not shape.out_bias:
        kinds, biases = (Qwen2Config, Qwen2ForCausalLM), {}
    config = kinds[0](
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn_size,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        rope_parameters=told,
        **biases,
        initializer_range=0.2,  # logits and attention far from uniform, so that a wrong angle shows
    )
    torch.manual_seed(0)
    return with_gains(kinds[1](config).eval())


@torch.no_grad()
def with_gains(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with the gains of QK-norm and the biases, if it has them, drawn from [0.5, 1.5]."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight", ".bias")):
            parameter.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def assert_same_logits(ours: Llama, other: PreTrainedModel) -> None:
    batch = tokens(2, 200)
    expected = other(batch).logits
    torch.testing.assert_close(ours(batch), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_loads_what_transformers_saves(tmp_path: Path, changes: dict) -> None:
    other = theirs(resolve_tiny(**changes))
    other.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, dtype=torch.float32)
    assert ours.shape == resolve_tiny(**changes)
    assert_same_logits(ours, other)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_what_we_save(tmp_path: Path, tokenizer_file: Path, changes: dict) -> None:
    ours = tiny(**changes)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(5)
    with_gains(ours)
    export(ours, tmp_path / "export", tokenizer_file)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert other.dtype == torch.float32 and other.config.eos_token_id == 0
    assert_same_logits(ours, other)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 512}),  # as long as the context
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    ],
    ids=["mistral", "wide window", "qwen2", "dynamic"],
)
def test_what_is_llama_in_all_but_its_name_loads(tmp_path: Path, kind: str, changes: dict) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=TINY.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=512, initializer_range=0.2,
        pad_token_id=None, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    other = with_gains(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    other.save_pretrained(tmp_path)
    assert_same_logits(load_hf(tmp_path, dtype=torch.float32), other)


def test_a_sharded_checkpoint_loads(tmp_path: Path) -> None:
    other = theirs(TINY)
    other.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_logits(load_hf(tmp_path, dtype=torch.float32), other)


def test_the_exported_tokenizer_round_trips(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export(tiny(), tmp_path / "export", tokenizer_file))
    text = "the river  at Asunción, slowly\n"
    assert tokenizer.encode(text) == Tokenizer.from_file(str(tokenizer_file)).encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("<|end|>", 0, None)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_transformers(tied: bool) -> None:
    ours = tiny(tied=tied)
    named = {name: tuple(parameter.shape) for name, parameter in ours.named_parameters()}
    assert list(named.items()) == list(ours.shape.parameters().items())
    assert sum(parameter.numel() for parameter in ours.parameters()) == ours.shape.num_parameters
    assert list(ours.state_dict()) == list(theirs(ours.shape).state_dict())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path, tokenizer_file: Path) -> None:
    directory = export(tiny(seed=1), tmp_path / "export", tokenizer_file)
    export(tiny(seed=2), directory, tokenizer_file, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    loaded, expected = load_hf(directory, dtype=torch.bfloat16), tiny(seed=2).bfloat16()
    assert all(map(torch.equal, loaded.parameters(), expected.parameters()))
    foreign = tmp_path / "home"
    foreign.mkdir()
    with pytest.raises(ValueError, match="home: exists and is no earlier export"):
        export(tiny(), foreign, tokenizer_file)


def test_a_bad_export_leaves_nothing(tmp_path: Path, tokenizer_file: Path) -> None:
    norm = "model.norm.weight"
    state = tiny().state_dict()
    small = tiny(vocab_size=10)
    bad = {
        "norm.weight: given missing": {"tensors": {n: t for n, t in state.items() if n != norm}},
        r"extra: given \(1,\), in the model missing": {"tensors": state | {"extra": torch.ones(1)}},
        r"norm.weight: given \(3,\), in the model \(64,\)": {"tensors": state | {norm: torch.ones(3)}},
        "no token with id 999 to serve as eos_token": {"eos_id": 999},
        "has 284 tokens, .* only 10": {"shape": small.shape, "tensors": small.state_dict()},
    }
    for message, changes in bad.items():
        with pytest.raises(ValueError, match=message):
            export(tiny(), tmp_path / "export", tokenizer_file, **changes)
    assert list(tmp_path.iterdir()) == []


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    model = tiny(seed=5)
    again, deeper, other = tiny(seed=5).bfloat16(), tiny(seed=5, num_layers=3), tiny(seed=6)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.bfloat16())
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones(64))
            continue
        assert not torch.equal(other.get_parameter(name), parameter)
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert parameter.std().item() == pytest.approx(0.02 / (2.0 if residual else 1.0), rel=0.05)
        ratio = math.sqrt(2 / 3) if residual else 1.0
        torch.testing.assert_close(deeper.get_parameter(name), parameter * ratio)
    in_bf16 = Llama(TINY).bfloat16()
    initialize(in_bf16, seed=5)
    assert all(map(torch.equal, in_bf16.parameters(), again.parameters()))


def test_a_weight_on_a_cpu_is_drawn_in_fp32_from_seed_and_name_alone() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    digest = hashlib.sha256(f"5:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    drawn = torch.empty(tiny().get_parameter(name).shape).normal_(0.0, 0.02, generator=generator)
    assert torch.equal(tiny(seed=5).get_parameter(name), drawn)


def test_loss_is_the_mean_over_targets_that_count() -> None:
    model, batch = tiny(), tokens(2, 33)
    inputs, targets = batch[:, :-1], batch[:, 1:].clone()
    targets[:, :20] = IGNORED_TARGET
    chances = model(inputs).double().log_softmax(-1)
    expected = -chances[:, 20:].gather(-1, targets[:, 20:, None]).mean()
    loss = model(inputs, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx(math.log(320), rel=0.02)  # small random weights: nearly uniform


def test_bf16_loss_is_close_to_fp32() -> None:
    inputs, targets = tokens(2, 32), tokens(2, 32, seed=1)
    exact, rounded = tiny()(inputs, targets), tiny().bfloat16()(inputs, targets)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-3)


def test_no_token_sees_the_future() -> None:
    model, batch = tiny(), tokens(1, 32)
    changed = batch.clone()
    changed[:, 20] += 1 - 2 * (changed[:, 20] == 319)
    difference = (model(batch) - model(changed)).abs().amax((0, 2))
    assert difference[:20].max() == 0 and difference[20:].min() > 0


def test_activation_checkpointing_changes_nothing() -> None:
    inputs, targets = tokens(2, 32), tokens(2, 32, seed=1)
    losses, gradients = [], []
    for activation_checkpointing in (0, 1, 2):
        model = tiny(num_layers=3, activation_checkpointing=activation_checkpointing)
        with patch("training.model.llama.checkpoint", wraps=checkpoint) as recomputed:
            loss = model(inputs, targets)
        assert recomputed.call_count == (activation_checkpointing and {1: 3, 2: 2}[activation_checkpointing])
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses[0] == losses[1] == losses[2]
    assert all(map(torch.equal, *gradients[:2])) and all(map(torch.equal, *gradients[1:]))


def test_a_kv_cache_through_the_seam_gives_the_same_logits() -> None:
    """The contract that serving builds on: `positions` and `attend` of `Decoder.forward`."""
    model, batch = tiny(rope_scaling=LLAMA_3), tokens(2, 24)
    cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if layer in cache:
            k, v = torch.cat((cache[layer][0], k), 2), torch.cat((cache[layer][1], v), 2)
        cache[layer] = (k, v)
        past = torch.arange(k.shape[2]) <= torch.arange(k.shape[2])[-q.shape[2] :, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=past, enable_gqa=True)

    pieces = [(0, 17), *((start, start + 1) for start in range(17, 24))]
    hidden = [
        model.model(batch[:, a:b], positions=torch.arange(a, b).expand(2, -1), attend=attend)
        for a, b in pieces
    ]
    torch.testing.assert_close(model.lm_head(torch.cat(hidden, 1)), model(batch), rtol=1e-5, atol=1e-6)


def test_rope_is_fp32_and_turns_by_position() -> None:
    cos, sin = rotary(TINY, torch.tensor([0, 3]))
    assert cos.shape == (1, 1, 2, 16) and cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos[0, 0, 0], torch.ones(16)) and torch.equal(sin[0, 0, 0], torch.zeros(16))
    assert sin[0, 0, 1, 0].item() == pytest.approx(math.sin(3))
    assert cos[0, 0, 1, 9].item() == pytest.approx(math.cos(3 * 10_000 ** (-2 / 16)))


def test_flops_are_three_times_what_torch_counts_forward() -> None:
    # Exact: torch counts 2mnk per matmul, and with the math backend the whole attention matrix.
    for shape in (TINY, resolve_tiny(tied=True, head_dim=24)):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            Llama(shape)(tokens(2, 48))
        assert 3 * counter.get_total_flops() == 2 * 48 * shape.flops_per_token(48)


def test_generation_follows_the_seed_and_the_likeliest_token() -> None:
    model, prompt = tiny(), tokens(5)
    first, again, other = (generate(model, prompt, num_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (17,) and torch.equal(first[:5], prompt)
    greedy = generate(model, prompt, num_tokens=6, temperature=0)
    assert torch.equal(greedy, generate(model, prompt, num_tokens=6, top_k=1))
    with torch.no_grad():
        for length in range(5, 11):
            assert greedy[length] == model(greedy[None, :length])[0, -1].argmax()
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, prompt[:0], num_tokens=1)


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_layers_are_two_frames_whatever_is_asked_of_the_model() -> None:
    """torch traces them, without its compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, expected = (tiny(num_layers=9, activation_checkpointing=again) for again in (True, False))
    compile_layers(model, backend="eager")
    model.lm_head.loss_tokens = 32
    looking = False
    probe = LogitProbe(model.model, when=lambda: looking)
    inputs, targets = tokens(2, 32), tokens(2, 32, seed=1)
    for looking in (False, True, False):  # noqa: B007
        model.train()
        model(inputs, targets).backward()
        expected(inputs, targets).backward()
        model.eval()
        with torch.no_grad():
            assert model(inputs, targets).item() == pytest.approx(expected(inputs, targets).item(), rel=1e-6)
            assert model(inputs[:, :7]).shape == (2, 7, 320)
            generate(model, inputs[0, :3], num_tokens=4)
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    assert graphs_compiled() == 2
    assert list(probe.read(lambda own: [own])["attention"]) == [f"layers.{number}" for number in range(9)]
