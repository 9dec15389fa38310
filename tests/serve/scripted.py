"""An engine without a model, for tests of what lies in front of it: it counts, at a pace that the prompt sets."""

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path

from ft_service.errors import ServingError
from ft_service.registry.registry import Registry
from serve.engines.engine import EngineInfo, EngineStats, GenerationChunk, GenerationRequest
from serve.inference.bases import load_base
from serve.settings import BaseSettings

DIE = 2
"""First prompt id of a request whose engine's process dies at once."""
FAIL = 3
WHO = 4
"""First prompt id of a request that is answered with the engine's process id, again and again."""
LATE = 6
"""The same, but nothing comes before the test releases it (`release`)."""
HELD = 7
"""The same, but only the first token comes before the test releases it."""
_POLL_SECONDS = 0.02


def release(base: Path) -> None:
    """Let held answers of the engines of this base go on, until `hold`."""
    (base / "released").touch()


def hold(base: Path) -> None:
    (base / "released").unlink(missing_ok=True)


class CountingEngine:
    """Answers "0 1 2 ..." with token ids 10, 11, ...; the last prompt id is the number of milliseconds per token."""

    def __init__(self, base: BaseSettings, registry: Registry) -> None:
        served = load_base(base)
        self.info = EngineInfo(
            engine="counting",
            base_fingerprint=served.ref.fingerprint,
            dtype="float32",
            precision=served.precision,
            context_length=served.context_length,
            vocab_size=served.vocab_size,
            end_ids=served.end_ids,
        )
        self.released = Path(base.base) / "released"
        self.running = 0
        self.ended = 0
        self.users: dict[str, int] = {}
        """Of each adapter that is loaded, by digest."""
        self.unwanted: set[str] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.running += 1
        kind = request.prompt_ids[0]
        digest = request.adapter.digest if request.adapter else None
        if digest:
            self.users[digest] = self.users.get(digest, 0) + 1
        try:
            if kind == DIE:
                os._exit(1)
            if kind == FAIL:
                raise ServingError("the counting engine fails as asked.")
            for number in range(request.max_tokens):
                await asyncio.sleep(request.prompt_ids[-1] / 1000)
                while (kind, number) in ((LATE, 0), (HELD, 1)) and not self.released.exists():
                    await asyncio.sleep(_POLL_SECONDS)
                is_last = number == request.max_tokens - 1
                text = os.getpid() if kind in (WHO, LATE, HELD) else number
                yield GenerationChunk(f"{text} ", (10 + number,), "length" if is_last else None)
        finally:
            self.running -= 1
            self.ended += 1
            if digest:
                self.users[digest] -= 1
                self._drop_unwanted()

    async def unload(self, adapter_digest: str) -> None:
        self.unwanted.add(adapter_digest)
        self._drop_unwanted()

    def _drop_unwanted(self) -> None:
        for digest in [digest for digest in self.unwanted if self.users.get(digest) == 0]:
            del self.users[digest]

    def stats(self) -> EngineStats:
        counters = {"ended": self.ended, "adapter_loads": len(self.users), "generated_tokens": self.ended}
        return EngineStats(self.running, 0, 0.0, tuple(self.users), 1000 * len(self.users), counters)

    async def close(self) -> None: ...
