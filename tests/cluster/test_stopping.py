"""Stopping a run on purpose and resuming it; a driver or a worker dies, and nothing is lost that was saved."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.events import read_events
from ft_service.runs.folder import RunFolder, State
from ft_service.runs.metrics import read_metrics
from ft_service.spec.load import load_run_spec
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints.manifest import Checkpoints
from ft_service.train.watchdog import ranks_without_stacks
from tests.hosts import ROOT, Cluster, Host
from tests.shared_cluster import OTHER
from tests.worlds import SMALL, prepare_run, work, write_world

pytestmark = pytest.mark.cluster

SECONDS = 240
STEPS = 60
HANG_SECONDS = 10

FT = (sys.executable, "-m", "ft_service.cli.app")
DRIVER = (
    sys.executable,
    "-c",
    """
from ft_service.runs import lease
from ft_service.train import attempts

for module, name, seconds in (
    (lease, "RENEW_SECONDS", 1.0),
    (attempts, "GROW_SECONDS", 0.5),
    (attempts, "_DRAIN_SECONDS", 0.5),
    (attempts, "SETTLE_SECONDS", 2.0),
):
    assert hasattr(module, name)
    setattr(module, name, seconds)

from ft_service.cli.app import main

main()
""",
)
"""`ft` as well, with a driver that looks around more often than one has to."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, sizes=SMALL)
    (folder / "spec.yaml").write_text(f"""
name: words
model: {{base: {folder}/base}}
method: {{type: lora, lora_rank: 4, lora_dropout: 0.1}}
data:
  train: [{{path: {folder}/train.jsonl, source: made up, license: CC0-1.0}}]
  validation: {{fraction: 0.2}}
  max_seq_len: 128
train:
  max_steps: {STEPS}
  global_batch_size: 4
  micro_batch_size: 1
  learning_rate: 1e-3
  validate_every_steps: 30
  precision: fp32
parallel: {{num_workers: 2, use_gpu: false}}
checkpoint: {{every_steps: 20}}
report: {{samples: 0}}
storage: {folder}/storage
""")
    return folder


@pytest.fixture
def folder_of(world: Path) -> Callable[[str], RunFolder]:
    return lambda run_id: RunFolder(Storage(str(world / "storage")), run_id)


