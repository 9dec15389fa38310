"""Stored JSON files carry the number of their format. What an earlier version wrote is upgraded, or rejected clearly.

To change a stored file: raise the default of its `format`, extend `upgraded`, and add a file of the previous format to
tests/formats/.
"""

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_service.errors import NewerFormatError, StorageError

FIRST_FORMAT = 1
"""Of files without a number, which version 0.1.0 wrote."""


class StoredFile(BaseModel):
    """A JSON file on storage. A subclass whose layout changes overrides `format` with a higher default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = Field(default=2, description="Version of this file's layout.")

    @classmethod
    def upgraded(cls, data: dict[str, Any], written: int) -> dict[str, Any]:
        """`data` in the layout of today, from that of format `written`. Override it where names or meanings change."""
        return data

    @classmethod
    def parse(cls, data: Mapping[str, Any] | bytes, where: str) -> Self:
        """The content of a stored file, as a mapping or as JSON; `where` names the file in errors.

        Raises `NewerFormatError` for a newer format, and `StorageError` for content of another kind.
        """
        current: int = cls.model_fields["format"].default
        try:
            content = json.loads(data) if isinstance(data, bytes) else data
            written = content.get("format", FIRST_FORMAT)
            if not isinstance(written, int):
                raise ValueError(f"its format is {written!r}")
            if written > current:
                raise NewerFormatError(
                    f"{where}: a newer version of ft-service wrote it (format {written}; this version reads formats up "
                    f"to {current}). Use that version, or a newer one."
                )
            upgraded = cls.upgraded(dict(content), written) if written < current else content
            return cls.model_validate({**upgraded, "format": current})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            raise StorageError(f"{where}: damaged ({field}: {first['msg']}).") from None
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise StorageError(f"{where}: damaged ({type(error).__name__}: {error}).") from None


def renamed(data: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`data` with its keys renamed, old name to new; the others stay."""
    return {names.get(name, name): value for name, value in data.items()}
