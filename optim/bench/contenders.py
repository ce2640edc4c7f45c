"""The fused step and its peers, raced over the same matrices in turns. `optim.bench` runs and reports it.

race_steps  one process: whole steps of ours and of torch.optim.Muon, from the same gradients
race_zero   gloo ranks of one thread: engines that differ in their optimizer only

torch.optim.Muon and DeepSpeed's Muon multiply in bf16 on any device. A CPU without bf16 arithmetic takes
about 100 times as long for that as for fp32, so there they are left out, and whole steps of ours are compared
with our own in torch, in fp32 throughout.

Every contender starts from zero weights, so that the first step leaves its bare update in them: by that the
races make sure that contenders who should do the same work do.
"""

import functools
import inspect
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException

from cluster.measure.turns import turns
from optim.groups import partition
from optim.kernels import native
from optim.precision import product_dtype
from optim.rules import Muon
from optim.step.fragments import Fragment
from optim.step.fused import FusedStep

Shapes = Sequence[tuple[int, int]]

LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.95, 0.1
WARM_UP_ROUNDS = 3  # at the least: allocations, rising clocks, ZeRO-3's record of the order of its parameters
MOST_WARM_UP_ROUNDS = 10  # torch.compile is done by then, or its graphs are counted
GEMM_REPEATS = 20  # the first ones find cold caches and low clocks
MAX_RECOMPILES = 64  # at torch's 8, DeepSpeed's functions would go on uncompiled
TIMEOUT = timedelta(minutes=10)  # of a collective: ranks that compile keep the others waiting


@dataclass
class StepRace:
    """Seconds of a whole step, by contender, one per round; and by how much first updates differ.

    Attributes:
        peer: the contender that ours are compared with: "torch_muon", or "torch_fp32" where that is left out.
        difference: ‖ours - peer‖ / ‖peer‖ over all matrices.
    """

    seconds: dict[str, list[float]]
    peer: str
    difference: float


@dataclass
class ZeroRace:
    """What `race_zero` measured. Times are seconds of the slowest rank, one per round, by contender.

    Attributes:
        gflops: of products of these matrices in bf16, all cores at once.
        whole: engine.backward and engine.step together.
        backward: engine.backward alone.
        phases: of "ours", by phase of `optim.step.fused.Health`; one per round.
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


def gemm_gflops(shapes: Shapes, device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """GFLOP/s of one product P·X per matrix, all matrices of one shape at once: best of GEMM_REPEATS.

    In `dtype`, or what is multiplied in its place on this device (`optim.precision`).
    """
    flops, seconds = 0, 0.0
    dtype = product_dtype(dtype, device)
    for rows, cols in dict.fromkeys(shapes):
        short, count = min(rows, cols), shapes.count((rows, cols))
        x = torch.randn(count, short, max(rows, cols), device=device).to(dtype)
        p = torch.randn(count, short, short, device=device).to(dtype)
        flops += 2 * count * short * rows * cols
        multiply = functools.partial(torch.bmm, p, x)
        seconds += min(_seconds(multiply, device) for _ in range(GEMM_REPEATS))
    return flops / seconds / 1e9


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products are worth doing in bf16 there, so that peers who insist on it can take part."""
    return product_dtype(torch.bfloat16, device) == torch.bfloat16


def compiled_step() -> str:
    """The tier of the compiled step that ours runs in on this CPU, such as "AVX2"; or why it does without."""
    reason = native.unsupported(torch.device("cpu"), torch.bfloat16)
    return native.describe() if reason is None else f"not used: {reason}"


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Wall time of `action`, with what it leaves on the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


# --- in one process ---------------------------------------------------------------------------------------


