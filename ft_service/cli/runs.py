"""`ft runs`, `ft show` and `ft logs`: the runs on a storage root, one of them, what happens to it; send, delete."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated

import typer

from ft_service.cli.common import (
    DEFAULT_STORAGE,
    AsJson,
    StorageRoot,
    Yes,
    confirm_deletion,
    console,
    print_item,
    print_json,
    print_text,
    reject_options_before_subcommand,
)
from ft_service.storage.storage import Storage
from ft_service.text import counted

if TYPE_CHECKING:
    from ft_service.runs.folder import RunStatus
    from ft_service.runs.history import Attempt

_FOLLOW_SECONDS = 1.0

Limit = Annotated[int, typer.Option("--limit", min=1, help="List at most so many runs.")]
AllRuns = Annotated[bool, typer.Option("--all", help="List all runs, by id. Reads every run.")]

runs_app = typer.Typer(help="The runs on a storage root.", invoke_without_command=True)


@runs_app.callback()
def runs(
    context: typer.Context,
    storage: StorageRoot = DEFAULT_STORAGE,
    limit: Limit = 50,
    all_runs: AllRuns = False,
    as_json: AsJson = False,
) -> None:
    """List the runs on a storage root, those that began last first."""
    if context.invoked_subcommand is not None:
        reject_options_before_subcommand(context)
        return
    list_runs(storage, limit, all_runs, as_json)


@runs_app.command("list")
def list_runs(
    storage: StorageRoot = DEFAULT_STORAGE, limit: Limit = 50, all_runs: AllRuns = False, as_json: AsJson = False
) -> None:
    """List the runs on a storage root, those that began last first."""
    from ft_service.cluster.queue.view import read_queue
    from ft_service.runs.events import read_events
    from ft_service.runs.history import attempts, wasted_steps
    from ft_service.runs.recent import READERS, newest_runs

    root = Storage(storage)
    statuses = newest_runs(root, None if all_runs else limit)
    is_any_queued = any(status.state == "queued" for status in statuses)
    places = {item.entry.run_id: item.entry.place for item in read_queue(root)} if is_any_queued else {}
    with ThreadPoolExecutor(READERS) as pool:
        histories = pool.map(lambda status: attempts(read_events(root, status.run_id)), statuses)
        attempts_of = dict(zip([status.run_id for status in statuses], histories, strict=True))
    if as_json:
        print_json(
            [
                {
                    **status.model_dump(mode="json"),
                    "place": places.get(status.run_id),
                    "attempts": len(attempts_of[status.run_id]),
                    "wasted_steps": wasted_steps(attempts_of[status.run_id]),
                }
                for status in statuses
            ]
        )
        return
    for status in statuses:
        tries = attempts_of[status.run_id]
        for line in run_lines(status, len(tries), wasted_steps(tries), console.width):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(statuses) == limit and not all_runs:
        console.print(f"The {limit} runs that began last. Older ones: --limit N, or --all", highlight=False)


def run_lines(status: "RunStatus", num_attempts: int, num_wasted: int, width: int) -> list[str]:
    """One run in lines of at most `width` characters, unless its id or that of its adapter is longer.

    The message is cut; `ft show` has the whole.
    """
    wasted = f", {counted(num_wasted, 'wasted step')}" if num_wasted else ""
    facts = f"{status.time:%Y-%m-%d %H:%M}  {counted(num_attempts, 'attempt')}{wasted}"
    first = f"{status.run_id}  {status.state}"
    lines = [f"{first}  {facts}"] if len(first) + 2 + len(facts) <= width else [first, f"  {facts}"]
    if status.published:
        lines.append(f"  published {status.published}")
    if message := " ".join(status.message.split()):
        lines.append(f"  {message}" if len(message) + 2 <= width else f"  {message[: width - 3]}…")
    return lines


def logs(
    run_id: str,
    storage: StorageRoot = DEFAULT_STORAGE,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Keep printing new lines until the run has ended.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the events and steps of a run, oldest first. Needs no cluster: they are read from storage.

    With --json: one object a line, each with the id of the run, for a collector of logs.
    """
    from ft_service.runs import log_lines
    from ft_service.runs.folder import find_run

    run = find_run(Storage(storage), run_id)
    form = log_lines.json_lines if as_json else log_lines.log_lines
    lines = log_lines.follow(run, lambda: time.sleep(_FOLLOW_SECONDS), form) if follow else form(run)
    for line in lines:
        print(line, flush=True)


