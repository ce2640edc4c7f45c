"""Figures for Prometheus. Those that mean what vLLM's do have vLLM's names, so its dashboards show them.

https://docs.vllm.ai/en/latest/usage/metrics.html
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.engine.protocol import Engine

LABEL = "model_name"
BUCKETS = [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)]  # seconds, of LATENCIES


class Figure(NamedTuple):
    """A figure of `EngineStats`. `total`: it only grows, so its name ends in _total."""

    name: str
    text: str
    total: bool = False


LATENCIES = {
    "time_to_first_token": Figure("vllm:time_to_first_token_seconds", "From the request's arrival here"),
    "request": Figure("vllm:e2e_request_latency_seconds", "From its arrival here to its last token"),
}
FIGURES = {
    "running": Figure("vllm:num_requests_running", "Requests in a slot"),
    "waiting": Figure("vllm:num_requests_waiting", "Requests that wait for a slot"),
    "free_cache_tokens": Figure("asuncion_free_cache_tokens", "Tokens that the cache has room for"),
    "prompt_tokens": Figure("vllm:prompt_tokens_total", "Tokens of prompts prefilled", total=True),
    "generated_tokens": Figure("vllm:generation_tokens_total", "Tokens sampled", total=True),
    "finished": Figure("asuncion_requests_finished_total", "Requests finished", total=True),
    "cancelled": Figure("asuncion_requests_cancelled_total", "Requests cancelled", total=True),
    "steps": Figure("asuncion_steps_total", "Steps of the engine", total=True),
}
REFUSED = Figure("asuncion_requests_refused_total", "Requests answered with an error", total=True)


class Metrics:
    """The figures of one engine, at GET /metrics.

    Args:
        observe: called with the name and seconds of each of LATENCIES, too.
    """

    def __init__(self, engine: Engine, observe: Callable[[str, float], None]) -> None:
        self._engine, self._observe = engine, observe
        self._registry = registry = CollectorRegistry()
        self._model = engine.info.model
        labels = [LABEL, "status"]
        self._refused = Counter(REFUSED.name, REFUSED.text, labels, registry=registry)
        self._latencies = {
            name: Histogram(figure.name, figure.text, [LABEL], registry=registry, buckets=BUCKETS).labels(
                self._model
            )
            for name, figure in LATENCIES.items()
        }
        registry.register(self)

    def observe(self, name: str, seconds: float) -> None:
        """Note one of LATENCIES."""
        self._latencies[name].observe(seconds)
        self._observe(name, seconds)

    def refused(self, status: int) -> None:
        """Note an answer that is an error."""
        self._refused.labels(self._model, str(status)).inc()

    def describe(self) -> list[Metric]:
        """Nothing. Without this method the registry would call `collect` at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """FIGURES, as they are now."""
        stats = self._engine.stats()
        for name, figure in FIGURES.items():
            family = CounterMetricFamily if figure.total else GaugeMetricFamily
            metric = family(figure.name, figure.text, labels=[LABEL])
            metric.add_metric([self._model], getattr(stats, name))
            yield metric

    def text(self) -> bytes:
        """All of them in Prometheus' text format. Raises `EngineFailed`."""
        return generate_latest(self._registry)
