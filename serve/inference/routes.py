"""The routes: translate an OpenAI request into engine requests, and their chunks into a reply or an event stream."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ft_service.chat.format import ChatFormat, Message
from ft_service.errors import FtError, StorageError
from serve.engines.engine import Engine, FinishReason, GenerationChunk, GenerationRequest
from serve.http.errors import ApiError
from serve.http.keys import HEALTH_PATH, RequireKey
from serve.inference.models import ServedModel, ServedModels
from serve.inference.wire import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatMessage,
    ChatRequest,
    Choice,
    CompletionChoice,
    CompletionRequest,
    GenerationParameters,
    ModelEntry,
    ModelList,
    Reply,
    Usage,
)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; chat may fill the context

logger = logging.getLogger(__name__)


def create_api(engine: Engine, models: ServedModels, api_key: str | None) -> FastAPI:
    """The ASGI application of a loaded engine. Needs no Ray."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    api.add_middleware(RequireKey, api_key=api_key)
    _answer_errors_in_openai_shape(api)
    translate = _Translator(engine, models)

    @api.get(HEALTH_PATH)
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": models.base.id}

    @api.get("/v1/models")
    def list_models() -> ModelList:
        return ModelList(data=[model.entry() for model in models.all()])

    @api.get("/v1/models/{model_id:path}")
    def retrieve_model(model_id: str) -> ModelEntry:
        return models.resolve(model_id).entry()

    @api.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Response:
        return await _respond(engine, await asyncio.to_thread(translate.chat, request), request, _Chat())

    @api.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Response:
        return await _respond(engine, await asyncio.to_thread(translate.completion, request), request, _Completion())

    return api


# -- from the wire to the engine ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EngineRequests:
    """A translated request: the model, and one engine request per prompt."""

    model: ServedModel
    requests: list[GenerationRequest]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests)


class _Translator:
    def __init__(self, engine: Engine, models: ServedModels) -> None:
        self._engine = engine
        self._models = models
        try:
            self._chat: ChatFormat | None = ChatFormat(engine.tokenizer)
        except FtError as error:
            self._chat = None
            self._no_chat_reason = str(error)

    def chat(self, request: ChatRequest) -> _EngineRequests:
        model = self._models.resolve(request.model)
        chat = self._chat_format_for(model)
        prompt_ids = chat.encode_prompt([_message(turn) for turn in request.messages])
        end_ids = frozenset(model.adapter.end_of_turn_ids if model.adapter else chat.end_of_turn_ids)
        max_tokens = request.max_completion_tokens or request.max_tokens
        return _EngineRequests(model, [self._generation(model, prompt_ids, max_tokens, end_ids, request, "messages")])

    def completion(self, request: CompletionRequest) -> _EngineRequests:
        model = self._models.resolve(request.model)
        end_ids = frozenset(model.adapter.end_of_turn_ids if model.adapter else ())
        max_tokens = request.max_tokens or COMPLETION_MAX_TOKENS
        prompts = [self._prompt_ids(prompt) for prompt in request.prompts]
        if not prompts:
            raise ApiError(400, "prompt is an empty list. Send a text or token ids.", "invalid_value", "prompt")
        return _EngineRequests(
            model, [self._generation(model, prompt, max_tokens, end_ids, request, "prompt") for prompt in prompts]
        )

    def _chat_format_for(self, model: ServedModel) -> ChatFormat:
        if self._chat is None:
            message = f"{self._models.base.id} has no chat format: {self._no_chat_reason} Use /v1/completions."
            raise ApiError(400, message, "chat_not_supported", "model")
        trained_with = model.adapter.chat_template_digest if model.adapter else self._chat.template_digest
        if not self._chat.agrees_without_tools(trained_with):  # requests with tools are refused
            message = (
                f"{model.id} was trained with the chat template {trained_with[:8]}, and this server has "
                f"{self._chat.template_digest[:8]}. Use /v1/completions, or the server's version that trained it."
            )
            raise ApiError(400, message, "chat_template_mismatch", "model")
        return self._chat

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return list(self._engine.tokenizer(prompt)["input_ids"])
        size = len(self._engine.tokenizer)
        outside = [token_id for token_id in prompt if not 0 <= token_id < size]
        if outside:
            message = f"prompt contains the token id {outside[0]}; this model has ids 0 to {size - 1}."
            raise ApiError(400, message, "invalid_value", "prompt")
        return prompt

    def _generation(
        self,
        model: ServedModel,
        prompt_ids: list[int],
        max_tokens: int | None,
        end_ids: frozenset[int],
        parameters: GenerationParameters,
        param: str,
    ) -> GenerationRequest:
        context = self._engine.context_length
        if not prompt_ids:
            raise ApiError(400, f"{param} is empty. Send at least one token.", "invalid_value", param)
        if len(prompt_ids) + (max_tokens or 1) > context:
            message = (
                f"This model's context length is {context} tokens; the request has {len(prompt_ids)} in the {param} "
                f"and {max_tokens or 1} to generate. Shorten the {param} or lower max_tokens."
            )
            raise ApiError(400, message, "context_length_exceeded", param)
        return GenerationRequest(
            prompt_ids=prompt_ids,
            adapter=model.adapter,
            max_tokens=max_tokens or context - len(prompt_ids),
            end_ids=end_ids | self._engine.end_ids,
            temperature=1.0 if parameters.temperature is None else parameters.temperature,
            top_p=1.0 if parameters.top_p is None else parameters.top_p,
            seed=parameters.seed,
            stop=parameters.stop_strings,
        )


