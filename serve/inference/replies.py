"""From the engine to the wire: chunks of all choices become one reply, or the events of a stream."""

import asyncio
import codecs
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest, TokenLogprob
from serve.http.errors import ApiError, as_api_error
from serve.http.in_flight import InFlight
from serve.inference.tools import may_become_call, parse_call
from serve.inference.translate import Generation
from serve.inference.wire import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ChatToken,
    ChatTokenWithTop,
    Choice,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Reply,
    ToolCall,
    Usage,
)
from serve.settings import Limits
from serve.tracing import continued

COMMENT = ": waiting\n\n"
"""A line of an event stream that every client skips. It keeps connections open while nothing else is sent."""
FIRST_QUIET_SECONDS = 1.0
"""So long an error can still set the status of a stream that an engine works on. Then its headers go out, whether there
is a token or not."""
QUIET_SECONDS = 10.0
_MANY_LOGPROBS = 2000
"""Of a reply. Writing so many takes some 10 ms."""


WAITING = GenerationChunk("", ())
"""Of a stream: it is accepted, and waits for a place. So its headers go out; what an engine finds wrong with it comes
later, in any case."""


class Backend(Protocol):
    """The replicas of one base: each is an engine."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """See `serve.engines.engine.Engine.generate`. `WAITING` may come before the chunks of a stream."""
        ...

    async def unload(self, adapter_digest: str) -> None:
        """Drop an adapter on every replica once no request uses it."""
        ...

    async def all_stats(self) -> list[EngineStats]:
        """Of every replica that runs."""
        ...


# -- chunks of all choices ---------------------------------------------------------------------------------------------

Pieces = AsyncGenerator[tuple[int, GenerationChunk] | None, None]
"""Chunks in the order of their arrival, each with the index of its choice. None where nothing came for a while."""


async def pieces_of(
    engine: Backend, requests: Sequence[GenerationRequest], limits: Limits, in_flight: InFlight
) -> Pieces:
    """All choices at once, so that the engine answers them in one batch.

    Closing it closes all of them. Raises `ApiError` 429 if no token comes within `queue_seconds`, 503 if the
    server stops, 504 if the answers take longer than `request_seconds`.
    """
    chunks: asyncio.Queue[tuple[int, GenerationChunk | Exception | None]] = asyncio.Queue()

    async def ask(index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(engine.generate(request)) as generated:
                async for chunk in generated:
                    chunks.put_nowait((index, chunk))
            chunks.put_nowait((index, None))
        except Exception as error:
            chunks.put_nowait((index, error))

    requests = continued(requests)
    loop = asyncio.get_running_loop()
    began = loop.time()
    tasks = [loop.create_task(ask(index, request)) for index, request in enumerate(requests)]
    unfinished = len(tasks)
    has_begun = False
    quiet_seconds = FIRST_QUIET_SECONDS
    try:
        with in_flight.answering(lambda error: chunks.put_nowait((0, error))):
            while unfinished:
                allowed = limits.request_seconds if has_begun else min(limits.queue_seconds, limits.request_seconds)
                left = began + allowed - loop.time()
                try:
                    async with asyncio.timeout(min(quiet_seconds, left)):
                        index, chunk = await chunks.get()
                except TimeoutError:
                    if left <= quiet_seconds:
                        raise _took_too_long(has_begun, allowed) from None
                    quiet_seconds = QUIET_SECONDS
                    yield None
                    continue
                if chunk is None:
                    unfinished -= 1
                elif isinstance(chunk, Exception):
                    raise chunk
                elif not requests[index].whole and chunk == WAITING:
                    quiet_seconds = QUIET_SECONDS
                    yield None
                else:
                    has_begun = True
                    yield index, chunk
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _took_too_long(has_begun: bool, seconds: float) -> ApiError:
    if has_begun:
        message = f"The answer was not complete within {seconds:g} seconds. Ask for fewer tokens."
        return ApiError(504, message, "request_timeout")
    message = f"No answer began within {seconds:g} seconds: too many requests wait. Try again later."
    return ApiError(429, message, "queue_timeout", retry_after=30)


EventChoice = dict[str, Any]
"""A choice of an event, as JSON has it. A plain dictionary: there is one for every chunk, and pydantic costs more than
all the rest of it."""


# -- shapes of the two calls -------------------------------------------------------------------------------------------


@dataclass
class _Answer:
    """What has come of one choice."""

    text: str = ""
    tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, chunk: GenerationChunk) -> None:
        self.text += chunk.text
        self.tokens += len(chunk.token_ids)
        self.cached_tokens += chunk.cached_tokens
        self.logprobs += chunk.logprobs
        self.prompt_logprobs += chunk.prompt_logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason


class ChatShape:
    """Replies of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    reply: Literal["chat.completion"] = "chat.completion"
    event: Literal["chat.completion.chunk"] = "chat.completion.chunk"

    def __init__(self, generation: Generation) -> None:
        self._tools = generation.tools
        self._wants_logprobs = generation.requests[0].logprobs is not None
        self._end_ids = generation.requests[0].end_ids
        self._held: dict[int, str] = {}
        """Of each choice, the text that may be the start of a call."""
        self._decided: set[int] = set()
        """Choices that are text for certain: nothing of them is held back any more."""

    def choice(self, index: int, answer: _Answer) -> Choice:
        call = parse_call(answer.text, self._tools) if self._tools else None
        message = AssistantMessage(content=None if call else answer.text, tool_calls=[call] if call else None)
        return ChatChoice(
            index=index,
            finish_reason=_reason(answer.finish_reason, call),
            message=message,
            logprobs=self._logprobs(answer.logprobs),
        )

    def opening(self, index: int) -> list[EventChoice]:
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def events(self, index: int, chunk: GenerationChunk) -> list[EventChoice]:
        text = chunk.text
        call = None
        if self._tools and index not in self._decided:
            text = self._held.get(index, "") + text
            call = parse_call(text, self._tools) if chunk.finish_reason else None
            if call is None and not chunk.finish_reason and may_become_call(text):
                self._held[index] = text
                text = ""
            else:
                self._decided.add(index)
        delta: dict[str, Any] = {"content": text} if text and not call else {}
        if call:
            delta = {"tool_calls": [{"index": 0, **call.model_dump()}]}
        if not (delta or chunk.finish_reason or chunk.logprobs):
            return []
        return [self._chunk(index, delta, chunk.logprobs, _reason(chunk.finish_reason, call))]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: FinishReason | None = None,
    ) -> EventChoice:
        values = self._logprobs(logprobs) if logprobs else None
        return {
            "index": index,
            "finish_reason": finish_reason,
            "delta": delta,
            "logprobs": None if values is None else values.model_dump(),
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._wants_logprobs:
            return None
        return ChatLogprobs(
            content=[
                ChatTokenWithTop(**_token(token), top_logprobs=[ChatToken(**_token(other)) for other in token.top])
                for token in logprobs
                if token.token_id not in self._end_ids  # as at OpenAI: the end of a turn is no token of the message
            ]
        )


def _reason(reason: FinishReason | None, call: ToolCall | None) -> FinishReason | None:
    return "tool_calls" if call and reason == "stop" else reason


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _name(token.text), "logprob": token.logprob, "bytes": list(token.text)}


