"""Jobs as clients see them: accepted, estimated, paused, resumed and cancelled. Starts nothing: the controller does."""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from sqlalchemy import ColumnElement

from ft_service.cluster.queue.capacity import ClusterNodes
from ft_service.errors import StorageError
from ft_service.plan.facts import Resources
from ft_service.storage.storage import Storage
from serve.fine_tuning.checks import Checked, JobRefusedError, ServingProblem, check_job
from serve.fine_tuning.controller import Outside
from serve.fine_tuning.forecast import Forecasts, JobForecast
from serve.fine_tuning.job_files import JobFolder
from serve.fine_tuning.job_records import Job, JobRecords, NewEvent, request_digest
from serve.fine_tuning.job_states import ENDED, State
from serve.fine_tuning.run_spec import (
    LICENSE,
    WAIVE_PREFIX,
    Hyperparameters,
    JobSettings,
    model_name,
    run_name,
)
from serve.fine_tuning.serving_room import ServingRoom
from serve.fine_tuning.waiting import in_queue, queue_text
from serve.fine_tuning.webhooks import Deliveries, webhooks_of
from serve.fine_tuning.wire import FineTuningJobRequest
from serve.http.errors import ApiError
from serve.http.tenants import Tenant
from serve.settings import FineTuningSettings, ServeSettings

