"""`ft prune` and `ft du`, and the views of what deleting does."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ft_service.cli.common import DEFAULT_STORAGE, AsJson, StorageRoot, console, new_table, print_item, print_json
from ft_service.storage.storage import Storage
from ft_service.text import counted, format_bytes

if TYPE_CHECKING:
    from ft_service.cleanup.inventory import Usage
    from ft_service.cleanup.needs import Decision
    from ft_service.cleanup.removal import Deletion


_KNOWN_FOLDERS = {
    "ray": "Ray Train's files of each attempt",
    "mlflow": "MLflow's runs",
    "tombstones": "records of what was deleted",
    "servers": "notices of running servers",
}
"""What `ft du` says of folders that are no item of their own."""


def prune(
    storage: StorageRoot = DEFAULT_STORAGE,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it, only show what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what nothing needs any more, and delete it with --yes.

    What goes: runs that never joined a cluster, datasets that no run or record uses, what is left of deletions and
    uploads. Runs and published adapters stay until `ft runs delete` and `ft adapters delete`.
    """
    from ft_service.cleanup.inventory import read_usage
    from ft_service.cleanup.needs import prune as decide
    from ft_service.cleanup.removal import delete_unneeded

    root = Storage(storage)
    usage = read_usage(root)
    decisions = decide(usage.inventory)
    deletions = delete_unneeded(root, decisions, log=log_line) if yes else []
    if as_json:
        print_json(_prune_json(usage, decisions, deletions, yes))
    else:
        _show_decisions(usage, decisions)
        if yes:
            show_deletions(deletions)
        elif any(decision.goes for decision in decisions):
            console.print("Nothing was deleted. Delete what goes with: ft prune --yes", highlight=False)
    if any(deletion.error for deletion in deletions):
        raise SystemExit(1)


def du(storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """Show the bytes of every run, adapter, model and dataset, largest first."""
    from ft_service.cleanup.inventory import num_bytes, read_usage

    usage = read_usage(Storage(storage))
    rows = [
        *((item.kind, item.id, usage.bytes_of(item)) for item in usage.inventory.items),
        *(("other", top, num_bytes(files)) for top, files in usage.other.items()),
    ]
    rows.sort(key=lambda row: (-row[2], row))
    if as_json:
        items = [{"kind": kind, "id": id, "bytes": size} for kind, id, size in rows]
        print_json({"storage": storage, "items": items, "total_bytes": usage.total_bytes})
        return
    table = new_table("id", "kind", "size")
    for kind, id, size in rows:
        known = _KNOWN_FOLDERS.get(id) if kind == "other" else None
        table.add_row(id, f"{kind}: {known}" if known else kind, format_bytes(size))
    console.print(table)
    console.print(f"In total {format_bytes(usage.total_bytes)}; hard links count once.", highlight=False)


def _show_decisions(usage: "Usage", decisions: "Sequence[Decision]") -> None:
    for decision in decisions:
        fate = "[red]goes[/red] " if decision.goes else "[green]stays[/green]"
        size = format_bytes(usage.bytes_of(decision.item))
        head = f"{fate} {decision.item.kind} {decision.item.id} ({size}): {decision.reason}"
        print_item(head, *([f"      {decision.cure}"] if decision.cure else []))
    gone = [decision.item for decision in decisions if decision.goes]
    freed = format_bytes(usage.freed_by(gone))
    stays = counted(len(decisions) - len(gone), "item")
    goes = "goes" if len(gone) == 1 else "go"
    stay = "stays" if len(decisions) - len(gone) == 1 else "stay"
    console.print(f"{counted(len(gone), 'item')} {goes} ({freed}), {stays} {stay}.", highlight=False)


def show_deletions(deletions: "Iterable[Deletion]") -> None:
    """One line for each deletion."""
    for deletion in deletions:
        name = f"{deletion.item.kind} {deletion.item.id}"
        if deletion.error:
            console.print(f"[red]failed[/red] {name}: {deletion.error}", highlight=False, soft_wrap=True)
        elif deletion.kept:
            console.print(f"Kept {name} for now: {deletion.kept}", highlight=False, soft_wrap=True)
        else:
            freed = format_bytes(deletion.freed_bytes)
            console.print(f"Deleted {name} ({freed})", highlight=False, soft_wrap=True)


def deletion_json(deletion: "Deletion") -> dict[str, Any]:
    """A deletion as `--json` prints it."""
    fields = dataclasses.asdict(deletion)
    item = fields.pop("item")
    return {**item, "deleted": not (deletion.kept or deletion.error), **fields}


def _prune_json(
    usage: "Usage", decisions: "Sequence[Decision]", deletions: "Sequence[Deletion]", yes: bool
) -> dict[str, Any]:
    gone = [decision.item for decision in decisions if decision.goes]
    items = [
        {
            "kind": decision.item.kind,
            "id": decision.item.id,
            "bytes": usage.bytes_of(decision.item),
            "goes": decision.goes,
            "reason": decision.reason,
            "cure": decision.cure or None,
        }
        for decision in decisions
    ]
    return {
        "items": items,
        "freed_bytes": usage.freed_by(gone),
        "total_bytes": usage.total_bytes,
        "deletions": [deletion_json(deletion) for deletion in deletions] if yes else None,
    }


def log_line(text: str) -> None:
    """Progress goes to standard error: standard output may be JSON."""
    print(text, file=sys.stderr, flush=True)
