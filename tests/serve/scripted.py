"""An engine without a model, for tests of what lies in front of it: it counts, at a pace that the prompt sets."""

import asyncio
import os
from collections.abc import AsyncGenerator

from ft_service.errors import ServingError
from ft_service.registry.registry import Registry
from serve.engines.engine import EngineInfo, EngineStats, GenerationChunk, GenerationRequest
from serve.inference.bases import load_base
from serve.settings import BaseSettings

DIE = 2
"""First prompt id of a request whose engine's process dies at once, until a file named by FT_TEST_SURVIVE exists."""
FAIL = 3


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
        self.running = 0
        self.ended = 0
        self.unloaded: list[str] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.running += 1
        try:
            if request.prompt_ids[0] == DIE:
                os._exit(1)
            if request.prompt_ids[0] == FAIL:
                raise ServingError("the counting engine fails as asked.")
            for number in range(request.max_tokens):
                await asyncio.sleep(request.prompt_ids[-1] / 1000)
                is_last = number == request.max_tokens - 1
                yield GenerationChunk(f"{number} ", (10 + number,), "length" if is_last else None)
        finally:
            self.running -= 1
            self.ended += 1

    async def unload(self, adapter_digest: str) -> None:
        self.unloaded.append(adapter_digest)

    def stats(self) -> EngineStats:
        counters = {"ended": self.ended}
        return EngineStats(self.running, 0, 0.0, (), 0, counters)

    async def close(self) -> None: ...
