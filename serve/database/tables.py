"""The tables. A change here needs a migration (`migrations/versions`); a test compares both."""

from datetime import UTC, datetime

from sqlalchemy import JSON, BigInteger, DateTime, ForeignKey, MetaData, Text, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Moment = DateTime(timezone=True)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def with_utc(moment: datetime) -> datetime:
    """A moment as it was stored: SQLite leaves its time zone out."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class ApiKeyRow(Base):
    """An API key. The key itself is not stored, only its digest."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    """8 characters, part of the key."""
    name: Mapped[str] = mapped_column(Text, unique=True)
    digest: Mapped[str] = mapped_column(Text)
    """SHA-256 of the whole key. A key has 190 random bits, so that a slow hash would add nothing."""
    created: Mapped[datetime] = mapped_column(Moment)
    expires: Mapped[datetime | None] = mapped_column(Moment)
    revoked: Mapped[datetime | None] = mapped_column(Moment)
    is_admin: Mapped[bool]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    models: Mapped[list[str] | None] = mapped_column(JSON)
    """Model ids, or beginnings of ids that end in ``*``; None means every model."""
    organization: Mapped[str | None] = mapped_column(Text)
    """Keys of one organisation see each other's files and jobs."""


class AuditRow(Base):
    """What changed, and by which key. Rows are only ever added."""

    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    time: Mapped[datetime] = mapped_column(Moment)
    key: Mapped[str] = mapped_column(Text)
    """Name of the key, or `command line`."""
    action: Mapped[str] = mapped_column(Text)
    """Such as `keys.create` or `models.delete`."""
    target: Mapped[str] = mapped_column(Text)
    details: Mapped[dict[str, object] | None] = mapped_column(JSON)


class SecretRow(Base):
    """A random secret of the service, made when it is first needed."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class StudyRow(Base):
    """A study in which people compare answers. Its questions, comparisons and assignments never change."""

    __tablename__ = "studies"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    """What raters see instead of the name."""
    created: Mapped[datetime] = mapped_column(Moment)
    closed: Mapped[datetime | None] = mapped_column(Moment)
    digest: Mapped[str] = mapped_column(Text)
    """SHA-256 of the study's file on storage, which also holds models, digests and settings."""
    settings: Mapped[dict[str, object]] = mapped_column(JSON)
    models: Mapped[list[dict[str, object]]] = mapped_column(JSON)
    """Ids, digests and base fingerprints, in the study's order."""


class QuestionRow(Base):
    """A question of a study: the turns that the models answered."""

    __tablename__ = "study_questions"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), index=True)
    name: Mapped[str] = mapped_column(Text)
    """Its place in the source of the questions."""
    turns: Mapped[list[dict[str, str]]] = mapped_column(JSON)


class ComparisonRow(Base):
    """Two prepared answers to a question. Which one is shown left is drawn for each assignment."""

    __tablename__ = "study_comparisons"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), index=True)
    question: Mapped[str] = mapped_column(ForeignKey("study_questions.id"))
    kind: Mapped[str] = mapped_column(Text)
    """`real`, `control` (one model against itself) or `attention` (the first answer is the right one)."""
    first_model: Mapped[str | None] = mapped_column(Text)
    second_model: Mapped[str | None] = mapped_column(Text)
    first_answer: Mapped[str] = mapped_column(Text)
    second_answer: Mapped[str] = mapped_column(Text)
    first_is_cut: Mapped[bool]
    second_is_cut: Mapped[bool]
    digest: Mapped[str] = mapped_column(Text)
    """SHA-256 of question, answers, models and their digests. Every vote carries it."""


class RaterRow(Base):
    """A person who votes in one study, by a link of their own."""

    __tablename__ = "study_raters"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), index=True)
    name: Mapped[str | None] = mapped_column(Text)
    """None after the rater's data were deleted."""
    token_digest: Mapped[str | None] = mapped_column(Text)
    """SHA-256 of the link's token; None once the link is no longer valid."""
    deleted: Mapped[datetime | None] = mapped_column(Moment)


