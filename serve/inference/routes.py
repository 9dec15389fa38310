"""The routes of the inference API: read a request, ask the engine of its base, answer in OpenAI's shapes."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from sqlalchemy import Engine

from serve.database.audit import audit
from serve.database.database import session
from serve.engines.engine import EngineStats
from serve.http.body import read_json
from serve.http.errors import ApiError
from serve.http.in_flight import InFlight
from serve.http.keys import Client, client_of
from serve.http.openapi import reads
from serve.http.tenants import tenant_of
from serve.inference.meter import measured
from serve.inference.models import FINE_TUNED, ServedModel, ServedModels, deletable, delete_published, unknown_model
from serve.inference.replies import (
    Backend,
    ChatShape,
    CompletionShape,
    Shape,
    event_stream,
    pieces_of,
    whole_reply,
)
from serve.inference.tokens import LONG_CHARACTERS, BaseTokens, executor_for
from serve.inference.translate import Generation, Translator, chat_format, read_messages
from serve.inference.wire import (
    ChatRequest,
    CompletionRequest,
    DeletedModel,
    DetokenizeReply,
    DetokenizeRequest,
    GenerationParameters,
    ModelEntry,
    ModelList,
    Reply,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfo,
    Tool,
)
from serve.metrics import Metrics
from serve.settings import ServeSettings

BODIES: list[type[BaseModel]] = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
MAX_TOKENIZED_CHARACTERS = 2**20
"""Making and writing the list of a million ids stops all other threads for about 0.1 s."""
_TOKENIZED_CONTEXTS = 8
"""Characters for each token of a context that is longer."""
_INDENT = 4
"""Blanks for each level of a tool's JSON, as the chat template writes it."""
SMALL_BODY_BYTES = 4096
"""Of a request that is encoded within a few milliseconds, whatever is in it."""
Result = TypeVar("Result")


