"""Arrivals and lengths: what they are on average, that the seed fixes them, and files that are wrong."""

import json
import random
import statistics
from pathlib import Path

import pytest

from cluster.config import ConfigError
from serving.bench.workload import arrivals, from_conversations, from_trace, lengths, synthetic

SIZE = {"vocab_size": 100, "context_tokens": 64}


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
    [("64", 64, 64, 64), ("uniform(10, 30)", 10, 30, 20), ("lognormal(50,0.5)", 2, 2000, 50)],
)
def test_lengths(text, least, most, median):
    draw, chance = lengths(text, key="x"), random.Random(0)
    values = [draw(chance) for _ in range(5000)]
    assert least <= min(values) <= max(values) <= most
    assert statistics.median(values) == pytest.approx(median, rel=0.05)


@pytest.mark.parametrize(
    "text",
    [
        *("", "-5", "0", "uniform(30,10)", "uniform(0,10)", "normal(5,1)", "lognormal(0,1)"),
        *("1.2.3", ".", "1..2", "1e3", "nan", "uniform(1.2.3,4)", "uniform(1,4.)(", "lognormal(64,0.5.1)"),
        *("9" * 400, "uniform(1,1e99)", f"uniform(1,{'9' * 400})", "lognormal(64,1000)", "uniform(1.5,2.5)"),
        *("1_000", "6\u0664", "uniform(1.9,1.2)", "uniform(.,.)"),
    ],
)
def test_lengths_that_are_none_name_the_key(text):
    with pytest.raises(ConfigError, match=r"^load.prompt_tokens: "):
        lengths(text, key="load.prompt_tokens")


def test_synthetic_prompts_fit_the_context_and_follow_the_seed():
    def plan(seed: int):
        draws = lengths("uniform(1,100)", key="x"), lengths("uniform(1,100)", key="y")
        return synthetic(200, prompt_tokens=draws[0], output_tokens=draws[1], seed=seed, **SIZE)

    first = plan(3)
    assert first == plan(3) != plan(4)
    assert all(len(p.prompt) + p.max_tokens <= 64 and p.max_tokens >= 1 and p.at is None for p in first)
    assert {len(p.prompt) for p in first} >= {1, 63} and max(max(p.prompt) for p in first) == 99


def test_a_trace_is_sent_as_it_is(tmp_path: Path):
    rows = [(0.5, 3, 4), (0.5, 60, 4), (2.25, 1, 1)]
    names = ("at_seconds", "prompt_tokens", "output_tokens")
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n\n")
    plan = from_trace(file, **SIZE, seed=0)
    assert [(p.at, len(p.prompt), p.max_tokens) for p in plan] == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: no JSON object"),
        ('{"at_seconds": 1}', "line 2: needs numbers at_seconds, prompt_tokens, output_tokens"),
        ('{"at_seconds": NaN, "prompt_tokens": 1, "output_tokens": 1}', "line 2: at_seconds must be finite"),
        ('{"at_seconds": 1, "prompt_tokens": 1.5, "output_tokens": 1}', "line 2: needs numbers .*whole"),
        (
            '{"at_seconds": 1, "prompt_tokens": 1, "output_tokens": Infinity}',
            "line 2: needs numbers .*whole",
        ),
        ('{"at_seconds": 1, "prompt_tokens": true, "output_tokens": 1}', "line 2: needs numbers .*whole"),
        (f'{{"at_seconds": 1{"0" * 400}, "prompt_tokens": 1, "output_tokens": 1}}', "line 2: needs numbers"),
        ('{"at_seconds": 0.1, "prompt_tokens": 1, "output_tokens": 1}', "line 2: .* must not go back"),
        ('{"at_seconds": 1, "prompt_tokens": 0, "output_tokens": 1}', "line 2: lengths must be at least 1"),
        (
            '{"at_seconds": 1, "prompt_tokens": 60, "output_tokens": 5}',
            "line 2: exceeds the model's context of 64",
        ),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(tmp_path, line, message):
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"at_seconds": 0.2, "prompt_tokens": 1, "output_tokens": 1}}\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        from_trace(file, **SIZE, seed=0)


def test_conversations_give_prompt_and_length(tmp_path):
    file = tmp_path / "chats.jsonl"
    long = {"conversations": [{"value": "a " * 60}, {"value": "b " * 60}]}
    chat = {
        "conversations": [{"from": "human", "value": "how are you"}, {"from": "gpt", "value": "well thanks"}]
    }
    plain = {"prompt": "list", "completion": "one two three"}
    file.write_text("\n".join(map(json.dumps, (long, chat, plain))))

    def plan(number: int, seed: int = 0):
        return from_conversations(
            file, number, count_tokens=lambda text: len(text.split()), context_tokens=64, seed=seed
        )

    assert {(p.prompt, p.max_tokens) for p in plan(50)} == {("how are you", 2), ("list", 3)}
    assert plan(9) == plan(9) != plan(9, seed=1)
    file.write_text(json.dumps(long))
    with pytest.raises(ConfigError, match="no conversation fits the model's context of 64 tokens"):
        plan(1)
    file.write_text('{"conversations": [{"value": "hello"}]}')
    with pytest.raises(ConfigError, match="line 1: needs conversations with two values"):
        plan(1)
    with pytest.raises(ConfigError, match="cannot be read"):
        from_trace(tmp_path / "missing.jsonl", **SIZE, seed=0)
