"""The hot paths on fake CUDA tensors: every device is right, and every wait for the host is listed here.

Not here: the backward pass, for which autograd asks for a real device; what kernels compute; errors of CUDA.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from optim.groups import partition
from optim.rules import Rule
from optim.step import exchange, fragments, fused
from optim.step.fragments import Fragment
from optim.step.fused import FusedStep
from optim.step.gradients import Bf16Gradients
from optim.step.zero import ZeroOptimizer
from serving.engine.decoder import WARM_UPS, TorchDecoder, graph_sizes
from serving.engine.gpu.decoder import GpuDecoder
from serving.engine.protocol import Sampling
from serving.engine.sampling import choose
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, Span
from tests.fake_cuda import fake_cuda
from tests.optim.step.fused_cases import PARAMETERS, RULES, numel
from tests.optim.step.test_fused import NUM_MATRICES
from training.model import attention
from training.model.llama import Llama
from training.model.shapes import LlamaShape
from training.run.batches import send

CUDA = torch.device("cuda")
SHAPE = LlamaShape(
    vocab_size=333, num_layers=2, max_positions=256, hidden_size=64, ffn_size=96, num_heads=8, num_kv_heads=2,
    head_dim=32,
)  # fmt: skip

each_path = pytest.mark.parametrize("with_kernels", [True, False], ids=["kernels", "torch"])


def make_model(**options: bool) -> Llama:
    """In bf16 on the fake GPU."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            return Llama(SHAPE, **options)
    finally:
        torch.set_default_dtype(torch.float32)


# --- what is seen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (lambda x: x.sum().item(), "number"),
        (lambda x: bool(x.sum() > 0), "number"),
        (lambda x: float(x[0]), "number"),
        (lambda x: x.tolist(), "to host"),
        (lambda x: x.cpu(), "to host"),
        (lambda x: torch.empty(4).copy_(x, non_blocking=True), "to host"),  # not pinned
        (lambda x: torch.empty(4, pin_memory=True).copy_(x), "to host"),  # blocks
        (lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True), "async to host"),
        (lambda x: torch.tensor([1.0], device=x.device), "to device"),
        (lambda x: x[[0, 1]], "to device"),
        (lambda x: torch.cuda.synchronize(), "wait"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_waits_for_the_host_is_seen(action, kind, inference):
    with fake_cuda() as traffic, torch.inference_mode(inference):
        x = torch.zeros(4, device=CUDA)
        action(x)
        assert traffic.counts == {(kind, "a test"): 1}


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x + torch.zeros(4),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.cat([x, torch.ones(1)]),
    ],
)
def test_a_wrong_device_and_a_size_that_only_the_gpu_knows_are_errors(action):
    with fake_cuda(), pytest.raises(Exception, match=r"device|nonzero"):
        action(torch.zeros(4, device=CUDA))


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_tokens", [None, 20])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_training_forward_asks_nothing_of_the_host(checkpointing, loss_tokens):
    """With `loss_tokens` it computes the gradients of the head too."""
    with fake_cuda() as traffic:
        model = make_model(activation_checkpointing=checkpointing)
        model.lm_head.loss_tokens, model.lm_head.z_loss = loss_tokens, 1e-4
        tokens = torch.empty(2, 16, dtype=torch.int64, device=CUDA)
        traffic.counts.clear()
        loss = model(tokens, tokens)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad
        assert traffic.counts == {}


@pytest.mark.parametrize("reason", [None, "as in fp32"])
def test_neither_does_attention_within_documents(reason):
    """By flash attention over pieces, and by a mask. How many documents there are, only the GPU knows."""
    with fake_cuda() as traffic, patch.object(attention, "varlen_unsupported", lambda *_: reason):
        model = make_model()
        tokens = torch.empty(2, 16, dtype=torch.int64, device=CUDA)
        starts = torch.empty(7, dtype=torch.int32, device=CUDA)
        traffic.counts.clear()
        assert model(tokens, tokens, starts, 9).requires_grad
        assert traffic.counts == {}


def test_neither_does_accumulating_nor_reducing_gradients():
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        with fake_cuda() as traffic:
            sums = Bf16Gradients.__new__(Bf16Gradients)
            sums.sent_dtype, sums.bucket_elements, sums.dp_process_group = torch.bfloat16, 5, None
            flat = torch.empty(16, device=CUDA)
            sums.fp32_groups_gradients_flat, sums.fp32_groups_gradients = [flat], [[flat[:12], flat[12:]]]
            sums.clear_hp_grads()
            parameter = torch.nn.Parameter(torch.empty(4, 3, device=CUDA, dtype=torch.bfloat16))
            for _ in range(2):
                parameter.grad = torch.empty_like(parameter)
                sums._update_hp_grad(parameter, 0, 0, clear_lp_grads=False)
            sums.reduce_gradients()
            assert traffic.counts == {}
    finally:
        dist.destroy_process_group()


