"""The figures of a baseline: rates with what bounds them, their shares of the ceilings, and their price."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster import display
from cluster.measure import hardware
from cluster.measure.probe import LINK_PEAK
from training.baseline.plan import BaselineConfig
from training.model import shapes

ALONE = ", during communication alone"  # end of the name of a link's share


def figures(
    cells: Sequence[Mapping[str, Any]], result: Mapping[str, Any], config: BaselineConfig
) -> list[dict[str, Any]]:
    """Rates with what bounds them, one value per round.

    Each has `id`, `unit`, `values` (of one device), `input` (the origin of its weights, in training of its
    data; `cluster.record.origins`), `flops` and `bytes` (the least per unit of work; `bytes`
    is None in training, where work does not pass through memory once per unit), in training `ranks`, `nodes`
    and `link_bytes` (see `_trained`), `joules_per_token` and `cost_per_million_tokens` (None if unknown),
    `shares` of each ceiling, by name, and the `command`.
    """
    found: list[dict[str, Any]] = []
    for cell in cells:
        if cell["rounds"]:
            found += [_trained(cell)] if cell["kind"] == "training" else _served(cell)
    for figure in found:
        figure["shares"] = shares(figure, result["ceilings"], result["hardware"]["datasheet"])
        figure["cost_per_million_tokens"] = _cost(figure, config)
        energy = " and energy" if figure["joules_per_token"] and config.cost.kwh else ""
        figure["cost_of"] = f"{config.cost.currency}, device hours{energy}"
    return found


def _trained(cell: Mapping[str, Any]) -> dict[str, Any]:
    """`link_bytes`: through the busiest link while a device takes one token; None where they are not counted.

    In a node that link is a rank's, on several it is a node's to the others. The bytes are what collectives
    need at the least (training/projection/traffic.py), the same that bus bandwidths count: rate x
    `link_bytes` / bus bandwidth is the link's share of a step.
    """
    rows = cell["rounds"]
    nodes = rows[0]["num_nodes"]
    devices = rows[0]["num_workers"] if rows[0]["on_gpu"] else nodes  # the ranks of a CPU share it
    sent = rows[0]["sent_bytes_per_step" if nodes == 1 else "node_bytes_per_step"]
    joules = _known([row["joules_per_step"] for row in rows])
    times = {
        part: statistics.median(row[f"seconds_{part}"] / row["phased_step_seconds"] for row in rows)
        for part in ("compute", "communication", "optimizer", "data")
    }
    whole = max(1.0, sum(times.values()))  # medians of rounds, one part of which was held up, may exceed 1
    times = {part: share / whole for part, share in times.items()}
    return {
        "id": cell["id"],
        "kind": "training",
        "shape": cell["shape"],
        "model": cell["model"],
        "unit": "tokens/s per device",
        "values": [row["tokens_per_step"] / row["step_seconds"] / devices for row in rows],
        "devices": devices,
        **{key: rows[0][key] for key in ("precision", "zero_stage", "micro_sequences", "accumulation")},
        "tokens_per_step": rows[0]["tokens_per_step"],
        "flops": rows[0]["flops_per_token"],
        "bytes": None,
        "ranks": rows[0]["num_workers"],
        "nodes": nodes,
        "link_bytes": None if sent is None else sent * devices / rows[0]["tokens_per_step"],
        "input": rows[0].get("input"),
        "attention_kernel": rows[0].get("attention_kernel"),
        "communication_seconds": [row["seconds_communication"] for row in rows],
        "joules_per_token": joules and [each / rows[0]["tokens_per_step"] for each in joules],
        "step_seconds": [row["step_seconds"] for row in rows],
        "step_seconds_p10": [row["step_seconds_p10"] for row in rows],
        "step_seconds_p90": [row["step_seconds_p90"] for row in rows],
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
        "time_shares": {**times, "other": 1 - sum(times.values())},
        "command": cell["command"],
    }


def _served(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    rows = cell["rounds"]
    info = rows[0]["info"]
    shape = shapes.resolve(cell["model"])
    for place, point in enumerate(rows[0]["points"]):
        points = [row["points"][place] for row in rows]
        batch, prompt, context = point["batch"], point["prompt_tokens"], point["mean_context"]
        common = {
            "shape": cell["shape"],
            "unit": "tokens/s per device",
            "devices": 1,
            "batch": batch,
            "input": rows[0].get("input"),
            "attention_kernel": info.get("details", {}).get("attention"),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
            "command": cell["command"],
        }
        found += [
            {
                **common,
                "id": f"prefill/{cell['shape']}/batch {batch}",
                "kind": "prefill",
                "values": [p["prefill_tokens_per_second"] for p in points],
                "joules_per_token": _known([p["joules_per_token_prefill"] for p in points]),
                "flops": shape.prefill_flops(prompt) / prompt,
                "bytes": info["weight_bytes"] / (batch * prompt),
                "ttft_ms": [p["ttft_ms"] for p in points],
            },
            {
                **common,
                "id": f"decode/{cell['shape']}/batch {batch}",
                "kind": "decode",
                "values": [p["decode_tokens_per_second"] for p in points],
                "joules_per_token": _known([p["joules_per_token_decode"] for p in points]),
                "flops": shape.decode_flops(context),
                # of the weights as they lie in memory, which may be wider than what is computed in
                "bytes": info["weight_bytes"] / batch + context * info["kv_bytes_per_token"],
                "itl_ms": [p["itl_ms"] for p in points],
            },
        ]
    return found


def shares(
    figure: Mapping[str, Any], ceilings: Mapping[str, Any], datasheet: Mapping[str, Any] | None
) -> dict[str, list[float]]:
    """Denominator -> share of it in each round: FLOPs or bytes per second over the ceiling's."""
    peaks = {}
    if ceilings["product_tflops"]:
        peaks["MFU of measured product"] = ("flops", ceilings["product_tflops"]["best"] * 1e12)
    if ceilings["read_gb_per_s"]:
        peaks["MBU of measured read"] = ("bytes", ceilings["read_gb_per_s"]["best"] * 1e9)
    if own := ceilings["products_tflops"].get(figure.get("model")):
        peaks["MFU of measured products of this model"] = ("flops", own["best"] * 1e12)
    if datasheet:
        peaks["MFU of datasheet"] = ("flops", datasheet["bf16_tflops"] * 1e12)
        peaks["MBU of datasheet"] = ("bytes", datasheet["memory_gb_per_s"] * 1e9)
    found = {
        name: [value * figure[work] / peak for value in figure["values"]]
        for name, (work, peak) in peaks.items()
        if figure[work] is not None
    }
    return found | _link_shares(figure, ceilings)


