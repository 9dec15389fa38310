"""Secrets of the environment reach no file and no output: a run with planted ones, and all that it leaves, searched."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from tests.faults import Driver
from tests.hosts import ROOT, Cluster
from tests.worlds import write_world

pytestmark = pytest.mark.cluster

RUN_SECONDS = 240
CANARIES = {
    name: f"c4nary-{name.lower().replace('_', '-')}-5d1f"
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "FT_API_KEY",
        "OPENAI_API_KEY",
    )
}
SPEC = """
name: canary
model: {{base: {world}/base}}
method: {{type: lora, lora_rank: 4}}
data:
  train: [{{path: {world}/train.jsonl, source: made up, license: CC0-1.0}}]
  validation: {{fraction: 0.2}}
  max_seq_len: 128
train: {{max_steps: 2, global_batch_size: 4, learning_rate: 1e-2, validate_every_steps: 2, precision: fp32}}
parallel: {{num_workers: 2, use_gpu: false, max_failures: 0}}
report: {{samples: 1, trackers: [tensorboard]}}
storage: {world}/storage
"""


def files_with(secret: str, folders: list[Path]) -> Iterator[str]:
    needle = secret.encode()
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and needle in path.read_bytes():
                yield str(path)


def run(cluster: Cluster, world: Path, run_id: str) -> Driver:
    spec = world / f"{run_id}.yaml"
    spec.write_text(SPEC.format(world=world))
    planted = copy.copy(cluster)
    planted.environment = cluster.environment | CANARIES
    return Driver(planted, spec, RunFolder(Storage(f"{world}/storage"), run_id), [], world / f"{run_id}.log")


def test_no_file_and_no_output_of_a_run_has_a_secret_of_the_environment(cluster: Cluster, tmp_path: Path) -> None:
    write_world(tmp_path)
    driver = run(cluster, tmp_path, "canary-1")
    try:
        driver.wait(RUN_SECONDS)
    finally:
        driver.end()
    environment = cluster.environment | CANARIES
    outputs = ""
    for command in (["show", "canary-1"], ["logs", "canary-1"], ["adapters", "--json"], ["doctor", "--json"]):
        arguments = [sys.executable, "-m", "ft_service.cli.app", *command, "--storage", f"{tmp_path}/storage"]
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs += done.stdout + done.stderr
    (record,) = (tmp_path / "storage/adapters").glob("*/record.json")
    assert (record.parent / "README.md").exists() and (tmp_path / "storage/runs/canary-1/report.html").exists()
    secrets = [*CANARIES.values(), cluster.environment["RAY_AUTH_TOKEN"]]
    assert [secret for secret in secrets if secret in outputs] == []
    for secret in secrets:
        assert list(files_with(secret, [tmp_path])) == []
    # Ray's own logs too; the raylets were started with the token, but without the canaries.
    for secret in secrets:
        assert list(files_with(secret, [path for path in cluster.sessions.rglob("logs") if path.is_dir()])) == []
