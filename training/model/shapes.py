"""Shapes of LLaMA models: named ones, those of Hugging Face configs, and what follows from them. No torch.

Everything that can be known of a model before it is built is counted here, once: parameters, hidden
matrices, FLOPs per token. The architecture: LLaMA, arXiv 2302.13971; grouped-query attention,
arXiv 2305.13245; the long-context RoPE of Llama 3.1, arXiv 2407.21783; QK-norm as in Qwen3, arXiv 2505.09388.
"""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import files
from training.model import rope

# Far above every model so far, and below what would take minutes to count or fill any machine.
MOST = {
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "num_layers": 10_000,
    "num_heads": 100_000,
    "head_dim": 100_000,
    "ffn_size": 10_000_000,
}
MOST_PARAMETERS = 10**13


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The sizes of a LLaMA model. Raises `ValueError`, naming the field, for sizes that fit no model."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rope_theta: float = 10_000.0
    rope_scaling: rope.Scaling | None = None
    norm_eps: float = 1e-5
    max_positions: int = 2048
    tied: bool = False  # the output head is the input embedding
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, before RoPE
    qkv_bias: bool = False  # of the projections to queries, keys and values
    out_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int:
                value = getattr(self, field.name)
                _require(
                    isinstance(value, int) and value >= 1, field.name, f"{value!r} is no positive integer"
                )
                most = MOST.get(field.name, value)
                _require(value <= most, field.name, f"{value:,} is above {most:,}, the most that is taken")
            elif field.type is float:
                value = getattr(self, field.name)
                usable = isinstance(value, int | float) and 0 < value < 1e30
                _require(usable, field.name, f"{value!r} is not a usable number")
        # Attention could do without the first, but transformers refuses to load such a model.
        for whole, part in (("hidden_size", "num_heads"), ("num_heads", "num_kv_heads")):
            size, divisor = getattr(self, whole), getattr(self, part)
            _require(size % divisor == 0, part, f"{divisor} does not divide {whole}={size}")
        _require(self.head_dim % 2 == 0, "head_dim", f"{self.head_dim} is odd; RoPE rotates pairs")
        layer = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim + 3 * self.ffn_size
        total = self.hidden_size * (self.num_layers * layer + self.vocab_size)
        problem = (
            f"with the other sizes this is {total:.2g} parameters; at most {MOST_PARAMETERS:.0e} are taken"
        )
        _require(total <= MOST_PARAMETERS, "hidden_size", problem)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter, named and ordered as in transformers' LlamaForCausalLM.

        With `qk_norm` as in its Qwen3ForCausalLM: one gain of head_dim for queries and one for keys, the same
        for all heads of a layer. (OLMo 2's norms are as wide as all heads together: another model.)
        As there, a bias follows its matrix. Matrices are (rows, columns) = (output, input). A tied head is no
        parameter of its own.
        """
        hidden, ffn = self.hidden_size, self.ffn_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            **dict.fromkeys(
                ("self_attn.q_norm", "self_attn.k_norm") if self.qk_norm else (), (self.head_dim,)
            ),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        biased = [
            *(f"self_attn.{name}_proj" for name in ("qkv" if self.qkv_bias else "") + "o" * self.out_bias),
            *(f"mlp.{name}_proj" for name in (("gate", "up", "down") if self.mlp_bias else ())),
        ]
        for index in range(self.num_layers):
            for name, size in layer.items():
                sizes[f"model.layers.{index}.{name}.weight"] = size
                if name in biased:
                    sizes[f"model.layers.{index}.{name}.bias"] = size[:1]
        sizes["model.norm.weight"] = (hidden,)
        if not self.tied:
            sizes["lm_head.weight"] = (self.vocab_size, hidden)
        return sizes

    def matrices(self) -> Counter[tuple[int, int]]:
        """(rows, columns) -> number of hidden matrices of that size; embedding and head are not hidden."""
        sizes = [size for name, size in self.parameters().items() if ".layers." in name]
        return Counter((size[0], size[1]) for size in sizes if len(size) == 2)

    def products(self) -> Counter[tuple[int, int]]:
        """(rows, columns) -> number of matrices of that size that every token is multiplied with.

        These are the hidden matrices and the head, tied or not.
        """
        return self.matrices() + Counter([(self.vocab_size, self.hidden_size)])

    @property
    def num_parameters(self) -> int:
        """Trainable scalars; a tied head counts once, with the embedding."""
        return sum(math.prod(size) for size in self.parameters().values())

    @property
    def num_matmul_parameters(self) -> int:
        """Scalars of `products`.

        Without the embedding, which is a lookup, and the norms, which are elementwise.
        """
        return sum(rows * columns * count for (rows, columns), count in self.products().items())

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs per token, forward and backward: 6·N_matmul + 12·L·(heads·head_dim)·sequence_length.

        The convention of PaLM's MFU (arXiv 2204.02311, appendix B): the whole attention matrix counts,
        although a causal kernel skips half of it; recomputation does not count.
        """
        attention = 12 * self.num_layers * self.num_heads * self.head_dim * sequence_length
        return 6 * self.num_matmul_parameters + attention

    @property
    def last_token_flops(self) -> int:
        """FLOPs of the last layer's products with weights that only the last token of a prompt needs.

        Those of its queries, of attention's output and of its MLP. The other tokens have to leave nothing
        but keys and values there.
        """
        return 2 * self.hidden_size * (2 * self.num_heads * self.head_dim + 3 * self.ffn_size)

    def prefill_flops(self, prompt_tokens: int) -> int:
        """FLOPs that the first token after a prompt of S tokens needs.

        2·(N_hidden − N_last)·S + 2·N_last + 2·vocabulary·hidden + 2·(L − 1)·d·S² + 4·d·S, d = heads·head_dim.
        N_hidden: scalars of the hidden matrices; N_last: those that only the last token needs
        (`last_token_flops`), as it alone needs the head and the last layer's attention (4·S·d). In the other
        layers attention is causal, so half of the scores (2·S·S·d each for QKᵀ and for the mix with V) count.
        No engine computes less, so no share of a peak exceeds 100% by what is left out.
        """
        width = self.num_heads * self.head_dim
        once = self.last_token_flops + 2 * self.vocab_size * self.hidden_size
        attention = 2 * (self.num_layers - 1) * width * prompt_tokens**2 + 4 * width * prompt_tokens
        return (2 * self.num_matmul_parameters - once) * prompt_tokens + once + attention

    def decode_flops(self, context_tokens: float) -> float:
        """FLOPs of decoding one token that sees `context_tokens`: 2·N_matmul + 4·L·d·context."""
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * context_tokens
        return 2 * self.num_matmul_parameters + attention

    def kv_bytes_per_token(self, width_bytes: int) -> int:
        """Keys and values of one token in all layers, each scalar in `width_bytes`."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * width_bytes

    def decode_bytes(self, *, batch: int, context_tokens: float, width_bytes: int) -> float:
        """Least bytes read in one decoding step: the weights but the embedding, once, and each context."""
        weights = width_bytes * self.num_matmul_parameters
        return weights + batch * context_tokens * self.kv_bytes_per_token(width_bytes)


def _require(condition: bool, name: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {problem}")


def _shape(
    hidden_size: int, *, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int = 32_000, **other: Any
) -> LlamaShape:
    return LlamaShape(
        vocab_size=vocab,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden_size // heads,
        ffn_size=ffn,
        **other,
    )


def _llama_3(hidden_size: int, *, factor: float, **other: Any) -> LlamaShape:
    scaling = rope.RopeScaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    public: dict[str, Any] = {"vocab": 128_256, "rope_theta": 500_000.0, "max_positions": 131_072}
    return _shape(hidden_size, kv_heads=8, rope_scaling=scaling, **public, **other)


SHAPES = {
    # Ours: llama-5m learns on two CPU cores in minutes; llama-1b4 is for a cluster of A40s.
    "llama-5m": _shape(256, layers=4, heads=4, kv_heads=2, ffn=688, vocab=8192, tied=True),
    "llama-1b4": _shape(2048, layers=24, heads=16, kv_heads=16, ffn=5504, vocab=50_304),
    # The usual sizes of optimizer papers: https://github.com/jiaweizzhao/GaLore/tree/master/configs
    "llama-60m": _shape(512, layers=8, heads=8, kv_heads=8, ffn=1376, norm_eps=1e-6, max_positions=1024),
    "llama-130m": _shape(768, layers=12, heads=12, kv_heads=12, ffn=2048, norm_eps=1e-6, max_positions=1024),
    "llama-350m": _shape(1024, layers=24, heads=16, kv_heads=16, ffn=2736, norm_eps=1e-6, max_positions=1024),
    # https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json
    "llama-2-7b": _shape(4096, layers=32, heads=32, kv_heads=32, ffn=11_008, max_positions=4096),
    # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
    "llama-3.1-8b": _llama_3(4096, layers=32, heads=32, ffn=14_336, factor=8.0),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "llama-3.2-1b": _llama_3(2048, layers=16, heads=32, ffn=8192, factor=32.0, tied=True),
    # https://huggingface.co/meta-llama/Llama-3.2-3B/blob/main/config.json
    "llama-3.2-3b": _llama_3(3072, layers=28, heads=24, ffn=8192, factor=32.0, tied=True),
}


def resolve(name_or_path: str | Path, **overrides: Any) -> LlamaShape:
    """A named shape, or that of a Hugging Face `config.json` or the directory that holds one.

    `overrides` replace fields of `LlamaShape`; None keeps. A shape with head_dim = hidden_size/num_heads or
    num_kv_heads = num_heads stays one.

    Raises:
        ValueError: no such name or file, a config that our model cannot follow, sizes that fit no model, or a
            link in the directory that leads out of it.
    """
    shape = SHAPES.get(str(name_or_path)) or _read(Path(name_or_path).expanduser())
    changes = {name: value for name, value in overrides.items() if value is not None}
    heads = changes.get("num_heads", shape.num_heads)
    if shape.num_heads * shape.head_dim == shape.hidden_size:
        changes.setdefault("head_dim", changes.get("hidden_size", shape.hidden_size) // max(heads, 1))
    if shape.num_kv_heads == shape.num_heads:
        changes.setdefault("num_kv_heads", heads)
    return dataclasses.replace(shape, **changes)


def _read(path: Path) -> LlamaShape:
    file = path
    if path.is_dir():
        for entry in sorted(path.iterdir()):  # all, because vLLM and transformers read more than we do
            files.inside(path, entry.name)
        file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no such config.json, nor a shape's name; those are {', '.join(SHAPES)}")
    try:
        return from_hf_config(files.read_json(file))
    except files.DamagedFile:
        raise
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# What other keys of a config may say, besides null; anything else is a model that ours is not. Some are of
# models whose config says "llama" although LLaMA ignores the key: Granite, MiniCPM, Gemma, OLMo, Llama 4.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "attention_multiplier": (),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "clip_qkv": (),
    "alibi": (False,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
}
# Architectures that are LLaMA but for a bias or a norm, and what their configs in transformers assume where
# LlamaConfig assumes something else.
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "attention_bias": None},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32_768},
}
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def from_hf_config(config: dict[str, Any]) -> LlamaShape:
    """The shape that a Hugging Face `config.json` of transformers 4 or 5 describes: LLaMA, or one of _KINDS.

    Mistral is LLaMA, Qwen2 has biases of queries, keys and values, Qwen3 (without experts) has `qk_norm`.
    Optional keys take transformers' defaults. RoPE is read from `rope_parameters` (5) or from `rope_theta`
    and `rope_scaling` (4).

    Raises:
        ValueError: a missing key, or one that asks for what our model does not do: another architecture,
            dropout, quantised weights, another activation, a sliding window below the context, soft caps,
            multipliers, or a RoPE that `training.model.rope` does not know.
    """
    if not isinstance(config, dict):
        raise ValueError("holds no JSON object")
    for name in ("rope_parameters", "rope_scaling"):
        _require(isinstance(config.get(name), dict | None), name, f"{config.get(name)!r} is no object")
    kind = config.get("model_type") or "llama"
    supported = ", ".join(map(repr, _KINDS))
    _require(isinstance(kind, str) and kind in _KINDS, "model_type", f"{kind!r} is not one of: {supported}")
    config = _KINDS[kind] | config
    config |= rope.keys_of(config)
    for name, only in _ONLY.items():
        value = config.get(name)
        problem = f"{value!r} is not supported, only {' or '.join(map(repr, only)) or 'null'}"
        _require(value is None or value in only, name, problem)
    for name in _SWITCHES:
        value = config.get(name)
        _require(isinstance(value, bool | None), name, f"{value!r} is neither true nor false")

    def required(name: str) -> Any:
        _require(config.get(name) is not None, name, "missing from the config")
        return config[name]

    scaling = rope.from_hf(config)
    hidden_size, num_heads = required("hidden_size"), required("num_attention_heads")
    for name in ("hidden_size", "num_attention_heads"):
        _require(isinstance(config[name], int), name, f"{config[name]!r} is no integer")
    biased = bool(config.get("attention_bias"))
    shape = LlamaShape(
        vocab_size=required("vocab_size"),
        hidden_size=hidden_size,
        num_layers=required("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or hidden_size // max(num_heads, 1),
        ffn_size=required("intermediate_size"),
        rope_theta=config.get("rope_theta") or 10_000.0,
        rope_scaling=scaling,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_positions=config.get("max_position_embeddings", 2048),
        tied=bool(config.get("tie_word_embeddings")),
        qk_norm=kind == "qwen3",
        qkv_bias=biased or kind == "qwen2",
        out_bias=biased and kind != "qwen2",
        mlp_bias=bool(config.get("mlp_bias")),
    )
    _require_no_window(config, shape, always=kind in ("llama", "mistral"))
    return shape


def _require_no_window(config: dict[str, Any], shape: LlamaShape, *, always: bool) -> None:
    """Raise `ValueError` if attention sees less than the whole context.

    Args:
        always: a window counts without `use_sliding_window`, which is Qwen's.
    """
    kinds = config.get("layer_types") or []
    known = isinstance(kinds, list) and all(one in ("full_attention", "sliding_attention") for one in kinds)
    _require(known, "layer_types", f"{kinds!r} is more than full_attention")
    window = config.get("sliding_window")
    used = config.get("use_sliding_window")
    if "sliding_attention" not in kinds and not (always if used is None else used):
        return
    most = shape.max_positions
    whole = window is None or (isinstance(window, int) and window >= most)
    remedy = f"to use the model within its window set max_position_embeddings to it, which is now {most}"
    _require(
        whole, "sliding_window", f"{window!r} is not supported: attention here sees everything; {remedy}"
    )


def eos_ids(directory: Path, *, vocab_size: int | None = None) -> list[int]:
    """The tokens that end a text: generation_config.json of a Hugging Face directory, else config.json.

    Raises:
        ValueError: one of them is no JSON object, or says something else than token ids (below `vocab_size`).
    """
    most = math.inf if vocab_size is None else vocab_size
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.is_file():
            continue
        content = files.read_json(file)
        _require(isinstance(content, dict), str(file), "holds no JSON object")
        found = content.get("eos_token_id")
        ids = [] if found is None else found if isinstance(found, list) else [found]
        usable = all(type(one) is int and 0 <= one < most for one in ids)
        problem = f"{found!r} is neither a token id of the model nor a list of them"
        _require(usable, f"{file}: eos_token_id", problem)
        if ids:
            return ids
    return []


def to_hf_config(
    shape: LlamaShape, *, dtype: str, eos_id: int | None = None, bos_id: int | None = None
) -> dict[str, Any]:
    """The `config.json` of a model of this shape whose weights are kept in `dtype` ("bfloat16", "float32").

    LLaMA's, or with `qk_norm` Qwen3's. Says RoPE and dtype in the words of both transformers 4 and 5.
    `from_hf_config` reads it back.
    """
    told = rope.to_hf(shape.rope_scaling)
    biases = shape.qkv_bias, shape.out_bias
    name = "Qwen3" if shape.qk_norm else "Qwen2" if biases == (True, False) else "Llama"
    possible = biases != (False, True) and not (shape.mlp_bias and name != "Llama")
    possible = possible and not (shape.qk_norm and biases == (True, False))
    _require(possible, "out_bias", "transformers has no model with these biases")
    only: dict[str, Any] = {"attention_bias": shape.qkv_bias, "mlp_bias": shape.mlp_bias}
    if name != "Llama":
        only = {"attention_bias": shape.out_bias, "use_sliding_window": False, "sliding_window": None}
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        **only,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_parameters": told | {"rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "rope_scaling": told if shape.rope_scaling else None,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