@runs_app.command()
def delete(run_id: str, storage: StorageRoot = DEFAULT_STORAGE, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a run: its spec, metrics, report, checkpoints and weights. What it has published stays.

    Asks first, unless --yes is given.
    """
    from ft_service.cleanup.removal import delete_run
    from ft_service.cli.cleanup import deletion_json, log_line, show_deletions
    from ft_service.runs.folder import find_run

    status = find_run(Storage(storage), run_id).status()
    confirm_deletion(f"run {run_id} ({status.state if status else 'not started'})", yes)
    deletion = delete_run(Storage(storage), run_id, log=log_line)
    if as_json:
        print_json(deletion_json(deletion))
        return
    show_deletions([deletion])
    console.print("If no other run or record uses its dataset, this deletes that: ft prune --yes", highlight=False)


@runs_app.command("send")
def send_run(
    run_id: str,
    to: Annotated[str, typer.Option("--to", help="tensorboard, wandb or mlflow")],
    storage: StorageRoot = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Copy a run's metrics to a tracker: the steps that it lacks. WANDB_API_KEY and MLFLOW_TRACKING_URI say where."""
    from ft_service.runs.folder import find_run
    from ft_service.runs.trackers import send

    sent = send(find_run(Storage(storage), run_id), to)
    if as_json:
        print_json({"run": run_id, "tracker": to, "steps": sent.num_steps, "place": sent.place, "look": sent.look})
        return
    details = [sent.place, *([f"Look at it: {sent.look}"] if sent.look else [])]
    print_item(f"Sent {counted(sent.num_steps, 'step')} of {run_id} to {to}:", *details)


def show(run_id: str, storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """Show one run: its state, plan, attempts, and latest metrics."""
    from ft_service.runs.events import read_events
    from ft_service.runs.folder import find_run
    from ft_service.runs.history import attempts, wasted_steps
    from ft_service.runs.metrics import read_metrics

    run = find_run(Storage(storage), run_id)
    status = run.status()
    metrics = read_metrics(run.storage, run_id)
    last = metrics[-1] if metrics else None
    run_attempts = attempts(read_events(run.storage, run_id))
    if as_json:
        print_json(
            {
                "status": status.model_dump(mode="json") if status else None,
                "attempts": [attempt.model_dump(mode="json") for attempt in run_attempts],
                "wasted_steps": wasted_steps(run_attempts),
                "last_step": last.model_dump(mode="json") if last else None,
                "folder": run.storage.uri(run.path),
            }
        )
        return
    if status:
        console.print(f"[bold]{run_id}[/bold]  {status.state}", highlight=False, soft_wrap=True)
        if status.message:
            print_text(status.message)
    if run.storage.exists(f"{run.path}/plan.json"):
        for sentence in run.plan().summary:
            print_text(sentence)
    if last:
        print_text(f"Step {last.step}: loss {last.loss:.4f}, {last.tokens_per_second:,.0f} tokens/s")
    if run_attempts:
        _show_attempts(run_attempts)
    console.print(f"  {run.storage.uri(run.path)}", highlight=False, soft_wrap=True)


def _show_attempts(run_attempts: "Sequence[Attempt]") -> None:
    for number, attempt in enumerate(run_attempts, start=1):
        started = "" if attempt.time is None else f", started {attempt.time:%Y-%m-%d %H:%M:%S}"
        hosts = f" on {', '.join(attempt.hosts)}" if attempt.hosts else ""
        workers = f"{counted(attempt.workers, 'worker')}{hosts}"
        repeated = f", {counted(attempt.repeated, 'step')} repeated" if attempt.repeated else ""
        print_text(f"Attempt {number}{started}: from step {attempt.step} with {workers}{repeated}. {attempt.ended}")
