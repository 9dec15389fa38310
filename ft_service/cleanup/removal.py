"""Deletes runs, adapters, models and datasets, in an order that an interruption at any point leaves consistent.

    run        its driver's lease is held; the spec goes first: without it the run cannot be resumed
    adapter    hidden first (record to tombstone): from then on nobody resolves it; then the files
    dataset    renamed or its manifest deleted first: from then on nobody opens it; then the files

`ft prune` completes what was interrupted, and so does a server for adapters of its bases.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from ft_service.cleanup.inventory import DATASET_MARKER, RUN_MARKER, Usage, read_adapter_needs, read_usage
from ft_service.cleanup.needs import (
    DELETION_ORDER,
    SERVED_AFTER_HIDING,
    Decision,
    Inventory,
    Item,
    needed_by,
    prune,
)
from ft_service.errors import FtError, UsageError
from ft_service.registry.registry import RECORD_FILE, TOMBSTONES, AdapterRecord, Registry
from ft_service.runs.folder import LEASE_SECONDS, RunFolder, find_run
from ft_service.runs.lease import Lease
from ft_service.runs.recent import unlist_deleted_runs
from ft_service.storage.storage import Storage

Log = Callable[[str], None]

_LEASE_FILE = "lease.json"


@dataclass(frozen=True)
class Deletion:
    """What deleting one item did. `kept` says why files were kept for now; `error` why nothing could be done."""

    item: Item
    freed_bytes: int
    kept: str = ""
    error: str = ""


def delete_adapter(storage: Storage, adapter_id: str, now: datetime | None = None) -> Deletion:
    """Hide an adapter or model, then delete its files unless a server may still be reading them.

    Raises `UsageError` if something needs it, and `NotPublishedError` for an unknown id.
    """
    now = now or datetime.now(UTC)
    record, usage = _unneeded(storage, adapter_id, now)
    return _delete_published(Registry(storage), record, usage, now)


def hide_adapter(storage: Storage, adapter_id: str) -> None:
    """What a server does: hide an adapter, and leave its files to `delete_hidden_adapters`. Raises as `delete_adapter`.

    Even without a replica that has announced itself, a request may wait for one to start.
    """
    now = datetime.now(UTC)
    record = Registry(storage).resolve(adapter_id)
    if record.kind == "adapter":
        inventory = read_adapter_needs(storage, record, now)
    else:  # any run and any adapter may need it; a server stops serving what is hidden
        inventory = replace(read_usage(storage, now).inventory, servers=())
    _refuse_if_needed(record, inventory, now)
    Registry(storage).hide(record)


def delete_hidden_adapters(
    storage: Storage, fingerprints: Collection[str], log: Log, now: datetime | None = None
) -> list[str]:
    """Delete the files of the bases' hidden adapters, once no server can be answering with them. Returns their ids.

    Two listings if there is nothing to do. Any number of processes may do it at once, and continue what one of them
    has left half done. One that fails is logged; the others go on.
    """
    now = now or datetime.now(UTC)
    registry = Registry(storage)
    stored = set(storage.folders("adapters"))
    deleted = []
    for adapter_id in [name.removesuffix(".json") for name in storage.files(TOMBSTONES)]:
        if adapter_id not in stored:
            continue
        try:
            tombstone = registry.tombstone(adapter_id)
            is_due = now - tombstone.deleted >= SERVED_AFTER_HIDING
            if not is_due or tombstone.record.base.fingerprint not in fingerprints:
                continue
            if storage.exists(f"adapters/{adapter_id}/{RECORD_FILE}"):  # its hiding was interrupted at once
                continue
            registry.delete_hidden_files(tombstone.record)
        except FtError as error:
            log(str(error))
        else:
            deleted.append(adapter_id)
    return deleted


def _unneeded(storage: Storage, adapter_id: str, now: datetime) -> tuple[AdapterRecord, Usage]:
    """The record of what nothing needs, and what else is there. Raises as `delete_adapter`."""
    record = Registry(storage).resolve(adapter_id)
    usage = read_usage(storage, now)
    _refuse_if_needed(record, usage.inventory, now)
    return record, usage


def _refuse_if_needed(record: AdapterRecord, inventory: Inventory, now: datetime) -> None:
    item = Item(record.kind, record.id)
    if needs := needed_by(item, inventory, now):
        cure = _cure(item, next((each.alias for each in inventory.published if each.item == item), ""))
        raise UsageError(f"ID = {record.id!r}: cannot be deleted, {'; '.join(needs)}. {cure}")


def deleted_models(storage: Storage) -> set[str]:
    """The full models whose deletion has begun and not ended: a tombstone beside files. Two listings."""
    hidden = {name.removesuffix(".json") for name in storage.files(TOMBSTONES)}
    return hidden & set(storage.folders("models"))


def finish_deletion(storage: Storage, adapter_id: str, now: datetime | None = None) -> Deletion:
    """Go on with the deletion of an adapter or model, wherever it was interrupted, unless something needs it.

    Without effect on one that nobody has deleted, or that was never there.
    """
    now = now or datetime.now(UTC)
    usage = read_usage(storage, now)
    hidden = next((each for each in usage.inventory.published if each.item.id == adapter_id and each.hidden), None)
    if hidden is None:
        return Deletion(Item("model", adapter_id), 0)
    if hidden.listed:  # interrupted between tombstone and record; a server that has it is no need, as in `hide_adapter`
        if needs := needed_by(hidden.item, replace(usage.inventory, servers=()), now):
            return Deletion(hidden.item, 0, kept="; ".join(needs))
        Registry(storage).hide(Registry(storage).tombstone(adapter_id).record)
        return Deletion(hidden.item, 0, kept="a server may be answering with it")
    if needs := needed_by(hidden.item, usage.inventory, now):
        return Deletion(hidden.item, 0, kept="; ".join(needs))
    return _finish_deleting(storage, hidden.item, usage, now)


def _cure(item: Item, alias: str) -> str:
    if alias:
        return f"Promote another adapter (ft adapters promote), or take the alias away: ft adapters demote {alias}"
    if item.kind == "adapter":
        return "Wait until the run has ended, or stop it with ft stop."
    return "Stop or delete these first (ft runs delete, ft adapters delete; a server with Ctrl-C)."


def _delete_published(registry: Registry, record: AdapterRecord, usage: Usage, now: datetime) -> Deletion:
    item = Item(record.kind, record.id)
    registry.hide(record)
    # A server that starts from now on cannot resolve it, so the earlier list of servers is complete.
    if reasons := needed_by(item, _hidden(usage.inventory, item, now), now):
        return Deletion(item, 0, kept="; ".join(reasons))
    freed = usage.freed_by([item])
    registry.delete_hidden_files(record)
    return Deletion(item, freed)


def _hidden(inventory: Inventory, item: Item, now: datetime) -> Inventory:
    published = [replace(each, hidden=now, listed=False) if each.item == item else each for each in inventory.published]
    return replace(inventory, published=published)


def delete_run(storage: Storage, run_id: str, log: Log) -> Deletion:
    """Delete a run's folder: spec, metrics, report, checkpoints and weights. What it has published stays.

    Raises `UsageError` if a driver is working on it, and `NotPublishedError` for an unknown run.
    """
    run = find_run(storage, run_id)
    item = Item("run", run_id)
    now = datetime.now(UTC)
    usage = read_usage(storage, now)
    if needs := needed_by(item, usage.inventory, now):
        raise UsageError(
            f"RUN = {run_id!r}: cannot be deleted, {needs[0]}. Stop it first: ft stop {run_id}. If its driver died, "
            f"wait {LEASE_SECONDS:g} s."
        )
    _delete_run_folder(run, log)
    return Deletion(item, usage.freed_by([item]))


def _delete_run_folder(run: RunFolder, log: Log) -> None:
    storage = run.storage
    with Lease(run, log):  # no driver can start meanwhile
        storage.delete(f"{run.path}/{RUN_MARKER}")
        for folder in storage.folders(run.path):
            storage.delete(f"{run.path}/{folder}")
        for file in storage.files(run.path):
            if file != _LEASE_FILE:
                storage.delete(f"{run.path}/{file}")
    storage.delete_if_empty(run.path)


def delete_unneeded(
    storage: Storage, decisions: Sequence[Decision], log: Log, now: datetime | None = None
) -> list[Deletion]:
    """Delete what `decisions` say goes, as far as that still holds. An item that fails is noted; the others go on.

    The facts are read again before each kind, because runs may have started since the decision.
    """
    now = now or datetime.now(UTC)
    planned = {decision.item for decision in decisions if decision.goes}
    done: list[Deletion] = []
    for kind in DELETION_ORDER:
        if not any(item.kind == kind for item in planned):
            continue
        usage = read_usage(storage, now)
        for decision in prune(usage.inventory, now):
            if decision.item.kind == kind and decision.item in planned:
                done.append(_delete(storage, decision, usage, log, now))
    unlist_deleted_runs(storage, now)
    return done


def _delete(storage: Storage, decision: Decision, usage: Usage, log: Log, now: datetime) -> Deletion:
    item = decision.item
    if not decision.goes:
        return Deletion(item, 0, kept=decision.reason)
    try:
        match item.kind:
            case "run":
                _delete_run_folder(RunFolder(storage, item.id), log)
            case "adapter" | "model":
                return _finish_deleting(storage, item, usage, now)
            case "dataset":
                storage.delete_folder(f"datasets/{item.id}", marker=DATASET_MARKER)
                storage.delete_local_copy(f"datasets/{item.id}")
            case "leftover":
                storage.delete(item.id)
    except FtError as error:
        return Deletion(item, 0, error=str(error))
    return Deletion(item, usage.freed_by([item]))


def _finish_deleting(storage: Storage, item: Item, usage: Usage, now: datetime) -> Deletion:
    registry = Registry(storage)
    record = registry.tombstone(item.id).record
    if next(each for each in usage.inventory.published if each.item == item).listed:
        return _delete_published(registry, record, usage, now)
    registry.delete_hidden_files(record)
    return Deletion(item, usage.freed_by([item]))
