"""A whole server for unmodified clients: real routes, files, checks, controller and webhooks.

Only two things are made up: training, which takes no time (`job_world.Ray`), and the engine, which says one word.
"""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openai

from ft_service.registry.registry import Registry
from ft_service.runs.folder import EpochAdapter, RunFolder
from ft_service.runs.folder import State as RunState
from serve.api import create_api
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest
from serve.fine_tuning import file_routes
from serve.fine_tuning.answers import Answers
from serve.fine_tuning.api_files import ApiFiles
from serve.fine_tuning.controller import Controller
from serve.fine_tuning.file_checks import FileChecks
from serve.fine_tuning.file_keeper import FileKeeper
from serve.fine_tuning.file_records import FoundFile
from serve.fine_tuning.job_records import JobRecords
from serve.fine_tuning.jobs import outside_of
from serve.fine_tuning.templates import with_templates_read
from serve.fine_tuning.work import Threads
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import BaseSettings, ServeSettings
from tests.browser import served
from tests.serve.conformance.wire_record import WireRecord
from tests.serve.fine_tuning.job_world import STEPS, Ray, make_world
from tests.serve.serving_world import draft_record, write_adapter
from tests.worlds import write_records, write_world

KEY = "a-key-of-this-test"
SECRET = "whsec_c2VjcmV0IG9mIHRoaXMgdGVzdA=="
BASE = "tiny"
HELD_AT = 2
STEP_SECONDS = 0.02


