"""Pictures of a benchmark: latency and failures over the rate, and the gaps between tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import display

SLO_STYLE = {"color": "black", "linestyle": "--", "linewidth": 1}


def plot(
    rows: Sequence[Mapping[str, Any]],
    itls: Mapping[str, Sequence[float]],
    folder: Path,
    *,
    model: str,
    slo: Mapping[str, Any],
) -> list[Path]:
    """latency.png (of the loads with a rate) and itl.png (the distribution of each load).

    Args:
        rows: of `serving.bench.report.combined`.
        itls: load -> gaps between tokens, seconds.
        slo: `ttft_ms`, `tpot_ms` and `attainment`; None: no limit.
    """
    for name in ("latency.png", "itl.png"):  # those of an earlier run of this name
        (folder / name).unlink(missing_ok=True)
    made = []
    rated = [row for row in rows if row.get("rate") is not None and row.get("requests")]
    if rated:
        made.append(_latencies(rated, folder / "latency.png", model=model, slo=slo))
    filled = {load: gaps for load, gaps in itls.items() if gaps}
    if filled:
        made.append(_gaps(filled, folder / "itl.png", model=model, slo=slo))
    return made


def _latencies(rated: Sequence[Mapping[str, Any]], path: Path, *, model: str, slo: Mapping[str, Any]) -> Path:
    figure, panels = display.figure(15, 4, columns=3)
    for panel, name in zip(panels, ("ttft", "tpot"), strict=False):
        for percent in (50, 90, 99):
            key = f"{name}_p{percent}_ms"
            there = [row for row in rated if row.get(key) is not None]
            panel.plot([r["rate"] for r in there], [r[key] for r in there], marker="o", label=f"p{percent}")
        if slo.get(f"{name}_ms") is not None:
            panel.axhline(slo[f"{name}_ms"], label="SLO", **SLO_STYLE)
        for row in rated:  # the curves are of requests that succeeded: where others failed, they say less
            if row["succeeded"] < row["requests"]:
                panel.axvline(row["rate"], color="red", alpha=0.25, linewidth=6)
        panel.set(xlabel="requests per second", ylabel=f"{name.upper()} (ms)")
        panel.set_ylim(bottom=0)
        panel.legend()
    rates = [row["rate"] for row in rated]
    panels[2].plot(rates, [100 * row["attainment"] for row in rated], marker="o", label="met the SLO")
    failed = [100 * (1 - row["succeeded"] / row["requests"]) for row in rated]
    panels[2].plot(rates, failed, marker="x", color="red", label="failed")
    panels[2].axhline(100 * slo["attainment"], label="SLO", **SLO_STYLE)
    panels[2].set(xlabel="requests per second", ylabel="share of requests (%)", ylim=(-2, 102))
    panels[2].legend()
    figure.suptitle(f"{model}: latency over load (red: requests failed there)")
    return display.save(figure, path)


def _gaps(itls: Mapping[str, Sequence[float]], path: Path, *, model: str, slo: Mapping[str, Any]) -> Path:
    figure, [axes] = display.figure(8, 4.5)
    for load, gaps in itls.items():
        axes.ecdf([1e3 * gap for gap in gaps], label=load)
    if slo.get("tpot_ms") is not None:
        axes.axvline(slo["tpot_ms"], label="SLO of TPOT", **SLO_STYLE)
    axes.set(
        xlabel="ITL (ms)", ylabel="share of gaps that are no longer", title=f"{model}: gaps between tokens"
    )
    axes.legend(fontsize=8)
    return display.save(figure, path)
