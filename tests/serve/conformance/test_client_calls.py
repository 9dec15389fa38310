"""A new version of the client may have new calls: each is covered by the conformance run, or refused by name."""

import inspect
from collections.abc import Iterator

import openai

from tests.serve.conformance.wire_record import ROUTES

CALLS = {
    "files.create": "POST /files",
    "files.list": "GET /files",
    "files.retrieve": "GET /files/{}",
    "files.delete": "DELETE /files/{}",
    "files.content": "GET /files/{}/content",
    "files.retrieve_content": "GET /files/{}/content",
    "files.wait_for_processing": "GET /files/{}",
    "uploads.create": "POST /uploads",
    "uploads.complete": "POST /uploads/{}/complete",
    "uploads.cancel": "POST /uploads/{}/cancel",
    "uploads.upload_file_chunked": "POST /uploads/{}/parts",
    "uploads.parts.create": "POST /uploads/{}/parts",
    "fine_tuning.jobs.create": "POST /fine_tuning/jobs",
    "fine_tuning.jobs.list": "GET /fine_tuning/jobs",
    "fine_tuning.jobs.retrieve": "GET /fine_tuning/jobs/{}",
    "fine_tuning.jobs.cancel": "POST /fine_tuning/jobs/{}/cancel",
    "fine_tuning.jobs.pause": "POST /fine_tuning/jobs/{}/pause",
    "fine_tuning.jobs.resume": "POST /fine_tuning/jobs/{}/resume",
    "fine_tuning.jobs.list_events": "GET /fine_tuning/jobs/{}/events",
    "fine_tuning.jobs.checkpoints.list": "GET /fine_tuning/jobs/{}/checkpoints",
    "models.list": "GET /models",
    "models.retrieve": "GET /models/{}",
    "models.delete": "DELETE /models/{}",
}
REFUSED = {
    "fine_tuning.checkpoints.permissions": "sharing between projects of OpenAI; here, keys have organisations",
    "fine_tuning.alpha.graders": "graders of reinforcement fine-tuning, which this service does not have",
}


def calls_of(resource: object, path: str) -> Iterator[str]:
    """Every public method below a resource of the client."""
    for name in dir(resource):
        if name.startswith(("_", "with_")):
            continue
        found = getattr(resource, name)
        if isinstance(found, openai.resources.Files.__mro__[1]):
            yield from calls_of(found, f"{path}.{name}")
        elif inspect.ismethod(found):
            yield f"{path}.{name}"


def test_every_call_of_the_installed_client_is_covered_or_refused() -> None:
    client = openai.OpenAI(api_key="none")
    names = {
        call for path in ("files", "uploads", "fine_tuning", "models") for call in calls_of(getattr(client, path), path)
    }
    refused = {name for name in names if name.startswith(tuple(REFUSED))}
    assert names - refused == set(CALLS)
    assert all(any(name.startswith(entry) for name in refused) for entry in REFUSED)


def test_every_call_has_a_route_of_the_conformance_run() -> None:
    assert set(CALLS.values()) == set(ROUTES) - {"POST /chat/completions"}
