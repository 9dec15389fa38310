"""The tables. A change here needs a migration (`migrations/versions`); a test compares both."""

from datetime import UTC, datetime

from sqlalchemy import JSON, DateTime, ForeignKey, MetaData, Text
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
