"""Replicas of a base: what Ray reserves for them, which interpreter and engine they run, when they are replaced."""

import asyncio
from types import SimpleNamespace

import pytest

from ft_service.errors import ServingError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.base_app import resources
from serve.replica import BaseReplica, make_engine
from serve.settings import BaseSettings


@pytest.mark.parametrize("cpus", [0, 2])
def test_tensor_parallelism_takes_the_gpus_of_one_node_in_a_placement_group(cpus):
    base = BaseSettings(base="meta-llama/Llama-3.3-70B-Instruct", engine="vllm", gpus=8, cpus=cpus)
    options = resources(base, 8)
    assert options["ray_actor_options"] == {"num_cpus": cpus, "num_gpus": 8}
    assert options["placement_group_bundles"] == [{"GPU": 8, **({"CPU": cpus} if cpus else {})}]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    BaseReplica.options(**options)  # Serve itself checks that the first bundle holds the replica


@pytest.mark.parametrize(("engine", "gpus"), [("vllm", 1), ("vllm", 0), ("transformers", 2)])
def test_other_replicas_are_plain_actors(engine, gpus):
    base = BaseSettings(base="meta-llama/Llama-3.1-8B-Instruct", engine=engine, gpus=gpus)
    assert resources(base, gpus) == {"ray_actor_options": {"num_cpus": 1, "num_gpus": gpus}}


def test_a_replica_may_run_in_an_environment_of_its_own():
    base = BaseSettings(base="meta-llama/Llama-3.1-8B-Instruct", engine="vllm", python="/opt/vllm/bin/python")
    actor = resources(base, 1)["ray_actor_options"]
    assert actor == {"num_cpus": 1, "num_gpus": 1, "runtime_env": {"py_executable": "/opt/vllm/bin/python"}}
    BaseReplica.options(ray_actor_options=actor)  # Serve itself checks them


def test_vllm_that_is_not_installed_is_an_error_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.replica.resolve_base", lambda *_: tmp_path)
    monkeypatch.setattr("serve.replica.find_spec", lambda _: None)
    base = BaseSettings(base=str(tmp_path), engine="vllm")
    with pytest.raises(ServingError, match=r"engine = 'vllm': vllm is not installed in .*docs/serving\.md"):
        make_engine(base, Registry(Storage(str(tmp_path))))


def test_a_replica_whose_engine_has_ended_fails_its_health_check():
    def ended() -> None:
        raise ServingError("vLLM's engine has ended.")

    check_health = BaseReplica.func_or_class.check_health
    asyncio.run(check_health(SimpleNamespace(_engine=SimpleNamespace(stats=lambda: None))))
    with pytest.raises(ServingError, match="has ended"):
        asyncio.run(check_health(SimpleNamespace(_engine=SimpleNamespace(stats=ended))))
