"""Typed configuration: dataclass defaults <- YAML file <- command-line dotlist, then frozen.

The only home of omegaconf. A schema is a frozen dataclass of frozen dataclasses whose fields are made
with `key`, so that each key carries its own help text; `load` merges the three layers, and every typo,
wrong type or refused value is a `ConfigError` that names the key.

A configuration is recorded, printed and sent to W&B. So it reads nothing outside itself, and holds no secret.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.masking import mask, mask_secrets

T = TypeVar("T")
ANCHORS = "x-"  # a file's top-level keys that begin so are ignored: a place for YAML anchors
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as OmegaConf chooses
_Written = Iterator[tuple[str, str]]
# ${of.another.key}. All else after "${" calls a resolver, as ${oc.env:HOME} does, or may become such a call.
_ANOTHER_KEY = re.compile(r"\$\{\s*[\w.\[\]-]+\s*\}")


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key or file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a key allows: bounds of a number, choices, or the form of a text.

    Null always passes. Infinity and NaN are refused unless `finite` is false. Of a list, each item is meant.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    finite: bool = True
    choices: Collection[Any] = ()
    pattern: tuple[str, str] | None = None  # a regular expression, and what a text that it refuses lacks

    def problem(self, value: Any) -> str | None:
        """Why `value` is refused, or None. Null passes."""
        if isinstance(value, list | tuple):
            return next(filter(None, map(self.problem, value)), None)
        if value is None:
            return None
        if self.finite and isinstance(value, float) and not math.isfinite(value):
            return f"must be finite, not {value}"
        if self.choices and value not in self.choices:
            return f"{value!r} is not one of: {_listed(self.choices)}"
        if self.pattern and not re.fullmatch(self.pattern[0], value):
            return f"{value!r} {self.pattern[1]}"
        within = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        return None if within else f"must {self._bounds()}, not {value}"

    def _bounds(self) -> str:
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            if self.above is None and self.below is None:
                return f"lie between {low} and {high}"
            left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"lie in {left}{low}, {high}{right}"
        if low is None:
            return f"be {'at most' if self.below is None else 'below'} {high}"
        if self.above is None:
            return f"be at least {low}" if low else "not be negative"
        return f"be above {low}" if low else "be positive"

    def __str__(self) -> str:
        """For a help text: "at least 1", "one of: x, y"; empty where everything is allowed."""
        if self.choices:
            return f"one of: {_listed(self.choices)}"
        bounded = any(bound is not None for bound in (self.least, self.most, self.above, self.below))
        return re.sub(r"\b(be|lie) ", "", self._bounds()) if bounded else ""


def _listed(choices: Collection[Any]) -> str:
    return ", ".join(map(str, sorted(choices)))


def key(default: Any, doc: str, **allowed: Any) -> Any:
    r"""A dataclass field: a key of a configuration.

    Args:
        default: a class is its own default_factory.
        doc: the help text. `--help` adds what is allowed.
        allowed: fields of `Allowed`: least=1, above=0, most=1, below=1, choices=("x", "y"), or
            pattern=(r"\w+", "must be letters"). `load` checks them before it makes any section, so that a
            `__post_init__` sees allowed values only.
    """
    metadata = {"doc": doc, "allowed": Allowed(**allowed)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, name: str, problem: str) -> None:
    """Raise a `ConfigError` about the key `name` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}: {problem}")


