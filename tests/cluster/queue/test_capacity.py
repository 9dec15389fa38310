"""Nodes that an autoscaler may still start, from its configuration."""

from pathlib import Path

import pytest
import yaml

from ft_service.cluster.queue import capacity
from ft_service.cluster.queue.capacity import NodeType, autoscales, joining_nodes, node_types
from ft_service.cluster.queue.schedule import Node, could_ever_fit
from tests.cluster.queue.queue_cases import entry
from tests.hosts import ROOT

GPU = NodeType("gpu", {"CPU": 8.0, "GPU": 4.0}, 3)
CPU = NodeType("cpu", {"CPU": 8.0}, 2)


def test_of_each_type_as_many_nodes_may_join_as_its_limit_allows_beside_the_living_ones() -> None:
    living = [
        ({"ray.io/node-group": "gpu"}, {"CPU": 8.0, "GPU": 4.0}),
        ({}, {"CPU": 8.0, "memory": 1.0}),
        ({}, {"CPU": 1.0}),
    ]
    joining = joining_nodes([GPU, CPU], living)
    assert [node.id for node in joining] == ["gpu-0", "gpu-1", "cpu-0"]
    assert all(node.is_joining and node.free == node.total for node in joining)
    assert joining_nodes([CPU], [({}, {"CPU": 8.0})] * 5) == []


def test_the_shipped_cluster_file_has_types_that_may_join_and_a_head_that_does_not() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = {kind.name: kind for kind in node_types(config)}
    assert types and config["head_node_type"] not in types
    assert all(kind.max_count <= config["max_workers"] for kind in types.values())
    assert any(kind.resources.get("GPU", 0) >= 1 for kind in types.values())


def test_the_workers_of_a_shipped_spec_fit_the_nodes_of_the_shipped_cluster_file() -> None:
    nodes = joining_nodes(node_types(yaml.safe_load((ROOT / "cluster.yaml").read_text())), [])
    on_h100 = {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert could_ever_fit(entry("r", 8, worker_resources=on_h100), nodes) >= 8
    assert could_ever_fit(entry("r", 8, worker_resources={**on_h100, "accelerator_type:B200": 0.001}), nodes) == 0


def test_a_run_never_fits_more_nodes_than_the_limit_of_all_types_together_allows() -> None:
    four_of_each = [NodeType("small", {"CPU": 8.0, "GPU": 1.0}, 4), NodeType("large", {"CPU": 8.0, "GPU": 8.0}, 4)]
    run = entry("r", 1, worker_resources={"CPU": 1.0, "GPU": 1.0})
    head = Node("head", {"CPU": 2.0, "GPU": 1.0}, {})
    assert could_ever_fit(run, [head, *joining_nodes(four_of_each, [])]) == 1 + 4 * 8 + 4 * 1
    assert could_ever_fit(run, [head, *joining_nodes(four_of_each, [], most=5)]) == 1 + 4 * 8 + 1
    # Two of the small type live, and can go again.
    small = ({"ray.io/node-group": "small"}, {"CPU": 8.0, "GPU": 1.0})
    living = [Node(name, small[1], {}, most=5) for name in ("x", "y")]
    assert could_ever_fit(run, [head, *living, *joining_nodes(four_of_each, [small, small], most=5)]) == 1 + 4 * 8 + 1


def test_the_limits_are_read_from_the_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "_AUTOSCALER_CONFIG", tmp_path / "none.yaml")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert not autoscales()
    file = tmp_path / "config.yaml"
    kinds = {"small": {"resources": {"CPU": 2}, "max_workers": 9}, "head": {"resources": {"CPU": 2}}}
    file.write_text(yaml.safe_dump({"max_workers": 4, "head_node_type": "head", "available_node_types": kinds}))
    monkeypatch.setenv("FT_AUTOSCALER_CONFIG", str(file))
    assert autoscales()
    assert [(kind.name, kind.max_count) for kind in node_types(capacity._config(file))] == [("small", 4)]


@pytest.mark.parametrize("text", ["", "[]", "a: [", "available_node_types: 3", "max_workers: many"])
def test_a_file_that_cannot_be_read_means_unknown_limits(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert node_types(capacity._config(file)) == []
