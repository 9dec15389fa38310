"""Metrics of requests: a gauge lasts for as long as what it counts."""

import gc
import threading

import pytest

from serve import metrics as module
from serve.metrics import Metrics
from tests.hosts import wait_for

SECONDS = 60


class Gauge:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags["base"]] = value


def refreshing() -> int:
    return sum(thread.name == "metrics" for thread in threading.enumerate())


def test_requests_in_flight_are_exported_again_while_none_begins_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray drops a gauge that was not set for 20 seconds, and a long answer takes minutes."""
    gauge = Gauge()
    monkeypatch.setattr(module, "_in_flight", gauge)
    before = refreshing()
    metrics = Metrics(refresh_seconds=0.001)
    metrics.begin("pair")
    metrics.begin("pair")
    gauge.values.clear()
    wait_for(lambda: gauge.values == {"pair": 2}, SECONDS)
    del metrics
    gc.collect()
    wait_for(lambda: refreshing() == before, SECONDS)  # it ends with its gateway