def faults(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ceilings that the median of a figure exceeds, which therefore are wrong.

    A link's share during communication alone may exceed 100%: transfers that overlap with computation count
    their bytes, but not their time.
    """
    reached: dict[str, dict[str, float]] = {}
    for figure in figures:
        for name, values in figure["shares"].items():
            if not name.endswith(ALONE):
                reached.setdefault(name, {})[figure["id"]] = statistics.median(values)
    found = (hardware.ceiling_fault(shares, ceiling=name) for name, shares in reached.items())
    return [fault for fault in found if fault]


def _link_shares(figure: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of the measured link, in each round: over the whole step, and while collectives ran and nothing else.

    Both count the bytes of collectives that overlap with computation; only the first counts their time.
    """
    across = figure.get("nodes", 1) > 1
    links = ceilings.get("links_between_nodes" if across else "links") or {}
    sent = figure.get("link_bytes")
    if not sent or links.get("num_ranks", 0) < figure["nodes" if across else "ranks"]:
        return {}
    peak = links[LINK_PEAK]["best"] * 1e9
    ends = f"{links['num_ranks']} {'nodes' if across else 'ranks'}"
    name = f"share of measured {'network' if across else 'link'}: all-reduce bus bandwidth, {ends}"
    found = {name: [value * sent / peak for value in figure["values"]]}
    alone = figure["communication_seconds"]
    if all(alone):
        step = sent * figure["tokens_per_step"] / figure["devices"]
        found[name + ALONE] = [step / seconds / peak for seconds in alone]
    return found


def _known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _cost(figure: Mapping[str, Any], config: BaselineConfig) -> float | None:
    """Price of a million tokens: device hours and, where energy was measured, kilowatt hours."""
    if config.cost.device_hour is None:
        return None
    hours = 1e6 / statistics.median(figure["values"]) / 3600
    energy = statistics.median(figure["joules_per_token"]) if figure["joules_per_token"] else 0.0
    return hours * config.cost.device_hour + energy * 1e6 / 3.6e6 * (config.cost.kwh or 0.0)


def rates(figure: Mapping[str, Any]) -> tuple[float, float, float]:
    """Median, least and most of the rounds."""
    values = figure["values"]
    return statistics.median(values), min(values), max(values)


def shares_text(figure: Mapping[str, Any]) -> str:
    """The median share of each ceiling, in words."""
    return ", ".join(f"{name} {statistics.median(part):.1%}" for name, part in figure["shares"].items())


def table(figures: Iterable[Mapping[str, Any]]) -> display.Table:
    """The figures, for people."""
    rows = ((each["id"], *(display.number(n) for n in rates(each)), shares_text(each)) for each in figures)
    return display.table(("", "tokens/s", "min", "max", "shares"), rows, left=(0, 4))
