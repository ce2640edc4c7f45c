"""A conversation as the text of a prompt, by the chat template of the checkpoint.

A template is Jinja and comes with the model. It runs in Jinja's sandbox, as in transformers
(`transformers.utils.chat_template_utils`, whose filters and functions it may use), and sees only JSON values.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.cli import UserError
from serving.endpoint.refusal import Refusal
from serving.endpoint.schema import Message
from training.model.chat_template import read_template

# What a template raises; the sandbox's errors are among Jinja's.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip


class ChatTemplate:
    """Writes conversations as a model expects them.

    Args:
        source: the Jinja template.
        special: the texts of special tokens by their role, such as bos_token, which templates may use.

    Raises:
        ValueError: `source` is not Jinja.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self._special = dict(special)
        self._knows_developers = "developer" in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not Jinja: {error}") from error

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, given: Mapping[str, Any]
    ) -> str:
        """The text of a conversation.

        A developer is the system where the template knows no developer: OpenAI renamed the role.

        Args:
            add_generation_prompt: end it with what begins the assistant's answer.
            given: further variables of the template, from the client.

        Raises:
            Refusal: 400, the template refuses these messages.
        """
        spoken = []
        for message in messages:
            renamed = message.role == "developer" and not self._knows_developers
            role = "system" if renamed else message.role
            named = {} if message.name is None else {"name": message.name}
            spoken.append({"role": role, "content": message.content, **named})
        ours = {"messages": spoken, "add_generation_prompt": add_generation_prompt}
        variables = {**given, **self._special, **ours, "tools": None, "documents": None}
        try:
            return self._template.render(variables)
        except _TEMPLATE_ERRORS as error:
            problem = f"the model's chat template refuses them: {error}"
            raise Refusal(400, f"messages: {problem}", param="messages", code="invalid_value") from error


def load_template(directory: Path) -> ChatTemplate | None:
    """The template of a Hugging Face directory; None: it has none. Raises `UserError`: it is damaged."""
    remedy = "copy it again, or remove it to serve without chats"
    try:
        source = read_template(directory)
    except ValueError as error:
        raise UserError(f"{error}; {remedy}") from error
    if source is None:
        return None
    try:
        return ChatTemplate(source.text, source.special)
    except ValueError as error:
        raise UserError(f"{source.file}: {error}; {remedy}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **other: Any) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **other)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)
