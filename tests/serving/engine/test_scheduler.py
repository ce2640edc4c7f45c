"""Slots, blocks and chunked prefill: what each step carries."""

import random

import pytest

from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, table


def advance(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """One step of a model that samples token 7; (first token, start, stop) of each span."""
    spans = scheduler.next_step()
    for span in spans:
        span.request.done = span.stop
        if span.samples:
            span.request.tokens.append(7)
    return [(span.request.tokens[0], span.start, span.stop) for span in spans]


def request(name: int, num_prompt: int, num_more: int = 4) -> ScheduledRequest:
    return ScheduledRequest([name] + [0] * (num_prompt - 1), num_prompt + num_more)


def test_prompts_are_prefilled_in_chunks_beside_the_tokens_of_running_requests():
    scheduler = Scheduler(slots=4, cache_tokens=1024, step_tokens=10)
    scheduler.add(request(1, 4))
    assert advance(scheduler) == [(1, 0, 4)]
    scheduler.add(request(2, 15))
    scheduler.add(request(3, 2))
    assert advance(scheduler) == [(1, 4, 5), (2, 0, 9)]
    assert advance(scheduler) == [(1, 5, 6), (2, 9, 15), (3, 0, 2)]  # 1 + 6 + 2 of 10
    assert advance(scheduler) == [(1, 6, 7), (2, 15, 16), (3, 2, 3)]


def test_a_prompt_of_one_token_and_a_last_chunk_of_one_token():
    scheduler = Scheduler(slots=4, cache_tokens=1024, step_tokens=5)
    for name, size in ((1, 1), (2, 6)):
        scheduler.add(request(name, size))
    assert advance(scheduler) == [(1, 0, 1), (2, 0, 4)]
    assert advance(scheduler) == [(1, 1, 2), (2, 4, 6)]
    scheduler.add(request(3, 4))
    assert advance(scheduler) == [(1, 2, 3), (2, 6, 7), (3, 0, 3)]
    assert advance(scheduler) == [(1, 3, 4), (2, 7, 8), (3, 3, 4)]  # the chunk samples


def test_of_a_scored_prompt_each_token_before_another_is_counted_once():
    scheduler = Scheduler(slots=4, cache_tokens=1024, step_tokens=6)
    scheduler.add(ScheduledRequest([1] * 10, 12, scored=True))
    scheduler.add(ScheduledRequest([2] * 3, 3, scored=True))  # nothing is to follow
    counted = []
    for _ in range(3):
        spans = scheduler.next_step()
        counted.append([(s.request.tokens[0], s.num_scored, s.samples) for s in spans])
        for span in spans:
            span.request.done = span.stop
            if span.samples:
                span.request.tokens.append(7)
            elif span.stop == span.request.most_tokens:
                scheduler.remove(span.request)
    assert counted == [[(1, 6, False)], [(1, 3, True), (2, 2, False)], [(1, 0, True), (2, 0, False)]]


def test_who_comes_first_is_admitted_first_and_waits_for_a_slot_or_for_blocks():
    scheduler = Scheduler(slots=2, cache_tokens=4 * BLOCK_TOKENS, step_tokens=100)
    big = request(1, 2 * BLOCK_TOKENS, BLOCK_TOKENS)  # three blocks
    bigger, small = request(2, BLOCK_TOKENS, BLOCK_TOKENS), request(3, 3, 1)
    for each in (big, bigger, small):
        scheduler.add(each)
    assert [name for name, _, _ in advance(scheduler)] == [1]  # 2 needs two blocks, one is left
    assert list(scheduler.waiting) == [bigger, small]  # and 3, which would fit, does not overtake
    scheduler.remove(big)
    assert [name for name, _, _ in advance(scheduler)] == [2, 3]
    assert scheduler.num_free_blocks == 1


def test_removal_frees_slot_and_blocks_wherever_the_request_is():
    scheduler = Scheduler(slots=1, cache_tokens=8 * BLOCK_TOKENS, step_tokens=100)
    first, second = request(1, 40), request(2, 40)
    scheduler.add(first)
    scheduler.add(second)
    advance(scheduler)
    assert len(first.blocks) == 2 and scheduler.num_free_blocks == 6
    scheduler.remove(second)
    scheduler.remove(second)  # as a client that leaves twice
    scheduler.remove(first)
    assert scheduler.num_free_blocks == 8 and not first.blocks
    assert scheduler.next_step() == []


def test_any_mix_of_arrivals_and_departures_keeps_every_block_in_one_hand():
    draw = random.Random(0)
    scheduler = Scheduler(slots=5, cache_tokens=20 * BLOCK_TOKENS, step_tokens=23)
    for name in range(400):
        scheduler.add(request(name, draw.randint(1, 150), draw.randint(1, 40)))
        for _ in range(draw.randint(0, 3)):
            spans = scheduler.next_step()
            assert sum(span.stop - span.start for span in spans) <= 23
            assert sum(span.stop - span.start == 1 for span in spans) >= len(spans) - 23
            held = [block for running in scheduler.running for block in running.blocks]
            assert sorted([*held, *scheduler._free]) == list(range(20))
            for span in spans:
                assert len(span.request.blocks) * BLOCK_TOKENS >= span.stop
                span.request.done = span.stop
                if span.samples:
                    span.request.tokens.append(0)
                    if len(span.request.tokens) == span.request.most_tokens:
                        scheduler.remove(span.request)
        if draw.random() < 0.3 and scheduler.running:
            scheduler.remove(draw.choice(scheduler.running))
    assert scheduler.running


def test_the_table_lists_each_span_s_blocks_up_to_its_end():
    scheduler = Scheduler(slots=2, cache_tokens=6 * BLOCK_TOKENS, step_tokens=200)
    for name in (1, 2):
        scheduler.add(request(name, BLOCK_TOKENS + 1, BLOCK_TOKENS))
    spans = scheduler.next_step()
    blocks, first = table(spans)
    assert first == [0, 2]
    assert blocks == [*spans[0].request.blocks[:2], *spans[1].request.blocks[:2]]


def test_a_request_that_can_never_fit_is_not_taken():
    with pytest.raises(AssertionError):
        Scheduler(slots=2, cache_tokens=64, step_tokens=9).add(request(1, 60, 5))
