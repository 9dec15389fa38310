"""Secrets are planted wherever one can be: a run, its server, a job and their tools leave none of them anywhere.

The nodes have them in their environment, as the nodes of a cluster do. Everything that is written is searched: storage,
the database, the logs of Ray and Ray Serve, trackers; and so is all that is printed or answered.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve
from typer.testing import CliRunner

from examples.quickstart.quickstart import free_ports
from ft_service.cli.app import app
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from serve.app import build_app
from serve.settings import ServeSettings
from tests.hosts import QUICK_HEALTH_CHECKS, START_SECONDS, Cluster, Host, wait_for
from tests.serve.fine_tuning.test_jobs import chat_records
from tests.serve.fine_tuning.test_webhooks import receiver
from tests.serve.postgres import postgres
from tests.shared_cluster import OFTEN, answers, joined
from tests.worlds import SMALL, write_world

pytestmark = pytest.mark.cluster

HEAD = Host("head", "127.0.0.1", 2)
BASE = "tiny"
JOB_SECONDS = 300
TRACKERS = ["tensorboard", "wandb", "mlflow"]
IN_THE_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "FT_API_KEY",
    "FT_WEBHOOK_SECRET",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
)
ELSEWHERE = ("password of the database", "password of a webhook", "password of a source", "wrong key", "prompt")


def planted() -> dict[str, str]:
    """Random, so that this file, which jobs upload, has none of them."""
    return {name: f"c4nary{secrets.token_hex(10)}" for name in (*IN_THE_ENVIRONMENT, *ELSEWHERE)}


@dataclass
class Left:
    """What was left behind: the folders of all files, and what was printed and answered, by its origin."""

    secrets: Mapping[str, str]
    folders: list[Path]
    outputs: dict[str, str] = field(default_factory=dict)

    def places_of(self, secret: str) -> list[str]:
        return [*(name for name, text in self.outputs.items() if secret in text), *self._files_with(secret.encode())]

    def files(self) -> Iterator[Path]:
        for folder in self.folders:
            yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())

    def _files_with(self, secret: bytes) -> Iterator[str]:
        for path in self.files():
            with suppress(FileNotFoundError):  # Ray and Postgres go on writing
                if secret in path.read_bytes():
                    yield str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 60, sizes=SMALL)
    for name in ("storage", "home"):
        (folder / name).mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, chat_records(folder, 40, 0))))
    return folder


@pytest.fixture(scope="module")
def left(world: Path) -> Iterator[Left]:
    """Of a server with Postgres, a job over HTTP that trains, publishes and answers, and the commands about them."""
    canaries = planted()
    with postgres() as database, receiver() as (hook, received):
        url = database.new_database("ft").replace("postgres@", f"postgres:{canaries['password of the database']}@")
        settings = {name: canaries[name] for name in IN_THE_ENVIRONMENT}
        settings |= {"FT_DATABASE_URL": url, "HOME": str(world / "home"), "WANDB_MODE": "offline"}
        with Cluster(world, HEAD, {**QUICK_HEALTH_CHECKS, **OFTEN, **settings}) as cluster:
            cluster.start(HEAD)
            wait_for(lambda: answers(cluster), START_SECONDS)
            found = Left(canaries, [world, cluster.sessions, database.folder])
            found.secrets = {**canaries, "Ray's token": cluster.environment["RAY_AUTH_TOKEN"]}
            hook = hook.replace("://", f"://user:{canaries['password of a webhook']}@")
            with pytest.MonkeyPatch.context() as patch, joined(cluster):
                for name, value in settings.items():
                    patch.setenv(name, value)
                use(found, cluster, world, hook)
                wait_for(lambda: bool(received), JOB_SECONDS)
            yield found


def use(found: Left, cluster: Cluster, world: Path, hook: str) -> None:
    """Everything that somebody does with a server; a key made by `ft keys create` becomes a secret, too."""
    (port,) = free_ports(1)
    server = f"http://127.0.0.1:{port}"
    commands = CliRunner(env={"FT_SERVER": server, "FT_STORAGE": str(world / "storage"), "COLUMNS": "400"})

    def ft(command: str, *arguments: str, exit_code: int = 0) -> str:
        done = commands.invoke(app, [*command.split(), *arguments])
        assert done.exit_code == exit_code, f"{command}: {done.output}{done.exception!r}"
        return f"{done.output}{done.exception or ''}"

    made = json.loads(ft("keys create team --json"))
    found.secrets = {**found.secrets, "a key of ft keys": made["key"]}
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build_app(server_settings(world, cluster, hook)))
        client: Any = openai.OpenAI(base_url=f"{server}/v1", api_key=made["key"], max_retries=2, timeout=60)
        training = client.files.create(file=(world / "train.jsonl").open("rb"), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=BASE, training_file=training.id, suffix="desk", hyperparameters={"n_epochs": 2}
        )
        wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), JOB_SECONDS)
        done = client.fine_tuning.jobs.retrieve(job.id)
        assert done.status == "succeeded", done.error
        messages = [{"role": "user", "content": found.secrets["prompt"]}]
        for model in (BASE, done.fine_tuned_model):
            assert client.chat.completions.create(model=model, messages=messages, max_tokens=4).usage
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key=found.secrets["wrong key"]).models.list()
        found.outputs["a wrong key"] = str(refused.value)
        for path in (
            "/v1/models",
            "/v1/fine_tuning/jobs",
            f"/v1/fine_tuning/jobs/{job.id}/events",
            "/jobs",
        ):
            answer = httpx.get(server + path, headers={"Authorization": f"Bearer {made['key']}"}, trust_env=False)
            assert answer.is_success, answer.text
            found.outputs[path] = answer.text
        run = RunFolder(Storage(str(world / "storage")), f"desk-{job.id[6:18]}")
        status = run.recorded_status()
        assert status is not None and status.published
        for command in ("runs --json", f"show {run.run_id}", f"logs {run.run_id}", "adapters --json", "du", "queue"):
            found.outputs[f"ft {command}"] = ft(command)
        for command in (
            f"adapters page {status.published}",
            f"jobs show {job.id}",
            "keys list --json",
            "keys log",
            f"top --once --url {server}",
        ):
            found.outputs[f"ft {command}"] = ft(command)
        source = f"https://user:{found.secrets['password of a source']}@example.com/records"
        (world / "spec.yaml").write_text(run_file(run))
        train = ft("train", str(world / "spec.yaml"), f"data.train.0.source={source}", exit_code=1)
        assert "contains credentials" in train
        found.outputs["ft train"] = train
        found.outputs["ft doctor"] = commands.invoke(app, ["doctor", "--json"]).output
        ask_ray(found, cluster)
    finally:
        serve.shutdown()


def run_file(run: RunFolder) -> str:
    return run.storage.read_bytes(f"{run.path}/spec.yaml").decode()


def ask_ray(found: Left, cluster: Cluster) -> None:
    """What the dashboard shows to whoever has the token."""
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    for path in (
        "/api/jobs/",
        "/api/serve/applications/",
        "/api/v0/actors?detail=1",
        "/api/v0/tasks?detail=1",
        "/nodes?view=summary",
    ):
        answer = httpx.get(cluster.dashboard + path, headers=headers, trust_env=False, timeout=60)
        assert answer.is_success, f"{path}: {answer.text}"
        found.outputs[f"Ray {path}"] = answer.text
    (node,) = ray.nodes()

    def metrics() -> str:
        return httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", trust_env=False).text

    wait_for(lambda: "ray_ft_serve_" in metrics(), START_SECONDS)
    found.outputs["metrics"] = metrics()


def server_settings(world: Path, cluster: Cluster, hook: str) -> ServeSettings:
    """Key, database and the webhook's secret come from the environment."""
    template = {
        "method": {"type": "lora", "lora_rank": 4},
        "data": {"max_seq_len": 128},
        "train": {"learning_rate": 1e-2, "precision": "fp32"},
        "parallel": {"use_gpu": False},
        "report": {"samples": 1, "trackers": TRACKERS},
    }
    base = {"base": str(world / "base"), "name": BASE, "dtype": "float32", "cpus": 0, "max_batch": 4, "cache_gib": 0.1}
    return ServeSettings.model_validate(
        {
            "storage": str(world / "storage"),
            "bases": [base],
            "fine_tuning": {
                "templates": {BASE: template},
                "ray_address": cluster.dashboard,
                "webhooks": [{"url": hook}],
                "private_webhooks": True,
            },
        }
    )


def test_everything_that_could_hold_a_secret_was_written(left: Left, world: Path) -> None:
    names = [str(path) for path in left.files()]
    for part in ("spec.yaml", "plan.json", "record.json", "README.md", "report.html", "metrics.jsonl", "events.jsonl"):
        assert any(name.endswith(part) for name in names), part
    for part in (
        "/tensorboard/",
        "/wandb/offline-run",
        "/mlflow/",
        "/scorecards/",
        "/logs/serve/",
        "/logs/job-driver-",
    ):
        assert any(part in name for name in names), part
    assert "/v1/chat/completions" in "".join(path.read_text() for path in left.files() if "/logs/serve/" in str(path))


@pytest.mark.parametrize("name", [*IN_THE_ENVIRONMENT, *ELSEWHERE, "Ray's token", "a key of ft keys"])
def test_a_secret_is_in_nothing_that_is_left(left: Left, name: str) -> None:
    places = left.places_of(left.secrets[name])
    if name == "password of a webhook":  # which is part of its address, by which a job's calls are queued
        places = [place for place in places if "/data/base/" not in place and "/data/pg_wal/" not in place]
    assert places == []
