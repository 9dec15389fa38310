"""Full load for a while, during which adapters come and go and a replica is killed."""

import argparse
import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving.server import FailedRequestError, Server, our_server, stream
from benchmarks.serving.work import Round, World, asks_of

PUBLISH_SECONDS = 5.0
KEPT = 4
"""Adapters published on the way that are kept; older ones, for which nobody asks any more, are deleted."""
REPLICAS = 2


def soak(world: World, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Counts of requests. `failed` leaves out answers that the killed replica had begun."""
    with our_server(world, folder, arguments.clients, replicas=REPLICAS) as server:
        return asyncio.run(_Soak(world, folder, arguments, server).run())


class _Soak:
    def __init__(self, world: World, folder: Path, arguments: argparse.Namespace, server: Server) -> None:
        self._world = world
        self._folder = folder
        self._arguments = arguments
        self._server = server
        self._models = list(world.adapter_ids[: arguments.adapters])
        self._killed_at: float | None = None
        self._failures: list[str] = []
        self._counts = {"answered": 0, "failed": 0, "cut_by_the_kill": 0, "published": 0, "deleted": 0}

    async def run(self) -> dict[str, Any]:
        seconds = self._arguments.soak * 60
        self._end = time.monotonic() + seconds
        work = [self._client(number) for number in range(self._arguments.clients)]
        await asyncio.gather(*work, self._publish_and_delete(), self._kill_after(seconds / 2))
        return {**self._counts, "minutes": self._arguments.soak, "failures": self._failures[:5]}

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
            began: float | None = None
            try:
                async for _ in stream(self._server.port, body):
                    began = began or time.monotonic()
                self._counts["answered"] += 1
            except FailedRequestError as error:
                was_cut = began is not None and self._killed_at is not None and began <= self._killed_at
                self._counts["cut_by_the_kill" if was_cut else "failed"] += 1
                if not was_cut:
                    self._failures.append(str(error)[:500])

    async def _publish_and_delete(self) -> None:
        from ft_service.cleanup.removal import delete_adapter
        from ft_service.registry.registry import Registry
        from ft_service.storage.storage import Storage
        from tests.serve.serving_world import draft_record

        registry = Registry(Storage(self._world.storage))
        base = Path(self._world.base)
        published: list[str] = []
        retired: list[tuple[float, str]] = []
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
                retired.append((time.monotonic() + 2 * PUBLISH_SECONDS, oldest))
            while retired and retired[0][0] < time.monotonic():
                await asyncio.to_thread(delete_adapter, registry.storage, retired.pop(0)[1])
                self._counts["deleted"] += 1
            await asyncio.sleep(PUBLISH_SECONDS)

    async def _kill_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        replica = self._server.replicas()[0]
        self._killed_at = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            replica.kill()
