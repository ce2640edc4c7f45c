"""Block 2, third part: each decoder by CUDA graphs, launched step by step, and the model on whole texts."""

import copy
import random

import torch

from serving.engine.decoder import TorchDecoder
from serving.engine.gpu.decoder import GpuDecoder
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, Span
from tests.gpu.block import TINY, Run, error_of, worst_of
from training.model.llama import Llama, initialize
from training.model.shapes import LlamaShape

MEDIUM = LlamaShape(
    vocab_size=4096, hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1376,
    max_positions=1024,
)  # fmt: skip
SLOTS, BLOCKS, STEPS = 6, 120, 60
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.06}  # what whole bf16 sequences differ from fp32 by: 0.03


def measure(run: Run) -> None:
    """The rehearsal leaves the decoder of Triton kernels to its own tests: the interpreter takes minutes."""
    for dtype in (torch.float32, torch.bfloat16) if run.gpu else (torch.float32,):
        for kind in (TorchDecoder, GpuDecoder) if run.gpu else (TorchDecoder,):
            compare(run, dtype, kind)


def compare(run: Run, dtype: torch.dtype, kind: type[TorchDecoder | GpuDecoder]) -> None:
    """Steps of requests that come and go: worst relative errors of logits, per pair of ways to get them."""
    with run.device:
        model = Llama(MEDIUM if run.gpu else TINY)
    initialize(model, seed=1)
    model.to(dtype)
    whole = copy.deepcopy(model).float()
    eager = kind(copy.deepcopy(model), num_blocks=BLOCKS, slots=SLOTS, graphs=False)
    graphs = kind(model, num_blocks=BLOCKS, slots=SLOTS, graphs=run.gpu)
    scheduler = Scheduler(slots=SLOTS, cache_tokens=BLOCKS * BLOCK_TOKENS, step_tokens=100)
    draw = random.Random(0)
    worst = {"graphs_eager": 0.0, "eager_whole": 0.0, "graphs_whole": 0.0}
    replays = 0
    for _ in range(STEPS):
        if draw.random() < 0.2:
            prompt = [
                draw.randrange(model.shape.vocab_size) for _ in range(draw.choice((1, 31, 33, 64, 120)))
            ]
            scheduler.add(ScheduledRequest(prompt, len(prompt) + 40))
        spans = scheduler.next_step()
        if not spans:
            continue
        replays += all(span.samples and span.stop - span.start == 1 for span in spans)
        found = {"graphs": graphs.forward(spans).clone(), "eager": eager.forward(spans)}
        found["whole"] = _whole(whole, [span for span in spans if span.samples])
        if len(found["whole"]):
            for pair in worst:
                one, other = pair.split("_")
                worst[pair] = worst_of(worst[pair], error_of(found[one], found[other]))
        _advance(scheduler, spans, draw, model.shape.vocab_size)
    limit = LIMITS[dtype]
    wrong = [f"{pair} {error:.2g} above {limit:.2g}" for pair, error in worst.items() if not error <= limit]
    if run.gpu and not replays:
        wrong.append("no step was replayed")
    run.row(
        f"{kind.__name__} {str(dtype).removeprefix('torch.')}, {STEPS} steps",
        problem="; ".join(wrong) or None,
        **{f"{pair}_relative_error": error for pair, error in worst.items()}, tolerance=limit,
        steps_that_only_decode=replays,
    )  # fmt: skip


@torch.inference_mode()
def _whole(model: Llama, spans: list[Span]) -> torch.Tensor:
    """Logits [S, V] after each span's sequence, computed from its first token on."""
    device = model.lm_head.weight.device
    rows = [model(torch.tensor([span.request.tokens], device=device))[0, -1] for span in spans]
    return torch.stack(rows) if rows else torch.empty(0)


def _advance(scheduler: Scheduler, spans: list[Span], draw: random.Random, vocab_size: int) -> None:
    """Random tokens, and now and then an end, so that blocks are used again."""
    for span in spans:
        span.request.done = span.stop
        if span.samples:
            span.request.tokens.append(draw.randrange(vocab_size))
            if len(span.request.tokens) == span.request.most_tokens or draw.random() < 0.02:
                scheduler.remove(span.request)
