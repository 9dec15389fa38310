"""The nodes of a cluster for a request that must not wait long for Ray."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ft_service.cluster.queue.capacity import ClusterNodes
from ft_service.cluster.queue.schedule import Node

NODES_SECONDS = 3.0
"""So long a request waits for Ray to list the nodes."""

logger = logging.getLogger(__name__)


class KnownNodes:
    """The nodes of a cluster, as far as they are known. Thread-safe."""

    def __init__(self, cluster: ClusterNodes | None) -> None:
        self.cluster = cluster
        self._asks = ThreadPoolExecutor(1, thread_name_prefix="ask-nodes")

    def nodes(self) -> Sequence[Node] | None:
        """None without a cluster, or if Ray does not list them in time."""
        if self.cluster is None:
            return None
        try:
            return self._asks.submit(self.cluster.nodes).result(NODES_SECONDS)
        except Exception as error:  # whatever Ray raises: an unknown cluster is no reason to refuse a job
            logger.warning("the nodes of the cluster are unknown (%s: %s)", type(error).__name__, error)
            return None

    def all_nodes(self) -> Sequence[Node] | None:
        """None also if others may join."""
        nodes = self.nodes()
        return None if not nodes or self.cluster is None or self.cluster.may_grow_beyond() else nodes
