"""Perplexity of a checkpoint on held-out text, by our own data path."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.cli import UserError
from cluster.files import sha256_of
from cluster.progress import Progress
from training.data.dataset import Manifest, TokenDataset, validation_batches
from training.model.llama import Llama

LARGEST_LOSS = 700.0  # of which a float holds the exponential


@dataclass(frozen=True)
class HeldOut:
    """Mean loss over held-out sequences, in nats per token.

    Attributes:
        loss_stderr: standard error of the mean over sequences; None for one sequence.
        perplexity: exp(loss).
        tokens: predicted ones.
        num_sequences: of `of_sequences` in the validation split.
    """

    loss: float
    loss_stderr: float | None
    perplexity: float
    tokens: int
    num_sequences: int
    of_sequences: int
    sequence_length: int
    data: str
    data_fingerprint: str

    @property
    def perplexity_stderr(self) -> float | None:
        """That of the loss, to first order."""
        return None if self.loss_stderr is None else self.perplexity * self.loss_stderr


def check_tokenizer(data: Path, *, checkpoint: Path) -> Manifest:
    """The manifest of a prepared folder. Raises `UserError`: its tokenizer is not the checkpoint's."""
    manifest = Manifest.read(data)
    tokenizer = checkpoint / "tokenizer.json"
    if (found := sha256_of(tokenizer)) != manifest.tokenizer_sha256:
        raise UserError(
            f"data: {data} was prepared with another tokenizer (SHA-256 {manifest.tokenizer_sha256[:12]}…) "
            f"than {tokenizer} ({found[:12]}…), so a perplexity would mean nothing; prepare the text "
            f"with it: `python -m training.data.prepare data.tokenizer={tokenizer} data.source=...`"
        )
    return manifest


@torch.no_grad()
def measure(
    model: Llama, data: Path, *, sequences: int, sequence_length: int, batch_size: int, device: torch.device
) -> HeldOut:
    """The loss over `sequences` (0: all) samples of the validation split, evenly spaced.

    Args:
        data: a prepared folder; its tokenizer must be the model's (`check_tokenizer`).

    Raises:
        DataError: it cannot be used, or holds no sequence of this length.
        UserError: its vocabulary is larger than the model's, or the loss is not finite.
    """
    dataset = TokenDataset.open(data, split="validation", sequence_length=sequence_length)
    if dataset.manifest.vocab_size > model.shape.vocab_size:
        raise UserError(
            f"data: {data} has {dataset.manifest.vocab_size} tokens, the model {model.shape.vocab_size}; "
            "name data that were prepared for it"
        )
    losses: list[float] = []
    number = min(sequences or dataset.num_samples, dataset.num_samples)
    batches = validation_batches(
        dataset, sequences=number, rank=0, world_size=1, micro_sequences=batch_size
    )  # fmt: skip
    with Progress(number, unit="sequence") as progress:
        progress.advance("perplexity", by=0)
        for tokens, weights in batches:
            batch = torch.from_numpy(tokens[weights > 0]).to(device)
            logits = model(batch[:, :-1].contiguous())
            losses += [_loss(*row) for row in zip(logits, batch[:, 1:], strict=True)]
            progress.advance(by=len(batch))
    loss = math.fsum(losses) / len(losses)
    if not loss < LARGEST_LOSS:  # NaN too
        raise UserError(
            f"model: its loss on {data} is {loss:.4g}; the weights are damaged, or of a run that diverged: "
            "export or copy it again, or evaluate an earlier checkpoint"
        )
    return HeldOut(
        loss=loss,
        loss_stderr=_stderr(losses, mean=loss),
        perplexity=math.exp(loss),
        tokens=len(losses) * sequence_length,
        num_sequences=len(losses),
        of_sequences=dataset.num_samples,
        sequence_length=sequence_length,
        data=str(data),
        data_fingerprint=dataset.manifest.fingerprint,
    )


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Of one sequence, logits [T, V] and targets [T]. Only its logits are in memory as fp32."""
    return F.cross_entropy(logits.float(), targets).item()


def _stderr(losses: list[float], *, mean: float) -> float | None:
    if len(losses) < 2:
        return None
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
    return math.sqrt(variance / len(losses))
