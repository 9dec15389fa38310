"""A gateway is killed with SIGKILL between accepting a job and its submission; the stock client asks another one."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from examples.quickstart.quickstart import free_ports
from serve.fine_tuning.jobs import check_linked
from serve.fine_tuning.templates import with_templates_read
from serve.settings import ServeSettings
from tests.hosts import ROOT, wait_for
from tests.serve.fine_tuning.job_world import World, make_world
from tests.serve.fine_tuning.test_jobs import chat_records

pytestmark = pytest.mark.multiprocess

KEY = "a-key-of-this-test"
BASE = "tiny"
GATEWAY = """
import json, os, signal, sys
import uvicorn
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.fine_tuning.job_files import JobFolder
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import ServeSettings
from tests.serve.test_health import Idle

settings = ServeSettings.model_validate(json.loads(sys.argv[1]))
if sys.argv[3] == "killed":
    JobFolder.write_if_absent = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
models = ServedModels(Registry(Storage(settings.storage)), [load_base(one) for one in settings.bases])
uvicorn.run(create_api(models, {"tiny": Idle()}, settings), port=int(sys.argv[2]), log_level="warning")
"""
"""With `killed` it dies between the job's row and its file on storage."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def settings(world: World, base_folder: Path) -> dict[str, Any]:
    return {
        "storage": world.storage.root,
        "database": str(world.engine.url),
        "api_key": KEY,
        "bases": [{"base": str(base_folder), "name": BASE}],
        "fine_tuning": {"templates": {BASE: {"parallel": {"use_gpu": False}}}, "checked_mib": 0},
    }


@contextmanager
def gateway(
    settings: dict[str, Any], log: Path, *options: str
) -> Iterator[tuple["subprocess.Popen[bytes]", openai.OpenAI]]:
    """A process, and a client of it that does not repeat requests."""
    (port,) = free_ports(1)
    with log.open("ab") as output:
        command = [sys.executable, "-c", GATEWAY, json.dumps(settings), str(port), *(options or ["lives"])]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/v1/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    try:
        wait_for(answers, 120)
        yield process, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60)
    finally:
        process.kill()
        process.wait()


def test_a_job_outlives_the_gateway_that_accepted_it(world, settings, tmp_path):
    lines = "\n".join(map(json.dumps, chat_records(tmp_path, 40)))
    log = tmp_path / "gateway.log"
    with gateway(settings, log, "killed") as (process, client):
        training = client.files.create(file=("train.jsonl", lines.encode()), purpose="fine-tune").id
        with pytest.raises(openai.APIConnectionError):
            client.fine_tuning.jobs.create(model=BASE, training_file=training)
        assert process.wait() == -signal.SIGKILL
    (accepted,) = world.records.active()
    assert not world.storage.exists(f"jobs/{accepted.id}/job.json")

    with gateway(settings, log) as (process, client):
        again = client.fine_tuning.jobs.create(model=BASE, training_file=training)
        other = client.fine_tuning.jobs.create(model=BASE, training_file=training, suffix="other")
        assert again.id == accepted.id and other.status == "validating_files"
        process.kill()  # with the reply

    tuning = with_templates_read(ServeSettings.model_validate(settings)).fine_tuning
    world.check = lambda job: check_linked(job, world.storage, tuning)
    world.ray.epoch_adapters = ()  # both runs of this Ray would publish the same ones
    for job in world.records.active():
        world.until(job, "succeeded")
    assert len(world.ray.submitted) == len(set(world.ray.run_of.values())) == 2
    with gateway(settings, log) as (_, client):
        found = list(client.fine_tuning.jobs.list())
        assert {job.id: job.status for job in found} == {again.id: "succeeded", other.id: "succeeded"}
