"""Attention over pages by Triton, without a GPU: run by the interpreter against fp64, and compiled for GPUs.

As in tests/optim/kernels/test_gpu.py, a second pytest with TRITON_INTERPRET=1 runs the functions named
`interpreted_*`. All pages are NaN wherever a request has no token.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from serving.engine.gpu import attention
from serving.engine.scheduler import BLOCK_TOKENS
from tests.compiled_kernels import compiled, problems, run_interpreted
from tests.serving.engine.pages import Pages

HALF, SINGLE = torch.bfloat16, torch.float32
CPU = torch.device("cpu")

# --- compiled -----------------------------------------------------------------------------------------------


def variants(capability: tuple[int, int]) -> dict[str, attention.Call]:
    """Both kernels as the 1.4B model launches them, with grouped heads, and in fp32; on meta tensors."""
    size, num_heads, head_dim = 32, 16, 128

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    calls = {}
    for dtype in (HALF, SINGLE):
        q = empty(size, num_heads, head_dim, dtype=dtype)
        splits = size * num_heads * attention.MAX_SPLITS
        sums = empty(splits, head_dim, dtype=SINGLE), empty(splits, dtype=SINGLE)
        for num_kv_heads in (16, 4) if dtype == HALF else (4,):
            cache = empty(2, 64, num_kv_heads, BLOCK_TOKENS, head_dim, dtype=dtype)
            scratch = attention.DecodeScratch(*sums, arrived=empty(size, num_kv_heads))
            calls[f"decode, {num_kv_heads}, {dtype}"] = attention.decode_call(
                q, cache, empty(size, 64), empty(size), q,
                scratch=scratch, pdl=capability >= (9, 0), capability=capability,
            )  # fmt: skip
        for rows in (32, 4096) if dtype == HALF else (32,):
            q = empty(rows, num_heads, head_dim, dtype=dtype)
            calls[f"prefill, {dtype}, {rows}"] = attention.prefill_call(
                q, cache, empty(size, 64), empty(size, 4), q, capability=capability
            )
    return calls


@pytest.mark.stack
@pytest.mark.parametrize("capability", attention.TILES)
def test_every_variant_fits_the_gpu_and_copies_asynchronously(capability, tmp_path):
    found = {}
    for name, call in variants(capability).items():
        kernel = compiled(call, capability)
        found[name] = problems(kernel, capability, tmp_path)
        wanted = ["cp.async"]
        if name.startswith(f"prefill, {HALF}"):
            wanted.append({(8, 6): "mma.sync", (9, 0): "wgmma"}[capability])
        found[name] += [f"no {each}" for each in wanted if each not in kernel.asm["ptx"]]
    assert len(found) == 6
    assert {name: text for name, text in found.items() if text} == {}


# --- before a launch ----------------------------------------------------------------------------------------


def test_where_they_do_not_run_the_reason_is_named():
    def why_not(device, dtype, head_dim):
        return attention.unsupported(torch.device(device), dtype, head_dim)

    assert why_not("cuda", torch.float64, 128) == "attention in torch.float64 stays with torch"
    assert why_not("cuda", HALF, 80) == "attention with head_dim 80 stays with torch"
    assert why_not("cpu", HALF, 128) == "cpu is no CUDA device"


def test_operands_that_do_not_fit_are_an_error():
    cases = {
        "out is": {"out": torch.empty(2, 4, 32)},
        "differ in dtype": {"out": torch.empty(2, 4, 16, dtype=HALF)},
        "a layer's cache is": {"cache": torch.empty(2, 8, 16, BLOCK_TOKENS, 2)},
        "cannot share": {"cache": torch.empty(2, 8, 3, BLOCK_TOKENS, 16)},
        "must be contiguous": {"cache": torch.empty(2, 8, BLOCK_TOKENS, 2, 16).transpose(2, 3)},
        "channels of q": {"q": torch.empty(2, 16, 4).mT},
        "lengths must be int32": {"lengths": torch.empty(2, dtype=torch.int64)},
        "differ in requests": {"lengths": torch.empty(3, dtype=torch.int32)},
        "fewer than 2 requests": {"scratch": make_scratch(1, 4, 2, 16)},
    }
    right = {
        "q": torch.empty(2, 4, 16),
        "cache": torch.empty(2, 8, 2, BLOCK_TOKENS, 16),
        "blocks": torch.empty(2, 4, dtype=torch.int32),
        "lengths": torch.empty(2, dtype=torch.int32),
        "out": torch.empty(2, 4, 16),
        "scratch": make_scratch(2, 4, 2, 16),
    }
    attention.decode_call(**right, capability=(8, 6))
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            attention.decode_call(**right | wrong, capability=(8, 6))


def make_scratch(slots: int, num_heads: int, num_kv_heads: int, head_dim: int) -> attention.DecodeScratch:
    splits = slots * num_heads * attention.MAX_SPLITS
    arrived = torch.zeros(slots, num_kv_heads, dtype=torch.int32)
    return attention.DecodeScratch(torch.empty(splits, head_dim), torch.empty(splits), arrived)


def test_tiles_hold_every_row_once_and_the_longest_come_first():
    spans = [(7, 0, 130, 0), (137, 100, 101, 1), (138, 64, 128, 2), (0, 3, 10, 3)]
    tiles = attention.prefill_tiles(spans, rows=64)
    rows = sorted(row for first, number, _, _ in tiles for row in range(first, first + number))
    assert rows == list(range(202)) and max(number for _, number, _, _ in tiles) == 64
    positions = [position for _, _, position, _ in tiles]
    assert positions == sorted(positions, reverse=True)
    places = {(row, position, table) for row, _, position, table in tiles}
    assert places == {(7, 0, 0), (71, 64, 0), (135, 128, 0), (137, 100, 1), (138, 64, 2), (0, 3, 3)}


# --- by the interpreter -------------------------------------------------------------------------------------


@pytest.mark.stack
def test_the_kernels_compute_attention():
    run_interpreted(__file__, passes=9)


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Weights and results are rounded to `found`'s dtype, which the interpreter does by truncation."""
    error = (found.double() - exact).norm() / exact.norm()
    assert error <= (1e-6 if found.dtype == SINGLE else 4 * torch.finfo(found.dtype).eps / 2)


