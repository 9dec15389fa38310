"""The requests that all sides answer, and how clients ask them. Standard library only: vLLM's interpreter runs it."""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Round:
    """A stretch of work. The same number gives the same prompts to every side."""

    number: int
    requests: int
    clients: int
    prompt_tokens: int
    answer_tokens: int
    vocab_size: int
    adapters: int = 0
    """So many of the world's adapters, mixed; 0 is the base."""


@dataclass(frozen=True)
class Ask:
    prompt_ids: list[int]
    adapter: int | None
    answer_tokens: int


@dataclass
class Timing:
    """One request. Seconds; `first` is None where nothing is streamed."""

    began: float
    first: float | None
    ended: float
    tokens: int


def asks_of(work: Round) -> list[Ask]:
    """Random tokens, so that no prefix is shared; as many requests for each adapter, in a drawn order."""
    draw = random.Random(work.number)
    lowest = 300  # the bytes, and special tokens, are below or at the very end
    highest = work.vocab_size - 32
    adapters = [index % work.adapters if work.adapters else None for index in range(work.requests)]
    draw.shuffle(adapters)
    return [
        Ask(
            [draw.randrange(min(lowest, highest - 1), highest) for _ in range(work.prompt_tokens)],
            adapter,
            work.answer_tokens,
        )
        for adapter in adapters
    ]


Stream = Callable[[Ask], AsyncGenerator[int, None]]
"""Answers one request: the number of tokens in each piece, as it comes."""


async def ask_all(stream: Stream, asks: list[Ask], clients: int) -> list[Timing]:
    """Each client asks its next request when its last one is answered."""
    left = iter(asks)
    timings: list[Timing] = []

    async def client() -> None:
        for ask in left:
            timing = Timing(time.perf_counter(), None, 0.0, 0)
            async for tokens in stream(ask):
                if timing.first is None:
                    timing.first = time.perf_counter()
                timing.tokens += tokens
            timing.ended = time.perf_counter()
            timings.append(timing)

    await asyncio.gather(*(client() for _ in range(clients)))
    return timings


def report(timings: list[Timing], seconds: float, cpu_seconds: float, **more: Any) -> dict[str, Any]:
    """What a side prints of a round."""
    first = [timing.first - timing.began for timing in timings if timing.first is not None]
    per_token = [
        (timing.ended - timing.first) / (timing.tokens - 1)
        for timing in timings
        if timing.first is not None and timing.tokens > 1
    ]
    tokens = sum(timing.tokens for timing in timings)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "cpu_ms_per_token": 1000 * cpu_seconds / tokens,
        "first": first,
        "per_token": per_token,
        **more,
    }


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    return sum(os.times()[:4])


def answer_rounds(measure: Callable[[Round], dict[str, Any]]) -> None:
    """The loop of a side's process: a round a line on its standard input, its figures a line on its output."""
    print("READY", flush=True)
    for line in sys.stdin:
        print("RESULT " + json.dumps(measure(Round(**json.loads(line)))), flush=True)


def to_line(work: Round) -> str:
    return json.dumps(asdict(work)) + "\n"


@dataclass(frozen=True)
class World:
    """Files that all sides read."""

    base: str
    storage: str
    adapter_ids: list[str]
    adapter_folders: list[str]
    vocab_size: int
    dtype: str

    @classmethod
    def read(cls, folder: Path) -> "World":
        return cls(**json.loads((folder / "world.json").read_text()))

    def write(self, folder: Path) -> None:
        (folder / "world.json").write_text(json.dumps(asdict(self)))
