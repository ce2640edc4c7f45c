"""Which rule each parameter gets: an exact, printable partition by name and shape.

Hidden matrices get the matrix rule. Embeddings and the output head are matrices too, but their rows are
tokens, not directions of one linear map, so they get the vector rule, as do norms and biases.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from optim.geometry import Lines, norm_for, parse_norm

TABLE_NAMES = ("embed_tokens", "lm_head")  # Hugging Face's names for the embedding and the output head
KINDS = ("matrix", "table", "vector")
TABLE_BLOCK_ROWS = 512


@dataclass(frozen=True)
class Member:
    """One trainable parameter.

    Attributes:
        shape: the full shape, also under zero.Init.
        kind: one of KINDS.
        blocks: of kind "matrix": the rows of each matrix that it consists of, one above the other; one
            block, unless `splits` says otherwise. Of the others: empty, until `by_norm` gives them a rule
            that may need whole matrices.
        rule: which of the optimizer's rules updates it; empty: the one named as its kind.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: tuple[int, ...]
    parameter: nn.Parameter
    rule: str = ""

    @property
    def label(self) -> str:
        """Under which name the optimizer finds its rule."""
        return self.rule or self.kind


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape before ZeRO-3 partitioned the parameter, if it did."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def attention_splits(
    *, num_heads: int, num_kv_heads: int, head_dim: int, per_head: bool
) -> dict[str, tuple[int, ...]]:
    """Splits of attention projections, by Hugging Face's names.

    A fused `qkv_proj` is three linear maps and is always split into them; with `per_head`, every head of
    queries, keys and values is a matrix of its own.
    """
    if per_head:
        q, kv = (head_dim,) * num_heads, (head_dim,) * num_kv_heads
        return {"q_proj": q, "k_proj": kv, "v_proj": kv, "qkv_proj": q + kv + kv}
    return {"qkv_proj": (head_dim * num_heads, head_dim * num_kv_heads, head_dim * num_kv_heads)}


def partition(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    splits: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Member]:
    """Assign every trainable parameter to exactly one kind.

    "matrix": 2-D and not a table; "table": a weight of a module in TABLE_NAMES; "vector": 0-D and 1-D.

    Args:
        splits: part of a dotted name -> rows of the matrices that such a parameter consists of.

    Raises:
        ValueError: a parameter with more than two dimensions, one object under two names, or a split whose
            rows do not add up to the parameter's.
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
        blocks = _blocks(name, shape[0], splits or {}) if kind == "matrix" else ()
        members.append(Member(name, shape, kind, blocks, parameter))
    return members


def by_norm(members: Iterable[Member], patterns: Sequence[tuple[str, str]]) -> list[Member]:
    """Give every parameter the rule of its norm, by (pattern of names, label) (`optim.geometry.norm_for`).

    A label is a norm's name, or norm@radius. Only the rule reads the radius.

    A vector of n is one n x 1 matrix. A table whose rows are normalised one by one is cut into blocks of
    TABLE_BLOCK_ROWS, so that its work spreads over the ranks and little of it travels.

    Raises:
        ValueError: no pattern matches a parameter, or a name is no norm.
    """
    found = []
    for member in members:
        label = norm_for(member.name, patterns)
        blocks = member.blocks or (prod(member.shape[:1]),)
        if member.kind == "table" and parse_norm(label.partition("@")[0]).ball == Lines(dim=-1):
            whole, rest = divmod(member.shape[0], TABLE_BLOCK_ROWS)
            blocks = (TABLE_BLOCK_ROWS,) * whole + ((rest,) if rest else ())
        found.append(replace(member, blocks=blocks, rule=label))
    return found


def _blocks(name: str, rows: int, splits: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    blocks = next((splits[part] for part in name.split(".") if part in splits), (rows,))
    if sum(blocks) != rows:
        raise ValueError(f"{name}: a split into {'+'.join(map(str, blocks))} rows, but it has {rows}")
    return blocks


def describe(members: Iterable[Member]) -> str:
    """The partition as text, one line per kind, shape and rule, with counts and elements."""
    counts: dict[tuple[int, tuple[int, ...], str], list[str]] = {}
    for member in members:
        counts.setdefault((KINDS.index(member.kind), member.shape, member.rule), []).append(member.name)
    lines = []
    for (kind, shape, rule), names in sorted(counts.items()):
        numel = len(names) * prod(shape)
        size, by = "x".join(map(str, shape)), f" by {rule}" if rule else ""
        lines.append(f"  {KINDS[kind]:<7}{len(names):>4} x {size:<12}{numel:>14,}  {_common(names)}{by}")
    return "\n".join(lines)


def _common(names: list[str]) -> str:
    """Distinct names with layer numbers folded to '*'."""
    folded = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    return ", ".join(sorted(folded))
