"""The optimizer step against its peers on the same work, in turns; and what it should cost on GPUs.

    python -m optim.bench [--cases NAME,...] [--rounds N] [--output FILE] [--dry-run] [key=value ...]

step_*  one process, whole steps: ours (twice, by two methods of equal FLOPs) and torch.optim.Muon.
zero*   gloo ranks of one thread: ours, DeepSpeed's Muon, torch's AdamW (what an elementwise optimizer costs)
        and one that does nothing ("null"), under the same DeepSpeed configuration. See ADDED.
plan    no measurement: the share of a 1.4B training step, by datasheet (`estimate` has the formulas).
gpu     on one CUDA device only: ours and torch.optim.Muon on all matrices of the 1.4B model.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import benchmark, cli, hardware
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.config import key, require
from cluster.session import worker_environment
from optim.cost import orthogonalize_flops
from optim.ownership import Matrix, make_plan

if TYPE_CHECKING:
    from optim.contenders import Race, Shapes

ADDED = """\
added by the optimizer = engine.backward + engine.step of the contender - engine.backward of `null` in the same
round, ranks starting together, the slowest rank counting. So computing and reducing the gradient is left out,
and all that follows counts, also where DeepSpeed orthogonalises inside backward. Bytes: likewise, of all ranks
(all_reduce 2(W-1)/W of the tensor, reduce_scatter (W-1)/W of the input, all_gather W-1 times the own shard)."""

SMALL, MEDIUM, LARGE = (256, 688, 10), (768, 2048, 2), (2048, 5504, 24)  # hidden, FFN, layers
TABLE_ELEMENTS = 2 * 50304 * 2048  # embedding and output head of the 1.4B model
CASES = {  # name -> what it is
    "step_10m": "one process, 10 layers of 256/688 (8M elements in 70 matrices)",
    "step_100m": "one process, 2 layers of a 100M model, 768/2048 (14M elements in 14 matrices)",
    "zero1": "ZeRO-1 on 2 and on 3 ranks, the matrices of step_10m",
    "zero2": "ZeRO-2 on 2 and on 3 ranks, the matrices of step_10m",
    "zero3": "ZeRO-3 on 2 and on 3 ranks, the matrices of step_10m",
    "plan": "no measurement: 1.4B on A40 and on H100, by datasheet",
    "gpu": "one CUDA device, 24 layers of 2048/5504 (1.2B elements in 168 matrices)",
}
STEP_SIZES = {"step_10m": SMALL, "step_100m": MEDIUM, "gpu": LARGE}
WORLD_SIZES = (2, 3)
PLANNED = ("NVIDIA A40", "NVIDIA H100 80GB HBM3")
TARGET_SHARE = 0.005  # of the training step

# Bytes per element that the two passes over the shard move at the least: fp32 gradient 4, momentum there and
# back 8, bf16 update out 2; bf16 update in 2, fp32 weight there and back 8. And AdamW, all in fp32: gradient
# 4, two moments 16, weight 8.
PASS_BYTES, ADAMW_BYTES = 24, 28


@dataclass(frozen=True)
class Assumptions:
    num_gpus: int = key(8, "plan: GPUs that share the work")
    tokens_per_step: int = key(524_288, "plan: batch")
    sequence_length: int = key(2048, "plan: tokens per sequence")
    mfu: float = key(0.4, "plan: of the forward and backward pass, as a fraction of the datasheet's peak")
    fraction_of_peak: float = key(0.6, "plan: that the products of the orthogonalisation reach")
    link_gb_per_s: float = key(20.0, "plan: what one GPU sends to the others, GB/s (PCIe 4.0 x16 in practice)")

    def __post_init__(self) -> None:
        for name, value, _ in layered.walk(self):
            require(value > 0, name, f"{value} must be above 0")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("optim.bench", description=__doc__.splitlines()[0], keys=Assumptions())
    parser.add_argument(
        "--cases", metavar="NAME,...", help=f"of {', '.join(CASES)} (default: all; gpu only where there is one)"
    )
    benchmark.add_options(parser, what="optim", rounds=11, rounds_help="timed steps per contender")
    options = parser.parse_args(arguments)

    def body() -> None:
        benchmark.require_rounds(options.rounds)
        assumed = layered.load(Assumptions, file=options.config, dotlist=options.overrides)
        cases = choose_cases(options.cases)
        if options.dry_run:
            print(layered.to_yaml(assumed), *(f"{case:<10}{CASES[case]}" for case in cases), sep="\n")
            return
        output = benchmark.prepare_output(options.output, "optim")
        bench(cases, assumed, num_rounds=options.rounds, output=output)

    return cli.run(body)


def choose_cases(given: str | None) -> list[str]:
    """The cases to run, in the order of CASES. Raises `UserError` for one that does not exist."""
    if given is None:
        return [case for case in CASES if case != "gpu" or hardware.describe_host()["gpus"]]
    names = given.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--cases: {unknown[0]!r} is not one of: {', '.join(CASES)}")
    return [case for case in CASES if case in names]


def bench(cases: Sequence[str], assumed: Assumptions, *, num_rounds: int, output: Path) -> None:
    """Run the cases: for each its ceiling, then its table. Write `output`; print one JSON line."""
    result: dict[str, Any] = {
        "bench": "optim",
        "cases": list(cases),
        "rounds": num_rounds,
        "load_average_before": os.getloadavg()[0],  # well below 1 if the machine was quiet
    }
    for case in cases:
        print(f"\n{case}: {CASES[case]}", flush=True)
        if case == "plan":
            result["plan"] = {name: estimate(_datasheet(name), assumed) for name in PLANNED}
            print(plan_table(result["plan"], assumed))
        elif case in STEP_SIZES:
            result |= step_case(case, num_rounds=num_rounds)
        else:
            print(ADDED)
            for world_size in WORLD_SIZES:
                result |= zero_case(int(case[-1]), world_size, num_rounds=num_rounds)
    print()
    benchmark.publish(result, output, data_fingerprint=None)


def layer_shapes(hidden: int, ffn: int, num_layers: int) -> list[tuple[int, int]]:
    """(rows, columns) of q, k, v, o, gate, up and down, layer after layer."""
    return ([(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]) * num_layers


# --- in one process ---------------------------------------------------------------------------------------


def step_case(case: str, *, num_rounds: int) -> dict[str, Any]:
    """Whole steps in one process. The case "gpu" has not been run: no machine with a GPU was at hand."""
    import torch

    from optim import contenders

    shapes, device = layer_shapes(*STEP_SIZES[case]), torch.device("cuda" if case == "gpu" else "cpu")
    methods = {"ours": "jordan"}
    if case != "gpu":
        methods["ours_polar_express"] = "polar_express"
        where = f"{torch.get_num_threads()} threads"
    elif torch.cuda.is_available():
        where = torch.cuda.get_device_name(device)  # memory for the two contenders: 37 GB
    else:
        raise UserError("--cases: gpu needs a CUDA device, and torch finds none")
    gflops = contenders.gemm_gflops(shapes, device)
    found = _ceiling(case, shapes, gflops, where)
    race = contenders.race_steps(shapes, methods, num_rounds=num_rounds, device=device)
    print(f"the first update differs from torch.optim.Muon's by {race.difference:.3f} of its norm (bf16: 0.02)")
    found |= {f"where_{case}": where, f"update_difference_{case}": race.difference}
    found |= step_result(case, race.seconds)
    print(contest_table(case, found, race.seconds))
    device_sheet = hardware.lookup(where)
    if device_sheet:
        floor = floor_seconds(device_sheet, shapes)
        found[f"floor_fraction_{case}"] = floor / (found[f"ms_ours_{case}"] / 1e3)
        print(f"floor by datasheet {floor * 1e3:.1f} ms; ours reaches {found[f'floor_fraction_{case}']:.0%} of it")
    return found


def step_result(case: str, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Milliseconds of each contender, and torch.optim.Muon's time over each of ours, with spreads."""
    samples = {f"ms_{name}_{case}": [1e3 * s for s in values] for name, values in seconds.items()}
    for name in seconds:
        if name.startswith("ours"):
            variant = name.removeprefix("ours")
            samples[f"speedup_torch_muon_{case}{variant}"] = benchmark.ratios(
                seconds["torch_muon"], seconds[name]
            )
    return benchmark.medians(samples)


