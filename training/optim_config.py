"""The section `optim` of a training run: which rule moves each weight, and its numbers. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache

from cluster import config as layered
from cluster.config import ConfigError, key, require
from optim.cost import balances_lines

PRODUCT_DTYPES = ("bf16", "fp32")
MUON_RULES = ("muon", "normuon", "muon_plus", "muon_eq", "aurora", "mars", "ema_nesterov")
SCION_RULES = ("scion", "transported_scion")  # of all parameters, by norm; the others: of hidden matrices
MATRIX_RULES = (*MUON_RULES, *SCION_RULES, "adamw", "sgd", "signum")
NOISES = ("none", "gaussian", "student", "stable")
LINES = {  # rule -> what it can normalise
    "normuon": ("row", "column", "larger"),
    "aurora": ("row", "larger"),
    **dict.fromkeys(("muon_plus", "muon_eq"), ("row", "column", "larger", "row_column", "column_row")),
}
ORTHOGONALISATIONS = ("polar_express", "jordan", "cans")
UPDATE_SCALES = ("spectral", "jordan", "rms", "none")
OWN_AHEAD = {"ema_nesterov": "ema_nesterov", "transported_scion": "transport"}
NORMS = (  # of optim/geometry.py
    *("spectral", "spectral:input", "spectral:plain", "frobenius", "frobenius:rms", "sign", "sign:plain"),
    *("column", "column:normalized", "column:embedding", "row", "row:plain", "row:embedding"),
)
NORM_PATTERN = rf"{'|'.join(NORMS)}|schatten:(inf|[1-9]\d*(\.\d+)?)"


@dataclass(frozen=True)
class MatrixOptimConfig:
    rule: str = key("muon", "rule of the hidden matrices", choices=MATRIX_RULES)
    lr: float = key(
        0.02, "peak learning rate of the hidden matrices; of everything under scion's rules", above=0
    )
    momentum: float = key(0.95, "momentum, of every rule but adamw", least=0, below=1)
    nesterov: bool = key(True, "Nesterov look-ahead of the momentum: muon and its variants")
    warm_start: bool = key(False, "momentum begins as the first gradient, not as zero")
    weight_decay: float = key(
        0.1, "decoupled: each step multiplies the weights by 1 - lr*weight_decay", least=0
    )
    method: str = key(
        "polar_express", "Newton-Schulz coefficients (optim/polar.py)", choices=ORTHOGONALISATIONS
    )
    scale: str = key(
        "spectral", "muon's rules: scale of the orthogonal update (optim/rules.py)", choices=UPDATE_SCALES
    )
    per_head: bool = key(False, "treat each attention head's rows of q, k and v as a matrix of their own")
    dtype: str = key("bf16", "precision of exchange and orthogonalisation", choices=PRODUCT_DTYPES)
    polar_steps: int = key(5, "Newton-Schulz iterations", least=3, most=12)
    cautious: bool = key(False, "decay only entries whose sign is that of their update (arXiv 2510.12402)")
    lines: str = key(
        "row",
        "normuon, muon_plus, muon_eq, aurora: what is normalised; larger: along the larger dimension",
        choices=LINES["muon_plus"],
    )
    row_beta2: float = key(0.95, "normuon: decay of the lines' second moments v", least=0, below=1)
    row_alpha: float = key(1e-10, "normuon: alpha of the divisor", least=0)
    row_divisor: str = key(
        "sqrt_plus", "normuon: sqrt(v) + alpha, or sqrt(max(v, alpha))", choices=("sqrt_plus", "max")
    )
    row_length: str = key(
        "full",
        "normuon: Frobenius norm of the update; full: of an orthogonal matrix (with scale=rms Algorithm 1 of "
        "arXiv 2609.39114), kept: that of the polar factor (Eq. 4.1)",
        choices=("full", "kept"),
    )
    correction: float = key(0.025, "mars: gamma, the weight of the second gradient of each update", least=0)
    ahead: str | None = key(
        None,
        "where the gradients of any rule with momentum are taken: transport (with rule=muon nesterov=false "
        "Muon-IGT) or ema_nesterov; default: at the weights, unless the rule itself looks ahead",
        choices=("none", "transport", "ema_nesterov"),
    )
    lookahead: float = key(
        0.6, "ema_nesterov: how far ahead the gradient is taken, in average steps", least=0
    )
    velocity_decay: float = key(0.99, "ema_nesterov: decay of the average step", least=0, below=1)
    ramp_steps: int = key(0, "ema_nesterov, transport: steps over which the look-ahead grows from 0", least=0)

    def __post_init__(self) -> None:
        fits = self.lines in LINES.get(self.rule, LINES["muon_plus"])
        choices = ", ".join(LINES.get(self.rule, ()))
        require(fits, "optim.matrix.lines", f"{self.lines} is not for {self.rule}; use one of {choices}")
        fixed = self.rule in ("adamw", "mars", *OWN_AHEAD) and self.ahead is not None
        problem = f"{self.rule} looks ahead in its own way or not at all, not by {self.ahead}; leave it out"
        require(not fixed, "optim.matrix.ahead", problem)
        begun = self.rule == "adamw" and self.warm_start
        require(not begun, "optim.matrix.warm_start", "adamw has no momentum of this kind; leave it out")

    @property
    def looks(self) -> str:
        """How it looks ahead: none, transport or ema_nesterov."""
        return OWN_AHEAD.get(self.rule, self.ahead or "none")

    @property
    def state_numbers(self) -> int:
        """fp32 numbers of state that the rule keeps for each element of a matrix."""
        return {"adamw": 2, "mars": 2}.get(self.rule, 1) + (self.looks == "ema_nesterov")

    @property
    def needs_matrices(self) -> bool:
        """Whether the rule needs whole matrices; under Scion's rules the norm decides."""
        return self.rule in MUON_RULES

    def polar_steps_of(self, rows: int, cols: int) -> tuple[int, ...]:
        """Iterations of each orthogonalisation of a matrix."""
        balanced = self.rule == "aurora" and balances_lines(rows, cols, self.lines)
        return (self.polar_steps,) * (2 if balanced else 1)

    def num_lines(self, rows: int, cols: int) -> int:
        """fp32 numbers of state for the lines of a matrix."""
        if self.rule != "normuon":
            return 0
        return {"row": rows, "column": cols, "larger": max(rows, cols)}[self.lines]


