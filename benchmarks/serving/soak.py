"""Full load for a while, during which adapters come and go and a replica is killed."""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.server import FailedRequestError, Server, our_server, stream
from benchmarks.serving.work import Round, World, asks_of

PUBLISH_SECONDS = 5.0
KEPT = 4
"""Adapters published on the way that are kept; older ones, for which nobody asks any more, are deleted."""
REPLICAS = 2
REPLACE_SECONDS = 60.0
GOAL = {"failed": 0, "killed": 1, "replicas_at_end": REPLICAS}


@dataclass(frozen=True)
class Failure:
    """A request without a complete answer. Times are those of the monotonic clock, in seconds."""

    request_id: str
    asked: float
    has_begun: bool
    """Whether a token had arrived."""
    failed: float
    reason: str


def is_excused(failure: Failure, killed: float | None, ended_on_a_replica: Collection[str]) -> bool:
    """Whether the killed replica had begun this answer: all that a replica's death may cost.

    Every other replica logs each request that it has worked on, so one without such a line was on the killed one.
    """
    if killed is None or not failure.has_begun:
        return False
    return failure.asked <= killed <= failure.failed and failure.request_id not in ended_on_a_replica


def holds(figures: dict[str, Any]) -> bool:
    came_and_went = min(figures[name] for name in ("answered", "published", "deleted"))
    return came_and_went > 0 and all(figures[name] == wanted for name, wanted in GOAL.items())


def soak(world: World, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Counts of requests. `failed` leaves out answers that the killed replica had begun."""
    batch = max(1, arguments.clients // REPLICAS)  # so both are full, and requests wait while one is replaced
    with our_server(world, folder, batch, replicas=REPLICAS) as server:
        return asyncio.run(_Soak(world, folder, arguments, server).run())


class _Soak:
    def __init__(self, world: World, folder: Path, arguments: argparse.Namespace, server: Server) -> None:
        self._world = world
        self._folder = folder
        self._arguments = arguments
        self._server = server
        self._models = list(world.adapter_ids[: arguments.adapters])
        self._asking: Counter[str] = Counter()
        self._killed: float | None = None
        self._failures: list[Failure] = []
        self._first_after_kill = 0.0
        self._counts = {"answered": 0, "published": 0, "deleted": 0}

    async def run(self) -> dict[str, Any]:
        seconds = self._arguments.soak * 60
        self._end = time.monotonic() + seconds
        work = [self._client(number) for number in range(self._arguments.clients)]
        await asyncio.gather(*work, self._publish_and_delete(), self._kill_after(seconds / 2))
        replicas = await self._replicas_at_end()
        ended = self._server.requests_ended_on_replicas()
        failed = [failure for failure in self._failures if not is_excused(failure, self._killed, ended)]
        return {
            **self._counts,
            "failed": len(failed),
            "cut_by_the_kill": len(self._failures) - len(failed),
            "killed": int(self._killed is not None),
            "replicas_at_end": replicas,
            "slowest_first_token_after_the_kill_s": round(self._first_after_kill, 2),
            "minutes": self._arguments.soak,
            "failures": [failure.reason for failure in failed[:5]],
        }

    async def _client(self, number: int) -> None:
        world = self._world
        arguments = self._arguments
        turn = 0
        while time.monotonic() < self._end:
            turn += 1
            seed = 10_000 * number + turn
            ask = asks_of(Round(seed, 1, 1, arguments.prompt_tokens, arguments.answer_tokens, world.vocab_size))[0]
            body = {
                "model": self._models[seed % len(self._models)],
                "prompt": ask.prompt_ids,
                "max_tokens": ask.answer_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            await self._ask(f"soak-{number}-{turn}", body)

    async def _ask(self, request_id: str, body: dict[str, Any]) -> None:
        model = body["model"]
        asked = time.monotonic()
        has_begun = False
        self._asking[model] += 1
        try:
            async for _ in stream(self._server.port, body, request_id):
                if not has_begun and self._killed is not None and asked >= self._killed:
                    self._first_after_kill = max(self._first_after_kill, time.monotonic() - asked)
                has_begun = True
            self._counts["answered"] += 1
        except FailedRequestError as error:
            reason = f"{request_id}, {time.monotonic() - asked:.1f} s: {error}"[:500]
            self._failures.append(Failure(request_id, asked, has_begun, time.monotonic(), reason))
        finally:
            self._asking[model] -= 1

    async def _publish_and_delete(self) -> None:
        from ft_service.cleanup.removal import delete_adapter
        from ft_service.registry.registry import Registry
        from ft_service.storage.storage import Storage
        from tests.serve.serving_world import draft_record

        registry = Registry(Storage(self._world.storage))
        base = Path(self._world.base)
        published: list[str] = []
        retired: list[str] = []
        while time.monotonic() < self._end:
            number = self._counts["published"]
            work = self._folder / f"adapter-{number % self._arguments.adapters}"
            draft = draft_record(base, f"soak-{number}")
            record = await asyncio.to_thread(registry.publish, work, draft, base.name, "# {id}\n")
            self._counts["published"] += 1
            published.append(record.id)
            self._models.append(record.id)
            if len(published) > KEPT:
                self._models.remove(oldest := published.pop(0))
                retired.append(oldest)
            for model in [model for model in retired if not self._asking[model]]:
                retired.remove(model)
                await asyncio.to_thread(delete_adapter, registry.storage, model)
                self._counts["deleted"] += 1
            await asyncio.sleep(PUBLISH_SECONDS)

    async def _kill_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        replica = self._server.replicas()[0]
        self._killed = time.monotonic()
        replica.kill()

    async def _replicas_at_end(self) -> int:
        deadline = time.monotonic() + REPLACE_SECONDS
        while (found := len(self._server.replicas())) < REPLICAS and time.monotonic() < deadline:
            await asyncio.sleep(1)
        return found
