"""Asks a model for a completion inside this process, by the same code that answers requests over HTTP."""

import asyncio
import json
from collections.abc import Mapping

from ft_service.errors import ServingError
from serve.http.in_flight import InFlight
from serve.inference.models import ServedModels
from serve.inference.replies import Backend, ChatShape, pieces_of, whole_reply
from serve.inference.translate import Translator
from serve.inference.wire import ChatRequest
from serve.settings import Limits

_MAX_TOKENS = 4


class Answers:
    """Whether a model answers. Use it from threads beside the event loop that it is made on."""

    def __init__(self, models: ServedModels, backends: Mapping[str, Backend], limits: Limits) -> None:
        self._models = models
        self._backends = backends
        self._limits = limits
        self._translate = Translator(models, limits)
        self._in_flight = InFlight()
        self._loop = asyncio.get_running_loop()

    def check(self, name: str) -> None:
        """Raises `FtError` unless the model of that name generates a token."""
        asked = asyncio.run_coroutine_threadsafe(self._ask(name), self._loop)
        tokens = asked.result(self._limits.queue_seconds + self._limits.request_seconds)
        if tokens < 1:
            raise ServingError(f"The model {name} answered without a token.")

    async def _ask(self, name: str) -> int:
        request = ChatRequest.model_validate(
            {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": _MAX_TOKENS}
        )
        model = await asyncio.to_thread(self._models.resolve, name)
        generation = await asyncio.to_thread(self._translate.chat, request, model, f"check-{name}")
        pieces = pieces_of(self._backends[model.base.name], generation.requests, self._limits, self._in_flight)
        shape = ChatShape(generation)
        reply = json.loads(await whole_reply(generation, pieces, shape))
        return int(reply["usage"]["completion_tokens"])
