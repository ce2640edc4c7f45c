"""Ceilings of a served model, shares of them, the table and the answer in one sentence. No torch."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster import display
from cluster.measure import hardware, intervals

SUMMARY_FILE = "summary.json"  # of a benchmark's run directory
WIDTH = 120  # characters of the table, at most
Column = tuple[str, str, str]  # header, key of a point, format
COLUMNS: tuple[Column, ...] = (
    ("load", "load", "{}"),
    ("ok/all", "counts", "{}"),
    ("out tok/s", "output_tokens_per_second", "{:,.0f}"),
    ("TTFT p50", "ttft_p50_ms", "{:,.1f}"),
    ("TTFT p99", "ttft_p99_ms", "{:,.1f}"),
    ("TPOT p50", "tpot_p50_ms", "{:,.2f}"),
    ("TPOT p99", "tpot_p99_ms", "{:,.2f}"),
    ("ITL p99", "itl_p99_ms", "{:,.2f}"),
    ("E2E p99", "e2e_p99_ms", "{:,.0f}"),
    ("goodput/s", "goodput_per_second", "{:.2f}"),
    ("SLO met", "attainment", "{:.0%}"),
    ("MBU", "mbu", "{:.1%}"),
    ("MFU", "prefill_mfu", "{:.1%}"),
    ("J/token", "joules_per_token", "{:.3g}"),
)
DISPENSABLE = (  # the first to leave a wide table
    *("itl_p99_ms", "e2e_p99_ms", "tpot_p50_ms", "ttft_p50_ms"),
    *("goodput_per_second", "joules_per_token", "mbu"),
)
INTERVALS = (  # figures of which repeats give an interval
    *("output_tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"),
    *("goodput_per_second", "requests_per_second", "e2e_p50_ms", "e2e_p99_ms", "joules_per_token", "mbu"),
)


FORMULAS = """\
MBU: (steps * weight bytes + cached tokens that each step reads * KV bytes) / seconds of decoding / bandwidth
MFU: FLOPs that the first token after the median prompt needs / TTFT p50 / peak, at concurrency 1"""


def ceilings(info: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """What the hardware allows a model, by its datasheet if there is one, else by measurement.

    Args:
        info: `serving.engine.protocol.EngineInfo` as a mapping.
        measured: "device", and "product_dtype", "product_tflops" and "read_gb_per_s" of
        `cluster.measure.probe`.

    Returns:
        `product_dtype`, `product_tflops`, `gb_per_s` and their `source`; `step_ms`: the least time of a
        decoding step with an empty cache, weight_bytes / bandwidth; `decode_tokens_per_second`: one sequence
        at that; and `prefill_tokens_per_second`: peak / FLOPs that every token of a prompt takes, an upper
        bound, because attention and what the last token takes come on top.
    """
    device = hardware.lookup(str(measured["device"]))
    if device is not None:
        tflops, gb_per_s, source = device.bf16_tflops, device.memory_gb_per_s, f"datasheet, {device.source}"
        dtype = "bfloat16"
    else:
        dtype, tflops, gb_per_s = (
            measured[name] for name in ("product_dtype", "product_tflops", "read_gb_per_s")
        )
        source = "measured here (cluster.measure.probe); no datasheet entry"
    step_seconds = info["weight_bytes"] / (gb_per_s * 1e9)
    return {
        "device": measured["device"],
        "product_dtype": dtype,
        "product_tflops": tflops,
        "gb_per_s": gb_per_s,
        "source": source,
        "step_ms": 1e3 * step_seconds,
        "decode_tokens_per_second": 1 / step_seconds,
        "prefill_tokens_per_second": tflops * 1e12 / (info["flops_per_token"] - last_flops(info)),
    }


def last_flops(info: Mapping[str, Any]) -> int:
    """FLOPs of products with weights that a prompt takes once, for its last token."""
    return info["head_flops"] + info["last_token_flops"]


def prefill_flops(info: Mapping[str, Any], prompt_tokens: float) -> float:
    """FLOPs that prefilling needs: `LlamaShape.prefill_flops`, computed from an engine's info."""
    once, last = last_flops(info), info["last_attention_flops"]
    attention = (info["attention_flops"] - last) * prompt_tokens**2 / 2 + last * prompt_tokens
    return (info["flops_per_token"] - once) * prompt_tokens + once + attention


