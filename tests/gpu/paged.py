"""Block 2, second part: attention over pages against fp64, and at what rate it reads and multiplies.

All places without a token are NaN, and so is the output before each launch.
"""

from functools import partial
from math import nan

import torch

from serving.engine.gpu import attention
from serving.engine.gpu.attention import decode_attention, decode_scratch, prefill_attention
from tests.gpu.block import Run, error_of, worst_of
from tests.serving.engine.pages import Pages

# Weights and results are rounded. Triton's interpreter truncates, which doubles the error.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-19}
LENGTHS = {"cuda": (1, 31, 32, 33, 64, 500, 1999, 2000, 4000), "cpu": (1, 33, 70)}
SPANS = {"cuda": ((0, 1), (0, 1000), (700, 1333), (64, 96), (1500, 1700)), "cpu": ((0, 40), (33, 70))}
HALF, SINGLE = torch.bfloat16, torch.float32
CASES = {  # dtype, queries a head of the cache
    "cuda": ((HALF, 1), (HALF, 4), (torch.float16, 1), (SINGLE, 1), (SINGLE, 4)),
    "cpu": ((HALF, 1), (SINGLE, 4)),
}
REPEATS = {"cuda": 10, "cpu": 2}  # of one step: its programs end in another order each time


def measure(run: Run) -> None:
    reason = attention.unsupported(run.device, torch.bfloat16, run.shape.head_dim)
    if reason is not None:
        run.row("attention over pages", result=reason)
        return
    run.attempt(decoding, prefilling, decoding_rate, prefilling_rate)


def _of(dtype: torch.dtype, group: int) -> str:
    return f"{str(dtype).removeprefix('torch.')}, {group} queries a head"


def decoding(run: Run) -> None:
    lengths = LENGTHS[run.device.type]
    sizes = {"num_heads": run.shape.num_heads, "head_dim": run.shape.head_dim}
    for dtype, group in CASES[run.device.type]:
        heads = {"num_kv_heads": sizes["num_heads"] // group}
        pages = Pages(lengths, **heads, head_dim=sizes["head_dim"], dtype=dtype, device=run.device)
        scratch = decode_scratch(slots=len(lengths), **sizes, **heads, device=run.device)
        q = run.random(len(lengths), *sizes.values(), dtype=dtype)
        outs = [torch.full_like(q, nan) for _ in range(REPEATS[run.device.type])]
        visible = torch.tensor(lengths, dtype=torch.int32, device=run.device)
        for out in outs:
            decode_attention(q, pages.cache, pages.blocks, visible, out, scratch=scratch)
        error = 0.0
        for request, length in enumerate(lengths):
            exact = pages.exact(request, q[request, None], length - 1)[0]
            error = worst_of(error, error_of(outs[0][request], exact))
        differ = sum(not torch.equal(out, outs[0]) for out in outs)
        _report(run, f"decode_attention {_of(dtype, group)}", dtype, error, steps_that_differ=differ)


def prefilling(run: Run) -> None:
    spans = SPANS[run.device.type]
    num_heads, head_dim = run.shape.num_heads, run.shape.head_dim
    for dtype, group in CASES[run.device.type]:
        stops = [stop for _, stop in spans]
        pages = Pages(
            stops, num_kv_heads=num_heads // group, head_dim=head_dim, dtype=dtype, device=run.device
        )
        rows, first = [], 0
        for table, (start, stop) in enumerate(spans):
            rows.append((first, start, stop, table))
            first += stop - start
        q = run.random(first, num_heads, head_dim, dtype=dtype)
        out = torch.full_like(q, nan)
        prefill_attention(q, pages.cache, pages.blocks, _tiles(run, rows, dtype), out)
        error = 0.0
        for row, start, stop, table in rows:
            part = slice(row, row + stop - start)
            error = worst_of(error, error_of(out[part], pages.exact(table, q[part], start)))
        _report(run, f"prefill_attention {_of(dtype, group)}", dtype, error)


def _report(run: Run, case: str, dtype: torch.dtype, error: float, steps_that_differ: int = 0) -> None:
    problem = (
        None if error <= TOLERANCE[dtype] else f"relative error {error:.2g} above {TOLERANCE[dtype]:.2g}"
    )
    if steps_that_differ:
        problem = f"{steps_that_differ} steps gave other bits than the first"
    run.row(case, problem=problem, relative_error=error, tolerance=TOLERANCE[dtype])


def _tiles(run: Run, spans: list[tuple[int, int, int, int]], dtype: torch.dtype) -> torch.Tensor:
    num_rows = sum(stop - start for _, start, stop, _ in spans)
    rows = attention.prefill_rows(run.device, dtype, num_rows=num_rows, num_heads=run.shape.num_heads)
    return torch.tensor(attention.prefill_tiles(spans, rows=rows), dtype=torch.int32, device=run.device)


# --- rates --------------------------------------------------------------------------------------------------


def decoding_rate(run: Run) -> None:
    """Some layers in turn, so that the level-2 cache holds none of them."""
    size, context, layers = (32, 2000, 4) if run.gpu else (2, 40, 1)
    shape, dtype = run.shape, torch.bfloat16
    sizes = {"num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    pages = [
        Pages([context] * size, **sizes, dtype=dtype, device=run.device, seed=seed) for seed in range(layers)
    ]
    scratch = decode_scratch(slots=size, num_heads=shape.num_heads, **sizes, device=run.device)
    q = run.random(size, shape.num_heads, shape.head_dim, dtype=dtype)
    out = torch.empty_like(q)
    lengths = torch.full((size,), context, dtype=torch.int32, device=run.device)

    def step() -> None:
        for layer in pages:
            decode_attention(q, layer.cache, layer.blocks, lengths, out, scratch=scratch)

    seconds = run.seconds_of(step, repeats=REPEATS[run.device.type])[0] / layers
    gb_per_s = 4 * size * context * shape.num_kv_heads * shape.head_dim / seconds / 1e9
    shares = run.of_memory(gb_per_s, measured="read")
    case = f"decode_attention, {size} x {context} tokens"
    run.row(case, ms=1e3 * seconds, gb_per_s=gb_per_s, **shares)


def prefilling_rate(run: Run) -> None:
    num, context = (4, 2048) if run.gpu else (1, 40)
    shape, dtype = run.shape, torch.bfloat16
    pages = Pages(
        [context] * num, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, dtype=dtype,
        device=run.device,
    )  # fmt: skip
    q = run.random(num * context, shape.num_heads, shape.head_dim, dtype=dtype)
    out = torch.empty_like(q)
    tiles = _tiles(run, [(index * context, 0, context, index) for index in range(num)], dtype)
    step = partial(prefill_attention, q, pages.cache, pages.blocks, tiles, out)
    seconds = run.seconds_of(step, repeats=REPEATS[run.device.type])[0]
    tflops = 2 * num * context**2 * shape.num_heads * shape.head_dim / seconds / 1e12
    case = f"prefill_attention, {num} x {context} tokens"
    run.row(case, ms=1e3 * seconds, tflops=tflops, **run.of_products(tflops))
