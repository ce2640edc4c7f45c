"""Weights to start a run from: `load=hf:DIR`, a Hugging Face LLaMA directory (continued pretraining)."""

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import files
from cluster.cli import UserError
from cluster.record import origins
from training.config import TrainConfig
from training.data.dataset import TokenDataset
from training.data.tokenizer import load_tokenizer
from training.model.shapes import LlamaShape

if TYPE_CHECKING:  # the launcher imports this module, and torch only if a run starts from weights
    from torch import Tensor

TOKENIZER = "tokenizer.json"


class HuggingFaceWeights:
    """The weights of a directory, read as a checkpoint whose optimizer has taken no step.

    Raises:
        UserError: a file is missing or unreadable, or a tensor is missing or of another shape.
    """

    def __init__(self, directory: Path, shape: LlamaShape) -> None:
        from training.model.llama import stored_weights

        try:
            self._tensors = stored_weights(directory, shape)
        except ValueError as error:
            raise UserError(f"load: {error}") from error

    def read(self, parameter: str, name: str, start: int, stop: int) -> "Tensor":
        """As `Checkpoint.read`: 1-D, fp32. What is no weight is the optimizer's state, which starts at 0."""
        import torch

        from optim.step.after import AVERAGE
        from optim.step.saved import MASTER, POINT

        if name in (MASTER, POINT, AVERAGE):
            return self._tensors[parameter].flatten()[start:stop].float()
        return torch.zeros(stop - start)


def require_tokenizer(config: TrainConfig) -> None:
    """Raise a `UserError` if the data are to get a tokenizer of their own."""
    directory = config.load_directory
    if directory and config.data.tokenizer == "train" and (directory / TOKENIZER).is_file():
        raise UserError(
            f"data.tokenizer: 'train' makes another vocabulary than that of {config.load}; set "
            f"data.tokenizer={directory / TOKENIZER}"
        )


def require_same_tokens(directory: Path, data: TokenDataset) -> str | None:
    """Raise a `UserError` unless prepared data have the vocabulary of the weights' tokenizer.

    Returns why that cannot be known, if it cannot.
    """
    if not (directory / TOKENIZER).is_file():
        return (
            f"{directory} has no {TOKENIZER}: make sure that {data.directory} has the tokens of its weights"
        )
    theirs, ours = (
        load_tokenizer(file).get_vocab()
        for file in (directory / TOKENIZER, data.directory / data.manifest.tokenizer_file)
    )
    differing = sorted(token for token, number in ours.items() if theirs.get(token) != number)
    if differing:
        raise UserError(
            f"data.tokenizer: {len(differing)} of {len(ours)} tokens of {data.directory} are not those of "
            f"{directory / TOKENIZER}, such as {differing[0]!r}; set data.tokenizer={directory / TOKENIZER}"
        )
    return None


@functools.cache  # the record opens again after a rewind
def origin_of(directory: Path) -> origins.Origin:
    """The origin of the weights. Of a directory that is no export of ours, all of them are hashed."""
    made = origins.of_model(directory)
    if made.pop("fingerprint_of", None):
        whole = hashlib.sha256()
        for file in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
            whole.update(f"{file.name}\n{files.sha256_of(file)}\n".encode())
        made["fingerprint"] = whole.hexdigest()
    return made
