"""Public measurements of one script on A40 and on H100, set against their hardware by the same formulas.

Not measured by us. It shows what a normalised comparison makes of a pair that anybody can check.
"""

from typing import Any

from cluster.measure import hardware
from cluster.parity.baseline_file import Side
from cluster.parity.comparison import Comparison, compare_figures

SOURCE = (
    "https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization/results/"
    "20260609_soap_f1_auxb2_clean"
)
STEP_MS = {"a40": 1038.7, "h100": 328.3}  # `step_avg` at the end of runs on eight devices
TOKENS_PER_STEP, DEVICES = 8 * 64 * 1024, 8
LAYERS, HIDDEN, VOCABULARY, SEQUENCE = 12, 768, 50304, 1024  # of the script's `GPT`, MLP of 4 x hidden
CAVEATS = (
    "The script is the same byte for byte, with torch 2.5.1 on the A40 and 2.9.0 on the H100.",
    "The optimizer (SOAP) factorises matrices in each step. That work is not in the FLOPs, and it probably "
    "takes the larger share of a step on the H100.",
    "Memory and links are not in the roofline. Published averages of single runs carry no interval.",
)


def flops_per_token() -> int:
    """6·N_matmul + 12·L·d·s, as `training.model.shapes.LlamaShape.flops_per_token` counts."""
    matmul_parameters = 12 * LAYERS * HIDDEN**2 + VOCABULARY * HIDDEN
    return 6 * matmul_parameters + 12 * LAYERS * HIDDEN * SEQUENCE


def evidence() -> Comparison:
    """The A40 (A) against the H100 (B), on their datasheets' peaks."""
    sides = (_side("a40"), _side("h100"))
    return compare_figures(
        "training/GPT-124M/SOAP, modded-nanogpt track 3",
        (_figure("a40"), _figure("h100")),
        (sides[0].peaks(datasheet=True), sides[1].peaks(datasheet=True)),
        sides,
        link=False,
        voids=({}, {}),
    )


def _side(name: str) -> Side:
    sheet = hardware.by_short_name(name)
    assert sheet is not None
    return Side(f"{DEVICES} x {sheet.name}", SOURCE, sheet, {"ceilings": {}})


def _figure(name: str) -> dict[str, Any]:
    return {
        "kind": "training",
        "flops": flops_per_token(),
        "bytes": None,
        "values": [TOKENS_PER_STEP / (STEP_MS[name] / 1e3) / DEVICES],
        "joules_per_token": None,
        "cost_per_million_tokens": None,
    }
