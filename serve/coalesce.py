"""Fewer and larger chunks: what a chunk costs between two processes, one more token in it does not."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import chain

from serve.engines.engine import GenerationChunk

_LATEST = 2
"""So many intervals after the last chunk a token goes out that no other has followed."""


async def coalesced(
    chunks: AsyncGenerator[GenerationChunk, None], interval: Callable[[], float] | None
) -> AsyncGenerator[GenerationChunk, None]:
    """The same answer in fewer chunks: the first one at once, then at most one every `interval()` seconds.

    `interval` is asked again for each chunk; None leaves the answer at two. The last chunk is not delayed. An error
    comes after all that was generated before it. Closing the generator closes `chunks`.

    A chunk goes out when a token comes, so that all streams that a step has tokens for wake this process, the gateway
    and the proxy together. A timer is only for the token that no other follows in time.
    """
    received: list[GenerationChunk] = []
    loop = asyncio.get_running_loop()
    wake = asyncio.Event()
    timer: asyncio.TimerHandle | None = None
    sent_at: float | None = None

    async def receive() -> None:
        nonlocal timer
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    received.append(chunk)
                    if sent_at is None:
                        wake.set()
                    elif interval is not None:
                        seconds = interval()
                        if loop.time() >= sent_at + seconds:
                            wake.set()
                        elif timer is None:
                            timer = loop.call_at(sent_at + _LATEST * seconds, wake.set)
        finally:
            wake.set()

    receiver = loop.create_task(receive())
    try:
        while not (receiver.done() and not received):
            await wake.wait()
            wake.clear()
            if timer is not None:
                timer.cancel()
                timer = None
            if received:
                sent_at = loop.time()
                merged = merge(received)
                received.clear()
                yield merged
            elif not receiver.done():  # woken by its end, which comes a moment later
                await asyncio.wait([receiver])
        receiver.result()
    finally:
        if timer is not None:
            timer.cancel()
        receiver.cancel()
        await asyncio.wait([receiver])


def merge(chunks: Sequence[GenerationChunk]) -> GenerationChunk:
    """One chunk with all that `chunks` hold, in their order."""
    if len(chunks) == 1:
        return chunks[0]
    return GenerationChunk(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(chain.from_iterable(chunk.token_ids for chunk in chunks)),
        finish_reason=chunks[-1].finish_reason,
        logprobs=tuple(chain.from_iterable(chunk.logprobs for chunk in chunks)),
        prompt_logprobs=tuple(chain.from_iterable(chunk.prompt_logprobs for chunk in chunks)),
        cached_tokens=sum(chunk.cached_tokens for chunk in chunks),
        queued_seconds=chunks[0].queued_seconds,
    )