TRAINING = "training"
VALIDATION = "validation"
_MIB = 2**20
T = TypeVar("T")
_ATTEMPTS = 10
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")
_NO_DPO = "method.type = 'dpo': preference training is not there yet. Use supervised."
_NO_REINFORCEMENT = "method.type = 'reinforcement': graders and rollouts are not supported. Use supervised."


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file that a job may train on."""

    id: str
    filename: str
    bytes: int
    folder: str
    """On storage."""
    name: str
    """Within the folder."""


class Files(Protocol):
    """The files of the API."""

    def for_training(self, owner: Tenant, file_id: str, param: str) -> StoredFile:
        """Raises `ApiError` for a file that the owner cannot see, or that is not for training."""
        ...

    def add_result(self, job: Job, content: bytes) -> str:
        """Add the result file of a job, once; returns its id."""
        ...


class Jobs:
    """All that the routes do with jobs. Blocking; raises `ApiError`, `DatabaseError` and `StorageError`."""

    def __init__(
        self,
        records: JobRecords,
        storage: Storage,
        settings: ServeSettings,
        files: Files,
        cluster: ClusterNodes | None = None,
        room: ServingRoom | None = None,
    ) -> None:
        """`cluster` trains the jobs; None where its nodes are unknown. See `serve.fine_tuning.forecast`.

        `room` judges the models of full jobs; by default without the nodes that serve.
        """
        assert settings.fine_tuning
        self.records = records
        self._storage = storage
        self._tuning = settings.fine_tuning
        self._serving_problem = serving_problems(settings, room)
        self._files = files
        self._forecasts = Forecasts(storage, cluster)

    # -- creating ------------------------------------------------------------------------------------------------------

    def create(self, owner: Tenant, request: FineTuningJobRequest) -> Job:
        """Accept a job. The same request again, within the window, gets the same job.

        When this returns, the job is in the database and on storage.
        """
        digest = request_digest(owner.key, request.model_dump(mode="json", exclude_none=True))
        job = self.records.find_created(digest)
        if job is None:
            job = self._create(owner, request, digest)
        JobFolder(self._storage, job.id).write_if_absent(job)
        return job

    def _create(self, owner: Tenant, request: FineTuningJobRequest, digest: str) -> Job:
        files = self._accept(owner, request)
        job = self._draft(owner, request)
        folder = JobFolder(self._storage, job.id)
        by_folder = {file.folder for file in files.values()}
        assert len(by_folder) == 1
        forecast_events: list[NewEvent] = []
        try:
            folder.link_data(by_folder.pop(), {role: file.name for role, file in files.items()})
            if sum(file.bytes for file in files.values()) <= self._tuning.checked_mib * _MIB:
                checked = self.check(job)
                forecast = self._forecast(job, checked)
                forecast_events = _forecast_events(forecast)
                job = _with_forecast(replace(job, resolved=checked.summary()), forecast)
        except JobRefusedError as error:
            folder.delete()
            raise _refused(error) from None
        except BaseException:
            folder.delete_quietly()
            raise
        names = ", ".join(file.id for file in files.values())
        events = [NewEvent(f"Created fine-tuning job: {job.id}"), NewEvent(f"Validating training file: {names}")]
        # If this fails, the row may be there all the same, as when the answer to a commit is lost: the folder stays.
        created = self.records.create(job, digest, [*events, *forecast_events])
        if created.id != job.id:
            folder.delete()
        return created

    def estimate(self, owner: Tenant, request: FineTuningJobRequest) -> dict[str, Any]:
        """What a job would take. Writes nothing."""
        files = self._accept(owner, request)
        paths = {role: self._storage.uri(f"{file.folder}/{file.name}") for role, file in files.items()}
        job = self._draft(owner, request)
        try:
            checked = check_job(
                self._template(job.model),
                job_settings(job, self._tuning, paths[TRAINING], paths.get(VALIDATION)),
                self._storage.root,
                resources_of(self._tuning),
                self._serving_problem(job.model),
            )
        except JobRefusedError as error:
            raise _refused(error) from None
        forecast = self._forecast(job, checked)
        summary = {name: value for name, value in checked.summary().items() if name != "spec"}
        if forecast.warning:
            summary["warnings"] = [*summary["warnings"], forecast.warning]
        return {"object": "fine_tuning.job.estimate", "model": job.model, "queue": forecast.as_json(), **summary}

    def _forecast(self, job: Job, checked: Checked) -> JobForecast:
        estimate = checked.plan.estimate
        seconds = None if estimate is None else estimate.seconds
        return self._forecasts.of(job.run_id, checked.spec, seconds, self.records.active(), self.records.clock())

    def check(self, job: Job) -> Checked:
        """Spec, data and plan of a job whose data are linked. Raises `JobRefusedError`."""
        return check_linked(job, self._storage, self._tuning, self._serving_problem(job.model))

    def _accept(self, owner: Tenant, request: FineTuningJobRequest) -> dict[str, StoredFile]:
        """The files of a request, by their role. Raises `ApiError` 400 for what no job can have."""
        self._template(request.model)
        method = request.method.type if request.method else "supervised"
        if method != "supervised":
            message = _NO_DPO if method == "dpo" else _NO_REINFORCEMENT
            raise ApiError(400, message, "unsupported_method", "method")
        files = {TRAINING: self._files.for_training(owner, request.training_file, "training_file")}
        if request.validation_file is not None:
            files[VALIDATION] = self._files.for_training(owner, request.validation_file, "validation_file")
        return files

    def _template(self, model: str) -> Mapping[str, Any]:
        return template_of(self._tuning, model)

    def _draft(self, owner: Tenant, request: FineTuningJobRequest) -> Job:
        job_hex = secrets.token_hex(12)
        now = self.records.clock()
        return Job(
            id=f"ftjob-{job_hex}",
            created=now,
            key=owner.key,
            organization=owner.organization,
            model=request.model,
            request={**request.model_dump(mode="json", exclude_none=True), "_key": owner.name},
            training_file=request.training_file,
            validation_file=request.validation_file,
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            run_id=f"{run_name(request.suffix, request.model)}-{job_hex[:12]}",
            alias=model_name(request.model, self._tuning.organization, request.suffix, job_hex),
            state="validating_files",
            since=now,
        )

    # -- finding -------------------------------------------------------------------------------------------------------

    def find(self, job_id: str, reader: Tenant) -> Job:
        """Raises `ApiError` 404 for a job that does not exist or that the client may not see."""
        job = self.records.find(job_id) if _JOB_ID.fullmatch(job_id) else None
        if job is None or not reader.sees(job.key, job.organization):
            raise ApiError(404, f"The fine-tuning job {job_id[:100]!r} does not exist.", "job_not_found", "job_id")
        return job

    def list_jobs(
        self, visible: ColumnElement[bool] | None, limit: int, after: str | None, metadata: Mapping[str, str]
    ) -> tuple[list[Job], bool]:
        """A page of jobs, newest first, and whether there are more. Raises `ApiError` 400 for an unknown `after`."""
        return known_after(after, lambda: self.records.list_jobs(visible, limit, after, metadata))

    # -- wishes --------------------------------------------------------------------------------------------------------

    def cancel(self, job_id: str, reader: Tenant) -> Job:
        """End a job. Its run saves a checkpoint first. Again, while that lasts, changes nothing."""

        def act(job: Job) -> Job | None:
            if job.state in ENDED:
                raise _illegal(job, f"has {_ENDS[job.state]} already, so it cannot be cancelled")
            if job.wish == "cancel":
                return job
            if not _has_started(job):
                return self._end_unstarted(job)
            events = [NewEvent("Cancellation requested: the run stops after its current step.")]
            return self.records.change(job, wish="cancel", events=events)

        return self._act(job_id, reader, act)

    def pause(self, job_id: str, reader: Tenant) -> Job:
        """Stop a job's run with a checkpoint, which frees its workers."""

        def act(job: Job) -> Job | None:
            if job.state in ENDED:
                raise _illegal(job, f"has {_ENDS[job.state]} already, so it cannot be paused")
            if job.state == "paused":
                raise _illegal(job, "is paused already")
            if job.wish == "cancel":
                raise _illegal(job, "is being cancelled, so it cannot be paused")
            if job.wish == "pause":
                return job
            if not _has_started(job):
                return self.records.change(job, "paused", events=[NewEvent("The job was paused before it began.")])
            events = [NewEvent("Pause requested: the run saves a checkpoint after its current step and stops.")]
            return self.records.change(job, wish="pause", events=events)

        return self._act(job_id, reader, act)

    def resume(self, job_id: str, reader: Tenant) -> Job:
        """Let a paused job go on from its checkpoint."""

        def act(job: Job) -> Job | None:
            if job.wish == "pause":
                raise _illegal(job, "is still being paused. Resume it once its status is paused")
            if job.state != "paused":
                raise _illegal(job, f"is {job.state}; only a paused job can be resumed")
            events = [NewEvent("The job was resumed.")]
            if job.resolved is None:
                return self.records.change(job, "validating_files", events=events)
            attempt = job.attempt + 1 if job.attempt else 0
            return self.records.change(job, "queued", attempt=attempt, events=events)

        return self._act(job_id, reader, act)

    def _act(self, job_id: str, reader: Tenant, act: Callable[[Job], Job | None]) -> Job:
        """Again where the job has changed between reading and acting."""
        for _ in range(_ATTEMPTS):
            if (job := act(self.find(job_id, reader))) is not None:
                return job
        raise ApiError(503, f"The job {job_id} keeps changing. Try again.", "job_changing", retry_after=1)

    def _end_unstarted(self, job: Job) -> Job | None:
        webhooks = webhooks_of(self._tuning, job, "cancelled", self.records.clock())
        events = [NewEvent("The job was cancelled.")]
        ended = self.records.change(job, "cancelled", events=events, webhooks=webhooks)
        if ended is not None:
            JobFolder(self._storage, job.id).delete_data(self.records)
        return ended


