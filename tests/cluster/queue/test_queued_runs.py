"""Runs that do not fit the cluster together, through jobs/train.py: one after the other, though a driver is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ft_service.runs.events import Queued, TrainingStarted, read_events
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from tests.hosts import ROOT, Cluster
from tests.worlds import SMALL, write_world

pytestmark = pytest.mark.cluster

SECONDS = 180
POLL_SECONDS = 0.2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, sizes=SMALL)
    (folder / "spec.yaml").write_text(f"""
name: words
model: {{base: {folder}/base}}
method: {{type: lora, lora_rank: 4}}
data: {{train: [{{path: {folder}/train.jsonl, source: made up, license: CC0-1.0}}], max_seq_len: 128}}
train: {{max_steps: 2, global_batch_size: 4, precision: fp32}}
parallel: {{num_workers: 2, use_gpu: false}}
report: {{samples: 0}}
storage: {folder}/storage
""")
    return folder


@contextmanager
def started(cluster: Cluster, world: Path, run_id: str, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """jobs/train.py as a driver that joins the cluster. It is killed when the block ends before it does."""
    command = [sys.executable, "jobs/train.py", str(world / "spec.yaml"), "--run-id", run_id, *overrides]
    log = world / f"{run_id}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
    try:
        yield process
    finally:
        kill_driver(world, run_id)
        process.wait(SECONDS)


def run_folder(world: Path, run_id: str) -> RunFolder:
    return RunFolder(Storage(str(world / "storage")), run_id)


def kill_driver(world: Path, run_id: str) -> None:
    holder = run_folder(world, run_id).lease_holder()
    if holder is not None:
        try:
            os.kill(holder.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def ft(world: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "ft_service.cli.app", *arguments, "--storage", str(world / "storage")]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def queue(world: Path) -> dict[str, dict[str, Any]]:
    return {item["run"]: item for item in json.loads(ft(world, "queue", "--json"))}


def wait_for(world: Path, is_time: Callable[[], bool], process: subprocess.Popen[str], run_id: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_time():
        log = (world / f"{run_id}.log").read_text()
        assert process.poll() is None, log[-3000:]
        assert time.monotonic() < deadline, log[-3000:]
        time.sleep(POLL_SECONDS)


def state(world: Path, run_id: str) -> str:
    status = run_folder(world, run_id).recorded_status()
    return "" if status is None else status.state


def test_runs_that_do_not_fit_together_take_turns(cluster: Cluster, world: Path) -> None:
    """One gives way to a higher priority and continues; one is stopped in the queue; a killed driver loses its turn."""
    low = ("queue.priority=low", "queue.preemptible=true", "train.max_steps=100000")
    with ExitStack() as stack:
        first = stack.enter_context(started(cluster, world, "first", *low))
        wait_for(world, lambda: state(world, "first") == "running", first, "first")
        second = stack.enter_context(started(cluster, world, "second"))
        assert second.wait(SECONDS) == 0, (world / "second.log").read_text()[-3000:]
        assert state(world, "second") == "succeeded" and first.poll() is None
        wait_for(world, lambda: len(trainings(world, "first")) == 2, first, "first")
        assert trainings(world, "first")[1].repeated == 0  # it had saved a checkpoint

        third = stack.enter_context(started(cluster, world, "third", "queue.priority=low"))
        wait_for(world, lambda: "Place 1 in the queue" in message(world, "third"), third, "third")
        fourth = stack.enter_context(started(cluster, world, "fourth", "queue.priority=low", "queue.owner=eve"))
        wait_for(world, lambda: "Place 1 in the queue" in message(world, "fourth"), fourth, "fourth")
        wait_for(world, lambda: "Place 2 in the queue" in message(world, "third"), third, "third")
        listed = queue(world)
        assert [listed[run]["state"] for run in ("first", "third", "fourth")] == ["running", "waiting", "waiting"]
        assert [listed[run]["place"] for run in ("first", "third", "fourth")] == [None, 2, 1]  # eve has used nothing
        assert (
            "room for 2 workers with 1 CPU each; there is room for 0; running: first (2 workers)"
            in listed["fourth"]["waits_for"]
        )
        ft(world, "stop", "fourth")
        assert fourth.wait(SECONDS) == 3 and state(world, "fourth") == "stopped"

        kill_driver(world, "first")
        assert third.wait(SECONDS) == 0, (world / "third.log").read_text()[-3000:]
        assert state(world, "third") == "succeeded"
    assert queue(world) == {}
    events = read_events(Storage(str(world / "storage")), "third")
    assert [event.place for event in events if isinstance(event, Queued)] == [1, 2, 1]
    used = json.loads(ft(world, "queue", "usage", "--json"))
    assert all(owner["gpu_hours"] > 0 for owner in used["owners"].values())


def trainings(world: Path, run_id: str) -> list[TrainingStarted]:
    events = read_events(Storage(str(world / "storage")), run_id)
    return [event for event in events if isinstance(event, TrainingStarted)]


def message(world: Path, run_id: str) -> str:
    status = run_folder(world, run_id).recorded_status()
    return "" if status is None else status.message
