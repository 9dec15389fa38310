"""What all readers share: the parts of a file that they read, and the faults that they report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ft_service.errors import DataError

Record = dict[str, Any]
Kind = Literal["lines", "array", "csv", "parquet", "dataset"]
IsWanted = Callable[[int], bool]
"""Whether the record of this number is to be read."""

MAX_LINE_BYTES = 64 * 2**20
"""Limit of a JSON line, and of a CSV field. A book has one or two million bytes."""
MAX_ARRAY_BYTES = 256 * 2**20
"""Limit of a JSON document, which is read whole and then takes about five times as much memory."""


@dataclass(frozen=True)
class Fault:
    """Why a record, or a whole file, cannot be used: a code of the data gate, and the reason."""

    code: str
    reason: str
    text: str = ""
    """The text of the record, if it could be read; bytes that are not UTF-8 are escaped."""
    cure: str = ""
    """What to do about this cause; empty where the cure of the code fits."""


@dataclass(frozen=True)
class FileShard:
    """A part of an input file that one task reads: some lines, row groups or rows, or the whole file."""

    source: int
    """Number of the source, from 0."""
    file: int
    """Number of the file within its source, from 0."""
    path: str
    kind: Kind
    start: int
    end: int
    """Range of row groups (Parquet), rows (a saved or hub dataset), or bytes (all others)."""
    first: int
    """Number of its first line or row, from 1."""
    digest: str
    """SHA-256 of its bytes (Parquet: of the end of the file, which locates all rows; empty for a dataset). A task that
    finds another digest must stop."""
    fault: Fault | None = None
    """Why nothing of the file can be read."""
    delimiter: str = ","
    """Between the cells of a CSV file."""


class ShardChanged(DataError):
    """The file of a shard has changed, is missing, or is not on this machine."""


def check_digest(shard: FileShard, digest: str) -> None:
    """Raises `ShardChanged` unless the shard has this digest."""
    if digest != shard.digest:
        raise shard_changed(shard)


def shard_changed(shard: FileShard) -> ShardChanged:
    """The error for a shard whose file has changed."""
    return ShardChanged(f"{shard.path}: has changed since it was scanned, or is another file on this machine.")