def inference_routes(
    models: ServedModels,
    backends: Mapping[str, Backend],
    settings: ServeSettings,
    database: Engine | None,
    in_flight: InFlight,
) -> APIRouter:
    """The routes over the engines of each base, by the base's name. `database` keeps the audit log."""
    api = APIRouter()
    limits = settings.limits
    metrics = Metrics()
    translate = Translator(models, limits)
    pinned = frozenset(adapter for base in settings.bases for adapter in base.pinned)

    def resolve(http: Request, model_id: str | None) -> ServedModel:
        """The model that was asked for; from here on the reply names its weights, whatever it is.

        Reads the registry, so never on the event loop. Raises `ApiError` 403 or 404.
        """
        model = _allowed_model(models, model_id, client_of(http))
        http.state.headers.update(model.headers)
        return model

    async def encode(http: Request, model_id: str | None, characters: int, work: Callable[[], Result]) -> Result:
        """On the event loop where it takes less than passing it to another thread and back."""
        size = http.headers.get("content-length", "")
        if size.isdigit() and int(size) <= SMALL_BODY_BYTES and models.is_at_hand(model_id):
            return work()
        return await _in_thread(characters, work)

    @api.get("/v1/models", response_model=ModelList)
    @api.head("/v1/models", include_in_schema=False)
    def list_models(http: Request) -> Response:
        client = client_of(http)
        tenant = tenant_of(client)
        owners = {} if tenant.sees_all else models.all_owners()

        def is_visible(model: ServedModel) -> bool:
            of_model = owners.get(model.published.id, ()) if model.published else ()
            return client.may_use(model.id) and tenant.sees_one_of(of_model)

        entries = b",".join(model.entry_json for model in models.all() if is_visible(model))
        return Response(b'{"object":"list","data":[' + entries + b'],"has_more":false}', media_type="application/json")

    @api.get("/v1/models/{model_id:path}")
    @api.head("/v1/models/{model_id:path}", include_in_schema=False)
    def retrieve_model(http: Request, model_id: str) -> ModelEntry:
        return resolve(http, model_id).entry()

    @api.delete("/v1/models/{model_id:path}")
    async def delete_model(http: Request, model_id: str) -> DeletedModel:
        client = client_of(http)
        if not model_id.startswith(FINE_TUNED):
            client.check_is_admin()
        model = await asyncio.to_thread(resolve, http, model_id)  # a fine-tuned model that it sees is its own
        adapter = deletable(model, pinned)
        # The entry comes first: there is never a change without one. Nothing is deleted if it cannot be written.
        await note(client, "models.delete", model_id, {"digest": adapter.digest})
        try:
            await asyncio.to_thread(delete_published, models, model)
        except Exception as error:
            await note(client, "models.delete.failed", model_id, {"error": type(error).__name__})
            raise
        finally:  # it may be hidden already, and a replica that still needs it loads it again
            if model.adapter is not None:
                await backends[model.base.name].unload(adapter.digest)
        return DeletedModel(id=model_id)

    async def note(client: Client, action: str, target: str, details: Mapping[str, object]) -> None:
        if database is not None:
            await asyncio.to_thread(_note, database, client.name, action, target, details)

    @api.get("/v1/stats")
    async def stats(http: Request) -> dict[str, list[EngineStats]]:
        """What every replica of each base does at this moment; `ft top` shows it. It covers every model."""
        client_of(http).check_may_use_all()
        return {name: await backend.all_stats() for name, backend in backends.items()}

    @api.post("/v1/chat/completions", openapi_extra=reads(ChatRequest), response_model=Reply)
    async def chat_completions(http: Request) -> Response:
        request = await read_json(http, ChatRequest, limits.max_body_mib)
        client_of(http).check_may_use(request.model)
        characters = _characters(request.messages, request.tools, at_most=LONG_CHARACTERS)
        id_ = request_id(http)

        def translated() -> Generation:
            return translate.chat(request, resolve(http, request.model), id_)

        generation = await encode(http, request.model, characters, translated)
        return await respond(http, generation, request, ChatShape(generation))

    @api.post("/v1/completions", openapi_extra=reads(CompletionRequest), response_model=Reply)
    async def completions(http: Request) -> Response:
        request = await read_json(http, CompletionRequest, limits.max_body_mib)
        client_of(http).check_may_use(request.model)
        characters = sum(len(prompt) for prompt in request.prompts)
        id_ = request_id(http)

        def translated() -> Generation:
            return translate.completion(request, resolve(http, request.model), id_)

        generation = await encode(http, request.model, characters, translated)
        return await respond(http, generation, request, CompletionShape(generation))

    async def respond(http: Request, generation: Generation, request: GenerationParameters, shape: Shape) -> Response:
        pieces = pieces_of(backends[generation.model.base.name], generation.requests, limits, in_flight)
        pieces = measured(pieces, generation, http, metrics, log_prompts=settings.log_prompts)
        if not request.stream:
            reply = await whole_reply(generation, pieces, shape)
            return Response(reply, media_type="application/json")
        first = await anext(pieces)  # an error up to here still sets the HTTP status
        events = event_stream(generation, first, pieces, shape, request.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    # lm-eval and others ask for these without /v1.

    @api.post("/v1/tokenize", openapi_extra=reads(TokenizeRequest), response_model=TokenizeReply)
    @api.post("/tokenize", include_in_schema=False)
    async def tokenize(http: Request) -> Response:
        request = await read_json(http, TokenizeRequest, limits.max_body_mib)
        model = await asyncio.to_thread(resolve, http, request.model)
        tokens = translate.tokens(model)
        most = max(MAX_TOKENIZED_CHARACTERS, _TOKENIZED_CONTEXTS * model.base.context_length)

        def length(at_most: int) -> int:
            return len(request.prompt or "") + _characters(request.messages, request.tools, at_most)

        def reply() -> str:  # writing a million ids takes as long as making them, so not on the event loop either
            if length(most) > most:
                message = f"The text has more than {most:,} characters, which is the limit. Send it in parts."
                raise ApiError(413, message, "request_too_large", "prompt" if request.prompt else "messages")
            ids = _token_ids(request, model, tokens)
            strings = tokens.strings(ids) if request.return_token_strs else None
            size = model.base.context_length
            return TokenizeReply(count=len(ids), max_model_len=size, tokens=ids, token_strs=strings).model_dump_json()

        return Response(await _in_thread(length(LONG_CHARACTERS), reply), media_type="application/json")

    @api.post("/v1/detokenize", openapi_extra=reads(DetokenizeRequest))
    @api.post("/detokenize", include_in_schema=False)
    async def detokenize(http: Request) -> DetokenizeReply:
        request = await read_json(http, DetokenizeRequest, limits.max_body_mib)
        model = await asyncio.to_thread(resolve, http, request.model)
        size = model.base.vocab_size
        if (largest := max(request.tokens, default=0)) >= size:
            message = f"tokens contains the id {largest}; this model has ids 0 to {size - 1}."
            raise ApiError(400, message, "invalid_value", "tokens")
        tokens = translate.tokens(model)
        return DetokenizeReply(prompt=await _in_thread(len(request.tokens), lambda: tokens.text(request.tokens)))

    @api.get("/v1/tokenizer_info")
    @api.get("/tokenizer_info", include_in_schema=False)
    def tokenizer_info(http: Request, model: str | None = None) -> TokenizerInfo:
        served = resolve(http, model)
        tokenizer = translate.tokens(served).tokenizer
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            vocab_size=served.base.vocab_size,
            model_max_length=served.base.context_length,
            chat_template=tokenizer.chat_template,
        )

    return api


