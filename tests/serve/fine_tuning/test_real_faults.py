"""One job through real losses: driver, Ray's head and controller are killed, Postgres and the storage go away.

The head is killed with SIGKILL and started again at the same port, so Ray has forgotten all submissions. The matrix of
losses and states is in `test_losses`, with stand-ins.
"""

import json
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from ft_service.registry.registry import Registry
from ft_service.runs.folder import LEASE_SECONDS, RunFolder
from ft_service.storage.storage import Storage
from serve.database.database import open_database
from serve.fine_tuning.job_files import JobFolder
from serve.fine_tuning.job_records import Job, JobRecords
from tests.hosts import QUICK_HEALTH_CHECKS, ROOT, START_SECONDS, Cluster, Host, kill_all, wait_for
from tests.serve.postgres import Postgres, postgres
from tests.shared_cluster import OFTEN, answers
from tests.worlds import SMALL, write_world

pytestmark = pytest.mark.cluster

HEAD = Host("head", "127.0.0.1", 1)
SECONDS = 240
STEPS = 600
CONTROLLER = """
import sys, time
from types import SimpleNamespace
from ft_service.cluster.submit import Submissions
from ft_service.errors import DatabaseError
from ft_service.storage.storage import Storage
from serve.database.database import open_database
from serve.fine_tuning import controller
from serve.fine_tuning.job_records import JobRecords, NewWebhook
from serve.fine_tuning.work import Threads

controller.LEASE_SECONDS = 3.0
database, root, dashboard = sys.argv[1:]
outside = controller.Outside(
    check=lambda job: SimpleNamespace(summary=lambda: job.resolved),
    answers=lambda name: None,
    add_result_file=lambda job, content: f"file-{job.hex}",
    webhooks=lambda job, state: [NewWebhook("https://example.org/", {"id": f"evt_{job.hex}", "type": state})],
    deliver=lambda: None,
)
records = JobRecords(open_database(database))
found = controller.Controller(records, Storage(root), Submissions(dashboard), outside, Threads(), str(time.time()))
print("ready", flush=True)
while True:
    try:
        found.step()
    except DatabaseError as error:
        print(error, flush=True)
    time.sleep(0.2)
"""
"""A controller as the server runs it, which looks more often; models that it asks answer at once."""


