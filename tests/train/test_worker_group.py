"""The driver's side of Ray Train: which of its parts a run needs, how long they live, and what workers are spared."""

import builtins
import logging
import pickle
import socket
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.train.v2._internal.callbacks import DatasetsCallback, WorkingDirectorySetupCallback
from ray.train.v2._internal.callbacks.metrics import WorkerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, state
from ray.train.v2._internal.execution.worker_group import worker_group as train_worker_group
from ray.train.v2._internal.logging.patch_print import patch_print_function

from ft_service.cluster.ray_cluster import remove_placement_groups
from ft_service.spec.schema import ParallelSpec
from ft_service.train import ray_worker, worker_group
from ft_service.train.worker_group import Controller, LastingTrainController

JOB = "01000000"
WORKERS_DIED = ray.train.WorkerGroupError("worker 1 died", {1: RuntimeError("killed")})
NO_ROOM = ray.train.ControllerError(WorkerGroupStartupTimeoutError(2))
CONTROLLER_FAILED = ray.train.ControllerError(RuntimeError("bug"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The actors that were started; an attempt returns the error that it is given, or raises it if Ray would."""
    actors: list[type] = []

    def start(actor_class: type) -> Any:
        actors.append(actor_class)
        return SimpleNamespace(train=SimpleNamespace(remote=lambda *, error: error))

    def get(error: Any) -> Any:
        if isinstance(error, ray.exceptions.RayError):
            raise error
        return SimpleNamespace(error=error)

    for name in ("WORKER_HEALTH_CHECK_TIMEOUT_S", "ENABLE_PREEMPTION_WATCHER", "HEALTH_CHECK_INTERVAL_S"):
        monkeypatch.setenv(f"RAY_TRAIN_{name}", "1")  # so that it is restored at the end
    monkeypatch.setattr(worker_group, "this_node_id", lambda: "node")
    monkeypatch.setattr(ray, "remote", lambda **_: lambda cls: SimpleNamespace(remote=lambda: start(cls)))
    monkeypatch.setattr(ray, "get", get)
    return actors


def attempt(error: BaseException | None) -> Callable[[Controller], None]:
    def train(controller: Controller) -> None:
        assert controller.train(error=error).error is error

    return train


@pytest.mark.parametrize("end", [None, WORKERS_DIED, NO_ROOM], ids=["complete", "workers died", "no room"])
def test_the_next_attempt_uses_the_same_controller(started: list[type], end: BaseException | None) -> None:
    controller = Controller(ParallelSpec())
    controller.start()
    for _ in range(3):
        attempt(end)(controller)
    assert len(started) == 1


def test_a_controller_that_failed_is_replaced(started: list[type]) -> None:
    controller = Controller(ParallelSpec())
    attempt(CONTROLLER_FAILED)(controller)
    attempt(None)(controller)
    assert len(started) == 2


def test_a_controller_that_died_is_replaced(started: list[type]) -> None:
    controller = Controller(ParallelSpec())
    with pytest.raises(ray.exceptions.RayActorError):
        controller.train(error=ray.exceptions.RayActorError())
    attempt(None)(controller)
    assert len(started) == 2


def test_ray_train_starts_no_actors_that_a_run_does_not_need() -> None:
    trainer = worker_group._Trainer(lambda: None, controller=Controller(ParallelSpec()))
    left_out = (DatasetsCallback, PlacementGroupCleanerCallback, WorkerMetricsCallback, WorkingDirectorySetupCallback)
    callbacks = trainer._create_default_callbacks()
    assert callbacks and not any(isinstance(callback, left_out) for callback in callbacks)


def test_workers_start_without_the_actor_of_collectives_that_no_worker_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((train_worker_group, "SynchronizationActor"), (state, "_shutdown_sync_actor")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is restored at the end
    LastingTrainController()
    builder = state.WorkerGroupStateBuilder()
    group: Any = SimpleNamespace(shutdown=lambda: None)
    actor_class: Any = train_worker_group.SynchronizationActor
    actor = actor_class.options(label_selector={}).remote(timeout_s=1, warn_interval_s=1)  # as the worker group does
    builder.with_placement_group_handle(group).with_workers([]).with_sync_actor(actor).build()
    builder.shutdown()
    assert actor
    assert type(pickle.loads(pickle.dumps(actor))) is str  # workers get it before they import this project


def test_ray_train_asks_nobody_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise AssertionError("Ray Train starts Ray Data's coordinator")

    monkeypatch.setattr(autoscaling_coordinator_client, "get_or_create_autoscaling_coordinator", start)
    controller: Any = SimpleNamespace(train=lambda **arguments: arguments["scaling_policy"])
    trainer = worker_group._Trainer(
        lambda: None, controller=controller, scaling_config=ray.train.ScalingConfig(num_workers=2)
    )
    policy: Any = trainer._initialize_and_run_controller()
    policy.after_controller_start(SimpleNamespace(run_id="r"))
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    policy.make_decision_for_running_worker_group(None, None)
    policy.before_controller_abort()


def test_workers_are_counted_by_the_name_that_ray_train_gives_them() -> None:
    assert RayTrainWorker.__name__ == worker_group.WORKER


def test_the_port_of_rank_zero_is_held_until_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    address, port = ray_worker._reserve_address()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    store = torch.distributed.TCPStore(address, port, 1, is_master=True)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_what_other_drivers_reserved_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    other, own, ended = (f"{unique * 28}{job}" for unique, job in (("1", "02000000"), ("2", JOB), ("3", JOB)))
    states = {other: "CREATED", own: "CREATED", ended: "REMOVED"}
    removed: list[str] = []
    groups = sys.modules["ray.util.placement_group"]  # `ray.util.placement_group` is its function of that name
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: JOB))
    monkeypatch.setattr(groups, "placement_group_table", lambda: {name: {"state": states[name]} for name in states})
    monkeypatch.setattr(groups, "remove_placement_group", lambda group: removed.append(group.id.hex()))
    remove_placement_groups()
    assert removed == [own]


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
