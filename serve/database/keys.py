"""API keys: made, listed, revoked and looked up. Only digests are stored."""

import hashlib
import hmac
import secrets
import string
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError

from ft_service.errors import UsageError
from serve.database.audit import COMMAND_LINE, audit
from serve.database.database import session
from serve.database.tables import ApiKeyRow, with_utc

_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 8
_SECRET_LENGTH = 32


@dataclass(frozen=True)
class ApiKey:
    """A key by its name, and what it may do."""

    id: str
    name: str
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    is_admin: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    models: tuple[str, ...] | None = None
    organization: str | None = None
    """Keys of one organisation see each other's files and jobs."""

    def is_valid(self, now: datetime) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)

    def may_use(self, model_id: str) -> bool:
        if self.models is None:
            return True
        return any(
            model_id.startswith(pattern[:-1]) if pattern.endswith("*") else model_id == pattern
            for pattern in self.models
        )


def create_key(
    engine: Engine,
    name: str,
    *,
    is_admin: bool = False,
    expires: datetime | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    models: tuple[str, ...] | None = None,
    organization: str | None = None,
    by: str = COMMAND_LINE,
) -> tuple[str, ApiKey]:
    """A new key and its record. The key cannot be had again. Raises `UsageError` if the name is taken."""
    key_id = _random(_ID_LENGTH)
    key = f"ft-{key_id}-{_random(_SECRET_LENGTH)}"
    row = ApiKeyRow(
        id=key_id,
        name=name,
        digest=_digest(key),
        created=datetime.now(UTC),
        expires=expires,
        is_admin=is_admin,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        models=None if models is None else list(models),
        organization=organization or None,
    )
    with session(engine) as opened:
        opened.add(row)
        audit(
            opened, by, "keys.create", name, {"is_admin": is_admin, "models": row.models, "organization": organization}
        )
        record = _record(row)
        try:
            opened.commit()
        except IntegrityError:
            raise UsageError(
                f"name = {name!r}: a key of this name exists. Revoke it, or choose another name."
            ) from None
    return key, record


def list_keys(engine: Engine) -> list[ApiKey]:
    """All keys, revoked ones too, oldest first."""
    with session(engine) as opened:
        return [_record(row) for row in opened.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created))]


def revoke_key(engine: Engine, name: str, by: str = COMMAND_LINE) -> ApiKey:
    """Revoke a key for good; again is no error. Raises `UsageError` if there is none of this name."""
    with session(engine) as opened:
        row = opened.scalar(select(ApiKeyRow).where(ApiKeyRow.name == name))
        if row is None:
            raise UsageError(f"name = {name!r}: no key has this name. ft keys list shows them.")
        if row.revoked is None:
            row.revoked = datetime.now(UTC)
            audit(opened, by, "keys.revoke", name)
        record = _record(row)
        opened.commit()
    return record


def find_key(engine: Engine, key: str) -> ApiKey | None:
    """The record of a key that a client sent, valid or not; None for a text that is no key."""
    parts = key.split("-")
    if len(parts) != 3 or parts[0] != "ft":
        return None
    with session(engine) as opened:
        row = opened.get(ApiKeyRow, parts[1])
    if row is None or not hmac.compare_digest(row.digest, _digest(key)):
        return None
    return _record(row)


def _record(row: ApiKeyRow) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        created=with_utc(row.created),
        expires=None if row.expires is None else with_utc(row.expires),
        revoked=None if row.revoked is None else with_utc(row.revoked),
        is_admin=row.is_admin,
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        models=None if row.models is None else tuple(row.models),
        organization=row.organization,
    )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _random(length: int) -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(length))
