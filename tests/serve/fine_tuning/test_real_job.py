"""The whole life of a job: Ray Serve, its controller, a Ray cluster that trains, and the stock `openai` client."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from ray import serve
from ray.serve.context import _get_global_client

from examples.quickstart.quickstart import free_ports
from ft_service.cluster.submit import Submissions
from ft_service.registry.registry import Registry
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from serve.app import build_app
from serve.database.database import open_database
from serve.database.keys import create_key
from serve.model_apps import ServeApps, application_of
from serve.replica import make_engine
from serve.settings import ServeSettings
from tests.hosts import Cluster, wait_for
from tests.serve.fine_tuning.test_jobs import chat_records
from tests.shared_cluster import joined
from tests.worlds import SMALL, write_world

pytestmark = pytest.mark.cluster

KEY = "a-key-of-this-test"
BASE = "tiny"
WHOLE = "tiny-whole"
"""The same base, whose jobs train all weights."""
HUGE = "tiny-huge"
"""Likewise, with more CPUs for each replica than a node has."""
JOB_SECONDS = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 60, sizes=SMALL)
    (folder / "storage").mkdir()
    for name, count, seed in (("train", 60, 0), ("valid", 20, 3)):
        lines = map(json.dumps, chat_records(folder, count, seed))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def other_key(world: Path) -> str:
    """A key of another team, made before the server writes to the database."""
    key, _ = create_key(open_database(f"sqlite:///{world}/service.db"), "another-team")
    return key


@pytest.fixture(scope="module")
def client(world: Path, other_key: str, cluster: Cluster) -> Iterator[openai.OpenAI]:
    template = {
        "method": {"type": "lora", "lora_rank": 4},
        "data": {"max_seq_len": 128},
        "train": {"learning_rate": 1e-2, "precision": "fp32"},
        "parallel": {"use_gpu": False},
        "report": {"samples": 0},
    }
    full = {**template, "method": {"type": "full"}}
    base = {"base": str(world / "base"), "name": BASE, "dtype": "float32", "cpus": 0, "max_batch": 4, "cache_gib": 0.1}
    settings = ServeSettings.model_validate(
        {
            "storage": str(world / "storage"),
            "database": f"sqlite:///{world}/service.db",
            "api_key": KEY,
            "bases": [
                base,
                {**base, "name": WHOLE, "autoscaling": {"max_replicas": 1}},
                {**base, "name": HUGE, "autoscaling": {"max_replicas": 1}, "cpus": 64},
            ],
            "fine_tuning": {
                "templates": {BASE: template, WHOLE: full, HUGE: full},
                "ray_address": cluster.dashboard,
            },
        }
    )
    with joined(cluster):
        (port,) = free_ports(1)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        try:
            serve.run(build_app(settings))
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=2, timeout=60)
        finally:
            serve.shutdown()


@serve.deployment
class Anything:
    """A replica that no node can have."""


@pytest.fixture(scope="module")
def unplaced(client: openai.OpenAI) -> ServeApps:
    """The applications of another server, whose only model needs more than a node has."""
    model = Anything.options(ray_actor_options={"num_cpus": 1000}).bind()
    serve._run(model, _blocking=False, name=application_of("other", "model"), route_prefix=None)
    return ServeApps("other", ServeSettings(), make_engine)


def upload(client: openai.OpenAI, file: Path) -> str:
    return client.files.create(file=file.open("rb"), purpose="fine-tune").id


def wait(client: openai.OpenAI, job_id: str, *states: str) -> FineTuningJob:
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in (*states, "failed"):
            return job
        time.sleep(0.5)
    events = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    raise AssertionError(f"{job.status} after {JOB_SECONDS} s: {events}")


def test_upload_create_pause_resume_wait_and_chat(client, world, cluster, unplaced):
    training = upload(client, world / "train.jsonl")
    validation = upload(client, world / "valid.jsonl")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=training,
        validation_file=validation,
        suffix="last-words",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 20, "batch_size": 4}}},
    )
    client.files.delete(training)  # the job has a link of its own
    wait(client, job.id, "running", "succeeded")
    client.fine_tuning.jobs.pause(job.id)
    assert wait(client, job.id, "paused", "succeeded").status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    done = wait(client, job.id, "succeeded")
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model == f"ft:{BASE}:ft:last-words:{job.id[6:14]}" and done.trained_tokens > 0
    messages = [{"role": "user", "content": "Last word of: one two tree"}]
    answer = client.chat.completions.create(model=done.fine_tuned_model, messages=messages, max_tokens=8)
    assert answer.model == done.fine_tuned_model and answer.usage.completion_tokens > 0
    entry = client.models.retrieve(done.fine_tuned_model)
    assert entry.id == done.fine_tuned_model and entry.parent == BASE
    assert {done.fine_tuned_model, entry.root} <= {model.id for model in client.models.list()}
    storage = Storage(str(world / "storage"))
    run = RunFolder(storage, f"last-words-{job.id[6:18]}")
    assert run.recorded_status().published == entry.root
    plan = run.plan()
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert len(checkpoints) >= 3
    assert {one.step_number for one in checkpoints} >= {one.step for one in run.epoch_adapters()}
    first = client.completions.create(model=checkpoints[-1].fine_tuned_model_checkpoint, prompt="one two", max_tokens=2)
    assert first.usage.completion_tokens > 0
    lines = client.files.content(done.result_files[0]).text.splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, plan.num_steps + 1))
    assert all(0 <= float(line.split(",")[2]) <= 1 for line in lines[1:])
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=50))
    steps = [event.data["step"] for event in reversed(events) if event.type == "metrics"]
    assert steps == list(range(1, plan.num_steps + 1))
    assert len([name for name in storage.folders("runs") if name.startswith("last-words")]) == 1
    submissions = Submissions(cluster.dashboard)
    assert submissions.find(f"{run.run_id}.9").state == "unknown"
    submissions.stop(f"{run.run_id}.9")
    submissions.submit(run.run_id, storage.root, f"{run.run_id}.1")  # which Ray has already
    assert not submissions.find(f"{run.run_id}.1").is_alive
    assert client.models.delete(done.fine_tuned_model).deleted
    assert Registry(storage).find(entry.root) is None
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=done.fine_tuned_model, messages=messages)


def estimate(client: openai.OpenAI, model: str, training: str) -> Any:
    body = {"model": model, "training_file": training}
    return client.post("/fine_tuning/jobs/estimate", body=body, cast_to=object)


def test_running_jobs_are_in_the_forecast_of_the_next_one_and_free_their_workers_when_they_are_cancelled(client, world):
    training = upload(client, world / "train.jsonl")
    before = time.time()
    free = estimate(client, BASE, training)["queue"]
    assert (free["place"], free["waits_for"], free["runs_with_workers"]) == (0, "", 0)
    assert before - 60 <= free["estimated_start"] <= time.time() + 60
    jobs = [
        client.fine_tuning.jobs.create(
            model=BASE,
            training_file=training,
            suffix=f"long-{number}",
            hyperparameters={"n_epochs": 50, "batch_size": 1},
        )
        for number in range(2)  # one for each node
    ]
    for job in jobs:
        wait(client, job.id, "running")
    busy = estimate(client, BASE, training)["queue"]
    assert (busy["place"], busy["runs_with_workers"]) == (1, 2)
    assert busy["estimated_start"] is None  # the nodes of a cluster that `ray_address` names are unknown here
    for job in jobs:
        client.fine_tuning.jobs.cancel(job.id)
    for job in jobs:
        assert wait(client, job.id, "cancelled").status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="has been cancelled already"):
            client.fine_tuning.jobs.cancel(job.id)


def test_a_full_job_whose_model_no_node_can_hold_is_refused_by_estimate_and_creation(client, world):
    training = upload(client, world / "train.jsonl")
    for ask in (estimate, lambda client, model, file: client.fine_tuning.jobs.create(model=model, training_file=file)):
        with pytest.raises(
            openai.BadRequestError, match=r"no node has room for its replica .0 GPUs and 64 CPUs"
        ) as refused:
            ask(client, HUGE, training)
        assert (refused.value.code, refused.value.param) == ("cannot_be_served", "model")
    assert HUGE not in {job.model for job in client.fine_tuning.jobs.list()}


def test_a_model_that_waits_for_a_node_is_seen_in_what_serve_says_of_it(unplaced):
    wait_for(lambda: unplaced.deployed()["model"].is_unplaced, 120)
    assert unplaced.deployed()["model"].problem == ""


def replicas_of(app: str) -> set[str]:
    """Actor ids of an application's running replicas."""
    details = _get_global_client().get_serve_details()["applications"].get(app, {})
    replicas = [one for each in details.get("deployments", {}).values() for one in each["replicas"]]
    return {one["actor_id"] for one in replicas if one["state"] == "RUNNING"}


