"""Fine-tuning jobs in the database: the one table of truth, with events, checkpoints and webhooks.

Every change of a job compares what it was decided on: its state, its wish and its attempt. Whoever comes second changes
nothing and looks again. Events and webhooks are written in the transaction of the change that they report.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

from sqlalchemy import ColumnElement, CursorResult, Engine, and_, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from serve.database.database import session
from serve.database.tables import (
    FineTuningJobRow,
    JobCheckpointRow,
    JobCreateRow,
    JobEventRow,
    LeaseRow,
    WebhookRow,
    with_utc,
)
from serve.fine_tuning.job_states import ACTIVE, ENDED, State, Wish, check_legal

CREATE_WINDOW = timedelta(minutes=10)
"""So long the same request of the same key gets the same job: clients repeat a request that was slow, without saying
so."""
_ATTEMPTS = 5
_MOST_NAMED = 500
"""Values in one condition."""
_SERVED_STATES = ("running", "succeeded")
"""A job's model is asked for a completion while the job is still running."""

Clock = Callable[[], datetime]
Level = Literal["info", "warn", "error"]


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Job:
    """A row of `fine_tuning_jobs`, as it was read. See `serve.database.tables.FineTuningJobRow`."""

    id: str
    created: datetime
    key: str
    organization: str | None
    model: str
    request: Mapping[str, Any]
    training_file: str
    validation_file: str | None
    seed: int
    run_id: str
    alias: str
    state: State
    since: datetime
    wish: Wish | None = None
    attempt: int = 0
    status_before: str | None = None
    resolved: Mapping[str, Any] | None = None
    estimated_finish: datetime | None = None
    finished: datetime | None = None
    adapter: str | None = None
    trained_tokens: int | None = None
    error: Mapping[str, Any] | None = None
    result_files: Sequence[str] = ()
    last_step: int = 0
    trouble: str | None = None
    waiting: Mapping[str, Any] | None = None

    @property
    def hex(self) -> str:
        """The part of the id that is random."""
        return self.id.partition("-")[2]

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.request.get("metadata") or {}

    @property
    def is_full(self) -> bool:
        """Whether its model is a base of its own. Known once its files are checked."""
        spec = (self.resolved or {}).get("spec") or {}
        return (spec.get("method") or {}).get("type") == "full"

    @property
    def folder(self) -> str:
        """Its folder on storage."""
        return f"jobs/{self.id}"


@dataclass(frozen=True)
class NewEvent:
    """An event that is to be added."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class NewWebhook:
    """A webhook that is to be delivered."""

    url: str
    payload: Mapping[str, Any]
    """With its `id`."""


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that can be asked from now on."""

    step: int
    adapter: str
    metrics: Mapping[str, Any]