LENGTHS = (1, 31, 0, 32, 33, 150)  # 7 tiles of 64 keys, 10 of 32


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "dtype", "programs"),
    [
        (2, 64, SINGLE, 1),
        (2, 128, HALF, 7),
        (2, 64, HALF, 100),
        (16, 64, SINGLE, 100),  # 5 splits, added 4 at a time
        (8, 128, HALF, 7),
        (8, 64, HALF, 1),
    ],
)
def interpreted_decode(num_heads, head_dim, dtype, programs, monkeypatch):
    """1, 4 and 8 queries a head; for each program all tiles of a request, two, or one."""
    torch.manual_seed(num_heads + head_dim)
    tiles = replace(attention.TILES[8, 6], programs=programs)
    monkeypatch.setitem(attention.TILES, (8, 6), tiles)
    pages = Pages(LENGTHS, num_kv_heads=2, head_dim=head_dim, dtype=dtype, device=CPU)
    size = len(LENGTHS)
    sizes = {"num_heads": num_heads, "num_kv_heads": 2, "head_dim": head_dim}
    scratch = attention.decode_scratch(slots=size, **sizes, device=CPU)
    q = torch.randn(size, num_heads, 3 * head_dim).to(dtype)[:, :, :head_dim]  # a part of a wider row
    frame = torch.full((size + 2, num_heads, head_dim), torch.nan, dtype=dtype)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    for _ in range(2):  # the second finds the scratch as the first left it
        out = frame[1:-1].fill_(torch.nan)
        attention.decode_attention(q, pages.cache, pages.blocks, lengths, out, scratch=scratch)
        assert not scratch.arrived.any()
        for request, length in enumerate(LENGTHS):
            if length == 0:
                assert not out[request].any()
            else:
                exact = pages.exact(request, q[request, None], length - 1)[0]
                assert_near(out[request], exact)
        assert frame[0].isnan().all() and frame[-1].isnan().all()


# (start, stop): prompts, a chunk with its past, one that ends at a page's end, one token
SPANS = ((0, 70), (33, 100), (64, 96), (40, 41))


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "dtype"), [(2, 64, SINGLE), (8, 64, HALF), (1, 128, torch.float16)]
)
def interpreted_prefill(num_heads, head_dim, dtype):
    torch.manual_seed(num_heads + head_dim)
    stops = [stop for _, stop in SPANS]
    pages = Pages(stops, num_kv_heads=1, head_dim=head_dim, dtype=dtype, device=CPU)
    first, spans = 1, []
    for table, (start, stop) in enumerate(SPANS):
        spans.append((first, start, stop, table))
        first += stop - start
    q = torch.randn(first + 1, num_heads, head_dim).to(dtype)
    out = torch.full_like(q, torch.nan)
    rows = attention.prefill_rows(q.device, dtype, num_rows=len(q), num_heads=num_heads)
    tiles = torch.tensor(attention.prefill_tiles(spans, rows=rows), dtype=torch.int32)
    attention.prefill_attention(q, pages.cache, pages.blocks, tiles, out)
    for row, start, stop, table in spans:
        of_span = slice(row, row + stop - start)
        assert_near(out[of_span], pages.exact(table, q[of_span], start))
    assert out[0].isnan().all() and out[-1].isnan().all()
