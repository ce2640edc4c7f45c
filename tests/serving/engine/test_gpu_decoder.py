"""The decoder of Triton kernels without a GPU: compiled for sm_86 and sm_90, and run by the interpreter.

Triton decides at its import whether kernels are interpreted, so a second pytest in its own process runs the
functions named `interpreted_*`. The interpreter truncates where a GPU rounds a cast to bf16.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from cluster.machine.triton_calls import Call
from serving.engine.gpu import attention, layers, project
from serving.engine.gpu import decoder as decoders
from serving.engine.gpu.decoder import GpuDecoder, unsupported
from serving.engine.gpu.sampling import Sampler
from serving.engine.protocol import Sampling
from serving.engine.sampling import BROKEN, choose
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, Span
from tests.compiled_kernels import compiled, problems, run_interpreted
from training.model import shapes
from training.model.llama import Llama, RMSNorm, initialize, rotary, rotate
from training.model.shapes import LlamaShape


def test_the_interpreter_runs_every_kernel():
    run_interpreted(__file__, passes=10)


def launches(num_rows: int, *, capability: tuple[int, int], **changes: object) -> list[Call]:
    """What a step of so many rows that decode launches besides products by cuBLAS, for one layer."""
    calls: list[Call] = []
    with torch.device("meta"):
        model = Llama(shapes.resolve("llama-1b4", num_layers=1, **changes)).bfloat16()
    with (
        patch.object(Call, "launch", lambda self, like=None: calls.append(self)),
        patch.object(attention, "_capability", lambda device: capability),
        torch.inference_mode(),
    ):
        decoder = GpuDecoder(model, num_blocks=64, slots=32, graphs=False)
        decoder._stack.pdl = capability >= (9, 0)
        decoder._decode(num_rows)
    return calls


def test_a_layer_is_five_launches_for_one_row_and_five_beside_its_products_for_more():
    one = [call.kernel.__name__ for call in launches(1, capability=(9, 0))]
    attend = "decode_kernel"
    assert one == ["_project_kernel", attend, *["_project_kernel"] * 4, "_pick_kernel"]
    many = [call.kernel.__name__ for call in launches(32, capability=(9, 0))]
    between = ["_add_norm_kernel", "_rotate_kernel", attend, "_add_norm_kernel", "_silu_kernel"]
    assert many == [*between, "_add_norm_kernel", "_scan_kernel", "_pick_kernel"]
    normed = [call.kernel.__name__ for call in launches(1, capability=(9, 0), qk_norm=True)]
    assert normed == [one[0], "_rotate_kernel", *one[1:]]


@pytest.mark.parametrize(
    ("capability", "num_rows", "which", "qk_norm"),
    [
        ((9, 0), 1, 0, False), ((9, 0), 1, 2, False), ((9, 0), 32, 1, False), ((8, 6), 1, 4, False),
        ((8, 6), 32, 0, False), ((9, 0), 1, 0, True), ((8, 6), 32, 1, True),
    ],
)  # fmt: skip
def test_kernels_compile_without_spills(capability, num_rows, which, qk_norm, tmp_path):
    kernel = compiled(launches(num_rows, capability=capability, qk_norm=qk_norm)[which], capability)
    assert problems(kernel, capability, tmp_path) == []
    assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == (capability >= (9, 0))


def test_weights_are_under_way_before_the_launch_before_has_ended():
    """What makes one row fast: all of a program's weights are asked for before it waits for its input."""
    ptx = compiled(launches(1, capability=(9, 0))[0], (9, 0)).asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait")
    assert before.count("ld.global.v4") == 8 + 2 and 0 < after.count("ld.global.v4") <= 2


def test_a_model_with_rows_beyond_a_program_is_refused_with_the_reason():
    shape = shapes.resolve("llama-1b4", ffn_size=16_400)
    reason = unsupported(torch.device("cuda"), torch.bfloat16, shape)
    assert reason == "rows of 16400 exceed the 16384 that one program of a kernel holds"


# --- choosing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.7, 3.0)])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_the_sampler_chooses_as_the_host_does(temperatures, top_p):
    """To the token, also with rows that take no part; and the scores of those that ask."""
    logits = 3 * torch.randn(4, 97, generator=torch.Generator().manual_seed(0))
    logits[2, 5] = torch.nan
    largest, ids = logits.max(-1)
    likeliest = torch.where(largest.isfinite(), ids, BROKEN).int()
    samplings = [
        Sampling(
            max_tokens=1,
            temperature=each,
            top_p=top_p if row else 1.0,
            top_k=5 * (row == 1),
            min_p=0.1 * (row == 3),
            logprobs=row % 2 == 0,
            num_likeliest=4,
        )
        for row, each in enumerate(temperatures)
    ]
    changed = {3: -logits[3]}
    sampler = Sampler(4, torch.device("cpu"))
    for seed in range(5):
        chances = [[random.Random(f"{seed} {row}") for row in range(4)] for _ in range(2)]
        chosen, read = sampler.choose(logits, likeliest, samplings, chances[0], changed)
        ids, scores = read()
        expected_ids, expected_scores = choose(logits, samplings, chances[1], changed)
        assert ids == chosen.tolist() == expected_ids and ids[2] == BROKEN
        assert scores[0][:3] == pytest.approx(expected_scores[0][:3]) and scores[1] is scores[3] is None
        assert scores[0].others == expected_scores[0].others and len(scores[0].others) == 3