class JobRecords:
    """All reads and writes of jobs. Thread-safe. Every call raises `DatabaseError` when the database fails."""

    def __init__(self, engine: Engine, clock: Clock = utc_now) -> None:
        self.engine = engine
        self.clock = clock

    # -- reading -------------------------------------------------------------------------------------------------------

    def find(self, job_id: str) -> Job | None:
        with session(self.engine) as opened:
            row = opened.get(FineTuningJobRow, job_id)
            return None if row is None else _job(row)

    def active(self) -> list[Job]:
        """The jobs that have not ended, oldest first."""
        statement = select(FineTuningJobRow).where(FineTuningJobRow.state.in_(ACTIVE))
        with session(self.engine) as opened:  # sorted here: SQLite would read all jobs in the order of their creation
            return sorted((_job(row) for row in opened.scalars(statement)), key=lambda job: (job.created, job.id))

    def list_jobs(
        self,
        visible: ColumnElement[bool] | None,
        limit: int,
        after: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[list[Job], bool]:
        """At most `limit` jobs, newest first, and whether there are more. `after` is the id of an earlier page's last.

        Raises `KeyError` if `after` is no job that is visible.
        """
        row = FineTuningJobRow
        conditions = [] if visible is None else [visible]
        with session(self.engine) as opened:
            if after is not None:
                last = opened.scalar(select(row).where(row.id == after, *conditions))
                if last is None:
                    raise KeyError(after)
                conditions.append(or_(row.created < last.created, and_(row.created == last.created, row.id < last.id)))
            statement = select(row).where(*conditions).order_by(row.created.desc(), row.id.desc())
            if not metadata:
                found = [_job(one) for one in opened.scalars(statement.limit(limit + 1))]
                return found[:limit], len(found) > limit
            found = []
            for one in opened.scalars(statement.execution_options(yield_per=200)):
                job = _job(one)
                if all(job.metadata.get(name) == value for name, value in metadata.items()):
                    found.append(job)
                    if len(found) > limit:
                        break
            return found[:limit], len(found) > limit

    def list_events(self, job_id: str, limit: int, after: str | None = None) -> tuple[list[JobEventRow], bool]:
        """At most `limit` events, newest first, and whether there are older ones. Raises as `list_jobs` does."""
        return self._page(JobEventRow, JobEventRow.number, job_id, limit, after)

    def events_since(self, job_id: str, after: str | None, limit: int) -> list[JobEventRow]:
        """At most `limit` events after the one called `after`, oldest first. Raises `KeyError` if there is none."""
        with session(self.engine) as opened:
            number = -1
            if after is not None:
                last = opened.scalar(select(JobEventRow).where(JobEventRow.id == after, JobEventRow.job == job_id))
                if last is None:
                    raise KeyError(after)
                number = last.number
            statement = select(JobEventRow).where(JobEventRow.job == job_id, JobEventRow.number > number)
            rows = list(opened.scalars(statement.order_by(JobEventRow.number).limit(limit)))
            opened.expunge_all()
            return rows

    def list_checkpoints(
        self, job_id: str, limit: int, after: str | None = None
    ) -> tuple[list[JobCheckpointRow], bool]:
        """At most `limit` checkpoints, newest first, and whether there are older ones."""
        return self._page(JobCheckpointRow, JobCheckpointRow.step, job_id, limit, after)

    def _page(self, row: Any, order: Any, job_id: str, limit: int, after: str | None) -> tuple[list[Any], bool]:
        with session(self.engine) as opened:
            conditions = [row.job == job_id]
            if after is not None:
                last = opened.scalar(select(row).where(row.id == after, row.job == job_id))
                if last is None:
                    raise KeyError(after)
                conditions.append(order < getattr(last, order.key))
            rows = list(opened.scalars(select(row).where(*conditions).order_by(order.desc()).limit(limit + 1)))
            opened.expunge_all()
            return rows[:limit], len(rows) > limit

    # -- creating ------------------------------------------------------------------------------------------------------

    def find_created(self, digest: str) -> Job | None:
        """The job that the same request has created within the window, unless it has failed or was cancelled."""
        with session(self.engine) as opened:
            claim = opened.get(JobCreateRow, digest)
            return None if claim is None else self._reusable(opened, claim)

    def create(self, job: Job, digest: str, events: Sequence[NewEvent] = ()) -> Job:
        """Add a job; returns the earlier one if the same request has created one within the window.

        Two identical requests at once get one job: the claim on `digest` is a primary key.
        """
        for _ in range(_ATTEMPTS):
            with session(self.engine) as opened:
                try:
                    opened.add(JobCreateRow(digest=digest, job=job.id, time=self.clock()))
                    opened.flush()
                except IntegrityError:
                    opened.rollback()
                    claim = opened.get(JobCreateRow, digest)
                    if claim is None:
                        continue
                    if (earlier := self._reusable(opened, claim)) is not None:
                        return earlier
                    mine = update(JobCreateRow).where(JobCreateRow.digest == digest, JobCreateRow.job == claim.job)
                    if not _changed(opened, mine.values(job=job.id, time=self.clock())):
                        opened.rollback()
                        continue
                opened.add(FineTuningJobRow(**_columns(job)))
                opened.flush()
                self._add_events(opened, job.id, events)
                opened.commit()
                return job
        raise RuntimeError(f"{job.id} was not created in {_ATTEMPTS} attempts")

    def _reusable(self, opened: Session, claim: JobCreateRow) -> Job | None:
        earlier = opened.get(FineTuningJobRow, claim.job)
        is_recent = self.clock() - with_utc(claim.time) <= CREATE_WINDOW
        if earlier is None or not is_recent or earlier.state in ("failed", "cancelled"):
            return None
        return _job(earlier)

    # -- changing ------------------------------------------------------------------------------------------------------

    def change(
        self,
        job: Job,
        state: State | None = None,
        *,
        events: Sequence[NewEvent] = (),
        webhooks: Sequence[NewWebhook] = (),
        checkpoints: Sequence[NewCheckpoint] = (),
        **changes: object,
    ) -> Job | None:
        """The job after a change, with its events; None, and nothing changed, if the job is no longer as `job` says.

        Another state clears what the job waits for; one that ends the job also clears its wish. Raises `ValueError`
        for an illegal transition.
        """
        now = self.clock()
        if state is not None and state != job.state:
            check_legal(job.state, state)
            changes = {"waiting": None, **changes, "state": state, "since": now}
            if state in ENDED:
                changes |= {"finished": now, "wish": None, "trouble": None, "estimated_finish": None}
        row = FineTuningJobRow
        unchanged = (
            row.id == job.id,
            row.state == job.state,
            row.attempt == job.attempt,
            row.wish.is_(None) if job.wish is None else row.wish == job.wish,
        )
        with session(self.engine) as opened:
            if not _changed(opened, update(row).where(*unchanged).values(**(changes or {"attempt": job.attempt}))):
                return None
            self._add_events(opened, job.id, events)
            for webhook in webhooks:
                opened.add(_webhook_row(job.id, webhook, now))
            for checkpoint in checkpoints:
                self._add_checkpoint(opened, job, checkpoint)
            opened.flush()
            changed = opened.get(row, job.id, populate_existing=True)
            assert changed is not None
            result = _job(changed)
            opened.commit()
        return result

    def ended_with_data(self, limit: int = 200) -> list[str]:
        """Jobs that have ended, and whose data are not known to be gone from storage."""
        row = FineTuningJobRow
        statement = select(row.id).where(row.data_deleted.is_(False), row.state.in_(ENDED)).limit(limit)
        with session(self.engine) as opened:
            return list(opened.scalars(statement))

    def mark_data_deleted(self, job_id: str) -> None:
        with session(self.engine) as opened:
            opened.execute(update(FineTuningJobRow).where(FineTuningJobRow.id == job_id).values(data_deleted=True))
            opened.commit()

    def _add_events(self, opened: Session, job_id: str, events: Sequence[NewEvent]) -> None:
        now = self.clock()
        for event in events:
            row = JobEventRow(
                id=f"ftevent-{secrets.token_hex(12)}",
                job=job_id,
                time=now,
                level=event.level,
                type=event.type,
                message=event.message,
                data=None if event.data is None else dict(event.data),
            )
            opened.add(row)
            opened.flush()  # one by one, so that their numbers follow their order

    def _add_checkpoint(self, opened: Session, job: Job, new: NewCheckpoint) -> None:
        alias = f"{job.alias}:ckpt-step-{new.step}"
        if opened.scalar(select(JobCheckpointRow).where(JobCheckpointRow.alias == alias)) is not None:
            return
        opened.add(
            JobCheckpointRow(
                id=f"ftckpt_{secrets.token_hex(12)}",
                job=job.id,
                time=self.clock(),
                step=new.step,
                alias=alias,
                adapter=new.adapter,
                metrics=dict(new.metrics),
            )
        )

    # -- one controller ------------------------------------------------------------------------------------------------

    def take_lease(self, name: str, holder: str, seconds: float) -> bool:
        """Take or renew a lease. False while another holder has it."""
        now = self.clock()
        values = {"holder": holder, "expires": now + timedelta(seconds=seconds)}
        free = or_(LeaseRow.holder == holder, LeaseRow.expires < now)
        with session(self.engine) as opened:
            if _changed(opened, update(LeaseRow).where(LeaseRow.name == name, free).values(**values)):
                opened.commit()
                return True
            try:
                opened.add(LeaseRow(name=name, **values))
                opened.commit()
            except IntegrityError:
                return False
        return True

    def release_lease(self, name: str, holder: str) -> None:
        with session(self.engine) as opened:
            statement = update(LeaseRow).where(LeaseRow.name == name, LeaseRow.holder == holder)
            _changed(opened, statement.values(expires=self.clock() - timedelta(seconds=1)))
            opened.commit()

    # -- webhooks ------------------------------------------------------------------------------------------------------

    def due_webhooks(self, limit: int) -> list[WebhookRow]:
        """Webhooks whose next attempt is due, oldest first."""
        due = WebhookRow.next_attempt <= self.clock()
        with session(self.engine) as opened:
            rows = list(opened.scalars(select(WebhookRow).where(due).order_by(WebhookRow.next_attempt).limit(limit)))
            opened.expunge_all()
            return rows

    def record_delivery(self, webhook_id: str, attempts: int, outcome: str, next_attempt: datetime | None) -> None:
        values = {"attempts": attempts, "outcome": outcome, "next_attempt": next_attempt}
        with session(self.engine) as opened:
            _changed(opened, update(WebhookRow).where(WebhookRow.id == webhook_id).values(**values))
            opened.commit()

    # -- models --------------------------------------------------------------------------------------------------------

    def adapter_of(self, alias: str) -> str | None:
        """The adapter that a model name of a job or checkpoint stands for."""
        job = select(FineTuningJobRow.adapter).where(FineTuningJobRow.alias == alias)
        checkpoint = select(JobCheckpointRow.adapter).where(JobCheckpointRow.alias == alias)
        with session(self.engine) as opened:
            return opened.scalar(job) or opened.scalar(checkpoint)

    def aliases(self) -> dict[str, str]:
        """The model names of all jobs that have succeeded and of their checkpoints, with their adapters."""
        row = FineTuningJobRow
        jobs = select(row.alias, row.adapter).where(row.state == "succeeded", row.adapter.is_not(None))
        checkpoints = select(JobCheckpointRow.alias, JobCheckpointRow.adapter)
        with session(self.engine) as opened:
            return {
                alias: str(adapter) for statement in (jobs, checkpoints) for alias, adapter in opened.execute(statement)
            }

    def parents_of(self, models: Sequence[str]) -> dict[str, str]:
        """Model id -> the base that it was trained from, for those that a job has published and that may answer."""
        row = FineTuningJobRow
        found: dict[str, str] = {}
        with session(self.engine) as opened:
            for start in range(0, len(models), _MOST_NAMED):
                named = row.adapter.in_(models[start : start + _MOST_NAMED])
                statement = select(row.adapter, row.model).where(named, row.state.in_(_SERVED_STATES))
                found |= {str(model): parent for model, parent in opened.execute(statement)}
        return found

    def owners(self, adapter: str | None = None) -> dict[str, list[tuple[str, str | None]]]:
        """Key and organisation of the jobs that have published each adapter, or the one named."""
        row = FineTuningJobRow
        jobs = select(row.adapter, row.key, row.organization).where(row.adapter.is_not(None))
        checkpoints = select(JobCheckpointRow.adapter, row.key, row.organization).join(
            row, row.id == JobCheckpointRow.job
        )
        if adapter is not None:
            jobs = jobs.where(row.adapter == adapter)
            checkpoints = checkpoints.where(JobCheckpointRow.adapter == adapter)
        found: dict[str, list[tuple[str, str | None]]] = {}
        with session(self.engine) as opened:
            for name, key, organization in (*opened.execute(jobs), *opened.execute(checkpoints)):
                found.setdefault(str(name), []).append((key, organization))
        return found


def request_digest(key: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of who asks and what for, whatever the order of the body's fields."""
    content = json.dumps([key, body], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _changed(opened: Session, statement: Any) -> bool:
    """Whether a statement has changed a row."""
    return cast(CursorResult[Any], opened.execute(statement)).rowcount > 0


_FIELDS = tuple(field.name for field in fields(Job))


def _job(row: FineTuningJobRow) -> Job:
    values: dict[str, Any] = {}
    for name in _FIELDS:
        value = getattr(row, name)
        values[name] = with_utc(value) if isinstance(value, datetime) else value
    return Job(**values)


def _columns(job: Job) -> dict[str, Any]:
    values = {name: getattr(job, name) for name in _FIELDS}
    return {**values, "request": dict(job.request), "result_files": list(job.result_files)}


def _webhook_row(job_id: str, webhook: NewWebhook, now: datetime) -> WebhookRow:
    payload = json.dumps(webhook.payload, ensure_ascii=False, separators=(",", ":"))
    return WebhookRow(
        id=webhook.payload["id"], job=job_id, url=webhook.url, payload=payload, time=now, attempts=0, next_attempt=now
    )
