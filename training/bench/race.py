"""Whole training steps against LitGPT and transformers with DeepSpeed: the same batch, rule and threads.

    python -m training.bench --peers --litgpt PYTHON [--transformers PYTHON] [--rounds N] [--only CASE ...]

Each contender is a process of its own (`training.bench.contenders`), in its own environment. They take turns;
during one's turn the others are stopped. A peer trains in the precision that is fastest on this CPU: it tries
all that it has, which takes longest the first time, while torch.compile's cache is empty. `--only` takes some
of the cases; `model.compile=true` compiles our layers too.
"""

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.cli import RunError, UserError, sigterm_as_interrupt
from cluster.machine.host import describe_host
from cluster.measure import benchmark, contender, probe
from cluster.measure.contender import Contender
from cluster.measure.turns import DISTURBING_CORES, Bystanders, quietest, turns
from cluster.progress import Progress
from training import config as training_config
from training.data.dataset import Manifest
from training.data.prepare import prepare
from training.model.shapes import to_hf_config
from training.plan import Plan, make_plan

WHAT = "train_peers"  # in the baseline's name
SCRIPT = Path(__file__).with_name("contenders.py")
SHAPES = {
    "10m": ("model.shape=llama-5m", "model.num_layers=10", "model.num_kv_heads=4"),
    "60m": ("model.shape=llama-60m",),
}
BATCH, LARGE_BATCH = 4096, 32_768  # tokens per step
DEFAULTS = ("batch.micro_sequences=8", "optim.vector.lr=0.001", "record.wandb=disabled")
OWN_KEYS = ("launcher", "workers.count", "workers.cpus", "run.directory", "optim.matrix.rule", "batch.tokens")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # of every contender
LOAD_SECONDS, RUN_SECONDS = 1200.0, 600.0  # torch.compile takes minutes, three times
TURN_SECONDS = 3.0  # at least, and at least one step
LOSS_TOLERANCE = 0.5  # nats between first losses; untrained models begin near log(vocabulary)


@dataclass(frozen=True)
class Entrant:
    """Who takes part in a case: a class of `training.bench.contenders`, and the rule of its matrices."""

    kind: str
    rule: str


@dataclass(frozen=True)
class TrainingCase:
    """One race: entrants by name, of whom `ours` is compared with each of the others."""

    shape: str
    tokens: int
    entrants: Mapping[str, Entrant]
    ours: str = "ours"


def _cases() -> dict[str, TrainingCase]:
    found = {}
    for shape in SHAPES:
        for rule in ("adamw", "muon"):
            # DeepSpeed's own Muon is raced in optim.bench: here it would have to be compiled first
            kinds = ("ours", "litgpt", "litgpt_compiled", *(["transformers"] if rule == "adamw" else []))
            entrants = {kind: Entrant(kind, rule) for kind in kinds}
            found[f"{shape}_{rule}"] = TrainingCase(shape, BATCH, entrants)
        both = {rule: Entrant("ours", rule) for rule in ("adamw", "muon")}
        found[f"{shape}_32k"] = TrainingCase(shape, LARGE_BATCH, both, ours="muon")
    return found


CASES = _cases()


@dataclass(frozen=True)
class TrainingTurn:
    """What an entrant answered.

    Attributes:
        step_seconds: of its median step.
        optimizer_share: of its steps; None where it is not measured.
        others_cores: cores that all other processes kept busy meanwhile, on average.
    """

    step_seconds: float
    optimizer_share: float | None
    loss: float
    others_cores: float


@dataclass
class Measured:
    """What a case gave.

    Attributes:
        turns: entrant -> its turns, one a round.
        about: entrant -> what it is, and how it is set up.
        product_tflops: dtype -> the ceiling of this model's products.
        plan: of ours.
    """

    plan: Plan
    product_tflops: dict[str, float]
    turns: dict[str, list[TrainingTurn]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)


