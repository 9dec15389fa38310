"""Stored JSON files carry the number of their format. What an earlier version wrote is upgraded, or refused clearly.

To change a stored file: raise its FORMAT, extend `upgraded`, and add a file of the previous format to tests/formats/.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_service.errors import StorageError

FIRST_FORMAT = 1
"""Of files without a number, which 0.1.0 wrote."""


class StoredFile(BaseModel):
    """A JSON file on storage; subclasses set the default of `format` to their FORMAT."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    FORMAT: ClassVar[int] = 2
    format: int = Field(default=2, description="Version of this file's layout.")

    @classmethod
    def upgraded(cls, data: dict[str, Any], written: int) -> dict[str, Any]:
        """`data` of an earlier format, `written`, as today's. Override it where names or meanings changed."""
        return data


Stored = TypeVar("Stored", bound=StoredFile)


def parse_stored(kind: type[Stored], data: Mapping[str, Any], where: str) -> Stored:
    """A stored file's content as its type; `where` names the file in errors.

    Raises `StorageError` for a newer format and for content that is not of this kind.
    """
    written = data.get("format", FIRST_FORMAT)
    if not isinstance(written, int) or written > kind.FORMAT:
        raise StorageError(
            f"{where}: has format {written!r}; this version reads formats up to {kind.FORMAT}. "
            "Use the version of ft-service that wrote it, or a newer one."
        )
    current = kind.upgraded(dict(data), written) if written < kind.FORMAT else data
    try:
        return kind.model_validate({**current, "format": kind.FORMAT})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise StorageError(f"{where}: is damaged ({place}: {first['msg']}).") from None


def renamed(data: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`data` with its keys renamed, old name to new; others stay."""
    return {names.get(name, name): value for name, value in data.items()}
