"""The actors that Ray Train starts beside the workers."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.callbacks import placement_group_callback

from ft_service.train import worker_group

OWN = "10.0.0.1:6379"


def test_the_cleaner_asks_the_cluster_that_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:8265")
    monkeypatch.setenv("RAY_ADDRESS", "another:6379")
    started: list[type] = []

    class Actor:
        def __init__(self, kind: type) -> None:
            started.append(kind)

        def options(self, **options: Any) -> "Actor":
            return self

        def remote(self, **arguments: Any) -> Any:
            started[0](**arguments)
            return SimpleNamespace(start_monitoring=SimpleNamespace(remote=lambda: None))

    context = SimpleNamespace(get_actor_id=lambda: "a", gcs_address=OWN)
    monkeypatch.setattr(worker_group.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(placement_group_callback.ray, "remote", lambda **needs: Actor)
    monkeypatch.setattr(placement_group_callback.ray.runtime_context, "get_runtime_context", lambda: context)
    monkeypatch.setattr(placement_group_callback, "PlacementGroupCleaner", None)

    worker_group.CleanerCallback().after_controller_start(SimpleNamespace(run_id="r"))
    assert started == [worker_group.Cleaner]
    assert os.environ["RAY_ADDRESS"] == OWN
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
