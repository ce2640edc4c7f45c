"""Seconds of one optimizer step of one worker, by part: work over the rates of its device. No torch.

    matrix products   6 N T FLOPs (8 N T where layers are recomputed), N without the embedding
    attention         6 L d s T: the causal half of 12 L d s T (`LlamaShape.flops_per_token`)
    elementwise       bytes that norms, RoPE, SwiGLU and residuals move, eager or compiled
    loss              bytes of softmax and cross-entropy
    launches          what starting kernels takes beyond running them, in small micro-batches
    accumulation      the model's gradients added to fp32 sums, once for each micro-batch
    attention logits  with `optim.qk_clip`: one more product of queries and keys, in full
    optimizer         orthogonalisation and passes over memory (`training.projection.step_model`)
    exchange          what the worker sends, over PCIe; nothing is taken to be hidden

Ceilings are those that tests/gpu measured for this device, else the datasheet's times what the H200 reached
of its own. The shares of them are fitted to its rows of 1.4B (tests/training/planner/test_seconds.py). The
network between nodes is left to `make projection`.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from cluster import files
from cluster.measure.hardware import Device
from cluster.session import ROOT
from training.config import TrainConfig
from training.model.shapes import LlamaShape
from training.planner.memory import Form, form_of
from training.projection import step_model, traffic
from training.projection.config import LinkConfig

PRODUCT_SHARE = 0.88  # of the product ceiling, in a model's own products: those run hotter and longer
ATTENTION_SHARE = 0.46  # of the same ceiling
PASS_SHARE = 0.73  # of the copy ceiling, in torch's own elementwise kernels
COMPILED_SHARE = 0.50  # of the same, in compiled ones: norms with their reductions, heads in strides
STEP_SHARE = 0.70  # of the product ceiling, in the orthogonalisation of 168 matrices
# Of the datasheet: 785 of 989 TFLOP/s, 4260 of 4800 GB/s (nvidia-h200_gpu.json as of commit 27a28c0).
SHEET_PRODUCTS, SHEET_COPIES = 0.79, 0.89
LAUNCH_SECONDS = 24e-6  # of one kernel, by torch from Python: 74 ms for micro-batches of one sequence
EAGER_LAUNCHES, COMPILED_LAUNCHES = 126, 45  # of a layer, forward and backward
ACCUMULATED_BYTES, FIRST_BYTES = 10, 6  # of a parameter: bf16 read, fp32 sum read and written
FORWARD_ATTENTION = 0.25  # of an attention's time, forward and backward: 0.145 of 0.585 ms


@dataclass(frozen=True)
class Rates:
    """Ceilings of one device, and where they come from."""

    source: str
    product_flops: float
    bytes_per_s: float


def rates_of(device: Device, *, folder: Path = ROOT / "tests" / "baselines") -> Rates:
    """As measured by `python -m tests.gpu`, if its file for this device is in the folder; else estimated."""
    file = folder / f"{files.slug(device.name)}_gpu.json"
    sheet = Rates(
        f"{SHEET_PRODUCTS:.0%} and {SHEET_COPIES:.0%} of the datasheet, as an H200 reached: not measured",
        SHEET_PRODUCTS * device.bf16_tflops * 1e12,
        SHEET_COPIES * device.memory_gb_per_s * 1e9,
    )
    if not file.is_file():
        return sheet
    rows = json.loads(file.read_text())["blocks"].get("1", {}).get("rows", [])
    # The largest that any of block 1's products reached: one that follows others finds a GPU that is hot.
    products = [row["best_tflops"] for row in rows if row.get("multiplied_in") == "bfloat16"]
    products += [row["product_tflops"] for row in rows if "product_tflops" in row]
    copies = [row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row]
    if not products or not copies:
        return sheet
    return Rates(f"measured: {file.name}", max(products) * 1e12, max(copies) * 1e9)


def step_seconds(
    config: TrainConfig, shape: LlamaShape, rates: Rates, *, num_workers: int
) -> dict[str, float]:
    """Part -> seconds of one optimizer step."""
    tokens, length = config.batch.micro_sequences * config.batch.sequence_length, config.batch.sequence_length
    accumulation = config.batch.tokens // (tokens * num_workers)
    micro = micro_batch_seconds(shape, tokens, length, form_of(config), rates)
    found = {part: accumulation * seconds for part, seconds in micro.items()}
    moved = FIRST_BYTES + ACCUMULATED_BYTES * (accumulation - 1)
    found["accumulation"] = moved * shape.num_parameters / _passes(rates)
    if config.optim.qk_clip:
        found["attention logits"] = accumulation * _logit_seconds(
            shape, tokens, length, form_of(config), rates
        )
    job = traffic.job_of(config, shape, num_ranks=num_workers, accumulation=accumulation)
    if job is None or job.norms:  # stage 0, or Scion: not counted
        return found
    flops, num_bytes, matrices = _step_work(replace(job, accumulation=1))
    found["optimizer"] = flops / (STEP_SHARE * rates.product_flops) + num_bytes / _passes(rates)
    sent = matrices + sum(each.sent_bytes(num_workers) for each in traffic.collectives(job))
    found["exchange"] = sent / (LinkConfig().pcie_gb_per_s * 1e9) if num_workers > 1 else 0.0
    return found


@lru_cache(maxsize=16)  # owners of matrices take 0.05 s to plan, and a proposal asks for many micro-batches
def _step_work(job: traffic.Job) -> tuple[float, float, float]:
    """(FLOPs, bytes of memory, bytes of matrices sent) of the optimizer step on the most loaded worker."""
    plans = traffic.ownership(job)
    flops, num_bytes = step_model.optimizer_work(job, plans)
    travels = traffic.exchange(job, plans, ranks_per_node=job.num_ranks)
    return flops, num_bytes, max(travels.sent_bytes)


def micro_batch_seconds(
    shape: LlamaShape, tokens: int, sequence_length: int, form: Form, rates: Rates
) -> dict[str, float]:
    """Part -> seconds of one forward and backward pass."""
    head = shape.vocab_size * shape.hidden_size
    hidden = shape.num_matmul_parameters - head
    recomputed = form.recomputed(shape.num_layers) / shape.num_layers
    again = 2 * hidden * recomputed
    products = tokens * (6 * shape.num_matmul_parameters + again) / (PRODUCT_SHARE * rates.product_flops)
    flops = 6 * shape.num_layers * shape.num_heads * shape.head_dim * sequence_length * tokens
    attention = flops / (ATTENTION_SHARE * rates.product_flops)
    attention *= 1 + FORWARD_ATTENTION * recomputed
    forward, backward = _elementwise_bytes(shape, form)
    elementwise = forward * (1 + recomputed) + backward
    share = COMPILED_SHARE if form.compiled else PASS_SHARE
    found = {
        "matrix products": products,
        "attention": attention,
        "elementwise": tokens * shape.num_layers * elementwise / (share * rates.bytes_per_s),
        "loss": tokens * _loss_bytes(shape, form) / _passes(rates),
    }
    launches = (COMPILED_LAUNCHES if form.compiled else EAGER_LAUNCHES) * (1 + recomputed / 3)
    started = shape.num_layers * launches * LAUNCH_SECONDS
    return found | {"launches": max(0.0, started - sum(found.values()))}


def _logit_seconds(shape: LlamaShape, tokens: int, sequence_length: int, form: Form, rates: Rates) -> float:
    """Of `training.model.attention.largest_logits` in the forward passes of a micro-batch.

    The product of all queries and keys of a sequence, also of later keys, which is written, masked and read.
    """
    layers = shape.num_layers + form.recomputed(shape.num_layers)
    logits = layers * shape.num_heads * sequence_length * tokens
    product = 2 * shape.head_dim * logits / (PRODUCT_SHARE * rates.product_flops)
    return product + (4 * form.width + 1) * logits / _passes(rates)


def _passes(rates: Rates) -> float:
    return PASS_SHARE * rates.bytes_per_s


def _elementwise_bytes(shape: LlamaShape, form: Form) -> tuple[float, float]:
    """Bytes that one layer's elementwise kernels read and write for each token, forward and backward.

    Eager: each operation of norms (fp32), RoPE (fp32), SwiGLU and residuals reads its inputs and writes its
    outputs. Compiled: one kernel each for norm with residual, RoPE and SwiGLU. In bf16; twice that in fp32.
    A norm of queries and keys moves what another norm does of as many elements; compiled, it is part of RoPE
    and reads them once more, and its backward pass reads them too.
    """
    hidden, rotated = shape.hidden_size, (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    ffn, wide, normed = shape.ffn_size, form.width / 2, rotated * shape.qk_norm
    if form.compiled:
        forward = 16 * hidden + 4 * rotated + 6 * ffn + 2 * normed
        return wide * forward, wide * (22 * hidden + 4 * rotated + 10 * ffn + 4 * normed)
    forward = 84 * hidden + 52 * rotated + 10 * ffn + 36 * normed
    return wide * forward, wide * (198 * hidden + 60 * rotated + 18 * ffn + 93 * normed)


def _loss_bytes(shape: LlamaShape, form: Form) -> float:
    """Of one token: logits, softmax and its gradient, in fp32 tensors or in one kernel for a chunk.

    In chunks also the head's gradient, read and written in fp32 once for each chunk.
    """
    wide = form.width / 2
    if form.chunk_tokens is None:
        return shape.vocab_size * 36 * wide
    summed = 8 * shape.vocab_size * shape.hidden_size / form.chunk_tokens
    return shape.vocab_size * 10 * wide + summed
