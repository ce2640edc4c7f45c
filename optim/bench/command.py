"""The optimizer step against its peers on the same work, in turns; and what it should cost on GPUs.

    python -m optim.bench [--cases NAME,...] [--rounds N] [--output FILE] [--dry-run] [key=value ...]

step_*  one process, whole steps: ours (twice, by two methods of equal FLOPs) and torch.optim.Muon; on a CPU
        without bf16 arithmetic our own in torch and fp32 ("torch_fp32") in place of torch.optim.Muon.
zero*   gloo ranks of one thread: ours, DeepSpeed's Muon, torch's AdamW (what an elementwise optimizer costs)
        and one that does nothing ("null"), under the same DeepSpeed configuration. See ADDED.
plan    no measurement: the share of a 1.4B training step, by datasheet (optim/bench/share.py).
gpu     on a CUDA device only: ours and torch.optim.Muon on all matrices of the 1.4B model. `tests.gpu` runs
        the same race; its results are in tests/baselines/*_gpu.json.

On two quiet cores the default takes about 10 minutes, the first time 5 more: torch.compile for DeepSpeed.
"""

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster import cli
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.config import key
from cluster.display import Table, show, table
from cluster.measure import benchmark, hardware
from cluster.measure.benchmark import spread_of
from cluster.progress import Progress
from cluster.session import worker_environment
from optim.bench.share import MATRICES_1B4, STAGES, estimate, floor_seconds, layers, train_flops_1b4
from optim.cost import ADAMW_BYTES, PASS_BYTES, orthogonalize_flops

if TYPE_CHECKING:
    from optim.bench.contenders import BenchedOptimizer
    from optim.bench.step_race import Shapes, StepRace
    from optim.bench.zero_race import ZeroRace

ADDED = """\
added by the optimizer = engine.backward + engine.step of the contender - engine.backward of `null` in the
same round. Ranks start together and the slowest one counts. This leaves out computing and reducing the
gradient. It counts all that follows, also what DeepSpeed orthogonalises inside backward. Bytes: likewise,
of all ranks (all_reduce 2(W-1)/W of the tensor, reduce_scatter (W-1)/W of the input, all_gather W-1 times the
own shard)."""

CASES = {  # name -> what it is
    "step_10m": "one process, 10 layers of 256/688 (8M elements in 70 matrices)",
    "step_100m": "one process, 2 layers of a 100M model, 768/2048 (14M elements in 14 matrices)",
    "zero1": "ZeRO-1 on 2 and on 3 ranks, the matrices of step_10m",
    "zero2": "ZeRO-2 on 2 and on 3 ranks, the matrices of step_10m",
    "zero3": "ZeRO-3 on 2 and on 3 ranks, the matrices of step_10m",
    "plan": "no measurement: 1.4B on A40 and on H100, by datasheet",
    "gpu": "one CUDA device, 24 layers of 2048/5504 (1.2B elements in 168 matrices)",
}
MATRICES = {"step_10m": layers(256, 688, 10), "step_100m": layers(768, 2048, 2), "gpu": MATRICES_1B4}
WORLD_SIZES = (2, 3)
MAX_DIFFERENCE = 0.05  # of first updates that should be equal; bf16 in another order makes 0.02

TARGETS = {  # speedup_<key>: at the least
    "torch_muon_step_10m": 1.2,
    "torch_muon_step_100m": 1.2,
    "torch_fp32_step_10m": 1.3,
    "torch_fp32_step_100m": 1.3,
    **{
        f"deepspeed_muon_zero{stage}_{world_size}ranks": target
        for stage, target in ((1, 1.5), (2, 1.5), (3, 2.5))
        for world_size in WORLD_SIZES
    },
}
TARGET_SHARE = 0.005  # of the training step, at the most
PLANNED = {"NVIDIA A40": "a40_link_gb_per_s", "NVIDIA H100 80GB HBM3": "h100_link_gb_per_s"}


