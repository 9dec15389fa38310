"""The tables. A change here needs a migration (`migrations/versions`); a test compares both."""

from datetime import UTC, datetime

from sqlalchemy import JSON, DateTime, MetaData, Text
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
