"""Prometheus metrics of jobs."""

from typing import Any

import pytest

from serve import job_metrics as metrics
from serve.job_metrics import update_job_metrics
from tests.serve.fine_tuning.job_world import make_world


class Gauge:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def set(self, value: float, tags: dict[str, Any]) -> None:
        self.values[tags["state"]] = value


def test_jobs_are_counted_by_state_and_waiting_is_the_longest(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Gauge()
    waiting = Gauge()
    monkeypatch.setattr(metrics, "_jobs", jobs)
    monkeypatch.setattr(metrics, "_waiting", waiting)
    world = make_world(tmp_path)
    world.until(world.job("a"), "succeeded")
    world.job("b")
    world.clock.forward(40)
    world.job("c")
    world.clock.forward(2)
    update_job_metrics(world.engine, world.clock())
    assert {state: count for state, count in jobs.values.items() if count} == {"succeeded": 1, "validating_files": 2}
    assert set(jobs.values) >= {"queued", "running", "paused", "failed", "cancelled"}
    assert waiting.values == {"validating_files": 42, "queued": 0}
    world.until(world.job("d"), "queued")
    update_job_metrics(world.engine, world.clock())
    assert jobs.values["queued"] >= 1
