"""`ft doctor --cluster`: the checks of a machine on every node at once, and those of what lies between the nodes.

An actor on each node, which reserves nothing, so it also runs on a busy cluster and on a head without CPUs.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray

from ft_service.cluster.doctor import (
    Check,
    StorageRates,
    machine_checks,
    read_probe,
    speed_check,
    tested_versions,
    write_probe,
)
from ft_service.cluster.ray_cluster import connect
from ft_service.errors import ClusterError, UsageError
from ft_service.storage.storage import Storage
from ft_service.text import last_line

JOIN_SECONDS = 300.0
ANSWER_SECONDS = 180.0
_POLL_SECONDS = 1.0
_SKEW_SECONDS = 1.0
"""Leases and timestamps of runs compare the clocks of nodes."""
_CLOCK_EXCHANGES = 5
_REDUCED_BYTES = 64 * 2**20
_REDUCTIONS = 3
SLOW_NETWORK = 0.1e9
"""Bytes a second of an all-reduce over TCP below which the network is slower than 1 Gbit/s."""
SLOW_NCCL = 2e9
"""With NCCL below this, GPUs of different nodes do not use InfiniBand or EFA, or one of few cards."""
_HEAD = "node:__internal_head__"
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class NodeCheck:
    """A check, and the node it is of; several nodes share one when it is the same for all of them."""

    node: str
    name: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    cure: str = ""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster. `ports` are those that Ray's other nodes connect to."""

    node_id: str
    name: str
    address: str
    ports: tuple[int, ...]
    num_gpus: int
    is_head: bool


