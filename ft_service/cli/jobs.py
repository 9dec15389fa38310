"""`ft jobs`: fine-tuning jobs of a server, over HTTP: create, list, show, follow, cancel, pause and resume them."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from ft_service.cli.common import AsJson, console, new_table, print_item, print_json
from ft_service.cli.serve import DEFAULT_URL
from ft_service.cli.server_requests import (
    TIMEOUT_SECONDS,
    Server,
    address_of,
    ask,
    checked,
    headers,
    moment,
    no_address,
    pages,
    silent,
)
from ft_service.errors import UsageError
from ft_service.text import counted, format_duration

jobs_app = typer.Typer(help="Fine-tuning jobs of a server; its key is FT_API_KEY.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job: ftjob-...")]
CREATE_SECONDS = 300.0
"""Checking files that are not small takes time."""
_FACTS = ("model", "fine_tuned_model", "training_file", "validation_file", "seed", "trained_tokens")


@jobs_app.command("create")
def create(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of a base that can be fine-tuned.")],
    training_file: Annotated[str, typer.Argument(metavar="FILE", help="Id of the training file: ft files upload.")],
    validation_file: Annotated[str | None, typer.Option(metavar="ID", help="Id of the validation file.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of row order, adapter and dropout.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default: auto.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step; default: auto.")] = None,
    learning_rate_multiplier: Annotated[float | None, typer.Option(help="Times the template's rate.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Can be repeated.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate tokens, steps, memory, hours, cost and the queue.")
    ] = False,
    server: Server = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Create a job, or estimate it: what it would take, and when it would start."""
    hyperparameters = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": learning_rate_multiplier,
    }
    body = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
        "seed": seed,
        "metadata": _metadata(metadata or []),
        "hyperparameters": {name: value for name, value in hyperparameters.items() if value is not None} or None,
    }
    given = {name: value for name, value in body.items() if value is not None}
    path = "/fine_tuning/jobs/estimate" if dry_run else "/fine_tuning/jobs"
    made = ask(server, "POST", path, json=given, timeout=CREATE_SECONDS)
    if as_json:
        print_json(made)
    elif dry_run:
        print_item(f"{made['model']}: {counted(made['steps'], 'step')}", *_estimate_lines(made))
    else:
        details = [made["status_details"]] if made.get("status_details") else []
        print_item(f"{made['id']}  {made['status']}", *details)


def _metadata(pairs: list[str]) -> dict[str, str] | None:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"--metadata = {pair!r}: is no pair. Write KEY=VALUE.")
        found[key] = value
    return found or None


def _estimate_lines(estimate: dict[str, Any]) -> list[str]:
    """An estimate in sentences."""
    queue = estimate["queue"]
    sure = "" if estimate["exact"] else ", estimated from a part of the file"
    lines = [
        f"data: {counted(estimate['examples'], 'example')} in {counted(estimate['rows'], 'row')}{sure}",
        f"tokens: {estimate['tokens']:,} in all epochs, {estimate['loss_tokens']:,} of them trained on",
        "hyperparameters: " + ", ".join(f"{name} {value}" for name, value in estimate["hyperparameters"].items()),
    ]
    if estimate["memory_gib"] is not None:
        room = f" of {estimate['gpu_memory_gib']:.0f} GiB" if estimate["gpu_memory_gib"] else ""
        lines.append(f"memory of a worker: {estimate['memory_gib']:.1f} GiB{room}")
    if estimate["seconds"] is not None:
        cost = f", {estimate['cost_usd']:.2f} USD" if estimate["cost_usd"] is not None else ""
        lines.append(f"time: {format_duration(estimate['seconds'])}, {estimate['gpu_hours']:.2f} GPU-hours{cost}")
    if queue["place"] is None:
        lines.append(f"queue: {counted(queue['runs_waiting'], 'run')} waiting")
    elif queue["place"] == 0:
        lines.append("queue: it would start at once")
    else:
        lines.append(f"queue: place {queue['place']}; it would wait for {queue['waits_for'] or 'the runs before it'}")
    if queue["place"] and queue["estimated_start"]:
        lines.append(f"expected start: {moment(queue['estimated_start'])} UTC")
    if queue["estimated_finish"]:
        lines.append(f"expected end: {moment(queue['estimated_finish'])} UTC")
    return [*lines, *(f"warning: {warning}" for warning in estimate["warnings"])]


@jobs_app.command("list")
def list_all(
    last: Annotated[int, typer.Option(min=1, help="Number of jobs, the newest.")] = 20,
    status: Annotated[str | None, typer.Option(help="Only jobs in this status, such as running.")] = None,
    server: Server = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    jobs = []
    for job in pages(server, "/fine_tuning/jobs"):
        if status is None or job["status"] == status:
            jobs.append(job)
        if len(jobs) == last:
            break
    if as_json:
        print_json(jobs)
        return
    table = new_table("id", "status", "model", "created (UTC)", "expected end (UTC)", "waits for")
    for job in jobs:
        name = job["fine_tuned_model"] or job["model"]
        waiting = job.get("waiting") or {}
        place = f"place {waiting['place']}: " if waiting.get("place") else ""
        table.add_row(
            job["id"],
            job["status"],
            name,
            moment(job["created_at"]),
            moment(job["estimated_finish"]),
            place + waiting.get("waits_for", ""),
        )
    console.print(table)


@jobs_app.command("show")
def show(job: JobId, server: Server = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show one job: its status, and why it failed or waits."""
    found = ask(server, "GET", _path(job))
    if as_json:
        print_json(found)
        return
    ended = found["finished_at"]
    seconds = ended - found["created_at"] if ended else datetime.now(UTC).timestamp() - found["created_at"]
    facts = [f"{name}: {found[name]}" for name in _FACTS if found.get(name) is not None]
    for name in ("hyperparameters", "metadata"):
        if found.get(name):
            facts.append(f"{name}: {', '.join(f'{key} {value}' for key, value in found[name].items())}")
    facts.append(f"created: {moment(found['created_at'])} UTC")
    facts.append(
        f"ended: {moment(ended)} UTC" if ended else f"expected end: {moment(found['estimated_finish']) or '?'}"
    )
    facts.append(f"time: {format_duration(max(seconds, 0))}")
    if found.get("status_details"):
        facts.append(f"details: {found['status_details']}")
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
    for event in pages(server, f"{_path(job)}/events"):
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
    found = ask(server, "POST", f"{_path(job)}/{action}")
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
        f"{moment(event['created_at'])}{level} {event['message']}", highlight=False, markup=False, soft_wrap=True
    )


def _path(job: str) -> str:
    return f"/fine_tuning/jobs/{quote(job, safe='')}"


def _stream(server: str, job: str) -> Iterator[dict[str, Any]]:
    """Events as they come; a stream that was cut off goes on behind its last event."""
    import json

    import httpx

    last = None
    failures = 0
    while True:
        sent = {**headers(), "accept": "text/event-stream", **({"last-event-id": last} if last else {})}
        try:
            address = f"{address_of(server)}{_path(job)}/events"
            with httpx.stream("GET", address, headers=sent, timeout=TIMEOUT_SECONDS) as response:
                if not response.is_success:
                    checked(server, response.status_code, response.read())
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        event: dict[str, Any] = json.loads(line[6:])
                        failures = 0
                        last = event["id"]
                        yield event
        except httpx.InvalidURL:
            raise no_address(server) from None
        except httpx.HTTPError as error:
            failures += 1
            if failures == 5:
                raise silent(server, error) from None