def test_two_steps_may_be_on_their_way_at_once():
    """What the first chose is read after the second chose; and after that of the second, none is lost."""
    sampler, sampling = Sampler(2, torch.device("cpu")), [Sampling(max_tokens=1, temperature=0.0)]
    logits = torch.zeros(1, 9)
    reads = [
        sampler.choose(logits, torch.tensor([i], dtype=torch.int32), sampling, [None])[1] for i in (3, 4)
    ]
    assert [read()[0] for read in reads] == [[3], [4]]


# --- by the interpreter -------------------------------------------------------------------------------------


def values(*size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """To three roundings of bf16, which the interpreter truncates; or to those of fp32."""
    bound = 4e-2 if torch.bfloat16 in (dtype, expected.dtype) else 1e-5
    return bool((found.float() - expected.float()).abs().max() <= bound * expected.float().abs().max())


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
rows = pytest.mark.parametrize("num_rows", [1, 3])


@dtypes
def interpreted_projections_are_the_models_operations(dtype):
    hidden, inner = 40, 36
    x, weight = (values(n, hidden, seed=n, dtype=dtype) for n in (1, 2 * inner))
    norm = RMSNorm(hidden, eps=1e-2)
    norm.weight.data = values(hidden, seed=7, dtype=dtype)
    product = F.linear(norm(x), weight)
    out = torch.full((1, inner), torch.nan, dtype=dtype)
    normed = {"norm": norm.weight.data, "eps": 1e-2}
    project.project(x, weight, out, epilogue="silu", half=inner, **normed).launch()
    assert close(out, F.silu(product[:, :inner]) * product[:, inner:])

    odd = weight[:51]
    residual = values(1, 51, seed=9, dtype=dtype)
    expected = residual + F.linear(x, odd)
    project.project(x, odd, residual, epilogue="add", half=26).launch()
    assert close(residual, expected)

    size = {"outputs": 51, "half": 26}
    programs = project.project_programs(x, **size)
    best = torch.empty(1, programs), torch.empty(1, programs, dtype=torch.int32)
    logits = torch.full((1, 51), torch.nan)
    project.project(x, odd, logits, epilogue="logits", half=26, best=best, **normed).launch()
    assert close(logits, product[:, :51].float(), dtype)
    picked(best, logits)


def picked(best: layers.Best, logits: torch.Tensor) -> None:
    """`pick` finds the largest of `logits`, and advances the rows that are no padding."""
    num_rows = len(logits)
    ids, tokens, lengths = (torch.full((num_rows,), start, dtype=torch.int32) for start in (-7, -7, 5))
    if num_rows > 1:
        lengths[-1] = 0
    layers.pick(best, ids, tokens, lengths).launch()
    broken = ~logits.amax(-1).isfinite()
    expected = logits.argmax(-1).masked_fill(broken, BROKEN)
    assert ids.tolist() == expected.tolist() and tokens.tolist() == expected.clamp_min(0).tolist()
    assert lengths.tolist() == [*[6] * (num_rows - 1), 6 if num_rows == 1 else 0]


def interpreted_a_row_with_nan_is_broken_and_of_equal_logits_the_first_wins():
    logits = values(4, 2100, seed=0, dtype=torch.float32).bfloat16()
    logits[1, 7] = torch.nan
    logits[2, 2050] = torch.inf
    logits[3, 9] = logits[3, 2060] = 50
    wide = torch.empty(4, 2100)
    best = torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int32)
    layers.scan(logits, wide, best).launch()
    assert torch.equal(wide.nan_to_num(), logits.float().nan_to_num())
    picked(best, torch.where(wide.isnan(), torch.inf, wide))


GREEDY = Sampling(max_tokens=9, temperature=0.0)
SHAPE = LlamaShape(
    vocab_size=97, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=40,
    max_positions=128,
)  # fmt: skip