def shares(
    point: Mapping[str, Any], info: Mapping[str, Any], ceiling: Mapping[str, Any], *, replicas: int = 1
) -> dict[str, Any]:
    """MBU of decoding and MFU of prefilling at a point; empty if nothing was decoded.

    mbu = (decode_steps · weight_bytes + decode_context_tokens/engines · kv_bytes_per_token)
    / decode_seconds / bandwidth: of the requests that were really decoding (`serving.bench.latency`), since
    slots and cache may hold fewer than are in flight. The time of prompts that are prefilled meanwhile
    counts. prefill_mfu = `prefill_flops` of the median prompt / TTFT p50 / peak, at concurrency 1 alone,
    where the time to the first token is that of one prompt and what the endpoint adds to it.

    Args:
        replicas: engines that share the load evenly.
    """
    concurrency = point.get("concurrency")
    if not point["decode_seconds"]:
        return {}
    context_tokens = point["decode_context_tokens"] / min(replicas, concurrency or replicas)
    num_bytes = point["decode_steps"] * info["weight_bytes"] + context_tokens * info["kv_bytes_per_token"]
    found = {
        "mbu": hardware.mbu(
            bytes_per_step=num_bytes,
            step_seconds=point["decode_seconds"],
            gb_per_s=ceiling["gb_per_s"],
        )
    }
    if concurrency == 1 and point["ttft_p50_ms"] is not None:
        flops_per_s = prefill_flops(info, point["prompt_tokens_p50"]) / (point["ttft_p50_ms"] / 1e3)
        found["prefill_mfu"] = flops_per_s / (ceiling["product_tflops"] * 1e12)
    return found


def faults(points: Sequence[dict[str, Any]]) -> list[str]:
    """For each ceiling of which a point reached more than 100%: what is wrong with it.

    The shares of such a ceiling are void: they become None in `points`.
    """
    found = []
    for key, ceiling in (("mbu", "bandwidth"), ("prefill_mfu", "peak")):
        known = [point for point in points if point.get(key) is not None]
        reached = {str(point["load"]): point[key] for point in sorted(known, key=lambda each: each[key])}
        if fault := hardware.ceiling_fault(reached, ceiling=ceiling):
            found.append(fault)
            for point in points:
                point.update({key: None} if key in point else {})
    return found


def describe(info: Mapping[str, Any], ceiling: Mapping[str, Any]) -> display.Table:
    """The model, the engine and the ceilings, for people."""
    details = ", ".join(f"{name} {value}" for name, value in info["details"].items())
    peak = f"{display.number(ceiling['product_tflops'])} TFLOP/s in {ceiling['product_dtype']}"
    once = last_flops(info)
    flops = info["flops_per_token"] - once
    rows = [
        ("model", f"{info['model']}, {info['num_parameters']:,} parameters, {info['dtype']}"),
        ("engine", f"{info['engine']} on {info['device']}: {details}"),
        ("ceilings", f"{peak}, {display.number(ceiling['gb_per_s'])} GB/s ({ceiling['source']})"),
        (
            "decoding",
            f"{info['weight_bytes'] / 1e6:,.1f} MB of weights a step: at least "
            f"{display.number(ceiling['step_ms'])} ms, at most "
            f"{ceiling['decode_tokens_per_second']:,.0f} tok/s each",
        ),
        (
            "prefilling",
            f"{flops / 1e6:,.1f} MFLOP a token, and {once / 1e6:,.1f} for the last: at most "
            f"{ceiling['prefill_tokens_per_second']:,.0f} tok/s",
        ),
    ]
    return display.pairs(rows)


