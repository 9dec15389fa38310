"""Jobs over HTTP with the stock client: accepted, refused with all reasons, listed, paused, resumed and cancelled."""

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from ft_service.cluster.queue.schedule import Node
from ft_service.errors import DatabaseError
from ft_service.runs.folder import LeaseHolder, RunFolder
from serve.database import database
from serve.database.keys import create_key, find_key
from serve.fine_tuning.job_files import JobFolder
from serve.fine_tuning.job_records import Job, JobRecords
from serve.fine_tuning.job_routes import job_routes
from serve.fine_tuning.jobs import Jobs, StoredFile, check_linked
from serve.fine_tuning.templates import with_templates_read
from serve.fine_tuning.wire import FineTuningJobRequest
from serve.http.access import AccessLog
from serve.http.errors import ApiError, answer_errors_in_openai_shape
from serve.http.in_flight import InFlight
from serve.http.keys import RequireKey
from serve.http.tenants import Tenant
from serve.settings import ServeSettings
from tests.browser import served
from tests.cluster.queue.queue_cases import entry
from tests.serve.fine_tuning.job_world import World, make_world
from tests.worlds import write_records

KEY = "a-key-of-this-test"
BASE = "tiny"


class FolderFiles:
    """Files in a folder of the storage, without owners."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.results: dict[str, bytes] = {}

    def add(self, file_id: str, records: list[dict[str, Any]] | str) -> str:
        text = records if isinstance(records, str) else "\n".join(map(json.dumps, records))
        self._world.storage.write_bytes(f"files/content/{file_id}", text.encode())
        return file_id

    def for_training(self, owner: Tenant, file_id: str, param: str) -> StoredFile:
        size = self._world.storage.size(f"files/content/{file_id}")
        if size is None:
            raise ApiError(400, f"{param}: the file {file_id!r} does not exist.", "file_not_found", param)
        return StoredFile(file_id, f"{file_id}.jsonl", size, "files/content", file_id)

    def add_result(self, job: Job, content: bytes) -> str:
        self.results[job.id] = content
        return f"file-{job.hex}"


@dataclass
class Server:
    world: World
    files: FolderFiles
    settings: ServeSettings
    url: str
    client: openai.OpenAI

    def check(self, job: Job) -> Any:
        tuning = self.settings.fine_tuning
        assert tuning
        return check_linked(job, self.world.storage, tuning)


def chat_records(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    questions = write_records(folder / "records.jsonl", count, seed=seed)
    return [
        {
            "messages": [
                {"role": "user", "content": f"Last word of: {question}"},
                {"role": "assistant", "content": question.split()[-1]},
            ]
        }
        for question in questions
    ]


@pytest.fixture
def server(base_folder: Path, tmp_path: Path) -> Iterator[Server]:
    world = make_world(tmp_path)
    template = {
        "method": {"type": "lora", "lora_rank": 4},
        "data": {"max_seq_len": 128},
        "train": {"learning_rate": 1e-3, "precision": "fp32", "global_batch_size": 8},
        "parallel": {"use_gpu": False},
        "report": {"samples": 0},
    }
    settings = with_templates_read(
        ServeSettings.model_validate(
            {
                "storage": world.storage.root,
                "bases": [{"base": str(base_folder), "name": BASE}],
                "fine_tuning": {"templates": {BASE: template}, "organization": "acme"},
            }
        )
    )
    files = FolderFiles(world)
    files.add("file-train", chat_records(tmp_path, 40))
    files.add("file-valid", chat_records(tmp_path, 12, seed=1))
    api = FastAPI()
    answer_errors_in_openai_shape(api)
    api.include_router(job_routes(Jobs(world.records, world.storage, settings, files), "acme", InFlight()))
    api.add_middleware(RequireKey, root_key=KEY, find_key=partial(find_key, world.engine))
    api.add_middleware(AccessLog)
    with served(api) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=30)
        yield Server(world, files, settings, f"{url}/v1", client)


def headers() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


def test_a_job_is_accepted_with_its_row_its_file_and_its_events(server):
    job = server.client.fine_tuning.jobs.create(
        model=BASE,
        training_file="file-train",
        validation_file="file-valid",
        suffix="Last Words",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 4, "n_epochs": 2}}},
    )
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", BASE, 7)
    assert (job.training_file, job.validation_file) == ("file-train", "file-valid")
    assert job.metadata == {"team": "a"} and job.organization_id == "acme"
    assert job.fine_tuned_model is None and job.error is None and job.finished_at is None and job.result_files == []
    assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == 4
    assert job.hyperparameters.learning_rate_multiplier == 1
    assert job.method.supervised.hyperparameters.n_epochs == 2
    found = server.world.records.find(job.id)
    assert found.alias == f"ft:{BASE}:acme:Last-Words:{job.id[6:14]}" and found.run_id == f"last-words-{job.id[6:18]}"
    accepted = server.world.storage.read_json(f"jobs/{job.id}/job.json")
    assert accepted["id"] == job.id and accepted["request"]["suffix"] == "Last Words"
    events = server.client.fine_tuning.jobs.list_events(job.id).data
    assert [event.message for event in reversed(events)] == [
        f"Created fine-tuning job: {job.id}",
        "Validating training file: file-train, file-valid",
    ]


def test_the_spec_of_a_job_has_its_hyperparameters_and_reports_the_conversion(server):
    job = server.client.fine_tuning.jobs.create(
        model=BASE,
        training_file="file-train",
        validation_file="file-valid",
        seed=7,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"batch_size": 6, "n_epochs": 2, "learning_rate_multiplier": 2}},
        },
        metadata={"license": "CC0-1.0"},
    )
    resolved = server.world.records.find(job.id).resolved
    spec = resolved["spec"]
    rows = resolved["rows"]
    assert spec["train"]["learning_rate"] == 2e-3 and spec["train"]["epochs"] == 2 and spec["train"]["seed"] == 7
    assert spec["train"]["global_batch_size"] == round(6 * rows / 40) > 1
    assert [source["license"] for source in (*spec["data"]["train"], *spec["data"]["validation"])] == ["CC0-1.0"] * 2
    assert spec["queue"]["owner"] == "FT_API_KEY"
    assert spec["data"]["train"][0]["source"] == "file-train, uploaded by FT_API_KEY"
    server.world.controller().step()
    messages = server.world.messages(server.world.records.find(job.id))
    assert any(f"40 examples in {rows} rows" in message and "batch_size 6" in message for message in messages)


def test_the_same_request_again_is_the_same_job(server):
    def create(_: int) -> str:
        return server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train").id

    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(create, range(8)))
    assert len(ids) == 1 and server.world.storage.folders("jobs") == sorted(ids)
    other = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train", suffix="other")
    assert other.id not in ids


def test_a_job_lost_between_database_and_storage_is_completed_by_the_retry(server):
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    server.world.storage.delete(f"jobs/{job.id}/job.json")  # as if killed just after the commit
    assert server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train").id == job.id
    assert server.world.storage.exists(f"jobs/{job.id}/job.json")


class Killed(BaseException):
    """The gateway is gone, and does nothing more."""


def kill_at(number: int, when: str, patch: pytest.MonkeyPatch) -> None:
    """Lose the gateway at a call of a creation: before it, or after it and before its answer."""
    calls: list[str] = []

    def wrap(owner: type, name: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) > number:
                raise Killed  # a process that is gone deletes nothing either
            if len(calls) == number and when == "before":
                raise Killed
            result = inner(*arguments, **options)
            if len(calls) == number:
                raise Killed
            return result

        patch.setattr(owner, name, call)

    for owner, names in (
        (JobRecords, ("find_created", "create")),
        (JobFolder, ("link_data", "write_if_absent", "delete", "delete_quietly")),
    ):
        for name in names:
            wrap(owner, name)


@pytest.mark.parametrize("retries", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 5))
def test_a_gateway_killed_at_any_call_of_a_creation_loses_nothing(server, monkeypatch, number, when, retries):
    """Also if its client never repeats the request: then there is one job or none."""
    server.settings.fine_tuning.__dict__["checked_mib"] = 0
    gateway = Jobs(server.world.records, server.world.storage, server.settings, server.files)
    owner = Tenant("root", "root", None, sees_all=True)
    request = FineTuningJobRequest(model=BASE, training_file="file-train")
    with monkeypatch.context() as patch:
        kill_at(number, when, patch)
        with pytest.raises(Killed):
            gateway.create(owner, request)
    if retries:
        gateway.create(owner, request)
    active = server.world.records.active()
    was_committed = (number, when) in ((3, "after"), (4, "before"), (4, "after"))
    assert len(active) == (1 if retries or was_committed else 0)
    for job in active:
        server.world.check = server.check
        server.world.until(job, "succeeded")
        assert server.world.ray.submitted == [f"{job.run_id}.1"]
        assert server.world.storage.exists(f"jobs/{job.id}/job.json")


def test_a_commit_whose_answer_is_lost_keeps_the_data_of_its_job(server, monkeypatch):
    server.settings.fine_tuning.__dict__["checked_mib"] = 0
    create = JobRecords.create

    def lose_answer(*arguments: Any) -> Any:
        create(*arguments)
        raise DatabaseError("FT_DATABASE_URL: the database failed (the connection is lost).")

    with monkeypatch.context() as patch:
        patch.setattr(JobRecords, "create", lose_answer)
        with pytest.raises(openai.InternalServerError, match="the database failed"):
            server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    [found] = server.world.records.active()
    assert found.id == job.id
    server.world.check = server.check
    server.world.until(found, "succeeded")


def test_sixty_four_creations_at_once_are_sixty_four_jobs(server):
    """Each is sent twice at the same moment, as clients do that repeat a slow request."""
    server.settings.fine_tuning.__dict__["checked_mib"] = 0

    def create(number: int) -> str:
        suffix = f"{number // 2}/日本 {'x' * (number // 2 % 5)}"
        return server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train", suffix=suffix).id

    with ThreadPoolExecutor(64) as pool:
        ids = list(pool.map(create, range(128)))
    assert len(set(ids)) == 64 and ids[::2] == ids[1::2]
    active = server.world.records.active()
    assert {job.id for job in active} == set(ids) == set(server.world.storage.folders("jobs"))
    assert len({job.run_id for job in active}) == len({job.alias for job in active}) == 64
    assert all("/" not in job.run_id and job.run_id.isascii() and "/" not in job.alias for job in active)


def test_while_the_database_is_locked_requests_get_a_503_that_says_so(server, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_MILLISECONDS", 20)
    server.world.engine.dispose()  # later connections wait no longer than that
    with closing(sqlite3.connect(str(server.world.engine.url.database))) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(openai.InternalServerError) as locked:
            server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
        other.rollback()
    assert (locked.value.status_code, locked.value.code) == (503, "database_error") and "locked" in locked.value.message
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    assert [found.id for found in server.world.records.active()] == [job.id]


def test_while_the_storage_is_away_requests_get_a_503_and_write_nothing(server):
    root = Path(server.world.storage.root)
    root.rename(root.with_name("away"))
    with pytest.raises(openai.InternalServerError) as away:
        server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    assert (away.value.status_code, away.value.code) == (503, "storage_error") and "is gone" in away.value.message
    assert not root.exists() and server.world.records.active() == []
    root.with_name("away").rename(root)
    assert server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train").status == "validating_files"


def test_a_base_that_is_no_longer_served_fails_the_job_by_name(server):
    server.settings.fine_tuning.__dict__["checked_mib"] = 0
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    server.settings.fine_tuning.__dict__["templates"] = {}
    server.world.check = server.check
    failed = server.world.until(server.world.records.find(job.id), "failed")
    assert failed.error["code"] == "model_not_available" and repr(BASE) in failed.error["message"]


BAD_BODIES = [
    ({"model": "gpt-4o-mini"}, "model", "model_not_available", "Models that can: tiny"),
    ({"training_file": "file-none"}, "training_file", "file_not_found", "file-none"),
    ({"validation_file": "file-none"}, "validation_file", "file_not_found", "file-none"),
    ({"method": {"type": "dpo"}}, "method", "unsupported_method", "preference training is not there yet"),
    ({"method": {"type": "reinforcement"}}, "method", "unsupported_method", "graders"),
    ({"method": {"type": "other"}}, "method", "invalid_value", "supervised"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters", "invalid_value", "greater than or equal to 1"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters", "invalid_value", "auto"),
    ({"suffix": "x" * 65}, "suffix", "invalid_value", "64"),
    ({"seed": -1}, "seed", "invalid_value", "0"),
    ({"metadata": {"k": "x" * 513}}, "metadata", "invalid_value", "512"),
    ({"integrations": [{"type": "other"}]}, "integrations", "invalid_value", "wandb"),
    ({"metadata": {"waive.no.such-code": "why"}}, None, "invalid_hyperparameters", "is not a code of the data gate"),
    ({"nonsense": 1}, "nonsense", "invalid_value", "extra"),
]


@pytest.mark.parametrize(
    ("change", "param", "code", "part"), BAD_BODIES, ids=[str(case[0])[:40] for case in BAD_BODIES]
)
def test_what_cannot_run_is_refused_by_name(server, change, param, code, part):
    body = {"model": BASE, "training_file": "file-train", **change}
    answer = httpx.post(f"{server.url}/fine_tuning/jobs", json=body, headers=headers())
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code) and part in error["message"]
    assert server.world.records.active() == [] and server.world.storage.folders("jobs") == []


def test_the_deprecated_hyperparameters_are_used(server):
    job = server.client.fine_tuning.jobs.create(
        model=BASE, training_file="file-train", hyperparameters={"n_epochs": 5, "learning_rate_multiplier": 0.5}
    )
    assert job.hyperparameters.n_epochs == 5 and job.hyperparameters.learning_rate_multiplier == 0.5


def test_bad_data_are_refused_with_all_reasons_and_lines_unless_they_are_waived(server, tmp_path):
    server.files.add("file-few", chat_records(tmp_path, 3))
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.fine_tuning.jobs.create(model=BASE, training_file="file-few")
    assert refused.value.code == "invalid_training_file" and refused.value.param == "training_file"
    assert "size.too-few" in refused.value.message and str(tmp_path) not in refused.value.message
    assert 'send metadata {"waive.CODE": "REASON"}' in refused.value.message
    job = server.client.fine_tuning.jobs.create(
        model=BASE, training_file="file-few", metadata={"waive.size.too-few": "a smoke test"}
    )
    assert server.world.records.find(job.id).resolved["spec"]["data"]["waive"] == {"size.too-few": "a smoke test"}


def test_large_files_are_checked_by_the_job_itself(server, tmp_path):
    server.settings.fine_tuning.__dict__["checked_mib"] = 0
    broken = chat_records(tmp_path, 12)
    for number in range(2, 9):
        broken[number]["messages"][1]["content"] = ""
    server.files.add("file-broken", broken)
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-broken")
    assert job.status == "validating_files" and job.hyperparameters.n_epochs == "auto"
    server.world.check = server.check
    server.world.until(server.world.records.find(job.id), "failed")
    failed = server.client.fine_tuning.jobs.retrieve(job.id)
    assert failed.error.code == "invalid_training_file" and failed.error.param == "training_file"
    assert "training_file:3" in failed.error.message
    assert not server.world.storage.exists(JobFolder(server.world.storage, job.id).path + "/data")


def test_files_that_are_deleted_while_a_job_waits_do_no_harm(server):
    server.settings.fine_tuning.__dict__["checked_mib"] = 0
    job = server.client.fine_tuning.jobs.create(
        model=BASE, training_file="file-train", validation_file="file-valid", metadata={"team": "a"}
    )
    for name in ("file-train", "file-valid"):
        server.world.storage.delete(f"files/content/{name}")
    server.world.check = server.check
    queued = server.world.until(server.world.records.find(job.id), "queued")
    assert queued.resolved["examples"] == 40


def test_an_estimate_writes_nothing(server):
    body = {"model": BASE, "training_file": "file-train", "hyperparameters": {"n_epochs": 2, "batch_size": 8}}
    first = httpx.post(f"{server.url}/fine_tuning/jobs/estimate", json=body, headers=headers()).json()
    second = httpx.post(f"{server.url}/fine_tuning/jobs", json=body, headers={**headers(), "x-dry-run": "true"}).json()
    assert first == second and first["object"] == "fine_tuning.job.estimate"
    assert (
        first["examples"] == 40
        and first["steps"] > 1
        and first["tokens"] > 1000
        and first["queue"]
        == {
            "runs_waiting": 0,
            "runs_with_workers": 0,
            "place": 0,
            "waits_for": "",
            "estimated_start": int(server.world.clock().timestamp()),
            "estimated_finish": None,
        }
    )
    assert first["hyperparameters"] == {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert server.world.records.active() == [] and server.world.storage.folders("jobs") == []


class TwoSlots:
    """A cluster with two CPUs."""

    id = "cluster-1"
    grows = False
    free = 2.0

    def nodes(self) -> list[Node]:
        return [Node("n", {"CPU": 2.0}, {"CPU": self.free})]

    def may_grow_beyond(self) -> bool:
        return self.grows

    def node_name(self, node_id: str) -> str:
        return node_id


def run_with_workers(world: World, workers: int, seconds: float) -> None:
    """A run of the cluster that has workers for so long."""
    now = world.clock()
    run = RunFolder(world.storage, "other-1")
    holder = LeaseHolder(token="t", host="h", machine="m", pid=1, time=datetime.now(UTC))
    world.storage.write_json(f"{run.path}/lease.json", holder.model_dump(mode="json"))
    held = entry(
        "other-1",
        workers,
        driver="t",
        state="running",
        arrival=now,
        since=now,
        worker_resources={"CPU": 1.0},
        workers=workers,
        nodes={"n": workers},
        started=now,
        expected_end=now + timedelta(seconds=seconds),
    )
    world.storage.write_json(f"queue/clusters/cluster-1/{held.file}", held.model_dump(mode="json"))


def test_the_estimate_and_a_new_job_have_the_forecast_of_the_queue(server):
    jobs = Jobs(server.world.records, server.world.storage, server.settings, server.files, TwoSlots())
    owner = Tenant("root", "root", None, True)
    body = FineTuningJobRequest(model=BASE, training_file="file-train")
    start = int(server.world.clock().timestamp())
    free = jobs.estimate(owner, body)
    assert (free["queue"]["place"], free["queue"]["estimated_start"]) == (0, start)
    run_with_workers(server.world, 2, seconds=600)
    busy = jobs.estimate(owner, body)["queue"]
    assert (busy["place"], busy["estimated_start"]) == (1, start + 600) and busy["runs_with_workers"] == 1
    assert busy["waits_for"] == "room for 1 worker with 1 CPU; there is room for 0; running: other-1 (2 workers)"
    job = jobs.create(owner, body)
    assert job.waiting["estimated_start"] == start + 600
    assert any(message.startswith("Place 1 in the queue") for message in server.world.messages(job))
    server.world.clock.forward(1)
    second = jobs.estimate(owner, body)["queue"]  # the job above comes first, although its driver is not there yet
    assert (second["place"], second["runs_waiting"]) == (2, 1)


def test_a_run_that_the_cluster_has_no_room_for_is_announced(server):
    cluster = TwoSlots()
    jobs = Jobs(server.world.records, server.world.storage, server.settings, server.files, cluster)
    server.settings.fine_tuning.templates[BASE]["parallel"]["num_workers"] = 4
    owner = Tenant("root", "root", None, True)
    body = FineTuningJobRequest(model=BASE, training_file="file-train")
    assert "The run needs 4 workers, and the cluster has room for 2" in jobs.estimate(owner, body)["warnings"][-1]
    assert any("needs 4 workers" in message for message in server.world.messages(jobs.create(owner, body)))
    cluster.grows = True
    assert not any("needs 4 workers" in warning for warning in jobs.estimate(owner, body)["warnings"])


def test_a_waiting_job_says_what_it_waits_for_and_how_long(server):
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    assert job.to_dict()["waiting"]["waits_for"] == "the check of its files"
    server.world.until(server.world.records.find(job.id), "queued")
    waiting = {"place": 3, "waits_for": "room for 2 workers", "estimated_start": 1_800_000_000}
    server.world.records.change(server.world.records.find(job.id), waiting=waiting)
    server.world.clock.forward(720)
    job = server.client.fine_tuning.jobs.retrieve(job.id)
    since = int(server.world.records.find(job.id).since.timestamp())
    assert job.to_dict()["waiting"] == {**waiting, "since": since}
    assert job.to_dict()["status_details"] == (
        "Place 3 in the queue. Waits for room for 2 workers; for 12m00s so far. Expected to start at 2027-01-15 08:00 "
        "UTC."
    )
    server.client.fine_tuning.jobs.pause(job.id)
    assert server.client.fine_tuning.jobs.retrieve(job.id).to_dict()["status_details"] is None


def test_jobs_are_listed_newest_first_by_pages_and_metadata(server):
    ids = []
    for number in range(5):
        server.world.clock.forward(1)
        created = server.client.fine_tuning.jobs.create(
            model=BASE, training_file="file-train", metadata={"team": "ab"[number % 2]}, suffix=str(number)
        )
        ids.append(created.id)
    assert [job.id for job in server.client.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    assert [job.id for job in server.client.fine_tuning.jobs.list(limit=1, metadata={"team": "b"})] == [ids[3], ids[1]]
    page = server.client.fine_tuning.jobs.list(limit=2)
    assert page.has_more and len(page.data) == 2
    with pytest.raises(openai.BadRequestError, match="after"):
        server.client.fine_tuning.jobs.list(after="ftjob-none")
    for limit in (0, 1001, "x"):
        answer = httpx.get(f"{server.url}/fine_tuning/jobs", params={"limit": limit}, headers=headers())
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "limit"


@pytest.mark.parametrize("call", ["retrieve", "cancel", "pause", "resume", "list_events"])
def test_an_unknown_job_is_not_found(server, call):
    for name in ("ftjob-none", "../../etc", "ｊｏｂ"):
        with pytest.raises(openai.NotFoundError):
            getattr(server.client.fine_tuning.jobs, call)(name)


def test_a_key_sees_its_own_jobs_only_and_an_admin_sees_all(server):
    anna, bert = (
        server.client.with_options(api_key=create_key(server.world.engine, name)[0]) for name in ("anna", "bert")
    )
    job = anna.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    other = bert.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    assert job.id != other.id  # the same body of another key is another job
    assert [one.id for one in anna.fine_tuning.jobs.list()] == [job.id]
    assert {one.id for one in server.client.fine_tuning.jobs.list()} == {job.id, other.id}
    for call in ("retrieve", "cancel", "pause", "resume", "list_events"):
        with pytest.raises(openai.NotFoundError):
            getattr(bert.fine_tuning.jobs, call)(job.id)
    with pytest.raises(openai.NotFoundError):
        bert.fine_tuning.jobs.checkpoints.list(job.id)
    with pytest.raises(openai.BadRequestError):
        bert.fine_tuning.jobs.list(after=job.id)
    assert anna.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    keys = (create_key(server.world.engine, name, organization="acme")[0] for name in ("carl", "dora"))
    carl, dora = (server.client.with_options(api_key=key) for key in keys)
    shared = carl.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    assert dora.fine_tuning.jobs.retrieve(shared.id).organization_id == "acme"
    assert [one.id for one in dora.fine_tuning.jobs.list()] == [shared.id]


def test_a_key_fine_tunes_only_the_models_that_it_may_use(server):
    key, _ = create_key(server.world.engine, "limited", models=("other-*",))
    limited = server.client.with_options(api_key=key)
    with pytest.raises(openai.PermissionDeniedError) as refused:
        limited.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    assert refused.value.code == "model_not_allowed"
    assert server.world.records.active() == []


def test_the_settings_of_wandb_reach_the_run(server, monkeypatch):
    monkeypatch.setattr("serve.fine_tuning.checks.tracker_problems", lambda *_: [])
    integration = {"type": "wandb", "wandb": {"project": "mine", "entity": "acme", "tags": ["a"]}}
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train", integrations=[integration])
    assert job.integrations[0].wandb.project == "mine" and job.integrations[0].wandb.entity == "acme"
    found = server.world.records.find(job.id)
    assert found.resolved["spec"]["report"] == {
        "samples": 0,
        "trackers": ["wandb"],
        "project": "mine",
        "entity": "acme",
        "tags": ["a"],
    }


# -- wishes, in every state ------------------------------------------------------------------------------------------

ANSWERS = {
    # state and wish: (cancel, pause, resume); a text is part of a refusal
    ("validating_files", None): ("cancelled", "paused", "only a paused job"),
    ("queued", None): ("cancelled", "paused", "only a paused job"),
    ("submitted", None): ("queued", "queued", "only a paused job"),
    ("running", None): ("running", "running", "only a paused job"),
    ("running", "pause"): ("running", "running", "still being paused"),
    ("running", "cancel"): ("running", "is being cancelled", "only a paused job"),
    ("paused", None): ("cancelled", "is paused already", "queued"),
    ("succeeded", None): ("has succeeded already", "has succeeded already", "only a paused job"),
    ("failed", None): ("has failed already", "has failed already", "only a paused job"),
    ("cancelled", None): ("has been cancelled already", "has been cancelled already", "only a paused job"),
}


def bring_to(server: Server, state: str, wish: str | None) -> str:
    server.settings.fine_tuning.__dict__["checked_mib"] = 0  # the world's own check is quicker
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file="file-train")
    world = server.world
    found = world.records.find(job.id)
    controller = world.controller()
    if state == "failed":
        world.ray.finishes = "failed"
    if state in ("queued", "submitted"):
        world.until(found, "queued", controller)
        if state == "submitted":
            controller.step()
    elif state in ("paused", "cancelled"):
        world.until(found, "running", controller)
        world.wish(found, state.removesuffix("d").removesuffix("le") if state == "paused" else "cancel")
        world.until(found, state, controller)
    elif state != "validating_files":
        world.until(found, state, controller)
    if wish is not None:
        world.wish(found, wish)
    controller.release()
    return job.id


@pytest.mark.parametrize("number", range(3), ids=["cancel", "pause", "resume"])
@pytest.mark.parametrize(("state", "wish"), ANSWERS)
def test_a_wish_is_granted_or_refused_in_every_state(server, state, wish, number):
    job_id = bring_to(server, state, wish)
    expected = ANSWERS[state, wish][number]
    call = [
        server.client.fine_tuning.jobs.cancel,
        server.client.fine_tuning.jobs.pause,
        server.client.fine_tuning.jobs.resume,
    ][number]
    if " " in expected:
        with pytest.raises(openai.BadRequestError) as refused:
            call(job_id)
        assert refused.value.code == "invalid_job_state" and expected in refused.value.message
        return
    assert call(job_id).status == expected
    job = server.world.records.find(job_id)
    if number == 0:
        assert server.world.until(job, "cancelled").finished is not None
    elif number == 1:
        assert server.world.until(job, "paused").wish is None
    else:
        server.world.until(job, "succeeded")
    assert len(set(server.world.ray.submitted)) == len(server.world.ray.submitted)


# -- events ----------------------------------------------------------------------------------------------------------


def test_events_are_paged_newest_first(server):
    job_id = bring_to(server, "succeeded", None)
    listed = list(server.client.fine_tuning.jobs.list_events(job_id, limit=3))
    assert listed[0].message == "The job has successfully completed"
    assert [event.message for event in reversed(listed)] == server.world.messages(server.world.records.find(job_id))
    metrics = [event.data for event in listed if event.type == "metrics"]
    assert [data["step"] for data in metrics] == [4, 3, 2, 1] and metrics[0]["valid_loss"] == 1.5
    checkpoints = list(server.client.fine_tuning.jobs.checkpoints.list(job_id))
    assert [one.step_number for one in checkpoints] == [4, 2]
    assert checkpoints[0].metrics.full_valid_loss == 1.5 and checkpoints[0].fine_tuning_job_id == job_id
    job = server.client.fine_tuning.jobs.retrieve(job_id)
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-4"
    assert job.result_files == [f"file-{job_id[6:]}"] and job.trained_tokens == 40


def stream(server: Server, job_id: str, **more: str) -> list[str]:
    url = f"{server.url}/fine_tuning/jobs/{job_id}/events"
    answer = httpx.get(url, params={"stream": "true"}, headers={**headers(), **more}, timeout=20)
    assert answer.status_code == 200, answer.text
    return [part for part in answer.text.split("\n\n") if part and not part.startswith(":")]


def test_a_stream_of_events_goes_on_after_the_last_event_id(server):
    job_id = bring_to(server, "succeeded", None)
    parts = stream(server, job_id)
    assert parts[-1] == "data: [DONE]"
    ids = [part.partition("\n")[0].removeprefix("id: ") for part in parts[:-1]]
    bodies = [json.loads(part.partition("data: ")[2]) for part in parts[:-1]]
    assert [body["id"] for body in bodies] == ids
    assert [body["message"] for body in bodies] == server.world.messages(server.world.records.find(job_id))
    assert stream(server, job_id, **{"last-event-id": ids[2]}) == parts[3:]
    unknown = httpx.get(
        f"{server.url}/fine_tuning/jobs/{job_id}/events",
        headers={**headers(), "accept": "text/event-stream", "last-event-id": "ftevent-none"},
    )
    assert unknown.status_code == 400
