"""Reads CSV with a header."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from ft_service.data.files.shard import (
    ENCODING_MARK_BYTES,
    MAX_LINE_BYTES,
    Fault,
    FileShard,
    Record,
    check_digest,
    other_encoding_fault,
    other_encoding_of,
)

_LINE_END = re.compile(r"\r\n|\r|\n")


def read_csv(shard: FileShard) -> Iterator[tuple[int, Record | Fault]]:
    """The records of a file, each with the number of its first line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with open(shard.path, "rb") as file:
        if encoding := other_encoding_of(file.read(ENCODING_MARK_BYTES)):
            yield 0, other_encoding_fault(encoding)
            return
        file.seek(0)
        hashed = _HashedFile(file)
        # Bytes that are not UTF-8 are decoded to half characters, so that one of them spoils one record, not the file.
        text = io.TextIOWrapper(io.BufferedReader(hashed), "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, strict=True)
        last_line = 1
        while True:
            try:
                record = next(reader, None)
            except csv.Error as error:
                # An open quotation mark takes in the rest of the file. The fault names the line where it opens.
                yield last_line + 1, Fault("form.unreadable", f"is not CSV ({error})")
                last_line = reader.reader.line_num
                continue
            if record is None:
                break
            last_line = reader.line_num
            yield last_line - _line_ends(record), _if_complete(record, len(reader.fieldnames or []))
        check_digest(shard, hashed.digest.hexdigest())


def _line_ends(record: dict[str | None, Any]) -> int:
    """Line ends inside the values of a record."""
    values = chain.from_iterable(value if isinstance(value, list) else [value or ""] for value in record.values())
    return sum(len(_LINE_END.findall(value)) for value in values)


def _if_complete(record: dict[str | None, Any], columns: int) -> Record | Fault:
    # DictReader files values beyond the header under None, and gives None to columns without a value.
    if None in record or None in record.values():
        text = json.dumps(list(record.values()), ensure_ascii=False)
        return Fault("form.unreadable", f"does not have the {columns} columns of the header", text)
    for value in record.values():
        if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
            return Fault("form.encoding", "is not UTF-8", json.dumps(list(record.values())))
    return dict(record)  # type: ignore[arg-type]


class _HashedFile(io.RawIOBase):
    """A file whose digest is computed as it is read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count
