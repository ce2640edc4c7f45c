import pytest

from cluster.cli import RunError, UserError
from serving.bench.steps import batch_figures, joules, parse_batches


def test_a_batch_by_hand():
    """Two requests of 10 tokens: the second's first token comes at 0.5 s, the first ends at 0.9 s.

    Between these both decode: gaps 0.1 from the first (0.5 to 0.9) and 0.1 from the second (0.5 to 0.9).
    """
    first = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    second = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
    found = batch_figures([first, second], num_prompt=10)
    assert found["prefill_tokens_per_second"] == pytest.approx(20 / 0.5)
    assert found["ttft_ms"] == pytest.approx(400)
    assert found["itl_ms"] == pytest.approx(100)
    assert found["decode_tokens_per_second"] == pytest.approx(20)
    # tokens 2 to 5 of the first answer go in, 0 to 3 of the second: 3..6 and 1..4 of them in the cache
    assert found["mean_context"] == pytest.approx(10 + (3 + 4 + 5 + 6 + 1 + 2 + 3 + 4) / 8)


def test_steps_that_prefill_beside_decoding_are_not_counted():
    slow_while_the_other_prefills = [0.1, 0.6, 1.1, 1.2, 1.3]
    found = batch_figures([slow_while_the_other_prefills, [1.1, 1.2, 1.3, 1.4, 1.5]], num_prompt=4)
    assert found["itl_ms"] == pytest.approx(100)


def test_a_batch_that_never_decodes_together_is_refused():
    with pytest.raises(RunError, match="more --new-tokens"):
        batch_figures([[0.1, 0.2], [0.3, 0.4]], num_prompt=4)


@pytest.mark.parametrize("text", ["", "1,x", "0", "1,-2"])
def test_bad_batches_are_named(text):
    with pytest.raises(UserError, match="--batches"):
        parse_batches(text)


def test_good_batches():
    assert parse_batches("1,8,32") == [1, 8, 32]


def test_energy_is_split_where_decoding_begins():
    """Two prompts of 10 tokens take 40 J; the 4 tokens that come after the last first one take 6 J."""
    times = [[0.3, 0.6, 1.0], [0.5, 0.6, 1.0]]
    assert joules(times, 40.0, 46.0, num_prompt=10) == {
        "joules_per_token_prefill": 2.0, "joules_per_token_decode": 1.5,
    }  # fmt: skip
    assert set(joules(times, None, None, num_prompt=10).values()) == {None}


def test_energy_of_a_part_that_is_too_short_for_the_drivers_counter_is_none():
    """On an H100 a prefill of 13 ms read 0 J, and one of 7 ms more than the board can draw."""
    prefill, decode = "joules_per_token_prefill", "joules_per_token_decode"
    found = joules([[0.013, 0.5, 1.0]], 0.0, 46.0, num_prompt=10)
    assert found == {prefill: None, decode: 23.0}
    assert joules([[0.6, 0.7]], 40.0, 46.0, num_prompt=10) == {prefill: 4.0, decode: None}