class AssignmentRow(Base):
    """A comparison that a rater is asked to judge, at a place in the rater's order."""

    __tablename__ = "study_assignments"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), index=True)
    rater: Mapped[str] = mapped_column(ForeignKey("study_raters.id"), index=True)
    comparison: Mapped[str] = mapped_column(ForeignKey("study_comparisons.id"))
    kind: Mapped[str] = mapped_column(Text)
    """That of the comparison, or `repeat`."""
    position: Mapped[int]
    first_is_left: Mapped[bool]
    round: Mapped[int]
    """How often a vote on it was withdrawn."""
    revealed: Mapped[datetime | None] = mapped_column(Moment)
    """When the rater learnt which models these are."""
    void: Mapped[str | None] = mapped_column(Text)
    """Why a vote no longer counts."""


class VoteRow(Base):
    """The vote on an assignment that counts. A withdrawn one is only on storage."""

    __tablename__ = "study_votes"

    assignment: Mapped[str] = mapped_column(ForeignKey("study_assignments.id"), primary_key=True)
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), index=True)
    rater: Mapped[str] = mapped_column(ForeignKey("study_raters.id"), index=True)
    round: Mapped[int]
    outcome: Mapped[str] = mapped_column(Text)
    """`left`, `right`, `tie` or `both bad`."""
    scores: Mapped[dict[str, int]] = mapped_column(JSON)
    """Axis -> -2 (left is much better) to 2 (right is much better)."""
    note: Mapped[str] = mapped_column(Text)
    seconds: Mapped[float | None]
    """Between showing and voting, by the rater's browser."""
    time: Mapped[datetime] = mapped_column(Moment)


class FileContentRow(Base):
    """The content of one or more files. Its row is locked while the content on storage is published or deleted."""

    __tablename__ = "file_contents"

    digest: Mapped[str] = mapped_column(Text, primary_key=True)
    """SHA-256."""
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes."""


class FileRow(Base):
    """A file of the API. Its row goes after its content, so that an interrupted deletion is found again."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    """`file-` and 24 hex digits, which sort by time."""
    key: Mapped[str] = mapped_column(Text, index=True)
    """Id of the API key that uploaded it."""
    organization: Mapped[str | None] = mapped_column(Text, index=True)
    """That of the key; None for a key without one."""
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(ForeignKey("file_contents.digest"), index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes."""
    created: Mapped[datetime] = mapped_column(Moment)
    expires: Mapped[datetime | None] = mapped_column(Moment, index=True)
    status: Mapped[str] = mapped_column(Text, index=True)
    """`uploaded` until it was checked, then `processed` or `error`; `deleted` while its content is being deleted."""
    status_details: Mapped[str | None] = mapped_column(Text)
    validation: Mapped[dict[str, object] | None] = mapped_column(JSON)
    checked_since: Mapped[datetime | None] = mapped_column(Moment)
    """When a process began to check it."""
    job: Mapped[str | None] = mapped_column(Text, unique=True)
    """The job whose result file it is."""


class UploadRow(Base):
    """A file that comes in parts."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    """`upload_` and 24 hex digits."""
    key: Mapped[str] = mapped_column(Text, index=True)
    organization: Mapped[str | None] = mapped_column(Text)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(Text)
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes that the parts must have in all."""
    created: Mapped[datetime] = mapped_column(Moment)
    expires: Mapped[datetime] = mapped_column(Moment, index=True)
    file_seconds: Mapped[int | None]
    """So long after its creation the file expires."""
    status: Mapped[str] = mapped_column(Text)
    """`pending`, `completed` or `cancelled`; a pending one that has expired is `expired`."""
    completed_with: Mapped[str | None] = mapped_column(Text)
    """SHA-256 of the ids of the parts it was completed with: a client that repeats the call gets the same file."""
    file: Mapped[str | None] = mapped_column(Text)
    """Id of the completed file."""


