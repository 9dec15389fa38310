"""Prometheus metrics of storage: how long its calls take in drivers, workers and servers. Ray exports them.

All are gauges over the last minute: Ray keeps the counters and histograms of every process that a node has ever had.
"""

import functools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from ray.util.metrics import Gauge

from ft_service.storage.timing import observe_calls

EXPORT_SECONDS = 5.0
"""Ray drops a gauge that was not set for 20 seconds."""
WINDOW_SECONDS = 60.0
_MOST_CALLS = 20_000
_OPERATION = ("operation",)

storage_mean = Gauge("ft_storage_mean_seconds", "Mean time of a call in the last minute.", _OPERATION)
storage_slowest = Gauge("ft_storage_slowest_seconds", "The slowest call of the last minute.", _OPERATION)
storage_calls = Gauge("ft_storage_calls", "Calls in the last minute.", _OPERATION)
storage_unreachable = Gauge(
    "ft_storage_unreachable", "Calls of the last minute that storage did not answer. They are repeated.", _OPERATION
)


@dataclass(frozen=True)
class _Call:
    ended_at: float
    operation: str
    seconds: float
    is_unreachable: bool


class StorageMetrics:
    """The calls of this process in the last minute, by operation."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: deque[_Call] = deque(maxlen=_MOST_CALLS)

    def on_call(self, operation: str, seconds: float, is_unreachable: bool) -> None:
        """Called by all threads: appending to a deque needs no lock."""
        self._calls.append(_Call(self._clock(), operation, seconds, is_unreachable))

    def export(self) -> None:
        """Set the gauges. An operation without calls has none, and disappears."""
        begin = self._clock() - WINDOW_SECONDS
        while self._calls and self._calls[0].ended_at < begin:
            self._calls.popleft()
        by_operation: dict[str, list[_Call]] = defaultdict(list)
        for call in self._calls.copy():
            by_operation[call.operation].append(call)
        for operation, calls in by_operation.items():
            tags = {"operation": operation}
            seconds = [call.seconds for call in calls]
            storage_mean.set(sum(seconds) / len(seconds), tags)
            storage_slowest.set(max(seconds), tags)
            storage_calls.set(len(calls), tags)
            storage_unreachable.set(sum(call.is_unreachable for call in calls), tags)


@functools.cache
def export_storage_metrics() -> None:
    """From now on this process, a driver, worker or actor of the cluster, exports how long storage takes."""
    metrics = StorageMetrics()
    observe_calls(metrics.on_call)

    def export_often() -> None:
        while True:
            time.sleep(EXPORT_SECONDS)
            metrics.export()

    threading.Thread(target=export_often, name="storage-metrics", daemon=True).start()
