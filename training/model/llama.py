"""The LLaMA model in plain PyTorch, its initialisation, sampling, and loading from Hugging Face directories.

Parameters are named as in transformers' LlamaForCausalLM, with QK-norm as in its Qwen3ForCausalLM, so
checkpoints need no renaming. Each weight is read only in its own module's forward, which is where ZeRO-3
gathers it.

Shapes: B sequences, T tokens, D hidden, H query heads, K key/value heads, C head_dim, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optim.precision import product_dtype
from training.model import loss, shapes
from training.model.attention import Attend, DocumentAttention, Kept, causal_attention
from training.model.shapes import LlamaShape
from training.model.stored import locate

Rotary = tuple[Tensor, Tensor]

INITIAL_STD = 0.02


class Linear(nn.Linear):
    """A matrix. Uninitialised: `initialize` or `load_hf` fills it, once.

    Multiplies in `optim.precision.product_dtype` of the weight; the result has x's dtype.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool = False) -> None:
        super().__init__(num_inputs, num_outputs, bias=bias)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        wide = product_dtype(self.weight.dtype, x.device)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.linear(x.to(wide), self.weight.to(wide), bias).to(x.dtype)


class Embedding(nn.Embedding):
    """A lookup table. Uninitialised, as `Linear` is."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times a weight (arXiv 1910.07467); it casts where transformers does."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary(shape: LlamaShape, positions: Tensor) -> Rotary:
    """Cosines and sines of RoPE (arXiv 2104.09864), stretched where the shape says so.

    Args:
        positions: integers [T] or [B, T].

    Returns:
        Two fp32 tensors [1 or B, 1, T, C], on the device of `positions`; dimensions i and i + C/2 pair up.
    """
    even = torch.arange(0, shape.head_dim, 2, device=positions.device).float()
    frequency = 1.0 / shape.rope_theta ** (even / shape.head_dim)  # radians per token [C/2]
    scaling = shape.rope_scaling
    if scaling is not None:
        frequency = scaling.stretch(frequency, theta=shape.rope_theta, index=even / 2)
    angle = positions.float()[..., None] * frequency
    angle = torch.cat((angle, angle), dim=-1).view(-1, 1, positions.shape[-1], shape.head_dim)
    if scaling is not None and scaling.attention_factor != 1:
        return angle.cos() * scaling.attention_factor, angle.sin() * scaling.attention_factor
    return angle.cos(), angle.sin()


def rotate(x: Tensor, by: Rotary) -> Tensor:
    """RoPE applied to x [B, heads, T, C], in fp32; the result has x's dtype."""
    cos, sin = by
    x32 = x.float()
    first, second = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """The matrices of attention; what lies between `heads` and `o_proj` is the caller's."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        queries, keys, bias = (
            shape.num_heads * shape.head_dim,
            shape.num_kv_heads * shape.head_dim,
            shape.qkv_bias,
        )
        self.q_proj = Linear(shape.hidden_size, queries, bias=bias)
        self.k_proj = Linear(shape.hidden_size, keys, bias=bias)
        self.v_proj = Linear(shape.hidden_size, keys, bias=bias)
        self.o_proj = Linear(queries, shape.hidden_size, bias=shape.out_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else None for _ in "qk"
        )

    def forward(self, x: Tensor, by: Rotary, kept: Kept = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T or N, C], keys and values [B, K, T, C] of x [B, T, D]; the former two rotated."""
        asking, asking_by = x, by
        if kept is not None:
            asking, asking_by = x[:, kept], (by[0][..., kept, :], by[1][..., kept, :])
        q, k, v = (
            projection(tokens).unflatten(-1, (-1, self.head_dim))
            for projection, tokens in ((self.q_proj, asking), (self.k_proj, x), (self.v_proj, x))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        return rotate(q, asking_by), rotate(k, by), v


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.ffn_size, bias=shape.mlp_bias)
        self.up_proj = Linear(shape.hidden_size, shape.ffn_size, bias=shape.mlp_bias)
        self.down_proj = Linear(shape.ffn_size, shape.hidden_size, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One layer. What comes before and after its attention can be compiled: see `compile_layers`."""

    compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = SwiGLU(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)

    def forward(self, x: Tensor, by: Rotary, attend: Callable[..., Tensor], kept: Kept = None) -> Tensor:
        before, after = self.compiled if self.compiled and self.training else (Layer.before, Layer.after)
        q, k, v = (part.transpose(1, 2) for part in before(self, x, by, kept))
        return after(self, x if kept is None else x[:, kept], attend(q, k, v).transpose(1, 2))

    # Between the halves tensors are [B, T, heads, C], as they lie in memory: torch 2.11 copies each gradient
    # that reaches a compiled frame in another order.

    def before(self, x: Tensor, by: Rotary, kept: Kept = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.self_attn(self.input_layernorm(x), by, kept)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(mixed.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(Linear):
    """The output head, with the loss inside: ZeRO-3 gathers the weight for both.

    Attributes:
        loss_tokens: tokens whose logits are in memory at one time (`training.model.loss.chunked`); None: all,
            with autograd's own gradients.
        z_loss: weight of that loss, which counts while the model trains.
    """

    loss_tokens: int | None = None
    z_loss: float = 0.0

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of x [B, T, D]; with targets [B, T] the loss instead."""
        if targets is None:
            return super().forward(x)
        z_loss = self.z_loss if self.training else 0.0
        if self.loss_tokens is None:
            return loss.whole(super().forward(x).flatten(0, 1), targets.flatten(), z_loss=z_loss)
        return loss.chunked(
            x.flatten(0, 1), self.weight, targets.flatten(), tokens=self.loss_tokens, z_loss=z_loss
        )


class Decoder(nn.Module):
    """Everything between token ids and the output head."""

    def __init__(self, shape: LlamaShape, *, activation_checkpointing: int) -> None:
        super().__init__()
        self.shape = shape
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)

    def forward(
        self, tokens: Tensor, *, positions: Tensor | None = None, attend: Attend = causal_attention,
        kept: Kept = None,
    ) -> Tensor:  # fmt: skip
        """Normed hidden states [B, T, D] of tokens [B, T] (int64).

        `positions`, integers [T] or [B, T], and `attend` are the seam for decoding with a key/value cache;
        the defaults are whole sequences from position 0. With `kept` the result is [B, N, D]: of other tokens
        the last layer computes keys and values alone.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        by = rotary(self.shape, positions)
        x = self.embed_tokens(tokens)
        for number, layer in enumerate(self.layers):
            given = x, by, partial(attend, number)
            every = self.activation_checkpointing
            if every and number % every == 0 and torch.is_grad_enabled():
                x = checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*given, kept if number + 1 == len(self.layers) else None)
        return self.norm(x)


class Llama(nn.Module):
    """A LLaMA language model. Its weights are uninitialised until `initialize` or `load_hf` sets them.

    With `activation_checkpointing` of n, every n-th layer from the first (0: none) keeps only its input and
    runs forward again in the backward pass: its activations shrink to B·T·D, for a third more computation.
    With n of 2 or more this is torchtitan's selective checkpointing by layers.
    """

    def __init__(self, shape: LlamaShape, *, activation_checkpointing: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, activation_checkpointing=activation_checkpointing)
        self.lm_head = Head(shape.hidden_size, shape.vocab_size)
        if shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of tokens [B, T] (int64) in the weights' dtype; with `targets`, the loss instead.

        With `documents`, no token sees another document than its own. `documents` and `longest` are the
        `starts` and `longest` of `DocumentAttention`.

        The loss is the mean cross-entropy in nats, an fp32 scalar, over the targets [B, T] (int64) that
        are not `IGNORED_TARGET`; it is NaN when all are. While the model trains, `Head.z_loss` adds to it.
        """
        attend: Attend = causal_attention
        if documents is not None:
            batch, length = tokens.shape
            attend = DocumentAttention(documents, batch=batch, length=length, longest=longest)
        return self.lm_head(self.model(tokens, attend=attend), targets)


