"""A replica's care for itself, without Ray and without a model."""

import asyncio
from typing import Any

import pytest

from serve import replica
from serve.engines.engine import EngineStats
from serve.replica import CHUNK_SECONDS, CHUNKS_PER_SECOND, LONGEST_CHUNK_SECONDS, BaseReplica, chunk_seconds

ROUNDS = 3
UserClass: Any = BaseReplica.func_or_class  # type: ignore[attr-defined]  # Serve wraps it in a deployment


def test_a_round_of_care_that_fails_does_not_end_the_next_ones(monkeypatch, caplog):
    monkeypatch.setattr(replica, "CARE_SECONDS", 0)
    cared = UserClass.__new__(UserClass)
    done = asyncio.Event()
    calls: list[str] = []

    class Engine:
        def stats(self) -> EngineStats:
            return EngineStats(0, 0, 0.0, ("a digest",), 0, {})

    class Metrics:
        def export(self, _: EngineStats) -> None: ...

    class BrokenRegistry:
        def records(self) -> Any:
            calls.append("records")
            if len(calls) == ROUNDS:
                done.set()
            raise ValueError("a record that nobody expects")

    cared._engine = Engine()
    cared._metrics = Metrics()
    cared._registry = BrokenRegistry()

    async def rounds() -> None:
        async with asyncio.timeout(60):
            monkeypatch.setattr(asyncio, "to_thread", _at_once)
            care = asyncio.create_task(cared._take_care())
            waiting = asyncio.create_task(done.wait())
            await asyncio.wait([care, waiting], return_when=asyncio.FIRST_COMPLETED)
            care.cancel()
            waiting.cancel()

    asyncio.run(rounds())
    assert len(calls) >= ROUNDS
    assert "a round of care failed" in caplog.text


async def _at_once(work: Any) -> Any:
    return work()


@pytest.fixture(autouse=True)
def no_finalizer(monkeypatch) -> None:
    """Serve awaits `__del__`; here nobody does."""
    monkeypatch.delattr(UserClass, "__del__")


def test_a_replica_sends_a_bounded_number_of_chunks_but_every_stream_moves():
    assert chunk_seconds(1) == CHUNK_SECONDS
    assert 16 / chunk_seconds(16) == pytest.approx(CHUNKS_PER_SECOND)
    assert chunk_seconds(10_000) == LONGEST_CHUNK_SECONDS