class CompletionShape:
    """Replies of /v1/completions; an event has the same shape as a whole reply."""

    id_prefix = "cmpl"
    reply: Literal["text_completion"] = "text_completion"
    event: Literal["text_completion"] = "text_completion"

    def __init__(self, generation: Generation) -> None:
        self._wants_logprobs = generation.requests[0].logprobs is not None
        self._echoed = generation.echoed
        self._prompts = [request.prompt_ids for request in generation.requests]
        self._tokens = generation.tokens
        self._places: dict[int, _TextPlace] = {}
        """Of each choice, where its next token begins in the text."""

    def choice(self, index: int, answer: _Answer) -> Choice:
        logprobs = self._logprobs(index, answer.prompt_logprobs, answer.logprobs)
        text = self._echo(index) + answer.text
        return CompletionChoice(index=index, text=text, finish_reason=answer.finish_reason, logprobs=logprobs)

    def opening(self, index: int) -> list[EventChoice]:
        # With log-probabilities the prompt's come with the first chunk, and so does its text.
        text = self._echo(index)
        return [self._choice(index, text, None, None)] if text and not self._wants_logprobs else []

    def events(self, index: int, chunk: GenerationChunk) -> list[EventChoice]:
        logprobs: Sequence[TokenLogprob | None] = [*chunk.prompt_logprobs, *chunk.logprobs]
        is_first = index not in self._places
        text = (self._echo(index) if is_first and self._wants_logprobs else "") + chunk.text
        values = self._logprobs(index, chunk.prompt_logprobs, chunk.logprobs) if logprobs or is_first else None
        if not (text or chunk.finish_reason or logprobs):
            return []
        return [self._choice(index, text, chunk.finish_reason, values)]

    def _echo(self, index: int) -> str:
        return self._echoed[index] if self._echoed else ""

    @staticmethod
    def _choice(index: int, text: str, reason: FinishReason | None, logprobs: CompletionLogprobs | None) -> EventChoice:
        values = None if logprobs is None else logprobs.model_dump()
        return {"index": index, "finish_reason": reason, "text": text, "logprobs": values}

    def _logprobs(
        self, index: int, prompt: Sequence[TokenLogprob | None], answer: Sequence[TokenLogprob]
    ) -> CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        echo = self._echo(index)
        if index not in self._places:
            self._places[index] = _TextPlace(0 if prompt else len(echo))
        names = []
        offsets = []
        for token in prompt:
            text = self._tokens.token_bytes(self._prompts[index][0]) if token is None else token.text
            # The begin-of-text token that encoding puts before a prompt is not in the prompt's own text.
            is_added = token is None and not echo.encode().startswith(text)
            names.append(_name(text, "bytes:"))
            offsets.append(self._places[index].push(b"" if is_added else text))
        if prompt:
            self._places[index] = _TextPlace(len(echo))
        for token in answer:
            is_special = token.token_id in self._tokens.special_ids  # they are not in the answer's text
            names.append(_name(token.text, "bytes:"))
            offsets.append(self._places[index].push(b"" if is_special else token.text))
        tokens = [*prompt, *answer]
        return CompletionLogprobs(
            tokens=names,
            token_logprobs=[None if token is None else token.logprob for token in tokens],
            top_logprobs=[None if token is None else _by_name(token) for token in tokens],
            text_offset=offsets,
        )