def test_samples_come_to_the_gpu_without_a_wait():
    with fake_cuda() as traffic:
        assert send(torch.zeros(2, 17, dtype=torch.int64), CUDA).device.type == "cuda"
        assert traffic.counts == {("async to device", "training/run/batches.py send"): 1}


def make_step(rule: Rule, *, flats: torch.device = CUDA, ranks: int = 1) -> FusedStep:
    """PARAMETERS in one flat tensor, with gradients; this is rank 0, which holds the first part of each."""
    own, offset = [], 0
    held = {name: -(-numel(name) // ranks) for name in PARAMETERS}
    flat = torch.zeros(sum(held.values()), device=flats)
    model = torch.zeros_like(flat, dtype=torch.bfloat16)
    flat.grad = torch.zeros_like(flat)
    for name, count in held.items():
        own.append(Fragment(name, *PARAMETERS[name], 0, count, flat, offset, model))
        offset += count

    def ranges(fragments: list[Fragment]) -> list[tuple[tuple[int, int], ...]]:
        borders = [[min(held[f.name] * r, numel(f.name)) for r in range(ranks + 1)] for f in fragments]
        return [tuple(pairwise(each)) for each in borders]

    world = patch.object(fused, "rank_and_world_size", lambda: (0, ranks))
    with patch.object(fragments, "_gather_ranges", ranges), world:
        return FusedStep(rule, own, device=CUDA)


@each_path
@pytest.mark.parametrize("name", RULES)
def test_the_fused_step_asks_nothing_of_the_host(name, with_kernels):
    with fake_cuda(with_kernels=with_kernels) as traffic:
        rule = replace(RULES[name], dtype=torch.bfloat16) if with_kernels else RULES[name]
        unit = make_step(rule)
        tables = [part.table for group in unit._groups for part in group.parts]
        in_kernels = with_kernels and rule.not_compiled is None
        assert [table is not None for table in tables] == [in_kernels] * len(tables)
        traffic.counts.clear()
        unit.step(lr=0.1)
        assert traffic.counts == {}
        assert unit.num_transforms == (NUM_MATRICES if rule.whole and rule.moves(1) else 0)


@each_path
@pytest.mark.parametrize("name", ["muon-bf16", "normuon", "adamw", "transported-sign"])
def test_neither_does_one_that_exchanges_matrices_with_other_ranks(name, with_kernels):
    """The collectives are those of torch's fake process group: they take the tensors and do nothing."""
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        with fake_cuda(with_kernels=with_kernels) as traffic:
            unit = make_step(RULES[name], ranks=3)
            assert bool(unit.bytes_sent) == RULES[name].whole
            traffic.counts.clear()
            unit.step(lr=0.1)
            assert traffic.counts == {}
    finally:
        dist.destroy_process_group()


def test_only_measuring_the_updates_waits_for_them():
    """`inspect`, which some steps do: errors and mean squares of each shape; `read`, for the logged times."""
    with fake_cuda() as traffic:
        unit = make_step(RULES["muon"])
        traffic.counts.clear()
        unit.step(lr=0.1, inspect=True)
        shapes = len(unit._groups)
        assert traffic.counts == {("to host", "optim/step/health.py Health.inspect"): 2 * shapes}
        unit.health.read()
        assert traffic.counts["wait", "optim/step/health.py Health.read"] == 6 * shapes


@pytest.mark.parametrize("elements", [1, 150, 10**6])
def test_an_offloaded_step_travels_in_stretches(elements, monkeypatch):
    """One copy per stretch and direction, of pinned memory, for which nothing waits but who reads it."""
    monkeypatch.setattr(exchange, "STRETCH_BYTES", 2 * elements)
    with fake_cuda(with_kernels=True) as traffic:
        unit = make_step(RULES["muon-bf16"], flats=torch.device("cpu"))
        shapes = len(unit._groups)
        stretches = {1: NUM_MATRICES, 150: 9, 10**6: shapes}[elements]
        traffic.counts.clear()
        unit.step(lr=0.1)
        assert traffic.counts == {
            ("async to device", "optim/step/exchange.py Staging.uploading"): stretches
            + shapes,  # and the norms
            ("async to host", "optim/step/exchange.py Staging.downloading"): stretches,
            ("wait", "optim/step/exchange.py Staging.downloading"): stretches,
        }


def test_clipping_waits_once_to_know_whether_the_gradient_is_finite():
    with fake_cuda() as traffic:
        model = make_model()
        members = partition(model.named_parameters(), splits={})
        labels = {member.label: RULES["adamw"] for member in members}
        optimizer = ZeroOptimizer(members, rules=labels, peak_lr=dict.fromkeys(labels, 0.1), clip=1.0)
        masters = [member.parameter for member in members]
        for master in masters:
            master.grad = torch.empty_like(master)
        traffic.counts.clear()
        optimizer._clip_replicated(masters)
        assert traffic.counts == {("number", "optim/step/zero.py ZeroOptimizer._clip_replicated"): 1}


# --- serving ------------------------------------------------------------------------------------------------


def make_decoder() -> TorchDecoder:
    return TorchDecoder(make_model(), num_blocks=40, slots=8, graphs=False)


def test_a_step_that_a_graph_captures_asks_nothing_of_the_host():
    with fake_cuda() as traffic:
        decoder = make_decoder()
        tokens, positions = (torch.zeros(4, dtype=torch.int64, device=CUDA) for _ in range(2))
        blocks = torch.zeros(4, 2, dtype=torch.int64, device=CUDA)
        traffic.counts.clear()
        logits = decoder.step(tokens, positions, blocks)
        assert logits.shape == (4, 333) and logits.device.type == "cuda"
        assert traffic.counts == {}


def spans_of(*sizes: int, slots: int = 8) -> list[Span]:
    """Of the first step of requests of so many tokens."""
    scheduler = Scheduler(slots=slots, cache_tokens=40 * BLOCK_TOKENS, step_tokens=500)
    for size in sizes:
        scheduler.add(ScheduledRequest([1] * size, size + 5))
    return scheduler.next_step()


def test_a_step_without_a_graph_only_sends_what_it_is_to_compute():
    """Lists of tokens, positions, places, blocks, also those to clear, and which rows are kept and wanted."""
    with fake_cuda() as traffic:
        decoder = make_decoder()
        spans = spans_of(1, 1, 40)
        traffic.counts.clear()
        logits = decoder.forward(spans)
        assert logits.shape == (3, 333) and logits.device.type == "cuda"
        assert traffic.counts == {
            ("to device", "serving/engine/decoder.py TorchDecoder._tensor"): 10,
            ("to device", "serving/engine/decoder.py TorchDecoder._eager"): 1,
        }


DRAWS = {("to device", "serving/engine/sampling.py choose"): 4}
NUCLEUS = {("to device", "serving/engine/sampling.py Cuts.to"): 2}
SCORES = {("to host", "serving/engine/sampling.py score"): 3}


@pytest.mark.parametrize(
    ("sampling", "more"),
    [
        ({"temperature": 0.0}, {}),
        ({}, DRAWS),
        ({"top_p": 0.5}, DRAWS | NUCLEUS),
        (
            {"temperature": 0.0, "logprobs": True},
            SCORES | {("to device", "serving/engine/sampling.py choose"): 2},
        ),
    ],
    ids=["greedy", "drawn", "nucleus", "scored"],
)
def test_sampling_waits_once_for_the_tokens(sampling, more):
    with fake_cuda() as traffic:
        logits = torch.empty(4, 333, device=CUDA)
        choose(logits, [Sampling(max_tokens=1, **sampling)] * 4, [random.Random(0)] * 4)
        assert traffic.counts == {("to host", "serving/engine/sampling.py choose"): 1} | more


def test_the_decoder_of_kernels_waits_for_its_tokens_alone():
    """No step waits before it begins, though the last one's tokens are not read; they are sent if need be.

    A step of the same rows as the last, which only decoded, sends nothing.
    """
    with fake_cuda(with_kernels=True) as traffic:
        decoder = GpuDecoder(make_model(), num_blocks=40, slots=8, graphs=False)
        samplings = [Sampling(max_tokens=9, **each) for each in ({"temperature": 0.0}, {"top_p": 0.5})]
        chances = [random.Random(0)] * 2
        scheduler = Scheduler(slots=8, cache_tokens=40 * BLOCK_TOKENS, step_tokens=500)
        scheduler.add(ScheduledRequest([1] * 33, 60))
        sent, drawn = "serving/engine/gpu/inputs.py _send", "serving/engine/gpu/sampling.py"
        inputs = {("async to device", sent): 1}
        spans: list[Span] = []
        for step, expected in (("prompt", inputs), ("mixed", inputs), ("decoding", inputs), ("again", {})):
            last, spans = spans, scheduler.next_step()
            traffic.counts.clear()
            logits = decoder.forward(spans)
            assert logits.shape == (len(spans), 333) and logits.device.type == "cuda"
            assert traffic.counts == expected
            read = decoder.choose(samplings[-len(spans) :], chances[-len(spans) :])
            assert traffic.counts == expected | {
                ("async to device", f"{drawn} Sampler._drawn"): 1,
                ("async to host", f"{drawn} Sampler.choose"): 1,
            }
            if step == "prompt":
                scheduler.add(ScheduledRequest([1] * 40, 60))
            for span in last:  # of which the host now knows the tokens
                span.request.tokens.append(1)
        read()
        assert traffic.counts["wait", f"{drawn} Sampler.choose.<locals>.read"] == 1


# --- CUDA graphs --------------------------------------------------------------------------------------------


class Streams:
    """torch.cuda's streams and graphs, as a list of what was asked of them: `log`."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.made = 0
        self.current = self.main = self.Stream(self, "main")

    class Stream:
        def __init__(self, streams: "Streams", name: str) -> None:
            self.streams, self.name = streams, name

        def wait_stream(self, other: "Streams.Stream") -> None:
            self.streams.log.append((self.name, "waits for", other.name))

    class Graph:
        def __init__(self, streams: "Streams") -> None:
            self.streams = streams

        def replay(self) -> None:
            self.streams.log.append(("replay", self))

    def new(self, device: torch.device) -> "Streams.Stream":
        self.made += 1
        return self.Stream(self, "side")

    @contextmanager
    def on(self, stream: "Streams.Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def capture(self, graph: "Streams.Graph", *, pool: str, stream: "Streams.Stream") -> Iterator[None]:
        before = self.traffic.counts.copy()
        with self.on(stream):
            yield
        assert self.traffic.counts == before, "a copy or a wait inside a capture ends it with an error"
        self.log.append(("capture", graph, pool, stream.name))

    @contextmanager
    def installed(self) -> Iterator["Streams"]:
        with (
            fake_cuda() as self.traffic,
            patch.multiple(
                "torch.cuda",
                Stream=self.new,
                current_stream=lambda device: self.current,
                stream=self.on,
                graph_pool_handle=lambda: "the pool",
                graph=self.capture,
                CUDAGraph=lambda: self.Graph(self),
            ),
        ):
            yield self


def test_graphs_are_captured_when_the_decoder_is_made_and_never_later():
    """As torch documents it: warm-up on a side stream, with waits both ways, and capture there; one pool."""
    sizes = graph_sizes(slots=3, context_tokens=100, cache_blocks=40)
    ran: list[tuple[str, int, int]] = []
    step = TorchDecoder.step

    def noted(decoder: TorchDecoder, tokens: torch.Tensor, positions: torch.Tensor, blocks: torch.Tensor):
        ran.append((streams.current.name, *blocks.shape))
        return step(decoder, tokens, positions, blocks)

    with Streams().installed() as streams, patch.object(TorchDecoder, "step", noted):
        decoder = TorchDecoder(make_model(), num_blocks=40, slots=3, graphs=True, context_tokens=100)
        assert streams.made == 1
        assert streams.log[:2] == [("side", "waits for", "main"), ("main", "waits for", "side")]
        assert {(kind, pool, stream) for kind, _, pool, stream in streams.log[2:]} == {
            ("capture", "the pool", "side")
        }
        warm_ups = [("side", *size) for size in sizes for _ in range(WARM_UPS)]
        assert ran == warm_ups + [("side", *size) for size in sizes]
        graphs = dict(zip(sizes, (graph for _, graph, *_ in streams.log[2:]), strict=True))

        streams.log.clear()
        streams.traffic.counts.clear()
        for tokens, size in (((1,), (1, 1)), ((1, 1), (2, 1)), ((1, 1, 1), (3, 1))):
            assert decoder.forward(spans_of(*tokens, slots=3)).shape == (len(tokens), 333)
            assert streams.log.pop() == ("replay", graphs[size]) and not streams.log
        assert set(streams.traffic.counts) == {
            (
                "to device",
                "serving/engine/decoder.py TorchDecoder._tensor",
            ),  # the blocks that these steps begin
            ("to device", "serving/engine/decoder.py _Graphs.replay"),
        }
        assert len(ran) == (WARM_UPS + 1) * len(sizes)  # no step ran outside a graph


def test_a_step_larger_than_every_graph_runs_without_one():
    with Streams().installed() as streams:
        decoder = TorchDecoder(make_model(), num_blocks=40, slots=8, graphs=True, context_tokens=32)
        streams.log.clear()
        request = ScheduledRequest([1] * 70, 80)
        assert decoder.forward([Span(request, 69, 70, (0, 1, 2))]).shape == (1, 333) and not streams.log
