"""The keys of serving and of its benchmark. The defaults serve a small model on two CPU cores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import config as layered
from cluster.config import key, require, require_choice
from cluster.session import SessionConfig

ENGINES = ("torch", "vllm")
DTYPES = ("bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")
WEIGHTS = ("checkpoint", "random")


@dataclass(frozen=True)
class ModelConfig:
    path: str = key(
        "newest",
        "a Hugging Face LLaMA directory; a run's name or directory, exported where needed; or 'newest'",
    )
    shape: str | None = key(None, "weights=random: a name from training/shapes.py, or a config.json")
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
    dtype: str = key("bfloat16", "of weights, activations and cache: bfloat16 or float32")
    threads: int = key(0, "compute threads on a CPU; 0: all cores")
    slots: int = key(32, "requests that run at once, one token each in a step")
    waiting: int = key(64, "requests that may wait for a slot; beyond them a client is told 429")
    context_tokens: int | None = key(None, "most tokens of prompt and continuation; default: the model's own")
    cache_tokens: int = key(
        32_768, "torch: tokens whose keys and values fit the cache, all requests together; vllm sizes its own"
    )
    step_tokens: int = key(256, "most tokens of a step: one of each running request, then prompts")
    compiled: bool = key(True, "CPU: use serving/native.cpp where it can run; GPU: CUDA graphs")

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
    port: int = key(8000, "HTTP port")
    replicas: int = key(1, "engines; with max_replicas above it, the least number")
    max_replicas: int | None = key(None, "autoscaling: most engines")
    target_waiting: float = key(
        2.0, "autoscaling: add an engine when each has its slots full and so many more"
    )
    cpus: float = key(2, "CPU cores of a replica")
    gpus: float = key(0, "GPUs of a replica")
    accelerator: str | None = key(None, "Ray accelerator type of a replica's node, such as A40")
    haproxy: bool = key(True, "Ray Serve's HAProxy ingress: a third of the default proxy's latency")

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "deployment.port", "must lie between 0 and 65535")
        require(self.replicas >= 1, "deployment.replicas", "must be at least 1")
        most = self.max_replicas
        require(most is None or most >= self.replicas, "deployment.max_replicas", "must reach replicas")
        require(self.cpus > 0, "deployment.cpus", "must be above 0")
        require(self.gpus >= 0, "deployment.gpus", "must be 0 or more")


@dataclass(frozen=True)
class ServeConfig:
    model: ModelConfig = key(ModelConfig, "")
    engine: EngineConfig = key(EngineConfig, "")
    deployment: DeploymentConfig = key(DeploymentConfig, "")
    session: SessionConfig = key(SessionConfig, "")


def load(*, file: Path | None = None, dotlist: Sequence[str] = ()) -> ServeConfig:
    """Defaults <- YAML <- dotlist. Raises `ConfigError`."""
    return layered.load(ServeConfig, file=file, dotlist=dotlist)
