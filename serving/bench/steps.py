"""Throughput, TTFT and ITL of an engine by batch size, without HTTP.

    python -m serving.bench.steps [--batches 1,8,32] [--prompt-tokens N] [--new-tokens N] [key=value ...]

A batch of equal requests is submitted at once. Prefilling ends when the last request has its first token.
Decoding counts from there until the first request ends, so every counted step decodes exactly the whole
batch. The last line on stdout is one JSON object.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from cluster import cli
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.measure.usage import SHORTEST_SECONDS, joules_of, out_of_memory, peak_memory_bytes
from serving import config as serving_config
from serving.bench.latency import percentile
from serving.checkpoints import export_if_stale, find, origin_of
from serving.config import ServeConfig
from serving.engine.process import make_engine
from serving.engine.protocol import Engine, EngineFailed, Token, answer_all


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("serving.bench.steps", description=__doc__.splitlines()[0], keys=ServeConfig())
    parser.add_argument("--batches", default="1,8,32", metavar="B,B", help="default: 1,8,32")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default: 64")
    options = parser.parse_args(arguments)

    def body() -> None:
        batches = parse_batches(options.batches)
        if options.prompt_tokens < 1 or options.new_tokens < 4:
            raise UserError("--prompt-tokens: must be at least 1, and --new-tokens at least 4")
        length = options.prompt_tokens + options.new_tokens
        keys = [f"engine.slots={max(batches)}", f"engine.cache_tokens={max(batches) * (length + 32)}"]
        keys += [f"engine.context_tokens={length}"]
        config = serving_config.load(file=options.config, dotlist=[*keys, *options.overrides])
        if options.dry_run:
            print(layered.to_yaml(config))
            return
        size = {"num_prompt": options.prompt_tokens, "num_new": options.new_tokens}
        print(json.dumps(run(config, batches, **size)))

    return cli.run(body)


def parse_batches(text: str) -> list[int]:
    """Positive numbers with commas between. Raises `UserError`."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise UserError(f"--batches: {text!r} is not numbers such as 1,8,32")
    return batches


def run(config: ServeConfig, batches: Sequence[int], *, num_prompt: int, num_new: int) -> dict[str, Any]:
    """Measure the configured engine. Raises `RunError`, which begins with "out of memory" if that is why."""
    import torch

    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    served = find(config.model)
    export_if_stale(served, report=lambda line: print(line, file=sys.stderr))
    try:
        engine = make_engine(config, served)
        try:
            device = torch.device(engine.info.device)
            points = []
            for batch in batches:
                answer(engine, batch, num_prompt=num_prompt, num_new=4, seed=0)  # allocations
                at_first: list[float | None] = []
                with joules_of(device) as energy:
                    times = answer(
                        engine, batch, num_prompt=num_prompt, num_new=num_new, seed=batch,
                        when_all_decode=lambda: at_first.append(energy.so_far()),  # noqa: B023
                    )  # fmt: skip
                about = {"batch": batch, "prompt_tokens": num_prompt, "new_tokens": num_new}
                used = joules(times, at_first[0], energy.joules, num_prompt=num_prompt)
                short = ", ".join(name for name, value in used.items() if value is None)
                used["joules_reason"] = energy.reason or (f"too short: {short}" if short else None)
                points.append(about | batch_figures(times, num_prompt=num_prompt) | used)
        finally:
            engine.close()
    except RuntimeError as error:  # torch.OutOfMemoryError and EngineFailed among them
        said = str(error).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError) or "OutOfMemory" in said or out_of_memory(said):
            raise RunError(f"out of memory: {said}") from error
        if isinstance(error, EngineFailed):
            raise RunError(said) from error
        raise
    return {
        "info": asdict(engine.info),
        "input": origin_of(config.model, served),
        "points": points,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def answer(
    engine: Engine,
    batch: int,
    *,
    num_prompt: int,
    num_new: int,
    seed: int,
    when_all_decode: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """When each token of a batch arrived, seconds since it was submitted. Raises `EngineFailed`."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(engine.info.vocab_size) for _ in range(num_prompt)] for _ in range(batch)]
    times: list[list[float]] = [[] for _ in range(batch)]

    def note(request: int, arrived: Sequence[Token]) -> None:
        began = not times[request]
        times[request] += [time.perf_counter()] * len(arrived)
        if began and all(times):
            when_all_decode()

    start = time.perf_counter()
    answer_all(engine, prompts, [num_new] * batch, concurrency=batch, note=note)
    return [[at - start for at in row] for row in times]


def joules(
    times: Sequence[Sequence[float]], at_first: float | None, whole: float | None, *, num_prompt: int
) -> dict[str, Any]:
    """`joules_per_token_prefill`, until all requests decode, and `joules_per_token_decode`, after that.

    None for a part that is too short for the counter (`SHORTEST_SECONDS`).
    """
    found: dict[str, Any] = {"joules_per_token_prefill": None, "joules_per_token_decode": None}
    if at_first is None or whole is None:
        return found
    begin, end = max(row[0] for row in times), max(row[-1] for row in times)
    if begin >= SHORTEST_SECONDS:
        found["joules_per_token_prefill"] = at_first / (len(times) * num_prompt)
    if end - begin >= SHORTEST_SECONDS:
        later = sum(at > begin for row in times for at in row)
        found["joules_per_token_decode"] = (whole - at_first) / later
    return found


def batch_figures(times: Sequence[Sequence[float]], *, num_prompt: int) -> dict[str, Any]:
    """The figures of a batch, from the times of its tokens in seconds since it was submitted.

    Keys: `prefill_tokens_per_second`, prompts over the time of the last first token; `ttft_ms`, its median;
    `itl_ms`, the median gap between tokens while all requests decode, with `itl_ms_p10` and `_p90`;
    `decode_tokens_per_second`, batch / that; `mean_context`, of the same steps, in tokens.

    Raises:
        RunError: the first request ended before the last had begun to decode.
    """
    begin, end = max(row[0] for row in times), min(row[-1] for row in times)
    steps = [  # (tokens of the answer in the cache, seconds) of each that decoded the whole batch
        (newest + 1, b - a)
        for row in times
        for newest, (a, b) in enumerate(pairwise(row))
        if begin <= a and b <= end
    ]
    if not steps:
        raise RunError("no step decoded the whole batch: ask for more --new-tokens")
    lengths, gaps = zip(*steps, strict=True)
    low, gap, high = (percentile(gaps, percent) or 0.0 for percent in (10, 50, 90))
    return {
        "prefill_tokens_per_second": len(times) * num_prompt / begin,
        "ttft_ms": 1e3 * statistics.median(row[0] for row in times),
        "itl_ms": 1e3 * gap,
        "itl_ms_p10": 1e3 * low,
        "itl_ms_p90": 1e3 * high,
        "decode_tokens_per_second": len(times) / gap,
        "mean_context": num_prompt + statistics.mean(lengths),
    }


if __name__ == "__main__":
    sys.exit(main())
