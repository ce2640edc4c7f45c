"""Baseline files of made-up machines whose figures reach a given share of their ceilings."""

import json

from cluster.measure import hardware

A40, H100 = hardware.by_short_name("a40"), hardware.by_short_name("h100")
FLOPS = {"training": 8.5e9, "prefill": 2.8e9, "decode": 2.7e9}
SCATTER = (0.99, 1.0, 1.01)


def figure(device, kind, share, **changes):
    """A figure that reaches `share` of the device's roofline, in three runs of 1% scatter."""
    name = f"{kind}/llama-1b4/" + ("muon" if kind == "training" else "batch 1")
    found = {
        "id": name, "kind": kind, "shape": "llama-1b4", "unit": "tokens/s per device", "devices": 1,
        "flops": FLOPS[kind], "bytes": 2.7e9 if kind == "decode" else None, "peak_memory_bytes": 4e9,
        "attention_kernel": f"flash_attention of {device.name}",
        "joules_per_token": None, "cost_per_million_tokens": None, "command": f"python -m measure {kind}",
    }  # fmt: skip
    if kind == "training":
        found |= {"step_seconds": [1.0], "step_seconds_p10": [0.9], "step_seconds_p90": [1.2]}
        shares = {"compute": 0.8, "communication": 0.1, "optimizer": 0.08, "data": 0.01, "other": 0.01}
        found |= {"tokens_per_step": 131072, "time_shares": shares}
    else:
        found["itl_ms" if kind == "decode" else "ttft_ms"] = [4.0]
    found |= changes
    seconds, _ = hardware.roofline_seconds(
        flops=found["flops"], num_bytes=found["bytes"], peak_flops=device.bf16_tflops * 1e12,
        bytes_per_s=device.memory_gb_per_s * 1e9,
    )  # fmt: skip
    found.setdefault("values", [share / seconds * factor for factor in SCATTER])
    return found


def write(folder, device, figures, name=None, **changes):
    """A file of `make baseline`."""
    rate = {"best": 1.0, "spread": [0.9, 1.0]}
    tflops = {"best": device.bf16_tflops * 0.8, "spread": [1.0, device.bf16_tflops * 0.8]}
    memory = {"best": device.memory_gb_per_s * 0.9, "spread": [1.0, device.memory_gb_per_s * 0.9]}
    content = {
        "format": 2, "complete": True,
        "hardware": {"name": name or device.name, "num_devices": 8, "kind": "gpu"},
        "ceilings": {
            "product_dtype": "bfloat16", "product_tflops": tflops,
            "read_gb_per_s": memory, "copy_gb_per_s": memory, "links": None,
            "products_tflops": {}, "disk": {"write_gb_per_s": rate, "read_gb_per_s": rate},
        },
        "cells": [{"id": "serving/llama-2-7b", "status": "out of memory", "reason": "by count"}],
        "figures": figures,
        "peaks_of_rounds": [{"product_tflops": tflops["best"], "read_gb_per_s": memory["best"]}] * 3,
        "provenance": {"commit": "0" * 40, "dirty": False, "time": "2026-11-24", "command": ["baseline"]},
    } | changes  # fmt: skip
    file = folder / f"{(name or device.name).split()[1].lower()}.json"
    file.write_text(json.dumps(content))
    return file


def claims(found):
    return {claim.text: claim for claim in found.claims}
