"""`ft doctor --cluster` on a cluster of three nodes: what it measures between them, and what it finds broken."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ft_service.cli.doctor import _merged
from ft_service.cluster import doctor_nodes, spot
from ft_service.cluster.doctor import Check
from ft_service.cluster.doctor_nodes import NodeCheck, NodeDoctor, check_cluster
from ft_service.cluster.ray_cluster import draining_nodes
from ft_service.errors import ClusterError, UsageError
from ft_service.storage.storage import Storage
from tests.hosts import START_SECONDS, Cluster, Host, wait_for
from tests.shared_cluster import joined

THIRD = Host("third", "127.0.0.2", 1)
"""With an address of its own, as a node on another machine has."""


@pytest.fixture(scope="module")
def three(cluster: Cluster) -> Iterator[Cluster]:
    cluster.start(THIRD)
    try:
        with joined(cluster):
            yield cluster
    finally:
        cluster.kill(THIRD)


def levels(found: list[NodeCheck], name: str) -> list[str]:
    return [check.level for check in found if check.name == name]


@pytest.mark.cluster
def test_a_sound_cluster_is_measured_from_every_node(
    three: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", three.environment["RAY_ADDRESS"])
    found = check_cluster(str(tmp_path), num_nodes=3)
    assert [check for check in found if check.level == "fail"] == []
    assert "3 nodes, 0 GPUs" in found[0].detail
    for name in ("torch", "DeepSpeed ops", "clock", "ports", "storage speed", "shared memory"):
        assert len(levels(found, name)) == 3, name
    assert len(levels(found, "gloo between nodes")) == 1 and levels(found, "NCCL between nodes") == []
    assert len({check.node for check in found}) == 4  # the cluster's own checks too
    assert sum(check.node.endswith(", head") for check in found if check.name == "clock") == 1
    assert list(tmp_path.iterdir()) == []
    rows = {check.name: nodes for nodes, check in _merged(found)}
    assert rows["torch"] == rows["ft-service"] == "all 3 nodes"


class Separate(NodeDoctor):
    """On a node that has a folder of its own at the storage's path."""

    def write(self, root: str, path: str, seed: int) -> float:
        return super().write(f"{root}/{ray.get_runtime_context().get_node_id()}", path, seed)

    def read(self, root: str, path: str, seed: int) -> tuple[float, float]:
        return super().read(f"{root}/{ray.get_runtime_context().get_node_id()}", path, seed)


@pytest.mark.cluster
def test_storage_that_nodes_do_not_share_is_found(
    three: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_nodes, "NodeDoctor", Separate)
    doctors = {node: doctor_nodes._start(node) for node in doctor_nodes._nodes(3)}
    found = list(doctor_nodes._shared_storage(doctors, str(tmp_path)))
    assert levels(found, "storage") == ["fail"] * 3
    assert all("cannot be read here" in check.detail and "same storage" in check.cure for check in found)


@pytest.mark.cluster
def test_ports_that_refuse_are_named_and_so_is_a_node_that_is_gone(three: Cluster) -> None:
    (head, *_) = doctor_nodes._nodes(3)
    assert head.is_head
    doctor = doctor_nodes._start(head)
    places = [(head.address, head.ports[0]), ("127.0.0.1", 9)]
    (refused,) = ray.get(doctor.unreachable.remote(places))
    assert refused.startswith("127.0.0.1:9 (")
    ray.kill(doctor)
    assert levels(list(doctor_nodes._clocks({head: doctor})), "clock") == ["fail"]
    assert doctor_nodes._all_reduce({head: doctor}, "gloo", 0.0).level == "fail"
    assert levels(list(doctor_nodes._ports({head: doctor})), "ports") == ["fail"]


@pytest.mark.cluster
def test_nodes_that_do_not_come_are_counted(three: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_nodes, "JOIN_SECONDS", 0.0)
    with pytest.raises(ClusterError, match="3 of 9 nodes have joined"):
        doctor_nodes._nodes(9)