def race_steps(
    shapes: Shapes, methods: Mapping[str, str], *, num_rounds: int, device: torch.device
) -> StepRace:
    """Whole optimizer steps on fp32 weights, in turns.

    Args:
        methods: contender -> its name in `optim.polar.METHODS`. One is "ours", by "jordan": the same
            polynomials as in the peer.
    """
    numel = sum(rows * cols for rows, cols in shapes)
    gradient = torch.randn(numel, generator=torch.Generator(device).manual_seed(0), device=device)
    contenders = {name: _ours(shapes, gradient, method) for name, method in methods.items()}
    if multiplies_bf16(device):
        peer, contenders["torch_muon"] = "torch_muon", _torch_muon(shapes, gradient)
    else:
        peer, contenders["torch_fp32"] = "torch_fp32", _ours(shapes, gradient, "jordan", dtype=torch.float32)

    for step, _ in contenders.values():
        step()
    [flat], theirs = contenders["ours"][1], contenders[peer][1]
    pieces = flat.split([each.numel() for each in theirs])
    differences = [(ours - each.view(-1)).norm() for ours, each in zip(pieces, theirs, strict=True)]
    difference = torch.stack(differences).norm() / torch.stack([each.norm() for each in theirs]).norm()

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-WARM_UP_ROUNDS, num_rounds):
        for name in turns(list(contenders), number):
            taken = _seconds(contenders[name][0], device)
            if number >= 0:
                seconds[name].append(taken)
    return StepRace(seconds, peer, difference.item())


Stepper = tuple[Callable[[], Any], Sequence[Tensor]]  # what takes a step, and the weights


def _ours(shapes: Shapes, gradient: Tensor, method: str, *, dtype: torch.dtype = torch.bfloat16) -> Stepper:
    """The matrices end to end in one flat tensor, as a shard holds them; updates and products in `dtype`."""
    flat, offset, fragments = torch.zeros_like(gradient), 0, []
    flat.grad = gradient
    for index, (rows, cols) in enumerate(shapes):
        numel = rows * cols
        fragments.append(Fragment(f"matrix {index}", (rows,), cols, 0, numel, flat, offset))
        offset += numel
    rule = Muon(
        momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, method=method, update_scale="jordan", dtype=dtype
    )
    fused = FusedStep(rule, fragments, device=flat.device)
    return functools.partial(fused.step, lr=LR), [flat]


def _torch_muon(shapes: Shapes, gradient: Tensor) -> Stepper:
    weights = [nn.Parameter(torch.zeros(shape, device=gradient.device)) for shape in shapes]
    sizes = [weight.numel() for weight in weights]
    for weight, part in zip(weights, gradient.split(sizes), strict=True):
        weight.grad = part.view_as(weight)
    optimizer = torch.optim.Muon(
        weights, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, adjust_lr_fn="original"
    )
    return optimizer.step, [weight.detach() for weight in weights]


