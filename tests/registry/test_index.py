"""The index of records: one read lists them all, concurrent publishers lose nothing, a crash is repaired."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ft_service.errors import NotPublishedError, StorageError
from ft_service.registry import index
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from tests.registry.test_registry import DRAFT
from tests.storage.object_stores import FolderAsObjectStore


class CountingStorage(Storage):
    """Notes every call that reaches the storage."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.calls: list[str] = []

    def read_bytes(self, path: str) -> bytes:
        self.calls.append(f"read {path}")
        return super().read_bytes(path)

    def files(self, path: str) -> list[str]:
        self.calls.append(f"list {path}")
        return super().files(path)

    def folders(self, path: str) -> list[str]:
        self.calls.append(f"list {path}")
        return super().folders(path)

    def exists(self, path: str) -> bool:
        self.calls.append(f"exists {path}")
        return super().exists(path)


@pytest.fixture(params=[Storage, FolderAsObjectStore])
def storage(tmp_path: Path, request: pytest.FixtureRequest) -> Storage:
    made: Storage = request.param(str(tmp_path / "storage"))
    return made


@pytest.fixture
def publish(storage: Storage, tmp_path: Path) -> Callable[..., AdapterRecord]:
    def publish(name: str, registry: Registry | None = None) -> AdapterRecord:
        folder = tmp_path / f"{name}-{time.monotonic_ns()}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
        (folder / "adapter_config.json").write_text("{}")
        return (registry or Registry(storage)).publish(folder, DRAFT | {"run_name": name}, "llama", "card")

    return publish


def ids(storage: Storage) -> set[str]:
    return {record.id for record in Registry(storage).records()}


def test_listing_is_one_read_and_looking_up_an_id_is_one_read(storage: Storage, publish) -> None:
    records = [publish(f"bot-{number}") for number in range(5)]
    counting = CountingStorage(storage.root)
    assert Registry(counting).records() == records
    assert counting.calls == ["read index/adapter.index"]
    counting.calls.clear()
    assert Registry(counting).resolve(records[3].id) == records[3]
    assert counting.calls == [f"read adapters/{records[3].id}/record.json"]


def test_ten_thousand_records_are_listed_from_the_index_alone(tmp_path: Path, publish, storage: Storage) -> None:
    record = publish("bot")
    registry = Registry(storage)
    line = registry._indexes["adapter"].read()[record.id]
    names = [f"llama-bot-{number:08x}" for number in range(10_000)]
    many = {name: line.replace(record.id.encode(), name.encode()) for name in names}
    registry._indexes["adapter"]._write(many)
    counting = CountingStorage(storage.root)
    listed = Registry(counting).records()
    assert {each.id for each in listed} == set(many)
    assert counting.calls == ["read index/adapter.index"]


def test_an_unknown_id_names_the_newest_of_many(storage: Storage, publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft_service.registry.registry._SHOWN_IDS", 2)
    records = [publish(f"bot-{number}") for number in range(5)]
    with pytest.raises(NotPublishedError, match=rf"{records[3].id}, {records[4].id}, and 3 older ones"):
        Registry(storage).resolve("nope")


def test_hiding_takes_a_record_from_the_list_and_publishing_again_brings_it_back(storage: Storage, publish) -> None:
    first, second = publish("first"), publish("second")
    Registry(storage).hide(first)
    assert ids(storage) == {second.id}
    assert publish("first").id == first.id
    assert ids(storage) == {first.id, second.id}


def test_concurrent_publishers_lose_nothing(storage: Storage, publish) -> None:
    registries = [Registry(type(storage)(storage.root)) for _ in range(6)]  # as in processes of their own
    with ThreadPoolExecutor(6) as pool:
        published = list(pool.map(lambda number: publish(f"bot-{number}", registries[number % 6]), range(18)))
    Registry(storage).settle()
    assert ids(storage) == {record.id for record in published}


def test_an_index_that_another_publisher_overwrote_is_completed(storage: Storage, publish) -> None:
    first = publish("first")
    registry = Registry(storage)
    before = registry._indexes["adapter"].read()
    second = publish("second")
    registry._indexes["adapter"]._write(before)  # a publisher that had read the index before the second one
    third = publish("third")
    assert ids(storage) == {first.id, second.id, third.id}


class Crash(BaseException):
    pass


@pytest.mark.parametrize("change", ["published", "hidden"])
def test_a_crash_between_record_and_index_is_repaired(
    storage: Storage, publish, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    first = publish("first")
    with monkeypatch.context() as world:

        def crash(*_: object, **__: object) -> None:
            raise Crash

        world.setattr(index.RecordIndex, "settle", crash)
        with pytest.raises(Crash):
            publish("second") if change == "published" else Registry(storage).hide(first)
    Registry(storage).settle()
    names = {record.run_name for record in Registry(storage).records()}
    assert names == ({"first", "second"} if change == "published" else set())


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"damaged")])
def test_a_missing_or_damaged_index_is_made_again(storage: Storage, publish, damage) -> None:
    records = {publish("first").id, publish("second").id}
    file = Path(storage.root, "index/adapter.index")
    damage(file)
    assert ids(storage) == records
    counting = CountingStorage(storage.root)
    assert len(Registry(counting).records()) == 2
    assert counting.calls == ["read index/adapter.index"]