def _ceiling(case: str, shapes: "Shapes", gflops: float, where: str) -> dict[str, Any]:
    """Print and return what the machine can do, and the least that orthogonalising takes at that rate."""
    flops = sum(orthogonalize_flops(*shape) for shape in shapes)
    floor = flops / (gflops * 1e9)
    print(f"ceiling: {gflops:.0f} GFLOP/s in bf16 products of these shapes, {where}")
    print(f"floor:   {floor * 1e3:.1f} ms to orthogonalise = {flops / 1e9:.1f} GFLOP / that rate", flush=True)
    return {f"gemm_gflops_{case}": gflops, f"floor_ms_{case}": floor * 1e3}


# --- under ZeRO -------------------------------------------------------------------------------------------


def zero_case(stage: int, world_size: int, *, num_rounds: int) -> dict[str, Any]:
    """All contenders of one stage and world size."""
    from optim import contenders

    case, shapes = f"zero{stage}_{world_size}ranks", layer_shapes(*SMALL)
    print(f"\n{case}", flush=True)
    print(f"{case}: {num_rounds} rounds, after torch.compile for DeepSpeed: minutes", file=sys.stderr)
    race = contenders.race_zero(
        shapes,
        stage=stage,
        world_size=world_size,
        num_rounds=num_rounds,
        environment=worker_environment(gpu=False, threads=1),
    )
    cores = min(world_size, os.cpu_count() or 1)
    found = _ceiling(case, shapes, cores * race.gflops, f"{world_size} ranks on {cores} cores")
    nulls = {name: contender.null for name, contender in contenders.contenders(stage).items()}
    found |= zero_result(case, race, nulls)
    for name, reason in race.skipped.items():
        print(f"{name} cannot run here: {reason}")
    if race.compiled:
        print(f"torch.compile built {race.compiled} graphs while the clock ran: DeepSpeed's times are too long")
    print(contest_table(f"added_{case}", found, race.whole))
    return found


