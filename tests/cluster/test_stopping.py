"""A run is stopped on purpose and goes on later; its driver dies, or a worker, and nothing is lost that was saved."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart.quickstart import PROJECT, Ray, ray_head
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.events import read_events
from ft_service.runs.folder import RunFolder, State
from ft_service.runs.metrics import read_metrics
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints.manifest import Checkpoints
from tests.worlds import SMALL, write_world

pytestmark = pytest.mark.slow

SECONDS = 240
STEPS = 120


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    with ray_head(tmp_path_factory.mktemp("ray") / "ray.log") as head:
        yield head


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
  global_batch_size: 8
  micro_batch_size: 1
  learning_rate: 1e-3
  validate_every_steps: 30
  precision: fp32
parallel: {{num_workers: 2, use_gpu: false}}
checkpoint: {{every_steps: 40}}
report: {{samples: 0}}
storage: {folder}/storage
""")
    return folder


@pytest.fixture
def folder_of(world: Path) -> Callable[[str], RunFolder]:
    return lambda run_id: RunFolder(Storage(str(world / "storage")), run_id)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ft_service.cli.app", *arguments]


def start(ray: Ray, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        list(arguments),
        cwd=PROJECT,
        env=ray.environment,
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
def held(run: RunFolder) -> Iterator[None]:
    """Meanwhile no step is finished."""
    pid = trainings(run)[-1]["workers"][1]["pid"]
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
def whole(ray: Ray, world: Path) -> RunFolder:
    """The run undisturbed."""
    finish(start(ray, *command("train", str(world / "spec.yaml"), "--run-id", "whole")), 0)
    return RunFolder(Storage(str(world / "storage")), "whole")


def test_a_stopped_job_saves_and_resumes(
    ray: Ray, world: Path, whole: RunFolder, folder_of: Callable[[str], RunFolder]
) -> None:
    run = folder_of("stopped-job")
    submit = ["ray", "job", "submit", "--address", ray.dashboard, "--submission-id", "job-1", "--working-dir", "."]
    job = start(ray, *submit, "--", "python", "jobs/train.py", str(world / "spec.yaml"), "--run-id", run.run_id)
    wait_until(is_past(run, 45), job)
    with held(run):  # or the run could be through before the command has loaded its libraries
        stopping = start(ray, "ray", "job", "stop", "--address", ray.dashboard, "job-1")
        wait_until(lambda: state(run) == "stopping")
    finish(stopping, 0)
    job.communicate(timeout=SECONDS)
    wait_until(lambda: state(run) == "stopped")
    status = run.status()
    assert status is not None and "SIGTERM" in status.message and f"ft resume {run.run_id}" in status.message
    reached = last_step(run)
    assert 45 < reached < STEPS and saved_step(run) == reached  # nothing of what was trained is lost
    assert Registry(run.storage).records("adapter") == [published(whole)]  # nothing new is published

    finish(start(ray, *command("resume", run.run_id, "--storage", run.storage.root)), 0)
    assert [training["step"] for training in trainings(run)] == [0, reached]
    assert [training["repeated"] for training in trainings(run)] == [0, 0]
    assert losses(run) == losses(whole)
    assert published(run).digest == published(whole).digest


def test_ft_stop_waits_and_submitting_again_resumes(
    ray: Ray, world: Path, whole: RunFolder, folder_of: Callable[[str], RunFolder]
) -> None:
    run = folder_of("ft-stopped")
    arguments = ("train", str(world / "spec.yaml"), "--run-id", run.run_id)
    training = start(ray, *command(*arguments))
    wait_until(is_past(run, 5), training)
    with held(run):
        stopping = start(ray, *command("stop", run.run_id, "--storage", run.storage.root))
        wait_until(lambda: state(run) == "stopping", training)
    printed = finish(stopping, 0)
    assert "stopped: ft stop" in printed
    assert "stopped: ft stop" in finish(training, 3)
    assert saved_step(run) == last_step(run) < STEPS
    shown = json.loads(finish(start(ray, *command("runs", "--storage", run.storage.root, "--json")), 0))
    mine = next(found for found in shown if found["run_id"] == run.run_id)
    assert (mine["state"], mine["attempts"], mine["wasted_steps"]) == ("stopped", 1, 0)
    assert "is not active" in finish(start(ray, *command("stop", run.run_id, "--storage", run.storage.root)), 2)

    finish(start(ray, *command(*arguments)), 0)
    assert losses(run) == losses(whole)
    assert published(run).digest == published(whole).digest


def test_a_second_signal_ends_the_run_at_once(
    ray: Ray, world: Path, whole: RunFolder, folder_of: Callable[[str], RunFolder]
) -> None:
    run = folder_of("interrupted")
    training = start(ray, *command("train", str(world / "spec.yaml"), "--run-id", run.run_id))
    wait_until(is_past(run, 42), training)
    began = trainings(run)[0]
    os.kill(began["workers"][1]["pid"], signal.SIGSTOP)  # the step under way will never be finished
    training.send_signal(signal.SIGINT)
    wait_until(lambda: state(run) == "stopping", training)
    training.send_signal(signal.SIGINT)
    assert "a second time" in finish(training, 3)
    assert state(run) == "stopped" and saved_step(run) == 40
    wait_until(lambda: not any(os.path.exists(f"/proc/{place['pid']}") for place in began["workers"]))

    finish(start(ray, *command("resume", run.run_id, "--storage", run.storage.root)), 0)
    assert trainings(run)[1]["step"] == 40 and trainings(run)[1]["repeated"] == last_repeated(run)
    assert losses(run) == losses(whole)


def last_repeated(run: RunFolder) -> int:
    from ft_service.runs.history import attempts

    return attempts(read_events(run.storage, run.run_id))[-1].repeated


def test_another_driver_takes_over_from_a_killed_one(
    ray: Ray, world: Path, whole: RunFolder, folder_of: Callable[[str], RunFolder]
) -> None:
    run = folder_of("driver-killed")
    arguments = ("train", str(world / "spec.yaml"), "--run-id", run.run_id)
    training = start(ray, *command(*arguments))
    wait_until(lambda: Checkpoints(run).entries(), training)
    os.kill(trainings(run)[0]["workers"][1]["pid"], signal.SIGSTOP)  # it shall not end meanwhile
    second = start(ray, *command(*arguments))
    assert "is working on it" in finish(second, 2)
    training.kill()
    training.communicate()
    pids = [place["pid"] for place in trainings(run)[0]["workers"]]
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))  # Ray ends them with their driver
    reached = last_step(run)
    finish(start(ray, *command(*arguments)), 0)
    again = trainings(run)[1]
    assert again["step"] >= 40 and again["step"] % 40 == 0 and again["repeated"] == reached - again["step"]
    assert losses(run) == losses(whole)
    assert published(run).digest == published(whole).digest