# --- under ZeRO -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """An optimizer under one DeepSpeed configuration.

    Attributes:
        kind: "ours", "null" (an optimizer that does nothing), "adamw" or "deepspeed_muon_<method>".
        setup: of the configuration: "" is DeepSpeed's default, bf16 gradients; with "_bf16_optimizer" they
            accumulate in fp32, for which DeepSpeed 0.19.8 has another class in stage 1.
    """

    kind: str
    setup: str

    @property
    def name(self) -> str:
        return self.kind + self.setup

    @property
    def null(self) -> str:
        """Whose backward is subtracted: computing and reducing the gradient under the same configuration."""
        return f"null{self.setup}"

    @property
    def ours(self) -> str:
        """Who is compared: ours under the same configuration."""
        return f"ours{self.setup}"

    @property
    def is_peer(self) -> bool:
        return self.kind not in ("ours", "null")


def contenders(stage: int) -> dict[str, Contender]:
    """Who races in a ZeRO stage, by name."""
    kinds = ("null", "ours", "deepspeed_muon_standard", "deepspeed_muon_gram", "adamw")
    setups = ("", "_bf16_optimizer") if stage == 1 else ("",)
    everyone = [Contender(kind, setup) for setup in setups for kind in kinds]
    return {contender.name: contender for contender in everyone}


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


def _run(shapes: Shapes, stage: int, num_rounds: int, traffic: "Traffic") -> ZeroRace:
    """The race of one rank; complete on every rank."""
    race = ZeroRace(gflops=_total_gflops(shapes))
    entries: dict[str, _Entry] = {}
    for name, contender in contenders(stage).items():
        if contender.kind.startswith("deepspeed_muon") and not multiplies_bf16(torch.device("cpu")):
            race.skipped[name] = "it multiplies in bf16, for which this CPU takes about 100 times as long"
            continue
        problem = _attempt(lambda c=contender: entries.update({c.name: _Entry(c, shapes, stage)}))  # type: ignore[misc]
        problem = problem or _attempt(entries[name].turn)  # in which torch.compile builds what it can
        if problem:
            if not contender.is_peer:
                raise RuntimeError(f"{name}: {problem}")
            race.skipped[name] = problem
            entries.pop(name, None)
    race.differences = _differences(entries)

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


def _warm_up(entries: "Sequence[_Entry]") -> None:
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


class _Matrix(nn.Module):
    """One weight [r, c] and a loss ⟨weight, direction⟩, whose gradient is dense and costs one pass."""

    def __init__(self, shape: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.direction = torch.randn(shape[0] * shape[1], generator=generator).bfloat16()

    def forward(self) -> Tensor:
        return torch.dot(self.weight.view(-1), self.direction)


class _Matrices(nn.Module):
    """All matrices; their names do not look like tables, so DeepSpeed's Muon takes them."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.layers = nn.ModuleList(_Matrix(shape, generator) for shape in shapes)

    def forward(self) -> Tensor:
        return torch.stack([layer() for layer in self.layers]).sum()