@dataclass(frozen=True)
class ScionConfig:
    norms: tuple[str, ...] = key(
        (
            "*embed_tokens.weight=column:embedding",
            "*lm_head.weight=sign@60",
            "*norm.weight=frobenius:rms",
            "*bias=frobenius:rms",
            "*=spectral",
        ),
        "'pattern=norm' or 'pattern=norm@radius', quoted; the first that matches a parameter's name counts. "
        f"Norms: {', '.join(NORMS)}, schatten:P",
    )
    constrained: bool = key(False, "keep the weights in the norm's ball of this radius: decay by lr")
    transport: float = key(
        1.0, "transport: c; gradients are taken c*momentum/(1-momentum) steps ahead", least=0
    )
    transport_cap: float = key(1e9, "transport: the most steps ahead", least=0)
    transport_scheduled: bool = key(
        False, "transport: scale the steps ahead by the schedule, so that they end at 0 as the rate does"
    )

    def __post_init__(self) -> None:
        for entry in self.norms:
            pattern, norm, radius = parse_norm_entry(entry)
            require(bool(pattern), "optim.scion.norms", f"{entry!r} has no pattern before '='")
            require(
                re.fullmatch(NORM_PATTERN, norm) is not None,
                "optim.scion.norms",
                f"{norm!r} is not one of {', '.join(NORMS)}, schatten:P",
            )
            require(0 < radius < 1e9, "optim.scion.norms", f"the radius of {entry!r} must be positive")