def check(schema: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a `ConfigError` about the first key of `values` whose value its schema does not allow."""
    for field in dataclasses.fields(schema):
        value, name = values[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            check(field.type, value, f"{name}.")
        elif isinstance(value, dict) and dataclasses.is_dataclass(_item_type(field.type)):
            for part, item in value.items():
                check(_item_type(field.type), item, f"{name}.{part}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, dict | list) for item in value):
            # which omegaconf lets through: tuple[str, ...] is to it a list of anything
            raise ConfigError(f"{name}: {value} holds a mapping or a list; quote a text")
        elif problem := field.metadata.get("allowed", Allowed()).problem(value):
            raise ConfigError(f"{name}: {problem}")


def load(schema: type[T], *, file: Path | None = None, dotlist: Sequence[str] = ()) -> T:
    """Merge the defaults of `schema`, the YAML `file` and the `dotlist` ("a.b=c"), in that order.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, a value that the schema refuses, one that calls
            a resolver, or one that looks like a secret.
    """
    merged = OmegaConf.structured(schema)
    for origin, layer, written in _layers(file, dotlist):
        for name, problem in _misread(schema, layer, written):
            raise ConfigError(f"{name}: {problem}" if origin != str(file) else f"{origin}: {name}: {problem}")
        for name, text in _texts(OmegaConf.to_container(layer, resolve=False)):
            require("${" not in _ANOTHER_KEY.sub("", text), f"{origin}: {name}", f"{text!r} {_OUTSIDE}")
        try:
            merged = OmegaConf.unsafe_merge(merged, layer)  # which copies nothing: both are ours alone
        except (OmegaConfBaseException, TypeError) as error:  # a TypeError: a list where a mapping belongs
            problem = _misused_section(schema, layer) or _explain(error, schema)
            raise ConfigError(f"{origin}: {problem}") from error
    try:
        check(schema, OmegaConf.to_container(merged, resolve=True))  # type: ignore[arg-type]
        found: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error
    for name, text in _texts(dataclasses.asdict(found)):
        require(
            "${" not in text, name, f"{text!r}: in config.yaml, '${{' would be read as another key's value"
        )
        require(mask(text) == text, name, _SECRET)
        try:
            Path(text).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{name}: {text}: there is no such user here; write the path out") from error
    return found


def _layers(file: Path | None, dotlist: Sequence[str]) -> Iterator[tuple[str, DictConfig, _Written]]:
    """(its name for messages, the layer, the scalars as they are written) of each layer."""
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
        for name in [name for name in layer if str(name).startswith(ANCHORS)]:
            del layer[name]
        yield str(file), layer, _scalars(yaml.compose(file.read_text(), Loader=_LOADER))
    for argument in dotlist:
        if "=" not in argument or argument.startswith("="):
            raise ConfigError(f"{argument!r}: expected key=value, for example batch.tokens=16384")
        try:
            name, _, text = argument.partition("=")
            written = _scalars(yaml.compose(text, Loader=_LOADER), name)
            yield mask_secrets([argument])[0], OmegaConf.from_dotlist([argument]), written
        except Exception as error:
            raise ConfigError(f"{argument!r}: not a valid value: {' '.join(str(error).split())}") from error


def _scalars(node: yaml.Node | None, name: str = "") -> _Written:
    """(dotted key, text) of every scalar that stands without quotes."""
    if isinstance(node, yaml.MappingNode):
        for each, value in node.value:
            merges = each.value == "<<"  # another mapping into this one
            yield from _scalars(value, name if merges else f"{name}.{each.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _scalars(value, f"{name}[{index}]")
    elif isinstance(node, yaml.ScalarNode) and not node.style:
        yield name, node.value


def _misread(schema: type, layer: DictConfig, written: _Written) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) of scalars that YAML reads as something else than is meant.

    Where a whole number belongs, 1e6 becomes one.
    """
    for name, text in written:
        kinds = _kinds(schema, name)
        if "${" in text or not kinds:
            continue
        value = OmegaConf.select(layer, name)
        if text == "None" and type(None) in kinds:
            yield name, "'None' is a text; write null for no value"
        elif int in kinds and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
            OmegaConf.update(layer, name, int(value))
        elif float in kinds and isinstance(value, int) and abs(value) > sys.float_info.max:
            yield name, f"a number of {len(text)} digits is too large"
        elif str in kinds and value is not None and not isinstance(value, str) and str(value) != text:
            yield name, f"YAML reads {text} as {value}; quote a text: '{text}', in a shell \"'{text}'\""


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


def _kinds(schema: Any, path: str) -> tuple[type, ...]:
    """Types that the value of a dotted key may have: (int, NoneType) of `int | None`; else none."""
    for name in filter(None, re.split(r"[.\[\]]", path)):
        if dataclasses.is_dataclass(schema):
            schema = {field.name: field.type for field in dataclasses.fields(schema)}.get(name)
        else:
            schema = _item_type(schema)
    return get_args(schema) or ((schema,) if isinstance(schema, type) else ())


def _item_type(schema: Any) -> Any:
    """X of dict[str, X], list[X] and tuple[X, ...]; None of what holds no items."""
    arguments = [each for each in get_args(schema) if each is not ...]
    return arguments[-1] if get_origin(schema) in (dict, list, tuple) else None


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, help text) of every leaf of a config object, in order of declaration."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{name}.")
        else:
            doc, allowed = field.metadata.get("doc", ""), str(field.metadata.get("allowed", ""))
            yield name, value, f"{doc} ({allowed})" if allowed else doc


def changes(config: Any, *, since: Any = None) -> dict[str, list[Any]]:
    """Dotted key -> [default, value] of every leaf of a config object that differs from its default.

    Args:
        since: has the defaults, of a class with a key that must be given.
    """
    defaults = {name: value for name, value, _ in walk(since or type(config)())}
    here = ((name, defaults.get(name), value) for name, value, _ in walk(config))
    return {name: _plain([default, value]) for name, default, value in here if default != value}


def _plain(value: Any) -> Any:
    """JSON-ready: tuples are lists, dataclasses mappings."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def read_yaml(file: Path) -> Any:
    """What a YAML file of a run holds, as plain values, whatever keys its version had.

    Raises:
        ValueError: it is not YAML; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except OSError:
        raise
    except Exception as error:  # the YAML scanner's own errors share no public base class
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def to_yaml(config: Any) -> str:
    """The config as YAML text that `load` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
