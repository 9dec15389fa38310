"""Reads what is on a storage root: the facts that `ft_service.cleanup.needs` decides from, and the bytes of each item.

One listing of the whole root, and one read of each run's and record's small files.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import yaml

from ft_service.cleanup.needs import (
    DatasetFacts,
    Inventory,
    Item,
    Kind,
    Leftover,
    PublishedFacts,
    RunFacts,
    ServerFacts,
)
from ft_service.errors import FtError, StorageError, UnreachableError
from ft_service.registry.promotions import Promotions, alias_of
from ft_service.registry.registry import RECORD_FILE, TOMBSTONES, AdapterRecord, Registry
from ft_service.registry.servers import SERVERS, ServerNotice, server_notices
from ft_service.runs.folder import RunFolder
from ft_service.runs.lease import may_be_alive
from ft_service.storage.storage import Storage, StoredObject
from ft_service.text import first_line

DATASET_MARKER = "manifest.json"
RUN_MARKER = "spec.yaml"
_SHARDS_SUFFIX = ".preparing"
_KINDS: dict[str, Kind] = {"runs": "run", "adapters": "adapter", "models": "model", "datasets": "dataset"}
_SETTLED_AFTER = ("preparing",)
"""States in which a run may still choose another dataset than its files name."""


@dataclass(frozen=True)
class Usage:
    """What is on a storage root, with the files of each item. `other` is what belongs to no item."""

    inventory: Inventory
    files: dict[Item, list[StoredObject]]
    other: dict[str, list[StoredObject]]
    """Top-level folder or file -> its files that belong to no item."""

    def bytes_of(self, item: Item) -> int:
        return num_bytes(self.files.get(item, ()))

    def freed_by(self, items: Collection[Item]) -> int:
        """Bytes that deleting all of `items` frees. Files with a hard link elsewhere free nothing."""
        gone = set(items)
        kept = {file.identity for item, files in self.files.items() if item not in gone for file in files}
        kept |= {file.identity for files in self.other.values() for file in files}
        return num_bytes(file for item in gone for file in self.files.get(item, ()) if file.identity not in kept)

    @property
    def total_bytes(self) -> int:
        return num_bytes(file for files in (*self.files.values(), *self.other.values()) for file in files)


def num_bytes(files: Iterable[StoredObject]) -> int:
    """Bytes of files, hard links to the same bytes counted once."""
    return sum({file.identity: file.size for file in files}.values())


def read_usage(storage: Storage, now: datetime | None = None) -> Usage:
    """Everything on the storage root. A file that cannot be read is noted in its item's facts."""
    now = now or datetime.now(UTC)
    # Notices before the listing: what a server announces later than that was resolved after it, too.
    notices = server_notices(storage)
    files: dict[Item, list[StoredObject]] = defaultdict(list)
    other: dict[str, list[StoredObject]] = defaultdict(list)
    expired = {f"{SERVERS}/{name}" for name, notice in notices.items() if notice.is_expired(now)}
    for file in storage.tree():
        item = _item_of(file.path, expired)
        if item is None:
            other[file.path.partition("/")[0]].append(file)
        else:
            files[item].append(file)
    hidden = {PurePosixPath(file.path).stem for file in other.get(TOMBSTONES, ())}
    aliases = Promotions(Registry(storage)).holders()
    published = []
    unfinished = []
    for item in [item for item in files if item.kind in ("adapter", "model")]:
        facts = _published(storage, item, _names(files[item]), item.id in hidden, aliases)
        if facts is not None:
            published.append(facts)
        else:
            unfinished.append(item)
    for item in unfinished:
        files[Item("leftover", f"{item.kind}s/{item.id}")] = files.pop(item)
    inventory = Inventory(
        runs=[_run(storage, item.id, _names(files[item])) for item in files if item.kind == "run"],
        published=published,
        datasets=_datasets({item.id: _names(files[item]) for item in files if item.kind == "dataset"}),
        servers=_servers(notices, now),
        leftovers=[
            Leftover(item.id, _why_left(item.id), may_be_in_use=item.id not in expired)
            for item in files
            if item.kind == "leftover"
        ],
    )
    return Usage(inventory, dict(files), dict(other))


def read_adapter_needs(storage: Storage, record: AdapterRecord, now: datetime | None = None) -> Inventory:
    """What `needed_by` asks for one adapter: itself, its run, the servers. Reads no other run and no other adapter."""
    now = now or datetime.now(UTC)
    item = Item("adapter", record.id)
    names = set(storage.files(f"adapters/{record.id}"))
    is_hidden = storage.exists(f"{TOMBSTONES}/{record.id}.json")
    aliases = Promotions(Registry(storage)).holders([alias_of(record)])
    facts = _published(storage, item, names, is_hidden, aliases)
    run_names = set(storage.files(f"runs/{record.run_id}"))
    return Inventory(
        runs=[_run(storage, record.run_id, run_names)] if run_names else [],
        published=[facts] if facts is not None else [],
        servers=_servers(server_notices(storage), now),
    )


def _servers(notices: Mapping[str, ServerNotice], now: datetime) -> list[ServerFacts]:
    return [
        ServerFacts(name, _model_on(notice.base.id), notice.base.fingerprint)
        for name, notice in notices.items()
        if not notice.is_expired(now)
    ]


