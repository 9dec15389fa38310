"""Deleting on folders and object storage: what is needed stays; a crash leaves nothing half-referenced."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ft_service.cleanup.inventory import read_adapter_needs, read_usage
from ft_service.cleanup.needs import Item, prune
from ft_service.cleanup.removal import (
    delete_adapter,
    delete_hidden_adapters,
    delete_run,
    delete_unneeded,
    hide_adapter,
)
from ft_service.errors import NotPublishedError, StorageError, UsageError
from ft_service.registry.promotions import Promotions
from ft_service.registry.registry import AdapterRecord, BaseModelRef, Registry, page_file
from ft_service.registry.servers import Announcement, ServerNotice
from ft_service.runs.lease import Lease
from ft_service.storage.storage import Storage
from tests.cleanup.cleanup_cases import object_store, publish, write_dataset, write_everything, write_run
from tests.cleanup.test_needs import dangling
from tests.storage.object_stores import FolderAsObjectStore


def silent(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store() as template:
        yield template


@pytest.fixture(params=["folder", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    if request.param == "folder":
        return Storage(str(tmp_path / "storage"))
    template: str = request.getfixturevalue("bucket")
    return Storage(template.format(uuid.uuid4().hex))


def paths(storage: Storage) -> list[str]:
    return [file.path for file in storage.tree()]


def going(storage: Storage) -> set[str]:
    return {decision.item.id for decision in prune(read_usage(storage).inventory) if decision.goes}


# -- pruning ---------------------------------------------------------------------------------------------------------


def test_prune_deletes_what_nothing_needs_and_nothing_else(storage: Storage) -> None:
    records = write_everything(storage)
    with Lease(write_run(storage, "preparing-elsewhere", "failed", "shared"), silent):
        pass  # a run that was driven from here, and ended
    before = paths(storage)
    usage = read_usage(storage)
    decisions = prune(usage.inventory)
    assert paths(storage) == before  # deciding changes nothing
    goes = {decision.item.id for decision in decisions if decision.goes}
    assert goes == {
        "never-joined",
        "half-deleted",
        records["hidden"].id,
        records["begun"].id,
        "unused",
        "interrupted.preparing",
        "of-half-deleted",
        "of-hidden",
        "of-begun",
    }
    freed = usage.freed_by([decision.item for decision in decisions if decision.goes])
    deletions = delete_unneeded(storage, decisions, silent)
    assert {deletion.item.id for deletion in deletions} == goes
    assert not any(deletion.error or deletion.kept for deletion in deletions)
    assert sum(deletion.freed_bytes for deletion in deletions) == freed
    gone = [path for path in before if path not in paths(storage)]
    assert all(any(f"/{item}/" in path for item in goes) for path in gone)
    assert not any(f"/{item}/" in path for path in paths(storage) for item in goes)
    assert going(storage) == set()
    assert Registry(storage).damaged_files(records["adapter"]) == []
    assert {tombstone.record.id for tombstone in Registry(storage).tombstones()} == {
        records["hidden"].id,
        records["begun"].id,
    }


def test_what_came_to_be_needed_since_the_decision_stays(storage: Storage) -> None:
    write_dataset(storage, "d1")
    write_run(storage, "r1", "failed", joined=False)
    decisions = prune(read_usage(storage).inventory)
    write_run(storage, "r1", "preparing", live=True)
    deletions = delete_unneeded(storage, decisions, silent)
    assert [deletion.kept for deletion in deletions] == ["run r1 is preparing", "run r1 is preparing and may use it"]
    assert storage.exists("datasets/d1/manifest.json")


def test_an_item_that_cannot_be_deleted_is_named_and_the_others_go(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(storage, "d1")
    write_dataset(storage, "d2")
    delete_folder = Storage.delete_folder

    def refusing(self: Storage, path: str, marker: str) -> None:
        if path.endswith("d1"):
            raise StorageError("no permission")
        delete_folder(self, path, marker)

    monkeypatch.setattr(Storage, "delete_folder", refusing)
    deletions = delete_unneeded(storage, prune(read_usage(storage).inventory), silent)
    assert [(deletion.item.id, deletion.error) for deletion in deletions] == [("d1", "no permission"), ("d2", "")]
    assert storage.folders("datasets") == ["d1"]


def test_a_damaged_file_keeps_what_it_may_name(storage: Storage) -> None:
    write_dataset(storage, "d1")
    run = write_run(storage, "r1", "failed", "d2")
    storage.write_bytes(f"{run.path}/dataset.json", b"{")
    usage = read_usage(storage)
    assert going(storage) == set()
    assert usage.inventory.runs[0].unreadable
    delete_run(storage, "r1", silent)
    assert going(storage) == {"d1"}


class Crash(BaseException):
    """The process dies."""


class Dying(Storage):
    """Dies at the n-th change: a folder is then half deleted."""

    changes_left = 0

    @classmethod
    def spend(cls) -> bool:
        """Count a change; whether the process dies at it."""
        Dying.changes_left -= 1
        return Dying.changes_left < 0

    def delete(self, path: str) -> None:
        if not self.spend():
            super().delete(path)
            return
        for file in self.tree(path)[:1] if self.size(path) is None else []:
            super().delete(file.path)
        raise Crash

    def write_bytes(self, path: str, content: bytes) -> None:
        if self.spend():
            raise Crash
        super().write_bytes(path, content)


class DyingObjectStore(Dying, FolderAsObjectStore):
    """Without renames."""


def dying_rmtree(folder: Any, **_: Any) -> None:
    if Dying.spend():
        next(file for file in Path(folder).rglob("*") if file.is_file()).unlink()
        raise Crash
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            Path(place, name).unlink()
        for name in folders:
            Path(place, name).rmdir()
    Path(folder).rmdir()


def check_consistent(storage: Storage, broken_before: set[tuple[str, str]]) -> None:
    inventory = read_usage(storage).inventory
    assert dangling(inventory) <= broken_before
    registry = Registry(storage)
    for record in (*registry.records("adapter"), *registry.records("model")):
        names = {path.rpartition("/")[2] for path in paths(storage) if f"/{record.id}/" in path}
        assert names >= set(record.files), "a listed record lacks files"
    for run in storage.folders("runs"):
        if storage.exists(f"runs/{run}/spec.yaml") and storage.exists(f"runs/{run}/dataset.json"):
            assert storage.exists(f"runs/{run}/checkpoints/index.json"), "a run that can be resumed lacks files"
    for dataset in storage.folders("datasets"):
        if storage.exists(f"datasets/{dataset}/manifest.json"):
            assert storage.exists(f"datasets/{dataset}/rows-00000/train.arrow"), "a complete dataset lacks files"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dying_kind"), [(Storage, Dying), (FolderAsObjectStore, DyingObjectStore)])
def test_a_crash_at_any_change_leaves_nothing_half_referenced(
    kind: type[Storage], dying_kind: type[Dying], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it costs most of the time of hundreds of small files
    crashes = 0
    while True:
        storage = kind(str(tmp_path / f"storage-{crashes}"))
        records = write_everything(storage)
        broken_before = dangling(read_usage(storage).inventory)
        dying = dying_kind(storage.root)
        Dying.changes_left = crashes
        with monkeypatch.context() as world:
            if storage.is_local:  # elsewhere it only deletes this machine's copies
                world.setattr("ft_service.storage.storage.shutil.rmtree", dying_rmtree)
            try:
                delete_unneeded(dying, prune(read_usage(storage).inventory), silent)
                delete_adapter(dying, records["adapter"].id)
                delete_adapter(dying, publish(storage, "another", "shared").id)
                delete_run(dying, "stopped", silent)
                completed = True
            except Crash:
                completed = False
        check_consistent(storage, broken_before)
        if completed:
            break
        # Pruning again completes whatever was interrupted.
        delete_unneeded(storage, prune(read_usage(storage).inventory), silent)
        check_consistent(storage, broken_before)
        assert going(storage) == set()
        shutil.rmtree(storage.root)
        crashes += 1
    assert crashes > 20


# -- deleting an adapter ---------------------------------------------------------------------------------------------


def test_a_deleted_adapter_is_hidden_and_leaves_a_tombstone(storage: Storage) -> None:
    record = publish(storage, "r1", "d1")
    registry = Registry(storage)
    if not storage.is_local:
        assert registry.folder(record).is_dir()  # a copy on this machine
    storage.write_bytes(page_file(record.id), b"<html>")
    deletion = delete_adapter(storage, record.id)
    assert deletion.freed_bytes > 0 and not deletion.kept
    assert registry.records() == []
    assert [path for path in paths(storage) if not path.startswith("index/")] == [f"tombstones/{record.id}.json"]
    assert registry.tombstone(record.id).record == record
    with pytest.raises(NotPublishedError, match=r"was deleted from .* at 20\d\d"):
        registry.resolve(record.id)
    with pytest.raises(NotPublishedError, match="was deleted"):
        delete_adapter(storage, record.id)
    if not storage.is_local:
        with pytest.raises(StorageError, match="cannot be fetched"):
            registry.folder(record)


def test_publishing_the_same_content_again_brings_the_record_back(storage: Storage) -> None:
    record = publish(storage, "r1", "d1")
    delete_adapter(storage, record.id)
    again = publish(storage, "r1", "d1")
    assert again.digest == record.digest
    registry = Registry(storage)
    assert registry.records() == [again] and registry.damaged_files(again) == []
    assert registry.tombstones() == []
    registry.hide(again)  # interrupted before its files were deleted
    assert registry.damaged_files(publish(storage, "r1", "d1")) == []


def test_the_model_that_an_adapter_was_trained_on_cannot_be_deleted(storage: Storage) -> None:
    model = publish(storage, "full", "d1", kind="model")
    adapter = publish(storage, "lora", "d1", base=storage.uri(f"models/{model.id}"))
    before = paths(storage)
    with pytest.raises(UsageError, match=f"adapter {adapter.id} was trained on it"):
        delete_adapter(storage, model.id)
    assert paths(storage) == before
    delete_adapter(storage, adapter.id)
    delete_adapter(storage, model.id)
    assert storage.folders("models") == []


def test_a_record_of_a_running_run_cannot_be_deleted(storage: Storage) -> None:
    record = publish(storage, "r1", "d1")
    write_run(storage, "r1", "publishing", "d1", live=True)
    with pytest.raises(UsageError, match=r"run r1, which published it, is publishing"):
        delete_adapter(storage, record.id)
    assert Registry(storage).records() == [record]


def test_a_served_adapter_is_hidden_and_its_files_wait(storage: Storage) -> None:
    record = publish(storage, "r1", "d1", fingerprint="f1")
    server = Announcement(storage, BaseModelRef(id="b", revision=None, short_name="b", fingerprint="f1"))
    server.start()
    now = datetime.now(UTC)
    deletion = delete_adapter(storage, record.id, now)
    assert "may be answering with it" in deletion.kept and deletion.freed_bytes == 0
    assert Registry(storage).records() == []
    assert storage.exists(f"adapters/{record.id}/adapter_model.safetensors")
    item = Item("adapter", record.id)
    soon, later = (
        {each.item: each.goes for each in prune(read_usage(storage, at).inventory, at)}[item]
        for at in (now + timedelta(minutes=1), now + timedelta(minutes=16))
    )
    assert (soon, later) == (False, True)
    server.stop()
    assert going(storage) == {record.id}


def test_a_server_deletes_the_files_of_hidden_adapters_of_its_bases_once_they_are_due(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    due, failing, other, kept = (
        publish(storage, f"r{number}", f"d{number}", fingerprint=base)
        for number, base in enumerate(["f", "f", "g", "f"])
    )
    for record in (due, failing, other):
        hide_adapter(storage, record.id)
    now = datetime.now(UTC)
    problems: list[str] = []
    assert delete_hidden_adapters(storage, {"f"}, problems.append, now + timedelta(minutes=14)) == []
    delete = Registry.delete_hidden_files

    def fails(registry: Registry, record: AdapterRecord) -> None:
        if record.id == failing.id:
            raise StorageError("the disk is away.")
        delete(registry, record)

    later = now + timedelta(minutes=16)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "delete_hidden_files", fails)
        assert delete_hidden_adapters(storage, {"f"}, problems.append, later) == [due.id]
    assert problems == ["the disk is away."]
    assert delete_hidden_adapters(storage, {"f"}, problems.append, later) == [failing.id]
    assert delete_hidden_adapters(storage, {"f"}, problems.append, later) == []
    assert sorted(storage.folders("adapters")) == sorted([other.id, kept.id])
    assert Registry(storage).tombstone(due.id).record == due
    again = publish(storage, "r0", "d0", fingerprint="f")  # the same content
    assert again.id == due.id
    assert delete_hidden_adapters(storage, {"f"}, problems.append, later) == []
    assert storage.exists(f"adapters/{again.id}/adapter_model.safetensors")


def test_a_model_that_is_served_cannot_be_deleted(storage: Storage) -> None:
    model = publish(storage, "full", "d1", kind="model")
    base = BaseModelRef(id=storage.uri(f"models/{model.id}"), revision=None, short_name="m", fingerprint="f2")
    server = Announcement(storage, base)
    server.start()
    with pytest.raises(UsageError, match=r"server .* serves it"):
        delete_adapter(storage, model.id)
    server.stop()
    assert not delete_adapter(storage, model.id).kept


def test_the_notice_of_a_server_that_died_expires_and_goes(storage: Storage) -> None:
    base = BaseModelRef(id="models/m", revision=None, short_name="m", fingerprint="f")
    old = ServerNotice(base=base, host="h", pid=1, time=datetime.now(UTC) - timedelta(hours=1))
    storage.write_json("servers/h-1.json", old.model_dump(mode="json"))
    usage = read_usage(storage)
    assert usage.inventory.servers == []
    delete_unneeded(storage, prune(usage.inventory), silent)
    assert paths(storage) == []


# -- deleting a run --------------------------------------------------------------------------------------------------


def test_a_run_is_deleted_and_what_it_published_stays(storage: Storage) -> None:
    record = publish(storage, "r1", "d1")
    write_dataset(storage, "d1")
    write_run(storage, "r1", "succeeded", "d1")
    deletion = delete_run(storage, "r1", silent)
    assert deletion.freed_bytes > 0
    assert storage.folders("runs") == []
    assert Registry(storage).records() == [record]
    assert going(storage) == set()  # the record names the dataset
    delete_adapter(storage, record.id)
    assert going(storage) == {"d1"}


def test_a_run_with_a_live_lease_cannot_be_deleted(storage: Storage) -> None:
    write_run(storage, "r1", "running", "d1", live=True)
    before = paths(storage)
    with pytest.raises(UsageError, match=r"run r1 is running\. Stop it first: ft stop r1"):
        delete_run(storage, "r1", silent)
    assert paths(storage) == before
    with pytest.raises(NotPublishedError, match="Existing runs: r1"):
        delete_run(storage, "r2", silent)


# -- bytes -----------------------------------------------------------------------------------------------------------


def test_hard_links_count_once_and_free_nothing_while_one_is_left(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("runs/r1/weights/step-1/model.safetensors", b"x" * 1000)
    storage.write_json("runs/r1/weights/step-1/digests.json", {"model.safetensors": "0"})
    names = ["model.safetensors"]
    storage.publish_within("runs/r1/weights/step-1", names, "models/m", {"record.json": b"{}"}, marker="record.json")
    usage = read_usage(storage)
    run = Item("run", "r1")
    model = Item("model", "m")
    assert usage.bytes_of(run) > 1000 and usage.bytes_of(model) > 1000
    assert usage.total_bytes < 1100
    assert usage.freed_by([run]) < 100
    assert usage.freed_by([run, model]) == usage.total_bytes


def test_a_listing_has_every_file_and_its_size(storage: Storage) -> None:
    storage.write_bytes("a/b/c", b"123")
    storage.write_bytes(".hidden/d", b"1")
    assert [(file.path, file.size) for file in storage.tree()] == [(".hidden/d", 1), ("a/b/c", 3)]
    assert [file.path for file in storage.tree("a")] == ["a/b/c"]
    assert storage.tree("nowhere") == []
    storage.delete_if_empty("a")
    assert storage.exists("a/b/c")
    storage.delete("a/b/c")
    storage.delete_if_empty("a")
    assert storage.folders("") == []


def test_what_belongs_to_no_item_is_counted_and_never_deleted(storage: Storage) -> None:
    storage.write_bytes("bases/my-llama/config.json", b"{}")
    storage.write_bytes("notes.txt", b"mine")
    storage.write_bytes("runs/notes.txt", b"mine")
    usage = read_usage(storage)
    assert usage.inventory.items == [] and set(usage.other) == {"bases", "notes.txt", "runs"}
    assert usage.total_bytes == 10


def test_hiding_an_adapter_reads_nothing_of_others_and_is_refused_like_deleting_it(storage: Storage) -> None:
    for number in range(20):
        write_run(storage, f"r{number}", "succeeded", f"d{number}", base="b")
    records = [publish(storage, f"r{number}", f"d{number}") for number in range(20)]
    Promotions(Registry(storage)).promote(records[1])
    write_run(storage, "r2", "running", "d2", base="b", live=True)
    for needed in records[1:3]:
        with pytest.raises(UsageError) as refused:
            hide_adapter(storage, needed.id)
        with pytest.raises(UsageError, match=re.escape(str(refused.value))):
            delete_adapter(storage, needed.id)
    inventory = read_adapter_needs(storage, records[0])
    everything = read_usage(storage).inventory
    item = Item("adapter", records[0].id)
    assert inventory.published == [each for each in everything.published if each.item == item]
    assert inventory.runs == [each for each in everything.runs if each.id == "r0"]
    assert inventory.servers == everything.servers
