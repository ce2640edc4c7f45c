"""Arrivals and lengths: what they are on average, and that the seed fixes them."""

import random
import statistics

import pytest

from cluster.config import ConfigError
from serving.bench.workload import arrivals, lengths, require_fit, synthetic


def test_poisson_arrivals_have_the_rate_and_exponential_gaps():
    due = arrivals("poisson", rate=20.0, number=20_000, seed=1)
    gaps = [later - earlier for earlier, later in zip([0.0, *due], due, strict=False)]
    assert min(gaps) >= 0 and statistics.mean(gaps) == pytest.approx(0.05, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.05, rel=0.03)
    assert due == arrivals("poisson", rate=20.0, number=20_000, seed=1)
    assert due != arrivals("poisson", rate=20.0, number=20_000, seed=2)
    assert arrivals("poisson", rate=40.0, number=3, seed=1) == pytest.approx([time / 2 for time in due[:3]])


def test_constant_arrivals():
    assert arrivals("constant", rate=4.0, number=3, seed=0) == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("text", "least", "most", "median"),
    [
        ("64", 64, 64, 64),
        ("uniform(10, 30)", 10, 30, 20),
        ("lognormal(50,0.5)", 2, 369, 50),  # 4 sigma above the median
        ("lognormal(50,0.5,400)", 2, 400, 50),
    ],
)
def test_lengths(text, least, most, median):
    draw, chance = lengths(text, key="x"), random.Random(0)
    values = [draw(chance) for _ in range(5000)]
    assert draw.most == most
    assert least <= min(values) <= max(values) <= most
    assert statistics.median(values) == pytest.approx(median, rel=0.05)


@pytest.mark.parametrize(
    "text",
    [
        *("", "-5", "0", "uniform(30,10)", "uniform(0,10)", "normal(5,1)", "lognormal(0,1)"),
        *("1.2.3", ".", "1..2", "1e3", "nan", "uniform(1.2.3,4)", "uniform(1,4.)(", "lognormal(64,0.5.1)"),
        *("9" * 400, "uniform(1,1e99)", f"uniform(1,{'9' * 400})", "lognormal(64,1000)", "uniform(1.5,2.5)"),
        *("1_000", "6\u0664", "uniform(1.9,1.2)", "uniform(.,.)", "lognormal(64,0.5,32)"),
    ],
)
def test_lengths_that_are_none_name_the_key(text):
    with pytest.raises(ConfigError, match=r"^load.prompt_tokens: "):
        lengths(text, key="load.prompt_tokens")


def test_synthetic_prompts_follow_the_seed_and_share_a_prefix():
    def plan(seed: int, **shared: int):
        draws = lengths("uniform(1,50)", key="x"), lengths("uniform(1,14)", key="y")
        return synthetic(
            200, prompt_tokens=draws[0], output_tokens=draws[1], seed=seed, vocab_size=100, **shared
        )

    first = plan(3)
    assert first == plan(3) != plan(4)
    assert {len(p.prompt) for p in first} >= {1, 50} and max(max(p.prompt) for p in first) == 99
    assert all(1 <= p.max_tokens <= 14 and p.at is None for p in first)
    shared = plan(3, prefix_tokens=8, prefixes=3)
    assert len({p.prompt[:8] for p in shared}) == 3
    assert min(len(p.prompt) for p in shared) == 9


@pytest.mark.parametrize(("context", "fits"), [(123, False), (124, True)])
def test_lengths_that_do_not_fit_are_refused_and_never_cut(context, fits):
    draws = lengths("lognormal(50,0.5,100)", key="x"), lengths("uniform(1,14)", key="y")
    if fits:
        require_fit(*draws, 10, context)
        return
    with pytest.raises(
        ConfigError, match=r"^load.prompt_tokens: .* 124 tokens \(10 of load.prefix_tokens, 100"
    ):
        require_fit(*draws, 10, context)
