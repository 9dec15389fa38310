"""Measures one request between engine and reply: for the metrics, the log, and the rates of its key."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

from starlette.requests import Request

from serve.http.keys import client_of
from serve.inference.replies import Pieces
from serve.inference.translate import Generation
from serve.metrics import EndedRequest, Metrics

Now = Callable[[], float]


async def measured(
    pieces: Pieces, generation: Generation, http: Request, metrics: Metrics, now: Now = time.perf_counter
) -> Pieces:
    """The same pieces; whatever ends them is counted, once."""
    base = generation.model.base.name
    began = metrics.begin(base)
    first: float | None = None
    generated = 0
    outcome = "error"
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                if piece is not None:
                    first = first or now()
                    generated += len(piece[1].token_ids)
                yield piece
        outcome = "ok"
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    finally:
        ended = EndedRequest(
            base=base,
            model=generation.model.id,
            outcome=outcome,
            prompt_tokens=generation.prompt_tokens,
            generated_tokens=generated,
            seconds=now() - began,
            seconds_to_first=None if first is None else first - began,
        )
        metrics.end(ended)
        http.state.rates.add_tokens(client_of(http).key, ended.prompt_tokens + generated)
        http.state.log.update(
            key=client_of(http).name,
            model=ended.model,
            outcome=outcome,
            prompt_tokens=ended.prompt_tokens,
            generated_tokens=generated,
            first_token=None if first is None else round(first - began, 4),
        )
