import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from training.model import shapes
from training.model.rope import LinearScaling, RopeScaling, YarnScaling, from_fields
from training.model.shapes import SHAPES, LlamaShape, from_hf_config, resolve, to_hf_config

TINY = LlamaShape(
    vocab_size=11, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_size=10
)


def test_parameter_counts() -> None:
    assert {name: shape.num_parameters for name, shape in SHAPES.items()} == {
        "llama-5m": 4_999_424,
        "llama-60m": 58_073_600,
        "llama-130m": 134_105_856,
        "llama-350m": 367_969_280,
        "llama-1b4": 1_420_396_544,
        "llama-2-7b": 6_738_415_616,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
    }


def test_matrices_of_the_1b4() -> None:
    assert SHAPES["llama-1b4"].matrices() == {(2048, 2048): 96, (5504, 2048): 48, (2048, 5504): 24}


def test_counts_by_hand() -> None:
    attention = 24 * 8 + 12 * 8 + 12 * 8 + 8 * 24
    hidden = 2 * (attention + 3 * 8 * 10)
    assert TINY.num_matmul_parameters == hidden + 11 * 8
    assert TINY.num_parameters == hidden + 2 * 11 * 8 + 5 * 8
    assert TINY.flops_per_token(16) == 6 * (hidden + 88) + 12 * 2 * 24 * 16


def test_tying_drops_one_table_but_no_matmul() -> None:
    tied = resolve("llama-60m", tied=True)
    untied = SHAPES["llama-60m"]
    assert untied.num_parameters - tied.num_parameters == 32_000 * 512
    assert untied.num_matmul_parameters == tied.num_matmul_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: 0 is no positive integer"),
        ({"vocab_size": 2.5}, "vocab_size: 2.5 is no positive integer"),
        ({"num_heads": 3}, "num_heads: 3 does not divide hidden_size=8"),
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads=4"),
        ({"head_dim": 5}, "head_dim: 5 is odd"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"norm_eps": -1e-5}, "norm_eps"),
    ],
)
def test_nonsense_names_the_field(changes: dict, message: str) -> None:
    fields = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        LlamaShape(**(fields | changes))


def test_rope_scaling_must_be_ordered() -> None:
    with pytest.raises(ValueError, match=r"rope_scaling\.high_freq_factor"):
        RopeScaling(8.0, low_freq_factor=4.0, high_freq_factor=1.0, original_max_positions=8192)


@pytest.mark.parametrize("name", SHAPES)
def test_hf_config_round_trips(name: str) -> None:
    shape = SHAPES[name]
    config = to_hf_config(shape, dtype="bfloat16", eos_id=2)
    assert from_hf_config(json.loads(json.dumps(config))) == shape
    without_v5 = {key: value for key, value in config.items() if key != "rope_parameters"}
    without_v4 = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    assert from_hf_config(without_v5) == from_hf_config(without_v4) == shape


def test_a_public_llama_3_config_of_transformers_4() -> None:
    config = {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    }
    assert from_hf_config(config) == SHAPES["llama-3.1-8b"]


def test_a_public_qwen3_config_of_transformers_4() -> None:
    """https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json"""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    shape = from_hf_config(config)
    assert shape.qk_norm and shape.tied and shape.rope_theta == 1e6
    assert shape.num_parameters == 596_049_920  # of the model card: 0.6B
    assert from_hf_config(to_hf_config(shape, dtype="bfloat16")) == shape
    assert from_hf_config({**config, "head_dim": None, "num_key_value_heads": 4}).head_dim == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "olmo2"}, "model_type: 'olmo2' is not one of: 'llama', 'mistral', 'qwen2', 'qwen3'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window: 4096 is"),
        ({"sliding_window": 8}, "sliding_window: 8 is not supported: .* now 2048"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8}, "sliding_window: 8"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 8}, "sliding_window: 8"),
        ({"layer_types": ["chunked_attention"]}, "layer_types: .*chunked_attention"),
        ({"attention_bias": "no"}, "attention_bias: 'no' is neither true nor false"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"logits_scaling": 8.0}, "logits_scaling: 8.0 is not supported, only 1.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is not supported, only null"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_type: 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor: '4' is not a usable number"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "factor: missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling: says something else than"),
        ({"rope_theta": 500_000.0}, "rope_theta: is 500000.0 and 10000.0 in rope_parameters and beside it"),
        ({"hidden_size": None}, "hidden_size: missing"),
    ],
)
def test_other_models_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(to_hf_config(TINY, dtype="float32") | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}, {"mlp_bias": True},
        {"qk_norm": True, "qkv_bias": True, "out_bias": True}, {"rope_scaling": LinearScaling(2.0)},
        {"rope_scaling": YarnScaling(4.0, 64, 32, 1, 1.2, False)},
    ],
)  # fmt: skip
def test_biases_and_scalings_survive_a_config_and_its_fields(changes: dict) -> None:
    shape = replace(TINY, **changes)
    assert from_hf_config(json.loads(json.dumps(to_hf_config(shape, dtype="float32")))) == shape
    fields = json.loads(json.dumps(asdict(shape)))
    assert LlamaShape(**fields | {"rope_scaling": from_fields(fields["rope_scaling"])}) == shape
    count = sum(math.prod(size) for name, size in shape.parameters().items() if name.endswith(".bias"))
    assert (count > 0) == bool({"qkv_bias", "out_bias", "mlp_bias"} & set(changes))


def test_biases_that_no_model_of_transformers_has_are_refused() -> None:
    for changes in (
        {"out_bias": True},
        {"qkv_bias": True, "mlp_bias": True},
        {"qk_norm": True, "mlp_bias": True},
    ):
        with pytest.raises(ValueError, match="transformers has no model with these biases"):
            to_hf_config(replace(TINY, **changes), dtype="float32")


def test_overrides_keep_none_and_carry_dependants_along() -> None:
    assert resolve("llama-60m", num_layers=None) == SHAPES["llama-60m"]
    smaller = resolve("llama-60m", hidden_size=64, num_heads=2)
    assert (smaller.head_dim, smaller.num_kv_heads) == (32, 2)
    assert resolve("llama-5m", num_heads=8).num_kv_heads == 2


def test_a_file_or_its_directory_resolves(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_hf_config(TINY, dtype="float32")))
    assert resolve(file) == resolve(str(tmp_path)) == TINY
    assert resolve(file, hidden_size=16).head_dim == TINY.head_dim  # 6 != 8/4: a size of its own


def test_errors_name_the_shapes_or_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llama-5mm: no such config\.json.*llama-5m, llama-1b4"):
        resolve("llama-5mm")
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=str(file)):
        resolve(file)
    with pytest.raises(ValueError, match="num_heads: 0"):
        resolve("llama-5m", num_heads=0)


def test_shapes_run_without_torch() -> None:
    code = "import sys; from training.model import shapes; assert 'torch' not in sys.modules"
    root = Path(shapes.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_the_tokens_that_end_a_text_stand_in_one_of_two_files(tmp_path: Path) -> None:
    assert shapes.eos_ids(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert shapes.eos_ids(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert shapes.eos_ids(tmp_path) == [5, 7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert shapes.eos_ids(tmp_path) == [2]


def test_a_damaged_file_of_them_is_named(tmp_path: Path) -> None:
    for text in (
        "{",
        "[]",
        '{"eos_token_id": "</s>"}',
        '{"eos_token_id": [1, true]}',
        '{"eos_token_id": -1}',
    ):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"generation_config\.json: "):
            shapes.eos_ids(tmp_path)
