"""Ceilings of a served model, and the table and pictures of what was measured against them. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import display
from cluster.measure import hardware

COLUMNS = (  # header, key of a point, format
    ("load", "load", "{}"),
    ("ok/all", "counts", "{}"),
    ("out tok/s", "output_tokens_per_second", "{:,.0f}"),
    ("total tok/s", "total_tokens_per_second", "{:,.0f}"),
    ("TTFT p50", "ttft_p50_ms", "{:,.1f}"),
    ("TTFT p90", "ttft_p90_ms", "{:,.1f}"),
    ("TTFT p99", "ttft_p99_ms", "{:,.1f}"),
    ("TPOT p50", "tpot_p50_ms", "{:,.2f}"),
    ("TPOT p90", "tpot_p90_ms", "{:,.2f}"),
    ("TPOT p99", "tpot_p99_ms", "{:,.2f}"),
    ("ITL p50", "itl_p50_ms", "{:,.2f}"),
    ("ITL p99", "itl_p99_ms", "{:,.2f}"),
    ("E2E p50", "e2e_p50_ms", "{:,.0f}"),
    ("E2E p99", "e2e_p99_ms", "{:,.0f}"),
    ("goodput/s", "goodput_per_second", "{:.2f}"),
    ("SLO met", "attainment", "{:.0%}"),
    ("MBU", "mbu", "{:.1%}"),
    ("MFU", "prefill_mfu", "{:.1%}"),
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
    """MBU of decoding and MFU of prefilling at a closed-loop point; empty for an open loop.

    mbu = (decode_steps · weight_bytes + decode_context_tokens/engines · kv_bytes_per_token)
    / decode_seconds / bandwidth: of the requests that were really decoding (`serving.bench.latency`), since
    slots and cache may hold fewer than are in flight. The time of prompts that are prefilled meanwhile
    counts. prefill_mfu = `prefill_flops` of the median prompt / TTFT p50 / peak, at concurrency 1 alone,
    where the time to the first token is that of one prompt and what the endpoint adds to it.

    Args:
        replicas: engines that share the load evenly.
    """
    concurrency = point.get("concurrency")
    if concurrency is None or not point["decode_seconds"]:
        return {}
    context_tokens = point["decode_context_tokens"] / min(replicas, concurrency)
    num_bytes = point["decode_steps"] * info["weight_bytes"] + context_tokens * info["kv_bytes_per_token"]
    found = {
        "mbu": hardware.mbu(
            bytes_per_step=num_bytes,
            step_seconds=point["decode_seconds"],
            gb_per_s=ceiling["gb_per_s"],
        )
    }
    if concurrency == 1:
        flops_per_s = prefill_flops(info, point["prompt_tokens_p50"]) / (point["ttft_p50_ms"] / 1e3)
        found["prefill_mfu"] = flops_per_s / (ceiling["product_tflops"] * 1e12)
    return found


def faults(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each ceiling of which a point reached more than 100%: what is wrong with it."""
    found = []
    for key, ceiling in (("mbu", "bandwidth"), ("prefill_mfu", "peak")):
        reached = {str(point["load"]): point[key] for point in points if point.get(key) is not None}
        found.append(hardware.ceiling_fault(reached, ceiling=ceiling))
    return [fault for fault in found if fault]


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


def table(points: Sequence[Mapping[str, Any]]) -> display.Table:
    """The measurements, one a line; latencies in milliseconds."""
    shown = [column for column in COLUMNS if any(point.get(column[1]) is not None for point in points)]
    rows = [
        [None if point.get(key) is None else form.format(point[key]) for _, key, form in shown]
        for point in points
    ]
    return display.table([header for header, _, _ in shown], rows, left=())


def plot(
    points: Sequence[Mapping[str, Any]], itls: Mapping[str, Sequence[float]], folder: Path
) -> list[Path]:
    """latency.png (against the rate of the open-loop points) and itl.png (a histogram for each load).

    Args:
        itls: load -> gaps between tokens, seconds.
    """
    for name in ("latency.png", "itl.png"):  # those of an earlier run of this name
        (folder / name).unlink(missing_ok=True)
    made = []
    measured = [point for point in points if point.get("ttft_p50_ms") is not None]
    rated = sorted((p for p in measured if p.get("rate") is not None), key=lambda p: p["rate"])
    if rated:
        figure, panels = display.figure(10, 4, columns=2)
        for panel, name in zip(panels, ("ttft", "tpot"), strict=True):
            for percent in (50, 90, 99):
                values = [p[f"{name}_p{percent}_ms"] for p in rated]
                panel.plot([p["rate"] for p in rated], values, marker="o", label=f"p{percent}")
            panel.set(xlabel="requests per second", ylabel=f"{name.upper()} (ms)")
            panel.set_ylim(bottom=0)
            panel.legend()
        made.append(display.save(figure, folder / "latency.png"))
    filled = {load: gaps for load, gaps in itls.items() if gaps}
    if filled:
        figure, [axes] = display.figure(8, 4.5)
        for load, gaps in filled.items():
            milliseconds = [1e3 * gap for gap in gaps]
            axes.hist(milliseconds, bins=60, histtype="step", density=True, label=load)
        axes.set(xlabel="ITL (ms)", ylabel="density", yscale="log")
        axes.legend(fontsize=8)
        made.append(display.save(figure, folder / "itl.png"))
    return made
