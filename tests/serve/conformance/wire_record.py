"""Records what goes over the wire: each call with its client, and the facts of `client_types` that it showed.

Stands around the application of a server, so that it sees every client alike, and what they really send and get.
"""

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.serve.conformance.client_types import facts_in

ROUTES = {
    "POST /files": "FileCreateParams",
    "GET /files": "FileListParams",
    "GET /files/{}": None,
    "DELETE /files/{}": None,
    "GET /files/{}/content": None,
    "POST /uploads": "UploadCreateParams",
    "POST /uploads/{}/parts": "PartCreateParams",
    "POST /uploads/{}/complete": "UploadCompleteParams",
    "POST /uploads/{}/cancel": None,
    "POST /fine_tuning/jobs": "JobCreateParams",
    "GET /fine_tuning/jobs": "JobListParams",
    "GET /fine_tuning/jobs/{}": None,
    "POST /fine_tuning/jobs/{}/cancel": None,
    "POST /fine_tuning/jobs/{}/pause": None,
    "POST /fine_tuning/jobs/{}/resume": None,
    "GET /fine_tuning/jobs/{}/events": "JobListEventsParams",
    "GET /fine_tuning/jobs/{}/checkpoints": "CheckpointListParams",
    "GET /models": None,
    "GET /models/{}": None,
    "DELETE /models/{}": None,
    "POST /chat/completions": None,
}
"""The calls, and the client's type of what each sends."""
_REPLIES = {
    ("file", False): "FileObject",
    ("file", True): "FileDeleted",
    ("upload", False): "Upload",
    ("upload.part", False): "UploadPart",
    ("fine_tuning.job", False): "FineTuningJob",
    ("fine_tuning.job.event", False): "FineTuningJobEvent",
    ("fine_tuning.job.checkpoint", False): "FineTuningJobCheckpoint",
    ("model", False): "Model",
    ("model", True): "ModelDeleted",
}
"""`object` of a reply, and whether it has `deleted`."""
SHOWN_SECONDS = 30.0
_PART = re.compile(rb'name="([^"]+)"(; filename="[^"]*")?[^\r]*\r\n(?:[^\r]+\r\n)*\r\n(.*?)\r\n--', re.DOTALL)
_NESTED = re.compile(r"\[([^\]]+)\]")


@dataclass
class WireRecord:
    """ASGI middleware. `facts` and `calls` grow with each request that is answered with success."""

    app: ASGIApp
    facts: set[str] = field(default_factory=set)
    calls: set[tuple[str, str]] = field(default_factory=set)
    """Client (`python 3.x`) and call (`POST /files`)."""
    refusals: list[tuple[str, int, Any]] = field(default_factory=list)
    """Call, status and body of each error."""
    shown: set[str] = field(default_factory=set)
    """Ids of all that replies showed, and of the files in them."""
    _has_shown: threading.Condition = field(default_factory=threading.Condition)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = bytearray()
        got = bytearray()
        status = 0

        async def receive_and_keep() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def keep_and_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                got.extend(message.get("body", b""))
            await send(message)

        await self.app(scope, receive_and_keep, keep_and_send)
        self._record(scope, bytes(sent), status, bytes(got))

    def wait_until_shown(self, name: str) -> None:
        """Return once a reply has shown this id, or after a time in which every reply has long been sent."""
        with self._has_shown:
            self._has_shown.wait_for(lambda: name in self.shown, timeout=SHOWN_SECONDS)

    def record_webhook(self, payload: dict[str, Any]) -> None:
        kind = str(payload["type"]).rpartition(".")[2].title()
        self.facts |= set(facts_in(payload, f"FineTuningJob{kind}WebhookEvent"))

    def _record(self, scope: Scope, sent: bytes, status: int, got: bytes) -> None:
        headers = Headers(scope=scope)
        call = call_of(scope["method"], scope["path"])
        if status >= 400:
            self.refusals.append((call, status, _json(got)))
            return
        self.calls.add((client_in(headers), call))
        if name := ROUTES.get(call):
            values = sent_values(headers.get("content-type", ""), sent, scope["query_string"].decode())
            self.facts |= set(facts_in(values, name))
        items = list(_items(_json(got)))
        with self._has_shown:
            replied = [one for item in items for one in (item, item.get("file"))]
            self.shown |= {str(one["id"]) for one in replied if isinstance(one, dict) and "id" in one}
            self._has_shown.notify_all()
        for item in items:
            if kind := _REPLIES.get((item.get("object", ""), "deleted" in item)):
                self.facts |= set(facts_in(item, kind))


def call_of(method: str, path: str) -> str:
    """``GET /v1/files/file-1/content`` -> ``GET /files/{}/content``"""
    for call in ROUTES:
        pattern = re.escape(call.partition(" ")[2]).replace(r"\{\}", "(.+)" if "models" in call else "([^/]+)")
        if call.startswith(f"{method} ") and re.fullmatch(f"/v1{pattern}", path):
            return call
    return f"{method} {path}"


def client_in(headers: Headers) -> str:
    """As the client names itself: ``python 3.54.0``."""
    return f"{headers.get('x-stainless-lang', '')} {headers.get('x-stainless-package-version', '')}".strip()


def sent_values(content_type: str, body: bytes, query: str) -> dict[str, Any]:
    """The parameters of a request, wherever they are: query, JSON or form."""
    values: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        _put(values, name, value)
    if content_type.startswith("multipart/form-data"):
        for name, file, content in _PART.findall(body):
            _put(values, name.decode(), "<file>" if file else content.decode())
    elif body and isinstance(found := _json(body), dict):
        values |= found
    return values


def _put(values: dict[str, Any], name: str, value: str) -> None:
    """``metadata[team]`` is `team` within `metadata`."""
    head, _, rest = name.partition("[")
    if not rest:
        values[head] = value
        return
    inner = values.setdefault(head, {})
    for key in _NESTED.findall(f"[{rest}"):
        inner[key] = value


def _items(reply: Any) -> Iterator[dict[str, Any]]:
    if isinstance(reply, dict):
        yield reply
        if reply.get("object") == "list":
            yield from (item for item in reply["data"] if isinstance(item, dict))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
