"""Prometheus metrics of requests, per base and model. Ray exports them on every node, beside its own.

Model names are as many as are asked for, so that none may be free text of a client: unknown models have no metrics.
"""

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ray.util.metrics import Counter, Gauge, Histogram

from serve.engines.engine import EngineStats

_MODEL = ("base", "model")
_BASE = ("base", "replica")
REFRESH_SECONDS = 5.0
"""Ray drops a gauge that was not set for 20 seconds, whatever its value."""
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]
_TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1]

_requests = Counter("ft_serve_requests", "Requests that have ended, by outcome.", (*_MODEL, "outcome"))
_prompt_tokens = Counter("ft_serve_prompt_tokens", "Tokens of prompts.", _MODEL)
_generated_tokens = Counter("ft_serve_generated_tokens", "Tokens of answers.", _MODEL)
_first_token = Histogram("ft_serve_time_to_first_token_seconds", "From request to first token.", _SECONDS, _MODEL)
_per_token = Histogram(
    "ft_serve_time_per_output_token_seconds",
    "Between tokens after the first, mean of a request.",
    _TOKEN_SECONDS,
    _MODEL,
)
_request_seconds = Histogram("ft_serve_request_seconds", "From request to end of answer.", _SECONDS, _MODEL)
_in_flight = Gauge("ft_serve_requests_in_flight", "Requests without a complete answer.", ("base",))

_running = Gauge("ft_engine_running", "Requests in the batch.", _BASE)
_waiting = Gauge("ft_engine_waiting", "Requests that wait for a place in the batch.", _BASE)
_cache_used = Gauge("ft_engine_cache_used", "Share of the key/value cache that requests hold.", _BASE)
_adapters = Gauge("ft_engine_adapters_loaded", "Adapters in memory.", _BASE)
_adapter_bytes = Gauge("ft_engine_adapter_bytes", "Bytes of adapters in memory.", _BASE)
_totals = {
    "prompt_tokens": Counter("ft_engine_prompt_tokens", "Prompt tokens worked on.", _BASE),
    "cached_tokens": Counter("ft_engine_cached_tokens", "Prompt tokens found in the prefix cache.", _BASE),
    "generated_tokens": Counter("ft_engine_generated_tokens", "Tokens generated.", _BASE),
    "steps": Counter("ft_engine_steps", "Forward passes.", _BASE),
    "adapter_loads": Counter("ft_engine_adapter_loads", "Adapters loaded.", _BASE),
    "adapter_load_seconds": Counter("ft_engine_adapter_load_seconds", "Seconds spent on loading adapters.", _BASE),
    "preemptions": Counter("ft_engine_preemptions", "Requests put back to make room in the cache.", _BASE),
}


@dataclass(frozen=True)
class EndedRequest:
    """What is known of a request at its end."""

    base: str
    model: str
    outcome: str
    """`ok`, `error` or `cancelled`."""
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    seconds_to_first: float | None
    """None if no token came."""


class Metrics:
    """What one gateway counts."""

    def __init__(self, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._in_flight: dict[str, int] = {}
        refresh = partial(_refresh_often, weakref.ref(self), refresh_seconds)
        threading.Thread(target=refresh, name="metrics", daemon=True).start()

    def begin(self, base: str) -> float:
        """Count a request; returns the time on the clock of `end`."""
        self._add_in_flight(base, 1)
        return time.perf_counter()

    def end(self, request: EndedRequest) -> None:
        tags = {"base": request.base, "model": request.model}
        self._add_in_flight(request.base, -1)
        _requests.inc(1, {**tags, "outcome": request.outcome})
        _request_seconds.observe(max(request.seconds, 1e-9), tags)
        if request.prompt_tokens:
            _prompt_tokens.inc(request.prompt_tokens, tags)
        if request.seconds_to_first is None:
            return
        _first_token.observe(max(request.seconds_to_first, 1e-9), tags)
        if request.generated_tokens:
            _generated_tokens.inc(request.generated_tokens, tags)
        if request.generated_tokens > 1:
            seconds = (request.seconds - request.seconds_to_first) / (request.generated_tokens - 1)
            _per_token.observe(max(seconds, 1e-9), tags)

    def _add_in_flight(self, base: str, number: int) -> None:
        self._in_flight[base] = self._in_flight.get(base, 0) + number
        _in_flight.set(self._in_flight[base], {"base": base})

    def refresh(self) -> None:
        """Set the gauges again: long answers begin and end none for a while."""
        for base, number in list(self._in_flight.items()):
            _in_flight.set(number, {"base": base})


def _refresh_often(metrics_of: Callable[[], Metrics | None], seconds: float) -> None:
    while (metrics := metrics_of()) is not None:
        metrics.refresh()
        del metrics
        time.sleep(seconds)


class EngineMetrics:
    """What one replica exports of its engine."""

    def __init__(self, base: str, replica: str) -> None:
        self._tags = {"base": base, "replica": replica}
        self._before: Mapping[str, float] = {}

    def export(self, stats: EngineStats) -> None:
        """Call it every few seconds; totals grow by what is new since the last call."""
        _running.set(stats.running, self._tags)
        _waiting.set(stats.waiting, self._tags)
        _cache_used.set(stats.cache_used, self._tags)
        _adapters.set(len(stats.loaded_adapters), self._tags)
        _adapter_bytes.set(stats.adapter_bytes, self._tags)
        for name, counter in _totals.items():
            new = stats.counters.get(name, 0) - self._before.get(name, 0)
            if new > 0:
                counter.inc(new, self._tags)
        self._before = stats.counters