def combined(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each load: closed loops by concurrency, then open loops by rate, then traces.

    Of several repeats a row has the geometric mean of every figure in INTERVALS, with its 95% interval in
    `intervals` (`cluster.measure.intervals.of_rate`), the sums of the counts, and of other numbers the mean.
    Repeats in which the load generator lagged do not count, if there are others.
    """
    loads: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for point in points:  # rates of a search may be so close that they have one name
        loads.setdefault((point["load"], point.get("rate")), []).append(point)
    rows = []
    for all_repeats in loads.values():
        repeats = [point for point in all_repeats if "refused" not in point] or all_repeats[:1]
        rows.append(_combined(repeats) if len(repeats) > 1 else dict(repeats[0]))
    return sorted(rows, key=_place)


def _place(row: Mapping[str, Any]) -> tuple[float, float]:
    unset = float("inf")
    return (row.get("concurrency") or unset, row.get("rate") or unset)


def _combined(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = dict(repeats[0]) | {"repeats": len(repeats), "intervals": {}}
    for key in row:
        values: list[Any] = [repeat.get(key) for repeat in repeats]
        measured = [type(value) in (int, float) for value in values]
        if not all(measured):
            if any(measured):  # a repeat lacks the figure: there is no mean of all
                row[key] = None
            continue
        if key in ("requests", "succeeded", "short_answers"):
            row[key] = sum(values)
        elif key in INTERVALS and min(values) > 0:
            interval = intervals.of_rate(values)
            row[key] = interval.centre
            row["intervals"][key] = [interval.centre, interval.low, interval.high]
        elif key not in ("concurrency", "rate"):
            row[key] = sum(values) / len(values)
    row["counts"] = f"{row['succeeded']}/{row['requests']}"
    row["errors"] = dict(sum((Counter(repeat["errors"]) for repeat in repeats), Counter()))
    row["over_saturated"] = any(repeat.get("over_saturated") for repeat in repeats)
    row["first_error"] = next((r["first_error"] for r in repeats if r["first_error"]), None)
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> display.Table:
    """The loads, one a line; latencies in milliseconds."""

    def cell(row: Mapping[str, Any], key: str, form: str) -> str | None:
        return None if row.get(key) is None else form.format(row[key])

    shown = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    return _fitting(shown, rows, cell)


def _fitting(
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    cell: Callable[[Mapping[str, Any], str, str], str | None],
) -> display.Table:
    """A table of `cell` of every row and column. DISPENSABLE columns are left out above WIDTH."""
    for dispensable in (None, *DISPENSABLE):
        columns = [column for column in columns if column[1] != dispensable]
        cells = [[cell(row, key, form) for _, key, form in columns] for row in rows]
        found = display.table([header for header, _, _ in columns], cells, left=())
        if len(str(found).partition("\n")[0]) <= WIDTH:
            break
    return found


def intervals_table(rows: Sequence[Mapping[str, Any]]) -> display.Table | None:
    """The 95% intervals of loads that were repeated, or None."""

    def cell(row: Mapping[str, Any], key: str, form: str) -> str | None:
        if key == "load":
            return row[key]
        _, low, high = row["intervals"].get(key, (None, None, None))
        return None if low is None else f"{form.format(low)} to {form.format(high)}"

    repeated = [row for row in rows if row.get("intervals")]
    known = [column for column in COLUMNS if any(column[1] in row["intervals"] for row in repeated)]
    return _fitting([("95% interval", "load", "{}"), *known], repeated, cell) if known else None


def answer(model: str, rows: Sequence[Mapping[str, Any]], slo: Mapping[str, Any], knee: float | None) -> str:
    """The result in one sentence.

    Args:
        knee: the highest rate of a search that met the SLO, requests per second.
    """
    good = [row for row in rows if row.get("succeeded")]
    if not good:
        return f"{model}: nothing was measured."
    limits = [f"{name.removesuffix('_ms').upper()} {value:g} ms" for name, value in slo.items()
              if name.endswith("_ms") and value is not None]  # fmt: skip
    at_knee = next((row for row in good if knee is not None and row.get("rate") == knee), None)
    if at_knee is not None:
        row = at_knee
        limits.append(f"by {slo['attainment']:.0%} of requests" if limits else "which has no limits")
        text = f"{model} meets the SLO ({', '.join(limits)}) up to {knee:.2f} requests/s"
    else:
        row = max(good, key=lambda each: each["output_tokens_per_second"])
        text = f"{model} was fastest at {row['load']}" if len(good) > 1 else f"{model}, {row['load']}"
    text += f": {row['output_tokens_per_second']:,.0f} output tokens/s"
    if row.get("ttft_p99_ms") is not None:
        text += f", TTFT p99 {display.number(row['ttft_p99_ms'])} ms"
    for key, form in (("mbu", "MBU {:.1%}"), ("joules_per_token", "{:.3g} J per output token")):
        text += f", {form.format(row[key])}" if row.get(key) is not None else ""
    saturated = [each["load"] for each in rows if each.get("over_saturated")]
    if saturated:
        text += f"; over-saturated (its queue grew) at {', '.join(saturated)}"
    failed = sum(each.get("requests", 0) - each.get("succeeded", 0) for each in rows)
    if failed:
        text += f"; {failed} of {sum(each.get('requests', 0) for each in rows)} requests failed"
    short = sum(each.get("short_answers", 0) for each in rows)
    if short:
        text += f"; {short} answers ended before the length that was asked for"
    return f"{text}."
