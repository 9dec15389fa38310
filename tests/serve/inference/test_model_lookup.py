"""Looking models up: what is published is found at once, and remote storage is not read for every request."""

import math
import threading
import time
from concurrent.futures import Future

import pytest

from ft_service.registry.promotions import Promotions
from ft_service.registry.registry import BaseModelRef, Registry
from ft_service.storage.storage import Storage
from serve.http.errors import ApiError
from serve.inference.bases import ServedBase
from serve.inference.models import REMEMBERED_SECONDS, ServedModels, delete_published


@pytest.fixture
def published(tmp_path):
    """A registry, and a function that publishes an adapter for the base of a fingerprint."""
    registry = Registry(Storage(str(tmp_path / "storage")))

    def publish(name: str, method: str = "lora"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(f'{{"r": 4, "name": "{name}"}}')
        draft = {**DRAFT, "run_name": name, "run_id": f"{name}-1", "method": {"type": method}}
        return registry.publish(folder, draft, "tiny", "# {id}\n")

    return registry, publish


DRAFT = {
    **{"kind": "adapter", "run_id": "r-1", "run_name": "r", "plan_digest": "0" * 64},
    "base": {"id": "hub/Tiny", "revision": None, "short_name": "tiny", "fingerprint": "ab" * 32},
    **{"datasets": [], "dataset_digest": "0" * 64, "data_verdict": "pass", "waivers": [], "steps": 1},
    **{"final_loss": 1.0, "validation_loss": None, "packages": {}},
    **{"chat_template_digest": "0" * 64, "end_of_turn_ids": []},
}


def served(name: str, precision: str, folder) -> ServedBase:
    ref = BaseModelRef(id="hub/Tiny", revision=None, short_name=name, fingerprint="ab" * 32)
    return ServedBase(ref, folder, context_length=64, vocab_size=10, end_ids=frozenset(), precision=precision)


def test_an_adapter_is_served_on_the_base_of_its_training_precision(published, tmp_path):
    registry, publish = published
    models = ServedModels(registry, [served("tiny", "bf16", tmp_path), served("tiny-nf4", "nf4", tmp_path)])
    assert models.resolve(publish("plain").id).base.name == "tiny"
    assert models.resolve(publish("quantised", "qlora").id).base.name == "tiny-nf4"


def test_a_difference_in_precision_is_in_the_entry(published, tmp_path):
    registry, publish = published
    plain = publish("plain")
    quantised = publish("quantised", "qlora")
    bf16 = ServedModels(registry, [served("tiny", "bf16", tmp_path)])
    nf4 = ServedModels(registry, [served("tiny", "nf4", tmp_path)])
    assert bf16.resolve(plain.id).entry().note is None
    assert "nf4" in bf16.resolve(quantised.id).entry().note
    assert "nf4" in nf4.resolve(plain.id).entry().note
    assert nf4.resolve(quantised.id).entry().note is None


def test_remote_storage_is_read_once_for_many_requests_and_deleting_is_seen_at_once(published, tmp_path, monkeypatch):
    registry, publish = published
    monkeypatch.setattr(type(registry.storage), "is_local", property(lambda _: False))
    models = ServedModels(registry, [served("tiny", "bf16", tmp_path)])
    monkeypatch.undo()
    adapter = publish("plain")
    reads = []
    find = registry.find
    monkeypatch.setattr(registry, "find", lambda name: reads.append(name) or find(name))
    for _ in range(5):
        models.resolve(adapter.id)
    assert reads == [adapter.id]
    delete_published(models, models.resolve(adapter.id))
    with pytest.raises(ApiError, match="does not exist"):
        models.resolve(adapter.id)


def test_while_storage_hangs_only_the_first_requests_wait_for_it(published, tmp_path, monkeypatch):
    registry, publish = published
    adapter = publish("plain")
    monkeypatch.setattr(type(registry.storage), "is_local", property(lambda _: False))
    models = ServedModels(registry, [served("tiny", "bf16", tmp_path)])
    known = models.resolve(adapter.id)
    answers = threading.Event()
    looked_up = []
    find = registry.find
    monkeypatch.setattr(registry, "find", lambda name: looked_up.append(answers.wait(60)) or find(name))
    later = [time.monotonic() + REMEMBERED_SECONDS + 1]
    monkeypatch.setattr(time, "monotonic", lambda: later[0])
    waited = []
    result = Future.result
    monkeypatch.setattr(Future, "result", lambda future, seconds: waited.append(seconds) or result(future, 0))
    for seconds in (0.0, 0.25, 1.0, 30.0):
        later[0] += seconds
        assert models.resolve(adapter.id) is known
    assert waited == pytest.approx([1.0, 0.75, 0.0, 0.0])
    answers.set()
    models._looking.shutdown()
    assert looked_up == [True]
    assert models._looked_up == {}


class OwnedBySomebody:
    """Names of models that count how often the database is asked."""

    def __init__(self, owners):
        self.reads = 0
        self._owners = owners

    def owners(self, adapter=None):
        self.reads += 1
        return self._owners


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("is_owned", [True, False])
def test_what_is_at_hand_is_read_nowhere(published, tmp_path, monkeypatch, is_local, is_owned):
    registry, publish = published
    adapter = publish("plain")
    monkeypatch.setattr(type(registry.storage), "is_local", property(lambda _: is_local))
    models = ServedModels(registry, [served("tiny", "bf16", tmp_path)])
    names = OwnedBySomebody({adapter.id: [("a key", None)]} if is_owned else {})
    models.add_names(names)
    reads = []
    find = registry.find
    monkeypatch.setattr(registry, "find", lambda name: reads.append(name) or find(name))
    assert models.is_at_hand(None) and models.is_at_hand("tiny")
    assert not models.is_at_hand(adapter.id) and not models.is_at_hand("unknown")
    models.resolve(adapter.id)
    assert not models.is_at_hand(adapter.id)  # its owners are not known yet
    models.owners(models.resolve(adapter.id))
    assert models.is_at_hand(adapter.id) is not is_local  # a folder is looked at for each request
    counts = len(reads), names.reads
    for model in ("tiny", *([] if is_local else [adapter.id])):
        models.owners(models.resolve(model))
    assert (len(reads), names.reads) == counts
    models._found[adapter.id] = (models._found[adapter.id][0], -math.inf)
    assert not models.is_at_hand(adapter.id)


def test_an_alias_answers_with_the_adapter_that_is_promoted(published, tmp_path):
    registry, publish = published
    models = ServedModels(registry, [served("tiny", "bf16", tmp_path)])
    adapter = publish("plain")
    with pytest.raises(ApiError, match="tiny-plain@promoted"):
        models.resolve("tiny-plain@promoted")
    Promotions(registry).promote(adapter)
    resolved = models.resolve("tiny-plain@promoted")
    # Replies name what answered: the adapter, not the alias.
    assert (resolved.id, resolved.adapter.digest) == (adapter.id, adapter.digest)
    entries = {model.id: model.entry() for model in models.all()}
    assert set(entries) == {"tiny", adapter.id, "tiny-plain@promoted"}
    assert entries["tiny-plain@promoted"].root == adapter.id
    assert entries["tiny-plain@promoted"].parent == entries[adapter.id].root == "tiny"


class Names:
    """Names of adapters, counted."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.asked = 0

    def adapter_of(self, alias: str) -> str | None:
        self.asked += 1
        return self.known.get(alias)

    def aliases(self) -> dict[str, str]:
        return self.known

    def owners(self, adapter: str | None = None) -> dict[str, list[tuple[str, str | None]]]:
        return {}


def test_a_fine_tuned_name_is_the_adapter_under_that_name(published, tmp_path):
    registry, publish = published
    adapter = publish("plain")
    models = ServedModels(registry, [served("tiny", "bf16", tmp_path)])
    name = "ft:tiny:acme:desk/日本:0a1b2c3d"
    with pytest.raises(ApiError, match="does not exist"):
        models.resolve(name)  # a server without a database
    names = Names()
    models.add_names(names)
    names.known = {name: adapter.id, f"{name}:ckpt-step-4": adapter.id, "ft:tiny:acme::gone": "tiny-gone-00000000"}
    for alias in (name, f"{name}:ckpt-step-4"):
        found = models.resolve(alias)
        assert (found.id, found.root, found.adapter, found.entry().parent) == (alias, adapter.id, adapter, "tiny")
    assert [model.id for model in models.all()] == ["tiny", adapter.id, name, f"{name}:ckpt-step-4"]
    asked = names.asked
    for _ in range(5):
        models.resolve(name)
    assert names.asked == asked  # a name never moves, so it is looked up once
    for unknown in ("ft:tiny:acme::gone", "ft:tiny", "ft:"):
        with pytest.raises(ApiError, match="does not exist"):
            models.resolve(unknown)
    delete_published(models, models.resolve(name))
    for deleted in (name, f"{name}:ckpt-step-4", adapter.id):
        with pytest.raises(ApiError, match="does not exist"):
            models.resolve(deleted)
