"""The audit log: what changed, when, and by which key. Append-only."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from serve.database.database import session
from serve.database.tables import AuditRow, with_utc

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class AuditEntry:
    time: datetime
    key: str
    action: str
    target: str
    details: Mapping[str, object]


def audit(opened: Session, key: str, action: str, target: str, details: Mapping[str, object] | None = None) -> None:
    """Add an entry in the transaction of the change itself, so that there is never one without the other."""
    row = AuditRow(time=datetime.now(UTC), key=key, action=action, target=target, details=dict(details or {}))
    opened.add(row)


def audit_log(engine: Engine, last: int = 100) -> list[AuditEntry]:
    """The last entries, oldest first."""
    with session(engine) as opened:
        rows = list(opened.scalars(select(AuditRow).order_by(AuditRow.number.desc()).limit(last)))
    return [
        AuditEntry(with_utc(row.time), row.key, row.action, row.target, row.details or {}) for row in reversed(rows)
    ]
