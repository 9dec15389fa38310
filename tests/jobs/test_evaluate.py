"""`jobs/evaluate.py` on a real Ray cluster: it starts a server there, asks it, and leaves nothing behind."""

import json
import subprocess
from pathlib import Path

import pytest

from ft_service.evaluate.scorecard import read_scorecard
from ft_service.storage.storage import Storage
from tests.hosts import ROOT, Cluster
from tests.serve.serving_world import PROMPT, make_world

pytestmark = pytest.mark.cluster

JOB_SECONDS = 300
STILL_SERVING = """
import ray
from ray import serve
ray.init(log_to_driver=False)
print("applications:", sorted(serve.status().applications))
"""


def run(cluster: Cluster, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=JOB_SECONDS, check=False
    )


def test_a_submitted_evaluation_starts_a_server_and_stops_it(cluster: Cluster, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    item = {"id": "a", "skill": "cities", "prompt": PROMPT, "metric": "f1", "reference": "日本", "max_tokens": 8}
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    (tmp_path / "suite.yaml").write_text("name: cities\nitems: [items.jsonl]\n")
    adapter = world.adapters[0]
    command = ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--"]
    command += ["python", "jobs/evaluate.py", adapter.id, "--suite", str(tmp_path / "suite.yaml")]
    done = run(cluster, *command, "--storage", world.storage)
    assert done.returncode == 0, (done.stderr + done.stdout)[-4000:]
    assert "Answers on storage, questions: 4 of 4" in done.stdout
    assert "Not settled" in done.stdout
    card = read_scorecard(Storage(world.storage), adapter.id)
    assert card is not None
    evaluation = card.evaluations["cities"]
    assert evaluation.is_complete
    assert evaluation.adapter.digest == adapter.digest
    left = run(cluster, "python", "-c", STILL_SERVING)
    assert "applications: []" in left.stdout, left.stderr[-2000:]
