"""The decoders step by step against whole sequences; padding for CUDA graphs, without a GPU."""

import copy
import functools
import random
from pathlib import Path

import pytest
import torch

from serving.engine import native
from serving.engine.decoder import TorchDecoder, graph_sizes
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, Span, num_blocks
from training.model.llama import Llama, initialize
from training.model.shapes import LlamaShape

in_each_tier = pytest.mark.usefixtures("tier")
CONTEXT, SLOTS = 256, 6

# Sizes that no panel divides, one query head and groups of several, values narrower and as wide as a panel.
SHAPES = {
    "odd": {"hidden_size": 90, "ffn_size": 70, "num_heads": 6, "num_kv_heads": 3, "head_dim": 16},
    "wide heads": {"hidden_size": 64, "ffn_size": 130, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64},
    "a group of 8": {"hidden_size": 64, "ffn_size": 96, "num_heads": 8, "num_kv_heads": 1, "head_dim": 32},
    "tied": {
        "hidden_size": 64,
        "ffn_size": 64,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 128,
        "tied": True,
    },
    "qk norm": {
        "hidden_size": 64,
        "ffn_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 48,
        "qk_norm": True,
    },
}


def make_model(sizes: dict, dtype: torch.dtype) -> Llama:
    shape = LlamaShape(vocab_size=333, num_layers=2, max_positions=CONTEXT, **sizes)
    model = Llama(shape)
    initialize(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else torch.rand_like(parameter) + 0.5)
    return model.to(dtype)


def worst_error(decoder: TorchDecoder | native.NativeDecoder, model: Llama, *, num_steps: int = 25) -> float:
    """Largest relative error of logits, in chunks and token by token, against whole texts; some scored."""
    scheduler = Scheduler(slots=SLOTS, cache_tokens=40 * BLOCK_TOKENS, step_tokens=50)
    draw = random.Random(0)
    worst = 0.0
    for _ in range(num_steps):
        if draw.random() < 0.6:
            prompt = [draw.randrange(333) for _ in range(draw.choice((1, 2, 31, 32, 33, 64, 90)))]
            scheduler.add(ScheduledRequest(prompt, len(prompt) + 40, scored=draw.random() < 0.4))
        spans = scheduler.next_step()
        found = [*decoder.forward(spans)] if spans else []
        asked = [span for span in spans if span.samples or span.num_scored]
        with torch.no_grad():
            whole = [model(torch.tensor([span.request.tokens[: span.stop]]))[0].float() for span in asked]
        expected = [logits[-1] for span, logits in zip(asked, whole, strict=True) if span.samples]
        if any(span.num_scored for span in spans):
            found += [row for logits in decoder.scored() for row in logits.clone()]
        for span, logits in zip(asked, whole, strict=True):
            expected += logits[span.start : span.start + span.num_scored]
        for row, right in zip(found, expected, strict=True):
            worst = max(worst, ((row - right).norm() / right.norm()).item())
        for span in spans:
            span.request.done = span.stop
            if span.samples:
                span.request.tokens.append(draw.randrange(333))
                if draw.random() < 0.1:
                    scheduler.remove(span.request)  # so that blocks are used again
    return worst


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_the_torch_decoder_continues_any_mix_of_texts(sizes):
    model = make_model(sizes, torch.float32)
    decoder = TorchDecoder(copy.deepcopy(model), num_blocks=40, slots=SLOTS, graphs=False)
    assert worst_error(decoder, model) < 1e-5


@functools.cache
def torch_in_bf16(name: str) -> tuple[Llama, Llama, float]:
    """A model of that shape in bf16, the same weights in fp32, and torch's error with the former."""
    model = make_model(SHAPES[name], torch.bfloat16)
    wide = copy.deepcopy(model).float()
    decoder = TorchDecoder(copy.deepcopy(model), num_blocks=40, slots=SLOTS, graphs=False)
    return model, wide, worst_error(decoder, wide)


@in_each_tier
@pytest.mark.parametrize("name", SHAPES)
def test_the_compiled_decoder_does_as_well_as_torch_in_bf16(name):
    """Against the same weights in fp32. Both round activations to bf16, a few times differently."""
    model, wide, torch_error = torch_in_bf16(name)
    decoder = native.NativeDecoder(
        copy.deepcopy(model),
        num_blocks=40,
        slots=SLOTS,
        step_tokens=50,
        context_tokens=CONTEXT,
        num_threads=2,
    )
    assert worst_error(decoder, wide) < 1.5 * torch_error < 0.06


