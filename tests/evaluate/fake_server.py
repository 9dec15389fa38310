"""An OpenAI-shaped server in this process, with two models and faults on demand."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from ft_service.evaluate.ask import Endpoint

BASE = "tiny-llama"
ADAPTER = "tiny-llama-desk-1a2b3c4d"
URL = "http://fake/v1"
Answer = Callable[[dict[str, Any]], str]
Fault = Callable[[int], httpx.Response | Exception | None]
"""From the number of a request (from 1) to what happens instead of an answer."""


def question_in(body: dict[str, Any]) -> str:
    """The text of the last turn, or of the prompt."""
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


@dataclass
class FakeServer:
    """Answers by a function of the request, for each model."""

    answers: dict[str, Answer]
    fault: Fault = lambda number: None
    digests: dict[str, str] = field(default_factory=lambda: {BASE: "none", ADAPTER: "a" * 64})
    finish_reason: str = "stop"
    token_logprob: dict[str, float] = field(default_factory=dict)
    """Of every token of a measured prompt; a token is a word."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """What was asked, in order."""
    running: int = 0
    crowds: list[int] = field(default_factory=list)
    """How many requests were running when each one began, itself included."""

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(URL, transport=httpx.MockTransport(self._handle))

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/v1")
        if path.startswith("/models/"):
            return self._model(path.removeprefix("/models/"))
        if path == "/models":
            return httpx.Response(200, json={"data": [{"id": name} for name in self.answers]})
        if path.endswith("completions"):
            return await self._completion(json.loads(request.content))
        return httpx.Response(404, json={"error": {"message": "no such route"}})

    def _model(self, name: str) -> httpx.Response:
        if name not in self.answers:
            return httpx.Response(404, json={"error": {"message": f"The model {name!r} does not exist."}})
        is_base = self.digests[name] == "none"
        digest = None if is_base else self.digests[name]
        parent = None if is_base else BASE
        return httpx.Response(
            200, json={"id": name, "parent": parent, "digest": digest, "base_fingerprint": "b" * 64, "note": None}
        )

    async def _completion(self, body: dict[str, Any]) -> httpx.Response:
        self.bodies.append(body)
        number = len(self.bodies)
        self.running += 1
        self.crowds.append(self.running)
        await asyncio.sleep(0)
        self.running -= 1
        fault = self.fault(number)
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            return fault
        name = body["model"]
        if name not in self.answers:
            return httpx.Response(404, json={"error": {"message": f"The model {name!r} does not exist."}})
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason}
        if body["max_tokens"] == 0:
            count = len(body["prompt"].split()) if isinstance(body["prompt"], str) else len(body["prompt"])
            logprobs = [None, *[self.token_logprob.get(name, -1.0)] * (count - 1)]
            choice |= {"text": question_in(body), "logprobs": {"token_logprobs": logprobs}}
        elif "messages" in body:
            choice |= {"message": {"role": "assistant", "content": self.answers[name](body)}}
        else:
            choice |= {"text": self.answers[name](body)}
        headers = {"x-adapter-digest": self.digests[name], "x-base-fingerprint": "b" * 64}
        reply = {"model": name, "choices": [choice], "usage": {"completion_tokens": 3}}
        return httpx.Response(200, json=reply, headers=headers)


def busy(retry_after: str | None = None) -> httpx.Response:
    headers = {"retry-after": retry_after} if retry_after is not None else {}
    return httpx.Response(429, json={"error": {"message": "The queue is full."}}, headers=headers)


def refused(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})
