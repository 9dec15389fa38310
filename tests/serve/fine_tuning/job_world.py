"""Jobs without a cluster: a Ray that is a dictionary, runs that are files, and a clock that is set by hand."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, TypeVar

from sqlalchemy import Engine

from ft_service.cluster.submit import Submission
from ft_service.runs.folder import EpochAdapter, LeaseHolder, Outcome, RunFolder, State
from ft_service.runs.jsonl import run_file, to_line
from ft_service.runs.metrics import METRICS_FILE, StepMetrics
from ft_service.storage.storage import Storage
from serve.database.database import open_database
from serve.fine_tuning.checks import JobRefusedError
from serve.fine_tuning.controller import Controller, Outside
from serve.fine_tuning.job_files import JobFolder
from serve.fine_tuning.job_records import Job, JobRecords, NewWebhook, request_digest

T = TypeVar("T")
BODY = {"model": "tiny", "training_file": "file-1", "metadata": {"team": "a"}}
STEPS = 4
OUTCOME = Outcome(
    weights="weights/step-4",
    steps=STEPS,
    steps_run=STEPS,
    final_loss=0.5,
    validation_loss=1.5,
    stopped_early=False,
    base_fingerprint="f",
    training_digest="d",
)


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 28, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class AtOnce:
    """Work is done when it is asked for."""

    def poll(self, name: str, work: Callable[[], T]) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done


@dataclass
class Ray:
    """Submissions by their names, and the drivers that they start, a phase at each `advance`."""

    storage: Storage
    submissions: dict[str, str] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    """Every submission that was accepted."""
    run_of: dict[str, str] = field(default_factory=dict)
    trained: list[tuple[str, int]] = field(default_factory=list)
    """Run and step, of every step that was trained."""
    finishes: str = "succeeded"
    killed: set[str] = field(default_factory=set)
    epoch_adapters: Sequence[EpochAdapter] = (EpochAdapter(step=2, adapter="tiny-run-ffffffff"),)

    def submit(self, run_id: str, storage: str, submission_id: str) -> None:
        if submission_id in self.submissions:
            return
        self.submissions[submission_id] = "pending"
        self.submitted.append(submission_id)
        self.run_of[submission_id] = run_id

    def find(self, submission_id: str) -> Submission:
        state: Any = self.submissions.get(submission_id, "unknown")
        is_failed = state == "failed"
        message = "the driver printed this" if is_failed else ""
        return Submission(state, message, was_killed=is_failed and submission_id in self.killed)

    def stop(self, submission_id: str) -> None:
        if self.submissions.get(submission_id) == "pending":
            self.submissions[submission_id] = "stopped"

    def advance(self) -> None:
        for name, state in list(self.submissions.items()):
            if state in ("pending", "running"):
                self._advance(name, RunFolder(self.storage, self.run_of[name]))

    def _advance(self, name: str, run: RunFolder) -> None:
        status = run.recorded_status()
        began = self.submissions[name] == "running"
        if not began:
            self.submissions[name] = "running"
            run.delete_requests("stop", "move")
            self._set(run, "preparing")
            return
        assert status is not None
        done = len(self._steps(run))
        if run.request() is not None:
            self._set(run, "stopped")
            self.submissions[name] = "failed"  # exit code 3
        elif done < STEPS:
            self._set(run, "running")
            self._train(run, done + 1)
        elif self.finishes == "succeeded":
            run.write_outcome(OUTCOME)
            run.write_epoch_adapters(self.epoch_adapters)
            self._set(run, "succeeded", published="tiny-run-0a1b2c3d")
            self.submissions[name] = "succeeded"
        else:
            self._set(run, "failed", message="step 5: the loss is nan")
            self.submissions[name] = "failed"

    def alive(self) -> list[str]:
        """Submissions that have a driver, or will."""
        return [name for name, state in self.submissions.items() if state in ("pending", "running")]

    def kill_drivers(self) -> None:
        """SIGKILL: they write nothing more, and Ray sees their exit code."""
        for name in self.alive():
            self.submissions[name] = "failed"
            self.killed.add(name)
        self._expire_leases()

    def lose_head(self) -> None:
        """Ray forgets everything, and drivers are gone; their leases are old."""
        self.submissions.clear()
        self._expire_leases()

    def _expire_leases(self) -> None:
        for name in self.storage.folders("runs"):
            run = RunFolder(self.storage, name)
            if run.lease_holder() is not None:
                self._lease(run, datetime(2020, 1, 1, tzinfo=UTC))

    def _set(self, run: RunFolder, state: State, **details: str) -> None:
        self._lease(run, datetime.now(UTC))
        run.set_state(state, **details)

    def _lease(self, run: RunFolder, time: datetime) -> None:
        holder = LeaseHolder(token="t", host="h", machine="m", pid=1, time=time)
        self.storage.write_json(f"{run.path}/lease.json", holder.model_dump(mode="json"))

    def _steps(self, run: RunFolder) -> list[str]:
        path = run_file(run.run_id, METRICS_FILE)
        return self.storage.read_bytes(path).decode().split() if self.storage.exists(path) else []

    def _train(self, run: RunFolder, step: int) -> None:
        self.trained.append((run.run_id, step))
        metrics = StepMetrics(
            step=step,
            epoch=step / STEPS,
            loss=2.0 / step,
            accuracy=step / 8,
            validation_loss=1.5 if step == STEPS else None,
            validation_accuracy=0.25 if step == STEPS else None,
            learning_rate=1e-3,
            grad_norm=1.0,
            tokens=10,
            loss_tokens=5,
            tokens_per_second=1.0,
            peak_memory_gib=0.1,
        )
        line = to_line(metrics).replace(" ", "")
        self.storage.append_line(run_file(run.run_id, METRICS_FILE), line)


@dataclass
class World:
    """A database, a storage and a Ray; controllers come and go."""

    engine: Engine
    storage: Storage
    ray: Ray
    clock: Clock
    records: JobRecords
    asked: list[str] = field(default_factory=list)
    result_files: dict[str, bytes] = field(default_factory=dict)
    refusal: JobRefusedError | None = None
    answer: Exception | None = None
    method: str = "lora"
    served: list[str] = field(default_factory=list)
    """Models that became bases."""
    serving: Exception | None = None
    waits_for: str = ""
    """What the replicas of a full model wait for."""
    controllers: int = 0
    seconds: float | None = None
    """What the plan expects of a run."""

    def controller(self, records: Any = None, launcher: Any = None) -> Controller:
        """A new controller process."""
        self.controllers += 1
        outside = Outside(
            self.check,
            self.ask,
            self.add_file,
            self.webhooks,
            lambda: None,
            self.serve_model,
            lambda model: self.waits_for,
        )
        holder = f"controller-{self.controllers}"
        return Controller(records or self.records, self.storage, launcher or self.ray, outside, AtOnce(), holder)

    def check(self, job: Job) -> Any:
        if self.refusal is not None:
            raise self.refusal
        summary = resolved(self.storage)
        summary["spec"]["method"] = {"type": self.method}
        return SimpleNamespace(summary=lambda: {**summary, "seconds": self.seconds})

    def ask(self, alias: str) -> None:
        if self.answer is not None:
            raise self.answer
        self.asked.append(alias)

    def serve_model(self, model: str) -> None:
        if self.serving is not None:
            raise self.serving
        self.served.append(model)

    def add_file(self, job: Job, content: bytes) -> str:
        name = f"file-{job.hex}"
        self.result_files[name] = content
        return name

    def webhooks(self, job: Job, state: str) -> Sequence[NewWebhook]:
        payload = {"id": f"evt_{state}_{job.id}", "type": f"fine_tuning.job.{state}", "data": {"id": job.id}}
        return [NewWebhook("https://example.org/hook", payload)]

    def job(self, digit: str = "a") -> Job:
        job_hex = digit * 24
        job = Job(
            id=f"ftjob-{job_hex}",
            created=self.clock(),
            key="root",
            organization=None,
            model="tiny",
            request=BODY,
            training_file="file-1",
            validation_file=None,
            seed=7,
            run_id=f"tiny-{job_hex[:12]}",
            alias=f"ft:tiny:ft::{job_hex[:8]}",
            state="validating_files",
            since=self.clock(),
        )
        created = self.records.create(job, request_digest(digit, BODY))
        JobFolder(self.storage, job.id).write_if_absent(job)
        return created

    def find(self, job: Job) -> Job:
        found = self.records.find(job.id)
        assert found is not None
        return found

    def wish(self, job: Job, wish: str) -> None:
        assert self.records.change(self.find(job), wish=wish) is not None

    def until(self, job: Job, state: str, controller: Controller | None = None, looks: int = 40) -> Job:
        """Step and advance until the job is in that state."""
        controller = controller or self.controller()
        for _ in range(looks):
            controller.step()
            found = self.find(job)
            if found.state == state:
                return found
            self.ray.advance()
        raise AssertionError(f"{found.state} ({found.trouble}), not {state}")

    def messages(self, job: Job) -> list[str]:
        return [event.message for event in self.records.events_since(job.id, None, 1000)]


def resolved(storage: Storage) -> dict[str, Any]:
    return {
        "hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0},
        "spec": {
            "name": "tiny",
            "model": {"base": "org/tiny"},
            "data": {"train": [{"path": "train.jsonl"}]},
            "storage": storage.root,
        },
        "notes": ["batch_size auto: 2 packed rows a step."],
        "warnings": [],
        "steps": STEPS,
    }


@cache
def _empty_database() -> bytes:
    with TemporaryDirectory() as folder:
        open_database(f"sqlite:///{folder}/service.db").dispose()
        return Path(folder, "service.db").read_bytes()


def make_world(folder: Path, database: str | None = None, storage: str | None = None) -> World:
    """`database` and `storage`: their URLs; by default a file and a folder in `folder`."""
    if database is None:
        (folder / "service.db").write_bytes(_empty_database())
        database = f"sqlite:///{folder}/service.db"
    engine = open_database(database)
    on = Storage(storage or str(folder / "storage"))
    clock = Clock()
    return World(engine, on, Ray(on), clock, JobRecords(engine, clock))
