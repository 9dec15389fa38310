"""What torch and OpenMP read from a worker's environment."""

import os
from pathlib import Path

import pytest

from ft_service.cluster.room import resources_per_worker
from ft_service.plan.facts import Resources
from ft_service.plan.make import make_plan
from ft_service.plan.plan import RunPlan
from ft_service.runs.folder import RunFolder
from ft_service.spec.load import parse_run_spec
from ft_service.storage.storage import Storage
from ft_service.train import environment, worker_group
from ft_service.train.environment import ALLOCATOR_VARIABLES, allocator_environment, threads_per_worker
from ft_service.train.parallel import prepare_process
from tests.plan.test_plan import FACTS, SPEC, shape_of


def plan(*overrides: str) -> RunPlan:
    spec = parse_run_spec(SPEC, overrides or ["parallel.accelerator_type=H100"])
    return make_plan(spec, FACTS, shape_of(spec.model.base), Resources())


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALLOCATOR_VARIABLES, "DS_ACCELERATOR", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is restored at the end, whatever the test does
        monkeypatch.delenv(name)


def environment_of_workers(monkeypatch: pytest.MonkeyPatch, folder: Path, run_plan: RunPlan) -> dict[str, str]:
    """The environment that the driver gives to the workers."""
    given: dict[str, str] = {}
    monkeypatch.setattr(worker_group, "_Trainer", lambda *_, run_config, **__: given.update(run_config))
    monkeypatch.setattr(worker_group, "RunConfig", lambda worker_runtime_env, **_: worker_runtime_env["env_vars"])
    controller = worker_group.Controller(run_plan.spec.parallel)
    worker_group._trainer(run_plan, RunFolder(Storage(str(folder)), "r"), {}, controller)
    return given


def test_segments_of_gpu_memory_are_expandable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = environment_of_workers(monkeypatch, tmp_path, plan())["PYTORCH_ALLOC_CONF"]
    assert "expandable_segments:True" in settings.split(",")
    prepare_process(use_gpu=True)  # without Ray
    assert os.environ["PYTORCH_ALLOC_CONF"] == settings


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_the_users_own_allocator_settings_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv(name, "garbage_collection_threshold:0.8")
    given = environment_of_workers(monkeypatch, tmp_path, plan())
    prepare_process(use_gpu=True)
    for other in ALLOCATOR_VARIABLES:
        assert other not in given
        assert os.environ.get(other) == ("garbage_collection_threshold:0.8" if other == name else None)


def test_cpu_workers_need_no_allocator_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = environment_of_workers(monkeypatch, tmp_path, plan("parallel.use_gpu=false"))
    prepare_process(use_gpu=False)
    assert not any(name in given or name in os.environ for name in ALLOCATOR_VARIABLES)


def test_torch_accepts_the_allocator_settings() -> None:
    import torch

    before = torch._C._accelerator_getAllocatorSettings()
    try:
        torch._C._accelerator_setAllocatorSettings(allocator_environment()["PYTORCH_ALLOC_CONF"])
        assert "pinned_max_cached_size_mb:1" in torch._C._accelerator_getAllocatorSettings()
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


@pytest.mark.parametrize(
    ("installed", "settings"),
    [
        ("2.11.0+cu130", "expandable_segments:True"),
        ("2.13.0", "expandable_segments:True,pinned_max_cached_size_mb:1"),
        ("3.0.1+cpu", "expandable_segments:True,pinned_max_cached_size_mb:1"),
    ],
)
def test_an_older_torch_gets_no_setting_that_it_would_refuse(
    monkeypatch: pytest.MonkeyPatch, installed: str, settings: str
) -> None:
    monkeypatch.setattr(environment, "version", lambda package: {"torch": installed}[package])
    assert allocator_environment() == {"PYTORCH_ALLOC_CONF": settings}


def test_offloading_uses_all_cores_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW on the CPU is as fast as it has threads; nothing else needs more than one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert threads_per_worker(plan("parallel.offload=none")) == 1
    assert threads_per_worker(plan("parallel.offload=cpu")) == 12
    assert threads_per_worker(plan("parallel.offload=cpu", "parallel.cpus_per_worker=3")) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "200")
    assert threads_per_worker(plan("parallel.offload=cpu")) == 1
    assert resources_per_worker(plan("parallel.offload=cpu").spec.parallel)["CPU"] == 1
    assert resources_per_worker(plan("parallel.cpus_per_worker=3").spec.parallel)["CPU"] == 3