class _Null(torch.optim.Optimizer):
    """Does nothing: what remains is DeepSpeed's own work around any optimizer."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


@dataclass
class _Count:
    """Of one step over all ranks: bytes sent in backward, and with the step; matrices orthogonalised."""

    backward_bytes: float
    whole_bytes: float
    newton_schulz: int


class _Entry:
    """A contender that stands ready on this rank: its engine, and its optimizer if that is a client's."""

    def __init__(self, contender: Contender, shapes: Shapes, stage: int) -> None:
        import deepspeed

        self.contender = contender
        model = _Matrices(shapes)
        self.optimizer = _client_optimizer(contender.kind, model)
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=_deepspeed_config(contender, stage),
            dist_init_required=False,
        )
        if contender.kind == "ours":
            self.optimizer.bind(self.engine)

    def turn(self) -> tuple[float, float]:
        """One step. Seconds of backward and step, and of backward; of the slowest rank."""
        loss = self.engine()
        dist.barrier()
        started = time.perf_counter()
        self.engine.backward(loss)
        backward = time.perf_counter() - started
        self.engine.step()
        slowest = torch.tensor([time.perf_counter() - started, backward], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        whole, backward = slowest.tolist()
        return whole, backward

    def count(self, traffic: "Traffic") -> _Count:
        """One step without the clock."""
        before = self.optimizer.num_transforms if self.contender.kind == "ours" else 0
        loss = self.engine()
        with _calls_of_deepspeeds_muon() as calls, traffic.counting():
            self.engine.backward(loss)
            backward_bytes = traffic.sent_bytes
            self.engine.step()
        if self.contender.kind == "ours":
            calls.append(self.optimizer.num_transforms - before)
        totals = torch.tensor([backward_bytes, traffic.sent_bytes, sum(calls)], dtype=torch.float64)
        dist.all_reduce(totals)
        backward_bytes, whole_bytes, newton_schulz = totals.tolist()
        return _Count(backward_bytes, whole_bytes, round(newton_schulz))

    def weights(self) -> Tensor:
        """All weights, whole, end to end: [elements] fp32."""
        import deepspeed

        parameters = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            return torch.cat([p.detach().float().view(-1) for p in parameters])


def _client_optimizer(kind: str, model: nn.Module) -> Any:
    """The optimizer to hand to DeepSpeed; None where its configuration names one."""
    from optim.step.zero import ZeroOptimizer

    if kind == "ours":
        rule = Muon(momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, method="jordan", update_scale="jordan")
        members = partition(model.named_parameters())
        return ZeroOptimizer(members, rules={"matrix": rule}, peak_lr={"matrix": LR}, clip=0.0)
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return _Null(model.parameters(), {"lr": LR}) if kind == "null" else None


def _deepspeed_config(contender: Contender, stage: int) -> dict[str, Any]:
    """The same for all contenders of one setup, but for the name of DeepSpeed's own optimizer."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,  # its default of 1 would clip the orthogonalised updates of its own Muon
        # DeepSpeed's Muon refuses ZeRO-3's default, which reduces each gradient to its shards alone; so all
        # contenders all-reduce there, and it is not charged for that.
        "zero_optimization": {"stage": stage, "reduce_scatter": stage != 3, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if contender.setup:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    kind, _, method = contender.kind.rpartition("_")
    if kind == "deepspeed_muon":
        config["optimizer"] = {
            "type": "Muon",
            "params": {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "ns_method": method},
        }
    return config


def _differences(entries: "Mapping[str, _Entry]") -> dict[str, float]:
    """Of each Muon that has taken one step: how far its update is from ours."""
    found = {}
    for name, entry in entries.items():
        if entry.contender.kind.startswith("deepspeed_muon"):
            ours = entries[entry.contender.ours].weights()
            found[name] = ((entry.weights() - ours).norm() / ours.norm()).item()
    return found


@contextmanager
def _calls_of_deepspeeds_muon() -> Iterator[list[int]]:
    """A list that gets a 1 for each matrix that DeepSpeed orthogonalises on this rank."""
    from deepspeed.runtime.zero.muon import original_muon

    calls: list[int] = []
    muon_update = original_muon.muon_update

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return muon_update(*args, **kwargs)

    original_muon.muon_update = counted  # its callers import it by name at each step
    try:
        yield calls
    finally:
        original_muon.muon_update = muon_update


class Traffic:
    """Bytes that this rank sends in torch.distributed's collectives, by the formulas in SHARES.

    Wraps the collectives for the life of the process; outside `counting` they cost nothing more.
    """

    SHARES: Mapping[str, tuple[str, Callable[[int], float]]] = {
        # collective: (argument that holds the payload, multiple of it that a rank of W sends)
        "all_reduce": ("tensor", lambda w: 2 * (w - 1) / w),
        "reduce": ("tensor", lambda w: (w - 1) / w),  # on average over the ranks, as in broadcast
        "broadcast": ("tensor", lambda w: (w - 1) / w),
        "all_gather": ("tensor", lambda w: w - 1),
        "all_gather_single": ("input_tensor", lambda w: w - 1),
        "reduce_scatter": ("input_list", lambda w: (w - 1) / w),
        "reduce_scatter_single": ("input", lambda w: (w - 1) / w),
        "all_to_all_single": ("input", lambda w: (w - 1) / w),  # if the parts are equal
    }

    def __init__(self) -> None:
        self.sent_bytes = 0.0
        self._counting = False
        for name in self.SHARES:
            wrapped = self._wrap(name, getattr(dist, name))
            for module in (
                dist,
                dist.distributed_c10d,
            ):  # torch's own functions call each other in the latter
                setattr(module, name, wrapped)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count from zero."""
        self.sent_bytes, self._counting = 0.0, True
        try:
            yield
        finally:
            self._counting = False

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._counting:
                given = signature.bind(*args, **kwargs).arguments
                self.sent_bytes += self._bytes(name, given)
            return function(*args, **kwargs)

        return wrapped

    def _bytes(self, name: str, given: Mapping[str, Any]) -> float:
        argument, share = self.SHARES[name]
        payload, group = given[argument], given.get("group")
        total = sum(t.nbytes for t in (payload if isinstance(payload, list) else [payload]))
        splits = given.get("input_split_sizes")
        if splits:
            row_bytes = payload.nbytes / max(1, payload.size(0))
            return total - splits[dist.get_rank(group)] * row_bytes
        return total * share(dist.get_world_size(group))
