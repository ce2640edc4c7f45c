"""Where a Hugging Face directory keeps its chat template. No torch, no Jinja."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluster import files

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class TemplateSource(NamedTuple):
    """A template, the file that it is in, and the special tokens that it may name, by their role."""

    text: str
    file: Path
    special: dict[str, str]


def read_template(directory: Path) -> TemplateSource | None:
    """The chat template of a directory, or None.

    It is in chat_template.jinja, or else in tokenizer_config.json, where it may be one of several: then the
    one that is named "default", or the first.

    Raises:
        ValueError: a file of these is damaged. The message begins with it.
    """
    file, settings = directory / CONFIG_FILE, _settings(directory)
    given = settings.get("chat_template")
    if isinstance(given, list):
        named = {str(one.get("name")): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default", next(iter(named.values()), None))
    if (directory / TEMPLATE_FILE).is_file():
        file = files.inside(directory, TEMPLATE_FILE)
        try:
            given = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: {error}") from error
    if given is None:
        return None
    if not isinstance(given, str):
        raise ValueError(f"{file}: chat_template is no text")
    return TemplateSource(given, file, _special(settings))


def special_tokens(directory: Path) -> dict[str, str]:
    """Role -> text of a directory's special tokens. Raises `ValueError`: the file of them is damaged."""
    return _special(_settings(directory))


def _settings(directory: Path) -> dict[str, Any]:
    config = directory / CONFIG_FILE
    settings = files.read_json(config) if config.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config}: holds no JSON object")
    return settings


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found
