"""Block 3: training steps of the 1.4B model by the real trainer, under ZeRO-1, against their plan."""

import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cluster import files
from cluster.measure import hardware
from cluster.session import ROOT, free_ports
from tests.gpu.block import OUT_OF_MEMORY, TINY, Run
from tests.gpu.profiles import host_waits, top
from training import config as training_config
from training.baseline import steps
from training.config import TrainConfig
from training.data.prepare import prepare
from training.plan import make_plan
from training.planner.memory import CONTEXT_BYTES
from training.planner.proposal import propose
from training.run.context import Context, torch_context
from training.run.loop import Trainer
from training.run.start import Start

Keys = Mapping[str, Any]

CORPUS = "corpus.jsonl"
CAP_GB = 48.0  # of an A40
MOST_STEPS = 16  # that a trainer takes here, for the length of its corpus
KEYS = {
    "data.tokenizer": "train",
    "data.vocab_size": 320,
    "data.validation_fraction": 0.2,
    "launcher": "torch",
    "workers.count": 1,
    "record.wandb": "disabled",
    "zero.stage": 1,
}
ON_GPU = {  # beside training/configs/a40_1b4.yaml
    "workers.gpu": True,
    "workers.accelerator": "null",  # so that the plan does not refuse what is to be measured
    "workers.min_count": "null",
    "session.address": "local",
    "batch.tokens": 4 * 2048 * 2,  # micro-batches of 4 x 2048, accumulated over 2
}
ON_CPU = {
    "workers.gpu": False,
    **{
        f"model.{name}": getattr(TINY, name)
        for name in ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "vocab_size")
    },
    "batch.sequence_length": 32,
    "batch.micro_sequences": 4,
    "batch.tokens": 4 * 32 * 2,
}
LARGE = {"cuda": 65_536, "cpu": 4 * 32 * 4}  # tokens of a step in which the optimizer's share is small
APART = 10.0  # percent, most, between planned and measured peak


@dataclass(frozen=True)
class Setting:
    """One trainer to measure.

    Attributes:
        keys: beside KEYS and ON_GPU or ON_CPU.
        steps: of `training.baseline.steps.measure`, (warm-up, timed).
        cap_gb: most memory that the process may take.
    """

    name: str
    keys: Keys = field(default_factory=dict)
    steps: tuple[int, int] = (1, 2)
    cap_gb: float | None = None
    profiled: bool = False

    @property
    def num_steps(self) -> int:
        """Of `train`. The last one measures its updates, which takes more time and memory."""
        return 1 + sum(self.steps) + steps.NUM_PHASED + 1


def settings(run: Run) -> list[Setting]:
    """The small step; a large one; and a large one as proposed for CAP_GB, held to that."""
    tokens = LARGE[run.device.type]
    large = {"batch.tokens": tokens, "batch.micro_sequences": 8 if run.gpu else 4}
    return [
        Setting("small step", steps=(2, 4), profiled=True),
        Setting("large step", large),
        Setting("large step in 48 GB", proposed(run, {"batch.tokens": tokens}), cap_gb=CAP_GB),
    ]


def proposed(run: Run, keys: Keys) -> dict[str, Any]:
    """These keys, and those that the planner proposes for CAP_GB, under ZeRO-1."""
    sheet = run.sheet or hardware.lookup("A40")
    assert sheet is not None
    config = load(run, {**keys, "run.directory": "unused"})
    found = propose(config, run.shape, replace(sheet, memory_gb=CAP_GB), num_workers=1, stages=(1,)).best
    assert found is not None, "nothing fits"
    model = found.config.model
    return {
        **keys,
        "batch.micro_sequences": found.config.batch.micro_sequences,
        "model.activation_checkpointing": model.activation_checkpointing,
        "model.checkpoint_every": model.checkpoint_every,
    }


def measure(run: Run) -> None:
    with corpus_and_ranks(run) as (folder, context):
        for setting in settings(run):
            try:
                with held_to(run, setting.cap_gb):
                    measure_one(run, setting, folder, context)
            except torch.OutOfMemoryError as error:
                message = f"{OUT_OF_MEMORY}: {str(error).splitlines()[0]}"
                run.row(setting.name, problem=message, peak_allocated_gb=run.peak_memory_gb())


def measure_one(run: Run, setting: Setting, folder: Path, context: Context) -> None:
    run.reset_peak_memory()
    started = time.perf_counter()
    inspected = {"optim.inspect_every_steps": setting.num_steps}
    left = torch.cuda.memory_allocated(run.device) / 1e9 if run.gpu else None  # of the trainer before
    with trainer_of(run, {**setting.keys, **inspected}, folder, context) as trainer:
        run.row(f"{setting.name}: start", seconds_to_build=time.perf_counter() - started, left_over_gb=left)
        train(run, trainer, setting)
        if setting.profiled:
            top(run, "training", trainer.take_step)
            host_waits(run, "training", trainer.take_step)