def run(
    pythons: Mapping[str, str], given: Sequence[str], *, num_rounds: int, only: Sequence[str],
    report: Callable[[str], None],
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Race the cases named in `only`, or all. Returns the result, and the fingerprint of the data.

    Args:
        pythons: "litgpt" and "transformers" -> the interpreter that has it.
        given: key=value of training.config, for ours; those of batch and model are everyone's.
        report: called with one line at a time.

    Raises:
        UserError: an unknown case, a key that the race sets, or an interpreter that does not exist.
        RunError: an entrant failed or does other work.
    """
    require(pythons, given, only)
    cases = {name: CASES[name] for name in only or CASES}
    host = describe_host()
    threads = host["cpu_cores"]
    result: dict[str, Any] = {
        "bench": WHAT, "arguments": list(given), "rounds": num_rounds, "threads": threads,
        "cpu": host["cpu"], "cpu_held_to": host["cpu_held_to"],
        "load_average_before": benchmark.load_average(), "contenders": {},
    }  # fmt: skip
    precisions: dict[tuple[str, str], str] = {}  # (kind, shape) -> the fastest
    data = prepare(_config(next(iter(cases.values())), given, threads).data, report=report)
    with sigterm_as_interrupt(), tempfile.TemporaryDirectory(prefix="race-") as folder:
        for name, case in cases.items():
            measured = race(
                case, pythons, given, precisions,
                data=data, name=name, folder=Path(folder), num_rounds=num_rounds, threads=threads,
                report=report,
            )  # fmt: skip
            result |= case_result(name, case, measured)
            result["contenders"][name] = measured.about
    return result, Manifest.read(data).fingerprint


def require(pythons: Mapping[str, str], given: Sequence[str], only: Sequence[str]) -> None:
    """Raise `UserError` about a case, a key or an interpreter."""
    for name in only:
        if name not in CASES:
            raise UserError(f"--only: {name!r} is not one of {', '.join(CASES)}")
    benchmark.require_free(given, OWN_KEYS)
    for name in {
        _family(entrant.kind) for case in only or CASES for entrant in CASES[case].entrants.values()
    }:
        if name != "ours" and shutil.which(pythons.get(name, "")) is None:
            raise UserError(
                f"--{name}: {pythons.get(name) or 'missing'}; give the interpreter of an environment "
                f"that has {name} (training/README.md says how to make one)"
            )


def _family(kind: str) -> str:
    return kind.partition("_")[0]


def race(
    case: TrainingCase, pythons: Mapping[str, str], given: Sequence[str],
    precisions: dict[tuple[str, str], str], *, data: Path, name: str, folder: Path, num_rounds: int,
    threads: int, report: Callable[[str], None],
) -> Measured:  # fmt: skip
    """One case: ceilings, entrants, a warm-up, and `num_rounds` rounds. Adds to `precisions`."""
    config = _config(case, given, threads)
    plan = make_plan(config)
    measured = Measured(plan, ceilings(plan, threads=threads, config=config))
    for dtype, tflops in measured.product_tflops.items():
        report(f"ceiling, {name}: {1e3 * tflops:.0f} GFLOP/s in this model's {dtype} products")
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for entrant_name, entrant in case.entrants.items():
            process = contenders[entrant_name] = stack.enter_context(
                _running(entrant.kind, pythons, threads=threads, folder=folder, log=f"{name}_{entrant_name}")
            )
            key = entrant.kind, case.shape
            about = process.ask(
                {
                    "do": "load",
                    "hf_config": to_hf_config(plan.shape, dtype="float32"),
                    "rule": entrant.rule,
                    "precision": precisions.get(key),
                    "tokens": _tokens(data),
                    "micro_sequences": config.batch.micro_sequences,
                    "sequence_length": config.batch.sequence_length,
                    "accumulation": plan.accumulation,
                    "keys": our_keys(case, given, threads=threads, rule=entrant.rule),
                },
                within_seconds=LOAD_SECONDS,
            )
            precisions.setdefault(key, about["precision"])
            measured.about[entrant_name] = about
            report(f"{name}, {entrant_name} is ready in {about['precision']}: {about['about']}")
        _take_turns(measured, contenders, name=name, num_rounds=num_rounds, report=report)
    require_same_work(name, case, measured)
    return measured


def _take_turns(
    measured: Measured, contenders: Mapping[str, Contender], *, name: str, num_rounds: int,
    report: Callable[[str], None],
) -> None:  # fmt: skip
    """Every entrant in turns; those of the warm-up, round -1, are left out."""
    with Progress((1 + num_rounds) * len(contenders), unit="turn") as progress:
        for number in range(-1, num_rounds):
            for entrant in turns(list(contenders), number):
                progress.advance(f"{name}, {entrant}", by=0)
                taken = quietest(partial(take_turn, contenders[entrant])) if number >= 0 else None
                taken = taken or take_turn(contenders[entrant])
                progress.advance()
                which = f"round {number + 1}/{num_rounds}" if number >= 0 else "warming up"
                note = f", while others used {taken.others_cores:.2f} cores"
                report(
                    f"{which}, {name}, {entrant}: {taken.step_seconds:.3f} s a step, loss {taken.loss:.2f}"
                    + (note if taken.others_cores > DISTURBING_CORES else "")
                )
                if number >= 0:
                    measured.turns.setdefault(entrant, []).append(taken)


def take_turn(process: Contender) -> TrainingTurn:
    bystanders = Bystanders()
    answer = process.ask({"do": "run", "seconds": TURN_SECONDS}, within_seconds=RUN_SECONDS)
    seconds, optimizer = answer["step_seconds"], answer["optimizer_seconds"]
    return TrainingTurn(
        statistics.median(seconds),
        sum(optimizer) / sum(seconds) if optimizer else None,
        answer["loss"],
        bystanders.cores(answer["cpu_seconds"]),
    )


def case_result(name: str, case: TrainingCase, measured: Measured) -> dict[str, Any]:
    """Medians with spreads: tokens/s and share of the ceiling of each entrant, each one's time over ours."""
    seconds = {entrant: [each.step_seconds for each in taken] for entrant, taken in measured.turns.items()}
    samples: dict[str, list[float]] = {}
    for entrant, taken in seconds.items():
        rates = [measured.plan.tokens_per_step / each for each in taken]
        dtype = product_dtype_of(measured.about[entrant]["precision"])
        ceiling = measured.product_tflops[dtype] * 1e12
        samples[f"tokens_per_second_{entrant}_{name}"] = rates
        samples[f"share_of_ceiling_{entrant}_{name}"] = [
            rate * measured.plan.flops_per_token / ceiling for rate in rates
        ]
        if entrant != case.ours:
            samples[f"speedup_{entrant}_{name}"] = benchmark.ratios(taken, seconds[case.ours])
        shares = [each.optimizer_share for each in measured.turns[entrant]]
        if None not in shares:
            samples[f"optimizer_share_{entrant}_{name}"] = shares  # type: ignore[assignment]
        samples[f"others_cores_{entrant}_{name}"] = [each.others_cores for each in measured.turns[entrant]]
    return {
        **benchmark.medians(samples),
        f"product_tflops_{name}": measured.product_tflops,
        f"tokens_per_step_{name}": measured.plan.tokens_per_step,
        f"num_parameters_{name}": measured.plan.shape.num_parameters,
    }


def product_dtype_of(precision: str) -> str:
    """The dtype of the products of a contender's precision."""
    return "bfloat16" if precision.startswith("bf16") else "float32"


def ceilings(plan: Plan, *, threads: int, config: training_config.TrainConfig) -> dict[str, float]:
    """dtype -> TFLOP/s of the model's products in one micro-batch, there and back; bf16 where it pays."""
    import torch

    from optim.precision import cpu_has_bf16

    torch.set_num_threads(threads)
    tokens = config.batch.micro_sequences * config.batch.sequence_length
    measure = partial(probe.measure_products, plan.shape.products(), num_rows=tokens, device="cpu")
    found = {"float32": measure(dtype="float32").best}
    # Without bf16 arithmetic a peer that multiplies in bf16 is held against fp32 products, the fastest here.
    return found | {"bfloat16": measure(dtype="bfloat16").best if cpu_has_bf16() else found["float32"]}


def our_keys(case: TrainingCase, given: Sequence[str], *, threads: int, rule: str) -> list[str]:
    """The key=value pairs of ours: one process with all threads."""
    return [
        *SHAPES[case.shape], *DEFAULTS, *given, f"optim.matrix.rule={rule}", f"batch.tokens={case.tokens}",
        f"optim.matrix.lr={0.02 if rule == 'muon' else 0.001}", "launcher=torch", "workers.count=1",
        f"workers.cpus={threads}", f"schedule.tokens={1000 * case.tokens}",
    ]  # fmt: skip


def _config(case: TrainingCase, given: Sequence[str], threads: int) -> training_config.TrainConfig:
    return training_config.load(dotlist=our_keys(case, given, threads=threads, rule="adamw"))


def _tokens(folder: Path) -> dict[str, str]:
    """The largest training shard of prepared data."""
    manifest = Manifest.read(folder)
    shard = max(manifest.train.shards, key=lambda each: each.tokens)
    return {"file": str((folder / shard.file).absolute()), "dtype": manifest.dtype}


def _running(
    kind: str, pythons: Mapping[str, str], *, threads: int, folder: Path, log: str
) -> AbstractContextManager[Contender]:
    python = sys.executable if kind == "ours" else pythons[_family(kind)]
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # DeepSpeed compiles with ninja
    # A build that is killed leaves a lock, at which every later process waits for ever.
    own = {**ENVIRONMENT, "PATH": path, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    environment = contender.environment(own, threads=threads, sees_our_code=kind == "ours")
    hint = f"--{_family(kind)} must be the interpreter of an environment that has it"
    return contender.running(
        kind, [python, "-P", str(SCRIPT), kind], environment=environment, log=folder / log, hint=hint
    )


def require_same_work(name: str, case: TrainingCase, measured: Measured) -> None:
    """Raise `RunError` if an entrant has another number of parameters or first loss, or does not learn."""
    ours = measured.about[case.ours]
    for entrant, about in measured.about.items():
        last = measured.turns[entrant][-1].loss
        same_size = about["num_parameters"] == measured.plan.shape.num_parameters
        if not (
            same_size and abs(about["first_loss"] - ours["first_loss"]) <= LOSS_TOLERANCE
            and last < about["first_loss"]
        ):  # fmt: skip
            raise RunError(
                f"{name}: {entrant} has {about['num_parameters']:,} parameters and went from a loss of "
                f"{about['first_loss']:.2f} to {last:.2f}; {case.ours} has "
                f"{measured.plan.shape.num_parameters:,} and began at {ours['first_loss']:.2f}. They do not "
                "do the same work, so their times say nothing"
            )
