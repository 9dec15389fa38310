"""Which replica of a base gets a request: one where its adapter is loaded already, unless that one has much to do."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray.serve._private.common import RunningReplicaInfo
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.engines.engine import GenerationRequest

CONTROL_CALLS = 8
"""Calls beside its batch that a replica accepts, for what all replicas are asked: a full one must answer, too."""


class AdapterRouter(RequestRouter):
    """Ranks the replicas for each adapter by a hash of both (rendezvous hashing).

    All gateways then agree on an adapter's replica without asking any, and a replica that comes or goes moves only its
    own adapters. Where the first replica is busy the second one helps, so that an adapter that everybody asks for is
    loaded on two, then on all. A request for the base goes to the replica with the fewest requests.

    Without Serve's `FIFOMixin`: it would hand the replica that was chosen for one adapter to the request that has
    waited longest, whichever its adapter is.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._busy_requests = int(kwargs["busy_requests"])

    def _update_running_replicas(self, running_replicas: Sequence[RunningReplicaInfo]) -> Any:
        """Leave `CONTROL_CALLS` of each replica's places free of requests."""
        infos = [
            replace(info, max_ongoing_requests=max(1, info.max_ongoing_requests - CONTROL_CALLS))
            for info in running_replicas
        ]
        return super()._update_running_replicas(infos)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # otherwise Serve tries again without a pause
        digest = _adapter_digest(pending_request)
        if digest is None:
            return [candidate_replicas]
        ranked = sorted(candidate_replicas, key=lambda replica: _weight(digest, replica.replica_id), reverse=True)
        free = [replica for replica in ranked if not self._is_busy(replica)]
        busy = [replica for replica in ranked if self._is_busy(replica)]
        return [[replica] for replica in free] + ([busy] if busy else [])

    def _is_busy(self, replica: RunningReplica) -> bool:
        requests = self.replica_queue_len_cache.get(replica.replica_id)
        return requests is not None and requests >= self._busy_requests


def _adapter_digest(pending_request: PendingRequest | None) -> str | None:
    for argument in pending_request.args if pending_request else ():
        if isinstance(argument, GenerationRequest) and argument.adapter:
            return argument.adapter.digest
    return None


def _weight(digest: str, replica: ReplicaID) -> bytes:
    return hashlib.blake2b(f"{digest} {replica.unique_id}".encode(), digest_size=8).digest()
