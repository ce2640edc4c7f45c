"""How frequent each token is in the training data, in deciles of its text.

Losses by decile show where one optimizer learns rare tokens and another does not: arXiv 2509.26030 finds
Muon's gain there.
"""

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import TokenDataset

NUM_DECILES = 10
MOST_TOKENS = 2**23  # of the training data that are counted


def count_tokens(training: TokenDataset, *, vocab_size: int) -> NDArray[np.int64]:
    """How often each token is a target, int64 [vocab_size], in samples spaced evenly over the split."""
    count = min(training.num_samples, max(1, MOST_TOKENS // training.sequence_length))
    ids = np.arange(count) * training.num_samples // count
    return np.bincount(training.samples(ids)[:, 1:].ravel(), minlength=vocab_size)


def deciles(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The decile of each token, int64 [vocab_size]: 0 for the most frequent, 9 for the rarest.

    The tokens of a decile make up a tenth of the text. One that makes up more than a tenth fills the decile
    in which its middle lies, so that a decile may be empty. Tokens that never occur belong to the rarest.
    """
    order = np.argsort(-counts, kind="stable")
    middles = np.cumsum(counts[order]) - counts[order] / 2
    found = np.empty(len(counts), dtype=np.int64)
    found[order] = np.minimum(NUM_DECILES * middles / counts.sum(), NUM_DECILES - 1)
    return found
