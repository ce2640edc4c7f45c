"""Block 8: each technique off in turn, all others on: how many times as long the same work takes then.

The models have the 1.4B's width and fewer layers: whole optimizer steps by the real trainer, and steps of the
real decoder with random weights.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.engine.decoder import StepDecoder, TorchDecoder
from serving.engine.gpu.decoder import GpuDecoder
from serving.engine.scheduler import BLOCK_TOKENS
from tests.gpu.block import Run
from tests.gpu.profiles import decoding_step
from tests.gpu.train_step import corpus_and_ranks, trainer_of
from training.model.llama import Llama, initialize
from training.run import engine as trained_engine

LAYERS = {"cuda": {"training": 4, "decoding": 8}, "cpu": {"training": 1, "decoding": 1}}
STEPS = {"cuda": {"training": 6, "decoding": 20}, "cpu": {"training": 2, "decoding": 2}}  # timed
WARM_UP = 2
BATCHES = {"cuda": ((1, 512), (32, 2000)), "cpu": ((1, 24), (2, 40))}  # requests, tokens of each prompt


@dataclass(frozen=True)
class Technique:
    """A technique, and what takes its place where it is off.

    Attributes:
        keys: of the configuration that trains, or of the decoder.
        instead: of names in modules.
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    instead: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @contextmanager
    def off(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, other in self.instead.items():
                stack.enter_context(patch(name, other))
            yield


def measure(run: Run) -> None:
    run.attempt(training, decoding)


def compare(
    run: Run,
    what: str,
    techniques: tuple[Technique, ...],
    seconds: Callable[[Technique], Mapping[str, float]],
) -> None:
    """A row for everything on, and one for each technique off.

    seconds: of each kind of work, by its name.
    """
    everything: Mapping[str, float] = {}
    for technique in (Technique("nothing"), *techniques):
        found = seconds(technique)
        everything = everything or found
        for work, taken in found.items():
            run.row(
                f"{what}{work}, without {technique.name}", ms=1e3 * taken,
                times_as_long=taken / everything[work],
            )  # fmt: skip


def timed(run: Run, step: Callable[[], Any], *, steps: int) -> float:
    """Median seconds of a step, each waited for."""
    taken = []
    for number in range(WARM_UP + steps):
        started = time.perf_counter()
        step()
        if run.gpu:
            torch.cuda.synchronize(run.device)
        if number >= WARM_UP:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


# --- training -----------------------------------------------------------------------------------------------


def deepspeed_accumulation(*arguments: Any, **keys: Any) -> dict[str, Any]:
    """`deepspeed_config` with what DeepSpeed does by default: all gradients are kept, then cast and added."""
    config = DEEPSPEED_CONFIG(*arguments, **keys)
    config["bf16"]["immediate_grad_update"] = False
    return config


DEEPSPEED_CONFIG = trained_engine.deepspeed_config
TRAINING = (
    Technique("compiled layers and loss", {"model.compile": False}),
    Technique("chunks of the loss", {"model.loss_tokens": 0}),
    Technique(
        "gradients added straight into fp32",
        instead={
            "training.run.engine.deepspeed_config": deepspeed_accumulation,
            "training.run.engine.accumulate_in_fp32": lambda *given, **keys: None,
        },
    ),
    Technique(
        "the optimizer's kernels", instead={"optim.kernels.gpu.unsupported": lambda *given: "it is off"}
    ),
)


def training(run: Run) -> None:
    kind = run.device.type
    with corpus_and_ranks(run) as (folder, context):

        def seconds(technique: Technique) -> dict[str, float]:
            run.reset_peak_memory()
            keys = {"model.num_layers": LAYERS[kind]["training"], **technique.keys}
            with technique.off(), trainer_of(run, keys, folder, context) as trainer:
                return {"": timed(run, trainer.take_step, steps=STEPS[kind]["training"])}

        compare(run, "training", TRAINING, seconds)


# --- decoding -----------------------------------------------------------------------------------------------


def gathered_attention(
    q: Tensor, cache: Tensor, blocks: Tensor, lengths: Tensor, out: Tensor, **_: Any
) -> None:
    """`serving.engine.gpu.attention.decode_attention` by torch: it gathers the pages first."""
    keys, values = (part[blocks.long()].transpose(1, 2).flatten(2, 3) for part in cache)
    visible = torch.arange(keys.shape[2], device=q.device) < lengths[:, None]
    mixed = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=visible[:, None, None], enable_gqa=q.shape[1] != keys.shape[1]
    )
    out.copy_(mixed[:, :, 0])


TORCH = "all kernels of ours"
DECODING = (
    Technique("CUDA graphs", {"graphs": False}),
    Technique("products with norm, RoPE, SiLU and residual inside", {"project": False}),
    Technique(
        "attention over pages", instead={"serving.engine.gpu.attention.decode_attention": gathered_attention}
    ),
    Technique(TORCH),
)


def decoding(run: Run) -> None:
    kind = run.device.type
    with run.device:
        model = Llama(replace(run.shape, num_layers=LAYERS[kind]["decoding"]))
    initialize(model, seed=0)
    if run.gpu:
        model.bfloat16()
    slots, longest = max(batch for batch, _ in BATCHES[kind]), max(prompt for _, prompt in BATCHES[kind])
    context = longest + 2 * BLOCK_TOKENS
    size = {"num_blocks": slots * (context // BLOCK_TOKENS + 1), "slots": slots, "context_tokens": context}

    def seconds(technique: Technique) -> dict[str, float]:
        ours = run.gpu and technique.name != TORCH  # a rehearsal of our kernels takes minutes
        with technique.off():
            if ours:
                decoder: StepDecoder = GpuDecoder(model, **size, **technique.keys)
            else:
                decoder = TorchDecoder(model, graphs=run.gpu, **size)
            place = {name: size[name] for name in ("slots", "num_blocks")}
            found = {}
            for batch, prompt in BATCHES[kind]:
                step = decoding_step(decoder, model.shape, batch=batch, prompt=prompt, **place)
                found[f" {batch} x {prompt}"] = timed(run, step, steps=STEPS[kind]["decoding"])
            return found

    compare(run, "decoding", DECODING, seconds)