class OneWord:
    """An engine that says one word."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        yield GenerationChunk("Hello", (5,))
        yield GenerationChunk("", (1,), "stop")

    async def unload(self, adapter_digest: str) -> None: ...

    async def all_stats(self) -> list[EngineStats]:
        return []


@dataclass
class PublishingRay(Ray):
    """Its runs publish an adapter. Those named hold-... wait at a step until they were stopped once; fails-... fail."""

    registry: Registry | None = None
    base: Path = Path()
    work: Path = Path()

    def _advance(self, name: str, run: RunFolder) -> None:
        self.finishes = "failed" if run.run_id.startswith("fails") else "succeeded"
        was_stopped = not name.endswith(".1")
        is_held = run.run_id.startswith("hold") and not was_stopped and len(self._steps(run)) == HELD_AT
        if is_held and run.request() is None:
            return
        super()._advance(name, run)

    def _set(self, run: RunFolder, state: RunState, **details: str) -> None:
        if state == "succeeded":
            run.write_epoch_adapters([EpochAdapter(step=HELD_AT, adapter=self._publish(run, HELD_AT))])
            details["published"] = self._publish(run, STEPS)
        super()._set(run, state, **details)
        if state == "succeeded":
            self._lease(run, datetime(2020, 1, 1, tzinfo=UTC))  # the driver has ended

    def _publish(self, run: RunFolder, step: int) -> str:
        assert self.registry is not None
        draft = {**draft_record(self.base, run.run_id), "run_id": run.run_id}
        folder = self.work / f"{run.run_id}-{step}"
        write_adapter(self.base, folder, seed=100 * len(self.trained) + step)
        return self.registry.publish(folder, draft, BASE, "# {id}\n").id


@dataclass
class ConformanceServer:
    """Its address, its data, and what went over the wire."""

    url: str
    key: str
    model: str
    folder: Path
    record: WireRecord
    webhooks: list[dict[str, Any]] = field(default_factory=list)
    """As the stock client has verified and read them."""
    openapi: dict[str, Any] = field(default_factory=dict)


@contextmanager
def conformance_server(folder: Path) -> Iterator[ConformanceServer]:
    """A server with one base, on a database and a storage of its own."""
    (folder / "model").mkdir()
    write_world(folder / "model", num_records=40)
    base = folder / "model" / "base"
    _write_chats(folder / "train.jsonl", 40, seed=0)
    _write_chats(folder / "valid.jsonl", 12, seed=1)
    world = make_world(folder)
    registry = Registry(world.storage)
    ray = PublishingRay(world.storage, registry=registry, base=base, work=folder / "adapters")
    received: list[tuple[dict[str, str], str]] = []
    with _receiver(received) as hook:
        settings = with_templates_read(_settings(world.storage.root, str(world.engine.url), base, hook))
        models = ServedModels(registry, [load_base(one) for one in settings.bases])
        api = create_api(models, {BASE: OneWord()}, settings)
        record = WireRecord(api)
        running = _controller(world.engine, world.storage, settings, models, ray)
        with _slow_checks(record), served(record) as url, running:  # type: ignore[arg-type]
            server = ConformanceServer(f"{url}/v1", KEY, BASE, folder, record, openapi=api.openapi())
            yield server
            client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
            for headers, body in received:
                event = client.webhooks.unwrap(body, headers)
                server.webhooks.append(event.to_dict(mode="json"))


@contextmanager
def _slow_checks(record: WireRecord) -> Iterator[None]:
    """A file whose check ends later is `uploaded` in the reply. Large files take that long; here, all do."""
    check = FileChecks.check

    def check_after_the_reply(self: FileChecks, file: FoundFile) -> None:
        record.wait_until_shown(file.id)
        check(self, file)

    with patch.object(file_routes, "CHECK_SECONDS", 0.0), patch.object(FileChecks, "check", check_after_the_reply):
        yield


def _settings(storage: str, database: str, base: Path, hook: str) -> ServeSettings:
    template = {
        "method": {"type": "lora", "lora_rank": 4},
        "data": {"max_seq_len": 1024},
        "train": {"learning_rate": 1e-3, "precision": "fp32", "global_batch_size": 8},
        "parallel": {"use_gpu": False},
        "report": {"samples": 0},
    }
    return ServeSettings.model_validate(
        {
            "storage": storage,
            "database": database,
            "api_key": KEY,
            "bases": [BaseSettings(base=str(base), name=BASE, dtype="float32").model_dump()],
            "fine_tuning": {
                "templates": {BASE: template},
                "organization": "acme",
                "checked_mib": 0,
                "webhooks": [{"url": hook, "secret": SECRET}],
                "private_webhooks": True,
            },
        }
    )


@contextmanager
def _controller(
    engine: Any, storage: Any, settings: ServeSettings, models: ServedModels, ray: PublishingRay
) -> Iterator[None]:
    """The controller in a thread, and its checks of models on an event loop in another one."""
    records = JobRecords(engine)
    loop = asyncio.new_event_loop()
    loop_thread = threading.Thread(target=loop.run_forever)
    loop_thread.start()

    async def make_answers() -> Answers:
        return Answers(models, {BASE: OneWord()}, settings.limits)

    answers = asyncio.run_coroutine_threadsafe(make_answers(), loop).result()
    work = Threads()
    assert settings.fine_tuning
    keeper = FileKeeper(engine, storage, settings.fine_tuning.files, {base.name: base.folder for base in models.bases})
    outside = outside_of(records, storage, settings, ApiFiles(keeper), answers.check)
    controller = Controller(records, storage, ray, outside, work, "the controller")
    stopping = threading.Event()

    def run() -> None:
        while not stopping.wait(STEP_SECONDS):
            controller.step()
            ray.advance()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        work.close()
        loop.call_soon_threadsafe(loop.stop)
        loop_thread.join()
        loop.close()


@contextmanager
def _receiver(received: list[tuple[dict[str, str], str]]) -> Iterator[str]:
    """The address that webhooks go to."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _write_chats(file: Path, count: int, seed: int) -> None:
    questions = write_records(file, count, seed=seed)
    chats = (
        {
            "messages": [
                {"role": "user", "content": f"Last word of: {question}"},
                {"role": "assistant", "content": question.split()[-1]},
            ]
        }
        for question in questions
    )
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
