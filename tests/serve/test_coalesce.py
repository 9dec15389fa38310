"""Chunks are merged without a change to the answer."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest

from ft_service.errors import ServingError
from serve.coalesce import coalesced, merge
from serve.engines.engine import GenerationChunk, TokenLogprob


def long() -> float:
    return 3600.0


CHUNKS = [GenerationChunk(f"{number} ", (number,), "stop" if number == 9 else None) for number in range(10)]


async def at_once(error: Exception | None = None) -> AsyncGenerator[GenerationChunk, None]:
    for chunk in CHUNKS:
        await asyncio.sleep(0)
        yield chunk
    if error:
        raise error


async def collect_coalesced(interval: Callable[[], float] | None) -> list[GenerationChunk]:
    return [chunk async for chunk in coalesced(at_once(), interval)]


@pytest.mark.parametrize("interval", [long, None])
def test_the_first_chunk_comes_at_once_and_the_end_is_not_delayed(interval):
    first, last = asyncio.run(collect_coalesced(interval))
    assert first == CHUNKS[0]
    assert last == merge(CHUNKS[1:])
    assert (last.text, last.finish_reason) == ("1 2 3 4 5 6 7 8 9 ", "stop")


def test_chunks_that_come_slower_than_the_interval_stay_apart():
    chunks = asyncio.run(collect_coalesced(float))
    assert merge(chunks) == merge(CHUNKS)
    assert len(chunks) > 2


def test_a_chunk_goes_out_when_its_time_has_come_though_no_other_follows():
    held = asyncio.Event()

    async def two_then_wait() -> AsyncGenerator[GenerationChunk, None]:
        yield CHUNKS[0]
        await asyncio.sleep(0)
        yield CHUNKS[1]
        await held.wait()
        yield CHUNKS[9]

    async def run() -> list[GenerationChunk]:
        chunks = coalesced(two_then_wait(), lambda: 0.001)
        first_two = [await anext(chunks), await anext(chunks)]
        held.set()
        return [*first_two, *[chunk async for chunk in chunks]]

    assert asyncio.run(run()) == [CHUNKS[0], CHUNKS[1], CHUNKS[9]]


def test_a_chunk_goes_out_with_the_first_token_that_comes_after_its_time():
    """Not by a timer: the tokens of a step then go out together, whatever their streams are."""
    intervals = iter([3600.0, 0.0])

    async def three_then_wait() -> AsyncGenerator[GenerationChunk, None]:
        for chunk in CHUNKS[:3]:
            yield chunk
            await asyncio.sleep(0)
        await asyncio.Event().wait()

    async def run() -> list[GenerationChunk]:
        async with aclosing(coalesced(three_then_wait(), lambda: next(intervals))) as chunks:
            return [await anext(chunks), await anext(chunks)]

    assert asyncio.run(asyncio.wait_for(run(), 60)) == [CHUNKS[0], merge(CHUNKS[1:3])]


def test_an_error_comes_after_what_was_generated_before_it():
    async def run() -> list[GenerationChunk]:
        received = []
        with pytest.raises(ServingError, match="broken"):
            async for chunk in coalesced(at_once(ServingError("broken")), long):
                received.append(chunk)
        return received

    assert merge(asyncio.run(run())) == merge(CHUNKS)


def test_an_error_before_the_first_chunk_is_raised():
    async def fails() -> AsyncGenerator[GenerationChunk, None]:
        raise ServingError("broken")
        yield

    with pytest.raises(ServingError, match="broken"):
        asyncio.run(anext(coalesced(fails(), long)))


def test_closing_it_closes_the_engines_generator():
    ended = []

    async def endless() -> AsyncGenerator[GenerationChunk, None]:
        try:
            while True:
                await asyncio.sleep(0)
                yield CHUNKS[0]
        finally:
            ended.append(True)

    async def run() -> None:
        chunks = coalesced(endless(), long)
        await anext(chunks)
        await chunks.aclose()
        assert ended

    asyncio.run(run())


def test_a_merged_chunk_has_everything():
    logprob = TokenLogprob(1, b"x", -0.5)
    chunks = [
        GenerationChunk("a", (1,), None, (logprob,), (None, logprob), 7),
        GenerationChunk("", (2,), None, (logprob,)),
        GenerationChunk("b", (3,), "length", (logprob,)),
    ]
    assert merge(chunks) == GenerationChunk("ab", (1, 2, 3), "length", (logprob,) * 3, (None, logprob), 7)
