"""`ft jobs`: fine-tuning jobs of a server, over HTTP: list, show, follow, cancel, pause and resume them."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from ft_service.cli.common import AsJson, console, new_table, print_item, print_json
from ft_service.cli.serve import DEFAULT_URL
from ft_service.errors import ServingError, UsageError
from ft_service.text import format_duration

jobs_app = typer.Typer(help="Fine-tuning jobs of a server; its key is FT_API_KEY.", no_args_is_help=True)

Server = Annotated[str, typer.Option("--server", metavar="URL", envvar="FT_SERVER", help="The server's address.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job: ftjob-...")]
_PAGE = 100
_TIMEOUT_SECONDS = 30.0
_FACTS = ("model", "fine_tuned_model", "training_file", "validation_file", "seed", "trained_tokens")


@jobs_app.command("list")
def list_all(
    last: Annotated[int, typer.Option(min=1, help="Number of jobs, the newest.")] = 20,
    status: Annotated[str | None, typer.Option(help="Only jobs in this status, such as running.")] = None,
    server: Server = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    jobs = []
    for job in _pages(server, "/fine_tuning/jobs"):
        if status is None or job["status"] == status:
            jobs.append(job)
        if len(jobs) == last:
            break
    if as_json:
        print_json(jobs)
        return
    table = new_table("id", "status", "model", "created (UTC)", "expected end (UTC)")
    for job in jobs:
        name = job["fine_tuned_model"] or job["model"]
        table.add_row(job["id"], job["status"], name, _moment(job["created_at"]), _moment(job["estimated_finish"]))
    console.print(table)


@jobs_app.command("show")
def show(job: JobId, server: Server = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show one job: its status, and why it failed or waits."""
    found = _ask(server, "GET", _path(job))
    if as_json:
        print_json(found)
        return
    ended = found["finished_at"]
    seconds = ended - found["created_at"] if ended else datetime.now(UTC).timestamp() - found["created_at"]
    facts = [f"{name}: {found[name]}" for name in _FACTS if found.get(name) is not None]
    for name in ("hyperparameters", "metadata"):
        if found.get(name):
            facts.append(f"{name}: {', '.join(f'{key} {value}' for key, value in found[name].items())}")
    facts.append(f"created: {_moment(found['created_at'])} UTC")
    facts.append(
        f"ended: {_moment(ended)} UTC" if ended else f"expected end: {_moment(found['estimated_finish']) or '?'}"
    )
    facts.append(f"time: {format_duration(max(seconds, 0))}")
    facts += [f"result file: {file}" for file in found["result_files"]]
    error = found.get("error") or {}
    if error.get("message"):
        facts.append(f"error: {error['code']}: {error['message']}")
    print_item(f"{found['id']}  {found['status']}", *(line for fact in facts for line in fact.split("\n")))


@jobs_app.command("events")
def events(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for new events until the job has ended.")
    ] = False,
    last: Annotated[int, typer.Option(min=1, help="Number of events, the newest; --follow prints all.")] = 50,
    server: Server = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Print what has happened to a job, the oldest first."""
    if follow:
        for event in _stream(server, job):
            _print_event(event, as_json)
        return
    found = []
    for event in _pages(server, f"{_path(job)}/events"):
        found.append(event)
        if len(found) == last:
            break
    if as_json:
        print_json(found[::-1])
        return
    for event in reversed(found):
        _print_event(event, as_json=False)


@jobs_app.command("cancel")
def cancel(job: JobId, server: Server = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Cancel a job. A run that trains stops after its current step, with a checkpoint."""
    _act(server, job, "cancel", as_json)


@jobs_app.command("pause")
def pause(job: JobId, server: Server = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Save a checkpoint of a job and free its GPUs."""
    _act(server, job, "pause", as_json)


@jobs_app.command("resume")
def resume(job: JobId, server: Server = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let a paused job go on from its checkpoint."""
    _act(server, job, "resume", as_json)


def _act(server: str, job: str, action: str, as_json: bool) -> None:
    found = _ask(server, "POST", f"{_path(job)}/{action}")
    if as_json:
        print_json(found)
    else:
        print_item(f"{found['id']}  {found['status']}")


def _print_event(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(event)
        return
    level = "" if event["level"] == "info" else f" {event['level']}:"
    console.print(
        f"{_moment(event['created_at'])}{level} {event['message']}", highlight=False, markup=False, soft_wrap=True
    )


def _moment(seconds: int | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


# -- the server --------------------------------------------------------------------------------------------------------


def _path(job: str) -> str:
    return f"/fine_tuning/jobs/{quote(job, safe='')}"


def _pages(server: str, path: str) -> Iterator[dict[str, Any]]:
    """The items of a list, page after page."""
    after = None
    while True:
        page = _ask(server, "GET", path, {"limit": _PAGE, **({"after": after} if after else {})})
        yield from page["data"]
        if not page.get("has_more") or not page["data"]:
            return
        after = page["data"][-1]["id"]


def _ask(server: str, method: str, path: str, query: dict[str, Any] | None = None) -> dict[str, Any]:
    import httpx

    try:
        response = httpx.request(
            method, _address(server) + path, params=query, headers=_headers(), timeout=_TIMEOUT_SECONDS
        )
    except httpx.InvalidURL:
        raise _no_address(server) from None
    except httpx.HTTPError as error:
        raise _silent(server, error) from None
    return _checked(server, response.status_code, response.content)


def _stream(server: str, job: str) -> Iterator[dict[str, Any]]:
    """Events as they come; a stream that was cut off goes on behind its last event."""
    import json

    import httpx

    last = None
    failures = 0
    while True:
        headers = {**_headers(), "accept": "text/event-stream", **({"last-event-id": last} if last else {})}
        try:
            address = f"{_address(server)}{_path(job)}/events"
            with httpx.stream("GET", address, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
                if not response.is_success:
                    _checked(server, response.status_code, response.read())
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        event: dict[str, Any] = json.loads(line[6:])
                        failures = 0
                        last = event["id"]
                        yield event
        except httpx.InvalidURL:
            raise _no_address(server) from None
        except httpx.HTTPError as error:
            failures += 1
            if failures == 5:
                raise _silent(server, error) from None


def _checked(server: str, status: int, content: bytes) -> dict[str, Any]:
    import json

    try:
        reply = json.loads(content)
    except ValueError:
        reply = None
    if status < 400 and isinstance(reply, dict):
        return reply
    try:
        reason = reply["error"]["message"]
    except (KeyError, TypeError):
        reason = f"answers {status}, so it is no server of ft serve"
    raise ServingError(f"--server = {server!r}: {reason}")


def _headers() -> dict[str, str]:
    key = os.environ.get("FT_API_KEY", "").strip()
    return {"authorization": f"Bearer {key}"} if key else {}


def _address(server: str) -> str:
    return server.rstrip("/").removesuffix("/v1") + "/v1"


def _no_address(server: str) -> UsageError:
    return UsageError(f"--server = {server!r}: is no address. Use http://HOST:PORT.")


def _silent(server: str, error: Exception) -> ServingError:
    return ServingError(f"--server = {server!r}: does not answer ({type(error).__name__}). Is the server up?")
