"""The keys of serving. The defaults serve a small model on two CPU cores."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import config as layered
from cluster.config import key, require
from cluster.session import SessionConfig

ENGINES = ("torch", "vllm")
DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")
UNKNOWN = ("ignore", "refuse")
WEIGHTS = ("checkpoint", "random")


@dataclass(frozen=True)
class ModelConfig:
    path: str = key(
        "newest",
        "a Hugging Face directory (LLaMA, Mistral, Qwen2, Qwen3); a run's name or directory, exported if "
        "needed; or 'newest'",
    )
    shape: str | None = key(None, "weights=random: a name from training/model/shapes.py, or a config.json")
    weights: str = key(
        "checkpoint", "'random' measures the speed of a shape without a checkpoint", choices=WEIGHTS
    )
    seed: int = key(0, "weights=random: seed of the weights")
    name: str | None = key(None, "what clients call the model; default: the run's or the shape's name")

    def __post_init__(self) -> None:
        random = self.weights == "random"
        require(
            random == (self.shape is not None),
            "model.shape",
            "only with model.weights=random, which needs it",
        )


@dataclass(frozen=True)
class EngineConfig:
    kind: str = key(
        "torch", "'torch' is ours, 'vllm' is pip install asuncion[vllm], for GPUs", choices=ENGINES
    )
    device: str = key("auto", "'auto': a GPU if there is one", choices=DEVICES)
    dtype: str = key(
        "auto",
        "of weights, activations and cache; 'auto': bfloat16, but float32 on a CPU that neither multiplies "
        "bf16 nor runs the compiled decoder",
        choices=DTYPES,
    )
    threads: int = key(0, "compute threads on a CPU; 0: all cores", least=0)
    slots: int = key(32, "requests that run at once, one token each in a step", least=1)
    waiting: int = key(64, "requests that may wait for a slot; more get 429", least=0)
    context_tokens: int | None = key(
        None, "most tokens of prompt and continuation; default: the model's own", least=2
    )
    cache_tokens: int = key(
        32_768,
        "torch: tokens of all requests whose keys and values fit the cache; vllm sizes its own",
        least=1,
    )
    step_tokens: int | None = key(
        None,
        "most tokens of a step: one of each running request, then prompts. Default: 256 on a CPU; on a GPU "
        "8192 and one for each slot. Products of many rows are faster (an H200 reaches up to 54% of its peak "
        "with 8192), but running requests wait while a step of prompts runs",
        least=2,
    )
    compiled: bool = key(True, "CPU: use serving/engine/native.cpp if it can run; GPU: use CUDA graphs")

    def __post_init__(self) -> None:
        fits = self.step_tokens is None or self.step_tokens > self.slots
        require(fits, "engine.step_tokens", "must exceed engine.slots")
        fits = self.context_tokens is None or self.context_tokens <= self.cache_tokens
        require(fits, "engine.context_tokens", "must not exceed engine.cache_tokens")

    def step_tokens_on(self, device: str) -> int:
        """`step_tokens`, or its default on "cpu" or "cuda"."""
        if self.step_tokens is not None:
            return self.step_tokens
        return 8192 + self.slots if device == "cuda" else max(256, self.slots + 1)


@dataclass(frozen=True)
class DeploymentConfig:
    host: str = key("127.0.0.1", "address that the HTTP port is bound to")
    port: int = key(8000, "HTTP port; 0: any free port", least=0, most=65535)
    allowed_hosts: tuple[str, ...] = key(
        (),
        "names that a request's Host and Origin may carry, without ports; default: if host is a loopback "
        "address, the names of loopback, else any",
    )
    api_key: str | None = key(
        None,
        "name of the environment variable with the key that clients must send as `Authorization: Bearer "
        "KEY`; default: no key",
    )
    cors_origins: tuple[str, ...] = key(
        (), "origins whose web pages may read answers (CORS), such as https://example.org; '*': any"
    )
    unknown_parameters: str = key(
        "ignore",
        "of requests; 'ignore', as vLLM does: the header X-Ignored-Parameters of the answer names them",
        choices=UNKNOWN,
    )
    receive_seconds: float = key(
        10.0, "a request's head must arrive within this time, and then its body; else 408", above=0
    )
    replicas: int = key(1, "engines; with max_replicas above it, the least number", least=1)
    max_replicas: int | None = key(None, "autoscaling: most engines")
    target_waiting: float = key(
        2.0, "autoscaling: add an engine when all slots are full and this many requests wait for each engine"
    )
    cpus: float = key(2, "CPU cores of a replica", above=0)
    gpus: float = key(0, "GPUs of a replica", least=0)
    accelerator: str | None = key(None, "Ray accelerator type of a replica's node, such as A40")
    haproxy: bool = key(
        True,
        "embedded session: Ray Serve's HAProxy ingress. The default proxy has three times its latency and no "
        "deadline for a request's head",
    )

    def __post_init__(self) -> None:
        most = self.max_replicas
        enough = most is None or most >= self.replicas
        require(enough, "deployment.max_replicas", "must be at least deployment.replicas")
        whole = all(re.fullmatch(r"\*|[a-z]+://[^/\s]+", origin) for origin in self.cors_origins)
        require(
            whole, "deployment.cors_origins", "each must be '*' or like https://example.org, without a path"
        )


@dataclass(frozen=True)
class ServeConfig:
    model: ModelConfig = key(ModelConfig, "")
    engine: EngineConfig = key(EngineConfig, "")
    deployment: DeploymentConfig = key(DeploymentConfig, "")
    session: SessionConfig = key(SessionConfig, "")

    def __post_init__(self) -> None:
        options = self.deployment
        ours = self.engine.kind != "vllm"
        for name, unset in (("api_key", None), ("cors_origins", ()), ("unknown_parameters", "ignore")):
            theirs = "has no effect with engine.kind=vllm, whose endpoint is Ray's"
            require(ours or getattr(options, name) == unset, f"deployment.{name}", theirs)

    def replica_options(self) -> dict[str, Any]:
        """How many replicas, as Ray Serve's deployment options."""
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
