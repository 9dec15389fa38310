"""Which models, files and jobs a client sees: those of its key and of its key's organisation.

Admin keys see all, and so does everybody on a server without keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, true

from serve.database.tables import FileRow, FineTuningJobRow, UploadRow
from serve.http.keys import Client

NO_KEY = "local"
"""The key of what was made on a server without keys."""


@dataclass(frozen=True)
class Tenant:
    """The owner of what a client makes, and what else it sees."""

    key: str
    """Id of its API key."""
    name: str
    organization: str | None
    sees_all: bool

    def sees(self, key: str, organization: str | None) -> bool:
        """Whether it sees what a key of an organisation has made."""
        own = key == self.key or (organization is not None and organization == self.organization)
        return self.sees_all or own

    def sees_one_of(self, owners: Sequence[tuple[str, str | None]]) -> bool:
        """Whether it sees what keys of organisations have made, or what belongs to nobody."""
        return not owners or any(self.sees(key, organization) for key, organization in owners)

    def visible(self, table: type[FileRow] | type[UploadRow] | type[FineTuningJobRow]) -> ColumnElement[bool]:
        """`sees`, as a condition on rows."""
        if self.sees_all:
            return true()
        own = table.key == self.key
        return own if self.organization is None else or_(own, table.organization == self.organization)


def tenant_of(client: Client) -> Tenant:
    key = client.key
    if key is None:
        return Tenant(NO_KEY, NO_KEY, None, sees_all=True)
    return Tenant(key.id, key.name, key.organization, sees_all=key.is_admin)
