"""Writing a model as a Hugging Face LLaMA directory; `training.model.llama.load_hf` reads one."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from cluster import files
from cluster.record import origins
from training.model.chat_template import TEMPLATE_FILE
from training.model.shapes import LlamaShape, to_hf_config


def save_hf(
    directory: Path,
    *,
    shape: LlamaShape,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    tokenizer_file: Path,
    eos_id: int,
    bos_id: int | None = None,
    checkpoint: origins.Origin | None = None,
) -> None:
    """Write config, weights and tokenizer such that transformers (4 or 5), vLLM and `load_hf` load them.

    The directory appears whole or not at all, and replaces an earlier export only once it is on disk.

    Args:
        tensors: name -> tensor for every entry of `shape.parameters()`, on any device; the head of a tied
            shape may be among them and is left out. Taken one at a time and cast to `dtype` on the CPU.
        tokenizer_file: a `tokenizer.json` of the tokenizers library; a chat template beside it goes with it.
        eos_id: the token that ends a text.
        bos_id: the token that begins one, if there is any.
        checkpoint: what the tensors come from, for lineage.json; None writes no such file.

    Raises:
        ValueError: tensors are missing, unexpected or mis-shaped, the tokenizer does not know an id or has
            more tokens than the model, or the directory exists and is no export.
    """
    directory = Path(directory)
    if directory.exists() and not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: exists and is no earlier export; choose another directory")
    weights = _weights(shape, tensors, dtype=dtype)
    tokenizer_config = _tokenizer_config(Path(tokenizer_file), shape=shape, eos_id=eos_id, bos_id=bos_id)
    config = to_hf_config(shape, dtype=str(dtype).removeprefix("torch."), eos_id=eos_id, bos_id=bos_id)

    with files.replace_folder(directory) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        files.set_mode_of_folder(folder / "model.safetensors")
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        if (template := Path(tokenizer_file).with_name(TEMPLATE_FILE)).is_file():
            shutil.copyfile(template, folder / TEMPLATE_FILE)
        files.write_json(folder / "config.json", config)
        files.write_json(folder / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id})
        files.write_json(folder / "tokenizer_config.json", tokenizer_config)
        if checkpoint is not None:
            origins.write_export(folder, checkpoint)


def _weights(
    shape: LlamaShape,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in pairs}
    if shape.tied:
        weights.pop("lm_head.weight", None)
    expected = shape.parameters()
    for name in [*expected, *weights]:
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != expected.get(name, "missing"):
            raise ValueError(f"tensor {name}: given {found}, in the model {expected.get(name, 'missing')}")
    return weights


def _tokenizer_config(file: Path, *, shape: LlamaShape, eos_id: int, bos_id: int | None) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(file))
    if tokenizer.get_vocab_size() > shape.vocab_size:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"{file}: has {size} tokens, the model's vocabulary only {shape.vocab_size}")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    for role, token_id in (("bos_token", bos_id), ("eos_token", eos_id)):
        if token_id is not None:
            token = tokenizer.id_to_token(token_id)
            if token is None:
                raise ValueError(f"{file}: has no token with id {token_id} to serve as {role}")
            config[role] = token
    return config