@contextmanager
def held_to(run: Run, cap_gb: float | None) -> Iterator[None]:
    """A block in which torch may take so much memory, less what CUDA's context takes beside it."""
    if cap_gb is None or not run.gpu:
        yield
        return
    whole = torch.cuda.get_device_properties(run.device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((cap_gb * 1e9 - CONTEXT_BYTES) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def corpus_and_ranks(run: Run) -> Iterator[tuple[Path, Context]]:
    """A folder with a small corpus, gone afterwards, and one rank as torchrun would start it.

    That is a store over TCP, and NCCL on a GPU.
    """
    (port,) = free_ports(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as folder, torch_context(gpu=run.gpu) as context:
        files.write_text(Path(folder) / CORPUS, _documents(num_tokens=400_000 if run.gpu else 40_000))
        yield Path(folder), context


@contextmanager
def trainer_of(run: Run, keys: Keys, folder: Path, context: Context) -> Iterator[Trainer]:
    """A trainer of the folder's corpus, which is prepared by the first one."""
    paths = {"run.directory": folder, "data.directory": folder / "data", "data.source": folder / CORPUS}
    config = load(run, {**keys, **paths})
    data = prepare(config.data, report=print)
    trainer = Trainer(Start.of(config, make_plan(config), data), context)
    try:
        yield trainer
    finally:
        trainer.engine.destroy()
        for parameter in trainer.engine.module.parameters():  # which DeepSpeed's hooks keep alive
            parameter.grad, parameter.data = None, parameter.data.new_empty(0)


def load(run: Run, more: Keys) -> TrainConfig:
    """The configuration of a trainer."""
    keys = {**KEYS, **(ON_GPU if run.gpu else ON_CPU), **more}
    keys.setdefault("schedule.tokens", 2 * MOST_STEPS * int(keys["batch.tokens"]))
    file = ROOT / "training/configs/a40_1b4.yaml" if run.gpu else None
    return training_config.load(file=file, dotlist=[f"{name}={text(value)}" for name, value in keys.items()])


def text(value: Any) -> str:
    """A value as on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _documents(*, num_tokens: int) -> str:
    """Lines of JSON with random words, that a vocabulary of 320 cuts into about `num_tokens`."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(2, 9))) for _ in range(300)]
    lines = (f'{{"text": "{" ".join(draw.choices(words, k=200))}"}}' for _ in range(num_tokens // 600))
    return "\n".join(lines) + "\n"


def train(run: Run, trainer: Trainer, setting: Setting) -> None:
    """One step for its loss, then `training.baseline.steps.measure`, then one that measures its updates."""
    plan, (warm_up, timed) = trainer.plan, setting.steps
    first = trainer.take_step().item()
    found = steps.measure(trainer, num_steps=timed, num_warm_up=warm_up)
    asked = " ".join(f"{name}={text(value)}" for name, value in setting.keys.items())
    _memory(run, trainer, setting, asked)
    run.row(f"{setting.name}: the optimizer by part", **_milliseconds(trainer.optimizer_health()))
    last = trainer.take_step().item()

    seconds = sorted(found["step_seconds"])[timed // 2]
    tflops = plan.tokens_per_step * plan.flops_per_token / seconds / 1e12
    skipped = trainer.step - trainer.optimizer.applied_steps
    norm = trainer.optimizer.gradient_norm
    wrong = [f"{skipped} steps skipped"] * (skipped > 0) + ["the loss did not fall"] * (not last < first)
    sequences, length = trainer.config.batch.micro_sequences, trainer.config.batch.sequence_length
    run.row(
        f"{setting.name}: {sequences} x {length}, accumulated over {plan.accumulation}", keys=asked,
        problem="; ".join(wrong) or None, first_loss_nats=first, last_loss_nats=last, gradient_norm=norm,
        ms=1e3 * seconds, **_planned_seconds(run, trainer, seconds),
        tokens_per_second=plan.tokens_per_step / seconds, tflops=tflops, **run.of_products(tflops),
    )  # fmt: skip
    run.row(
        f"{setting.name}: its parts, each waited for",
        **{f"{part}_ms": 1e3 * found[part] for part in steps.PARTS},
        joules_per_step=found["joules"] and found["joules"] / timed,
    )
    health = trainer.optimizer_health()
    run.row(
        f"{setting.name}: its updates",
        **{f"relative_{name}": health[f"optimizer_{name}"] for name in ("orthogonality_error", "update_rms")},
    )


def _milliseconds(health: dict[str, float | None]) -> dict[str, float | None]:
    """Its phases, in milliseconds: "optimizer_start_seconds" becomes "start_ms"."""
    return {
        name.removeprefix("optimizer_").replace("_seconds", "_ms"): value and 1e3 * value
        for name, value in health.items()
        if name.endswith("_seconds")
    }


def _planned_seconds(run: Run, trainer: Trainer, seconds: float) -> dict[str, float]:
    """What the plan says of this card, and by how much that is apart from `seconds`."""
    if (sheet := run.sheet) is None:
        return {}
    planned = sum(replace(trainer.plan, device=sheet).seconds.values())
    return {"planned_ms": 1e3 * planned, "percent_apart": 100 * (planned / seconds - 1)}


def _memory(run: Run, trainer: Trainer, setting: Setting, asked: str) -> None:
    """The plan by point and by part, and the peak that torch allocated and reserved."""
    memory = trainer.plan.memory
    points = {name: sum(parts.values()) / 1e9 for name, parts in memory.points.items()}
    parts = {name: size / 1e9 for name, size in memory.parts.items()}
    for name, size in {**points, **parts}.items():
        run.row(f"{setting.name}: planned: {name}", gb=size)
    peak, planned = run.peak_memory_gb(), memory.allocated / 1e9
    run.row(f"{setting.name}: planned in all", gb=memory.total / 1e9)
    if peak is not None:
        apart = 100 * (planned / peak - 1)
        run.row(
            f"{setting.name}: peak that torch allocated", gb=peak, planned_gb=planned, percent_apart=apart,
            keys=asked, problem=None if abs(apart) <= APART else f"{apart:+.0f}% apart from the plan",
        )  # fmt: skip
        reserved = torch.cuda.max_memory_reserved(run.device) / 1e9
        run.row(f"{setting.name}: peak that torch reserved", gb=reserved)
