"""Storage and registry: folders are complete or absent, content-addressed, and damage is detected."""

import errno
import hashlib
import os
import pickle
from pathlib import Path

import pytest

from ft_service.errors import (
    ClusterError,
    DataError,
    FtError,
    ModelError,
    NotPublishedError,
    Problem,
    ServingError,
    SpecError,
    StorageError,
    TrainingError,
    UsageError,
)
from ft_service.registry.registry import DIGESTS_FILE, AdapterRecord, Registry
from ft_service.runs.folder import RunFolder, find_run
from ft_service.storage.storage import Storage
from tests.storage.object_stores import FolderAsObjectStore

DRAFT: dict[str, object] = {
    "kind": "adapter",
    "run_id": "bot-1",
    "run_name": "Bot",
    "plan_digest": "p",
    "base": {"id": "b", "revision": None, "short_name": "llama-3.1-8b", "fingerprint": "f"},
    "method": {"type": "lora"},
    "datasets": [],
    "dataset_digest": "d",
    "data_verdict": "pass",
    "waivers": [],
    "steps": 3,
    "final_loss": 1.5,
    "validation_loss": None,
    "chat_template_digest": "t",
    "end_of_turn_ids": [1],
    "packages": {},
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def publish(storage: Storage, folder: Path, weights: bytes, card: str = "id {id}, digest {digest}") -> AdapterRecord:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text("{}")
    return Registry(storage).publish(folder, DRAFT, "llama-3.1-8b", card)


# -- registry --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_named_after_base_run_and_content(storage: Storage, tmp_path: Path) -> None:
    record = publish(storage, tmp_path / "a", b"weights")
    assert record.id == f"llama-3.1-8b-bot-{record.digest[:8]}"
    folder = Registry(storage).folder(record)
    assert (folder / "README.md").read_text() == f"id {record.id}, digest {record.digest}"
    assert Registry(storage).resolve(record.id) == record
    assert Registry(storage).records() == [record]
    assert Registry(storage).damaged_files(record) == []


def test_the_digest_covers_the_weights_and_not_the_card(storage: Storage, tmp_path: Path) -> None:
    first = publish(storage, tmp_path / "a", b"weights")
    again = publish(storage, tmp_path / "b", b"weights", card="another card")
    other = publish(storage, tmp_path / "c", b"weightz")
    assert again == first  # published once, its record stays
    assert other.digest != first.digest
    assert len(Registry(storage).records()) == 2


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"weightz"), Path.unlink])
def test_a_changed_or_missing_file_is_detected(storage: Storage, tmp_path: Path, damage) -> None:
    record = publish(storage, tmp_path / "a", b"weights")
    damage(Registry(storage).folder(record) / "adapter_model.safetensors")
    assert Registry(storage).damaged_files(record) == ["adapter_model.safetensors"]


def test_an_incomplete_folder_is_not_listed(storage: Storage, tmp_path: Path) -> None:
    record = publish(storage, tmp_path / "a", b"weights")
    (Registry(storage).folder(record) / "record.json").unlink()
    Registry(storage).reconcile()
    assert Registry(storage).records() == []
    with pytest.raises(NotPublishedError):
        Registry(storage).resolve(record.id)


@pytest.mark.parametrize("adapter_id", ["nope", "../adapters/x", ".hidden", "a/b"])
def test_an_unknown_id_lists_the_published_ids(storage: Storage, tmp_path: Path, adapter_id: str) -> None:
    record = publish(storage, tmp_path / "a", b"weights")
    with pytest.raises(NotPublishedError, match=record.id):
        Registry(storage).resolve(adapter_id)


def test_a_damaged_record_is_an_error_with_its_path(storage: Storage, tmp_path: Path) -> None:
    record = publish(storage, tmp_path / "a", b"weights")
    for text, message in (("{}", "damaged"), ("{", "not JSON")):
        (Registry(storage).folder(record) / "record.json").write_text(text)
        with pytest.raises(StorageError, match=message):
            Registry(storage).resolve(record.id)


# -- weights that are already on the storage -------------------------------------------------------------------------


@pytest.fixture(params=[Storage, FolderAsObjectStore])
def any_storage(tmp_path: Path, request: pytest.FixtureRequest) -> Storage:
    storage: Storage = request.param(str(tmp_path / "storage"))
    return storage