def compile_layers(model: Llama, *, backend: str = "inductor") -> None:
    """Compile what a layer does before and after its attention; used while the model trains.

    Two frames for all layers, whatever their number: nothing in them depends on which layer it is, nor on
    `attend`. Evaluation and sampling run uncompiled, so no length of theirs compiles anything. Compilation
    happens in the first forward and backward pass, and again for every other size of micro-batch.
    """
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    torch.compiler.assume_constant_result(product_dtype)
    halves = torch.compile(Layer.before, **options), torch.compile(Layer.after, **options)
    for layer in model.model.layers:
        layer.compiled = halves  # type: ignore[assignment]


@torch.no_grad()
def initialize(model: Llama, *, seed: int) -> None:
    """Set every weight of `model`, each as a pure function of `seed` and the parameter's name.

    So the result depends neither on world size nor on ZeRO stage, and weights partitioned by `zero.Init`
    work too (then every rank must call). Matrices and embeddings are N(0, 0.02²), drawn in fp32 and then
    cast; projections back into the residual stream are smaller by sqrt(2·num_layers), as in GPT-2; norms
    are 1 and biases 0.

    A weight on a GPU is drawn there: one CPU thread takes 29 s for 1.4B weights. A GPU draws other numbers
    than a CPU, and another model of GPU may again, so the result is a function of the kind of device too.
    """
    residual_std = INITIAL_STD / math.sqrt(2 * model.shape.num_layers)
    for name, parameter in model.named_parameters():
        with _whole(parameter):
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            if name.endswith(".bias"):
                parameter.zero_()
                continue
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else INITIAL_STD
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            device = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big"))
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            parameter.copy_(drawn.normal_(0.0, std, generator=generator))