def zero_result(case: str, race: "Race", nulls: Mapping[str, str]) -> dict[str, Any]:
    """What `race` found, by key. A contender that could not run has None for every figure.

    Args:
        nulls: contender -> the one whose backward pass is subtracted. A speed-up compares what is added.
    """
    added = {
        name: [whole - backward for whole, backward in zip(race.whole[name], race.backward[null], strict=True)]
        for name, null in nulls.items()
        if name in race.whole
    }
    muons = [name for name in added if name.startswith("deepspeed_muon")]
    fastest = min(muons, key=lambda name: benchmark.median(added[name]), default=None)
    samples: dict[str, Sequence[float] | None] = {}
    for name in nulls:
        samples[f"ms_{name}_added_{case}"] = _ms(added.get(name))
        samples[f"ms_{name}_backward_step_{case}"] = _ms(race.whole.get(name))
    peers = {name: name for name in nulls if name not in ("ours", *nulls.values())} | {"deepspeed_muon": fastest}
    for name, contender in peers.items():
        ran = contender in added
        samples[f"speedup_{name}_{case}"] = benchmark.ratios(added[contender], added["ours"]) if ran else None
    found = benchmark.medians(samples)
    for name in nulls:
        found[f"sent_bytes_{name}_{case}"] = race.sent.get(name)
        found[f"newton_schulz_{name}_{case}"] = race.newton_schulz.get(name)
    found |= {f"ms_{phase}_ours_{case}": 1e3 * benchmark.median(values) for phase, values in race.phases.items()}
    return found | {
        f"fastest_deepspeed_muon_{case}": fastest,
        f"skipped_{case}": race.skipped,
        f"compiled_while_timed_{case}": race.compiled,
    }


def _ms(seconds: Sequence[float] | None) -> list[float] | None:
    return seconds and [1e3 * value for value in seconds]
