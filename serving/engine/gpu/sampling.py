"""The next tokens of a step, chosen on the GPU; the host waits once, and only where it reads them."""

import random
from collections.abc import Mapping, Sequence
from itertools import cycle

import torch
from torch import Tensor

from serving.engine.decoder import Chosen
from serving.engine.protocol import Sampling, Score
from serving.engine.sampling import BROKEN, LEAST_TEMPERATURE, Cuts, draw, others


class Sampler:
    """As `serving.engine.sampling.choose`, with the same random numbers for a seed.

    A row is drawn from logits that depend on the other rows by rounding, as the decoder's do.

    Args:
        slots: most rows.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        pinned = device.type == "cuda"
        # Two of each: a step may begin before the tokens of the one before are read.
        sent = [torch.zeros(5 * slots, dtype=torch.float64, pin_memory=pinned) for _ in range(2)]
        received = [torch.zeros(4 * slots, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._sent, self._received = cycle(sent), cycle(received)

    def choose(
        self,
        logits: Tensor,
        likeliest: Tensor,
        samplings: Sequence[Sampling],
        chances: Sequence[random.Random],
        changed: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, Chosen]:  # fmt: skip
        """One token for each row, [S] int32 on the GPU, and what reads them and their scores.

        Args:
            logits: [S, V], fp32.
            likeliest: [S], int32, the token with the largest logit, BROKEN if that is no finite number.
            samplings, chances, changed: as of `choose`.
        """
        used, ids = logits, likeliest
        if changed:
            rows, used, ids = [*changed], logits.clone(), likeliest.clone()
            used[rows] = torch.stack([*changed.values()])
            ids[rows] = torch.where(likeliest[rows] >= 0, used[rows].argmax(dim=-1).int(), BROKEN)
        if any(each.temperature >= LEAST_TEMPERATURE for each in samplings):
            ids = self._drawn(used, ids, samplings, chances)
        asked = [row for row, each in enumerate(samplings) if each.logprobs]
        found = torch.stack((ids, *_scores(logits, ids, likeliest))) if asked else ids[None]
        most = max((samplings[row].num_likeliest for row in asked), default=1)
        # Rare, so it is read at once: this waits for the step.
        following = others(logits.log_softmax(dim=-1), likeliest, number=most - 1) if most > 1 else None
        received = next(self._received)[: found.numel()].view(found.shape)
        received.copy_(found, non_blocking=True)
        ended = torch.cuda.Event() if self._device.type == "cuda" else None
        if ended is not None:
            ended.record()

        def read() -> tuple[list[int], list[Score | None]]:
            if ended is not None:
                ended.synchronize()
            chosen = received[0].tolist()
            scores: list[Score | None] = [None] * len(chosen)
            if asked:
                own, top = (received[i].view(torch.float32).tolist() for i in (1, 3))
                top_ids = received[2].tolist()
                for row in asked:
                    more = following[row][: samplings[row].num_likeliest - 1] if following else ()
                    scores[row] = Score(own[row], top_ids[row], top[row], more)
            return chosen, scores

        return ids, read

    def _drawn(
        self,
        logits: Tensor,
        likeliest: Tensor,
        samplings: Sequence[Sampling],
        chances: Sequence[random.Random],
    ) -> Tensor:  # fmt: skip
        """Greedy rows keep `likeliest`."""
        host = next(self._sent)[: 5 * len(samplings)].view(5, -1)
        draws = [each.temperature >= LEAST_TEMPERATURE for each in samplings]
        host[0] = torch.tensor([each.temperature for each in samplings], dtype=torch.float64)
        host[1] = torch.tensor(
            [chance.random() if drawn else 0.0 for chance, drawn in zip(chances, draws, strict=True)],
            dtype=torch.float64,
        )
        host[2:] = Cuts.of(samplings, rows=()).values
        cut = any(drawn and each.cuts for drawn, each in zip(draws, samplings, strict=True))
        temperatures, uniforms, *values = host.to(self._device, non_blocking=True)
        is_drawn = temperatures >= LEAST_TEMPERATURE
        found = draw(
            logits,
            temperatures=torch.where(is_drawn, temperatures, 1.0).float(),
            uniforms=uniforms,
            cuts=Cuts(torch.stack(values)) if cut else None,
        )
        return torch.where(is_drawn & (likeliest >= 0), found, likeliest).int()


def _scores(logits: Tensor, ids: Tensor, likeliest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `ids` [S]: ln of the probability, the likeliest token and ln of its probability, all as int32."""
    normed = logits.log_softmax(dim=-1)
    own, top = (
        normed.gather(1, which.long().clamp_min(0)[:, None])[:, 0].view(torch.int32)
        for which in (ids, likeliest)
    )
    return own, likeliest, top
