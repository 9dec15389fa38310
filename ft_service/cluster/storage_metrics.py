"""Prometheus metrics of storage: how long its calls take in drivers, workers and servers. Ray exports them."""

from ray.util.metrics import Counter, Histogram

from ft_service.storage.timing import observe_calls

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300]

storage_seconds = Histogram(
    "ft_storage_seconds", "One call to the storage root, whatever its size.", _SECONDS, ("operation",)
)
storage_unreachable = Counter(
    "ft_storage_unreachable", "Calls that the storage root did not answer. They are repeated.", ("operation",)
)


def export_storage_metrics() -> None:
    """From now on this process, a driver, worker or actor of the cluster, exports how long storage takes."""
    observe_calls(_on_call)


def _on_call(operation: str, seconds: float, is_unreachable: bool) -> None:
    tags = {"operation": operation}
    storage_seconds.observe(max(seconds, 1e-9), tags)
    if is_unreachable:
        storage_unreachable.inc(1, tags)