@pytest.mark.cluster
def test_a_clouds_notice_drains_the_node_with_this_address(three: Cluster) -> None:
    """Last: a drained node takes no more work, and ends once it has none."""
    address = three.environment["RAY_ADDRESS"]
    (third,) = (node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == THIRD.address and node["Alive"])
    spot.drain_node(address, spot.Notice(300, "spot notice"), THIRD.address)
    wait_for(lambda: third in draining_nodes() or len(doctor_nodes._nodes(1)) == 2, START_SECONDS)
    with pytest.raises(ClusterError, match=r"no living node with address 127\.0\.0\.9"):
        spot.drain_node(address, spot.Notice(300, "spot notice"), "127.0.0.9")


# -- without a cluster -----------------------------------------------------------------------------------------------


def test_without_an_address_it_says_from_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="RAY_ADDRESS=auto"):
        check_cluster("/anywhere")


def node(name: str, is_head: bool = False) -> doctor_nodes.Node:
    return doctor_nodes.Node(name, name, name, (1, 2), 8, is_head)


def test_storage_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    (check,) = doctor_nodes._shared_storage({node("a"): None}, str(tmp_path / "storage"))
    assert check.level == "warn" and "does not exist here" in check.detail
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ahead", "level"), [(0.2, "ok"), (-30.0, "warn"), (30.0, "warn")])
def test_a_clock_that_differs_is_a_warning(ahead: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_nodes, "_skew", lambda doctor: (0.01, ahead))
    (check,) = doctor_nodes._clocks({node("a"): None})
    assert check.level == level and (level == "ok" or f"{ahead * 1000:+.0f} ms" in check.detail)


def test_different_versions_are_broken_even_if_each_is_installed() -> None:
    answers = {
        node("a"): [Check("torch", "ok", "2.13.0, as tested"), Check("disk", "ok", "5 GiB")],
        node("b"): [Check("torch", "warn", "2.14.0; tested with 2.13.0"), Check("disk", "ok", "7 GiB")],
        node("c"): RuntimeError("gone"),
    }
    (found,) = doctor_nodes._different_versions(answers)
    assert (found.name, found.level) == ("torch", "fail")
    assert "2.13.0, as tested on a; 2.14.0; tested with 2.13.0 on b" in found.detail


def test_a_head_without_gpus_is_as_it_should_be() -> None:
    bare = NodeCheck("a", "GPUs", "warn", "none", "for training on CPU, set parallel.use_gpu: false")
    assert doctor_nodes._expected_on_head(node("a", is_head=True), bare).level == "ok"
    assert doctor_nodes._expected_on_head(node("a"), bare).level == "warn"


def test_equal_lines_are_shown_once_in_the_order_of_the_checks() -> None:
    found = [
        NodeCheck("cluster", "Ray cluster", "ok", "2 nodes"),
        NodeCheck("a", "torch", "ok", "2.13.0"),
        NodeCheck("a", "disk", "ok", "5 GiB"),
        NodeCheck("b", "torch", "ok", "2.13.0"),
        NodeCheck("b", "disk", "ok", "7 GiB"),
    ]
    assert [(nodes, check.name) for nodes, check in _merged(found)] == [
        ("cluster", "Ray cluster"),
        ("all 2 nodes", "torch"),
        ("a", "disk"),
        ("b", "disk"),
    ]


def test_a_probe_is_read_as_it_was_written_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_service.cluster import doctor
    from ft_service.errors import StorageError

    monkeypatch.setattr(doctor, "PROBE_BYTES", 16 * 2**20)
    storage = Storage(str(tmp_path))
    assert doctor.write_probe(storage, "probe", seed=1) > 0
    assert min(doctor.read_probe(storage, "probe", seed=1)) > 0
    with pytest.raises(StorageError, match="not what was written"):
        doctor.read_probe(storage, "probe", seed=2)
