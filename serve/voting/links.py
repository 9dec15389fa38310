"""A rater's link: a signed token that opens one study for one person.

The token stands behind `#`, so a browser does not send it with the page's address, and no log has it. Its signature is
an HMAC of study and rater with a secret of the service's database. The database has the token's digest only.
"""

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError

from serve.database.database import session
from serve.database.tables import RaterRow, SecretRow, StudyRow
from serve.http.errors import ApiError

VOTE_PATH = "/vote"
_SECRET = "voting links"


@dataclass(frozen=True)
class Rater:
    """Who votes, in which study."""

    id: str
    study: str


def voting_secret(engine: Engine) -> bytes:
    """The secret that signs links, made when it is first needed."""
    with session(engine) as opened:
        row = opened.get(SecretRow, _SECRET)
        if row is None:
            opened.add(SecretRow(name=_SECRET, value=secrets.token_hex(32)))
            try:
                opened.commit()
            except IntegrityError:  # another process has made it
                opened.rollback()
        value = opened.scalars(select(SecretRow.value).where(SecretRow.name == _SECRET)).one()
    return bytes.fromhex(value)


def token_of(secret: bytes, study: str, rater: str) -> str:
    signature = hmac.new(secret, f"{study}/{rater}".encode(), hashlib.sha256).digest()
    return f"{study}.{rater}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def token_digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def link(server: str, token: str) -> str:
    """The address that a rater opens."""
    return f"{server.rstrip('/').removesuffix('/v1')}{VOTE_PATH}#{token}"


class TokenCheck:
    """Checks tokens. Raises `ApiError`: 401 for one that was not signed here, 410 for one that is no longer valid."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._secret: bytes | None = None

    def rater(self, token: str) -> Rater:
        """Whose token it is. A forged one never reaches the tables of the study."""
        parts = token.split(".")
        if self._secret is None:
            self._secret = voting_secret(self._engine)
        if len(parts) != 3 or not hmac.compare_digest(
            token_of(self._secret, parts[0], parts[1]).encode(), token.encode("utf-8", "surrogateescape")
        ):
            raise ApiError(401, "This link is not valid. Open it exactly as it was sent.", "invalid_link")
        study, rater_id, _ = parts
        with session(self._engine) as opened:
            rater = opened.get(RaterRow, rater_id)
            exists = opened.get(StudyRow, study) is not None
        if rater is None or not exists or rater.study != study:
            raise ApiError(410, "This study is not here any more.", "study_gone")
        if rater.token_digest is None or not hmac.compare_digest(rater.token_digest, token_digest(token)):
            raise ApiError(410, "This link is no longer valid: its votes were deleted.", "link_deleted")
        return Rater(rater.id, rater.study)