def parse_norm_entry(entry: str) -> tuple[str, str, float]:
    """(pattern, norm, radius) of "pattern=norm@radius". Raises `ConfigError`."""
    pattern, _, rest = entry.partition("=")
    norm, _, radius = rest.partition("@")
    try:
        return pattern, norm, float(radius or 1)
    except ValueError:
        raise ConfigError(f"optim.scion.norms: {radius!r} of {entry!r} is not a number") from None


@dataclass(frozen=True)
class VectorOptimConfig:
    lr: float = key(0.003, "peak learning rate of embeddings, head, norms and biases (AdamW)", above=0)
    beta1: float = key(0.9, "decay of the first moment", least=0, below=1)
    beta2: float = key(0.95, "decay of the second moment", least=0, below=1)
    eps: float = key(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = key(0.0, "decoupled, on embeddings and head only", least=0)


@dataclass(frozen=True)
class NoiseConfig:
    inject: str = key("none", "noise added to the averaged gradient before any rule", choices=NOISES)
    tail: float = key(1.8, "injected: degrees of freedom of student, index of stable in (0, 2]")
    moment: float = key(
        1.5, "injected: p, below the tail: the moment that optim.noise.scale sets", above=1, most=2
    )
    scale: float = key(
        0.0, "injected: sigma, with E|noise|^p = sigma^p in each entry of the gradient", least=0, below=1e12
    )
    measure_every_steps: int = key(
        0, "steps between measurements of the gradients' own noise; 0: never", least=0
    )
    samples: int = key(2, "measured: micro-batches per worker", least=2)
    norm: str = key(
        "spectral",
        "measured: a norm, by name (optim/geometry.py); its dual is measured too",
        pattern=(NORM_PATTERN, f"is not one of {', '.join(NORMS)}, schatten:P"),
    )

    def __post_init__(self) -> None:
        if self.inject in ("student", "stable"):
            least = f"{self.tail:g} must be above optim.noise.moment={self.moment:g}, or that is infinite"
            require(self.tail > self.moment, "optim.noise.tail", least)
            require(self.inject == "student" or self.tail <= 2, "optim.noise.tail", "is at most 2 for stable")


@dataclass(frozen=True)
class OptimConfig:
    matrix: MatrixOptimConfig = key(MatrixOptimConfig, "hidden matrices")
    vector: VectorOptimConfig = key(VectorOptimConfig, "everything else")
    by_name: tuple[str, ...] = key(
        (),
        "rules of hidden matrices by name, each 'pattern: key=value key=value' with keys of optim.matrix, "
        "such as '*.mlp.*: rule=normuon lines=larger'; each matrix may match one pattern",
    )
    scion: ScionConfig = key(ScionConfig, "norms of scion's rules, and transport")
    noise: NoiseConfig = key(NoiseConfig, "heavy-tailed noise, injected and measured")
    clip: float = key(
        1.0, "global norm at which the gradient is clipped, before any rule; 0 turns it off", least=0
    )
    z_loss: float = key(
        0.0, "weight of log(Z)^2 in the training loss, Z a token's sum of exponentials; PaLM: 1e-4", least=0
    )
    max_skipped_fraction: float = key(
        0.1,
        "share of the steps that may be skipped for a gradient that is not finite; above it the run fails",
        least=0,
        most=1,
    )
    qk_clip: float = key(
        0.0,
        "largest attention logit: after each step the query and key rows of a head above it are scaled down "
        "(MuonClip, arXiv 2507.20534, which takes 100); 0: off",
        least=0,
    )
    average_decay: float = key(
        0.0,
        "decay of an average of the weights, evaluated beside them as averaged_loss, such as 0.999; 0: none",
        least=0,
        below=1,
    )
    final_weight_decay: float = key(
        1.0, "weight decay at the end, as a share of its start; it falls linearly over the run", least=0,
        most=1,
    )  # fmt: skip
    inspect_every_steps: int = key(10, "log optimizer health (updates and phases) every N steps", least=1)

    def __post_init__(self) -> None:
        clean = self.noise.inject == "none" or self.clip == 0
        require(clean, "optim.noise.inject", "needs optim.clip=0: the noise comes after clipping")
        sized = self.noise.inject == "none" or self.noise.scale > 0
        require(sized, "optim.noise.scale", f"must be positive for optim.noise.inject={self.noise.inject}")
        fixed = self.final_weight_decay < 1 and self.scion.constrained
        require(not fixed, "optim.final_weight_decay", "must be 1 with optim.scion.constrained=true")
        alone = self.gradients_per_update == 1 or all(each.looks == "none" for each in self.matrices.values())
        require(alone, "optim.matrix.rule", "mars cannot stand beside a rule that looks ahead")
        moved = any(each.looks == "transport" for each in self.matrices.values())
        unused = self.scion.transport_scheduled and not moved
        require(not unused, "optim.scion.transport_scheduled", "no rule is transported; leave it out")

    @property
    def matrices(self) -> dict[str, MatrixOptimConfig]:
        """Pattern of names -> rule of the hidden matrices; "" is that of all others.

        Raises:
            ConfigError: an entry of `optim.by_name` cannot be used.
        """
        return {"": self.matrix, **_by_name(self.matrix, self.by_name)}

    @property
    def looks_ahead(self) -> str | None:
        """A rule whose gradients are taken at another point than the weights, if there is one."""
        transport = min(self.scion.transport, self.scion.transport_cap)
        for matrix in self.matrices.values():
            ahead = {"ema_nesterov": matrix.lookahead, "transport": min(transport, matrix.momentum)}
            if matrix.rule == "mars" or ahead.get(matrix.looks, 0) > 0:
                return matrix.rule
        return None

    @property
    def gradients_per_update(self) -> int:
        """Steps that an update takes, each with a gradient of the same batch."""
        return 2 if any(matrix.rule == "mars" for matrix in self.matrices.values()) else 1

    def pattern_of(self, names: Iterable[str]) -> dict[str, str]:
        """Hidden matrix -> the pattern of `optim.by_name` that it matches, or "".

        Raises:
            ConfigError: a pattern that matches no hidden matrix, or two that match one.
        """
        names, patterns = list(names), [pattern for pattern in self.matrices if pattern]
        found = {name: [each for each in patterns if fnmatchcase(name, each)] for name in names}
        for name, each in found.items():
            both = " and ".join(map(repr, each))
            require(len(each) < 2, "optim.by_name", f"{both} match {name}; make one of them narrower")
        for pattern in patterns:
            used = any(pattern in each for each in found.values())
            problem = f"{pattern!r} matches no hidden matrix; there are {_folded(names)}"
            require(used, "optim.by_name", problem)
        return {name: each[0] if each else "" for name, each in found.items()}


@cache
def _by_name(matrix: MatrixOptimConfig, entries: tuple[str, ...]) -> dict[str, MatrixOptimConfig]:
    """Pattern -> `matrix` with the entry's own keys."""
    found: dict[str, MatrixOptimConfig] = {}
    for entry in entries:
        pattern, _, rest = entry.partition(":")
        pairs = rest.split()
        require(bool(pattern and pairs), "optim.by_name", f"{entry!r} is not 'pattern: key=value key=value'")
        require(pattern not in found, "optim.by_name", f"{pattern!r} stands there twice")
        keys = [pair.partition("=")[0] for pair in pairs]
        problem = f"{pattern!r}: per_head is for all matrices; set optim.matrix.per_head"
        require("per_head" not in keys, "optim.by_name", problem)
        try:
            given = layered.load(MatrixOptimConfig, dotlist=pairs)
            found[pattern] = replace(matrix, **{name: getattr(given, name) for name in keys})
        except ConfigError as error:
            raise ConfigError(f"optim.by_name: {pattern!r}: {error}") from error
    return found


def _folded(names: Iterable[str]) -> str:
    """Names with their layers' numbers folded to '*'."""
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names}))
