"""Draws: their frequencies, each row against itself alone, ties, and what is not a number."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.adjust import adjusted
from serving.engine.protocol import Sampling, Score
from serving.engine.sampling import BROKEN, choose
from tests.properties import cases


class AlmostOne(random.Random):
    """The largest number that `random` may return."""

    def random(self) -> float:
        return 1 - 2**-53


LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 0.0, -50.0, 2.0]])


def draws(row: int, number: int = 4000, **sampling: object) -> torch.Tensor:
    """How often each token is drawn, as a fraction."""
    options = Sampling(max_tokens=1, **sampling)
    chance = random.Random(0)
    ids = choose(LOGITS[row].expand(number, -1), [options] * number, [chance] * number)[0]
    return torch.bincount(torch.tensor(ids), minlength=4) / number


def test_draws_follow_temperature_and_nucleus():
    assert torch.allclose(draws(0), LOGITS[0].softmax(0), atol=0.03)
    assert torch.allclose(draws(0, temperature=2.0), (LOGITS[0] / 2).softmax(0), atol=0.03)
    kept = LOGITS[0].softmax(0)  # 0.032, 0.087, 0.237, 0.644
    assert torch.allclose(
        draws(0, top_p=0.7), torch.tensor([0, 0, kept[2], kept[3]]) / kept[2:].sum(), atol=0.03
    )
    assert draws(0, top_p=0.6).tolist() == draws(0, top_p=1e-9).tolist() == [0, 0, 0, 1]
    assert draws(0, temperature=0.0, number=5).tolist() == draws(0, temperature=1e-9, number=5).tolist()


def test_draws_follow_top_k_and_min_p_and_then_the_nucleus():
    chances = LOGITS[0].softmax(0)  # 0.032, 0.087, 0.237, 0.644
    two = torch.tensor([0, 0, chances[2], chances[3]]) / chances[2:].sum()
    assert torch.allclose(draws(0, top_k=2), two, atol=0.03)
    assert torch.allclose(draws(0, min_p=0.2), two, atol=0.03)
    assert draws(0, top_k=2, top_p=0.7).tolist() == draws(0, min_p=1.0).tolist() == [0, 0, 0, 1]
    assert torch.allclose(draws(0, top_k=9, min_p=0.01), chances, atol=0.03)


def test_the_likeliest_tokens_are_told_in_order_and_of_the_model_s_own_logits():
    options = [Sampling(max_tokens=1, temperature=0, logprobs=True, num_likeliest=n) for n in (1, 3, 9)]
    changed = {1: torch.tensor([9.0, 0, 0, 0])}
    ids, scores = choose(LOGITS[:1].repeat(3, 1), options, [random.Random(0)] * 3, changed)
    normed = LOGITS[0].log_softmax(0).tolist()
    assert ids == [3, 0, 3]
    assert scores[1][:3] == pytest.approx((normed[0], 3, normed[3]))
    assert [len(each.others) for each in scores] == [0, 2, 3]
    assert [token for token, _ in scores[2].others] == [2, 1, 0]
    assert [value for _, value in scores[2].others] == pytest.approx(normed[2::-1])


def test_logits_are_adjusted_in_vllm_s_order():
    logits, tokens = torch.tensor([2.0, -2.0, 1.0, 4.0, 3.0]), [1, 0, 3, 3]

    def changed(eos: tuple[int, ...] = (), **sampling: object) -> list[float]:
        options = Sampling(max_tokens=9, **sampling)
        assert options.adjusts(2) == (options.min_tokens != 2)  # so many were sampled
        return adjusted(logits, options, tokens, 2, eos_ids=eos).tolist()

    assert changed(presence_penalty=0.5) == [2, -2, 1, 3.5, 3]  # of what was sampled: 3, twice
    assert changed(frequency_penalty=0.5) == [2, -2, 1, 3, 3]
    assert changed(repetition_penalty=2.0) == [1, -4, 1, 2, 3]  # of the prompt too
    assert changed(logit_bias=((2, -1.5), (4, 1.0))) == [2, -2, -0.5, 4, 4]
    everything = {"presence_penalty": 1.0, "repetition_penalty": 2.0, "logit_bias": ((3, 2.0),)}
    assert changed(**everything) == [1, -4, 1, 2, 3]
    ends = {"min_tokens": 3, "stop_ids": frozenset({0})}
    assert changed((4,), **ends) == [-math.inf, -2, 1, 4, -math.inf]
    assert changed((4,), **ends, ignore_eos=True) == [-math.inf, -2, 1, 4, 3]
    assert changed((4,), **ends | {"min_tokens": 2}) == logits.tolist()
    huge = adjusted(torch.tensor([3e38]), Sampling(max_tokens=1, repetition_penalty=0.01), [0], 1, eos_ids=())
    assert huge.isfinite().all()
    assert logits.tolist() == [2, -2, 1, 4, 3]


def test_rows_are_drawn_independently_and_their_logprobs_are_of_temperature_one():
    options = [
        Sampling(max_tokens=1, temperature=5.0, top_p=0.99, logprobs=True),
        Sampling(max_tokens=1, temperature=0.0),
        Sampling(max_tokens=1, temperature=0.7),
    ]
    rows = torch.stack([LOGITS[0], LOGITS[1], LOGITS[0]])
    ids, scores = choose(rows, options, [random.Random(seed) for seed in (1, 2, 3)])
    assert ids[1] == 0 and scores[1:] == [None, None]
    normed = LOGITS[0].log_softmax(0).tolist()
    assert scores[0][:3] == pytest.approx((normed[ids[0]], 3, normed[3]))
    alone, _ = choose(rows[:1], options[:1], [random.Random(1)])
    assert alone == ids[:1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"logprobs": True}])
def test_a_row_that_is_not_numbers_has_no_token_and_the_others_keep_theirs(bad, sampling):
    rows = LOGITS[:1].repeat(3, 1)
    rows[1, 2] = bad
    options = [Sampling(max_tokens=1, **sampling)] * 3
    ids, scores = choose(rows, options, [random.Random(seed) for seed in range(3)])
    whole, expected = choose(LOGITS[:1].repeat(3, 1), options, [random.Random(seed) for seed in range(3)])
    assert ids == [whole[0], BROKEN, whole[2]]
    assert (scores[0], scores[2]) == (expected[0], expected[2])
    nothing = torch.full((1, 4), -float("inf"))
    assert choose(nothing, options[:1], [random.Random(0)])[0] == [BROKEN]


def test_a_token_without_a_chance_is_never_drawn():
    logits = torch.tensor([[0.0, -float("inf"), 1.0, -float("inf")]])
    assert choose(logits, [Sampling(max_tokens=1)], [AlmostOne()])[0] == [2]
    assert choose(logits, [Sampling(max_tokens=1, top_p=0.9999)], [AlmostOne()])[0] == [2]
    assert choose(logits, [Sampling(max_tokens=1, top_p=0.7)], [AlmostOne()])[0] == [2]


Outcome = tuple[int, Score | None]


def together(logits: torch.Tensor, options: Sequence[Sampling], seeds: Sequence[int]) -> list[Outcome]:
    """The token and score of each row."""
    tokens, scores = choose(logits, options, [random.Random(seed) for seed in seeds])
    return list(zip(tokens, scores, strict=True))


def alone(logits: torch.Tensor, options: Sequence[Sampling], seeds: Sequence[int]) -> list[Outcome]:
    """The same, each row in a batch of its own."""
    rows = zip(logits.split(1), options, seeds, strict=True)
    return [together(row, [sampling], [seed])[0] for row, sampling, seed in rows]


def allowed(logits: list[float], sampling: Sampling) -> set[int]:
    """Tokens that may be drawn, in plain Python: the likeliest, of equals the lowest id, up to top_p.

    Rounding in fp32 decides at the edge of the nucleus, so a token within 1e-5 of it is allowed.
    """
    largest = max(logits)
    if sampling.temperature == 0:
        return {logits.index(largest)}
    weights = [math.exp((logit - largest) / sampling.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    order = [token for token in order if weights[token] >= sampling.min_p - 1e-5]
    order = order[: sampling.top_k or None]
    total, found, before = math.fsum(weights[token] for token in order), set(), 0.0
    for token in order:
        if before >= (sampling.top_p + 1e-5) * total or weights[token] == 0:
            break
        found.add(token)
        before += weights[token]
    return found


KINDS = {
    "normal": lambda drawn: drawn,
    "decided": lambda drawn: 30 * drawn,
    "tied": lambda drawn: drawn.round(),
    "equal": lambda drawn: drawn * 0,
    "huge": lambda drawn: drawn * 1e37,
    "partly impossible": lambda drawn: drawn.where(drawn > drawn.mean() - 1e-3, -math.inf),
    "partly NaN": lambda drawn: drawn.where(drawn < drawn.mean(), math.nan),
    "infinite": lambda drawn: drawn + math.inf,
}
ROWS = [
    (
        kind,
        Sampling(
            max_tokens=1, temperature=temperature, **cut, logprobs=logprobs, num_likeliest=1 + 2 * logprobs
        ),
    )
    for kind in KINDS
    for temperature in (0.0, 0.1, 1.0, 2.0)
    for cut in (
        {},
        {"top_p": 1 - 1e-9},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"top_k": 2, "top_p": 0.9},
        {"min_p": 0.2},
        {"min_p": 0.05, "top_k": 3},
    )
    for logprobs in (False, True)
]


@settings(max_examples=cases(), deadline=None)
@given(
    rows=st.lists(st.sampled_from(ROWS), min_size=2, max_size=5),
    vocabulary=st.sampled_from((1, 2, 3, 7, 16, 33, 64, 100)),
    seed=st.integers(0, 2**32),
)
def test_a_row_has_the_token_and_score_that_it_has_alone(rows, vocabulary, seed):
    """Bit by bit, whatever is beside it; and a token that its sampling allows."""
    drawn = torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = torch.stack([KINDS[kind](row) for row, (kind, _) in zip(drawn, rows, strict=True)])
    options, seeds = [sampling for _, sampling in rows], range(seed, seed + len(rows))
    found = together(logits, options, seeds)
    assert repr(found) == repr(alone(logits, options, seeds))  # NaN is not equal to itself
    for (token, _), row, sampling in zip(found, logits.tolist(), options, strict=True):
        whole = all(map(math.isfinite, row)) or (max(row) < math.inf and not any(map(math.isnan, row)))
        assert token in allowed(row, sampling) if whole else token == BROKEN


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_large_vocabulary_is_the_same_beside_one_with_a_nucleus(threads):
    """As many tokens as LLaMA 3 has, and a number of columns that no vector divides."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for columns in (128_256, 50_257):
            logits = 3 * torch.randn(4, columns, generator=torch.Generator().manual_seed(columns))
            options = [Sampling(max_tokens=1, top_p=top_p, logprobs=True) for top_p in (1.0, 0.9, 0.5, 1.0)]
            for seed in range(5):
                seeds = [seed, 7, 8, seed]
                assert together(logits, options, seeds) == alone(logits, options, seeds)
    finally:
        torch.set_num_threads(before)


