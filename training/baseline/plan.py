"""What `make baseline` measures, in which order and size, decided before anything is measured. No torch."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import config as layered
from cluster.config import ConfigError, key
from cluster.record.record import WANDB_MODES
from cluster.session import SessionConfig
from optim.cost import orthogonalize_flops
from training import config as training_config
from training.baseline.steps import NUM_PHASED
from training.model import shapes
from training.model.shapes import LlamaShape
from training.optim_config import MATRIX_RULES
from training.plan import make_plan

TRAINED = ("llama-60m", "llama-130m", "llama-350m", "llama-1b4")
SERVED = (*TRAINED, "llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "llama-3.1-8b")
RULES = ("adamw", "muon")
USABLE_MEMORY = 0.92  # of what a device or this machine has free
BF16_BYTES = 2


@dataclass(frozen=True)
class TrainCells:
    shapes: tuple[str, ...] = key(TRAINED, "shapes to train")
    rules: tuple[str, ...] = key(RULES, "rules of the hidden matrices", choices=MATRIX_RULES)
    zero_stage: int = key(1, "DeepSpeed ZeRO stage")
    nodes: tuple[int, ...] | None = key(
        None, "on a cluster, numbers of nodes to train on; default: one, and all of them", least=1
    )
    tokens: int | None = key(
        None, "tokens of a step, of each node, rounded up to whole passes; GPU: 131072, CPU: 1024", least=1
    )
    sequence_length: int | None = key(None, "GPU: 1024, CPU: 256", least=1)
    most_micro_sequences: int | None = key(
        None, "the most sequences per worker and pass, halved until memory suffices; GPU: 16, CPU: 4", least=1
    )
    workers: int | None = key(
        None, "of a node; default: one per GPU of this one, or one on a CPU's cores", least=1
    )
    steps: int | None = key(None, "timed steps; GPU: 10, CPU: 4", least=1)
    data: str = key(
        "data", "folder of prepared data (training.data.prepare); the embedded corpus is made there"
    )
    more: tuple[str, ...] = key((), "key=value of training.config for every cell, such as data.source=...")


@dataclass(frozen=True)
class ServeCells:
    models: tuple[str, ...] = key(
        SERVED, "shapes, or config.json files, with random weights; or Hugging Face directories"
    )
    batches: tuple[int, ...] | None = key(None, "requests at once; GPU: 1,8,32, CPU: 1,8", least=1)
    prompt_tokens: int | None = key(None, "GPU: 512, CPU: 128", least=1)
    new_tokens: int | None = key(None, "GPU: 160, CPU: 48", least=1)
    more: tuple[str, ...] = key((), "key=value of serving.config for every cell, such as engine.threads=2")


@dataclass(frozen=True)
class CostConfig:
    currency: str = key("USD", "of the prices")
    device_hour: float | None = key(
        None, "price of one device for an hour, with its share of the node", least=0
    )
    kwh: float | None = key(
        None, "price of a kilowatt hour at the wall; used where NVML measures energy", least=0
    )


@dataclass(frozen=True)
class BaselineConfig:
    name: str = key(
        "baseline", "run directory, and name of the run in W&B; on a cluster the file is written there too"
    )
    directory: str = key("outputs", "where runs are kept")
    wandb: str = key("auto", "W&B: auto is online with a key, else offline", choices=WANDB_MODES)
    project: str = key("asuncion", "Weights & Biases project")
    output: str | None = key(None, "file; default: tests/baselines/<hardware>_baseline.json")
    rounds: int = key(3, "times that everything is measured, in turns; intervals come from these", least=1)
    most_seconds: float = key(
        30.0, "leave out a cell that takes longer than this even at the measured ceilings", above=0
    )
    train: TrainCells = key(TrainCells, "")
    serve: ServeCells = key(ServeCells, "")
    cost: CostConfig = key(CostConfig, "")
    storage: str | None = key(None, "folder whose disk is measured; default: that of the prepared data")
    preflight: str | None = key(None, "report of cluster.preflight: the nodes, and the links between them")
    accelerator: str | None = key(
        None,
        "on a cluster: measure a node with GPUs of this kind, by Ray's name, such as H100; null: the head",
    )
    session: SessionConfig = key(SessionConfig, "")


@dataclass(frozen=True)
class Capacity:
    """What this machine, and those like it, can do. Bytes and rates are of one device.

    Attributes:
        num_devices: of a node.
        is_bf16: models compute in bf16 here (`optim.precision`), else in fp32.
        tflops, gb_per_s: measured. None if that failed: then no cell has a least time.
    """

    gpu: bool
    num_devices: int
    memory_bytes: float
    tflops: float | None
    gb_per_s: float | None
    num_nodes: int = 1
    is_bf16: bool = True

    def least_seconds(self, *, flops: float, num_bytes: float = 0.0) -> float:
        """The time of work that first computes and then reads, at the measured ceilings."""
        computing = flops / (self.tflops * 1e12) if self.tflops else 0.0
        return computing + (num_bytes / (self.gb_per_s * 1e9) if self.gb_per_s else 0.0)


@dataclass
class Cell:
    """One command that measures one thing, and its results.

    Attributes:
        floor_seconds: the least it takes at the measured ceilings, without start-up.
        skipped: why it is not measured, or None.
        rounds: last lines of the command, one per round.
        problem: why it was given up: (status, reason).
    """

    id: str
    kind: str
    shape: str
    about: dict[str, Any]
    command: list[str]
    floor_seconds: float
    skipped: str | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    problem: tuple[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        status, reason = self.problem or (("skipped", self.skipped) if self.skipped else ("measured", None))
        return {
            "id": self.id, "kind": self.kind, "shape": self.shape, **self.about, "status": status,
            "reason": reason, "command": shlex.join(["python", *self.command]), "rounds": self.rounds,
        }  # fmt: skip


def make_cells(config: BaselineConfig, capacity: Capacity) -> list[Cell]:
    """Every cell in order: training, then serving, each from small to large.

    Raises:
        ConfigError: `train.nodes` asks for more nodes than there are; an unknown shape.
    """
    numbers = config.train.nodes or dict.fromkeys((1, capacity.num_nodes))
    if max(numbers) > capacity.num_nodes:
        there = f"there {'is 1' if capacity.num_nodes == 1 else f'are {capacity.num_nodes}'}"
        raise ConfigError(f"train.nodes: {max(numbers)} nodes, but {there}; lower it, or say CLUSTER=")
    trained = [
        _training(config, capacity, shape, rule, num_nodes)
        for shape in config.train.shapes
        for rule in config.train.rules
        for num_nodes in numbers
    ]
    return [*trained, *(_serving(config, capacity, model) for model in config.serve.models)]


def describe(cells: Sequence[Cell], *, rounds: int) -> str:
    """The plan, for people."""
    lines = [f"{rounds} rounds of these, each in a process of its own; at least, in seconds:"]
    for cell in cells:
        end = f"left out: {cell.skipped}" if cell.skipped else f"{cell.floor_seconds:8.1f}"
        lines.append(f"  {cell.id:<30}{end}")
    total = rounds * sum(cell.floor_seconds for cell in cells if not cell.skipped)
    return "\n".join([*lines, f"at least {total / 60:.0f} min in all, and starting each process besides"])


def _training(config: BaselineConfig, capacity: Capacity, name: str, rule: str, num_nodes: int) -> Cell:
    _shape(name, key="train.shapes")  # so that a refusal names this key
    cells, gpu = config.train, capacity.gpu
    on_node = cells.workers or (capacity.num_devices if gpu else 1)
    workers = num_nodes * on_node
    length = cells.sequence_length or (1024 if gpu else 256)
    tokens = num_nodes * (cells.tokens or (131_072 if gpu else 1024))
    steps = cells.steps or (10 if gpu else 4)
    warm_up = 3 if gpu else 1
    micro = cells.most_micro_sequences or (16 if gpu else 4)
    while True:
        per_pass = workers * micro * length
        keys = [
            f"model.shape={name}",
            f"optim.matrix.rule={rule}",
            f"optim.matrix.lr={0.02 if rule == 'muon' else 0.001}",
            f"zero.stage={cells.zero_stage}",
            f"precision={'bf16' if capacity.is_bf16 else 'fp32'}",
            f"workers.count={workers}",
            f"workers.gpu={str(gpu).lower()}",
            f"workers.cpus={1 if gpu else max(1, (os.cpu_count() or 1) // on_node)}",
            f"batch.sequence_length={length}",
            f"batch.micro_sequences={micro}",
            f"batch.tokens={-(-tokens // per_pass) * per_pass}",
            f"data.directory={cells.data}",
            *cells.more,
        ]
        plan = make_plan(training_config.load(dotlist=[*keys, "schedule.tokens=1000000000"]))
        needed = plan.total_memory_bytes * (1 if gpu else on_node)
        if needed <= USABLE_MEMORY * capacity.memory_bytes or micro == 1:
            break
        micro //= 2
    num_steps = warm_up + steps + NUM_PHASED + 1
    devices = workers if gpu else num_nodes  # the ranks of a CPU share it
    flops = plan.flops_per_token * plan.tokens_per_step / devices
    if (matrix := plan.config.optim.matrix).needs_matrices:
        for size, count in plan.shape.matrices().items():
            each = (orthogonalize_flops(*size, num_steps=num) for num in matrix.polar_steps_of(*size))
            flops += count * sum(each) / devices
    command = ["-m", "training.baseline.steps", "--steps", str(steps), "--warm-up", str(warm_up), *keys]
    if num_nodes > 1:
        command += [f"session.address={config.session.address}", "--ray"]
        command += [f"workers.accelerator={config.accelerator}"] if config.accelerator else []
    elif workers > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", *command]
    cell = Cell(
        id=f"training/{_title(name)}/{rule}{f'/{num_nodes} nodes' * (num_nodes > 1)}",
        kind="training",
        shape=_title(name),
        about={"model": name, "rule": rule, "rows": micro * length, "nodes": num_nodes},
        command=command,
        floor_seconds=capacity.least_seconds(flops=num_steps * flops),
    )
    return _unless_too_large(cell, config, capacity, needed_bytes=needed)


def _serving(config: BaselineConfig, capacity: Capacity, model: str) -> Cell:
    cells, shape, gpu = config.serve, _shape(model, key="serve.models"), capacity.gpu
    batches = cells.batches or ((1, 8, 32) if gpu else (1, 8))
    num_prompt = cells.prompt_tokens or (512 if gpu else 128)
    num_new = cells.new_tokens or (160 if gpu else 48)
    flops = num_bytes = 0.0
    for batch in batches:
        flops += 2 * batch * shape.prefill_flops(num_prompt)
        num_bytes += num_new * shape.decode_bytes(
            batch=batch, context_tokens=num_prompt, width_bytes=BF16_BYTES
        )
    keys = [f"model.path={model}"]
    if model in shapes.SHAPES or model.endswith(".json"):
        keys = ["model.weights=random", f"model.shape={model}"]
    keys += [f"engine.step_tokens={max(2048 if gpu else 256, max(batches) + 1)}", *cells.more]
    cell = Cell(
        id=f"serving/{_title(model)}",
        kind="serving",
        shape=_title(model),
        about={"model": model, "batches": list(batches), "prompt_tokens": num_prompt},
        command=[
            *("-m", "serving.bench.steps", "--batches", ",".join(map(str, batches))),
            *("--prompt-tokens", str(num_prompt), "--new-tokens", str(num_new)),
            *keys,
        ],
        floor_seconds=capacity.least_seconds(flops=flops, num_bytes=num_bytes),
    )
    cache = max(batches) * (num_prompt + num_new + 32) * shape.kv_bytes_per_token(BF16_BYTES)
    needed = BF16_BYTES * shape.num_parameters + cache
    return _unless_too_large(cell, config, capacity, needed_bytes=needed)


def _unless_too_large(cell: Cell, config: BaselineConfig, capacity: Capacity, *, needed_bytes: float) -> Cell:
    """The cell, skipped if it needs more memory than there is, or more time than is allowed."""
    usable = USABLE_MEMORY * capacity.memory_bytes
    if needed_bytes > usable:
        cell.skipped = f"needs {needed_bytes / 1e9:.1f} GB of {usable / 1e9:.1f} GB: out of memory by count"
    elif cell.floor_seconds > config.most_seconds:
        cell.skipped = f"takes at least {cell.floor_seconds:.0f} s here, above most_seconds"
    return cell


def _title(model: str) -> str:
    """What a shape, a config.json or a directory is called: a name without folders."""
    return Path(model).parent.name if model.endswith(".json") else Path(model).name


def _shape(name: str, *, key: str) -> LlamaShape:
    try:
        return shapes.resolve(name)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def load(*, file: Path | None = None, dotlist: Sequence[str] = ()) -> BaselineConfig:
    """Defaults <- YAML <- dotlist. Raises `ConfigError`."""
    return layered.load(BaselineConfig, file=file, dotlist=dotlist)
