"""What the model does with text that it was not trained on: losses on held-out sequences, and samples."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from optim.step.zero import ZeroOptimizer
from training.config import TrainConfig
from training.data.dataset import TokenDataset, of_share, validation_batches
from training.data.frequency import NUM_DECILES, count_tokens, deciles
from training.model.attention import for_changing_lengths
from training.model.llama import generate
from training.model.loss import IGNORED_TARGET
from training.run.batches import documents
from training.run.context import Context

SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.7, 40


class Validation:
    """Evaluates a run's model at its weights, also where a rule keeps another point. Collective."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        engine: Any,
        optimizer: ZeroOptimizer,
        dataset: TokenDataset,
        training: TokenDataset,
        context: Context,
        on_batch: Callable[[], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._optimizer = optimizer
        self._dataset = dataset
        self._tokenizer = Tokenizer.from_file(str(dataset.directory / dataset.manifest.tokenizer_file))
        self._context, self._on_batch = context, on_batch
        self._deciles: torch.Tensor | None = None
        if config.evaluation.frequency_deciles:
            counts = count_tokens(training, vocab_size=dataset.manifest.vocab_size)
            self._deciles = torch.from_numpy(deciles(counts)).to(context.device)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean losses in nats per token over held-out sequences, the same ones every time.

        `validation_loss`; also `tuning_loss`, over other sequences, if the configuration asks for it. Those
        of a mixture are means by weight; the loss of each source stands beside them (`validation_loss_NAME`).
        With `optim.average_decay` also `averaged_loss`, of the averaged weights on the same sequences.
        With `evaluation.frequency_deciles` also `validation_loss_decile_1` (the most frequent tokens) to 10,
        of the same pass; its logits take a sequence at a time.
        With `batch.document_masks` tokens see their own documents alone, as in training.
        """
        evaluation = self._config.evaluation
        self._engine.eval()
        with self._optimizer.at_weights():
            losses = self._by_source("validation_loss", evaluation.sequences, by_decile=True)
            if tuning := evaluation.tuning_sequences:
                losses |= self._by_source("tuning_loss", tuning, apart_from=evaluation.sequences)
        if self._config.optim.average_decay:
            with self._optimizer.at_weights(averaged=True):
                losses |= self._by_source("averaged_loss", evaluation.sequences)
        return losses

    def _by_source(
        self, name: str, sequences: int, *, apart_from: int = 0, by_decile: bool = False
    ) -> dict[str, float]:
        """by_decile: also of each decile, if the configuration asks for it."""
        shares = self._dataset.shares
        totals: torch.Tensor | None = None  # summed loss and tokens of each decile
        if by_decile and self._deciles is not None:
            totals = torch.zeros(2, NUM_DECILES, dtype=torch.float64, device=self._context.device)
        losses = {
            source: self._loss(
                of_share(sequences, share),
                apart_from=of_share(apart_from, share),
                within=self._dataset.parts[source],
                by_decile=totals,
            )
            for source, share in shares.items()
        }
        found = {name: sum(shares[source] * loss for source, loss in losses.items())}
        found |= {f"{name}_{source}": loss for source, loss in losses.items() if source}
        if totals is not None:
            each = zip(*self._context.sum(totals).tolist(), strict=True)
            found |= {f"{name}_decile_{i}": total / num for i, (total, num) in enumerate(each, 1) if num}
        return found

    def _loss(
        self, sequences: int, *, apart_from: int, within: range, by_decile: torch.Tensor | None
    ) -> float:
        context = self._context
        totals = torch.zeros(2, dtype=torch.float64)  # summed loss, sequences
        for tokens, weights in validation_batches(
            self._dataset,
            sequences=sequences,
            apart_from=apart_from,
            within=within,
            rank=context.rank,
            world_size=context.world_size,
            micro_sequences=self._config.batch.micro_sequences if by_decile is None else 1,
        ):
            self._on_batch()
            batch = torch.from_numpy(tokens).to(context.device)
            real = torch.from_numpy(weights).to(context.device)
            inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:]
            masks = documents(self._config, self._dataset, tokens[:, :-1], context.device)
            # Rows of weight 0 only keep the collective forward passes of ZeRO-3 in step.
            if by_decile is None:
                targets = targets.masked_fill((real == 0)[:, None] & bool(real.any()), IGNORED_TARGET)
                loss = self._engine(inputs, targets, *masks).item()
            else:
                [logits] = self._engine(inputs, None, *masks)
                loss = self._add(logits, targets[0], weight=weights.item(), totals=by_decile)
            totals += torch.tensor([loss * weights.sum(), weights.sum()], dtype=torch.float64)
        totals = context.sum(totals.to(context.device))
        return (totals[0] / totals[1]).item()

    def _add(
        self, logits: torch.Tensor, targets: torch.Tensor, *, weight: float, totals: torch.Tensor
    ) -> float:
        """The mean loss of a sequence, whose tokens are added to the totals of their deciles."""
        assert self._deciles is not None
        losses = F.cross_entropy(logits.float(), targets, reduction="none").double()
        added = torch.stack([losses * weight, torch.full_like(losses, weight)])
        totals.index_add_(1, self._deciles[targets], added)
        return losses.mean().item()

    @torch.no_grad()
    def samples(self) -> dict[str, str]:
        """Prompt -> the prompt and what the model writes after it."""
        evaluation = self._config.evaluation
        if not evaluation.sample_tokens:
            return {}
        self._engine.eval()
        with self._optimizer.at_weights(), for_changing_lengths():
            return {prompt: self._continued(prompt) for prompt in evaluation.prompts}

    def _continued(self, prompt: str) -> str:
        tokens = generate(
            self._engine,
            torch.tensor(self._tokenizer.encode(prompt).ids, device=self._context.device),
            num_tokens=self._config.evaluation.sample_tokens,
            temperature=SAMPLE_TEMPERATURE,
            top_k=SAMPLE_TOP_K,
            seed=self._config.run.seed,
        )
        return self._tokenizer.decode(tokens.tolist())
