"""Chats: templates against transformers' own, and /v1/chat/completions over HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI
from transformers import PreTrainedTokenizerFast

from cluster.cli import UserError
from serving.endpoint.chat import ChatTemplate, load_template
from serving.endpoint.refusal import Refusal
from serving.endpoint.schema import Message
from serving.endpoint.text import numbered_tokenizer
from tests.fake_engine import CONTEXT, VOCABULARY, counting_engine, idle
from tests.serving.endpoint.server import Server

pytestmark = pytest.mark.stack

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% generation %}<|im_start|>{{ message.role }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "    {% endgeneration %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ extra | tojson }}"
)
ALTERNATING = (
    "{% set ns = namespace(turn=0) %}{% for message in messages %}"
    "{% if (message.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% set ns.turn = ns.turn + 1 %}[{{ message.role }}]{{ message.content }}{{ eos_token }}"
    "{% endfor %}"
)
HELLO = [{"role": "user", "content": " hi <b>ñ</b> "}, {"role": "assistant", "content": "ab"}]


def render(source: str, messages: list[dict], /, **given: object) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render([Message(**each) for each in messages], given=given)


@pytest.mark.parametrize("source", [CHATML, ALTERNATING])
def test_a_conversation_is_written_as_by_transformers(source):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=numbered_tokenizer(300), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    expected = tokenizer.apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True, extra={"a": "<é>"}
    )
    assert render(source, HELLO, extra={"a": "<é>"}) == expected


def test_a_developer_is_the_system_where_the_template_knows_none():
    said = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", said) == "system"
    assert render("{# developer #}{{ messages[0].role }}", said) == "developer"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ALTERNATING, "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ messages[7].content.x.y }}", "no element 7"),
        ("{{ 1 / 0 }}", "division"),
        ("{% include 'x' %}", "loader"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_400(source, message):
    with pytest.raises(Refusal, match=message) as refused:
        render(source, HELLO[1:])
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_a_client_cannot_replace_messages_or_special_tokens():
    given = {"bos_token": "x", "messages": [], "tools": ["x"], "lang": "es"}
    assert (
        render("{{ bos_token }}{{ messages | length }}{{ tools }}{{ lang }}", HELLO, **given) == "<s>2Nonees"
    )


def test_where_a_template_lies(tmp_path):
    assert load_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"

    def written(settings: object) -> str:
        config.write_text(json.dumps(settings))
        found = load_template(tmp_path)
        assert found is not None
        return found.render([Message(role="user", content="a")], given={})

    assert written({"chat_template": "{{ eos_token }}1", "eos_token": {"content": "</s>"}}) == "</s>1"
    assert (
        written(
            {"chat_template": [{"name": "tool_use", "template": "2"}, {"name": "default", "template": "3"}]}
        )
        == "3"
    )
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}4")
    assert written({"chat_template": "5", "bos_token": "<s>"}) == "<s>4"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]"), ("chat_template.jinja", "{% if %}"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": "{{"}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x", "template": 5}]}'),
        ("chat_template.jinja", "\udcff"),
    ],
)  # fmt: skip
def test_a_damaged_template_is_one_message_with_its_file(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"{tmp_path / name}: .*copy it again"):
        load_template(tmp_path)


# --- over HTTP ----------------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def chats() -> Iterator[Server]:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    made = Server(counting_engine(step_seconds=0.0), template=ChatTemplate(template, {}))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(chats: Server) -> OpenAI:
    return OpenAI(base_url=f"{chats.url}/v1", api_key="none", max_retries=0)


def test_more_choices_than_there_is_room_for_are_the_fault_of_n(client):
    with pytest.raises(BadRequestError, match=r"n: 9 choices at once.*send a smaller n") as caught:
        client.chat.completions.create(
            model="counting", messages=[{"role": "user", "content": "a"}], n=9, max_tokens=1
        )
    assert caught.value.param == "n"


def test_the_openai_client_chats(client):
    said = [
        {"role": "developer", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "ab"}]},
    ]
    answer = client.chat.completions.create(
        model="counting", messages=said, max_completion_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    [choice] = answer.choices
    assert choice.message.content == "cde" and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == 3 and answer.usage.completion_tokens == 3
    scored = choice.logprobs.content
    assert [each.token for each in scored] == list("cde") and scored[0].bytes == [99]
    assert [len(each.top_logprobs) for each in scored] == [2] * 3 and scored[0].top_logprobs[0].token == "c"


def test_the_openai_client_streams_a_chat(client):
    chunks = list(
        client.chat.completions.create(
            model="counting", messages=[{"role": "user", "content": "ab"}], max_tokens=3, temperature=0,
            stream=True, stream_options={"include_usage": True}, stop="e",
        )
    )  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.content for delta in deltas] == ["c", "d", ""]
    assert [delta.role for delta in deltas] == ["assistant", None, None]
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens == 3
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_chat_fills_the_context_unless_it_is_told_otherwise(chats):
    answer = chats.post(CHAT, max_tokens=None, temperature=0).json()
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": CONTEXT - 1, "total_tokens": CONTEXT}
    long = [{"role": "user", "content": "a" * CONTEXT}]
    for fields in ({"messages": long, "max_tokens": None}, {"messages": long}, {"messages": long * 9}):
        error = chats.post(CHAT, **fields).json()["error"]
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
        assert error["message"].startswith(f"messages: This model's maximum context length is {CONTEXT} ")
    assert idle(chats.engine)


def test_without_a_template_the_refusal_says_so(server):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(BadRequestError, match=r"no chat template .*tokenizer_config\.json.*/v1/completions"):
        client.chat.completions.create(model="counting", messages=[{"role": "user", "content": "a"}])


def test_tokenizing_a_chat_gives_the_ids_that_it_is_answered_from(chats):
    said = [{"role": "user", "content": "ab"}]
    found = chats.post("/tokenize", messages=said, prompt=None, return_token_strs=True).json()
    assert found == {"count": 2, "max_model_len": CONTEXT, "tokens": [64, 65], "token_strs": ["a", "b"]}
    assert chats.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "ab"}
    refused = chats.post("/detokenize", tokens=[VOCABULARY]).json()["error"]["message"]
    assert refused == f"tokens: token ids must lie in [0, {VOCABULARY})"


def test_the_template_of_an_export_is_its_tokenizer_s(tmp_path: Path):
    """`tests/training/test_export.py` shows that an export carries it; here, that it is then used."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=numbered_tokenizer(300), eos_token="</s>", chat_template=ALTERNATING
    )
    tokenizer.save_pretrained(tmp_path)
    template = load_template(tmp_path)
    assert template is not None
    assert template.render([Message(role="user", content="a")], given={}) == "[user]a</s>"
