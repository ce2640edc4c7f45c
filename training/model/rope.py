"""How RoPE is stretched to longer contexts, as Hugging Face configs name it. No torch.

`stretch` computes in the caller's tensors. Formulas as in transformers (`modeling_rope_utils.py`), which the
tests compare them with.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tensor = Any  # torch's; this module does not import it


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's (arXiv 2407.21783; `rope_type: llama3`).

    Wavelengths above original_max_positions/low_freq_factor tokens are stretched by `factor`, those below
    original_max_positions/high_freq_factor are kept, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _require_factor(self.factor)
        ordered = 0 < self.low_freq_factor < self.high_freq_factor
        _require(ordered, "rope_scaling.high_freq_factor", "must exceed low_freq_factor, above 0")
        _require(self.original_max_positions >= 1, "rope_scaling.original_max_positions", "must be positive")

    def stretch(self, frequency: Tensor, *, theta: float, index: Tensor) -> Tensor:
        """Radians per token [C/2] of the stretched RoPE. `index`: 0, 1, ..., C/2 - 1."""
        turns = self.original_max_positions * frequency / (2 * math.pi)  # in the original context
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return kept * frequency + (1 - kept) * frequency / self.factor

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied with."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (arXiv 2306.15595; `rope_type: linear`)."""

    factor: float

    def __post_init__(self) -> None:
        _require_factor(self.factor)

    def stretch(self, frequency: Tensor, *, theta: float, index: Tensor) -> Tensor:
        """See `RopeScaling.stretch`."""
        return frequency / self.factor

    @property
    def attention_factor(self) -> float:
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071; `rope_type: yarn`).

    Dimensions that turn more than `beta_fast` times in the original context are kept, those that turn less
    than `beta_slow` times are stretched by `factor`, with a ramp between.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    def __post_init__(self) -> None:
        _require_factor(self.factor)
        _require(
            0 < self.beta_slow <= self.beta_fast,
            "rope_scaling.beta_fast",
            "must be at least beta_slow, above 0",
        )
        _require(self.original_max_positions >= 1, "rope_scaling.original_max_positions", "must be positive")
        _require(self.attention_factor > 0, "rope_scaling.attention_factor", "must be positive")

    def stretch(self, frequency: Tensor, *, theta: float, index: Tensor) -> Tensor:
        """See `RopeScaling.stretch`."""
        size = 2 * len(index)
        low, high = (
            size * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        stretched = ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
        return stretched * frequency / self.factor + (1 - stretched) * frequency


Scaling = RopeScaling | LinearScaling | YarnScaling


def from_fields(fields: Mapping[str, Any] | None) -> Scaling | None:
    """The scaling whose `dataclasses.asdict` these are; None of None."""
    if fields is None:
        return None
    kinds = (RopeScaling, LinearScaling, YarnScaling)
    return next(k for k in kinds if {f.name for f in dataclasses.fields(k)} == set(fields))(**fields)


def keys_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of RoPE under `rope_parameters` (transformers 5) or `rope_scaling` (4).

    Raises:
        ValueError: it says both, and they differ.
    """
    told = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    thetas = [each["rope_theta"] for each in (config, *told) if each.get("rope_theta") is not None]
    same = all(theta == thetas[0] for theta in thetas)
    _require(same, "rope_theta", f"is {' and '.join(map(repr, thetas))} in rope_parameters and beside it")
    scalings = [from_hf({**config, **each}) for each in told]
    same = all(scaling == scalings[0] for scaling in scalings)
    _require(same, "rope_scaling", "says something else than rope_parameters; change both, or remove one")
    return told[0] if told else {}


def from_hf(config: Mapping[str, Any]) -> Scaling | None:
    """The scaling that a config asks for, whose RoPE keys are among its own.

    `dynamic` is plain RoPE up to `max_position_embeddings`, which is as far as we go.

    Raises:
        ValueError: another scaling, or one that lacks a key or has one that is no number.
    """
    kind = config.get("rope_type", config.get("type", "default"))

    def number(name: str, default: float | None = None) -> float:
        value = config.get(name)
        value = default if value is None else value
        _require(value is not None, name, "missing from the config")
        usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30
        _require(usable, name, f"{value!r} is not a usable number")
        return value  # type: ignore[return-value]

    original = "original_max_position_embeddings"
    if kind in ("default", "dynamic"):
        return None
    if kind == "linear":
        return LinearScaling(number("factor"))
    if kind == "llama3":
        named = (number(name) for name in ("factor", "low_freq_factor", "high_freq_factor", original))
        return RopeScaling(*named)  # type: ignore[arg-type]
    if kind == "yarn":
        factor = number("factor")
        scales = [number(name, 0) for name in ("mscale", "mscale_all_dim")]
        inferred = _mscale(factor, 1.0)
        if all(scales):
            inferred = _mscale(factor, scales[0]) / _mscale(factor, scales[1])
        truncate = config.get("truncate")
        return YarnScaling(
            factor=factor,
            original_max_positions=int(number(original, config.get("max_position_embeddings", 2048))),
            beta_fast=number("beta_fast") if config.get("beta_fast") else 32,
            beta_slow=number("beta_slow") if config.get("beta_slow") else 1,
            attention_factor=number("attention_factor", inferred),
            truncate=truncate is not False,
        )
    _require(False, "rope_type", f"{kind!r} is not one of: default, linear, dynamic, llama3, yarn")
    return None


def to_hf(scaling: Scaling | None) -> dict[str, Any]:
    """The RoPE keys of a config; `from_hf` reads them back."""
    if scaling is None:
        return {"rope_type": "default"}
    names = {RopeScaling: "llama3", LinearScaling: "linear", YarnScaling: "yarn"}
    rope = {"rope_type": names[type(scaling)]} | dataclasses.asdict(scaling)
    if "original_max_positions" in rope:
        rope["original_max_position_embeddings"] = rope.pop("original_max_positions")
    return rope


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _require_factor(factor: float) -> None:
    _require(factor >= 1, "rope_scaling.factor", f"{factor} must be at least 1")


def _require(condition: bool, name: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {problem}")