def start(cluster: Cluster, *command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        list(command),
        cwd=ROOT,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", code: int) -> str:
    printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == code, printed[-5000:]
    return printed


def wait_until(is_time: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_time():
        assert process is None or process.poll() is None, process.communicate()[0][-5000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def held(run: RunFolder, rank: int = 1) -> Iterator[None]:
    """Meanwhile no step is finished."""
    pid = trainings(run)[-1]["workers"][rank]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def last_step(run: RunFolder) -> int:
    metrics = read_metrics(run.storage, run.run_id)
    return metrics[-1].step if metrics else 0


def is_past(run: RunFolder, step: int) -> Callable[[], bool]:
    return lambda: last_step(run) > step


def state(run: RunFolder) -> State | None:
    status = run.status()
    return None if status is None else status.state


def trainings(run: RunFolder) -> list[dict[str, Any]]:
    return [event.model_dump() for event in read_events(run.storage, run.run_id) if event.type == "training"]


def types_of(run: RunFolder) -> list[str]:
    """Of its events."""
    return [event.type for event in read_events(run.storage, run.run_id)]


def published(run: RunFolder) -> AdapterRecord:
    status = run.status()
    assert status is not None and status.state == "succeeded" and status.published is not None
    return Registry(run.storage).resolve(status.published)


def losses(run: RunFolder) -> list[float]:
    metrics = read_metrics(run.storage, run.run_id)
    assert [m.step for m in metrics] == list(range(1, STEPS + 1))  # no gap, no double entry
    return [m.loss for m in metrics]


def saved_step(run: RunFolder) -> int:
    return Checkpoints(run).entries()[-1].step


@pytest.fixture(scope="module")
def whole(cluster: Cluster, world: Path) -> RunFolder:
    """The run undisturbed."""
    finish(start(cluster, *DRIVER, "train", str(world / "spec.yaml"), "--run-id", "whole"), 0)
    return RunFolder(Storage(str(world / "storage")), "whole")


# -- one run that is stopped in every way, one after the other -------------------------------------------------------


@dataclass
class Stopped:
    """What was seen when a run had been stopped."""

    state: State | None
    message: str
    reached: int
    """The last step that was trained."""
    saved: int
    """The step of the newest checkpoint."""
    workers: list[int]
    """Process ids of the attempt that was stopped."""


@dataclass
class OftenStopped:
    """A run that `ray job stop`, `ft stop`, a second signal and the death of its driver ended, and its last attempt."""

    run: RunFolder
    by_job_stop: Stopped
    records_after_job_stop: list[AdapterRecord]
    by_ft_stop: Stopped
    said_by_ft_stop: list[str]
    """What the command and the driver printed."""
    listed: dict[str, Any]
    """The run in `ft runs --json`."""
    said_when_inactive: str
    """What another `ft stop` printed."""
    by_signals: Stopped
    said_to_another_training: str
    driver_killed: Stopped
    said_to_second_driver: str


def seen(run: RunFolder) -> Stopped:
    status = run.status()
    pids = [worker["pid"] for worker in trainings(run)[-1]["workers"]]
    return Stopped(state(run), status.message if status else "", last_step(run), saved_step(run), pids)


@pytest.fixture(scope="module")
def often_stopped(cluster: Cluster, world: Path, whole: RunFolder) -> OftenStopped:
    run = RunFolder(Storage(str(world / "storage")), "often-stopped")
    storage = ("--storage", run.storage.root)
    train = ("train", str(world / "spec.yaml"), "--run-id", run.run_id)

    submit = ["ray", "job", "submit", "--address", cluster.dashboard, "--submission-id", "job-1", "--working-dir", "."]
    job = start(cluster, *submit, "--", "python", "jobs/train.py", str(world / "spec.yaml"), "--run-id", run.run_id)
    wait_until(is_past(run, 12), job)
    with held(run):  # or the run could be through before the command has loaded its libraries
        stopping = start(cluster, "ray", "job", "stop", "--address", cluster.dashboard, "job-1")
        wait_until(lambda: state(run) == "stopping")
    finish(stopping, 0)
    job.communicate(timeout=SECONDS)
    wait_until(lambda: state(run) == "stopped")
    by_job_stop = seen(run)
    records = Registry(run.storage).records("adapter")

    training = start(cluster, *DRIVER, *train)
    wait_until(is_past(run, by_job_stop.reached + 3), training)
    with held(run):
        stopping = start(cluster, *FT, "stop", run.run_id, *storage)
        wait_until(lambda: state(run) == "stopping", training)
    said_by_ft_stop = [finish(stopping, 0), finish(training, 3)]
    by_ft_stop = seen(run)
    shown = json.loads(finish(start(cluster, *FT, "runs", *storage, "--json"), 0))
    said_when_inactive = finish(start(cluster, *FT, "stop", run.run_id, *storage), 2)

    training = start(cluster, *DRIVER, "resume", run.run_id, *storage)
    wait_until(lambda: last_step(run) > 42 and saved_step(run) == 40, training)
    os.kill(trainings(run)[-1]["workers"][1]["pid"], signal.SIGSTOP)  # the step under way will never be finished
    training.send_signal(signal.SIGINT)
    wait_until(lambda: state(run) == "stopping", training)
    training.send_signal(signal.SIGINT)
    assert "a second time" in finish(training, 3)
    by_signals = seen(run)
    changed = start(cluster, *DRIVER, "resume", run.run_id, "train.seed=5", *storage)
    said_to_another_training = finish(changed, 2)
    assert len(trainings(run)) == 3 and state(run) == "stopped"

    training = start(cluster, *DRIVER, *train)
    wait_until(lambda: len(trainings(run)) == 4 and last_step(run) > 46, training)
    os.kill(trainings(run)[-1]["workers"][1]["pid"], signal.SIGSTOP)  # it shall not end meanwhile
    said_to_second_driver = finish(start(cluster, *DRIVER, *train), 2)
    training.kill()
    training.communicate()
    driver_killed = seen(run)
    wait_until(lambda: are_gone(driver_killed.workers))  # Ray ends them with their driver
    driver_killed.reached = last_step(run)

    finish(start(cluster, *DRIVER, *train), 0)
    return OftenStopped(
        run=run,
        by_job_stop=by_job_stop,
        records_after_job_stop=records,
        by_ft_stop=by_ft_stop,
        said_by_ft_stop=said_by_ft_stop,
        listed=next(found for found in shown if found["run_id"] == run.run_id),
        said_when_inactive=said_when_inactive,
        by_signals=by_signals,
        said_to_another_training=said_to_another_training,
        driver_killed=driver_killed,
        said_to_second_driver=said_to_second_driver,
    )


def are_gone(pids: list[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_stopped_job_saves_and_resumes(often_stopped: OftenStopped, whole: RunFolder) -> None:
    stopped = often_stopped.by_job_stop
    assert stopped.state == "stopped"
    assert "SIGTERM" in stopped.message and f"ft resume {often_stopped.run.run_id}" in stopped.message
    assert 12 < stopped.reached < STEPS and stopped.saved == stopped.reached  # nothing of what was trained is lost
    assert often_stopped.records_after_job_stop == [published(whole)]  # nothing new is published
    first, second = trainings(often_stopped.run)[:2]
    assert (first["step"], second["step"]) == (0, stopped.reached)
    assert (first["repeated"], second["repeated"]) == (0, 0)


def test_ft_stop_waits_and_submitting_again_resumes(often_stopped: OftenStopped) -> None:
    stopped = often_stopped.by_ft_stop
    assert all("stopped: ft stop" in said for said in often_stopped.said_by_ft_stop)
    assert stopped.saved == stopped.reached < STEPS
    listed = often_stopped.listed
    assert (listed["state"], listed["attempts"], listed["wasted_steps"]) == ("stopped", 2, 0)
    assert "is not active" in often_stopped.said_when_inactive
    third = trainings(often_stopped.run)[2]
    assert (third["step"], third["repeated"]) == (stopped.reached, 0)


def test_a_second_signal_ends_the_run_at_once(often_stopped: OftenStopped) -> None:
    stopped = often_stopped.by_signals
    assert (stopped.state, stopped.saved) == ("stopped", 40)
    assert are_gone(stopped.workers)
    fourth = trainings(often_stopped.run)[3]
    assert (fourth["step"], fourth["repeated"]) == (40, stopped.reached - 40)


def test_a_run_id_with_another_training_is_rejected_early(often_stopped: OftenStopped) -> None:
    assert "train.seed = 5: is 0 in run often-stopped" in often_stopped.said_to_another_training


def test_another_driver_takes_over_from_a_killed_one(often_stopped: OftenStopped) -> None:
    assert "is working on it" in often_stopped.said_to_second_driver
    reached = often_stopped.driver_killed.reached
    fifth = trainings(often_stopped.run)[4]
    assert fifth["step"] == 40 and fifth["repeated"] == reached - 40


def test_a_run_stopped_in_every_way_ends_like_an_undisturbed_one(often_stopped: OftenStopped, whole: RunFolder) -> None:
    assert losses(often_stopped.run) == losses(whole)
    assert published(often_stopped.run).digest == published(whole).digest


# -- workers that die or hang ----------------------------------------------------------------------------------------


@dataclass
class Disturbed:
    """A run whose second worker was killed, and in the next attempt stopped, each time after a new checkpoint."""

    run: RunFolder
    hung: int
    """Process id of the stopped worker."""
    stopped_at: datetime
    has_ended: bool
    """Whether the stopped worker was gone when the run was complete."""


@pytest.fixture(scope="module")
def disturbed(cluster: Cluster, world: Path) -> Disturbed:
    run = RunFolder(Storage(str(world / "storage")), "disturbed")
    settings = ("checkpoint.every_steps=10", f"parallel.hang_timeout_seconds={HANG_SECONDS}")
    training = start(cluster, *DRIVER, "train", str(world / "spec.yaml"), "--run-id", run.run_id, *settings)
    wait_until(lambda: len(Checkpoints(run).entries()) >= 2, training)
    os.kill(trainings(run)[0]["workers"][1]["pid"], signal.SIGKILL)
    wait_until(lambda: len(trainings(run)) == 2, training)
    resumed = trainings(run)[1]
    wait_until(lambda: saved_step(run) > resumed["step"], training)
    hung = resumed["workers"][1]["pid"]
    os.kill(hung, signal.SIGSTOP)
    stopped_at = datetime.now(UTC)
    try:
        finish(training, 0)
        has_ended = not os.path.exists(f"/proc/{hung}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(hung, signal.SIGKILL)
    return Disturbed(run, hung, stopped_at, has_ended)


def test_a_killed_worker_repeats_only_unsaved_steps(disturbed: Disturbed) -> None:
    first, second, _ = trainings(disturbed.run)
    assert first["step"] == 0 and second["step"] >= 20 and second["step"] % 10 == 0
    assert 0 <= second["repeated"] < 2 * 10  # the checkpoint under way may be lost too
    assert types_of(disturbed.run).count("recovering") == 2


def test_a_hung_worker_repeats_only_unsaved_steps(disturbed: Disturbed) -> None:
    run = disturbed.run
    assert disturbed.has_ended
    noticed = next(event for event in read_events(run.storage, run.run_id) if event.type == "hang")
    reported = noticed.model_dump()
    assert noticed.time is not None
    assert reported["rank"] == 0 and (noticed.time - disturbed.stopped_at).total_seconds() < HANG_SECONDS + 5
    assert ranks_without_stacks(run, Path(reported["stacks"]).name, 2) == [1]
    assert "loop.py" in run.storage.read_bytes(f"{reported['stacks']}/rank-00000.txt").decode()
    _, second, third = trainings(run)
    assert third["step"] > second["step"] and third["step"] % 10 == 0 and third["repeated"] < 2 * 10


def test_a_disturbed_run_ends_like_an_undisturbed_one(whole: RunFolder, disturbed: Disturbed) -> None:
    run = disturbed.run
    assert losses(run) == losses(whole)
    assert published(run).digest == published(whole).digest
    assert not run.storage.exists(f"{run.path}/checkpoints")  # of no use any more


# -- a cluster that changes ------------------------------------------------------------------------------------------


@pytest.fixture
def second_node(cluster: Cluster) -> Iterator[Host]:
    """To be started by the test, as it may kill the other one; afterwards the cluster is what it was."""
    host = Host("second", "127.0.0.1", 1)
    yield host
    if host.name in cluster.running():
        cluster.kill(host)
    if OTHER.name in cluster.running():
        cluster.kill(OTHER)  # it may be drained
    cluster.start(OTHER)


def drain(cluster: Cluster, node_id: str) -> None:
    """A cloud's notice that a node is about to be taken away, as Ray's autoscaler passes it on."""
    command = ["ray", "drain-node", "--address", cluster.environment["RAY_ADDRESS"], "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    finish(start(cluster, *command, "--deadline-remaining-seconds", "300"), 0)


def test_a_run_shrinks_with_the_cluster_and_grows_back(
    cluster: Cluster, second_node: Host, world: Path, folder_of: Callable[[str], RunFolder]
) -> None:
    run = folder_of("breathing")
    spec = world / "elastic.yaml"
    spec.write_text((world / "spec.yaml").read_text().replace("lora_dropout: 0.1", "lora_dropout: 0.0"))
    settings = ("parallel.num_workers={min: 1, max: 2}", "checkpoint.every_steps=10")
    training = start(cluster, *DRIVER, "train", str(spec), "--run-id", run.run_id, *settings)
    wait_until(is_past(run, 12), training)
    with held(run):  # or the run could be through before the cluster has changed
        (away,) = {place["node"] for place in trainings(run)[0]["workers"]} - {head_of(cluster)}
        drain(cluster, away)
        wait_until(lambda: types_of(run).count("leaving") == 1, training)
    wait_until(lambda: len(trainings(run)) == 2 and last_step(run) > trainings(run)[1]["step"], training)
    with held(run, rank=0):
        cluster.kill(OTHER)
        cluster.start(second_node)
        wait_until(lambda: types_of(run).count("leaving") == 2, training)
    wait_until(lambda: len(trainings(run)) == 3, training)
    started_at = trainings(run)[2]["step"]
    # Between two checkpoints, so that steps are lost.
    wait_until(lambda: last_step(run) > started_at + 12 and last_step(run) % 10 in (2, 3, 4), training)
    cluster.kill(second_node)
    finish(training, 0)

    found = trainings(run)
    assert [len(training["workers"]) for training in found] == [2, 1, 2, 1]
    assert found[1]["repeated"] == 0  # the notice came in time
    assert found[2]["repeated"] == 0  # no progress is thrown away for growing
    assert 0 < found[3]["repeated"] <= 2 * 10  # the checkpoint under way may be lost too
    assert types_of(run).count("recovering") == 1 and types_of(run).count("moving") == 2

    still = prepared_from(spec, folder_of("still"))
    work(still)
    assert losses(run) == pytest.approx(losses(still), abs=1e-3)


def prepared_from(spec: Path, run: RunFolder) -> RunFolder:
    """As the launcher leaves a run to two workers, which need no Ray then."""
    return prepare_run(load_run_spec(spec, []), run)


def head_of(cluster: Cluster) -> str:
    """The id of its node."""
    listed = subprocess.run(
        ["ray", "list", "nodes", "--format", "json", "--address", cluster.dashboard],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (head,) = [node["node_id"] for node in json.loads(listed.stdout) if node["is_head_node"]]
    return str(head)
