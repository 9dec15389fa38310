"""Loaded adapters: verified, shared, bounded in bytes, and never unloaded while a request uses them."""

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ft_service.errors import ServingError
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from serve.engines.batching.adapters import AdapterStore
from tests.serve.engines.batching.lora_cases import FINGERPRINT, LoraWorld, publish, save_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LoraWorld:
    return LoraWorld(tmp_path_factory.mktemp("lora"), {})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "storage")))


Publish = Callable[..., AdapterRecord]


@pytest.fixture
def published(world: LoraWorld, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Publishes an adapter, as a version did that looked at nothing; `change` may edit its folder before."""
    monkeypatch.setattr("ft_service.registry.registry.nonfinite_tensor", lambda _: None)
    monkeypatch.setattr("ft_service.registry.registry._vllm_problems", lambda _: [])

    def make(name: str, change: Callable[[Path], None] = lambda _: None, **settings: object) -> AdapterRecord:
        torch.manual_seed(len(name))
        folder = save_adapter(world.base, tmp_path / name, **{"target_modules": ["q_proj", "v_proj"], **settings})
        change(folder)
        return publish(registry, folder, name)

    return make


def make_store(world: LoraWorld, registry: Registry, max_bytes: int = 1 << 30, **more: object) -> AdapterStore:
    return AdapterStore(registry, world.lora, FINGERPRINT, max_bytes, **more)  # type: ignore[arg-type]


# -- verified --------------------------------------------------------------------------------------------------------


def test_a_loaded_adapter_names_its_record(world: LoraWorld, registry: Registry, published: Publish) -> None:
    record = published("good")
    store = make_store(world, registry)
    adapter = store.acquire(record)
    assert (adapter.id, adapter.digest) == (record.id, record.digest)
    stats = store.stats()
    assert stats.loaded == (record.digest,)
    assert stats.bytes >= adapter.nbytes > 0
    assert stats.loads == 1


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, "README.md"])
@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-1] + b"~"), Path.unlink])
def test_damaged_files_are_refused_by_name(
    world: LoraWorld, registry: Registry, published: Publish, file: str, damage: Callable[[Path], None]
) -> None:
    record = published("broken")
    damage(registry.folder(record) / file)
    store = make_store(world, registry)
    with pytest.raises(ServingError, match=rf"{record.id}.*{file} missing or changed since publishing"):
        store.acquire(record)
    assert store.stats().loaded == ()


def test_an_adapter_is_loaded_again_once_its_files_are_restored(
    world: LoraWorld, registry: Registry, published: Publish
) -> None:
    record = published("restored")
    file = registry.folder(record) / WEIGHTS
    content = file.read_bytes()
    store = make_store(world, registry)
    file.write_bytes(b"")
    with pytest.raises(ServingError):
        store.acquire(record)
    file.write_bytes(content)
    assert store.acquire(record).digest == record.digest


def test_an_adapter_of_another_base_is_refused(world: LoraWorld, registry: Registry, published: Publish) -> None:
    record = published("other")
    store = AdapterStore(registry, world.lora, "e" * 64, 1 << 30)
    with pytest.raises(ServingError, match=rf"{record.id}.*another base \(the/base"):
        store.acquire(record)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_name(
    world: LoraWorld, registry: Registry, published: Publish, value: float
) -> None:
    def poison(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        next(tensor for name, tensor in tensors.items() if "layers.1.self_attn.v_proj.lora_B" in name)[0, 0] = value
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    record = published("poisoned", poison)
    with pytest.raises(ServingError, match=rf"{record.id}.*layers\.1\.self_attn\.v_proj\.lora_B.*not finite"):
        make_store(world, registry).acquire(record)


def changed_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def with_another_embedding(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = torch.ones(64, 32)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_config(target_modules=["q_proj"]), r"does not fit.*unexpected tensor .*v_proj"),
        (changed_config(target_modules=["q_proj", "v_proj", "lm_head"]), r"does not fit.*no tensor lm_head\.lora_A"),
        (changed_config(target_modules=["no_such_module"]), r"does not fit"),
        (changed_config(r=8), r"does not fit.*has shape \(4, 32\) instead of \(8, 32\)"),
        (changed_config(modules_to_save=["norm"]), r"does not fit.*no tensor model\.norm\.weight"),
        (without_a_tensor, r"does not fit.*no tensor model\.layers\.0\.self_attn\.q_proj\.lora_A"),
        (with_another_embedding, r"does not fit.*unexpected tensor model\.embed_tokens\.base_layer"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"no safetensors"), "does not fit"),
        (changed_config(init_lora_weights="pissa"), "changes its base when loaded.*pissa"),
        (changed_config(init_lora_weights="olora"), "changes its base when loaded.*olora"),
        (changed_config(peft_type="LOHA"), "more than plain LoRA.*LOHA"),
        (changed_config(trainable_token_indices=[1, 2]), "more than plain LoRA.*trainable_token_indices"),
        (changed_config(layer_replication=[[0, 2]]), "more than plain LoRA.*layer_replication"),
        (changed_config(a_setting_of_tomorrow=3), "more than plain LoRA.*a_setting_of_tomorrow"),
        (lambda folder: (folder / CONFIG).write_text("{"), "more than plain LoRA"),
    ],
)
def test_a_misfit_is_refused_and_others_still_load(
    world: LoraWorld, registry: Registry, published: Publish, change: Callable[[Path], None], message: str
) -> None:
    store = make_store(world, registry)
    misfit = published("misfit", change)
    with pytest.raises(ServingError, match=f"{misfit.id}.*{message}"):
        store.acquire(misfit)
    good = published("good")
    assert store.acquire(good).digest == good.digest
    assert store.stats().loaded == (good.digest,)


def test_a_pickled_adapter_is_never_loaded(world: LoraWorld, registry: Registry, published: Publish) -> None:
    record = published("pickled", lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin") and None)
    with pytest.raises(ServingError, match=r"adapter_model\.safetensors missing"):
        make_store(world, registry).acquire(record)


# -- bounded ---------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_adapter_makes_room(world: LoraWorld, registry: Registry, published: Publish) -> None:
    records = [published("a" * count) for count in (1, 2, 3)]
    size = make_store(world, registry).acquire(records[0]).nbytes
    store = make_store(world, registry, max_bytes=3 * size)  # two loaded ones, and the copy of one in the batch
    for record in (records[0], records[1], records[0]):
        store.release(store.acquire(record))
    assert store.stats().loaded == (records[1].digest, records[0].digest)
    store.release(store.acquire(records[2]))
    assert store.stats().loaded == (records[0].digest, records[2].digest)


def test_an_adapter_in_use_stays_and_others_wait_for_room(
    world: LoraWorld, registry: Registry, published: Publish
) -> None:
    first, second = published("first"), published("second")
    size = make_store(world, registry).acquire(first).nbytes
    store = make_store(world, registry, max_bytes=3 * size)
    used = store.acquire(first)
    waiting = store.request(second)
    assert not waiting.done()
    assert store.stats().loaded == (first.digest,)
    store.release(used)
    assert waiting.result(timeout=60).digest == second.digest


def test_a_pinned_adapter_stays(world: LoraWorld, registry: Registry, published: Publish) -> None:
    pinned, *others = [published("a" * count) for count in (1, 2, 3)]
    size = make_store(world, registry).acquire(pinned).nbytes
    store = make_store(world, registry, max_bytes=3 * size, pinned=[pinned.id])
    for record in (pinned, *others):
        store.release(store.acquire(record))
    assert store.stats().loaded == (pinned.digest, others[1].digest)


def test_what_can_never_fit_is_refused(world: LoraWorld, registry: Registry, published: Publish) -> None:
    first, second = published("first"), published("second")
    size = make_store(world, registry).acquire(first).nbytes
    with pytest.raises(ServingError, match=rf"{first.id}.*adapter_gib"):
        make_store(world, registry, max_bytes=size - 1).acquire(first)
    store = make_store(world, registry, max_bytes=size, pinned=[first.id])
    store.release(store.acquire(first))
    with pytest.raises(ServingError, match=r"pinned adapters leave no room.*adapter_gib"):
        store.acquire(second)


def test_unload_waits_for_the_requests_in_flight(world: LoraWorld, registry: Registry, published: Publish) -> None:
    record = published("deleted")
    store = make_store(world, registry)
    store.unload(record.digest)  # not loaded: no error
    users = [store.acquire(record), store.acquire(record)]
    store.unload(record.digest)
    store.release(users[0])
    assert store.stats().loaded == (record.digest,)
    store.release(users[1])
    assert store.stats().loaded == ()
    store.release(store.acquire(record))
    store.unload(record.digest)
    assert store.stats().loaded == ()


# -- shared ----------------------------------------------------------------------------------------------------------


class SlowRegistry(Registry):
    """Gives out folders only once `opened` is set; counts how often it is asked for which."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.opened = threading.Event()
        self.asked = threading.Event()

    def folder(self, record: AdapterRecord) -> Path:
        self.asked.set()
        assert self.opened.wait(60)
        return super().folder(record)


def test_several_requests_load_an_adapter_once(world: LoraWorld, registry: Registry, published: Publish) -> None:
    record = published("shared")
    slow = SlowRegistry(registry.storage)
    store = make_store(world, slow)
    with ThreadPoolExecutor(8) as pool:
        acquired = [pool.submit(store.acquire, record) for _ in range(8)]
        assert slow.asked.wait(60)
        slow.opened.set()
        adapters = {future.result(timeout=60) for future in acquired}
    assert len(adapters) == 1
    assert store.stats().loads == 1
    for _ in range(8):
        store.release(adapters.copy().pop())
    with pytest.raises(AssertionError):
        store.release(adapters.pop())


def test_a_failed_load_fails_all_that_waited_and_is_tried_again(
    world: LoraWorld, registry: Registry, published: Publish
) -> None:
    record = published("failing")
    slow = SlowRegistry(registry.storage)
    store = make_store(world, slow)
    requests = [store.request(record) for _ in range(3)]
    file = registry.folder(record) / WEIGHTS
    file.rename(file.with_suffix(".away"))
    slow.opened.set()
    for request in requests:
        with pytest.raises(ServingError, match="missing"):
            request.result(timeout=60)
    file.with_suffix(".away").rename(file)
    assert store.acquire(record).digest == record.digest


def test_a_cancelled_request_holds_nothing(world: LoraWorld, registry: Registry, published: Publish) -> None:
    record = published("cancelled")
    slow = SlowRegistry(registry.storage)
    store = make_store(world, slow)

    async def ask_and_leave() -> None:
        asking = asyncio.create_task(store.acquire_async(record))
        await asyncio.to_thread(slow.asked.wait, 60)
        asking.cancel()
        slow.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await asking
        store.release(await store.acquire_async(record))

    asyncio.run(ask_and_leave())
    store.unload(record.digest)
    assert store.stats().loaded == ()


def test_closing_fails_those_that_wait_for_room(world: LoraWorld, registry: Registry, published: Publish) -> None:
    first, second = published("first"), published("second")
    size = make_store(world, registry).acquire(first).nbytes
    store = make_store(world, registry, max_bytes=3 * size)
    store.acquire(first)
    waiting = store.request(second)
    store.close()
    with pytest.raises(ServingError, match="closed"):
        waiting.result(timeout=60)
    with pytest.raises(ServingError, match="closed"):
        store.acquire(first)