def test_the_model_of_a_full_job_becomes_a_base_that_survives_restarts_and_goes_when_it_is_deleted(
    client, world, other_key
):
    job = client.fine_tuning.jobs.create(
        model=WHOLE,
        training_file=upload(client, world / "train.jsonl"),
        suffix="all",
        hyperparameters={"n_epochs": 2},
    )
    done = wait(client, job.id, "succeeded")
    assert done.status == "succeeded", done.error
    name = done.fine_tuned_model
    messages = [{"role": "user", "content": "Last word of: one two tree"}]
    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=8)
    assert answer.model == name and answer.usage.completion_tokens > 0
    entry = client.models.retrieve(name)
    storage = Storage(str(world / "storage"))
    record = Registry(storage).find(entry.root)
    assert (record.kind, entry.parent, entry.digest) == ("model", WHOLE, record.digest)
    assert entry.base_fingerprint != client.models.retrieve(WHOLE).base_fingerprint
    assert {name, record.id} <= {model.id for model in client.models.list()}
    (final,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert client.models.retrieve(final.fine_tuned_model_checkpoint).root == record.id

    stranger = client.with_options(api_key=other_key)
    assert not {name, record.id} & {model.id for model in stranger.models.list()}
    for unseen in (name, record.id):
        with pytest.raises(openai.NotFoundError):
            stranger.chat.completions.create(model=unseen, messages=messages)

    app = application_of("default", record.id)
    before = replicas_of(app)
    # As a cluster that starts anew has none. A blocking call would wait for an application that is there again.
    serve.delete(app, _blocking=False)

    def another_replica_answers() -> bool:
        with suppress(openai.InternalServerError):  # 503 until the controller has deployed it again
            client.chat.completions.create(model=record.id, messages=messages, max_tokens=8)
        return bool(replicas_of(app) - before)

    wait_for(another_replica_answers, 120)
    wait_for(lambda: not replicas_of(app) & before, 60)
    assert client.chat.completions.create(model=record.id, messages=messages, max_tokens=8).usage is not None

    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=messages)
    wait_for(lambda: app not in serve.status().applications, 60)
    wait_for(lambda: not storage.exists(f"models/{record.id}"), 60)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
