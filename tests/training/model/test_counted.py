"""Formulas of FLOPs and bytes against what the real model and decoder do, counted on the meta device.

ASUNCION_PROPERTY_CASES=5000 runs so many cases of each instead of a few.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from serving.bench import report
from serving.bench.latency import RequestOutcome, Slo, summarise
from serving.config import EngineConfig
from serving.engine.decoder import TorchDecoder
from serving.engine.gpu.decoder import GpuDecoder
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, num_blocks
from serving.engine.torch_engine import arithmetic, describe
from tests.fake_cuda import fake_cuda
from tests.properties import cases
from training.model.llama import Llama
from training.model.shapes import SHAPES, LlamaShape

few = settings(max_examples=cases(8), deadline=None, database=None, phases=[Phase.generate])
many = settings(few, max_examples=cases(100))  # of those that run no model
META = torch.device("meta")
ATTENTION = ("bmm", "baddbmm")  # every other product is one with weights


@st.composite
def shapes(draw: Any) -> LlamaShape:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 12))
    return LlamaShape(
        vocab_size=draw(st.integers(2, 400)),
        hidden_size=kv_heads * group * draw(st.integers(1, 40)),
        num_layers=draw(st.integers(1, 2)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=draw(st.integers(1, 150)),
        tied=draw(st.booleans()),
        max_positions=512,
    )


def model_of(shape: LlamaShape, dtype: torch.dtype = torch.float32) -> Llama:
    with META:
        return Llama(shape).to(dtype)


def flops_of(counter: FlopCounterMode) -> tuple[int, int]:
    """(of products with weights, of attention)."""
    counts: Counter[bool] = Counter()
    for op, flops in counter.get_flop_counts()["Global"].items():
        counts[str(op).rpartition(".")[2] in ATTENTION] += flops
    return counts[False], counts[True]


class Reads(TorchDispatchMode):
    """Bytes of weights that products read, each once, and of keys and values that are gathered."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self._weights = {p.untyped_storage()._cdata: p.nbytes for p in model.parameters()}
        self._read: set[int] = set()
        self.gathered = 0

    @property
    def of_weights(self) -> int:
        return sum(self._weights[each] for each in self._read)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "linear"):
            read = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
            self._read |= read & self._weights.keys()
        if name == "index" and args[0].dim() == 4:  # the cache of a layer: blocks, tokens, heads, head_dim
            self.gathered += found.nbytes
        return found


@few
@given(shapes(), st.integers(1, 3), st.integers(1, 40))
def test_training_flops_are_those_of_a_step(shape, batch, length):
    model = model_of(shape)
    tokens = torch.zeros((batch, length), dtype=torch.int64, device=META)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert sum(flops_of(counter)) == batch * length * shape.flops_per_token(length)