@dtypes
@rows
def interpreted_heads_are_rotated_and_go_where_they_belong(num_rows, dtype):
    x, weight = values(num_rows, 48, seed=1, dtype=dtype), values(8 * 16, 48, seed=2, dtype=dtype)
    positions = torch.tensor([70, 31, 32])[:num_rows]
    blocks = torch.tensor([[3, 1, 4], [0, 2, 0], [5, 6, 0]], dtype=torch.int32)[:num_rows].contiguous()
    cos, sin = (each[0, 0, :, :8].contiguous() for each in rotary(SHAPE, torch.arange(128)))
    qkv = F.linear(x, weight)
    q, k, v = qkv.view(num_rows, 8, 16).transpose(0, 1)[None].split([4, 2, 2], dim=1)
    by = rotary(SHAPE, positions)
    wanted_q, wanted_k = rotate(q, by)[0].transpose(0, 1), rotate(k, by)
    wanted = torch.cat((wanted_k, v))  # [2, G, M, C]
    for through_project in {num_rows == 1, False}:
        cache = torch.full((2, 7, 2, BLOCK_TOKENS, 16), torch.nan, dtype=dtype)
        heads = layers.Heads(cos, sin, cache, blocks, positions.int() + 1, None, 4)
        if through_project:
            found = torch.empty(num_rows, 64, dtype=dtype)
            project.project(x, weight, found, epilogue="rope", half=8, heads=heads).launch()
        else:
            layers.rotate_and_store(qkv, heads).launch()
            found = qkv[:, :64]
        assert close(found.view(num_rows, 4, 16), wanted_q)
        for row, position in enumerate(positions.tolist()):
            place = cache[:, blocks[row, position // BLOCK_TOKENS], :, position % BLOCK_TOKENS]
            assert close(place, wanted[:, :, row])
        assert cache.isfinite().sum() == num_rows * 2 * 2 * 16  # and nothing elsewhere


def one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attention, at a time: the interpreter runs them one after the other."""
    monkeypatch.setitem(attention.TILES, (8, 6), replace(attention.TILES[8, 6], programs=1))


def drawn(shape: LlamaShape) -> Llama:
    model = Llama(shape)
    initialize(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else torch.rand_like(parameter) + 0.5)
    return model


def interpreted_one_row_has_the_same_norms_of_queries_and_keys_in_both_forms(monkeypatch):
    one_program(monkeypatch)
    model = drawn(replace(SHAPE, num_layers=1, qk_norm=True))
    one, many = (
        GpuDecoder(copy.deepcopy(model), num_blocks=1, slots=1, graphs=False, project=by_project)
        for by_project in (True, False)
    )
    request = ScheduledRequest([7], 9)
    for position in range(2):
        span = Span(request, position, position + 1, (0,))
        assert close(one.forward([span]), many.forward([span]))
        request.tokens.append(8)


class Replayed:
    """In place of a CUDA graph: the step runs again, and writes where it wrote first."""

    def __init__(self, step: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        self.step, self.result, self.num_replays = step, step(), 0

    def replay(self) -> None:
        self.num_replays += 1
        for old, new in zip(self.result, self.step(), strict=True):
            old.copy_(new)


@pytest.mark.parametrize(
    ("graphs", "dtype", "qk_norm"), [(True, torch.float32, True), (False, torch.bfloat16, False)]
)
def interpreted_texts_continue_as_whole_texts_do(graphs, dtype, qk_norm, monkeypatch):
    """Prompts in chunks beside rows that decode, some scored; earlier requests left NaN in the cache.

    Each step begins before the host knows the tokens of the last one. With `graphs`, those whose prompts are
    not scored are padded to the rows of a graph.
    """
    one_program(monkeypatch)
    made: list[Replayed] = []

    def captured(steps, device):
        new = {size: Replayed(step) for size, step in steps.items()}
        made.extend(new.values())
        return {size: (graph, graph.result) for size, graph in new.items()}

    monkeypatch.setattr(decoders, "captured", captured)
    monkeypatch.setattr(decoders, "PROMPT_ROWS", (24,))
    model = drawn(replace(SHAPE, qk_norm=qk_norm)).to(dtype)
    whole = copy.deepcopy(model).float()
    decoder = GpuDecoder(model, num_blocks=8, slots=4, graphs=graphs, step_tokens=24)
    with torch.inference_mode():
        decoder._cache.fill_(torch.nan)
    scheduler = Scheduler(slots=4, cache_tokens=8 * BLOCK_TOKENS, step_tokens=24)
    draw, found, places, reads = random.Random(0), [], [], []
    for size, scored in ((20, False), (1, False), (33, True), (5, False)):
        tokens = [draw.randrange(97) for _ in range(size)]
        scheduler.add(ScheduledRequest(tokens, size + 9, scored=scored))
        for _ in range(3 if scored else 1):
            spans = scheduler.next_step()
            found += [row.clone() for row in decoder.forward(spans)]
            sampling = [span for span in spans if span.samples]
            read = decoder.choose([GREEDY] * len(sampling), [draw] * len(sampling))
            reads.append(([span.request for span in sampling], read))
            found += [row for part in decoder.scored() for row in part.clone()]
            places += [(span.request, span.stop) for span in sampling]
            places += [(s.request, s.start + row + 1) for s in spans for row in range(s.num_scored)]
            for requests, read in reads[-2:-1]:
                for request, token in zip(requests, read()[0], strict=True):
                    request.tokens.append(token)
    worst = 0.0
    for row, (request, stop) in zip(found, places, strict=True):
        with torch.no_grad():
            expected = whole(torch.tensor([request.tokens[:stop]]))[0, -1]
        worst = max(worst, ((row - expected).norm() / expected.norm()).item())
    assert worst < (1e-5 if dtype == torch.float32 else 0.06)
    assert sum(graph.num_replays for graph in made) == (4 if graphs else 0)
