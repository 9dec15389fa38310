"""The controller: makes what jobs ask for true, one step at a time.

A step compares each job with its run on storage and its submission at Ray, and does the next thing that is missing.
Nothing is remembered between steps that is not in the database or on storage, so a controller may be killed anywhere,
and the next one goes on. What may not happen twice has a name that follows from the job: the run, the submission, the
result file.

    validating_files -> queued -> running -> succeeded        the ordinary way
    the driver is gone, and the run has not ended              submitted again under the same run id
    a wish (pause, cancel)                                     the run is asked to stop with a checkpoint, until it has
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.view import find as find_entry
from ft_service.cluster.submit import Submission
from ft_service.errors import DatabaseError, FtError, ServingError
from ft_service.runs.folder import ENDED as RUN_ENDED
from ft_service.runs.folder import Request, RunFolder, RunStatus
from ft_service.runs.metrics import StepMetrics, read_metrics
from ft_service.runs.recent import begin
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from ft_service.text import counted, error_line
from serve.fine_tuning.checks import Checked, JobRefusedError
from serve.fine_tuning.job_files import JobFolder
from serve.fine_tuning.job_records import Job, JobRecords, NewCheckpoint, NewEvent, NewWebhook
from serve.fine_tuning.job_states import State
from serve.fine_tuning.model_servers import DoesNotStartError, NoRoomError
from serve.fine_tuning.results import checkpoint_metrics, estimated_finish, metrics_event, results_csv
from serve.fine_tuning.waiting import PREPARATION, in_queue, queue_text
from serve.fine_tuning.work import Work

LEASE = "fine-tuning controller"
LEASE_SECONDS = 30.0
MAX_ATTEMPTS = 20
"""Submissions of a run whose driver is lost again and again."""
ANSWER_SECONDS = 900.0
"""So long a published adapter may take to answer; its base may have to load first."""
FULL_ANSWER_SECONDS = 6 * 3600.0
"""So long a full model may take, unless its replicas fail: a GPU may have to become free first."""
_EVENTS_AT_ONCE = 200

logger = logging.getLogger(__name__)


class Launcher(Protocol):
    """See `ft_service.cluster.submit.Submissions`."""

    def submit(self, run_id: str, storage: str, submission_id: str) -> None: ...

    def find(self, submission_id: str) -> Submission: ...

    def stop(self, submission_id: str) -> None: ...


@dataclass(frozen=True)
class Outside:
    """What the controller asks of the rest of the service. Each call may raise `FtError`, and is then repeated."""

    check: Callable[[Job], Checked]
    """Spec, data and plan of a job. Raises `JobRefusedError`."""
    answers: Callable[[str], None]
    """Asks a model by its name for a completion. Raises `FtError` unless it answers."""
    add_result_file: Callable[[Job, bytes], str]
    """Adds a result file to the job's files, once; returns its id."""
    webhooks: Callable[[Job, State], Sequence[NewWebhook]]
    """The calls that report the end of a job."""
    deliver: Callable[[], None]
    """Delivers webhooks that are due."""
    serve_model: Callable[[str], None] = lambda _model: None
    """Makes the model of a full job a base of the server. Raises `FtError` unless it is one, `DoesNotStartError` if its
    replicas fail, and `NoRoomError` if no node can ever have room for one."""
    waits_for: Callable[[str], str] = lambda _model: ""
    """What the replicas of a full job's model wait for, as the rest of a sentence; '' if they do not wait for room."""


class _WaitsForRoomError(ServingError):
    """A model does not answer yet, because its replicas have no place. The message is what they wait for."""


def submission_id(job: Job) -> str:
    """The name of a job's submission at Ray: another for each attempt."""
    return f"{job.run_id}.{job.attempt}"