@dataclass(frozen=True)
class Assumptions:
    num_gpus: int = key(8, "plan: GPUs that share the work", above=0)
    tokens_per_step: int = key(524_288, "plan: batch", above=0)
    sequence_length: int = key(2048, "plan: tokens per sequence", above=0)
    mfu: float = key(0.4, "plan: MFU of forward and backward, as a fraction of 1", above=0, most=1)
    fraction_of_peak: float = key(
        0.6, "plan: share of the peak that the products of the orthogonalisation reach", above=0, most=1
    )
    a40_link_gb_per_s: float = key(
        20.0, "plan: bandwidth of an A40's link, GB/s (PCIe 4.0 x16: at most 31.5)", above=0
    )
    h100_link_gb_per_s: float = key(
        360.0, "plan: bandwidth of an H100's link, GB/s (NVLink 4: at most 450)", above=0
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("optim.bench", description=__doc__.splitlines()[0], keys=Assumptions())
    parser.add_argument(
        "--cases",
        metavar="NAME,...",
        help=f"of {', '.join(CASES)} (default: all; gpu only where there is one)",
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
        result = bench(cases, assumed, num_rounds=options.rounds)
        config = layered.to_dict(assumed) | {"cases": cases, "rounds": options.rounds}
        benchmark.publish(
            result, output, job_type="optim-bench", wandb_mode=options.wandb, config=config,
            data_fingerprint=None,
        )  # fmt: skip

    return cli.run(body)


def choose_cases(given: str | None) -> list[str]:
    """The cases to run, in the order of CASES. Raises `UserError` for one that cannot be run."""
    names = list(CASES) if given is None else given.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--cases: {unknown[0]!r} is not one of: {', '.join(CASES)}")
    if "gpu" in names and not has_cuda():
        if given is not None:
            raise UserError("--cases: gpu needs a CUDA device, and torch finds none; leave it out")
        names.remove("gpu")
    return [case for case in CASES if case in names]


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def bench(cases: Sequence[str], assumed: Assumptions, *, num_rounds: int) -> dict[str, Any]:
    """Run the cases, and print for each its ceiling, then its table. Returns the result."""
    result: dict[str, Any] = {
        "bench": "optim",
        "cases": list(cases),
        "rounds": num_rounds,
        "load_average_before": benchmark.load_average(),
    }
    if set(cases) - {"plan", "gpu"}:
        from optim.bench import step_race

        result["compiled_step"] = step_race.compiled_step()
        print(f"compiled step: {result['compiled_step']}")
    for case in cases:
        show(f"\n{case}: {CASES[case]}")
        if case == "plan":
            result["plan"] = plan_case(assumed)
        elif case in MATRICES:
            result |= step_case(case, num_rounds=num_rounds)
        else:
            show(ADDED)
            for world_size in WORLD_SIZES:
                result |= zero_case(int(case[-1]), world_size, num_rounds=num_rounds)
    show("", target_table(result), "")
    return result


def target_table(result: Mapping[str, Any]) -> Table:
    """The speed-ups and shares in `result` that have a target, each with the verdict."""
    rows: list[tuple[Any, ...]] = []
    for name, target in TARGETS.items():
        if (speedup := result.get(f"speedup_{name}")) is not None:
            spread = (f"{value:.2f}" for value in result[f"spread_{name}"])
            rows.append((name, f"{speedup:.2f}", *spread, f">= {target}", _verdict(speedup >= target)))
    for device, found in result.get("plan", {}).items():
        for stage in STAGES:
            share, name = found[f"share_zero{stage}"], f"planned share, {device}, ZeRO-{stage}"
            target_met = _verdict(share <= TARGET_SHARE)
            rows.append((name, f"{share:.2%}", None, None, f"<= {TARGET_SHARE:.1%}", target_met))
    return table(("", "measured", "min", "max", "target", "verdict"), rows, left=(0, -1))


def _verdict(met: bool) -> str:
    return "met" if met else "not met"


# --- in one process ---------------------------------------------------------------------------------------


def step_case(case: str, *, num_rounds: int) -> dict[str, Any]:
    """Whole steps in one process: its ceiling, then its table."""
    import torch

    from optim.bench import step_race

    shapes, methods = MATRICES[case], {"ours": "jordan", "ours_polar_express": "polar_express"}
    device, where = torch.device("cpu"), f"{torch.get_num_threads()} threads"
    if case == "gpu":
        device = torch.device("cuda")
        where = torch.cuda.get_device_name(device)
        del methods["ours_polar_express"]  # memory for two contenders: 37 GB
    dtype = "bf16" if step_race.multiplies_bf16(device) else "fp32"
    found = ceiling(
        case, shapes, step_race.gemm_gflops(shapes, device), where, dtype=dtype, gpu=case == "gpu"
    )
    race = step_race.race_steps(shapes, methods, num_rounds=num_rounds, device=device)
    require_same_work(case, {race.peer: race.difference})
    found |= {f"update_difference_{race.peer}_{case}": race.difference, **step_result(case, race)}
    if race.peer == "torch_fp32":
        print(
            "torch_muon is left out: it multiplies in bf16, for which this CPU takes about 100 times as long"
        )
    show(benchmark.table(found))
    if sheet := hardware.lookup(where):
        floor_ms = 1e3 * floor_seconds(shapes, **_peaks(sheet))
        found |= {f"datasheet_floor_ms_{case}": floor_ms}
        times = found[f"ms_ours_{case}"] / floor_ms
        print(f"least by datasheet: {floor_ms:.1f} ms; ours takes {times:.1f} times that")
    return found


def step_result(case: str, race: "StepRace") -> dict[str, Any]:
    """Milliseconds of each contender, and the peer's time over each of ours, with spreads."""
    samples = {f"ms_{name}_{case}": _ms(values) for name, values in race.seconds.items()}
    peer = race.seconds[race.peer]
    for name, ours in race.seconds.items():
        if name.startswith("ours"):
            variant = name.removeprefix("ours")
            samples[f"speedup_{race.peer}_{case}{variant}"] = benchmark.ratios(peer, ours)
    return benchmark.medians(samples)


def ceiling(
    case: str, shapes: "Shapes", gflops: float, where: str, *, dtype: str, gpu: bool = False
) -> dict[str, Any]:
    """Print and return what the machine can do, and the least that orthogonalising takes at that rate.

    dtype: "bf16" or "fp32", what products are computed in there, and the ceiling was.
    """
    fp32 = dtype == "fp32"
    flops = sum(
        orthogonalize_flops(*shape, symmetric=True, polynomials=gpu or fp32, restart=not fp32)
        for shape in shapes
    )
    floor = flops / (gflops * 1e9)
    print(f"ceiling: {gflops:.0f} GFLOP/s in {dtype} products of these shapes, {where}")
    work = f"{flops / 1e9:.1f} GFLOP, symmetric products at half their cost"
    print(f"floor:   {floor * 1e3:.1f} ms to orthogonalise = {work}, / that rate", flush=True)
    return {f"gemm_gflops_{case}": gflops, f"gemm_dtype_{case}": dtype, f"floor_ms_{case}": floor * 1e3}


def require_same_work(case: str, differences: Mapping[str, float]) -> None:
    """Print by how much first updates differ from ours. Raises `RunError` if that is more than rounding."""
    for name, difference in differences.items():
        print(f"first update of {name}: {difference:.3f} of its norm from ours (bf16: about 0.02)")
        if not difference <= MAX_DIFFERENCE:
            raise RunError(
                f"{case}: the first updates of ours and of {name} differ by {difference:.3f} of their norm, "
                f"over {MAX_DIFFERENCE}: they do not do the same work, so their times cannot be compared"
            )


# --- under ZeRO -------------------------------------------------------------------------------------------


def zero_case(stage: int, world_size: int, *, num_rounds: int) -> dict[str, Any]:
    """All contenders of one stage and world size: their ceiling, then their tables."""
    import torch

    from optim.bench import contenders, step_race, zero_race

    case, shapes = f"zero{stage}_{world_size}ranks", MATRICES["step_10m"]
    bf16 = step_race.multiplies_bf16(torch.device("cpu"))
    wait = ", after torch.compile for DeepSpeed: 1 to 3 minutes" if bf16 else ""
    with Progress(None, unit="race") as progress:
        progress.advance(f"{case}: {num_rounds} rounds{wait}")
        try:
            race = zero_race.race_zero(
                shapes,
                stage=stage,
                world_size=world_size,
                num_rounds=num_rounds,
                environment=worker_environment(gpu=False, threads=1),
            )
        except RuntimeError as error:
            raise RunError(f"{case}: {error}") from error
    cores = min(world_size, os.cpu_count() or 1)
    show(f"\n{case}")
    where = f"{world_size} ranks on {cores} cores"
    found = ceiling(case, shapes, race.gflops, where, dtype="bf16" if bf16 else "fp32")
    require_same_work(case, race.differences)
    everyone = contenders.contenders(stage)
    found |= zero_result(case, race, everyone)
    for name, reason in race.skipped.items():
        print(f"{name} does not run here: {reason}")
    if race.compiled:
        print(
            f"torch.compile built {race.compiled} graphs while the clock ran: DeepSpeed's times are too long"
        )
    show(contest_table(case, found, everyone))
    phases = (f"{phase} {1e3 * statistics.median(seconds):.1f}" for phase, seconds in race.phases.items())
    print(f"ours by phase, ms on the slowest rank: {', '.join(phases)}")
    return found


def zero_result(case: str, race: "ZeroRace", everyone: Mapping[str, "BenchedOptimizer"]) -> dict[str, Any]:
    """What `race` found, by key. A contender that could not run has None for every figure.

    A speed-up compares what is added with what ours adds under the same configuration.
    `speedup_deepspeed_muon` is that of the DeepSpeed contender that comes closest to ours.
    """
    added = {
        name: [
            whole - backward
            for whole, backward in zip(values, race.backward[everyone[name].null], strict=True)
        ]
        for name, values in race.whole.items()
    }
    samples: dict[str, Sequence[float] | None] = {}
    for name in everyone:
        samples[f"ms_{name}_added_{case}"] = _ms(added.get(name))
        samples[f"ms_{name}_backward_step_{case}"] = _ms(race.whole.get(name))
    speedups = {
        name: benchmark.ratios(added[name], added[contender.ours])
        for name, contender in everyone.items()
        if contender.is_peer and name in added
    }
    for name, contender in everyone.items():
        if contender.is_peer:
            samples[f"speedup_{name}_{case}"] = speedups.get(name)
    muons = [name for name in speedups if name.startswith("deepspeed_muon")]
    closest = min(muons, key=lambda name: statistics.median(speedups[name]), default=None)
    samples[f"speedup_deepspeed_muon_{case}"] = speedups[closest] if closest else None
    found = benchmark.medians(samples)
    for name in everyone:
        found[f"sent_bytes_{name}_{case}"] = race.sent.get(name)
        found[f"newton_schulz_{name}_{case}"] = race.newton_schulz.get(name)
    for phase, seconds in race.phases.items():
        found[f"ms_{phase}_ours_{case}"] = 1e3 * statistics.median(seconds)
    for name, difference in race.differences.items():
        found[f"update_difference_{name}_{case}"] = difference
    return found | {
        f"closest_deepspeed_muon_{case}": closest,
        f"skipped_{case}": race.skipped,
        f"compiled_while_timed_{case}": race.compiled,
    }


def contest_table(case: str, found: Mapping[str, Any], everyone: Mapping[str, "BenchedOptimizer"]) -> Table:
    """A row for each contender that ran: what it adds, over what ours adds, and what that takes."""
    head = ("", "added, ms", "min", "max", "/ ours", "min", "max", "MB sent", "orthogonalised")
    rows = []
    for name in everyone:
        added, speedup = f"ms_{name}_added_{case}", f"speedup_{name}_{case}"
        if found[added] is None:
            continue
        times = (f"{value:.1f}" for value in (found[added], *found[spread_of(added)]))
        given = (found[speedup], *found[spread_of(speedup)]) if speedup in found else ()
        ratios = [f"{value:.2f}" for value in given] or ["-"] * 3
        sent, calls = found[f"sent_bytes_{name}_{case}"], found[f"newton_schulz_{name}_{case}"]
        rows.append((name, *times, *ratios, f"{sent / 1e6:.2f}", calls))
    return table(head, rows)


def _ms(seconds: Sequence[float] | None) -> list[float] | None:
    return None if seconds is None else [1e3 * value for value in seconds]


# --- by datasheet -----------------------------------------------------------------------------------------


def plan_case(assumed: Assumptions) -> dict[str, dict[str, float]]:
    """The forecast of each GPU in PLANNED, printed term by term."""
    plans = {}
    tokens_per_gpu = assumed.tokens_per_step / assumed.num_gpus
    for device, link in PLANNED.items():
        sheet, link_gb_per_s = hardware.lookup(device), getattr(assumed, link)
        assert sheet is not None
        plans[device] = estimate(
            MATRICES_1B4,
            train_flops=train_flops_1b4(assumed.sequence_length) * tokens_per_gpu,
            num_gpus=assumed.num_gpus,
            link_bytes_per_s=link_gb_per_s * 1e9,
            mfu=assumed.mfu,
            fraction_of_peak=assumed.fraction_of_peak,
            **_peaks(sheet),
        )
        batch = f"{assumed.num_gpus} of them, {assumed.tokens_per_step:,} tokens per step"
        show(f"\n{sheet.name}, {batch}; the busiest one:")
        show(plan_table(sheet, plans[device], assumed, link_gb_per_s=link_gb_per_s))
    return plans


def _peaks(sheet: hardware.Device) -> dict[str, float]:
    return {"peak_flops": sheet.bf16_tflops * 1e12, "memory_bytes_per_s": sheet.memory_gb_per_s * 1e9}


def plan_table(
    sheet: hardware.Device, found: Mapping[str, float], assumed: Assumptions, *, link_gb_per_s: float
) -> Table:
    """A row for each term of a forecast: milliseconds per step and what they come from; then the shares."""
    peak, memory = f"{sheet.bf16_tflops:g} TFLOP/s", f"{sheet.memory_gb_per_s:g} GB/s"
    elements, owned = f"{found['shard_elements'] / 1e6:.0f}M elements", found["owned_flops"] / 1e12
    terms = {
        "train": f"{found['train_flops'] / 1e12:.0f} TFLOP / ({assumed.mfu:.0%} of {peak})",
        "orthogonalize": f"{owned:.2f} TFLOP / ({assumed.fraction_of_peak:.0%} of {peak})",
        "passes": f"{PASS_BYTES} B x {elements} / {memory}",
        "adamw": f"{ADAMW_BYTES} B x {elements} / {memory}: for comparison, AdamW on the same matrices",
    }
    for stage in STAGES:
        sent = found[f"sent_bytes_zero{stage}"] / 1e6
        terms[f"exchange_zero{stage}"] = f"{sent:.0f} MB / {link_gb_per_s:g} GB/s, nothing hidden"
    rows = [(term, f"{found[f'{term}_ms']:.1f} ms", origin) for term, origin in terms.items()]
    for stage in STAGES:
        share = found[f"share_zero{stage}"]
        verdict = f"target {TARGET_SHARE:.1%}: {_verdict(share <= TARGET_SHARE)}"
        rows.append((f"share, ZeRO-{stage}", f"{share:.2%}", verdict))
    return table(("", "a step", "from"), rows, left=(0, -1))


if __name__ == "__main__":
    sys.exit(main())
