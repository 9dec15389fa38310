"""What the cluster has and could have: its nodes, and those that its autoscaler may still start."""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
import yaml

from ft_service.cluster.queue.schedule import Node
from ft_service.cluster.ray_cluster import draining_nodes
from ft_service.runs.lease import machine_name

_AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""`ray up` writes it to the head node, where drivers of submitted jobs run."""
_CONFIG_VARIABLE = "FT_AUTOSCALER_CONFIG"
"""Names the autoscaler's configuration where the file above is not: `ray start --autoscaling-config`, Kubernetes."""
_NODE_GROUP = "ray.io/node-group"
_HERE = "here"
"""Node of a Ray that this process has started: every driver of this machine starts another one on the same machine."""
_LARGEST_JOINING = 512
"""Nodes of one type that a decision considers beside the living ones."""


class ClusterNodes(Protocol):
    """What the queue needs to know of a cluster."""

    @property
    def id(self) -> str:
        """Runs with the same one share resources."""
        ...

    def nodes(self) -> list[Node]:
        """The living nodes that are not draining, and those that the autoscaler may start."""
        ...

    def may_grow_beyond(self) -> bool:
        """Whether other nodes than these may join, because the autoscaler's limits are unknown."""
        ...

    def node_name(self, node_id: str) -> str:
        """The id in `nodes` of the node that Ray knows by `node_id`."""
        ...


class RayNodes:
    """The nodes of the Ray cluster that this driver has joined or started."""

    @property
    def id(self) -> str:
        if _is_own():
            return f"machine-{hashlib.sha256(machine_name().encode()).hexdigest()[:16]}"
        return str(ray._private.worker._global_node.cluster_id.hex())  # type: ignore[attr-defined]

    def nodes(self) -> list[Node]:
        draining = draining_nodes()
        free = ray._private.state.available_resources_per_node()
        alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        own = _is_own()
        config = _config(_config_file())
        types, most = node_types(config), max_nodes(config)
        living = [
            Node(
                _HERE if own else node["NodeID"],
                node["Resources"],
                free.get(node["NodeID"], {}),
                most=most if _type_of(node["Labels"], node["Resources"], types) else None,
            )
            for node in alive
        ]
        return living + joining_nodes(types, [(node["Labels"], node["Resources"]) for node in alive], most)

    def may_grow_beyond(self) -> bool:
        return autoscales() and not node_types(_config(_config_file()))

    def node_name(self, node_id: str) -> str:
        return _HERE if _is_own() else node_id


class NodeType:
    """A type of nodes that the autoscaler may start."""

    def __init__(self, name: str, resources: Mapping[str, float], max_count: int) -> None:
        self.name = name
        self.resources = dict(resources)
        self.max_count = max_count


def joining_nodes(
    types: Sequence[NodeType],
    living: Sequence[tuple[Mapping[str, str], Mapping[str, float]]],
    most: int | None = None,
) -> list[Node]:
    """The nodes that may still join: of each type as many as its limit allows beside the living ones.

    `living` has labels and resources of each node. A node without the label of its type belongs to the type with the
    same GPUs and CPUs. `most` is the limit of all types together.
    """
    counts = Counter(_type_of(labels, resources, types) for labels, resources in living)
    return [
        Node(f"{kind.name}-{number}", kind.resources, kind.resources, is_joining=True, most=most)
        for kind in types
        for number in range(min(kind.max_count - counts[kind.name], _LARGEST_JOINING))
    ]


def _type_of(labels: Mapping[str, str], resources: Mapping[str, float], types: Sequence[NodeType]) -> str:
    if (name := labels.get(_NODE_GROUP, "")) in {kind.name for kind in types}:
        return name
    shape = (resources.get("GPU", 0), resources.get("CPU", 0))
    same = (kind.name for kind in types if (kind.resources.get("GPU", 0), kind.resources.get("CPU", 0)) == shape)
    return next(same, "")


def autoscales() -> bool:
    """Whether nodes may join the cluster."""
    return _config_file() is not None or "KUBERNETES_SERVICE_HOST" in os.environ


def node_types(config: Mapping[str, Any]) -> list[NodeType]:
    """The node types of an autoscaler's configuration (`ray up`'s YAML) that it may start, with their limits."""
    most = max_nodes(config)
    types = []
    for name, kind in (config.get("available_node_types") or {}).items():
        count = 0 if name == config.get("head_node_type") else int(kind.get("max_workers", most))
        resources = {key: float(amount) for key, amount in (kind.get("resources") or {}).items()}
        if (count := min(count, most)) > 0 and resources:
            types.append(NodeType(name, resources, count))
    return types


def max_nodes(config: Mapping[str, Any]) -> int:
    """How many nodes of all its types the autoscaler runs at once, beside the head."""
    return int(config.get("max_workers", 0))


def _config_file() -> Path | None:
    places = [Path(os.environ[_CONFIG_VARIABLE])] if _CONFIG_VARIABLE in os.environ else []
    return next((place for place in (*places, _AUTOSCALER_CONFIG.expanduser()) if place.exists()), None)


@functools.cache
def _config(file: Path | None) -> Mapping[str, Any]:
    """Empty if the autoscaler's limits are unknown. They do not change while a driver lives."""
    try:
        config = {} if file is None else yaml.safe_load(file.read_text(encoding="utf-8"))
        node_types(config)  # can be read
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}
    return dict(config)


def _is_own() -> bool:
    """Whether this process has started the Ray that it uses."""
    node: Any = ray._private.worker._global_node
    return node is not None and bool(node.is_head())