def _item_of(path: str, expired: Collection[str]) -> Item | None:
    top, _, rest = path.partition("/")
    name = rest.partition("/")[0]
    if path in expired or top.startswith(".probe-"):
        return Item("leftover", path)
    if top not in _KINDS or "/" not in rest:
        return None
    if name.startswith("."):
        return Item("leftover", f"{top}/{name}")
    return Item(_KINDS[top], name)


def _why_left(path: str) -> str:
    if path.startswith(f"{SERVERS}/"):
        return "notice of a server that is gone"
    return "an upload or deletion that was interrupted"


def _names(files: Sequence[StoredObject]) -> set[str]:
    """Paths below an item's folder."""
    return {"/".join(PurePosixPath(file.path).parts[2:]) for file in files}


# -- runs ------------------------------------------------------------------------------------------------------------


def _run(storage: Storage, run_id: str, names: set[str]) -> RunFacts:
    run = RunFolder(storage, run_id)
    joined = RUN_MARKER in names
    try:
        live = may_be_alive(run.lease_holder())
        status = run.status()
        state = status.state if status is not None else "starting" if live else "not started"
        spec = _yaml(storage, f"{run.path}/{RUN_MARKER}") if joined else {}
        datasets = {
            digest
            for digest in (
                _json(storage, f"{run.path}/dataset.json", names).get("facts", {}).get("digest"),
                _json(storage, f"{run.path}/plan.json", names).get("dataset", {}).get("digest"),
                # Of version 0.1.0, without `facts`.
                _json(storage, f"{run.path}/dataset.json", names).get("digest"),
            )
            if digest
        }
        base = spec.get("model", {}).get("base")
    except UnreachableError:
        raise
    except (FtError, AttributeError, TypeError, ValueError) as error:
        return RunFacts(run_id, "unreadable", live=_is_live(run), joined=joined, unreadable=first_line(error))
    return RunFacts(
        id=run_id,
        state=state,
        live=live,
        joined=joined,
        succeeded=state == "succeeded",
        chose_dataset=bool(datasets) and not (live and state in _SETTLED_AFTER),
        datasets=frozenset(datasets),
        model=_model_on(base) if base else None,
    )


def _is_live(run: RunFolder) -> bool:
    try:
        return may_be_alive(run.lease_holder())
    except FtError:
        return False


def _yaml(storage: Storage, path: str) -> dict[str, Any]:
    # Not parsed as a RunSpec: an older version may have written settings that are invalid today.
    try:
        return dict(yaml.safe_load(storage.read_bytes(path)))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise StorageError(f"{storage.uri(path)}: is not YAML ({first_line(error)}).") from None


def _json(storage: Storage, path: str, names: set[str]) -> dict[str, Any]:
    if PurePosixPath(path).name not in names:
        return {}
    content: dict[str, Any] = json.loads(storage.read_bytes(path))
    return content


def _model_on(base: str) -> str | None:
    """Id of the model of this storage that a base names, by whatever path this machine or another one reaches it.

    The id ends with its digest, so the last two parts of the path are enough. A URI may have options behind the path.
    """
    for path in base.split("?"):
        parts = PurePosixPath(path).parts
        if len(parts) > 1 and parts[-2] == "models":
            return parts[-1]
    return None


# -- adapters, models and datasets -----------------------------------------------------------------------------------


def _published(
    storage: Storage, item: Item, names: set[str], hidden: bool, aliases: Mapping[str, str | None]
) -> PublishedFacts | None:
    """None for a folder without record and tombstone: an upload that was not completed.

    `aliases` is from `Promotions.holders`. Of one that cannot be read, any adapter of its run may be the holder.
    """
    assert item.kind in ("adapter", "model")
    listed = RECORD_FILE in names
    if not listed and not hidden:
        return None
    place = f"{item.kind}s/{item.id}/{RECORD_FILE}"
    try:
        tombstone = Registry(storage).tombstone(item.id) if hidden else None
        record = tombstone.record if tombstone else AdapterRecord.parse(storage.read_json(place), storage.uri(place))
    except UnreachableError:
        raise
    except FtError as error:
        return PublishedFacts(item.kind, item.id, "", "", None, listed=listed, unreadable=first_line(error))
    alias = alias_of(record)
    is_promoted = aliases.get(alias, "") in (record.id, None)
    return PublishedFacts(
        kind=record.kind,
        id=record.id,
        run_id=record.run_id,
        dataset=record.dataset_digest,
        base_model=_model_on(record.base.id),
        base_fingerprint=record.base.fingerprint,
        hidden=tombstone.deleted if tombstone else None,
        listed=listed,
        alias=alias if is_promoted else "",
    )


def _datasets(folders: dict[str, set[str]]) -> list[DatasetFacts]:
    complete = {folder for folder, names in folders.items() if DATASET_MARKER in names}
    found = []
    for folder in folders:
        digest = folder.removesuffix(_SHARDS_SUFFIX)
        is_remainder = folder != digest and digest in complete
        found.append(DatasetFacts(folder, digest, complete=folder in complete, is_remainder=is_remainder))
    return found
