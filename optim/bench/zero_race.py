"""Engines that differ in their optimizer only, raced under ZeRO on gloo ranks of one thread.

DeepSpeed's Muon multiplies in bf16 on any device. A CPU without bf16 arithmetic takes about 100 times as long
for that as for fp32, so there it is left out.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException

from cluster.measure.turns import turns
from optim.bench.contenders import Entry, contenders, differences
from optim.bench.step_race import WARM_UP_ROUNDS, Shapes, gemm_gflops, multiplies_bf16
from optim.bench.traffic import Traffic

MOST_WARM_UP_ROUNDS = 10  # torch.compile is done by then, or its graphs are counted
MAX_RECOMPILES = 64  # at torch's 8, DeepSpeed's functions would go on uncompiled
TIMEOUT = timedelta(minutes=10)  # of a collective: ranks that compile keep the others waiting


@dataclass
class ZeroRace:
    """What `race_zero` measured. Times are seconds of the slowest rank, one per round, by contender.

    Attributes:
        gflops: of products of these matrices in bf16, all cores at once.
        whole: engine.backward and engine.step together.
        backward: engine.backward alone.
        phases: of "ours", by phase of `optim.step.health.Health`; one per round.
        sent: bytes over all ranks of one backward and step, less those of the backward of its null.
        newton_schulz: matrices orthogonalised in one step, over all ranks.
        differences: of each Muon, ‖update - ours‖ / ‖ours‖ of the first step, over all matrices.
        skipped: contender -> why it cannot run here.
        compiled: graphs that torch.compile built on any rank while the clock ran.
    """

    gflops: float = 0.0
    whole: dict[str, list[float]] = field(default_factory=dict)
    backward: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, list[float]] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    newton_schulz: dict[str, int] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    compiled: int = 0


def race_zero(
    shapes: Shapes, *, stage: int, world_size: int, num_rounds: int, environment: Mapping[str, str]
) -> ZeroRace:
    """All `contenders` of the stage on `world_size` processes of one thread, in turns.

    Args:
        environment: variables of each process, set before DeepSpeed is imported.

    Raises:
        RuntimeError: a rank failed, with its traceback.
    """
    with tempfile.TemporaryDirectory() as place:
        given = (list(shapes), stage, world_size, num_rounds, dict(environment), Path(place))
        try:
            mp.start_processes(_rank, given, nprocs=world_size, start_method="spawn")
        except ProcessException as error:
            raise RuntimeError(f"a rank failed: {error}") from error
        return torch.load(Path(place) / "race", weights_only=False)


def _rank(
    rank: int,
    shapes: Shapes,
    stage: int,
    world_size: int,
    num_rounds: int,
    environment: Mapping[str, str],
    folder: Path,
) -> None:
    os.environ.update({**environment, "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = MAX_RECOMPILES
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    traffic = Traffic()  # before DeepSpeed is imported, which keeps references to collectives
    from optim.step.layout import quiet_deepspeed

    quiet_deepspeed()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of inductor, on itself
    race = _run(shapes, stage, num_rounds, traffic)
    if rank == 0:
        torch.save(race, folder / "race")
    dist.barrier()
    dist.destroy_process_group()


def _run(shapes: Shapes, stage: int, num_rounds: int, traffic: Traffic) -> ZeroRace:
    """The race of one rank; complete on every rank."""
    race = ZeroRace(gflops=_total_gflops(shapes))
    entries: dict[str, Entry] = {}
    for name, contender in contenders(stage).items():
        if contender.kind.startswith("deepspeed_muon") and not multiplies_bf16(torch.device("cpu")):
            race.skipped[name] = "it multiplies in bf16, for which this CPU takes about 100 times as long"
            continue
        problem = _attempt(lambda c=contender: entries.update({c.name: Entry(c, shapes, stage)}))  # type: ignore[misc]
        problem = problem or _attempt(entries[name].turn)  # in which torch.compile builds what it can
        if problem:
            if not contender.is_peer:
                raise RuntimeError(f"{name}: {problem}")
            race.skipped[name] = problem
            entries.pop(name, None)
    race.differences = differences(entries)

    _warm_up(list(entries.values()))
    graphs = _num_graphs()
    for number in range(num_rounds):
        for name in turns(list(entries), number):
            whole, backward = entries[name].turn()
            race.whole.setdefault(name, []).append(whole)
            race.backward.setdefault(name, []).append(backward)
        for key, value in entries["ours"].optimizer.health().items():
            if key.endswith("_seconds"):
                race.phases.setdefault(key.removesuffix("_seconds"), []).append(value)
    race.compiled = _sum_over_ranks(_num_graphs() - graphs)

    counts = {name: entry.count(traffic) for name, entry in entries.items()}
    for name, entry in entries.items():
        backward_bytes = counts[entry.contender.null].backward_bytes
        race.sent[name] = counts[name].whole_bytes - backward_bytes
        race.newton_schulz[name] = counts[name].newton_schulz
    return race


def _attempt(action: Callable[[], Any]) -> str | None:
    """Do it; if that fails on any rank, say why on all."""
    problem: str | None = None
    try:
        action()
    except Exception as error:  # whatever keeps a peer from running here is what we report of it
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def _warm_up(entries: Sequence[Entry]) -> None:
    """Rounds without the clock, until torch.compile has nothing left to do on any rank."""
    for number in range(MOST_WARM_UP_ROUNDS):
        graphs = _num_graphs()
        for entry in entries:
            entry.turn()
        if not _sum_over_ranks(_num_graphs() - graphs) and number + 1 >= WARM_UP_ROUNDS:
            return


def _num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _sum_over_ranks(value: int) -> int:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return int(total)


def _total_gflops(shapes: Shapes) -> float:
    """GFLOP/s of the cores together, one rank on each; the other ranks, if any, wait."""
    rank, cores = dist.get_rank(), os.cpu_count() or 1
    dist.barrier()
    mine = gemm_gflops(shapes, torch.device("cpu")) if rank < cores else 0.0
    total = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()