_ENDS: Mapping[State, str] = {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}


def _with_forecast(job: Job, forecast: JobForecast) -> Job:
    """A new job with what the queue says of it: kept until its driver knows more."""
    if forecast.place is None:
        return job
    waiting = in_queue(None, "", forecast.estimated_start)
    return replace(job, waiting=waiting, estimated_finish=forecast.estimated_finish)


def _forecast_events(forecast: JobForecast) -> list[NewEvent]:
    events = []
    if forecast.place:
        start = forecast.estimated_start
        expected = f" It is expected to start at {start:%Y-%m-%d %H:%M} UTC." if start else ""
        waiting = in_queue(forecast.place, forecast.waits_for, start)
        events.append(NewEvent(queue_text(waiting) + expected, data=waiting))
    if forecast.warning:
        events.append(NewEvent(forecast.warning, "warn"))
    return events


def _has_started(job: Job) -> bool:
    """Whether something may run for the job. A paused one's run has stopped."""
    return job.state in ("queued", "running") and job.attempt > 0


def _illegal(job: Job, reason: str) -> ApiError:
    return ApiError(400, f"The fine-tuning job {job.id} {reason}.", "invalid_job_state")


def _refused(error: JobRefusedError) -> ApiError:
    return ApiError(400, error.message, error.code, error.param)