def test_a_run_id_with_another_training_is_rejected_early(
    ray: Ray, world: Path, folder_of: Callable[[str], RunFolder]
) -> None:
    run = folder_of("another-course")
    training = start(ray, *command("train", str(world / "spec.yaml"), "--run-id", run.run_id))
    wait_until(lambda: Checkpoints(run).entries(), training)
    training.send_signal(signal.SIGTERM)
    finish(training, 3)
    changed = start(ray, *command("resume", run.run_id, "train.seed=5", "--storage", run.storage.root))
    assert "Use another --run-id" in finish(changed, 1)
    assert len(trainings(run)) == 1


# -- a cluster that changes ------------------------------------------------------------------------------------------


@pytest.fixture
def small_head(tmp_path: Path) -> Iterator[Ray]:
    """A head with room for one worker; nodes join it and go."""
    with ray_head(tmp_path / "head.log", num_cpus=1) as head:
        yield head


class Nodes:
    """Further nodes of one cluster, on this machine."""

    def __init__(self, ray: Ray, folder: Path) -> None:
        self._ray, self._folder = ray, folder
        self._running: list[subprocess.Popen[bytes]] = []

    def add(self) -> "subprocess.Popen[bytes]":
        command = ["ray", "start", "--address", self._ray.environment["RAY_ADDRESS"], "--block", "--num-cpus=1"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-agent-listen-port=0", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--num-gpus=0", "--object-store-memory=100000000"]
        with (self._folder / f"node-{len(self._running)}.log").open("wb") as log:
            node = subprocess.Popen(
                command, env=self._ray.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._running.append(node)
        return node

    def lose(self, node: "subprocess.Popen[bytes]") -> None:
        """As if its power were cut: nothing of it says good-bye."""
        import psutil

        processes = [node.pid, *(child.pid for child in psutil.Process(node.pid).children(recursive=True))]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def end(self) -> None:
        for node in self._running:
            if node.poll() is None:
                self.lose(node)


@pytest.fixture
def nodes(small_head: Ray, tmp_path: Path) -> Iterator[Nodes]:
    found = Nodes(small_head, tmp_path)
    yield found
    found.end()


def drain(ray: Ray, node_id: str) -> None:
    """A cloud's notice that a node is about to be taken away, as Ray's autoscaler passes it on."""
    command = ["ray", "drain-node", "--address", ray.environment["RAY_ADDRESS"], "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    finish(start(ray, *command, "--deadline-remaining-seconds", "300"), 0)


def test_a_run_shrinks_with_the_cluster_and_grows_back(
    small_head: Ray, nodes: Nodes, world: Path, folder_of: Callable[[str], RunFolder]
) -> None:
    ray, run, steps = small_head, folder_of("breathing"), 250
    settings = (f"train.max_steps={steps}", "parallel.num_workers={min: 1, max: 2}", "checkpoint.every_steps=10")
    settings = (*settings, "method.lora_dropout=0.0", "train.global_batch_size=32")
    first = nodes.add()
    training = start(ray, *command("train", str(world / "spec.yaml"), "--run-id", run.run_id, *settings))
    wait_until(is_past(run, 12), training)
    began = trainings(run)[0]
    (away,) = {place["node"] for place in began["workers"]} - {head_of(ray)}

    drain(ray, away)
    wait_until(lambda: len(trainings(run)) == 2, training)
    nodes.lose(first)
    second = nodes.add()
    wait_until(lambda: len(trainings(run)) == 3, training)
    wait_until(is_past(run, trainings(run)[2]["step"] + 12), training)
    nodes.lose(second)
    finish(training, 0)

    found = trainings(run)
    assert [len(training["workers"]) for training in found] == [2, 1, 2, 1]
    assert found[1]["repeated"] == 0  # the notice came in time
    assert found[2]["repeated"] == 0  # no progress is thrown away for growing
    assert 0 < found[3]["repeated"] <= 2 * 10  # the checkpoint under way may be lost too
    types = [event.type for event in read_events(run.storage, run.run_id)]
    assert types.count("recovering") == 1 and types.count("moving") == 2
    metrics = read_metrics(run.storage, run.run_id)
    assert [m.step for m in metrics] == list(range(1, steps + 1))

    still = folder_of("still")
    finish(start(ray, *command("train", str(world / "spec.yaml"), "--run-id", still.run_id, *settings)), 0)
    expected = [m.loss for m in read_metrics(still.storage, still.run_id)]
    assert [m.loss for m in metrics] == pytest.approx(expected, abs=1e-3)


def head_of(ray: Ray) -> str:
    """The id of its node."""
    listed = subprocess.run(
        ["ray", "list", "nodes", "--format", "json", "--address", ray.dashboard],
        env=ray.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (head,) = [node["node_id"] for node in json.loads(listed.stdout) if node["is_head_node"]]
    return str(head)
