"""The keys of serving and of its benchmark. The defaults serve a small model on two CPU cores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import config as layered
from cluster.config import key, require, require_choice
from cluster.record import WANDB_MODES
from cluster.session import SessionConfig

ENGINES = ("torch", "vllm")
DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")
WEIGHTS = ("checkpoint", "random")
COMPARISONS = ("transformers", "vllm", "serve")


@dataclass(frozen=True)
class ModelConfig:
    path: str = key(
        "newest",
        "a Hugging Face LLaMA directory; a run's name or directory, exported where needed; or 'newest'",
    )
    shape: str | None = key(None, "weights=random: a name from training/model/shapes.py, or a config.json")
    weights: str = key("checkpoint", "'checkpoint', or 'random' for speed work on a shape alone")
    seed: int = key(0, "weights=random: of the weights")
    name: str | None = key(None, "what clients call the model; default: the run's or the shape's name")

    def __post_init__(self) -> None:
        require_choice("model.weights", self.weights, WEIGHTS)
        random = self.weights == "random"
        require(random == (self.shape is not None), "model.shape", "goes with model.weights=random, and only")


@dataclass(frozen=True)
class EngineConfig:
    kind: str = key("torch", "'torch' (ours) or 'vllm' (pip install asuncion[vllm]; on GPUs)")
    device: str = key("auto", "'cuda', 'cpu', or 'auto': a GPU if there is one")
    dtype: str = key(
        "auto",
        "of weights, activations and cache: bfloat16, float32 or 'auto': bfloat16, but float32 on a CPU that "
        "neither multiplies bf16 nor runs the compiled decoder",
    )
    threads: int = key(0, "compute threads on a CPU; 0: all cores")
    slots: int = key(32, "requests that run at once, one token each in a step")
    waiting: int = key(64, "requests that may wait for a slot; beyond them a client is told 429")
    context_tokens: int | None = key(None, "most tokens of prompt and continuation; default: the model's own")
    cache_tokens: int = key(
        32_768, "torch: tokens whose keys and values fit the cache, all requests together; vllm sizes its own"
    )
    step_tokens: int = key(256, "most tokens of a step: one of each running request, then prompts")
    compiled: bool = key(True, "CPU: use serving/engine/native.cpp where it can run; GPU: CUDA graphs")

    def __post_init__(self) -> None:
        require_choice("engine.kind", self.kind, ENGINES)
        require_choice("engine.device", self.device, DEVICES)
        require_choice("engine.dtype", self.dtype, DTYPES)
        require(self.threads >= 0, "engine.threads", "must be 0 or more")
        for name in ("slots", "cache_tokens"):
            require(getattr(self, name) >= 1, f"engine.{name}", "must be at least 1")
        require(self.waiting >= 0, "engine.waiting", "must be 0 or more")
        require(self.step_tokens > self.slots, "engine.step_tokens", "must exceed engine.slots")
        fits = self.context_tokens is None or 1 < self.context_tokens <= self.cache_tokens
        require(fits, "engine.context_tokens", "must lie between 2 and engine.cache_tokens")


@dataclass(frozen=True)
class DeploymentConfig:
    host: str = key("127.0.0.1", "address that the HTTP port is bound to")
    port: int = key(8000, "HTTP port; 0: any that is free")
    allowed_hosts: tuple[str, ...] = key(
        (),
        "names that a request's Host and Origin may carry, without ports; default: if host is a loopback "
        "address, the names of loopback, else any",
    )
    receive_seconds: float = key(
        10.0, "a request's head must arrive within so many seconds, and its body within as many; else 408"
    )
    replicas: int = key(1, "engines; with max_replicas above it, the least number")
    max_replicas: int | None = key(None, "autoscaling: most engines")
    target_waiting: float = key(
        2.0, "autoscaling: add an engine when each has its slots full and so many more"
    )
    cpus: float = key(2, "CPU cores of a replica")
    gpus: float = key(0, "GPUs of a replica")
    accelerator: str | None = key(None, "Ray accelerator type of a replica's node, such as A40")
    haproxy: bool = key(
        True,
        "embedded session: Ray Serve's HAProxy ingress. The default proxy has three times its latency and no "
        "deadline for a request's head",
    )

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "deployment.port", "must lie between 0 and 65535")
        require(self.receive_seconds > 0, "deployment.receive_seconds", "must be above 0")
        require(self.replicas >= 1, "deployment.replicas", "must be at least 1")
        most = self.max_replicas
        require(most is None or most >= self.replicas, "deployment.max_replicas", "must reach replicas")
        require(self.cpus > 0, "deployment.cpus", "must be above 0")
        require(self.gpus >= 0, "deployment.gpus", "must be 0 or more")


@dataclass(frozen=True)
class LoadConfig:
    concurrency: tuple[int, ...] = key((1, 8), "closed loop: requests in flight, one measurement for each")
    requests: int = key(40, "measured requests of each closed-loop measurement, after the warm-up")
    warm_up: int = key(4, "requests that are sent first and not measured, of every measurement")
    prompt_tokens: str = key("64", "64, uniform(16,128) or lognormal(64,0.5)")
    output_tokens: str = key("48", "the same for the length of the continuation")
    rates: tuple[float, ...] = key((), "open loop: requests per second, one measurement for each")
    arrivals: str = key("poisson", "open loop: poisson or constant")
    seconds: float = key(10.0, "open loop: length of each measurement")
    trace: str | None = key(None, "open loop: a JSONL of at_seconds, prompt_tokens, output_tokens")
    conversations: str | None = key(None, "a ShareGPT-style JSONL: prompts and lengths come from it")
    timeout_seconds: float = key(120.0, "a request that takes longer is counted as an error")
    most_lag_ms: float = key(25.0, "a measurement in which this client was later than this (p99) is refused")
    greedy: bool = key(True, "temperature 0; false: temperature 1, with a seed for each request")
    seed: int = key(0, "of arrivals, lengths and prompts")

    def __post_init__(self) -> None:
        require_choice("load.arrivals", self.arrivals, ("poisson", "constant"))
        require(all(c >= 1 for c in self.concurrency), "load.concurrency", "must be at least 1")
        require(all(0 < r < 1e9 for r in self.rates), "load.rates", "must be above 0, and below 1e9")
        require(self.requests >= 1, "load.requests", "must be at least 1")
        require(self.warm_up >= 0, "load.warm_up", "must be 0 or more")
        for name in ("seconds", "timeout_seconds", "most_lag_ms"):
            require(0 < getattr(self, name) < 1e9, f"load.{name}", "must be above 0, and below 1e9")


@dataclass(frozen=True)
class SloConfig:
    ttft_ms: float | None = key(200.0, "most milliseconds to the first token")
    tpot_ms: float | None = key(50.0, "most milliseconds per further token, on average over a request")
    e2e_ms: float | None = key(None, "most milliseconds of a whole request")
    attainment: float = key(0.95, "share of requests that has to meet all of them")

    def __post_init__(self) -> None:
        require(0 < self.attainment <= 1, "slo.attainment", "must lie in (0, 1]")


@dataclass(frozen=True)
class SweepConfig:
    points: int = key(6, "measurements in search of the highest rate that meets the SLO; 0: no search")

    def __post_init__(self) -> None:
        require(self.points >= 0, "sweep.points", "must be 0 or more")


@dataclass(frozen=True)
class BenchConfig:
    name: str = key(
        "serve-bench", "the run directory under outputs/; an earlier one of this name is replaced"
    )
    directory: str = key("outputs", "where runs are kept")
    target: str | None = key(None, "an endpoint that runs already, such as http://host:8000, instead of ours")
    target_model: str | None = key(None, "with target: the model's name there; default: the first it lists")
    wandb: str = key("auto", "auto, offline, online or disabled")
    project: str = key("asuncion", "W&B project")
    compare: str | None = key(
        None, "race our engine instead: against transformers, vllm or serve (see README)"
    )
    rounds: int = key(5, "compare: rounds")
    python: str | None = key(None, "compare: interpreter of the peer's environment")
    output: str | None = key(
        None, "compare: file of the result; default: tests/baselines/<hardware>_<what>.json"
    )

    def __post_init__(self) -> None:
        require_choice("bench.wandb", self.wandb, WANDB_MODES)
        require(self.compare in (None, *COMPARISONS), "bench.compare", f"is one of: {', '.join(COMPARISONS)}")
        require(self.rounds >= 1, "bench.rounds", "must be at least 1")


@dataclass(frozen=True)
class ServeConfig:
    model: ModelConfig = key(ModelConfig, "")
    engine: EngineConfig = key(EngineConfig, "")
    deployment: DeploymentConfig = key(DeploymentConfig, "")
    session: SessionConfig = key(SessionConfig, "")
    load: LoadConfig = key(LoadConfig, "")
    slo: SloConfig = key(SloConfig, "")
    sweep: SweepConfig = key(SweepConfig, "")
    bench: BenchConfig = key(BenchConfig, "")

    def replica_options(self) -> dict[str, Any]:
        """How many replicas, in the words of Ray Serve's deployment options."""
        options = self.deployment
        if options.max_replicas is None:
            return {"num_replicas": options.replicas}
        scaling = {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": self.engine.slots + options.target_waiting,
        }
        return {"autoscaling_config": scaling}


def load(*, file: Path | None = None, dotlist: Sequence[str] = ()) -> ServeConfig:
    """Defaults <- YAML <- dotlist. Raises `ConfigError`."""
    return layered.load(ServeConfig, file=file, dotlist=dotlist)