class Controller:
    """Reconciles jobs with runs. `step` is all that it does."""

    def __init__(
        self, records: JobRecords, storage: Storage, launcher: Launcher, outside: Outside, work: Work, holder: str
    ) -> None:
        """`holder` names this controller among all that are started; one of them acts."""
        self._records = records
        self._storage = storage
        self._launcher = launcher
        self._outside = outside
        self._work = work
        self._holder = holder
        self._sizes: dict[str, int | None] = {}
        self._unplaced: dict[str, datetime] = {}
        """Full jobs whose model can have no place, and since when: a node may come back."""

    def step(self) -> bool:
        """Look at every job once. Returns whether this controller is the one that acts. Raises `DatabaseError`."""
        if not self._has_lease():
            return False
        for job in self._records.active():
            if not self._has_lease():
                return False
            try:
                self._reconcile(job)
            except DatabaseError:
                raise
            except Exception as error:  # one job must not hold up the others; the reason is in its row
                if not isinstance(error, FtError):
                    logger.exception("job %s", job.id)
                self._note_trouble(job.id, str(error) if isinstance(error, FtError) else error_line(error))
        done = self._work.poll("webhooks", self._outside.deliver)
        if done is not None and (problem := done.exception()) is not None:
            logger.warning("webhooks: %s", problem)
        return True

    def release(self) -> None:
        """Let another controller act at once."""
        self._records.release_lease(LEASE, self._holder)

    def _has_lease(self) -> bool:
        return self._records.take_lease(LEASE, self._holder, LEASE_SECONDS)

    def _note_trouble(self, job_id: str, message: str) -> None:
        job = self._records.find(job_id)
        if job is None or job.trouble == message:
            return
        events = [] if job.trouble else [NewEvent(f"Held up: {message} It is tried again.", level="warn")]
        self._records.change(job, trouble=message, events=events)

    def _reconcile(self, job: Job) -> None:
        if job.state == "validating_files":
            self._validate(job)
        elif job.state in ("queued", "running"):
            self._follow(job)

    # -- before the run ------------------------------------------------------------------------------------------------

    def _validate(self, job: Job) -> None:
        JobFolder(self._storage, job.id).complete(job)
        resolved = job.resolved
        if resolved is None:
            done = self._work.poll(f"check {job.id}", lambda: self._outside.check(job))
            if done is None:
                return
            try:
                resolved = done.result().summary()
            except JobRefusedError as error:
                self._fail(job, error.code, error.message, error.param)
                return
        events = [NewEvent(str(note)) for note in resolved["notes"]]
        events += [NewEvent(str(warning), level="warn") for warning in resolved["warnings"]]
        events.append(NewEvent("Files validated, moving job to queued state"))
        self._records.change(job, "queued", resolved=dict(resolved), trouble=None, events=events)

    def _submit(self, job: Job, recorded: RunStatus | None) -> None:
        """The row names the attempt before Ray hears of it, and Ray accepts each name once."""
        if job.attempt == 0:
            opened = self._records.change(job, attempt=1, status_before=_time_of(recorded))
            if opened is None:
                return  # cancelled or paused meanwhile
            job = opened
        assert job.resolved is not None
        run = RunFolder(self._storage, job.run_id)
        begin(run, RunSpec.model_validate(job.resolved["spec"]))
        self._launcher.submit(job.run_id, self._storage.root, submission_id(job))
        if job.trouble is not None:
            self._records.change(job, trouble=None)

    # -- while the run lasts -------------------------------------------------------------------------------------------

    def _follow(self, job: Job) -> None:
        run = RunFolder(self._storage, job.run_id)
        recorded = run.recorded_status()
        status = run.status()
        has_driver = status is not None and status.state not in RUN_ENDED
        has_begun = recorded is not None and _time_of(recorded) != job.status_before
        if has_begun and recorded is not None and recorded.state == "succeeded":
            self._finish(job, run, recorded)
            return
        if has_driver and status is not None and job.wish is None:
            self._watch(job, run, status)
            return
        JobFolder(self._storage, job.id).check_is_there()
        submission = self._launcher.find(submission_id(job)) if job.attempt else Submission("unknown")
        if job.wish is not None:
            self._fulfil(job, run, recorded, submission, has_driver, has_begun)
        elif submission.is_alive:
            if job.trouble is not None:
                self._records.change(job, trouble=None)
        elif not has_begun:
            self._begin(job, recorded, submission)
        else:
            assert recorded is not None
            self._after_the_driver(job, run, recorded, submission)

    def _begin(self, job: Job, recorded: RunStatus | None, submission: Submission) -> None:
        if submission.state == "unknown":
            self._submit(job, recorded)
        elif submission.state == "stopped":
            self._pause(job, recorded, "Ray's job was stopped before the run began")
        elif submission.was_killed:
            self._submit_again(job, recorded, "The run's driver was killed before the run began.")
        else:
            message = submission.message or f"Ray's job {submission_id(job)} ended before the run began."
            self._fail(job, "driver_failed", message, None)

    def _after_the_driver(self, job: Job, run: RunFolder, recorded: RunStatus, submission: Submission) -> None:
        """No driver is left: the run has failed, was stopped by somebody else, or lost its driver."""
        job = self._report_metrics(job, run) or job
        if recorded.state == "failed":
            self._fail(job, "training_failed", recorded.message, None)
        elif recorded.state == "stopped" and submission.state != "unknown":
            self._pause(job, recorded, f"The run was stopped from outside ({recorded.message})")
        else:  # a head that is shut down stops its drivers with SIGTERM: no user asked for it
            reason = f"The run's driver is gone, while the run was {recorded.state}."
            self._submit_again(job, recorded, reason)

    def _submit_again(self, job: Job, recorded: RunStatus | None, reason: str) -> None:
        """Open the next attempt, under the same run id; the next look submits it."""
        if job.attempt >= MAX_ATTEMPTS:
            self._fail(job, "driver_lost", f"The run lost its driver {job.attempt} times.", None)
            return
        message = f"{reason} It is submitted again and goes on from its newest checkpoint."
        self._records.change(
            job,
            "queued",
            attempt=job.attempt + 1,
            status_before=_time_of(recorded),
            events=[NewEvent(message, level="warn")],
        )

    def _watch(self, job: Job, run: RunFolder, status: RunStatus) -> None:
        state: State = "queued" if status.state in ("preparing", "queued") else "running"
        if state == "queued":
            entry = find_entry(self._storage, job.run_id)
            if entry is None or not entry.holds_workers:
                self._report_waiting(job, entry)
                return
        if state == "running" and job.state == "queued":
            changed = self._records.change(
                job,
                "running",
                trouble=None,
                estimated_finish=self._planned_finish(job),
                events=[NewEvent("Fine-tuning job started")],
            )
            if changed is None:
                return
            job = changed
        elif job.trouble is not None or job.waiting is not None:  # a preempted run has its workers again
            job = self._records.change(job, trouble=None, waiting=None) or job
        self._report_metrics(job, run)

    def _report_waiting(self, job: Job, entry: Entry | None) -> None:
        """Record what the run waits for. A new place is an event, another reason is not.

        `entry` None: its driver has not entered the queue yet, and the forecast of the job's creation still holds.
        """
        if entry is None:
            waiting = {**in_queue(None, "", None), **(job.waiting or {}), "place": None, "waits_for": PREPARATION}
            finish = job.estimated_finish
        else:
            waiting = in_queue(entry.place, entry.waits_for, entry.estimated_start)
            seconds = entry.expected_seconds or _planned_seconds(job)
            finish = None
            if entry.estimated_start is not None and seconds is not None:
                finish = entry.estimated_start + timedelta(seconds=seconds)
        if waiting != job.waiting or finish != job.estimated_finish or job.trouble is not None:
            is_new = entry is not None and (job.waiting is None or waiting["place"] != job.waiting["place"])
            events = [NewEvent(queue_text(waiting), data=waiting)] if is_new else []
            self._records.change(job, trouble=None, waiting=waiting, estimated_finish=finish, events=events)

    def _planned_finish(self, job: Job) -> datetime | None:
        """When a run that starts now ends by the plan; measured steps correct it."""
        seconds = _planned_seconds(job)
        return None if seconds is None else self._records.clock() + timedelta(seconds=seconds)

    def _report_metrics(self, job: Job, run: RunFolder) -> Job | None:
        """Add the steps that are not among the events yet. None if there is none, or the job has changed."""
        size = self._storage.size(f"{run.path}/metrics.jsonl")
        if size is None or self._sizes.get(job.id) == size:
            return None
        metrics = read_metrics(self._storage, job.run_id)
        new = [step for step in metrics if step.step > job.last_step]
        changed = None
        if new:
            reported = new[:_EVENTS_AT_ONCE]
            num_steps = run.plan().num_steps if run.has_plan() else new[-1].step
            changed = self._records.change(
                job,
                last_step=reported[-1].step,
                estimated_finish=estimated_finish(metrics, num_steps) or job.estimated_finish,
                events=[metrics_event(step, num_steps) for step in reported],
            )
        if len(new) <= _EVENTS_AT_ONCE and (changed is not None or not new):
            self._sizes[job.id] = size  # read again only once the file has grown
        return changed

    # -- wishes --------------------------------------------------------------------------------------------------------

    def _fulfil(
        self,
        job: Job,
        run: RunFolder,
        recorded: RunStatus | None,
        submission: Submission,
        has_driver: bool,
        has_begun: bool,
    ) -> None:
        """Stop the run. Asked at every step: a driver that has just started deletes earlier requests."""
        if has_driver:
            run.write_request(Request(kind="stop", reason=f"{job.wish} of {job.id}"))
            return
        if submission.is_alive:
            if not has_begun:
                self._launcher.stop(submission_id(job))
            return
        job = self._report_metrics(job, run) or job
        if job.wish == "cancel":
            self._end(job, "cancelled", [NewEvent("The job was cancelled.")])
        else:
            self._pause(job, recorded, "The job was paused")

    def _pause(self, job: Job, recorded: RunStatus | None, reason: str) -> None:
        steps = counted(job.last_step, "step")
        message = f"{reason}, after {steps}. Resuming it goes on from its newest checkpoint."
        self._records.change(
            job,
            "paused",
            wish=None,
            trouble=None,
            estimated_finish=None,
            status_before=_time_of(recorded),
            events=[NewEvent(message)],
        )

    # -- the end -------------------------------------------------------------------------------------------------------

    def _finish(self, job: Job, run: RunFolder, recorded: RunStatus) -> None:
        """The run has published its adapter; the job has succeeded once that has answered through the server."""
        while (reported := self._report_metrics(job, run)) is not None:
            job = reported
        metrics = read_metrics(self._storage, job.run_id)
        if job.adapter is None:
            events = [NewEvent(f"New fine-tuned model created: {job.alias}")]
            if job.is_full:
                events.append(NewEvent("The model becomes a base of the server. It is loaded and asked."))
            changed = self._records.change(job, _running(job), adapter=recorded.published, events=events)
            if changed is None:
                return
            job = changed
        if not job.result_files:
            file = self._outside.add_result_file(job, results_csv(metrics))
            changed = self._records.change(job, result_files=[file])
            if changed is None:
                return
            job = changed
        checkpoints = _checkpoints(job, run, metrics)
        names = [job.alias, *(checkpoint.adapter for checkpoint in checkpoints if checkpoint.adapter != job.adapter)]
        if job.wish == "cancel" and (job.waiting or job.trouble):
            self._end(job, "cancelled", [NewEvent(f"The job was cancelled before {job.adapter} had answered.")])
            return
        done = self._work.poll(f"ask {job.id}", lambda: self._ask(job, names))
        if done is None:
            return
        try:
            done.result()
        except FtError as error:
            if self._may_still_answer(job, recorded.time, error):
                self._report_room(job, error)
                return
            if isinstance(error, NoRoomError):
                self._fail(job, "cannot_be_served", f"{job.adapter} is published, but cannot be served. {error}", None)
                return
            reason = f"its replicas wait for {error}" if isinstance(error, _WaitsForRoomError) else str(error)
            message = f"{job.adapter} is published, but does not answer: {reason}"
            self._fail(job, "model_does_not_answer", message, None)
            return
        self._end(
            job,
            "succeeded",
            [NewEvent("The job has successfully completed")],
            trained_tokens=sum(step.tokens for step in metrics),
            checkpoints=checkpoints,
        )

    def _ask(self, job: Job, names: Sequence[str]) -> None:
        model = job.adapter if job.is_full else None
        if model is not None:
            self._outside.serve_model(model)
        try:
            for name in names:
                self._outside.answers(name)
        except FtError:
            if model is not None and (reason := self._outside.waits_for(model)):
                raise _WaitsForRoomError(reason) from None
            raise

    def _may_still_answer(self, job: Job, published: datetime, error: FtError) -> bool:
        """Whether there is time left for a published model that does not answer."""
        now = self._records.clock()
        if isinstance(error, NoRoomError):
            since = self._unplaced.setdefault(job.id, now)
            return now - since < timedelta(seconds=ANSWER_SECONDS)
        self._unplaced.pop(job.id, None)
        may_wait_for_gpus = job.is_full and not isinstance(error, DoesNotStartError)
        return now - published < timedelta(seconds=FULL_ANSWER_SECONDS if may_wait_for_gpus else ANSWER_SECONDS)

    def _report_room(self, job: Job, error: FtError) -> None:
        """Record what a model waits for, as an event when that changes. Raises any other `error` than that."""
        if not isinstance(error, _WaitsForRoomError):
            if job.waiting is not None:
                self._records.change(job, waiting=None)
            raise error
        known = job.waiting or {}
        if known.get("waits_for") == str(error) and job.trouble is None:
            return
        waiting = {**in_queue(None, str(error), None), "since": int(self._records.clock().timestamp())}
        event = NewEvent(f"The model waits for {error}.", data=waiting)
        self._records.change(job, trouble=None, waiting=waiting, events=[event])

    def _fail(self, job: Job, code: str, message: str, param: str | None) -> None:
        error = {"code": code, "message": message, "param": param}
        event = NewEvent(message, level="error", data={"error_code": code})
        self._end(job, "failed", [event], error=error)

    def _end(self, job: Job, state: State, events: Sequence[NewEvent], **changes: Any) -> None:
        webhooks = self._outside.webhooks(job, state)
        if self._records.change(job, state, events=events, webhooks=webhooks, **changes) is None:
            return
        self._sizes.pop(job.id, None)
        self._unplaced.pop(job.id, None)
        JobFolder(self._storage, job.id).delete_data(self._records)


def _running(job: Job) -> State | None:
    """A run may have ended between two looks."""
    return "running" if job.state == "queued" else None


def _checkpoints(job: Job, run: RunFolder, metrics: Sequence[StepMetrics]) -> list[NewCheckpoint]:
    """The published adapters of the last epochs, and that of the job itself, each at its step."""
    by_step = {step.step: step for step in metrics}
    adapters = {one.step: one.adapter for one in run.epoch_adapters()}
    if job.adapter is not None and metrics:
        adapters[run.outcome().steps] = job.adapter
    return [
        NewCheckpoint(step, adapter, checkpoint_metrics(by_step[step]))
        for step, adapter in sorted(adapters.items())
        if step in by_step
    ]


def _planned_seconds(job: Job) -> float | None:
    return None if job.resolved is None else job.resolved.get("seconds")


def _time_of(status: RunStatus | None) -> str | None:
    return None if status is None else status.time.isoformat()