def written_model(storage: Storage) -> str:
    """A folder as the workers of a `full` run write it."""
    files = {"model-00001-of-00001.safetensors": b"weights", "config.json": b"{}"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    storage.write_json(f"run/weights/{DIGESTS_FILE}", digests)
    for name, content in files.items():
        storage.write_bytes(f"run/weights/{name}", content)
    return "run/weights"


MODEL = DRAFT | {"kind": "model"}


def test_stored_weights_get_the_same_record_as_a_local_folder(any_storage: Storage, tmp_path: Path) -> None:
    record = Registry(any_storage).publish_stored(written_model(any_storage), MODEL, "llama", "card {id}")
    folder = tmp_path / "same"
    folder.mkdir()
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_bytes(b"{}")
    other = Registry(Storage(str(tmp_path / "other"))).publish(folder, MODEL, "llama", "card {id}")
    assert record.model_copy(update={"created": other.created}) == other
    assert Registry(any_storage).records("model") == [record]
    place = f"models/{record.id}"
    for name, digest in record.files.items():
        assert hashlib.sha256(any_storage.read_bytes(f"{place}/{name}")).hexdigest() == digest
    assert not any_storage.exists(f"{place}/{DIGESTS_FILE}")


def test_stored_weights_are_published_once_and_outlive_their_run(any_storage: Storage) -> None:
    registry = Registry(any_storage)
    first = registry.publish_stored(written_model(any_storage), MODEL, "llama", "card")
    assert registry.publish_stored("run/weights", MODEL, "llama", "another card") == first
    any_storage.delete("run")
    assert any_storage.read_bytes(f"models/{first.id}/model-00001-of-00001.safetensors") == b"weights"


def test_stored_weights_are_linked_or_else_copied(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for links in (True, False):
        with monkeypatch.context() as world:
            if not links:
                world.setattr(os, "link", refuse)
            draft = MODEL | {"run_name": f"links-{links}"}
            record = Registry(storage).publish_stored(written_model(storage), draft, "llama", "card")
        folder = Registry(storage).folder(record)
        file = folder / "model-00001-of-00001.safetensors"
        assert file.read_bytes() == b"weights"
        assert file.samefile(storage.local_folder("run/weights") / file.name) == links


def test_the_marker_of_a_published_folder_is_written_last(any_storage: Storage) -> None:
    source = written_model(any_storage)
    written: list[str] = []

    class Watched(type(any_storage)):  # type: ignore[misc]
        def write_bytes(self, path: str, content: bytes) -> None:
            written.append(Path(path).name)
            super().write_bytes(path, content)

    Watched(any_storage.root).publish_within(source, [], "to", {"mark": b"", "other": b""}, marker="mark")
    assert written == ["other", "mark"]


def refuse(*_: object) -> None:
    raise OSError(1, "Operation not permitted")


def test_incomplete_weights_are_not_published(any_storage: Storage) -> None:
    registry = Registry(any_storage)
    any_storage.delete(f"{written_model(any_storage)}/config.json")
    with pytest.raises(StorageError, match=r"config\.json"):
        registry.publish_stored("run/weights", MODEL, "llama", "card")
    assert registry.records("model") == []
    any_storage.delete(f"run/weights/{DIGESTS_FILE}")
    with pytest.raises(StorageError, match=r"digests\.json"):
        registry.publish_stored("run/weights", MODEL, "llama", "card")


# -- storage ---------------------------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_content(storage: Storage, monkeypatch) -> None:
    storage.write_bytes("folder/file", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes("folder/file", b"new")
    assert storage.read_bytes("folder/file") == b"old"
    assert [file.name for file in storage.local_folder("folder").iterdir()] == ["file"]


def test_a_folder_is_stored_completely_and_only_once(storage: Storage, tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_text("first")
    (source / "mark").write_text("")

    def interrupted(*_: object) -> None:
        raise OSError("interrupted")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", interrupted)
        with pytest.raises(StorageError, match="interrupted"):
            storage.put_folder(source, "things/one", marker="mark")
    assert storage.folders("things") == []
    assert list(storage.local_folder("things").iterdir()) == []

    storage.put_folder(source, "things/one", marker="mark")
    (source / "deep" / "file").write_text("second")
    storage.put_folder(source, "things/one", marker="mark")
    assert storage.read_bytes("things/one/deep/file") == b"first"


def test_a_file_appears_only_after_a_successful_write(any_storage: Storage) -> None:
    with any_storage.writing("folder/file") as stream:
        stream.write(b"begun, ")
        assert not (any_storage.is_local and any_storage.exists("folder/file"))
        stream.write(b"ended")
    assert any_storage.read_bytes("folder/file") == b"begun, ended"
    with pytest.raises(RuntimeError), any_storage.writing("folder/other") as stream:
        stream.write(b"begun")
        raise RuntimeError
    with pytest.raises(StorageError, match="No space left"), any_storage.writing("folder/other") as stream:
        raise OSError(28, "No space left on device")
    assert [file.name for file in Path(any_storage.root, "folder").iterdir()] == ["file"]


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/etc/passwd"])
def test_paths_outside_the_root_are_rejected(storage: Storage, path: str) -> None:
    with pytest.raises(StorageError, match="is outside the storage root"):
        storage.write_bytes(path, b"")


def test_an_unusable_root_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        Storage(str(tmp_path / "file" / "below")).check_writable()
    with pytest.raises(StorageError, match="not a usable root"):
        Storage("gopher://somewhere")


class DeletedMeanwhile:
    """A file system where another process deletes a folder between pyarrow's two looks at it."""

    def get_file_info(self, selector: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "Cannot list directory")


def test_a_folder_deleted_while_it_is_listed_is_empty(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage._fs = DeletedMeanwhile()
    assert storage.folders("runs/r/checkpoints") == []
    assert storage.files("runs/r/checkpoints") == []


def test_lines_are_appended_and_a_storage_can_be_pickled(storage: Storage) -> None:
    again = pickle.loads(pickle.dumps(storage))
    storage.append_line("log", "one")
    again.append_line("log", "two")
    assert storage.read_bytes("log") == b"one\ntwo\n"
    storage.check_writable()
    assert storage.folders("") == []


# -- runs and errors -------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_id_with_its_state(storage: Storage) -> None:
    run = RunFolder(storage, "bot-1")
    assert run.status() is None
    run.set_state("failed", message="no data")
    status = find_run(storage, "bot-1").status()
    assert status is not None and (status.state, status.message) == ("failed", "no data")
    with pytest.raises(NotPublishedError, match="bot-1"):
        find_run(storage, "bot-2")


@pytest.mark.parametrize(
    "error",
    [
        SpecError([Problem("a.b", 3, "is wrong", "Use 4.")]),
        *(
            kind("setting = 1: wrong. Use 2.")
            for kind in (
                UsageError,
                DataError,
                ModelError,
                StorageError,
                NotPublishedError,
                ClusterError,
                TrainingError,
                ServingError,
            )
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error: FtError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.exit_code == (2 if isinstance(error, SpecError | UsageError) else 1)
