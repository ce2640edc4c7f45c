"""Which files of a checkpoint are read, and what is refused by the name of file and tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.model.test_llama import export, tiny
from training.model.llama import load_hf


def test_other_formats_and_quantised_tensors_are_refused_by_name(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    directory = export(tiny(), tmp_path / "export", tokenizer_file)
    weights = load_file(directory / "model.safetensors")
    save_file(
        weights | {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, directory / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"model\.safetensors: tensor model\.norm\.weight is I8, not one of F64"
    ):
        load_hf(directory, dtype=torch.float32)
    (directory / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "a.gguf"):
        (directory / name).touch()
        with pytest.raises(ValueError, match=rf"neither model\.safetensors .*; {name} is of a format"):
            load_hf(directory, dtype=torch.float32)


def test_load_errors_name_tensor_and_file(tmp_path: Path, tokenizer_file: Path) -> None:
    directory = export(tiny(), tmp_path / "export", tokenizer_file)
    file = directory / "model.safetensors"
    weights = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    bad = {
        f"tensor {norm} is missing": {name: tensor for name, tensor in weights.items() if name != norm},
        "model.safetensors: tensor model.bias is unexpected": weights | {"model.bias": torch.ones(3)},
        rf"model.safetensors: tensor {norm} has shape \(3,\), .* \(64,\)": weights | {norm: torch.ones(3)},
    }
    for message, tensors in bad.items():
        save_file(tensors, file)
        with pytest.raises(ValueError, match=message):
            load_hf(directory, dtype=torch.float32)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_hf(directory, dtype=torch.float32)
    file.unlink()
    with pytest.raises(ValueError, match="is it safetensors"):
        load_hf(directory, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no such config\.json"):
        load_hf(tmp_path, dtype=torch.float32)


def test_a_checkpoint_is_read_within_its_directory_or_the_hubs_blobs(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    secret = export(tiny(seed=1), tmp_path / "secret", tokenizer_file) / "model.safetensors"
    snapshot = export(tiny(seed=2), tmp_path / "hub/models--a--b/snapshots/0123", tokenizer_file)
    blobs = tmp_path / "hub/models--a--b/blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):  # as the hub's cache is laid out
        file.rename(blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    names = list(tiny().shape.parameters())
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    loaded, expected = load_hf(snapshot, dtype=torch.float32), tiny(seed=2)
    assert all(map(torch.equal, loaded.parameters(), expected.parameters()))
    for name in (str(secret), "../../../../secret/model.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
        with pytest.raises(ValueError, match=r"leads out of .*0123, to .*secret"):
            load_hf(snapshot, dtype=torch.float32)
    for content in ("[]", "{}", '{"weight_map": {"a": 1, "b": "c"}}', '{"weight_map": ["a"]}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json: has no weight_map"):
            load_hf(snapshot, dtype=torch.float32)
    index.unlink()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        file = snapshot / name
        file.unlink()
        file.symlink_to(secret.with_name(name))
        with pytest.raises(ValueError, match=rf"{name}: leads out of"):
            load_hf(snapshot, dtype=torch.float32)
        file.unlink()
        file.symlink_to(f"../../blobs/{name}")


def test_old_rope_buffers_are_ignored_and_a_tied_head_must_be_tied(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    directory = export(tiny(tied=True), tmp_path / "export", tokenizer_file)
    weights = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights | {"lm_head.weight": embedding.clone()}, directory / "model.safetensors")
    loaded = load_hf(directory, dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, embedding)
    save_file(weights | {"lm_head.weight": embedding + 1}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_hf(directory, dtype=torch.float32)
