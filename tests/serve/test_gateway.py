"""What the gateway does when a replica dies, with handles that follow a script instead of Ray's."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, cast

import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ft_service.errors import FtError, ServingError
from serve import gateway
from serve.engines.engine import GenerationChunk, GenerationRequest
from serve.gateway import Backends, Replicas
from serve.http.errors import ApiError
from serve.inference.replies import WAITING

FIRST = GenerationChunk("a", (1,), cached_tokens=2)
LAST = GenerationChunk("b", (2,), "length")
DIES = ActorUnavailableError("gone", b"0" * 16)

Script = Sequence[GenerationChunk | Exception]


class ScriptedStream(DeploymentResponseGenerator):
    def __init__(self, script: Script, is_assigned: bool = True) -> None:
        self._items = iter(script)
        self._replica_result_future = Future()
        if is_assigned:
            self._replica_result_future.set_result(None)

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        return self._chunks()

    async def _chunks(self) -> AsyncGenerator[Any, None]:
        for item in self._items:
            if isinstance(item, Exception) and not isinstance(item, FtError):
                raise item
            yield item


class ScriptedHandle:
    """Follows one script for each request, in their order."""

    def __init__(self, *scripts: Script, has_places: bool = True) -> None:
        self.left: Iterator[Script] = iter(scripts)
        self.has_places = has_places
        self.asked = 0

    def options(self, **_: object) -> "ScriptedHandle":
        return self

    def remote(self, _: GenerationRequest) -> ScriptedStream:
        self.asked += 1
        return ScriptedStream(next(self.left), self.has_places)


def answer(handle: ScriptedHandle, whole: bool) -> list[GenerationChunk]:
    replicas = Replicas("tiny", cast(DeploymentHandle, handle))
    request = GenerationRequest("id", (1,), None, 2, frozenset(), whole=whole)

    async def chunks() -> list[GenerationChunk]:
        return [chunk async for chunk in replicas.generate(request)]

    return asyncio.run(chunks())


def test_a_whole_answer_is_asked_again_when_its_replica_dies_between_its_chunks():
    handle = ScriptedHandle([FIRST, DIES], [FIRST, LAST])
    begun, complete = answer(handle, whole=True)
    assert begun == GenerationChunk("", ())
    assert complete == GenerationChunk("ab", (1, 2), "length", cached_tokens=2)
    assert handle.asked == 2


def test_a_stream_that_has_begun_is_not_asked_again():
    handle = ScriptedHandle([FIRST, DIES])
    with pytest.raises(ServingError, match="has died"):
        answer(handle, whole=False)
    assert handle.asked == 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_request_that_no_replica_has_begun_is_asked_again_once(whole):
    handle = ScriptedHandle([DIES], [FIRST, LAST])
    assert "".join(chunk.text for chunk in answer(handle, whole)) == "ab"
    handle = ScriptedHandle([DIES], [DIES])
    with pytest.raises(ServingError, match="has died"):
        answer(handle, whole)
    assert handle.asked == 2


@pytest.mark.parametrize("whole", [False, True])
def test_an_error_of_the_engine_is_not_asked_again(whole):
    handle = ScriptedHandle([FIRST, ServingError("damaged")])
    with pytest.raises(ServingError, match="damaged"):
        answer(handle, whole)
    assert handle.asked == 1


def test_a_stream_that_waits_for_a_place_says_so_and_is_still_asked_again(monkeypatch):
    monkeypatch.setattr(gateway, "QUEUED_SECONDS", 0)
    handle = ScriptedHandle([DIES], [FIRST, LAST], has_places=False)
    assert answer(handle, whole=False) == [WAITING, WAITING, FIRST, LAST]
    assert len(answer(ScriptedHandle([FIRST, LAST], has_places=False), whole=True)) == 2
    assert answer(ScriptedHandle([FIRST, LAST]), whole=False) == [FIRST, LAST]


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_is_not_deployed_at_the_moment_is_a_503_that_says_when_to_come_back(whole):
    handle = ScriptedHandle([DeploymentUnavailableError(DeploymentID("tiny", "ft.tiny"))])
    with pytest.raises(ApiError, match="is not deployed at this moment") as refused:
        answer(handle, whole)
    assert refused.value.status == 503 and refused.value.retry_after is not None and handle.asked == 1


def test_full_models_are_found_in_applications_of_their_own_once_they_are_asked(monkeypatch):
    found: list[tuple[str, str]] = []

    def get_handle(name: str, application: str, **_: object) -> ScriptedHandle:
        found.append((name, application))
        return ScriptedHandle()

    monkeypatch.setattr(gateway.serve, "get_deployment_handle", get_handle)
    backends = Backends({"tiny": cast(DeploymentHandle, ScriptedHandle())}, "ft")
    assert list(backends) == ["tiny"] and isinstance(backends["tiny"], Replicas)
    assert backends["tiny-run-1"] is backends["tiny-run-1"]
    assert list(backends) == ["tiny", "tiny-run-1"] and len(backends) == 2
    assert found == [("tiny-run-1", "ft.tiny-run-1")]
