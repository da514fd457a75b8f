"""What Prometheus reads. Owns the metrics' names and labels, in a registry of its own; counts of the core are the engine's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from brim.engine.completion import CompletionChunk
from brim.server.engine_account import EngineAccount
from brim.server.seams import EngineClient

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PER_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
# What the engine's `stats` and `memory` call it, the metric's name, its meaning.
_GAUGES = (
    ("running", "brim_requests_running", "Sequences being computed."),
    ("waiting", "brim_requests_waiting", "Sequences in the queue."),
)
_COUNTERS = (
    ("num_preemptions", "brim_preemptions", "Sequences that gave their blocks back and start again."),
    ("num_prefix_hit_tokens", "brim_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."),
    ("num_refused", "brim_requests_refused", "Requests that the engine refused."),
    ("num_failed_steps", "brim_failed_steps", "Steps that failed, with the requests in them."),
    (
        "num_out_of_memory",
        "brim_out_of_memory_steps",
        "Steps out of memory, tried again with a smaller KV cache.",
    ),
    ("num_kv_shrinks", "brim_kv_shrinks", "Times the KV cache gave memory back to the device."),
    ("num_kv_grows", "brim_kv_grows", "Times the KV cache took memory again."),
)
_READINGS = (
    ("cap_bytes", "brim_memory_cap_bytes", "The cap on what the engine may hold."),
    ("resident_bytes", "brim_memory_held_bytes", "What the engine's process holds on the device, as read now."),
    ("peak_bytes", "brim_memory_peak_bytes", "The most it held since the last phase of its start."),
    ("free_bytes", "brim_device_free_bytes", "What is free on the device, as read now."),
    ("total_bytes", "brim_device_total_bytes", "The device's memory, or the limit that applies to the engine."),
)
_REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class ServerMetrics:
    """One a server. Tokens and times are seen here; queues, cache and memory are asked of the engine at each scrape."""

    def __init__(self, engine: EngineClient, account: EngineAccount) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._account = account
        self._registry.register(_EngineMetrics(engine, account))
        registry = self._registry
        self._prompt_tokens = Counter("brim_prompt_tokens", "Prompt tokens of accepted requests.", registry=registry)
        self._new_tokens = Counter("brim_generation_tokens", "Tokens generated.", registry=registry)
        self._first_token = Histogram(
            "brim_time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=_FIRST_TOKEN_S,
            registry=registry,
        )  # fmt: skip
        self._per_token = Histogram(
            "brim_time_per_output_token_seconds", "Mean time of a request's tokens after its first.", buckets=_PER_TOKEN_S,
            registry=registry,
        )  # fmt: skip
        self._request = Histogram(
            "brim_request_seconds", "From a request's arrival to its end.", buckets=_REQUEST_S, registry=registry
        )

    @contextlib.contextmanager
    def observe(self, num_prompt_tokens: int) -> Iterator[Observation]:
        """Around one request of the engine."""
        observation = Observation(self._new_tokens)
        try:
            yield observation
        finally:
            if observation.first_s is not None:
                self._prompt_tokens.inc(num_prompt_tokens)
                self._first_token.observe(observation.first_s)
                self._request.observe(observation.elapsed_s)
            if observation.per_token_s is not None:
                self._per_token.observe(observation.per_token_s)

    @property
    def num_prompt_tokens(self) -> int:
        """Of requests that got their first token."""
        return int(_samples(self._prompt_tokens)["_total"])

    @property
    def num_new_tokens(self) -> int:
        """Generated since the server began."""
        return int(_samples(self._new_tokens)["_total"])

    @property
    def first_token(self) -> dict[str, Any]:
        """Times to the first token: how many, their sum, and how many were within each bound (null: any)."""
        found = _samples(self._first_token)
        buckets = [(bound, found[f"_bucket{bound:g}"]) for bound in _FIRST_TOKEN_S] + [(None, found["_count"])]
        within = [{"within_s": bound, "count": int(count)} for bound, count in buckets]
        return {"count": int(found["_count"]), "sum_s": found["_sum"], "buckets": within}

    async def page(self) -> bytes:
        """The text that is scraped; where the engine does not answer, without what it would say."""
        await self._account.refresh()
        return generate_latest(self._registry)


class Observation:
    """The times of one request."""

    def __init__(self, new_tokens: Counter) -> None:
        self._new_tokens = new_tokens
        self._arrival_s = time.perf_counter()
        self._num_first = 0
        self._num_tokens = 0
        self._last_s = 0.0
        self.first_s: float | None = None

    def note(self, chunk: CompletionChunk) -> None:
        """A chunk came."""
        num_new = chunk.usage.completion_tokens - self._num_tokens
        if num_new <= 0:
            return
        self._new_tokens.inc(num_new)
        self._num_tokens = chunk.usage.completion_tokens
        self._last_s = self.elapsed_s
        if self.first_s is None:
            self.first_s, self._num_first = self._last_s, num_new

    @property
    def elapsed_s(self) -> float:
        """Since its arrival."""
        return time.perf_counter() - self._arrival_s

    @property
    def per_token_s(self) -> float | None:
        """None before the second token."""
        later = self._num_tokens - self._num_first
        return (self._last_s - self.first_s) / later if self.first_s is not None and later else None


class _EngineMetrics(Collector):
    """What the engine said at the last scrape, as metrics."""

    def __init__(self, engine: EngineClient, account: EngineAccount) -> None:
        self._engine = engine
        self._account = account

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        stats, memory = self._account.stats, self._account.memory
        up = GaugeMetricFamily("brim_engine_up", "1 where requests are served.", 1.0 if self._engine.is_healthy else 0.0)
        yield up
        yield CounterMetricFamily("brim_engine_restarts", "Engine processes started again.", self._engine.num_restarts)
        for key, name, text in _GAUGES:
            if key in stats:
                yield GaugeMetricFamily(name, text, stats[key])
        for key, name, text in _COUNTERS:
            if key in stats:
                yield CounterMetricFamily(name, text, stats[key])
        if stats:
            yield _kv_blocks(stats.get("kv", {}))
        if memory:
            yield from _memory(memory)


def _samples(metric: Collector) -> dict[str, float]:
    """Of one metric without labels: value by suffix; a bucket's suffix ends in its bound."""
    (family,) = metric.collect()
    return {
        sample.name.removeprefix(family.name) + (f"{float(bound):g}" if (bound := sample.labels.get("le")) else ""): sample.value
        for sample in family.samples
    }


def _kv_blocks(kv: Mapping[str, Any]) -> Metric:
    family = GaugeMetricFamily("brim_kv_blocks", "KV blocks by state.", labels=("group", "state"))
    for group in kv.get("groups", ()):
        name = f"{group['kind']}-{group['window']}" if group.get("window") else str(group["kind"])
        for state, count in group["num_blocks"].items():
            if state != "total":
                family.add_metric((name, state), count)
    return family


def _memory(memory: Mapping[str, Any]) -> Iterator[Metric]:
    by_category: dict[str, int] = {}
    for line in memory.get("ledger", ()):
        by_category[line["category"]] = by_category.get(line["category"], 0) + line["bytes"]
    family = GaugeMetricFamily("brim_memory_bytes", "The memory ledger by category, as it was proven.", labels=("category",))
    for category, num_bytes in by_category.items():
        family.add_metric((category,), num_bytes)
    yield family
    for key, name, text in _READINGS:
        if key in memory:
            yield GaugeMetricFamily(name, text, memory[key])