def _message(turn: ChatMessage) -> Message:
    return Message(role="system" if turn.role == "developer" else turn.role, content=turn.text)


# -- from the engine to the wire ---------------------------------------------------------------------------------------


class _Chat:
    """Replies of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    reply = "chat.completion"
    event = "chat.completion.chunk"

    def choice(self, index: int, text: str, finish_reason: FinishReason | None) -> Choice:
        return ChatChoice(index=index, finish_reason=finish_reason, message=AssistantMessage(content=text))

    def opening(self, index: int) -> list[Choice]:
        return [ChatChunkChoice(index=index, finish_reason=None, delta={"role": "assistant", "content": ""})]

    def delta(self, index: int, text: str, finish_reason: FinishReason | None) -> Choice:
        return ChatChunkChoice(index=index, finish_reason=finish_reason, delta={"content": text} if text else {})


class _Completion:
    """Replies of /v1/completions; an event has the same shape as a whole reply."""

    id_prefix = "cmpl"
    reply = "text_completion"
    event = "text_completion"

    def choice(self, index: int, text: str, finish_reason: FinishReason | None) -> Choice:
        return CompletionChoice(index=index, finish_reason=finish_reason, text=text)

    def opening(self, index: int) -> list[Choice]:
        return []

    delta = choice


Pieces = AsyncGenerator[tuple[int, GenerationChunk], None]
"""Chunks, each with the index of its prompt."""


async def _respond(
    engine: Engine, translated: _EngineRequests, parameters: GenerationParameters, shape: _Chat | _Completion
) -> Response:
    pieces = _pieces(engine, translated.requests)
    first = await anext(pieces)  # errors up to here still set the HTTP status
    pieces = _with_first(first, pieces)
    reply = Reply(
        id=f"{shape.id_prefix}-{uuid.uuid4().hex}",
        object=shape.event if parameters.stream else shape.reply,  # type: ignore[arg-type]
        created=int(time.time()),
        model=translated.model.id,
        system_fingerprint=translated.model.system_fingerprint,
        choices=[],
    )
    if parameters.stream:
        events = _events(translated, pieces, reply, shape, parameters.include_usage)
        headers = {**translated.model.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    answers: dict[int, list[GenerationChunk]] = {}
    async for index, chunk in pieces:
        answers.setdefault(index, []).append(chunk)
    reply.choices = [
        shape.choice(index, "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason)
        for index, chunks in answers.items()
    ]
    completion_tokens = sum(chunk.num_tokens for chunks in answers.values() for chunk in chunks)
    reply.usage = Usage.of(translated.prompt_tokens, completion_tokens)
    return JSONResponse(reply.model_dump(), headers=translated.model.headers)


async def _pieces(engine: Engine, requests: list[GenerationRequest]) -> Pieces:
    for index, request in enumerate(requests):
        async with aclosing(engine.generate(request)) as chunks:
            async for chunk in chunks:
                yield index, chunk


async def _with_first(first: tuple[int, GenerationChunk], rest: Pieces) -> Pieces:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


async def _events(
    translated: _EngineRequests, pieces: Pieces, reply: Reply, shape: _Chat | _Completion, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events that end with ``[DONE]``, or with an error, because the status is already sent."""

    def event(choices: list[Choice], usage: Usage | None = None) -> str:
        content = reply.model_copy(update={"choices": choices, "usage": usage})
        return _event(content.model_dump(exclude=None if include_usage else {"usage"}))

    completion_tokens = 0
    try:
        async with aclosing(pieces):
            for index in range(len(translated.requests)):
                if opening := shape.opening(index):
                    yield event(opening)
            async for index, chunk in pieces:
                completion_tokens += chunk.num_tokens
                if chunk.text or chunk.finish_reason:
                    yield event([shape.delta(index, chunk.text, chunk.finish_reason)])
        if include_usage:
            yield event([], Usage.of(translated.prompt_tokens, completion_tokens))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(_as_api_error(error).body())


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


# -- errors ------------------------------------------------------------------------------------------------------------


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StorageError):
        return ApiError(503, str(error), "storage_error")
    if isinstance(error, FtError):
        return ApiError(500, str(error), "serving_error")
    logger.error("unexpected failure", exc_info=error)
    return ApiError(500, f"The server failed ({type(error).__name__}). Its log has the details.", "internal_error")


def _answer_errors_in_openai_shape(api: FastAPI) -> None:
    def respond(error: ApiError) -> JSONResponse:
        # Clients retry every 5xx. A 500 would only fail again; a 503 of the storage may pass.
        headers = {"x-should-retry": "false"} if error.status == 500 else None
        return JSONResponse(error.body(), error.status, headers)

    @api.exception_handler(FtError)
    async def on_ft_error(_: Request, error: FtError) -> JSONResponse:
        return respond(_as_api_error(error))

    @api.exception_handler(RequestValidationError)
    async def on_invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return respond(ApiError(400, f"The body is not JSON (at character {first['loc'][1]}).", "invalid_json"))
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return respond(ApiError(400, f"{param or 'body'}: {first['msg']}.", "invalid_value", param))

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return respond(ApiError(error.status_code, message, "unknown_url"))

    @api.exception_handler(Exception)
    async def on_failure(_: Request, error: Exception) -> JSONResponse:
        return respond(_as_api_error(error))