class NodeDoctor:
    """The part on a node. Each method is called once on all nodes, and its results are compared by the driver."""

    def machine(self, tested: Mapping[str, str]) -> list[Check]:
        return machine_checks(tested)

    def clock(self) -> float:
        return time.time()

    def unreachable(self, places: Sequence[tuple[str, int]]) -> list[str]:
        """Which of these addresses and ports refuse a connection from here, or do not answer."""
        failed = []
        for address, port in places:
            try:
                socket.create_connection((address, port), _CONNECT_SECONDS).close()
            except OSError as error:
                failed.append(f"{address}:{port} ({error})")
        return failed

    def write(self, root: str, path: str, seed: int) -> float:
        return write_probe(Storage(root), path, seed)

    def read(self, root: str, path: str, seed: int) -> tuple[float, float]:
        return read_probe(Storage(root), path, seed)

    def remove(self, root: str, path: str) -> None:
        Storage(root).delete(path)

    def rendezvous(self) -> str:
        """An address of this node with a free port, where the ranks of an all-reduce can meet."""
        with socket.socket() as found:
            found.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{found.getsockname()[1]}"

    def all_reduce(self, backend: str, meeting: str, rank: int, world_size: int) -> float:
        """Sum tensors over all nodes; bytes a second of the algorithm's traffic. Raises on a wrong sum."""
        import datetime

        import torch
        import torch.distributed as dist

        device = "cuda:0" if backend == "nccl" else "cpu"
        dist.init_process_group(
            backend,
            init_method=f"tcp://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        try:
            tensor = torch.full((_REDUCED_BYTES // 4,), float(rank), device=device)
            dist.all_reduce(tensor)
            expected = world_size * (world_size - 1) / 2
            if tensor[0].item() != expected or tensor[-1].item() != expected:
                raise ValueError(f"the sum is {tensor[0].item()}, not {expected}")
            began = time.perf_counter()
            for _ in range(_REDUCTIONS):
                dist.all_reduce(tensor)
            tensor[0].item()  # waits for the device
            seconds = time.perf_counter() - began
        finally:
            dist.destroy_process_group()
        # A ring sends 2 (n - 1) / n of the tensor over each link.
        return 2 * (world_size - 1) / world_size * _REDUCED_BYTES * _REDUCTIONS / seconds


def check_cluster(storage_root: str, num_nodes: int = 1) -> list[NodeCheck]:
    """Check all nodes of the cluster at RAY_ADDRESS, once at least `num_nodes` have joined.

    Writes a file of 64 MiB per node to the storage, and deletes it. Raises `UsageError` without RAY_ADDRESS, and
    `ClusterError` when the cluster cannot be joined or the nodes do not come within 5 minutes.
    """
    if not os.environ.get("RAY_ADDRESS"):
        raise UsageError(
            "ft doctor --cluster: RAY_ADDRESS is not set. On a node of the cluster, set RAY_ADDRESS=auto; from "
            "elsewhere: ray job submit -- ft doctor --cluster."
        )
    if Storage(storage_root).is_local:
        # A relative path means another folder to a process that Ray starts elsewhere.
        storage_root = str(Path(storage_root.removeprefix("file://")).expanduser().absolute())
    connect()
    nodes = _nodes(num_nodes)
    doctors = {node: _start(node) for node in nodes}
    try:
        return list(_checks(doctors, storage_root))
    finally:
        for doctor in doctors.values():
            ray.kill(doctor)


def _checks(doctors: dict[Node, Any], storage_root: str) -> Iterator[NodeCheck]:
    nodes = list(doctors)
    gpus = sum(node.num_gpus for node in nodes)
    summary = f"{len(nodes)} nodes, {gpus} GPUs; Ray {ray.__version__}"
    yield NodeCheck("cluster", "Ray cluster", "ok", summary)
    tested = tested_versions()
    answers = _ask(doctors, lambda doctor, _: doctor.machine.remote(tested))
    living = {node: doctor for node, doctor in doctors.items() if not isinstance(answers[node], Exception)}
    for node, answer in answers.items():
        if isinstance(answer, Exception):
            cure = "see the logs of Ray on this node; check that it has the packages and can start processes"
            yield NodeCheck(node.name, "node", "fail", f"does not answer: {last_line(answer)}", cure)
        else:
            yield from (_expected_on_head(node, NodeCheck(node.name, **asdict(check))) for check in answer)
    yield from _different_versions(answers)
    yield from _clocks(living)
    yield from _ports(living)
    yield from _shared_storage(living, storage_root)
    yield from _network(living)


def _expected_on_head(node: Node, check: NodeCheck) -> NodeCheck:
    """No GPU on the head is as it should be: no training runs there."""
    if node.is_head and check.name == "GPUs" and check.detail == "none":
        return replace(check, level="ok", detail="none on the head", cure="")
    return check


def _nodes(num_nodes: int) -> list[Node]:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        living = [node for node in ray.nodes() if node["Alive"]]
        if len(living) >= num_nodes:
            break
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{len(living)} of {num_nodes} nodes have joined after {JOIN_SECONDS:.0f} s. Look at the output of "
                "ray start on the others; port, address and token must be those of the head."
            )
        time.sleep(_POLL_SECONDS)
    addresses = [node["NodeManagerAddress"] for node in living]
    found = [
        Node(
            node["NodeID"],
            _name(node, addresses.count(node["NodeManagerAddress"]) > 1),
            node["NodeManagerAddress"],
            (node["NodeManagerPort"], node["ObjectManagerPort"]),
            int(node["Resources"].get("GPU", 0)),
            _HEAD in node["Resources"],
        )
        for node in living
    ]
    return sorted(found, key=lambda node: (not node.is_head, node.name))


def _name(node: Mapping[str, Any], is_shared: bool) -> str:
    """Its address, which is unique but for several nodes on one machine."""
    address: str = node["NodeManagerAddress"]
    name = f"{address} ({node['NodeID'][:6]})" if is_shared else address
    return f"{name}, head" if _HEAD in node["Resources"] else name


def _start(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Ray hides the GPUs from an actor that reserves none, unless this is set.
    environment = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    options = {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        "runtime_env": {"env_vars": environment},
    }
    return ray.remote(NodeDoctor).options(**options).remote()


def _ask(doctors: Mapping[Node, Any], call: Callable[[Any, Node], Any]) -> dict[Node, Any]:
    """The answer of every node, or the exception; all are asked at once."""
    calls = {node: call(doctor, node) for node, doctor in doctors.items()}
    deadline = time.monotonic() + ANSWER_SECONDS
    answers: dict[Node, Any] = {}
    for node, pending in calls.items():
        try:
            answers[node] = ray.get(pending, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            answers[node] = TimeoutError(f"no answer for {ANSWER_SECONDS:.0f} s")
        except Exception as error:  # of the node's own, wrapped by Ray, or of Ray
            answers[node] = getattr(error, "cause", None) or error
    return answers


def _different_versions(answers: Mapping[Node, Any]) -> Iterator[NodeCheck]:
    """A version that is not the same on all nodes: workers of one run would disagree."""
    machines = {node: answer for node, answer in answers.items() if not isinstance(answer, Exception)}
    names = {check.name for checks in machines.values() for check in checks if check.name in _COMPARED}
    for name in sorted(names):
        by_detail: dict[str, list[str]] = {}
        for node, checks in machines.items():
            for check in checks:
                if check.name == name:
                    by_detail.setdefault(check.detail, []).append(node.name)
        if len(by_detail) > 1:
            shown = "; ".join(f"{detail} on {', '.join(on)}" for detail, on in by_detail.items())
            yield NodeCheck(
                "cluster", name, "fail", f"not the same on all nodes: {shown}", "install the same everywhere"
            )


_COMPARED = ("ft-service", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets")


def _clocks(doctors: Mapping[Node, Any]) -> Iterator[NodeCheck]:
    for node, doctor in doctors.items():
        try:
            took, skew = _skew(doctor)
        except ray.exceptions.RayError as error:
            yield NodeCheck(node.name, "clock", "fail", f"does not answer: {last_line(error)}", "see whether it is up")
            continue
        shown = f"{skew * 1000:+.0f} ms, measured to {took * 500:.0f} ms"
        if abs(skew) - took / 2 > _SKEW_SECONDS:
            cure = "run chrony or systemd-timesyncd on all nodes"
            yield NodeCheck(node.name, "clock", "warn", f"differs by {shown}", cure)
        else:
            yield NodeCheck(node.name, "clock", "ok", f"in step ({shown})" if took > 0.1 else "in step")


def _skew(doctor: Any) -> tuple[float, float]:
    """Seconds that an exchange took, and by how many a node's clock is ahead of this one's, to half of that.

    Of several exchanges the quickest counts.
    """
    exchanges = []
    for _ in range(_CLOCK_EXCHANGES):
        sent = time.time()
        there = ray.get(doctor.clock.remote(), timeout=ANSWER_SECONDS)
        took = time.time() - sent
        exchanges.append((took, there - sent - took / 2))
    return min(exchanges)


def _ports(doctors: Mapping[Node, Any]) -> Iterator[NodeCheck]:
    places = {node: [(other.address, port) for other in doctors for port in other.ports] for node in doctors}
    for node, failed in _ask(doctors, lambda doctor, node: doctor.unreachable.remote(places[node])).items():
        cure = "allow all traffic between the nodes in both directions (security group, firewall)"
        if isinstance(failed, Exception):
            yield NodeCheck(node.name, "ports", "fail", last_line(failed), cure)
        elif failed:
            yield NodeCheck(node.name, "ports", "fail", f"cannot reach {', '.join(failed)}", cure)
        else:
            yield NodeCheck(node.name, "ports", "ok", "reaches Ray's ports of all nodes")


def _shared_storage(doctors: Mapping[Node, Any], root: str) -> Iterator[NodeCheck]:
    """Every node writes, and reads what the next one wrote: only storage that all share passes, and no cache helps."""
    if Storage(root).is_local and not Path(root).is_dir():
        cure = "make it or mount it, or name another --storage"
        yield NodeCheck("cluster", "storage", "warn", f"{root}: does not exist here, so it was not tried", cure)
        return
    nodes = list(doctors)
    folder = f".doctor-{uuid.uuid4().hex}"
    number = {node: index for index, node in enumerate(nodes)}
    writes = _ask(doctors, lambda it, node: it.write.remote(root, f"{folder}/{number[node]}", number[node]))
    wrote = {node: rate for node, rate in writes.items() if not isinstance(rate, Exception)}

    def read(doctor: Any, node: Node) -> Any:
        other = (number[node] + 1) % len(nodes)
        return doctor.read.remote(root, f"{folder}/{other}", other)

    try:
        for node, error in writes.items():
            if isinstance(error, Exception):
                cure = "mount the storage on this node, with the right to write; or name another --storage"
                yield NodeCheck(node.name, "storage", "fail", f"{root}: {last_line(error)}", cure)
        if len(wrote) < len(nodes):
            return
        for node, rates in _ask(doctors, read).items():
            if isinstance(rates, Exception):
                cure = "mount the same storage at the same path on all nodes"
                other = nodes[(number[node] + 1) % len(nodes)].name
                detail = f"{root}: what {other} wrote cannot be read here: {last_line(rates)}"
                yield NodeCheck(node.name, "storage", "fail", detail, cure)
            else:
                yield NodeCheck(node.name, **asdict(speed_check(StorageRates(wrote[node], *rates))))
    finally:
        _ask(doctors, lambda it, _: it.remove.remote(root, folder))


def _network(doctors: Mapping[Node, Any]) -> Iterator[NodeCheck]:
    """A real all-reduce over one process of each node: gloo, and NCCL where every worker has GPUs that nobody uses."""
    nodes = list(doctors)
    if len(nodes) < 2:
        return
    yield _all_reduce(doctors, "gloo", SLOW_NETWORK)
    with_gpus = {node: doctor for node, doctor in doctors.items() if node.num_gpus}
    if len(with_gpus) < 2:
        return
    total = ray.cluster_resources().get("GPU", 0)
    if ray.available_resources().get("GPU", 0) < total:
        yield NodeCheck("cluster", "NCCL between nodes", "ok", "not measured: GPUs are in use")
        return
    yield _all_reduce(with_gpus, "nccl", SLOW_NCCL)


def _all_reduce(doctors: Mapping[Node, Any], backend: str, slow: float) -> NodeCheck:
    nodes = list(doctors)
    name = f"{'NCCL' if backend == 'nccl' else backend} between nodes"
    rank = {node: index for index, node in enumerate(nodes)}
    meetings = _ask({nodes[0]: doctors[nodes[0]]}, lambda it, _: it.rendezvous.remote())
    rates = meetings
    if not isinstance(meeting := meetings[nodes[0]], Exception):
        rates = _ask(doctors, lambda it, node: it.all_reduce.remote(backend, meeting, rank[node], len(nodes)))
    errors = {node: rate for node, rate in rates.items() if isinstance(rate, Exception)}
    if errors:
        node, error = next(iter(errors.items()))
        cure = "allow all traffic between the nodes; choose the card with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        return NodeCheck("cluster", name, "fail", f"an all-reduce failed on {node.name}: {last_line(error)}", cure)
    rate = min(rates.values())
    shown = f"all-reduce over {len(nodes)} nodes: {rate / 1e9:.2f} GB/s"
    if rate < slow:
        cure = (
            "NCCL_DEBUG=INFO names the transport; set up EFA or InfiniBand"
            if backend == "nccl"
            else "use a faster network"
        )
        return NodeCheck("cluster", name, "warn", f"{shown}, slow", cure)
    return NodeCheck("cluster", name, "ok", shown)
