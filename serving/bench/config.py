"""The keys of `python -m serving.bench`: those of serving, and what is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import config as layered
from cluster.config import key
from cluster.record.record import WANDB_MODES
from serving.bench.workload import lengths
from serving.config import ServeConfig

COMPARISONS = ("transformers", "vllm", "serve")


@dataclass(frozen=True)
class LoadConfig:
    concurrency: tuple[int, ...] = key(
        (1, 8), "closed loop: requests in flight, one measurement for each", least=1
    )
    requests: int = key(40, "measured requests of each closed-loop measurement, after the warm-up", least=1)
    warm_up: int = key(
        4, "requests that each measurement sends first, at the least; never fewer than are in flight", least=0
    )
    repeats: int = key(1, "measurements of each load; from 2 on figures have intervals", least=1)
    api: str = key("completions", "what is asked of the endpoint", choices=("completions", "chat"))
    prompt_tokens: str = key("64", "64, uniform(16,128), lognormal(64,0.5) or lognormal(64,0.5,MOST)")
    output_tokens: str = key("48", "the same for the length of the continuation")
    prefix_tokens: int = key(
        0, "tokens before load.prompt_tokens that prompts share, as a system prompt is shared", least=0
    )
    prefixes: int = key(1, "how many different ones there are; each prompt draws one", least=1)
    rates: tuple[float, ...] = key(
        (), "open loop: requests per second, one measurement for each", above=0, below=1e9
    )
    arrivals: str = key("poisson", "open loop: gaps between requests", choices=("poisson", "constant"))
    seconds: float = key(10.0, "open loop: length of each measurement", above=0, below=1e9)
    trace: str | None = key(
        None,
        "open loop: arrivals and lengths from a file: JSONL of at_seconds, prompt_tokens, output_tokens; "
        "Mooncake's JSONL; Azure's or BurstGPT's CSV",
    )
    conversations: str | None = key(
        None, "prompts and lengths from a file: ShareGPT's JSON array, or a JSONL of such conversations"
    )
    turns: str = key(
        "first",
        "with conversations: the first turn of each, or all in turn; then load.rates are of conversations",
        choices=("first", "all"),
    )
    timeout_seconds: float = key(
        120.0, "a request that takes longer is counted as an error", above=0, below=1e9
    )
    most_lag_ms: float = key(
        25.0, "a measurement in which this client lagged more (p99) is refused", above=0, below=1e9
    )
    least_succeeded: float = key(
        0.5, "share of a load's requests that must succeed; else the exit code is 1", above=0, most=1
    )
    greedy: bool = key(True, "temperature 0; false: temperature 1, with a seed for each request")
    seed: int = key(0, "of arrivals, lengths and prompts")

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens"):
            lengths(getattr(self, name), key=f"load.{name}")


@dataclass(frozen=True)
class SloConfig:
    ttft_ms: float | None = key(200.0, "most milliseconds to the first token")
    tpot_ms: float | None = key(50.0, "most milliseconds per further token, on average over a request")
    e2e_ms: float | None = key(None, "most milliseconds of a whole request")
    attainment: float = key(0.95, "share of requests that must meet all of them", above=0, most=1)


@dataclass(frozen=True)
class SweepConfig:
    points: int = key(
        6, "measurements in search of the highest rate that meets the SLO; 0: no search", least=0
    )


@dataclass(frozen=True)
class BenchConfig:
    name: str = key(
        "serve-bench", "the run directory under outputs/; an earlier one of this name is replaced"
    )
    directory: str = key("outputs", "where runs are kept")
    target: str | None = key(
        None,
        "measure this running endpoint instead of ours, such as http://host:8000; OPENAI_API_KEY is sent",
    )
    target_model: str | None = key(None, "with target: the model's name there; default: the first listed")
    target_context_tokens: int | None = key(
        None, "with target: most tokens of prompt and answer, if the endpoint does not say it", least=2
    )
    wandb: str = key("auto", "W&B mode", choices=WANDB_MODES)
    project: str = key("asuncion", "W&B project")
    compare: str | None = key(None, "race our engine instead, against this", choices=COMPARISONS)
    rounds: int = key(5, "compare: rounds", least=1)
    python: str | None = key(None, "compare: interpreter of the peer's environment")
    output: str | None = key(
        None, "compare: file of the result; default: tests/baselines/<hardware>_<what>.json"
    )


@dataclass(frozen=True)
class ServeBenchConfig(ServeConfig):
    load: LoadConfig = key(LoadConfig, "")
    slo: SloConfig = key(SloConfig, "")
    sweep: SweepConfig = key(SweepConfig, "")
    bench: BenchConfig = key(BenchConfig, "")


def load(*, file: Path | None = None, dotlist: Sequence[str] = ()) -> ServeBenchConfig:
    """Defaults <- YAML <- dotlist. Raises `ConfigError`."""
    return layered.load(ServeBenchConfig, file=file, dotlist=dotlist)
