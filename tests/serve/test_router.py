"""Which replica gets a request: an adapter's requests meet, and a busy replica is helped."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, RunningReplicaInfo
from ray.serve.request_router import RequestRouter

from serve.engines.engine import GenerationRequest
from serve.router import CONTROL_CALLS, AdapterRouter

REPLICAS = [
    SimpleNamespace(replica_id=ReplicaID(f"replica-{number}", DeploymentID("base", "app"))) for number in range(4)
]
QUEUES: dict[ReplicaID, int] = {}


@pytest.fixture
def router(monkeypatch) -> AdapterRouter:
    router = AdapterRouter.__new__(AdapterRouter)
    router.initialize_state(busy_requests=2)
    QUEUES.clear()
    monkeypatch.setattr(AdapterRouter, "replica_queue_len_cache", QUEUES)
    return router


def chosen(router: AdapterRouter, digest: str | None, replicas=REPLICAS) -> list[list[str]]:
    adapter = SimpleNamespace(digest=digest) if digest else None
    request = GenerationRequest("id", (5,), adapter, 1, frozenset())
    pending = SimpleNamespace(args=[request], routing_context=SimpleNamespace(should_backoff=False))
    ranks = asyncio.run(router.choose_replicas(list(replicas), pending))
    assert pending.routing_context.should_backoff  # a full base would be tried again without a pause
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


def test_an_adapter_has_one_order_of_replicas_whatever_gateway_asks(router):
    order = chosen(router, "ab")
    assert order == chosen(router, "ab", reversed(REPLICAS)) and len(order) == 4
    assert len({str(chosen(router, f"adapter-{number}")[0]) for number in range(40)}) == 4


def test_a_replica_that_goes_moves_only_its_own_adapters(router):
    digests = [f"adapter-{number}" for number in range(40)]
    before = {digest: chosen(router, digest)[0] for digest in digests}
    after = {digest: chosen(router, digest, REPLICAS[1:])[0] for digest in digests}
    assert all(after[digest] == before[digest] for digest in digests if before[digest] != ["replica-0"])


def test_the_next_replica_helps_while_the_first_is_busy_and_the_freest_while_all_are(router):
    first, second, *_ = (rank[0] for rank in chosen(router, "ab"))
    by_name = {replica.replica_id.unique_id: replica.replica_id for replica in REPLICAS}
    QUEUES[by_name[first]] = 2
    assert chosen(router, "ab")[0] == [second] and chosen(router, "ab")[-1] == [first]
    QUEUES.update({replica.replica_id: 3 for replica in REPLICAS})
    [everywhere] = chosen(router, "ab")
    assert sorted(everywhere) == sorted(by_name)


def test_the_base_goes_to_any_replica(router):
    assert len(chosen(router, None)) == 1 and len(chosen(router, None)[0]) == 4


def test_places_for_what_all_replicas_are_asked_stay_free(router, monkeypatch):
    seen = []
    monkeypatch.setattr(RequestRouter, "_update_running_replicas", lambda self, infos: seen.extend(infos))
    info = RunningReplicaInfo(REPLICAS[0].replica_id, None, None, None, "actor", 4 + CONTROL_CALLS)
    router._update_running_replicas([info])
    assert [info.max_ongoing_requests for info in seen] == [4]
