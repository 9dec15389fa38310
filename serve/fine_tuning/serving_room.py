"""Whether the cluster that serves has room for the model of a `full` job, beside the server's own bases.

Only what can never be placed is a problem: the nodes are taken as empty but for the replicas that never end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ft_service.catalog.gpus import GPUS, find_gpu
from ft_service.catalog.models import ModelShape
from ft_service.cluster.queue.capacity import ClusterNodes
from ft_service.cluster.queue.schedule import Node
from ft_service.plan.serving import GIB
from ft_service.text import counted
from serve.fine_tuning.known_nodes import KnownNodes
from serve.fit import full_model_problem, plan_base
from serve.settings import BaseSettings, ServeSettings

_ACCELERATOR = "accelerator_type:"
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class _Resources:
    """What Ray reserves for a replica, or what a node has."""

    gpus: float
    cpus: float

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU{'s' * (self.gpus != 1)} and {self.cpus:g} CPU{'s' * (self.cpus != 1)}"


class ServingRoom:
    """Judges replicas of full models. Thread-safe."""

    def __init__(self, settings: ServeSettings, cluster: ClusterNodes | None = None) -> None:
        """`cluster` serves; None where its nodes are unknown."""
        self._bases = settings.bases
        gpu = find_gpu(settings.fine_tuning.gpu_type if settings.fine_tuning else None)
        self._gpu_gib = gpu.memory_gib if gpu else None
        self._known = KnownNodes(cluster)

    def problem(self, base: BaseSettings, shape: ModelShape | None = None) -> str | None:
        """Why a model that is served as `base` is can never have a replica; None if nothing is known against it.

        `shape` is the model's, whose weights need memory too.
        """
        if shape is not None and (problem := full_model_problem(base, shape, self._gpu_gib)):
            return problem
        nodes = self._known.all_nodes()
        if nodes is None:
            return None
        needs = _needs_of(base, nodes)
        roomy = [node for node in nodes if _fits(needs, _of_node(node))]
        large = [node for node in roomy if shape is None or self._has_memory(node, base, needs, shape)]
        if roomy and not large:
            assert shape is not None
            weights = plan_base(base, shape, 0).weights / GIB
            where = f"each of the replica's {counted(int(needs.gpus), 'GPU')}" if needs.gpus else "a node"
            return (
                f"Its model becomes a base of this server, and has no room there: weights take {weights:.1f} GiB on "
                f"{where}, and no node of the cluster has that memory. Serve {base.model_name} with precision: nf4 or "
                "on more GPUs (gpus), or add larger nodes."
            )
        if self._fits_beside_the_bases(needs, nodes, large):
            return None
        largest = max((_of_node(node) for node in nodes), key=lambda has: (has.gpus, has.cpus))
        return (
            f"Its model becomes a base of this server, and no node has room for its replica ({needs}) beside the "
            f"server's own bases, also when nothing trains: the largest of {counted(len(nodes), 'node')} has {largest} "
            f"in all. Give {base.model_name} fewer gpus or cpus, let bases scale to zero (autoscaling), or add nodes."
        )

    def needed_room(self, base: BaseSettings) -> str:
        """What a replica waits for, as the rest of a sentence."""
        return f"a node with {_needs_of(base, self._known.nodes() or ())} free for a replica of its model"

    def _has_memory(self, node: Node, base: BaseSettings, needs: _Resources, shape: ModelShape) -> bool:
        if needs.gpus:
            memory = self._gpu_gib or _gpu_gib(node)
            return memory is None or full_model_problem(base, shape, memory) is None
        memory = node.total.get("memory")
        if memory is None:
            return True
        return plan_base(base, shape, 0).weights <= memory + node.total.get("object_store_memory", 0)

    def _fits_beside_the_bases(self, needs: _Resources, nodes: Sequence[Node], large: Sequence[Node]) -> bool:
        """Whether the bases' replicas still find room once this one has a place. They are packed tightly."""
        lasting = sorted(self._lasting(nodes), key=lambda one: (one.gpus, one.cpus), reverse=True)
        left_out = _pack(lasting, {node.id: _of_node(node) for node in nodes})
        tried: set[_Resources] = set()
        for node in large:
            room = _of_node(node)
            if room in tried or not _fits(needs, room):
                continue
            tried.add(room)
            if _pack(lasting, {one.id: _of_node(one) for one in nodes} | {node.id: _less(room, needs)}) <= left_out:
                return True
        return False

    def _lasting(self, nodes: Sequence[Node]) -> Iterator[_Resources]:
        for base in self._bases:
            count = base.replicas if base.autoscaling is None else base.autoscaling.min_replicas
            yield from [_needs_of(base, nodes)] * count


def _needs_of(base: BaseSettings, nodes: Sequence[Node]) -> _Resources:
    has_gpu = any(node.total.get("GPU", 0) > 0 for node in nodes)
    return _Resources(float(has_gpu) if base.gpus is None else base.gpus, base.cpus)


def _of_node(node: Node) -> _Resources:
    return _Resources(node.total.get("GPU", 0.0), node.total.get("CPU", 0.0))


def _fits(needs: _Resources, room: _Resources) -> bool:
    return needs.gpus <= room.gpus + _TOLERANCE and needs.cpus <= room.cpus + _TOLERANCE


def _less(room: _Resources, taken: _Resources) -> _Resources:
    return _Resources(room.gpus - taken.gpus, room.cpus - taken.cpus)


def _pack(replicas: Sequence[_Resources], room: dict[str, _Resources]) -> int:
    """How many find no place, if each takes the node with the least room that has enough."""
    left_out = 0
    for needs in replicas:
        places = [node for node, free in room.items() if _fits(needs, free)]
        if not places:
            left_out += 1
            continue
        place = min(places, key=lambda node: (room[node].gpus, room[node].cpus))
        room[place] = _less(room[place], needs)
    return left_out


def _gpu_gib(node: Node) -> float | None:
    """Memory of a node's GPUs by the type that Ray has found; Ray gives A100s of both sizes the same name."""
    names = [name.removeprefix(_ACCELERATOR) for name in node.total if name.startswith(_ACCELERATOR)]
    sizes = [gpu.memory_gib for gpu in GPUS.values() for name in names if f"{gpu.name}-".startswith(f"{name}-")]
    return max(sizes, default=None)
