"""Block 3: training steps of the 1.4B model by the real trainer, under ZeRO-1, and their memory."""

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster import files
from cluster.session import ROOT, free_ports
from tests.gpu.block import OUT_OF_MEMORY, TINY, Run
from training import config as training_config
from training.baseline import steps
from training.config import TrainConfig
from training.data.prepare import prepare
from training.plan import make_plan
from training.run.context import torch_context
from training.run.loop import Trainer
from training.run.start import Start

WARM_UP, TIMED = 2, 4  # optimizer steps of `training.baseline.steps.measure`
STEPS = 1 + WARM_UP + TIMED + steps.NUM_PHASED  # and one before, for its loss
KEYS = {
    "data.tokenizer": "train",
    "data.vocab_size": 320,
    "data.validation_fraction": 0.2,
    "launcher": "torch",
    "workers.count": 1,
    "record.wandb": "disabled",
    "zero.stage": 1,
    "optim.inspect_every_steps": STEPS + 1,  # the one after them, which takes more time and memory
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


def measure(run: Run) -> None:
    """As torchrun would start it: a store over TCP, and NCCL on a GPU."""
    (port,) = free_ports(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    run.reset_peak_memory()
    started = time.perf_counter()
    try:
        with trainer_of(run) as trainer:
            run.row("start", seconds_to_build=time.perf_counter() - started)
            train(run, trainer)
    except torch.OutOfMemoryError as error:
        message = f"{OUT_OF_MEMORY}: {str(error).splitlines()[0]}"
        run.row("the step", problem=message, peak_allocated_gb=run.peak_memory_gb())


@contextmanager
def trainer_of(run: Run) -> Iterator[Trainer]:
    """The trainer of a small corpus, in a run directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        files.write_text(corpus, _documents(num_tokens=400_000 if run.gpu else 40_000))
        config = config_of(run, Path(folder), corpus)
        data = prepare(config.data, report=print)
        with torch_context(gpu=run.gpu) as context:
            yield Trainer(Start.of(config, make_plan(config), data), context)


def config_of(run: Run, folder: Path, corpus: Path) -> TrainConfig:
    keys = KEYS | (ON_GPU if run.gpu else ON_CPU)
    keys |= {"run.directory": folder, "data.directory": folder / "data", "data.source": corpus}
    keys |= {"schedule.tokens": 2 * STEPS * int(keys["batch.tokens"])}
    dotlist = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in keys.items()
    ]
    file = ROOT / "training/configs/a40_1b4.yaml" if run.gpu else None
    return training_config.load(file=file, dotlist=dotlist)


def _documents(*, num_tokens: int) -> str:
    """Lines of JSON with random words, that a vocabulary of 320 cuts into about `num_tokens`."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(2, 9))) for _ in range(300)]
    lines = (f'{{"text": "{" ".join(draw.choices(words, k=200))}"}}' for _ in range(num_tokens // 600))
    return "\n".join(lines) + "\n"


def train(run: Run, trainer: Trainer) -> None:
    """One step for its loss, then `training.baseline.steps.measure`, then one that measures its updates."""
    plan = trainer.plan
    first = trainer.take_step().item()
    found = steps.measure(trainer, num_steps=TIMED, num_warm_up=WARM_UP)
    _memory(run, trainer)
    run.row("the optimizer by part", **_milliseconds(trainer.optimizer_health()))
    last = trainer.take_step().item()
    health = trainer.optimizer_health()

    seconds = sorted(found["step_seconds"])[TIMED // 2]
    tflops = plan.tokens_per_step * plan.flops_per_token / seconds / 1e12
    skipped = trainer.step - trainer.optimizer.applied_steps
    norm = trainer.optimizer.gradient_norm
    wrong = [f"{skipped} steps skipped"] * (skipped > 0) + ["the loss did not fall"] * (not last < first)
    sequences, length = trainer.config.batch.micro_sequences, trainer.config.batch.sequence_length
    run.row(
        f"the step, micro-batches of {sequences} x {length}, accumulated over {plan.accumulation}",
        problem="; ".join(wrong) or None, first_loss_nats=first, last_loss_nats=last, gradient_norm=norm,
        ms=1e3 * seconds, tokens_per_second=plan.tokens_per_step / seconds, tflops=tflops,
        **run.of_products(tflops),
    )  # fmt: skip
    run.row(
        "parts of the step, each waited for",
        **{f"{part}_ms": 1e3 * found[part] for part in steps.PARTS},
        joules_per_step=found["joules"] and found["joules"] / TIMED,
    )
    run.row(
        "the updates",
        **{f"relative_{name}": health[f"optimizer_{name}"] for name in ("orthogonality_error", "update_rms")},
    )


def _milliseconds(health: dict[str, float | None]) -> dict[str, float | None]:
    """Its phases, in milliseconds: "optimizer_start_seconds" becomes "start_ms"."""
    return {
        name.removeprefix("optimizer_").replace("_seconds", "_ms"): value and 1e3 * value
        for name, value in health.items()
        if name.endswith("_seconds")
    }


def _memory(run: Run, trainer: Trainer) -> None:
    """The plan's parts, and the peak that torch allocated. The plan's reserve lies outside of that."""
    planned = {part: size / 1e9 for part, size in trainer.plan.memory_bytes.items()}
    whole = sum(planned.values())
    for part, size in {**planned, "in all": whole}.items():
        run.row(f"planned: {part}", gb=size)
    peak = run.peak_memory_gb()
    if peak is not None:
        over = f"above the plan's {whole:.1f} GB" if peak > whole else None
        run.row("peak that torch allocated", problem=over, gb=peak)
        run.row("peak that torch reserved", gb=torch.cuda.max_memory_reserved(run.device) / 1e9)
