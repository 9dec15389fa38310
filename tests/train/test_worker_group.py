"""What Ray Train starts beside the workers, and what it changes in them."""

import builtins
import copy
import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.logging.patch_print import patch_print_function

from ft_service.spec.schema import ParallelSpec
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


def test_a_worker_prints_each_line_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in worker_group.worker_environment(ParallelSpec(use_gpu=False)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(builtins, "print", print)  # is restored afterwards
    patch_print_function()  # as Ray Train does in each worker
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    try:
        print("Loading: 1.00 of 1.00 GiB")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().out == "Loading: 1.00 of 1.00 GiB\n"


def test_the_controller_waits_for_a_coordinator_that_starts_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as client

    monkeypatch.setattr(client, "AUTOSCALING_REQUESTS_GET_TIMEOUT_S", 5)
    received = copy.copy(worker_group.CleanerCallback())  # through its state, as in the controller's process
    assert client.AUTOSCALING_REQUESTS_GET_TIMEOUT_S > 30
    assert vars(received) == vars(worker_group.CleanerCallback())