def request_id(http: Request) -> str:
    """The id that the client sent, or a new one; the reply and the logs have it."""
    return str(http.state.request_id)


def _note(database: Engine, key: str, action: str, target: str, details: Mapping[str, object]) -> None:
    with session(database) as opened:
        audit(opened, key, action, target, details)
        opened.commit()


async def _in_thread(characters: int, work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(executor_for(characters), work)


def _characters(messages: Sequence[object] | None, tools: Sequence[Tool] | None, at_most: int) -> int:
    """About how long a conversation is, its calls and tools included.

    Stops counting above `at_most`; each value counts, so no more of them are looked at.
    """
    counted = 0
    unread: list[tuple[object, int]] = [(messages or [], 0)]
    unread += [(tool.given, 1) for tool in islice(tools or (), at_most + 1)]
    while unread and counted <= at_most:
        value, depth = unread.pop()
        counted += len(value) if isinstance(value, str) else 1 + _INDENT * depth
        if isinstance(value, dict):
            counted += sum(map(len, islice(value, at_most + 1)))
            unread += [(item, depth + 1) for item in islice(value.values(), at_most + 1)]
        elif isinstance(value, list):
            unread += [(item, depth + 1) for item in islice(value, at_most + 1)]
    return counted


def _allowed_model(models: ServedModels, model_id: str | None, client: Client) -> ServedModel:
    """The model of that name, or the only base. Raises `ApiError`: 403 if the client may not use it, 404 if unknown."""
    if model_id is None:
        if len(models.bases) > 1:
            names = ", ".join(base.name for base in models.bases if client.may_use(base.name))
            message = f"model is missing, and this server has several bases: {names}."
            raise ApiError(400, message, "invalid_value", "model")
        model_id = models.bases[0].name
    client.check_may_use(model_id)
    model = models.resolve(model_id)
    tenant = tenant_of(client)
    if not tenant.sees_all and not tenant.sees_one_of(models.owners(model)):
        raise unknown_model(model_id)
    return model


def _token_ids(request: TokenizeRequest, model: ServedModel, tokens: BaseTokens) -> list[int]:
    if request.prompt is not None:
        text = request.prompt
        return tokens.ids_without_begin(text) if request.add_special_tokens is False else tokens.prompt_ids(text)
    messages = read_messages(request.messages or [], request.tools or [])
    chat_format(model, tokens, with_tools=any(message.uses_tools for message in messages))
    return tokens.chat_ids(messages, request.add_generation_prompt is not False)