def known_after(after: str | None, read: Callable[[], T]) -> T:
    """What `read` returns. Raises `ApiError` 400 if it raises `KeyError`, or if `after` is no id at all."""
    try:
        if after is not None and not _ID.fullmatch(after):
            raise KeyError(after)
        return read()
    except KeyError:
        message = f"after = {(after or '')[:100]!r}: there is no such item. Send the id of the last item of a page."
        raise ApiError(400, message, "invalid_value", "after") from None


# -- what the controller needs of them ---------------------------------------------------------------------------------


def template_of(tuning: FineTuningSettings, model: str) -> Mapping[str, Any]:
    """Raises `ApiError` 400 for a model that cannot be fine-tuned."""
    template = tuning.templates.get(model)
    if isinstance(template, dict):
        return template
    known = ", ".join(tuning.templates) or "none"
    message = f"The model {model[:200]!r} cannot be fine-tuned on this server. Models that can: {known}."
    raise ApiError(400, message, "model_not_available", "model")


def job_settings(job: Job, tuning: FineTuningSettings, training: str, validation: str | None) -> JobSettings:
    """What a job says of its run; its data are in these files."""
    request = job.request
    method = request.get("method") or {}
    supervised = method.get("supervised") or {}
    asked = supervised.get("hyperparameters") or request.get("hyperparameters") or {}
    known = ("n_epochs", "batch_size", "learning_rate_multiplier")
    wandb = next((one["wandb"] for one in request.get("integrations") or [] if one.get("type") == "wandb"), None)
    return JobSettings(
        name=run_name(request.get("suffix"), job.model),
        seed=job.seed,
        hyperparameters=Hyperparameters(**{name: asked[name] for name in known if asked.get(name) is not None}),
        training=training,
        validation=validation,
        source=f"{job.training_file}, uploaded by {request.get('_key', job.key)}",
        license=job.metadata.get(LICENSE) or tuning.data_license,
        waive={
            name.removeprefix(WAIVE_PREFIX): reason
            for name, reason in job.metadata.items()
            if name.startswith(WAIVE_PREFIX)
        },
        wandb=wandb,
        owner=request.get("_key", job.key),
    )


def resources_of(tuning: FineTuningSettings) -> Resources:
    return Resources(gpu_type=tuning.gpu_type, price_per_gpu_hour=tuning.price_per_gpu_hour)


def serving_problems(
    settings: ServeSettings, room: ServingRoom | None = None
) -> Callable[[str], ServingProblem | None]:
    """What judges the full models of a base, by the base's name; None for one that the server does not have."""
    known = room or ServingRoom(settings)
    judges = {base.model_name: partial(known.problem, base) for base in settings.bases}
    return judges.get


def check_linked(
    job: Job, storage: Storage, tuning: FineTuningSettings, serving_problem: ServingProblem | None = None
) -> Checked:
    """See `check_job`. Raises `JobRefusedError`."""
    folder = JobFolder(storage, job.id)
    try:
        template = template_of(tuning, job.model)
    except ApiError as error:  # the settings have changed since the job was accepted
        raise JobRefusedError(error.code, error.message, error.param) from None
    training = folder.data(TRAINING)
    if training is None:
        raise StorageError(f"{storage.uri(folder.path)}: has no training data.")
    settings = job_settings(job, tuning, training, folder.data(VALIDATION))
    return check_job(template, settings, storage.root, resources_of(tuning), serving_problem)


def outside_of(
    records: JobRecords,
    storage: Storage,
    settings: ServeSettings,
    files: Files,
    answers: Callable[[str], None],
    serve_model: Callable[[str], None] = lambda _model: None,
    waits_for: Callable[[str], str] = lambda _model: "",
    room: ServingRoom | None = None,
) -> Outside:
    """What the controller asks of the rest of the service.

    `answers` asks a model for a completion, `serve_model` makes the model of a full job a base, and `waits_for` says
    what its replicas wait for.
    """
    tuning = settings.fine_tuning
    assert tuning
    serving_problem = serving_problems(settings, room)
    return Outside(
        check=lambda job: check_linked(job, storage, tuning, serving_problem(job.model)),
        answers=answers,
        add_result_file=files.add_result,
        webhooks=lambda job, state: webhooks_of(tuning, job, state, records.clock()),
        deliver=Deliveries(records, tuning).deliver,
        serve_model=serve_model,
        waits_for=waits_for,
    )
