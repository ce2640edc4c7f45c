"""The fastest configuration that fits a GPU's memory: micro-batch, compilation, checkpointing, ZeRO stage."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from cluster.config import ConfigError
from cluster.display import Table, table
from cluster.measure.hardware import Device
from training.config import TrainConfig
from training.model.shapes import LlamaShape
from training.planner.memory import Memory, compiles, memory
from training.planner.seconds import Rates, rates_of, step_seconds

MOST_MICRO_SEQUENCES = 64
STAGES = (1, 2, 3)
CHECKPOINTED = (0, 4, 2, 1)  # every N-th layer is recomputed; 0: none
EQUAL = 0.005  # steps whose times differ by less count as equal; then the least memory wins


@dataclass(frozen=True)
class Candidate:
    """One configuration, with what is planned for it."""

    config: TrainConfig
    memory: Memory
    seconds: float

    @property
    def keys(self) -> str:
        """What to write on a command line."""
        compiled, every, stage = self.policy
        keys = {
            "batch.micro_sequences": self.config.batch.micro_sequences,
            "model.compile": compiled,
            "model.activation_checkpointing": every > 0,
            "model.checkpoint_every": every,
            "zero.stage": stage,
        }
        if every <= 1:
            del keys["model.checkpoint_every"]
        return " ".join(f"{name}={str(value).lower()}" for name, value in keys.items())

    @property
    def policy(self) -> tuple[bool, int, int]:
        """(compiled, `model.recomputed_every`, stage)."""
        return compiles(self.config), self.config.model.recomputed_every, self.config.zero.stage

    @property
    def name(self) -> str:
        """The policy in words."""
        compiled, every, stage = self.policy
        name = f"ZeRO-{stage} {'with' if every else 'without'} checkpointing"
        name += f" 1 of {every} layers" if every > 1 else ""
        return name if compiled else f"{name}, not compiled"


@dataclass(frozen=True)
class Proposal:
    """All candidates for a device, the fastest that fits, and the ceilings behind their times."""

    device: Device
    rates: Rates
    candidates: Sequence[Candidate]

    def fits(self, candidate: Candidate) -> bool:
        return candidate.memory.total <= self.device.memory_gb * 1e9

    @property
    def best(self) -> Candidate | None:
        """The fastest that fits; of equals the one with the least memory. None if none fits."""
        return _fastest([each for each in self.candidates if self.fits(each)])

    def reason(self) -> str:
        """Why that one, or what the smallest needs, in a sentence."""
        best, room = self.best, f"{self.device.memory_gb:g} GB"
        if best is None:
            least = min(self.candidates, key=lambda each: each.memory.total)
            return f"none fits {room}: the smallest, {least.keys}, needs {least.memory.total / 1e9:.1f} GB"
        larger = [
            each
            for each in self.candidates
            if each.policy == best.policy and not self.fits(each)
            and each.config.batch.micro_sequences > best.config.batch.micro_sequences
        ]  # fmt: skip
        parts = []
        if larger:
            next_one = min(larger, key=lambda each: each.memory.total)
            micro, need = next_one.config.batch.micro_sequences, next_one.memory.total / 1e9
            parts.append(f"micro-batches of {micro} need {need:.1f} GB ({next_one.memory.largest})")
        others = [each for each in self.by_policy() if each is not best and self.fits(each)]
        for each in sorted(others, key=lambda each: each.seconds)[:2]:
            longer = each.seconds / best.seconds - 1
            parts.append(f"{each.name} takes {f'{longer:.0%} longer' if longer > EQUAL else 'as long'}")
        return f"{best.keys} is the fastest that fits {room}" + (": " + "; ".join(parts) if parts else "")

    def by_policy(self) -> list[Candidate]:
        """Of each policy the fastest that fits, else the smallest."""
        found = []
        for policy in dict.fromkeys(each.policy for each in self.candidates):
            same = [each for each in self.candidates if each.policy == policy]
            fitting = _fastest([each for each in same if self.fits(each)])
            found.append(fitting or min(same, key=lambda each: each.memory.total))
        return found

    def table(self) -> Table:
        """One row for each policy, the fastest first."""
        best = self.best
        rows = [
            (
                "yes" if each.policy[0] else "no", _checkpointed(each.policy[1]), f"{each.policy[2]}",
                f"{each.config.batch.micro_sequences}", f"{each.memory.total / 1e9:.1f}", each.memory.largest,
                f"{each.seconds:.3f}", f"{each.config.batch.tokens / each.seconds:,.0f}",
                "proposed" if each is best else "" if self.fits(each) else "does not fit",
            )
            for each in sorted(self.by_policy(), key=lambda each: (not self.fits(each), each.seconds))
        ]  # fmt: skip
        head = ("compiled", "checkpointing", "ZeRO", "micro", "GB", "most in", "s per step", "tokens/s", "")
        return table(head, rows, left=(0, 1, 5, -1))


def propose(
    config: TrainConfig,
    shape: LlamaShape,
    device: Device,
    *,
    num_workers: int,
    stages: Iterable[int] = STAGES,
) -> Proposal:
    """Plan every micro-batch that divides the batch, with each `CHECKPOINTED`, in these stages.

    Where the configuration does not compile, it is planned compiled too.

    Raises:
        ConfigError: no micro-batch divides the batch.
    """
    rates = rates_of(device)
    candidates = [
        Candidate(
            each,
            memory(each, shape, num_workers=num_workers),
            sum(step_seconds(each, shape, rates, num_workers=num_workers).values()),
        )
        for each in _choices(config, num_workers, tuple(stages))
    ]
    if not candidates:
        raise ConfigError(
            f"batch.tokens: {config.batch.tokens} is not a multiple of {num_workers} workers x "
            f"batch.sequence_length={config.batch.sequence_length}"
        )
    return Proposal(device, rates, candidates)


def _choices(config: TrainConfig, num_workers: int, stages: tuple[int, ...]) -> Iterator[TrainConfig]:
    sequences, rest = divmod(config.batch.tokens, num_workers * config.batch.sequence_length)
    for micro in range(1, MOST_MICRO_SEQUENCES + 1):
        if rest or sequences % micro:
            continue
        batch = replace(config.batch, micro_sequences=micro)
        for compiled, every in product(dict.fromkeys((compiles(config), True)), CHECKPOINTED):
            checkpointing = {"activation_checkpointing": every > 0, "checkpoint_every": max(every, 1)}
            model = replace(config.model, compile=compiled, **checkpointing)
            for stage in stages:
                zero = replace(config.zero, stage=stage, init=config.zero.init and stage == 3)
                yield replace(config, batch=batch, model=model, zero=zero)


def _checkpointed(every: int) -> str:
    return {0: "none", 1: "full"}.get(every, f"1 of {every}")


def _fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    if not candidates:
        return None
    least = min(each.seconds for each in candidates)
    equal = [each for each in candidates if each.seconds <= (1 + EQUAL) * least]
    return min(equal, key=lambda each: each.memory.total)
