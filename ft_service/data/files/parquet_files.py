"""Reads Parquet."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ft_service.data.files.csv_files import first_doubled
from ft_service.data.files.shard import Fault, FileShard, Record, check_digest

_BATCH_ROWS = 256
"""Records in memory at a time."""
_END_BYTES = 2**16


def row_groups(file: Path, shard_bytes: int) -> list[tuple[int, int, int]]:
    """(start, end, first row) of each shard, in row groups. A damaged file is one shard."""
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            sizes = [
                (parquet.metadata.row_group(at).num_rows, parquet.metadata.row_group(at).total_byte_size)
                for at in range(parquet.metadata.num_row_groups)
            ]
    except (pyarrow.ArrowException, OSError):
        return [(0, 0, 1)]
    groups: list[tuple[int, int, int]] = []
    start = 0
    first = 1
    row = 1
    num_bytes = 0
    for end, (group_rows, group_bytes) in enumerate(sizes, start=1):
        row += group_rows
        num_bytes += group_bytes
        if num_bytes >= shard_bytes or end == len(sizes):
            groups.append((start, end, first))
            start = end
            first = row
            num_bytes = 0
    return groups or [(0, 0, 1)]


def digest_of_end(file: Path) -> str:
    """SHA-256 of the end of a file, where Parquet lists the places and sizes of its row groups."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _END_BYTES))
        return hashlib.sha256(stream.read()).hexdigest()


def read_parquet(shard: FileShard) -> Iterator[tuple[int, Record | Fault]]:
    """The rows of some row groups, with their row numbers."""
    check_digest(shard, digest_of_end(Path(shard.path)))
    number = shard.first
    try:
        with pyarrow.parquet.ParquetFile(shard.path) as parquet:
            if (name := first_doubled(parquet.schema_arrow.names)) is not None:
                yield (
                    0,
                    Fault(
                        "form.unreadable-file",
                        f"has two columns {name!r}, so one of them would be lost",
                        cure="Rename one of the two columns, or remove it.",
                    ),
                )
                return
            groups = list(range(shard.start, shard.end))
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups) if groups else ():
                for record in _rows(batch):
                    yield number, record
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield 0, Fault("form.unreadable-file", f"cannot be read as Parquet ({error}). It may be cut off")


def nan_as_null(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """NaN in a column of numbers is how pandas writes a missing value."""
    for at, field in enumerate(batch.schema):
        if pyarrow.types.is_floating(field.type):
            is_nan = pyarrow.compute.is_nan(batch.column(at))
            column = pyarrow.compute.if_else(is_nan, pyarrow.scalar(None, field.type), batch.column(at))
            batch = batch.set_column(at, field, column)
    return batch


def _rows(batch: pyarrow.RecordBatch) -> list[Record]:
    """The rows as Python values. A column with a date beyond Python's (year 10000) is given as text or numbers."""
    batch = nan_as_null(batch)
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):
        columns = [_values(column) for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pyarrow.Array) -> list[Any]:
    for type_ in (None, pyarrow.string(), pyarrow.int64(), pyarrow.int32()):
        try:
            return (column if type_ is None else column.cast(type_)).to_pylist()
        except (OverflowError, ValueError, NotImplementedError):  # Arrow's own errors are subclasses of these
            continue
    return ["<values that Python cannot represent>"] * len(column)
