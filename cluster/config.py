"""Typed configuration: dataclass defaults <- YAML file <- command-line dotlist, then frozen.

The only home of omegaconf. A schema is a frozen dataclass of frozen dataclasses whose fields are made
with `key`, so that each key carries its own help text; `load` merges the three layers, and every typo,
wrong type or refused value is a `ConfigError` that names the key.

A configuration is recorded, printed and sent to W&B. So it reads nothing outside itself, and holds no secret.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.masking import mask, mask_secrets

T = TypeVar("T")
# ${of.another.key}. All else after "${" calls a resolver, as ${oc.env:HOME} does, or may become such a call.
_ANOTHER_KEY = re.compile(r"\$\{\s*[\w.\[\]-]+\s*\}")


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key or file and the remedy."""


def key(default: Any, doc: str) -> Any:
    """A dataclass field with a default (a class is its own default_factory) and a help text."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def require(condition: bool, name: str, problem: str) -> None:
    """Raise a `ConfigError` about the key `name` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}: {problem}")


def require_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise a `ConfigError` unless `value` is one of `choices`."""
    require(value in choices, name, f"{value!r} is not one of: {', '.join(sorted(choices))}")


def load(schema: type[T], *, file: Path | None = None, dotlist: Sequence[str] = ()) -> T:
    """Merge the defaults of `schema`, the YAML `file` and the `dotlist` ("a.b=c"), in that order.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, a value that the schema refuses, one that calls
            a resolver, or one that looks like a secret.
    """
    merged = OmegaConf.structured(schema)
    for origin, layer in _layers(file, dotlist):
        for name, text in _texts(OmegaConf.to_container(layer, resolve=False)):
            require("${" not in _ANOTHER_KEY.sub("", text), f"{origin}: {name}", f"{text!r} {_OUTSIDE}")
        try:
            merged = OmegaConf.unsafe_merge(merged, layer)  # which copies nothing: both are ours alone
        except (OmegaConfBaseException, TypeError) as error:  # a TypeError: a list where a mapping belongs
            problem = _misused_section(schema, layer) or _explain(error, schema)
            raise ConfigError(f"{origin}: {problem}") from error
    try:
        found: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error
    for name, text in _texts(dataclasses.asdict(found)):
        require(
            "${" not in text, name, f"{text!r}: in config.yaml, '${{' would be read as another key's value"
        )
        require(mask(text) == text, name, _SECRET)
    return found


def _layers(file: Path | None, dotlist: Sequence[str]) -> Iterator[tuple[str, DictConfig]]:
    if file is not None:
        try:
            layer = OmegaConf.load(file)
        except OSError as error:
            if error.strerror is None:  # omegaconf's own: the top level is a number or a boolean
                raise ConfigError(f"{file}: the top level must be a mapping of sections") from error
            raise ConfigError(f"{file}: cannot be read ({error.strerror}); check the path") from error
        except Exception as error:  # the YAML scanner's own errors share no public base class
            raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"{file}: holds a list; the top level must be a mapping of sections")
        yield str(file), layer
    for argument in dotlist:
        if "=" not in argument or argument.startswith("="):
            raise ConfigError(f"{argument!r}: expected key=value, for example batch.tokens=16384")
        try:
            yield mask_secrets([argument])[0], OmegaConf.from_dotlist([argument])
        except Exception as error:
            raise ConfigError(f"{argument!r}: not a valid value: {' '.join(str(error).split())}") from error


_OUTSIDE = (
    "would read something outside the configuration, such as the environment, and is not resolved; "
    "give the value itself, or ${another.key}"
)
_SECRET = (
    "looks like a secret, and a configuration is recorded; set it as an environment variable (WANDB_API_KEY, "
    "HF_TOKEN, OPENAI_API_KEY), or log in with the tool that needs it"
)


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every value that is one, and of every key of a mapping."""
    if isinstance(value, dict):
        for part, each in value.items():
            inner = f"{name}.{part}" if name else str(part)
            yield inner, str(part)
            yield from _texts(each, inner)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _texts(each, f"{name}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float):
        yield name, value if isinstance(value, str) else str(value)


def _misused_section(schema: type, layer: DictConfig, prefix: str = "") -> str | None:
    """The first section to which `layer` gives a value or a list; omegaconf's own message names no key."""
    for field in dataclasses.fields(schema):
        is_mapping = get_origin(field.type) is dict
        if not (dataclasses.is_dataclass(field.type) or is_mapping) or field.name not in layer:
            continue
        section, path = layer[field.name], f"{prefix}{field.name}"
        if is_mapping:
            if not isinstance(section, DictConfig):
                return f"{path}: is a mapping of names to {_item_type(field.type).__name__}, not a value"
            continue
        if not isinstance(section, DictConfig):
            return f"{path}: is a section, not a value; keys here: {', '.join(_keys_under(field.type, ''))}"  # type: ignore[arg-type]
        if problem := _misused_section(field.type, section, f"{path}."):  # type: ignore[arg-type]
            return problem
    return None


def _explain(error: Exception, schema: type) -> str:
    # omegaconf leaves its own placeholders in what it says of a list's items
    first_line = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "an item")
    path = getattr(error, "full_key", None) or ""
    if "not in" in first_line:
        parent = path.rpartition(".")[0]
        return f"unknown key {path!r}; keys here: {', '.join(_keys_under(schema, parent))}"
    return f"{path}: {first_line}" if path else first_line


def _keys_under(schema: type, path: str) -> list[str]:
    for name in filter(None, re.split(r"[.\[\]]", path)):
        if dataclasses.is_dataclass(schema):
            types = {field.name: field.type for field in dataclasses.fields(schema)}
            if name not in types:  # a dot in a YAML's own key
                break
            schema = types[name]  # type: ignore[assignment]
        else:
            schema = _item_type(schema)
    return [field.name for field in dataclasses.fields(schema)]


def _item_type(schema: Any) -> Any:
    """X of dict[str, X] and of list[X]."""
    return get_args(schema)[-1]


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, help text) of every leaf of a config object, in order of declaration."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{name}.")
        else:
            yield name, value, field.metadata.get("doc", "")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def to_yaml(config: Any) -> str:
    """The config as YAML text that `load` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