@few
@given(
    shapes(),
    st.lists(st.integers(1, 100), min_size=1, max_size=4),
    st.integers(8, 120),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_prefill_and_decode_flops_and_bytes_are_those_of_the_decoder(shape, lengths, step_tokens, dtype):
    """Prompts go through the real scheduler and decoder in chunks, until all are decoded in one step."""
    options = EngineConfig(compiled=False, dtype=dtype)
    numbers = arithmetic(options, META)
    info = asdict(describe(shape, options, numbers, device="meta", name="m", context=512))
    model = model_of(shape, numbers.dtype)
    answer = 200  # longer than it takes to prefill all prompts
    blocks = sum(num_blocks(length + answer) for length in lengths)
    decoder = TorchDecoder(model, num_blocks=blocks, slots=len(lengths), graphs=False)
    requests = [ScheduledRequest([1] * length, length + answer) for length in lengths]
    scheduler = Scheduler(slots=len(lengths), cache_tokens=blocks * BLOCK_TOKENS, step_tokens=step_tokens)
    for request in requests:
        scheduler.add(request)
    products = attention = decoded = 0
    seen = 0.0  # by tokens that are decoded while other prompts are prefilled
    while True:
        spans = scheduler.next_step()
        decoding = [span for span in spans if span.start >= span.request.prompt_tokens]
        with FlopCounterMode(display=False) as counter, Reads(model) as reads:
            decoder.forward(spans)
        if len(decoding) == len(requests):
            break
        of_products, of_attention = flops_of(counter)
        products, attention = products + of_products, attention + of_attention
        decoded += len(decoding)
        seen += sum(span.stop for span in decoding)
        for span in spans:
            span.request.done = span.stop
            if span.samples:
                span.request.tokens.append(1)

    of_layer = info["last_attention_flops"]
    causal = sum(of_layer * (shape.num_layers - 1) * n**2 // 2 + of_layer * n for n in lengths)
    prefilled = sum(shape.prefill_flops(length) for length in lengths)
    assert products == prefilled - causal + decoded * info["flops_per_token"]
    assert attention >= causal + info["attention_flops"] * seen  # it counts what the mask leaves out as well
    assert prefilled == sum(report.prefill_flops(info, length) for length in lengths)

    contexts = [span.stop for span in spans]
    of_products, of_attention = flops_of(counter)
    padded = max(map(num_blocks, contexts)) * BLOCK_TOKENS  # a batch is as wide as its longest
    assert of_products == len(spans) * info["flops_per_token"]
    assert of_attention == len(spans) * info["attention_flops"] * padded
    flops = sum(shape.decode_flops(context) for context in contexts)
    assert flops == of_products + of_attention * sum(contexts) / (len(spans) * padded)
    assert reads.of_weights == info["weight_bytes"]
    assert reads.gathered == len(spans) * padded * info["kv_bytes_per_token"]
    width = numbers.dtype.itemsize
    assert info["kv_bytes_per_token"] == shape.kv_bytes_per_token(width)
    mean = sum(contexts) / len(contexts)
    read = shape.decode_bytes(batch=len(spans), context_tokens=mean, width_bytes=width)
    assert read == pytest.approx(info["weight_bytes"] + sum(contexts) * info["kv_bytes_per_token"])


@pytest.mark.parametrize(("size", "in_chunks_of"), [(33, 500), (70, 30)])
def test_the_decoder_of_kernels_multiplies_what_the_first_token_needs(size, in_chunks_of):
    """All products with weights are torch's; attention is not counted, a kernel of ours."""
    shape = SHAPES["llama-5m"]
    with fake_cuda(with_kernels=True):
        with torch.device("cuda"):
            model = Llama(shape)
        decoder = GpuDecoder(model, num_blocks=40, slots=8, graphs=False)
        scheduler = Scheduler(slots=8, cache_tokens=40 * BLOCK_TOKENS, step_tokens=in_chunks_of)
        scheduler.add(ScheduledRequest([1] * size, size + 1))
        found = 0
        while spans := scheduler.next_step():
            with FlopCounterMode(display=False) as counter:
                decoder.forward(spans)
            found += counter.get_total_flops()
            idle = sum(span.num_kept == 0 for span in spans)  # a row is computed for nothing
            found -= idle * shape.last_token_flops
    width = shape.num_heads * shape.head_dim
    attention = 2 * (shape.num_layers - 1) * width * size**2 + 4 * width * size
    assert found == shape.prefill_flops(size) - attention


@many
@given(shapes(), st.sampled_from([torch.bfloat16, torch.float32]), st.integers(1, 8))
def test_bytes_of_the_plans_are_those_of_the_tensors(shape, dtype, blocks):
    model = model_of(shape, dtype)
    decoder = TorchDecoder(model, num_blocks=blocks, slots=1, graphs=False)
    assert sum(p.nbytes for p in model.parameters()) == dtype.itemsize * shape.num_parameters
    tokens = (blocks + 1) * BLOCK_TOKENS  # one block is spare
    assert decoder._cache.nbytes == tokens * shape.kv_bytes_per_token(dtype.itemsize)
    products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    head = shape.vocab_size * shape.hidden_size * shape.tied  # which is the embedding
    assert shape.num_matmul_parameters == products + head


def answers(
    info: dict, ceiling: dict, sizes: Sequence[tuple[int, int]], *, slots: int, concurrency: int
) -> list[RequestOutcome]:
    """Of an engine with few slots, which prefills at the peak and decodes as fast as it can read.

    sizes: tokens of prompt and answer of each request, from clients that send one when the last has ended.
    """
    waiting = list(enumerate(sizes))
    queue = [(0.0, *waiting.pop(0)) for _ in range(min(concurrency, len(waiting)))]  # (since when, which)
    running: dict[int, tuple[float, list[float]]] = {}
    now, outcomes = 0.0, []
    while queue or running:
        while queue and len(running) < slots:
            scheduled, index, (prompt, _) = queue.pop(0)
            now += report.prefill_flops(info, prompt) / (ceiling["product_tflops"] * 1e12)
            running[index] = (scheduled, [now])
        cached = sum(sizes[index][0] + len(times) for index, (_, times) in running.items())
        read = info["weight_bytes"] + cached * info["kv_bytes_per_token"]
        now += read / (ceiling["gb_per_s"] * 1e9)
        for index, (scheduled, times) in list(running.items()):
            times.append(now)
            prompt, output = sizes[index]
            if len(times) == output:
                del running[index]
                queue += [(now, *waiting.pop(0))] if waiting else []
                outcomes.append(RequestOutcome(
                    index=index, scheduled=scheduled, sent=scheduled, tokens=tuple(times), ended=now,
                    prompt_tokens=prompt, output_tokens=output,
                ))  # fmt: skip
    return outcomes


@many
@given(
    shapes(),
    st.lists(st.tuples(st.integers(1, 400), st.integers(2, 100)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.sampled_from([1, 1, 2, 8, 30]),
    st.floats(1e-3, 1e3),
    st.floats(1e-2, 1e4),
)
def test_an_engine_at_its_ceilings_reaches_no_more_than_these(
    shape, sizes, slots, concurrency, tflops, gb_per_s
):
    options = EngineConfig(compiled=False, dtype="float32")
    info = asdict(describe(shape, options, arithmetic(options, META), device="meta", name="m", context=512))
    measured = {"device": "cpu", "product_dtype": "float32"}
    ceiling = report.ceilings(info, measured | {"product_tflops": tflops, "read_gb_per_s": gb_per_s})
    outcomes = answers(info, ceiling, sizes, slots=slots, concurrency=concurrency)
    point = summarise(outcomes, slo=Slo(None, None, None)) | {"concurrency": concurrency}
    found = report.shares(point, info, ceiling)
    prompt, _ = sizes[0]
    floor = shape.prefill_flops(prompt) / (tflops * 1e12)
    assert prompt / floor <= ceiling["prefill_tokens_per_second"] * (1 + 1e-9)
    assert found["mbu"] <= 1 + 1e-6
    if concurrency == 1:
        assert found["mbu"] == pytest.approx(1.0)
        assert found["prefill_mfu"] <= 1 + 1e-6
        if len(sizes) % 2:  # else the median lies between two prompts
            assert found["prefill_mfu"] == pytest.approx(1.0)


def test_more_requests_than_slots_read_no_more_than_the_slots_hold():
    """128 in flight on 32 slots: 32 contexts are read in a step, and not 128."""
    shape = SHAPES["llama-5m"]
    options = EngineConfig(compiled=False, dtype="float32")
    info = asdict(describe(shape, options, arithmetic(options, META), device="meta", name="m", context=512))
    ceiling = {"gb_per_s": 10.0, "product_tflops": 1e6}  # prompts take no time
    outcomes = answers(info, ceiling, [(64, 48)] * 512, slots=32, concurrency=128)
    point = summarise(outcomes, slo=Slo(None, None, None)) | {"concurrency": 128}
    assert report.shares(point, info, ceiling) == {"mbu": pytest.approx(1.0, rel=1e-3)}