class UploadPartRow(Base):
    """A part of an upload, on storage."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    """`part_` and 24 hex digits."""
    upload: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    created: Mapped[datetime] = mapped_column(Moment)


class FineTuningJobRow(Base):
    """A fine-tuning job as its client asked for it, and how far it is."""

    __tablename__ = "fine_tuning_jobs"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    """`ftjob-` and 24 hex digits."""
    created: Mapped[datetime] = mapped_column(Moment, index=True)
    key: Mapped[str] = mapped_column(Text, index=True)
    """Id of the API key that created it."""
    organization: Mapped[str | None] = mapped_column(Text, index=True)
    """That of the key; None for a key without one."""
    model: Mapped[str] = mapped_column(Text)
    """Name of the base."""
    request: Mapped[dict[str, object]] = mapped_column(JSON)
    """The body of the request."""
    training_file: Mapped[str] = mapped_column(Text, index=True)
    validation_file: Mapped[str | None] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(BigInteger)
    run_id: Mapped[str] = mapped_column(Text, unique=True)
    """Follows from the job's id, so that a lost submission is found again."""
    alias: Mapped[str] = mapped_column(Text, unique=True)
    """The name of its model, `ft:<base>:<organization>:<suffix>:<8 hex>`."""
    state: Mapped[str] = mapped_column(Text, index=True)
    since: Mapped[datetime] = mapped_column(Moment)
    """When it entered its state."""
    wish: Mapped[str | None] = mapped_column(Text)
    """`pause` or `cancel`, until the run has stopped."""
    attempt: Mapped[int]
    """Number of the submission that is to run; 0 before the first."""
    status_before: Mapped[str | None] = mapped_column(Text)
    """Time of the run's status when the attempt was opened: a status of that time belongs to an earlier attempt."""
    resolved: Mapped[dict[str, object] | None] = mapped_column(JSON)
    """Hyperparameters and estimates as the plan has them; None before the files were checked."""
    estimated_finish: Mapped[datetime | None] = mapped_column(Moment)
    finished: Mapped[datetime | None] = mapped_column(Moment)
    adapter: Mapped[str | None] = mapped_column(Text, index=True)
    """Id of the adapter that its run published."""
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[dict[str, object] | None] = mapped_column(JSON)
    """`code`, `message` and `param` of a failed job."""
    result_files: Mapped[list[str]] = mapped_column(JSON)
    last_step: Mapped[int]
    """The newest step whose metrics are among the events."""
    trouble: Mapped[str | None] = mapped_column(Text)
    """What holds the job up at the moment, such as a Ray that does not answer."""
    waiting: Mapped[dict[str, object] | None] = mapped_column(JSON)
    """Its place in the queue, what it waits for, and when it is expected to start. See `serve.fine_tuning.waiting`."""
    data_deleted: Mapped[bool] = mapped_column(default=False, server_default=false(), index=True)
    """Whether the links to its data are gone from storage, once it has ended."""


class JobCreateRow(Base):
    """Which job a request created, so that the same request again gets the same job."""

    __tablename__ = "fine_tuning_creates"

    digest: Mapped[str] = mapped_column(Text, primary_key=True)
    """SHA-256 of key and body."""
    job: Mapped[str] = mapped_column(Text)
    time: Mapped[datetime] = mapped_column(Moment)


class JobEventRow(Base):
    """An event of a job. Rows are only ever added."""

    __tablename__ = "fine_tuning_events"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Text, unique=True)
    job: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), index=True)
    time: Mapped[datetime] = mapped_column(Moment)
    level: Mapped[str] = mapped_column(Text)
    """`info`, `warn` or `error`."""
    type: Mapped[str] = mapped_column(Text)
    """`message` or `metrics`."""
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, object] | None] = mapped_column(JSON)


class JobCheckpointRow(Base):
    """A published adapter of a job, at a step."""

    __tablename__ = "fine_tuning_checkpoints"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), index=True)
    time: Mapped[datetime] = mapped_column(Moment)
    step: Mapped[int]
    alias: Mapped[str] = mapped_column(Text, unique=True)
    """The name of its model: that of the job and `:ckpt-step-N`."""
    adapter: Mapped[str] = mapped_column(Text, index=True)
    metrics: Mapped[dict[str, object]] = mapped_column(JSON)


class WebhookRow(Base):
    """A webhook that is to be delivered, or was."""

    __tablename__ = "fine_tuning_webhooks"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    """`evt_` and 24 hex digits; the receiver sees it in `webhook-id`, the same at each attempt."""
    job: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), index=True)
    url: Mapped[str] = mapped_column(Text)
    payload: Mapped[str] = mapped_column(Text)
    time: Mapped[datetime] = mapped_column(Moment)
    attempts: Mapped[int]
    next_attempt: Mapped[datetime | None] = mapped_column(Moment, index=True)
    """None once it was delivered or given up."""
    outcome: Mapped[str | None] = mapped_column(Text)
    """Of the last attempt."""


class LeaseRow(Base):
    """Who does a work that only one process may do at a time."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    holder: Mapped[str] = mapped_column(Text)
    expires: Mapped[datetime] = mapped_column(Moment)
