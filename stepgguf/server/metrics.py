"""Counters in Prometheus' text format. What the engine counts is read from it when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepgguf.runtime.engine import Engine, Finished

FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # a long prompt takes minutes
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """Counts requests, and answers as a `GenerationWatch`."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        self._requests = Counter(
            "stepgguf_http_requests", "Answered requests.", ("method", "route", "status"), registry=registry
        )
        self._answers = Counter(
            "stepgguf_answers", "Answers of the model, by how they ended.", ("reason",), registry=registry
        )
        self._task_limits = Counter(
            "stepgguf_task_limits", "Requests of tasks that had reached a limit.", ("limit",), registry=registry
        )
        self._first_token = Histogram(
            "stepgguf_time_to_first_token_seconds",
            "From the request to its first token; queue and prompt included.",
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self._per_token = Histogram(
            "stepgguf_time_per_token_seconds",
            "Mean of an answer, after its first token.",
            buckets=PER_TOKEN,
            registry=registry,
        )

    def count_request(self, method: str, route: str, status: int) -> None:
        self._requests.labels(method, route, str(status)).inc()

    def count_task_limit(self, limit: str) -> None:
        self._task_limits.labels(limit).inc()

    def on_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def on_finished(self, finished: Finished) -> None:
        self._answers.labels(finished.reason).inc()
        if finished.timings.n_generated > 1:
            self._per_token.observe(finished.timings.generation_seconds / (finished.timings.n_generated - 1))

    def text(self) -> bytes:
        """Return all counters, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text, count in (
            ("prompt_tokens", "Tokens of prompts.", stats.n_prompt_tokens),
            ("cached_tokens", "Tokens of prompts that were in the cache.", stats.n_cached_tokens),
            ("generated_tokens", "Tokens that were made.", stats.n_generated_tokens),
            ("prompt_seconds", "Time spent reading prompts.", stats.prompt_seconds),
            ("generation_seconds", "Time spent making tokens.", stats.generation_seconds),
            ("decodes", "Runs of the model.", stats.n_steps),
            ("engine_recoveries", "Contexts that had to be made anew.", stats.n_recoveries),
        ):
            yield CounterMetricFamily(f"stepgguf_{name}", text, value=count)
        for name, text, counts in (
            ("drafted_tokens", "Tokens that an MTP head proposed.", stats.drafted),
            ("accepted_tokens", "Tokens of an MTP head that the model agreed with.", stats.accepted),
        ):
            family = CounterMetricFamily(f"stepgguf_{name}", text, labels=("head",))
            for head, count in enumerate(counts):
                family.add_metric((str(head),), count)
            yield family
        for name, text, value in (
            ("running_requests", "Requests that are being decoded.", stats.n_running),
            ("queued_requests", "Requests that wait.", stats.n_queued),
            ("context_used_tokens", "Cells of the context in use.", stats.n_context_used),
            ("cache_bytes", "Host memory of saved conversations.", stats.cache_bytes),
            ("engine_alive", "1 while the engine can take requests.", stats.alive),
        ):
            yield GaugeMetricFamily(f"stepgguf_{name}", text, value=value)
