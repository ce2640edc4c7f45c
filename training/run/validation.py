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
        With `evaluation.frequency_deciles` also `validation_loss_decile_1` (the most frequent tokens) to 10.
        With `batch.document_masks` tokens see their own documents alone, as in training.
        """
        evaluation = self._config.evaluation
        self._engine.eval()
        with self._optimizer.at_weights():
            losses = self._by_source("validation_loss", evaluation.sequences)
            if tuning := evaluation.tuning_sequences:
                losses |= self._by_source("tuning_loss", tuning, apart_from=evaluation.sequences)
            if self._deciles is not None:
                losses |= self._by_decile(self._deciles)
        if self._config.optim.average_decay:
            with self._optimizer.at_weights(averaged=True):
                losses |= self._by_source("averaged_loss", evaluation.sequences)
        return losses

    def _by_source(self, name: str, sequences: int, *, apart_from: int = 0) -> dict[str, float]:
        shares = self._dataset.shares
        losses = {
            source: self._loss(
                of_share(sequences, share),
                apart_from=of_share(apart_from, share),
                within=self._dataset.parts[source],
            )
            for source, share in shares.items()
        }
        total = sum(shares[source] * loss for source, loss in losses.items())
        return {name: total} | {f"{name}_{source}": loss for source, loss in losses.items() if source}

    def _loss(self, sequences: int, *, apart_from: int, within: range) -> float:
        context = self._context
        totals = torch.zeros(2, dtype=torch.float64)  # summed loss, sequences
        for tokens, weights in validation_batches(
            self._dataset,
            sequences=sequences,
            apart_from=apart_from,
            within=within,
            rank=context.rank,
            world_size=context.world_size,
            micro_sequences=self._config.batch.micro_sequences,
        ):
            self._on_batch()
            batch = torch.from_numpy(tokens).to(context.device)
            real = torch.from_numpy(weights).to(context.device)
            # Rows of weight 0 only keep the collective forward passes of ZeRO-3 in step.
            targets = batch[:, 1:].masked_fill((real == 0)[:, None] & bool(real.any()), IGNORED_TARGET)
            masks = documents(self._config, self._dataset, tokens[:, :-1], context.device)
            loss = self._engine(batch[:, :-1].contiguous(), targets, *masks).item()
            totals += torch.tensor([loss * weights.sum(), weights.sum()], dtype=torch.float64)
        totals = context.sum(totals.to(context.device))
        return (totals[0] / totals[1]).item()

    def _by_decile(self, decile_of: torch.Tensor) -> dict[str, float]:
        """The validation loss of the tokens of each decile, from logits, a sequence at a time."""
        context = self._context
        totals = torch.zeros(2, NUM_DECILES, dtype=torch.float64, device=context.device)
        for tokens, [real] in validation_batches(
            self._dataset,
            sequences=self._config.evaluation.sequences,
            rank=context.rank,
            world_size=context.world_size,
            micro_sequences=1,
        ):
            self._on_batch()
            [sequence] = torch.from_numpy(tokens).to(context.device)
            masks = documents(self._config, self._dataset, tokens[:, :-1], context.device)
            [logits] = self._engine(sequence[None, :-1], None, *masks)
            losses = F.cross_entropy(logits.float(), sequence[1:], reduction="none").double() * float(real)
            which = decile_of[sequence[1:]]
            totals[0].index_add_(0, which, losses)
            totals[1].index_add_(0, which, torch.full_like(losses, float(real)))
        sums, counts = context.sum(totals).tolist()
        each = zip(sums, counts, strict=True)
        return {f"validation_loss_decile_{i}": s / n for i, (s, n) in enumerate(each, 1) if n}

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
