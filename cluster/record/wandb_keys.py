"""What W&B calls a key of the record, and which value of a key a run's summary shows.

`metrics.jsonl` keeps its short names. W&B groups panels by the part of a key before the slash, so there a key
carries its section: `loss` is `train/loss`, and `ttft_p99_ms` of a serving bench is `serve/ttft_p99_ms`.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

AXES = ("step", "tokens", "seconds")  # each can be the x axis of every panel; they carry no section

JOB_TYPES = {  # job type -> section of the keys that have none of their own
    "train": "train",
    "study": "study",
    "serve-bench": "serve",
    "race": "bench",
    "baseline": "baseline",
    "parity": "parity",
    "projection": "projection",
    "evaluation": "evaluation",
    "preflight": "preflight",
    "optim-bench": "bench",
    "launcher-bench": "bench",
}

_NAMED = {"tuning_loss": "validation/tuning_loss", "noise": "noise/layers"}  # for every job type
_SECTION_FIRST = re.compile(r"(optimizer|noise|validation|health|serve|parity|preflight|study|bench)_(.+)")
_THROUGHPUT = re.compile(
    r"(?:.*_)?(?:step_seconds|tokens_per_second|mfu)(?:_.*)?"
    r"|(?:data|compute|communication|memory)_.+|.*_(?:seconds|bytes)"
)
_SERVING_OWN = ("seconds",)  # in a serving bench's row it is the length of the load, not an axis

_MEAN = re.compile(r"throughput/(?:step_seconds|tokens_per_second|mfu|mfu_of_measured|data_.+)")
_LEAST = re.compile(r"validation/.*loss")
_MOST = re.compile(r"optimizer/orthogonality_error_max|throughput/memory_.+|serve/goodput_per_second")


@functools.lru_cache(4096)  # every row of a run has the same keys
def wandb_key(key: str, *, job_type: str = "train") -> str:
    """The key in W&B of a key of `metrics.jsonl` or `summary.json`; one with a slash stays as it is.

    Raises:
        KeyError: no such job type.
    """
    section = JOB_TYPES[job_type]
    if "/" in key or (key in AXES and not (section == "serve" and key in _SERVING_OWN)):
        return key
    if key in _NAMED:
        return _NAMED[key]
    if match := _SECTION_FIRST.fullmatch(key):
        return "/".join(match.groups())
    if section == "train" and _THROUGHPUT.fullmatch(key):
        section = "throughput"
    return f"{section}/{key}"


def wandb_row(row: Mapping[str, Any], *, job_type: str) -> dict[str, Any]:
    """A row or a summary under W&B's keys."""
    return {wandb_key(key, job_type=job_type): value for key, value in row.items()}


def summary_of(key: str) -> str | None:
    """What W&B's summary shows of a key of W&B, for `define_metric`: None is the last value alone.

    With more than one it is an object: `validation/loss` has `validation/loss.min` and `.last`.
    """
    for pattern, which in ((_LEAST, "min,last"), (_MOST, "max,last"), (_MEAN, "mean,last")):
        if pattern.fullmatch(key):
            return which
    return None