def test_no_token_of_a_large_vocabulary_is_lost_to_rounding():
    """The last token has a probability of 6e-10, and is drawn at the end of the interval.

    In fp32 the sum of the more likely ones is 1 already, for 13,213 tokens.
    """
    logits = torch.linspace(0, -12, 128_256).repeat(3, 1)
    options = [Sampling(max_tokens=1, top_p=top_p) for top_p in (1.0, 1 - 1e-12, 0.5)]
    ids, _ = choose(logits, options, [AlmostOne()] * 3)
    assert ids[:2] == [128_255] * 2
    share = logits[0].double().softmax(0)[: ids[2] + 1].sum().item()
    assert share == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("size", [64, 1000, 50_257])
def test_of_equal_tokens_the_lowest_ids_are_the_nucleus(size):
    for top_p in (0.25, 0.5):
        sampling = Sampling(max_tokens=1, top_p=top_p)
        ids, _ = choose(torch.zeros(1, size), [sampling], [AlmostOne()])
        assert ids == [math.ceil(top_p * size) - 1]
    assert choose(torch.zeros(1, size), [Sampling(max_tokens=1, temperature=0)], [AlmostOne()])[0] == [0]


def test_logits_as_large_as_numbers_go_are_divided_by_any_temperature():
    logits = torch.tensor([[3e38, -3e38, 3e38, 0.0]])
    for temperature in (1e-5, 0.5, 2.0):
        ids = {
            choose(logits, [Sampling(max_tokens=1, temperature=temperature)], [random.Random(seed)])[0][0]
            for seed in range(20)
        }
        assert ids == {0, 2}
