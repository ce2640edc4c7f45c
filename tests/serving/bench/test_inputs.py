"""Loads from files: the published forms, and what is wrong with others."""

import json
from pathlib import Path

import pytest

from cluster.config import ConfigError
from serving.bench.inputs import BLOCK_TOKENS, draw_requests, from_trace, read_conversations

SIZE = {"vocab_size": 100, "context_tokens": 64}


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
        ('{"at_seconds": 1}', "line 2: needs finite numbers at_seconds, prompt_tokens, output_tokens"),
        ('{"at_seconds": NaN, "prompt_tokens": 1, "output_tokens": 1}', "line 2: no JSON .NaN is no number"),
        (
            '{"at_seconds": 1e999, "prompt_tokens": 1, "output_tokens": 1}',
            "line 2: needs finite numbers",
        ),
        (
            '{"at_seconds": 1, "prompt_tokens": 1.5, "output_tokens": 1}',
            "line 2: needs finite numbers .*whole",
        ),
        (
            '{"at_seconds": 1, "prompt_tokens": 1, "output_tokens": Infinity}',
            "line 2: no JSON .Infinity is no number",
        ),
        ('{"at_seconds": "1", "prompt_tokens": 1, "output_tokens": 1}', "line 2: needs finite numbers"),
        ('{"at_seconds": true, "prompt_tokens": 1, "output_tokens": 1}', "line 2: needs finite numbers"),
        (
            '{"at_seconds": 1, "prompt_tokens": true, "output_tokens": 1}',
            "line 2: needs finite numbers .*whole",
        ),
        (
            f'{{"at_seconds": 1{"0" * 400}, "prompt_tokens": 1, "output_tokens": 1}}',
            "line 2: needs finite numbers",
        ),
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


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,37,4
2023-11-16 18:17:04.4799600,60,3
2024-05-10 00:00:00.009930+00:00,1,1
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,47,9,56,Conversation log
45,GPT-4,11,0,11,API log
47.5,GPT-4,12,1,13,API log
"""


def test_traces_as_they_are_published(tmp_path: Path):
    told: list[str] = []

    def plan(name: str, text: str):
        (tmp_path / name).write_text(text)
        return from_trace(tmp_path / name, **SIZE, seed=0, report=told.append)

    azure = plan("azure.csv", AZURE)
    assert [(len(p.prompt), p.max_tokens) for p in azure] == [(37, 4), (60, 3), (1, 1)]
    assert [p.at for p in azure[:2]] == [0, pytest.approx(0.5)] and azure[2].at > 1e7
    burst = plan("burst.csv", BURST.replace("\n", "\r\n"))
    assert [(p.at, len(p.prompt), p.max_tokens) for p in burst] == [(0, 47, 9), (42.5, 12, 1)]
    assert ["1 rows without a response are left out" in line for line in told] == [True]
    lines = [
        {"timestamp": 7_000_000, "input_length": 50, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 7_000_300, "input_length": 40, "output_length": 5, "hash_ids": [0]},
        {"timestamp": 7_000_600, "input_length": 40, "output_length": 5, "hash_ids": [7]},
    ]
    first, second, third = plan("mooncake.jsonl", "\n".join(map(json.dumps, lines)))
    assert (first.at, second.at, third.at) == (0, 0.3, 0.6)
    assert first.prompt[:40] == second.prompt != third.prompt


def test_mooncake_s_blocks_are_shared_block_by_block(tmp_path: Path):
    rows = [[1, 2], [1, 3]]
    lines = [
        {"timestamp": 0, "input_length": 2 * BLOCK_TOKENS + 9, "output_length": 1, "hash_ids": ids}
        for ids in rows
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one, other = (
        p.prompt for p in from_trace(tmp_path / "a.jsonl", vocab_size=90, context_tokens=9999, seed=0)
    )
    shared = [a == b for a, b in zip(one, other, strict=True)]
    assert all(shared[:BLOCK_TOKENS]) and sum(shared[BLOCK_TOKENS:]) < 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 1: has the columns a, b; known are Azure's TIMESTAMP, ContextTokens"),
        (AZURE + "2024-05-10 00:00:01,1e1,1\n", "line 5: needs TIMESTAMP, ContextTokens, GeneratedTokens"),
        (AZURE + "2024-05-10 00:00:01,1,nan\n", "line 5: needs"),
        (AZURE + "2024-05-10 00:00:01,1_0,1\n", "line 5: needs"),
        (AZURE + "yesterday,1,1\n", "line 5: needs"),
        (AZURE + f"{'9' * 200_000},1,1\n", "line 5: no CSV .field larger than"),
        (AZURE + "2024-05-10 00:00:01,1\n", "line 5: needs"),
        (BURST + "inf,GPT-4,1,1,2,API log\n", "line 5: needs Timestamp, Request tokens, Response tokens"),
        (BURST + "50,GPT-4,64,1,2,API log\n", r"line 5: exceeds the model's context of 64 tokens"),
        (BURST + "1,GPT-4,1,1,2,API log\n", "line 5: .* must not go back"),
    ],
)  # fmt: skip
def test_a_wrong_row_of_a_csv_is_named(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_trace(tmp_path / "a.csv", **SIZE, seed=0)


def test_only_a_newline_ends_a_line(tmp_path):
    text = "one\u2028two\x0bthree\x85"
    lines = [json.dumps({"prompt": text, "completion": "a b"}, ensure_ascii=False)] * 2
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines))
    read = read_conversations(tmp_path / "a.jsonl", count_tokens=len, context_tokens=64)
    assert [chain[0].prompt for chain in read] == [text] * 2


def words(text: str) -> int:
    return len(text.split())


SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "Returns a list of"},
                                  {"from": "gpt", "value": "results and names."}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "hi"}]},
    {"id": "c", "conversations": []},
    {"id": "d", "conversations": [
        {"from": "system", "value": "You are"}, {"from": "human", "value": "The name?"},
        {"from": "gpt", "value": "The Amazon Resource Name"}, {"from": "human", "value": "Again"},
        {"from": "tool", "value": "secret"}, {"from": "gpt", "value": "ARN"},
        {"from": "human", "value": "long " * 60}, {"from": "gpt", "value": "no"}]},
    {"id": "e", "conversations": [{"from": "gpt", "value": "A reply first"},
                                  {"from": "human", "value": "🦙 ok"}]},
    {"id": "f", "messages": [{"role": "assistant", "content": "Well"}, {"role": "user", "content": "Go on"},
                             {"role": "assistant", "content": "so be it"}]},
]  # fmt: skip


@pytest.mark.parametrize("form", ["an array", "lines"])
def test_sharegpt_as_it_is_published(tmp_path, form):
    text = json.dumps(SHAREGPT, indent=1) if form == "an array" else "\n".join(map(json.dumps, SHAREGPT))
    (tmp_path / "sharegpt.json").write_text(text)
    told: list[str] = []
    size = {"count_tokens": words, "context_tokens": 64}
    first = read_conversations(tmp_path / "sharegpt.json", **size, report=told.append)
    assert [[(p.prompt, p.max_tokens, p.history) for p in chain] for chain in first] == [
        [("Returns a list of", 3, ())], [("The name?", 4, ())], [("Go on", 3, ())],
    ]  # fmt: skip
    assert told[0].endswith("3 of 6 conversations have no exchange that fits")
    _, chain, last = read_conversations(tmp_path / "sharegpt.json", **size, turns="all")
    system, question, reply = (
        ("system", "You are"),
        ("user", "The name?"),
        ("assistant", "The Amazon Resource Name"),
    )
    assert [(p.prompt, p.history, p.follows) for p in chain] == [
        ("The name?", (system,), False), ("Again", (system, question, reply), True),
    ]  # fmt: skip
    assert last[0].history == (("assistant", "Well"),)
    # Up to "Again" and its reply: 4 turns that are sent, of 2 + 2 + 4 + 1 tokens, and 1 of the reply.
    for beside, number in ((13, 2), (14, 1)):
        read = read_conversations(tmp_path / "sharegpt.json", **size, tokens_beside=beside, turns="all")
        assert len(read[1]) == number


def test_conversations_give_prompt_and_length(tmp_path):
    file = tmp_path / "chats.jsonl"
    long = {"conversations": [{"value": "a " * 60}, {"value": "b " * 60}]}
    chat = {
        "conversations": [{"from": "human", "value": "how are you"}, {"from": "gpt", "value": "well thanks"}]
    }
    plain = {"prompt": "list", "completion": "one two three"}
    file.write_text("\n".join(map(json.dumps, (long, chat, plain))))

    def plan(number: int, seed: int = 0):
        read = read_conversations(file, count_tokens=words, context_tokens=64)
        return draw_requests(read, number, seed=seed)

    assert {(p.prompt, p.max_tokens) for p in plan(50)} == {("how are you", 2), ("list", 3)}
    assert plan(9) == plan(9) != plan(9, seed=1)
    for text in (json.dumps(long), '{"conversations": [{"value": "hello"}]}', "[]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="no conversation fits the model's context of 64 tokens"):
            plan(1)
    for text, message in (
        ('{"conversations": [{"value": 3}, {"value": "a"}]}', "line 1: needs conversations of texts"),
        ('[{"conversations": 3}]', "item 1: needs conversations of texts"),
        ("[3]", "item 1: no JSON object"),
        ("[NaN]", "no JSON .NaN"),
        ("[", "no JSON"),
        (r'{"prompt": "\ud83d", "completion": "a"}', "line 1: needs conversations of texts"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            plan(1)
    with pytest.raises(ConfigError, match="cannot be read"):
        from_trace(tmp_path / "missing.jsonl", **SIZE, seed=0)
