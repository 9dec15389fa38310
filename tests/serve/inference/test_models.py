"""The models of a server: one bad record hides no other one, and what is wrong with it is logged once."""

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest

from ft_service.errors import StorageError
from ft_service.registry.registry import AdapterRecord, BaseModelRef, Registry
from ft_service.storage.storage import Storage
from serve.http.errors import ApiError
from serve.inference.bases import ServedBase
from serve.inference.models import ServedModel, ServedModels
from tests.registry.test_registry import DRAFT

FINGERPRINT = "ab" * 32


def publish(registry: Registry, work: Path, name: str) -> AdapterRecord:
    work.mkdir()
    (work / "adapter_model.safetensors").write_bytes(name.encode())
    base = {"id": "hub/Tiny", "revision": None, "short_name": "tiny", "fingerprint": FINGERPRINT}
    return registry.publish(work, DRAFT | {"run_name": name, "base": base}, "tiny", "card")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "storage")))


@pytest.fixture
def models(registry: Registry, tmp_path: Path) -> ServedModels:
    ref = BaseModelRef(id="hub/Tiny", revision=None, short_name="tiny", fingerprint=FINGERPRINT)
    return ServedModels(registry, [ServedBase(ref, tmp_path, 256, 300, frozenset({1}), "bf16")])


def test_a_damaged_record_is_logged_once_and_the_others_are_served(
    registry: Registry, models: ServedModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, damaged = publish(registry, tmp_path / "a", "good"), publish(registry, tmp_path / "b", "damaged")
    (registry.folder(damaged) / "record.json").write_text("{")
    shutil.copytree(registry.folder(good), registry.folder(good).with_name("a-copy"))
    with caplog.at_level(logging.WARNING, logger="serve.inference.models"):
        for _ in range(3):
            assert [model.id for model in models.all()] == ["tiny", good.id]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert any(damaged.id in message and "damaged" in message for message in messages)
    assert any("a-copy" in message and "copied or renamed" in message for message in messages)
    assert models.resolve(good.id).adapter == good
    with pytest.raises(ApiError):
        models.resolve("a-copy")


def test_a_new_adapter_is_listed_and_resolved_at_once_and_a_hidden_one_no_longer(
    registry: Registry, models: ServedModels, tmp_path: Path
) -> None:
    assert len(models.all()) == 1
    elsewhere = Registry(Storage(registry.storage.root))
    record = publish(elsewhere, tmp_path / "a", "new")
    assert [model.id for model in models.all()] == ["tiny", record.id]
    assert models.resolve(record.id).adapter == record
    elsewhere.hide(record)
    assert len(models.all()) == 1
    with pytest.raises(ApiError):
        models.resolve(record.id)


def test_an_index_that_lost_a_record_is_completed_while_the_server_runs(
    registry: Registry, models: ServedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = publish(registry, tmp_path / "a", "new")
    models.all()
    registry._indexes["adapter"]._write({})
    monkeypatch.setattr("serve.inference.models._REFRESH_SECONDS", -1.0)  # a minute has passed
    assert [model.id for model in models.all()] == ["tiny", record.id]


def test_a_listing_waits_for_no_long_correction_of_the_index(
    registry: Registry, models: ServedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = publish(registry, tmp_path / "a", "new")
    done = threading.Event()
    corrections: list[bool] = []

    def correct() -> None:
        corrections.append(done.wait(60))

    monkeypatch.setattr("serve.inference.models._REFRESH_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(registry, "refresh", correct)
    for _ in range(2):  # the second one begins no other correction
        assert [model.id for model in models.all()] == ["tiny", record.id]
    assert corrections == []
    done.set()
    for thread in threading.enumerate():
        if thread.name == "refresh-index":
            thread.join()
    assert corrections == [True]


def test_what_has_not_changed_is_read_and_written_once(
    registry: Registry, models: ServedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, tmp_path / "a", "first")
    _, first = models.all()
    publish(registry, tmp_path / "b", "second")
    written: list[str] = []
    entry = ServedModel.entry
    monkeypatch.setattr(ServedModel, "entry", lambda model: written.append(model.id) or entry(model))
    for _ in range(2):
        _, again, second = models.all()
        assert again.adapter is first.adapter
        assert json.loads(again.entry_json) == entry(first).model_dump(mode="json")
        assert json.loads(second.entry_json)["id"] == second.id
    assert written == [first.id, second.id]


def test_what_is_read_ahead_is_not_written_again_and_a_failure_is_logged(
    registry: Registry, models: ServedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    record = publish(registry, tmp_path / "a", "new")
    models.read_ahead().join()
    monkeypatch.setattr(ServedModel, "entry", None)
    assert [json.loads(model.entry_json)["id"] for model in models.all()] == ["tiny", record.id]

    def fails(kind: str = "adapter") -> None:
        raise StorageError("the storage is away.")

    monkeypatch.setattr(registry, "listing", fails)
    models.read_ahead().join()
    assert "the storage is away" in caplog.text