@dataclass
class World:
    folder: Path
    cluster: Cluster
    database: Postgres
    url: str
    records: JobRecords
    storage: Storage

    @contextmanager
    def controller(self) -> Iterator["subprocess.Popen[bytes]"]:
        """A controller in a process of its own. It is killed when the block ends."""
        command = [sys.executable, "-c", CONTROLLER, self.url, self.storage.root, self.cluster.dashboard]
        environment = {**self.cluster.environment, "RAY_API_SERVER_ADDRESS": self.cluster.dashboard}
        with (self.folder / "controller.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def find(self, job: Job) -> Job:
        found = self.records.find(job.id)
        assert found is not None
        return found

    def until(self, job: Job, is_time: Callable[[], bool]) -> None:
        """Wait. A job that ends before it is time fails the test, with all that is known."""

        def look() -> bool:
            is_now = is_time()
            if not is_now:
                found = self.find(job)
                assert found.state not in ("failed", "cancelled", "paused"), (found.error, self.messages(job))
            return is_now

        try:
            wait_for(look, SECONDS)
        except Exception as error:
            log = (self.folder / "controller.log").read_text(errors="replace")[-3000:]
            raise AssertionError(f"{error} {self.find(job)} {self.messages(job)} {log}") from None

    def messages(self, job: Job) -> list[str]:
        return [event.message for event in self.records.events_since(job.id, None, 10_000) if event.type == "message"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    write_world(tmp_path, sizes=SMALL)
    (tmp_path / "storage").mkdir()
    settings = {**QUICK_HEALTH_CHECKS, **OFTEN}
    with postgres() as database, Cluster(tmp_path, HEAD, settings) as cluster:
        cluster.start(HEAD)
        wait_for(lambda: answers(cluster), START_SECONDS)
        url = database.new_database(uuid.uuid4().hex)
        engine = open_database(url)
        yield World(tmp_path, cluster, database, url, JobRecords(engine), Storage(str(tmp_path / "storage")))
        engine.dispose()


def accept(world: World) -> Job:
    """A job as a gateway accepts it: its row, and its file on storage."""
    spec = {
        "name": "tiny",
        "model": {"base": f"{world.folder}/base"},
        "method": {"type": "lora", "lora_rank": 4},
        "data": {
            "train": [{"path": f"{world.folder}/train.jsonl", "source": "made up", "license": "CC0-1.0"}],
            "max_seq_len": 128,
        },
        "train": {"max_steps": STEPS, "global_batch_size": 4, "precision": "fp32"},
        "parallel": {"use_gpu": False},
        "checkpoint": {"every_steps": 10},
        "report": {"samples": 0},
        "storage": world.storage.root,
    }
    job_hex = "a" * 24
    now = datetime.now(UTC)
    job = Job(
        id=f"ftjob-{job_hex}",
        created=now,
        key="root",
        organization=None,
        model="tiny",
        request={},
        training_file="file-1",
        validation_file=None,
        seed=7,
        run_id=f"tiny-{job_hex[:12]}",
        alias=f"ft:tiny:ft::{job_hex[:8]}",
        state="validating_files",
        since=now,
        resolved={"spec": spec, "hyperparameters": {}, "notes": [], "warnings": []},
    )
    created = world.records.create(job, "digest")
    JobFolder(world.storage, job.id).write_if_absent(job)
    return created


def has_ended(pid: int) -> bool:
    """Whether a process has ended, perhaps without its parent having noticed."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_job_outlives_its_driver_rays_head_its_controller_the_database_and_the_storage(world: World) -> None:
    job = accept(world)
    run = RunFolder(world.storage, job.run_id)

    def driver() -> psutil.Process | None:
        """The living driver."""
        holder = run.lease_holder()
        return psutil.Process(holder.pid) if holder is not None and psutil.pid_exists(holder.pid) else None

    def is_training_after(step: int) -> Callable[[], bool]:
        return lambda: world.find(job).state == "running" and world.find(job).last_step > step

    def let_lease_expire() -> None:
        """The killed driver's lease becomes as old as it would be after 45 s."""
        holder = run.lease_holder()
        assert holder is not None
        wait_for(lambda: has_ended(holder.pid), 60)  # it ends by itself once its raylet is gone
        old = holder.model_copy(update={"time": holder.time - timedelta(seconds=LEASE_SECONDS)})
        world.storage.write_json(f"{run.path}/lease.json", old.model_dump(mode="json"))

    with world.controller() as first:
        world.until(job, lambda: driver() is not None and run.recorded_state() == "preparing")
        killed = driver()
        assert killed is not None
        kill_all([killed])
        let_lease_expire()

        world.until(job, is_training_after(15))
        assert world.find(job).attempt == 2
        first.send_signal(signal.SIGKILL)
        world.cluster.kill(HEAD)
        before = world.find(job)
        let_lease_expire()

    world.cluster.start(HEAD)
    wait_for(lambda: answers(world.cluster), START_SECONDS)
    with world.controller():
        world.until(job, is_training_after(before.last_step))

        away = world.folder / "elsewhere"
        (world.folder / "storage").rename(away)
        world.until(job, lambda: world.find(job).trouble is not None)
        assert not (world.folder / "storage").exists()
        away.rename(world.folder / "storage")
        seen = world.find(job).last_step
        world.until(job, is_training_after(seen))

        world.database.stop()
        log = world.folder / "controller.log"
        wait_for(lambda: "the database failed" in log.read_text(errors="replace"), SECONDS)
        world.database.start()
        world.until(job, lambda: world.find(job).state == "succeeded")
        done = world.find(job)

    assert done.attempt == 3 and done.last_step == STEPS
    steps = [
        event.data["step"] for event in world.records.events_since(job.id, None, 10_000) if event.type == "metrics"
    ]
    assert steps == list(range(1, STEPS + 1))
    trained = Counter(
        json.loads(line)["step"] for line in world.storage.read_bytes(f"{run.path}/metrics.jsonl").splitlines()
    )
    assert set(trained) == set(range(1, STEPS + 1))
    messages = world.messages(job)
    assert sum("submitted again" in message for message in messages) == 2
    assert messages.count("The job has successfully completed") == 1
    assert world.storage.folders("runs") == [run.run_id]
    assert [record.id for record in Registry(world.storage).records()] == [done.adapter]
    assert len(world.records.due_webhooks(10)) == 1
