"""An evaluation as a Ray job: what it starts on the cluster ends with it, also when `ray job stop` kills it."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray import serve

from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from tests.hosts import ROOT, Cluster, wait_for
from tests.serve.serving_world import publish_adapter
from tests.shared_cluster import joined
from tests.worlds import SMALL, write_base

pytestmark = pytest.mark.cluster

SECONDS = 240
NUM_ITEMS = 2000
"""More than are answered before the job is stopped."""


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterRecord:
    write_base(tmp_path / "base", ["the quick brown fox"], 280, SMALL)
    return publish_adapter(Registry(Storage(str(tmp_path / "storage"))), tmp_path / "base", tmp_path / "adapter", 1)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    items = [
        {"id": f"i{number}", "skill": "words", "prompt": f"fox {number}", "metric": "f1", "reference": "fox"}
        for number in range(NUM_ITEMS)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({**item, "max_tokens": 8}) + "\n" for item in items))
    (tmp_path / "suite.yaml").write_text("name: words\nitems: [items.jsonl]\n")
    return tmp_path / "suite.yaml"


@dataclass
class Job:
    process: "subprocess.Popen[bytes]"
    log: Path


@pytest.fixture
def job(cluster: Cluster, adapter: AdapterRecord, suite: Path) -> Iterator[Job]:
    submit = ["ray", "job", "submit", "--address", cluster.dashboard, "--submission-id", "judging"]
    asked = [adapter.id, "--suite", str(suite), "--storage", str(suite.parent / "storage")]
    command = [*submit, "--working-dir", ".", "--", "python", "jobs/evaluate.py", *asked, "--concurrency", "2"]
    log = suite.parent / "job.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT)
    yield Job(process, log)
    process.kill()
    process.wait()


def test_ray_job_stop_leaves_no_application_and_keeps_the_answers(cluster: Cluster, suite: Path, job: Job) -> None:
    evaluations = suite.parent / "storage" / "evaluations"
    wait_for(lambda: bool(list(evaluations.glob("*/answers/*.jsonl"))), SECONDS, job.process, job.log)
    stop = ["ray", "job", "stop", "--address", cluster.dashboard, "judging"]
    stopped = subprocess.run(stop, env=cluster.environment, capture_output=True, text=True, timeout=SECONDS)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    with joined(cluster):
        wait_for(lambda: not serve.status().applications, SECONDS, log=job.log)
        serve.shutdown()
    (evaluation,) = evaluations.iterdir()
    assert not (evaluation / "evaluation.json").exists()  # it had not ended by itself
    answered = [line for piece in evaluation.glob("answers/*.jsonl") for line in piece.read_text().splitlines()]
    assert 0 < len(answered) < 2 * NUM_ITEMS
