"""`ft queue`: the runs that wait for workers and those that have them, and what owners may use."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ft_service.cli.common import (
    DEFAULT_STORAGE,
    AsJson,
    StorageRoot,
    console,
    new_table,
    print_json,
    reject_options_before_subcommand,
)
from ft_service.errors import UsageError
from ft_service.storage.storage import Storage

if TYPE_CHECKING:
    from ft_service.cluster.queue.entry import Entry
    from ft_service.cluster.queue.view import Listed

queue_app = typer.Typer(help="The queue for workers.", invoke_without_command=True)


@queue_app.callback()
def queue(context: typer.Context, storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """List the runs that have workers, and those that wait for them in the order of the queue."""
    if context.invoked_subcommand is not None:
        reject_options_before_subcommand(context)
        return
    from ft_service.cluster.queue.view import read_queue

    listed = read_queue(Storage(storage))
    if as_json:
        print_json([_as_json(item) for item in listed])
        return
    if not listed:
        console.print("The queue is empty.")
        return
    table = new_table("run", "place", "owner", "priority", "workers", "state", "estimated start", "waits for")
    for item in listed:
        table.add_row(*_row(item.entry))
    console.print(table)


@queue_app.command()
def limit(
    owner: Annotated[str, typer.Argument(help="Whose quota; 'default' is that of every owner that has none.")],
    runs: Annotated[int | None, typer.Option(min=0, help="Runs that have workers at once.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(min=0, help="GPU-hours within the window.")] = None,
    window_hours: Annotated[float | None, typer.Option(min=1, help="Set the window of all owners.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the quota.")] = False,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Set the quota of an owner: what is not given is without limit."""
    from ft_service.cluster.queue.usage import OwnerLimits, read_limits, write_limits

    if remove and (runs is not None or gpu_hours is not None):
        raise UsageError("--remove: conflicts with --runs and --gpu-hours. Give one or the other.")
    if not remove and runs is None and gpu_hours is None and window_hours is None:
        raise UsageError(f"OWNER = {owner!r}: no quota given. Add --runs, --gpu-hours or --remove.")
    root = Storage(storage)
    limits = read_limits(root)
    own = OwnerLimits(max_runs=runs, max_gpu_hours=gpu_hours)
    owners = {name: value for name, value in limits.owners.items() if name != owner}
    update: dict[str, object] = {} if window_hours is None else {"window_hours": window_hours}
    if remove or runs is not None or gpu_hours is not None:
        if owner == "default":
            update["default"] = own
        else:
            update["owners"] = owners if remove else {**owners, owner: own}
    write_limits(root, limits.model_copy(update=update))


@queue_app.command()
def usage(storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """List what each owner has used within the window, and its quota."""
    from ft_service.cluster.queue.usage import read_limits, used_hours
    from ft_service.cluster.queue.view import read_queue

    root = Storage(storage)
    limits = read_limits(root)
    now = datetime.now(UTC)
    hours = used_hours(root, now, limits.window_hours)
    for item in read_queue(root):
        hours[item.entry.owner] = hours.get(item.entry.owner, 0.0) + item.entry.worker_hours(now)
    owners = sorted({*hours, *limits.owners})
    quotas = {owner: limits.owners.get(owner, limits.default) for owner in owners}
    if as_json:
        print_json(
            {
                "window_hours": limits.window_hours,
                "owners": {
                    owner: {"gpu_hours": hours.get(owner, 0.0), **quotas[owner].model_dump()} for owner in owners
                },
            }
        )
        return
    table = new_table("owner", "GPU-hours", "of", "runs at once")
    for owner in owners:
        quota = quotas[owner]
        table.add_row(owner, f"{hours.get(owner, 0.0):.2f}", _limit(quota.max_gpu_hours), _limit(quota.max_runs))
    console.print(table)


def _limit(value: float | None) -> str:
    return "no limit" if value is None else f"{value:g}"


def _row(entry: "Entry") -> list[str]:
    start = "" if entry.holds_workers else "unknown" if entry.estimated_start is None else _time(entry.estimated_start)
    return [
        entry.run_id,
        "" if entry.place is None else str(entry.place),
        entry.owner,
        entry.priority,
        str(entry.workers if entry.holds_workers else entry.worker_counts[0]),
        entry.state,
        start,
        entry.waits_for,
    ]


def _time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _as_json(item: "Listed") -> dict[str, object]:
    entry = item.entry
    return {
        "run": entry.run_id,
        "cluster": item.cluster,
        "place": entry.place,
        "owner": entry.owner,
        "priority": entry.priority,
        "preemptible": entry.preemptible,
        "workers": entry.workers if entry.holds_workers else entry.worker_counts[0],
        "state": entry.state,
        "waits_for": entry.waits_for or None,
        "since": entry.since,
        "estimated_start": entry.estimated_start,
        "expected_end": entry.ends(datetime.now(UTC)) if entry.holds_workers else None,
    }