def logits_beside(
    decoder: TorchDecoder | native.NativeDecoder, *others: int, step_tokens: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after a prompt of 70 tokens and 20 more, and along the prompt; `others` are prompts' lengths."""
    scheduler = Scheduler(slots=SLOTS, cache_tokens=40 * BLOCK_TOKENS, step_tokens=step_tokens)
    draw = random.Random(0)
    text = [draw.randrange(333) for _ in range(90)]
    request = ScheduledRequest(text[:70], len(text), scored=True)
    beside = [ScheduledRequest([size % 7] * size, size + 60) for size in others]
    for each in [*beside[::2], request, *beside[1::2]]:
        scheduler.add(each)
    after, along = [], []
    while len(request.tokens) < len(text):
        spans = scheduler.next_step()
        logits = decoder.forward(spans).clone()
        sampled = [span.request for span in spans if span.samples]
        along += [row.clone() for rows in decoder.scored() for row in rows]
        after += [row for sequence, row in zip(sampled, logits, strict=True) if sequence is request]
        for span in spans:
            span.request.done = span.stop
        for sequence in sampled:
            sequence.tokens.append(text[len(request.tokens)] if sequence is request else 5)
    return torch.stack(after), torch.stack(along)


BESIDE = [((1, 3, 40, 2, 7), 200), ((1, 3), 20), ((64,), 9), ((), 11)]


@in_each_tier
@pytest.mark.parametrize(
    "sizes", [SHAPES["odd"], {**SHAPES["tied"], "ffn_size": 1100}], ids=["odd", "tied, of several slabs"]
)
def test_the_compiled_decoder_s_logits_depend_on_no_other_request_and_no_chunk(sizes):
    """Bit by bit."""
    model = make_model(sizes, torch.bfloat16)

    def decoder() -> native.NativeDecoder:
        return native.NativeDecoder(
            copy.deepcopy(model), num_blocks=40, slots=SLOTS, step_tokens=200, context_tokens=CONTEXT,
            num_threads=2,
        )  # fmt: skip

    alone = logits_beside(decoder())
    for others, step_tokens in BESIDE:
        found = logits_beside(decoder(), *others, step_tokens=step_tokens)
        assert all(map(torch.equal, found, alone))


def test_the_torch_decoder_s_logits_depend_on_other_requests_by_rounding_alone():
    """torch chooses a product's kernel, and so the order of its sums, by the number of rows."""
    model = make_model(SHAPES["odd"], torch.float32)
    alone, _ = logits_beside(TorchDecoder(model, num_blocks=40, slots=SLOTS, graphs=False))
    for others, step_tokens in BESIDE:
        decoder = TorchDecoder(model, num_blocks=40, slots=SLOTS, graphs=False)
        found, _ = logits_beside(decoder, *others, step_tokens=step_tokens)
        assert (found - alone).abs().max() < 5e-6 * alone.abs().max()


def test_what_an_earlier_request_left_in_the_torch_decoder_s_cache_is_not_seen():
    """Not by requests, and not by a step that is padded for a CUDA graph, whose padding may be NaN too."""
    model = make_model(SHAPES["odd"], torch.float32)
    alone = logits_beside(TorchDecoder(model, num_blocks=40, slots=SLOTS, graphs=False), 1, 40)
    decoder = TorchDecoder(model, num_blocks=40, slots=SLOTS, graphs=False)
    decoder._cache.fill_(float("nan"))
    assert all(map(torch.equal, logits_beside(decoder, 1, 40), alone))

    scheduler = Scheduler(slots=SLOTS, cache_tokens=40 * BLOCK_TOKENS, step_tokens=200)
    for token in (3, 4):
        scheduler.add(ScheduledRequest([token], 50))
    spans = scheduler.next_step()
    expected = decoder.forward(spans)
    padded = (torch.tensor(values) for values in decoder.inputs(spans, width=4, size=4))
    assert torch.allclose(decoder.step(*padded)[:2], expected, atol=1e-5)


@in_each_tier
def test_what_an_earlier_request_left_in_the_cache_is_not_seen():
    """NaN, say, which no chance of zero would hide."""
    model = make_model(SHAPES["odd"], torch.bfloat16)
    wide = copy.deepcopy(model).float()
    decoder = native.NativeDecoder(
        model, num_blocks=40, slots=SLOTS, step_tokens=50, context_tokens=CONTEXT, num_threads=2
    )
    for cache in (decoder._keys, decoder._values):
        cache.fill_(-1)  # pairs of bf16 NaNs
    assert worst_error(decoder, wide, num_steps=12) < 0.06


def test_tensors_in_huge_pages_are_zero_and_apart_and_too_large_a_one_is_an_error_of_memory():
    memory = native._HugePages()
    tensors = [memory.zeros(3, size, dtype=torch.int32) for size in (5, 1, native.CHUNK_BYTES // 4, 2)]
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % native.LINE_BYTES == 0 and not tensor[:, :5].any()
        tensor[:, :5].fill_(number + 1)
    assert [tensor[0, 0].item() for tensor in tensors] == [1, 2, 3, 4]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if any(first <= tensor.data_ptr() < last for tensor in tensors):
            assert line.split()[1] == "rw-p"  # shared memory has no huge pages by default
    with pytest.raises(MemoryError, match="Cannot allocate"):
        memory.zeros(1 << 50, dtype=torch.int32)


@in_each_tier
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (
            {"hidden_size": 60, "ffn_size": 64, "num_heads": 2, "num_kv_heads": 2, "head_dim": 20},
            "multiple of 16",
        ),
        ({"hidden_size": 64, "ffn_size": 65, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}, "even"),
    ],
)
def test_a_shape_that_it_cannot_take_is_refused(sizes, reason):
    with pytest.raises(ValueError, match=reason):
        native.NativeDecoder(
            make_model(sizes, torch.bfloat16),
            num_blocks=4, slots=1, step_tokens=9, context_tokens=9, num_threads=1,
        )  # fmt: skip


def test_a_step_padded_for_a_graph_gives_the_same_logits():
    """What a CUDA graph would replay, called directly."""
    model = make_model(SHAPES["odd"], torch.float32)
    decoder = TorchDecoder(copy.deepcopy(model), num_blocks=40, slots=8, graphs=False)
    scheduler = Scheduler(slots=8, cache_tokens=40 * BLOCK_TOKENS, step_tokens=200)
    for size in (1, 40, 70):
        scheduler.add(ScheduledRequest([size % 7] * size, size + 5))
    for _ in range(2):
        spans = scheduler.next_step()
        expected = decoder.forward(spans)
        padded = decoder.inputs(spans, width=4, size=8)
        if all(span.stop - span.start == 1 for span in spans):
            found = decoder.step(*(torch.tensor(values) for values in padded))
            assert torch.allclose(found[:3], expected, atol=1e-5)
            assert found.isfinite().all()
        for span in spans:
            span.request.done = span.stop
            span.request.tokens.append(5)
    assert max(num_blocks(span.stop) for span in spans) == 3


def test_a_graph_takes_steps_in_which_every_span_samples_and_no_other():
    model = make_model(SHAPES["odd"], torch.float32)
    decoder = TorchDecoder(model, num_blocks=40, slots=8, graphs=False)
    replayed: list[int] = []

    class Graphs:
        def replay(self, spans: list[Span]) -> torch.Tensor:
            replayed.append(len(spans))
            return torch.zeros(len(spans), 333)

    decoder._graphs = Graphs()  # type: ignore[assignment]
    going = ScheduledRequest([1], 5)
    alone = ScheduledRequest([2], 1, scored=True)  # there is no more to know of it
    assert len(decoder.forward([Span(going, 0, 1, (0,)), Span(alone, 0, 1, (1,))])) == 1 and not replayed
    assert len(decoder.forward([Span(going, 0, 1, (0,))])) == 1 and replayed == [1]


def test_attention_over_a_growing_context_never_builds_a_plan_for_its_shape(monkeypatch):
    """cuDNN's is off in every step, also in one that a graph captures, and on again for whoever trains."""
    allowed: list[bool] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(*arguments, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model = make_model(SHAPES["odd"], torch.float32)
    decoder = TorchDecoder(model, num_blocks=40, slots=8, graphs=False)
    request = ScheduledRequest([1] * 40, 50)
    decoder.forward([Span(request, 0, 40, (0, 1))])
    again = decoder.inputs([Span(request, 39, 40, (0, 1))], width=2, size=1)
    decoder.step(*(torch.tensor(each) for each in again))
    assert allowed == [False] * 4 and torch.backends.cuda.cudnn_sdp_enabled()


def test_the_steps_that_are_captured_cover_every_batch_and_context():
    sizes = graph_sizes(slots=6, context_tokens=200, cache_blocks=1000)
    assert len(sizes) == 16 and sizes[0] == (6, 8)
    assert {n for n, _ in sizes} == {1, 2, 4, 6} and {w for _, w in sizes} == {1, 2, 4, 8}
    work = [n * width for n, width in sizes]
    assert work == sorted(work, reverse=True)  # the largest first
    assert graph_sizes(slots=1, context_tokens=1, cache_blocks=1) == [(1, 1)]
    long = graph_sizes(slots=32, context_tokens=131_072, cache_blocks=1024)  # 32,768 tokens in the cache
    assert max(n * width for n, width in long) == 4096 and (1, 4096) in long and (32, 128) in long