class _TextPlace:
    """Counts the characters of a text that grows by the bytes of tokens."""

    def __init__(self, characters: int) -> None:
        self._characters = characters
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: bytes) -> int:
        """Add a token. Returns the index of its first character, which may have begun in the token before."""
        begin = self._characters
        self._characters += len(self._decoder.decode(token))
        return begin


def _name(text: bytes, mark: str = "") -> str:
    """A token as OpenAI names it: its text; if it is part of a character, `mark` and its bytes as ``\\xe6\\x97``."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return mark + "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in text)


def _by_name(token: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and the chosen one, by name. Of tokens with the same name the most likely one stays."""
    values: dict[str, float] = {}
    for one in sorted((*token.top, token), key=lambda one: -one.logprob):
        values.setdefault(_name(one.text, "bytes:"), one.logprob)
    return values


Shape = ChatShape | CompletionShape


# -- replies and streams -----------------------------------------------------------------------------------------------


def empty_reply(generation: Generation, shape: Shape, is_stream: bool) -> Reply:
    return Reply(
        id=f"{shape.id_prefix}-{uuid.uuid4().hex}",
        object=shape.event if is_stream else shape.reply,
        created=int(time.time()),
        model=generation.model.id,
        system_fingerprint=generation.model.system_fingerprint,
        choices=[],
    )


async def whole_reply(generation: Generation, pieces: Pieces, shape: Shape) -> bytes:
    """The reply once all choices are complete, as JSON. What is long is written beside the event loop."""
    answers = [_Answer() for _ in generation.requests]
    async with aclosing(pieces):
        async for piece in pieces:
            if piece is not None:
                index, chunk = piece
                answers[index].add(chunk)
    logprobs = (token for answer in answers for token in (*answer.prompt_logprobs, *answer.logprobs))
    if sum(1 + len(token.top) for token in logprobs if token is not None) > _MANY_LOGPROBS:
        return await asyncio.to_thread(_write, generation, answers, shape)
    return _write(generation, answers, shape)


def _write(generation: Generation, answers: Sequence[_Answer], shape: Shape) -> bytes:
    """A choice at a time: nothing else runs while JSON is written."""
    reply = empty_reply(generation, shape, is_stream=False)
    reply.usage = _usage(generation, answers)
    choices = (_json(shape.choice(index, answer).model_dump()) for index, answer in enumerate(answers))
    return f'{_json(reply.model_dump(exclude={"choices"}))[:-1]},"choices":[{",".join(choices)}]}}'.encode()


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def event_stream(
    generation: Generation,
    first: tuple[int, GenerationChunk] | None,
    rest: Pieces,
    shape: Shape,
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    """Server-sent events that end with ``[DONE]``, or with an error, because the status is already sent.

    A comment comes where nothing else does: a request may wait in the queue for longer than its client.
    """
    reply = empty_reply(generation, shape, is_stream=True).model_dump(exclude={"choices", "usage"})
    answers = [_Answer() for _ in generation.requests]

    def events(choices: Sequence[EventChoice], usage: Usage | None = None) -> str:
        ending = {"usage": usage and usage.model_dump()} if include_usage else {}
        return event_text({**reply, "choices": choices, **ending})

    try:
        async with aclosing(_from_first(first, rest)) as pieces:
            for index in range(len(answers)):
                if opening := shape.opening(index):
                    yield events(opening)
            async for piece in pieces:
                if piece is None:
                    yield COMMENT
                    continue
                index, chunk = piece
                answers[index].add(chunk)
                if choices := shape.events(index, chunk):
                    yield events(choices)
        if include_usage:
            yield events([], _usage(generation, answers))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event_text(as_api_error(error).body())


async def _from_first(first: tuple[int, GenerationChunk] | None, rest: Pieces) -> Pieces:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


def event_text(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(generation: Generation, answers: Sequence[_Answer]) -> Usage:
    first_of_each_prompt = answers[:: generation.choices_per_prompt]
    return Usage.of(
        generation.prompt_tokens,
        sum(answer.tokens for answer in answers),
        sum(answer.cached_tokens for answer in first_of_each_prompt),
    )
