"""The fine-tuning routes of a server, in this process: keeps files and jobs, and fails on demand."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from ft_service.migrate.create import FineTuningServer


@dataclass
class StandIn:
    """Answers by the shapes of OpenAI's API."""

    fault: Callable[[httpx.Request, int], httpx.Response | Exception | None] = lambda request, number: None
    """From a request and its number (from 1) to what happens instead of an answer."""
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def connect(self, key: str | None = "secret") -> FineTuningServer:
        transport = httpx.MockTransport(self._handle)
        return FineTuningServer("http://server/v1/", key, transport, sleep=self.waits.append)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        fault = self.fault(request, len(self.requests))
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            return fault
        if request.url.path == "/v1/files":
            name = f"file-{len(self.files) + 1}"
            self.files[name] = request.content
            return httpx.Response(200, json={"id": name, "object": "file"})
        if request.method == "GET":
            (wanted,) = (value for key, value in request.url.params.items() if key.startswith("metadata["))
            found = [job for job in self.jobs if job["metadata"]["migrated_from"] == wanted]
            return httpx.Response(200, json={"object": "list", "data": found, "has_more": False})
        job = {**json.loads(request.content), "id": f"ftjob-new{len(self.jobs) + 1}", "status": "queued"}
        self.jobs.append(job)
        return httpx.Response(200, json=job)


def error(status: int, message: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}}, headers=headers)
