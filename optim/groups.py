"""Which rule each parameter gets: an exact, printable partition by name and shape.

Hidden matrices get the matrix rule. Embeddings and the output head are matrices too, but their rows are
tokens, not directions of one linear map, so they get the vector rule, as do norms and biases.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import nn

TABLE_NAMES = ("embed_tokens", "lm_head")  # Hugging Face's names for the embedding and the output head
KINDS = ("matrix", "table", "vector")


@dataclass(frozen=True)
class Member:
    """One trainable parameter: its name, full shape (also under zero.Init) and kind (one of KINDS)."""

    name: str
    shape: tuple[int, ...]
    kind: str
    parameter: nn.Parameter


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape before ZeRO-3 partitioned the parameter, if it did."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def partition(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Member]:
    """Assign every trainable parameter to exactly one kind.

    "matrix": 2-D and not a table; "table": a weight of a module in TABLE_NAMES; "vector": 0-D and 1-D.

    Raises:
        ValueError: a parameter with more than two dimensions, or one object under two names.
    """
    members: list[Member] = []
    seen: dict[int, str] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if id(parameter) in seen:
            raise ValueError(f"{name} and {seen[id(parameter)]} are one parameter; name it once")
        seen[id(parameter)] = name
        shape = full_shape(parameter)
        if len(shape) > 2:
            raise ValueError(f"{name}: {len(shape)} dimensions; no rule here takes more than two")
        if len(shape) < 2:
            kind = "vector"
        elif any(part in TABLE_NAMES for part in name.split(".")):
            kind = "table"
        else:
            kind = "matrix"
        members.append(Member(name, shape, kind, parameter))
    return members


def describe(members: Iterable[Member]) -> str:
    """The partition as text, one line per kind and shape, with counts and elements."""
    counts: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for member in members:
        counts.setdefault((KINDS.index(member.kind), member.shape), []).append(member.name)
    lines = []
    for (kind, shape), names in sorted(counts.items()):
        numel = len(names) * prod(shape)
        size = "x".join(map(str, shape))
        lines.append(f"  {KINDS[kind]:<7}{len(names):>4} x {size:<12}{numel:>14,}  {_common(names)}")
    return "\n".join(lines)


def _common(names: list[str]) -> str:
    """Distinct names with layer numbers folded to '*'."""
    folded = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    return ", ".join(sorted(folded))