@torch.no_grad()
def widen_products(model: Llama) -> None:
    """Keep each matrix in the dtype it is multiplied in, so that no forward pass widens it again.

    On a CPU without bf16 arithmetic bf16 matrices become fp32: twice their memory, the same results. A tied
    head becomes a copy, because a lookup needs no wide table. Anywhere else nothing changes.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            wide = product_dtype(module.weight.dtype, module.weight.device)
            if wide != module.weight.dtype:
                module.weight = nn.Parameter(module.weight.to(wide), requires_grad=False)


def _whole(parameter: nn.Parameter) -> AbstractContextManager:
    """Inside, `parameter` is whole also when ZeRO-3 has partitioned it; on leaving, rank 0's value counts."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: Tensor,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue a prompt by sampling, without a key/value cache: for short samples of a model in training.

    Args:
        model: int64 tokens [1, T] -> logits [1, T, V]. Under ZeRO-3 all ranks call together, and all draw
            the same tokens.
        prompt: int64 [T], not empty, on the model's device.
        num_tokens: how many tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens only.

    Returns:
        int64 [T + num_tokens], prompt included.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty; give at least one token")
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(num_tokens):
        logits = model(tokens[None])[0, -1].float().cpu()
        if temperature == 0:
            chosen = logits.argmax(keepdim=True)
        else:
            likeliest = logits.topk(min(top_k or len(logits), len(logits)))
            chances = (likeliest.values / temperature).softmax(-1)
            chosen = likeliest.indices[torch.multinomial(chances, 1, generator=generator)]
        tokens = torch.cat((tokens, chosen.to(tokens.device)))
    return tokens


def load_hf(directory: Path, *, dtype: torch.dtype) -> Llama:
    """The model of a Hugging Face LLaMA directory: `config.json` and safetensors, one file or sharded.

    The weights are cast to `dtype`, on the CPU. Every tensor must be there, of the right shape, and no other;
    only the RoPE buffers of old exports are ignored, and the copy of a tied head that some checkpoints carry.

    Raises:
        ValueError: a file is missing, unreadable or outside the directory, the config asks for what the model
            does not do, or a tensor is missing, unexpected, mis-shaped or not tied as the config says. Names
            file and tensor.
    """
    directory = Path(directory)
    model = Llama(shapes.resolve(directory.absolute()))
    stored = stored_weights(directory, model.shape)
    for name, parameter in model.named_parameters():
        # A copy, because the file may be replaced. The fp32 memory given up here was never touched.
        parameter.data = stored[name].to(dtype, copy=True)
    return model


def stored_weights(directory: Path, shape: LlamaShape) -> dict[str, Tensor]:
    """Name -> memory-mapped tensor of every parameter of `shape` in a Hugging Face directory.

    Raises `ValueError` as `load_hf` does; its `config.json` is not read.
    """
    places = locate(directory, shape)
    weights: dict[str, Tensor] = {}
    for file in dict.fromkeys(places.values()):
        with safe_open(file, framework="pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name, place in places.items() if place == file}
    head = weights.pop("lm_head.weight", None) if shape.tied else None
    if head is not None and not torch.equal(head, weights["model.embed_tokens.weight"]):
        file = places["lm_head.weight"]
        raise ValueError(f"{file}: lm_head.weight differs from the embedding that config.json ties it to")
    return weights
