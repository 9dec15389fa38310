"""A server whose storage fails: what it has loaded goes on answering, the rest is refused with the reason."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from ft_service.registry.registry import Registry
from ft_service.storage import object_store
from ft_service.storage.storage import Storage
from serve.inference import models
from tests.serve.local_server import local_server
from tests.serve.serving_world import PROMPT, World, make_world, publish_adapter
from tests.storage.object_stores import (
    BUCKET,
    DENIED,
    EXPIRED,
    INTERNAL_ERROR,
    SLOW_DOWN,
    FaultyS3,
    cut,
    faulty_s3,
    no_answer,
    retry_quickly,
)

FAULTS = {
    "slow down": SLOW_DOWN,
    "internal error": INTERNAL_ERROR,
    "cut": cut,
    "no answer": no_answer,
    "expired": EXPIRED,
    "denied": DENIED,
}


@pytest.fixture(scope="module")
def local_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short pauses and timeouts, and each request looks its model up."""
    retry_quickly(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(object_store, "_TIMEOUTS", {"connect_timeout": "5s", "timeout": "500ms"})
    monkeypatch.setattr(models, "REMEMBERED_SECONDS", 0.0)


@pytest.fixture
def world(s3: FaultyS3, local_world: World, tmp_path: Path) -> World:
    registry = Registry(Storage(s3.root()))
    adapters = [publish_adapter(registry, local_world.base, tmp_path / str(seed), seed) for seed in (1, 2)]
    return replace(local_world, storage=registry.storage.root, registry=registry, adapters=adapters)


def ask(url: str, model: str) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    return httpx.post(f"{url}/completions", json=body, timeout=60)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.mark.parametrize("fault", FAULTS)
def test_loaded_models_answer_while_the_storage_fails(
    s3: FaultyS3, world: World, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = world.base.name.lower()
    loaded, unloaded = (adapter.id for adapter in world.adapters)
    with local_server(world) as url, caplog.at_level(logging.WARNING, logger=models.__name__):
        answers = {model: text(ask(url, model)) for model in (base, loaded)}
        assert len(set(answers.values())) == 2
        with s3.fault(FAULTS[fault]) as met:
            for _ in range(2):
                assert {model: text(ask(url, model)) for model in answers} == answers
            assert met.hits > 0
            (warning,) = {record.getMessage() for record in caplog.records if "looking again" in record.getMessage()}
            assert BUCKET in warning or "no answer within" in warning
            refused = ask(url, unloaded)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            error = refused.json()["error"]
            assert error["code"] == "storage_error" and BUCKET in error["message"]
            assert httpx.get(f"{url}/health").status_code == 200
        assert text(ask(url, unloaded)) not in answers.values()
        assert text(ask(url, loaded)) == answers[loaded]


def test_an_adapter_whose_download_breaks_is_refused_and_answers_later(s3: FaultyS3, world: World) -> None:
    """Its record can be read, its weights cannot."""
    adapter = world.adapters[0].id
    with local_server(world) as url:
        with s3.fault(DENIED, methods="GET", keys="adapter_model.safetensors"):
            refused = ask(url, adapter)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "storage_error"
            assert adapter in refused.json()["error"]["message"]
        assert text(ask(url, adapter))


def test_an_adapter_that_was_found_to_be_deleted_stays_so_while_the_storage_fails(s3: FaultyS3, world: World) -> None:
    deleted = world.adapters[0]
    with local_server(world) as url:
        text(ask(url, deleted.id))
        world.registry.hide(deleted)
        assert ask(url, deleted.id).status_code == 404
        with s3.fault(EXPIRED):
            assert ask(url, deleted.id).status_code == 503
