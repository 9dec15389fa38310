"""What Ray reserves for the replicas of a base."""

import pytest

from serve.app import resources
from serve.replica import BaseReplica
from serve.settings import BaseSettings


@pytest.mark.parametrize("cpus", [0, 2])
def test_tensor_parallelism_takes_the_gpus_of_one_node_in_a_placement_group(cpus):
    base = BaseSettings(base="meta-llama/Llama-3.3-70B-Instruct", engine="vllm", gpus=8, cpus=cpus)
    options = resources(base, 8)
    assert options["ray_actor_options"] == {"num_cpus": cpus, "num_gpus": 8}
    assert options["placement_group_bundles"] == [{"GPU": 8, **({"CPU": cpus} if cpus else {})}]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    deployment = BaseReplica.options(**options)  # Serve itself checks that the first bundle holds the replica
    assert deployment.placement_group_bundles == options["placement_group_bundles"]


@pytest.mark.parametrize(("engine", "gpus"), [("vllm", 1), ("vllm", 0), ("transformers", 2)])
def test_other_replicas_are_plain_actors(engine, gpus):
    base = BaseSettings(base="meta-llama/Llama-3.1-8B-Instruct", engine=engine, gpus=gpus)
    assert resources(base, gpus) == {"ray_actor_options": {"num_cpus": 1, "num_gpus": gpus}}
