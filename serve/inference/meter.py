"""Measures one request between engine and reply: for the metrics, the log, and the rates of its key."""

import asyncio
import time
from contextlib import aclosing

from starlette.requests import Request

from serve.engines.engine import RefusedRequestError
from serve.http.keys import client_of
from serve.inference.replies import Pieces
from serve.inference.translate import Generation
from serve.metrics import EndedRequest, Metrics

_SCHEMA_PARAM = "response_format"
"""What an engine names when it cannot follow a JSON schema; it does not know of tools."""


async def measured(
    pieces: Pieces, generation: Generation, http: Request, metrics: Metrics, *, log_prompts: bool
) -> Pieces:
    """The same pieces; whatever ends them is counted, once. Prompts and answers are in the log only if asked for.

    Raises `ApiError` 429 before anything is asked if the key has no tokens left.
    """
    now = time.perf_counter
    answers = [""] * len(generation.requests)
    base = generation.model.base.name
    key = client_of(http).key
    reserved = generation.most_tokens
    http.state.rates.reserve_tokens(key, reserved)
    began = metrics.begin(base)
    first: float | None = None
    generated = 0
    outcome = "error"
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                if piece is not None:
                    first = first or now()
                    index, chunk = piece
                    generated += len(chunk.token_ids)
                    if log_prompts:
                        answers[index] += chunk.text
                yield piece
        outcome = "ok"
    except RefusedRequestError as error:
        if generation.schema_is_of_tools and error.param == _SCHEMA_PARAM:
            raise RefusedRequestError(f"tools{error.message.removeprefix(_SCHEMA_PARAM)}", "tools") from None
        raise
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
        http.state.rates.settle_tokens(key, reserved, ended.prompt_tokens + generated)
        http.state.log.update(
            key=client_of(http).name,
            model=ended.model,
            outcome=outcome,
            prompt_tokens=ended.prompt_tokens,
            generated_tokens=generated,
            first_token=None if first is None else round(first - began, 4),
        )
        if log_prompts:
            prompts = [generation.tokens.text(request.prompt_ids) for request in generation.requests]
            http.state.log.update(prompts=prompts, answers=answers)