def test_records_without_any_index_are_listed_even_where_nothing_can_be_written(
    storage: Storage, publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = publish("old")
    shutil.rmtree(Path(storage.root, "index"))

    def refuse(*_: object) -> None:
        raise StorageError("read-only")

    monkeypatch.setattr(Storage, "write_bytes", refuse)
    assert ids(storage) == {record.id}


def test_one_unreadable_record_is_named_and_the_others_are_listed(storage: Storage, publish) -> None:
    good, damaged, newer = publish("good"), publish("damaged"), publish("newer")
    Path(storage.root, "adapters", damaged.id, "record.json").write_text('{"damaged')
    file = Path(storage.root, "adapters", newer.id, "record.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99, "something": "new"}))
    shutil.rmtree(Path(storage.root, "index"))
    listing = Registry(storage).listing()
    assert listing.records == (good,)
    problems = {unreadable.id: unreadable.problem for unreadable in listing.unreadable}
    assert set(problems) == {damaged.id, newer.id}
    assert "not JSON" in problems[damaged.id]
    assert "format 99" in problems[newer.id]
    assert Registry(storage).records() == [good]


def test_a_record_of_a_newer_version_in_the_index_is_named(storage: Storage, publish) -> None:
    good, newer = publish("good"), publish("newer")
    registry = Registry(storage)
    lines = registry._indexes["adapter"].read()
    entry = json.loads(lines[newer.id])
    entry["record"] |= {"format": 99, "something": "new"}
    registry._indexes["adapter"]._write({**lines, newer.id: json.dumps(entry).encode()})
    listing = Registry(storage).listing()
    assert listing.records == (good,)
    assert [unreadable.id for unreadable in listing.unreadable] == [newer.id]
    assert "format 99" in listing.unreadable[0].problem
    third = publish("third")
    assert Registry(storage).records() == [good, third]
    assert Registry(storage)._indexes["adapter"].read()[newer.id] == json.dumps(entry).encode()  # kept as it was


def test_a_copied_or_renamed_folder_is_not_listed_and_not_resolved(storage: Storage, publish) -> None:
    record = publish("bot")
    folder = Path(storage.root, "adapters", record.id)
    shutil.copytree(folder, folder.with_name("copy-of-it"))
    registry = Registry(storage)
    registry.reconcile()
    assert registry.records() == [record]
    assert [unreadable.id for unreadable in registry.listing().unreadable] == ["copy-of-it"]
    assert "copied or renamed" in registry.listing().unreadable[0].problem
    with pytest.raises(NotPublishedError):
        registry.resolve("copy-of-it")
    folder.rename(folder.with_name("renamed"))
    registry.reconcile()
    assert registry.records() == []
    folder.with_name("renamed").rename(folder)
    shutil.rmtree(folder.with_name("copy-of-it"))
    registry.reconcile()
    assert registry.listing().records == (record,)
    assert registry.listing().unreadable == ()


def test_reconciling_notices_what_an_older_version_published_and_what_was_deleted_by_hand(
    storage: Storage, publish
) -> None:
    kept, removed, old = publish("kept"), publish("removed"), publish("old")
    registry = Registry(storage)
    lines = registry._indexes["adapter"].read()
    registry._indexes["adapter"]._write({name: line for name, line in lines.items() if name != old.id})
    shutil.rmtree(Path(storage.root, "index/changes"))
    shutil.rmtree(Path(storage.root, "adapters", removed.id))
    registry.reconcile()
    assert ids(storage) == {kept.id, old.id}


def test_announcements_are_deleted_once_no_update_can_lack_them(
    storage: Storage, publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = publish("bot")
    Registry(storage).settle()
    assert len(storage.files("index/changes/adapter")) == 1
    now = time.time()
    monkeypatch.setattr(index.time, "time", lambda: now + 4000)
    Registry(storage).settle()
    assert storage.files("index/changes/adapter") == []
    assert ids(storage) == {record.id}


def test_a_failed_publication_leaves_nothing_behind_for_good(
    storage: Storage, publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as world:

        def fail(*_: object, **__: object) -> None:
            raise StorageError("full")

        world.setattr(type(storage), "put_folder", fail)
        with pytest.raises(StorageError, match="full"):
            publish("bot")
    assert len(storage.files("index/changes/adapter")) == 1
    now = time.time()
    monkeypatch.setattr(index.time, "time", lambda: now + 4000)
    Registry(storage).settle()
    assert storage.files("index/changes/adapter") == []
    assert ids(storage) == set()


def test_an_upload_of_hours_is_listed_at_its_end(storage: Storage, publish, monkeypatch: pytest.MonkeyPatch) -> None:
    put_folder = type(storage).put_folder

    def slow(self: Storage, *arguments: object, **named: object) -> None:
        now = time.time()
        with monkeypatch.context() as world:
            world.setattr(index.time, "time", lambda: now + 4000)
            Registry(storage).settle()  # another publisher takes the announcement for settled
        assert storage.files("index/changes/adapter") == []
        put_folder(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(type(storage), "put_folder", slow)
    record = publish("bot")
    assert ids(storage) == {record.id}
