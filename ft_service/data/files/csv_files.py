"""Reads CSV with a header."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from ft_service.data.files.shard import MAX_LINE_BYTES, Fault, FileShard, Record, check_digest

_MARK = "\ufeff"
_CLOSE_QUOTES = 'Close the quotation mark, and write a quotation mark inside a value twice ("").'
_LINE_END = re.compile(r"\r\n|\r|\n")


def read_csv(shard: FileShard) -> Iterator[tuple[int, Record | Fault]]:
    """The records of a file, each with the number of its first line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with open(shard.path, "rb") as file:
        hashed = _HashedFile(file)
        # Bytes that are not UTF-8 are decoded to half characters, so that one of them spoils one record, not the file.
        text = io.TextIOWrapper(io.BufferedReader(hashed), "utf-8", errors="surrogateescape", newline="")
        # Files that were joined have a byte order mark at the start of each.
        lines = (line.lstrip(_MARK) for line in text)
        reader = csv.DictReader(lines, strict=True, delimiter=shard.delimiter)
        if (fault := _header_fault(reader)) is not None:
            yield 0, fault
            return
        header = list(reader.fieldnames or [])
        last_line = 1
        while True:
            try:
                record = next(reader, None)
            except csv.Error as error:
                # An open quotation mark takes in the rest of the file. The fault names the line where it opens.
                yield last_line + 1, Fault("form.unreadable", f"is not CSV ({error})", cure=_CLOSE_QUOTES)
                last_line = reader.reader.line_num
                continue
            if record is None:
                break
            last_line = reader.line_num
            yield last_line - _line_ends(record), _if_complete(record, header)
        check_digest(shard, hashed.digest.hexdigest())


def _line_ends(record: dict[str | None, Any]) -> int:
    """Line ends inside the values of a record."""
    values = chain.from_iterable(value if isinstance(value, list) else [value or ""] for value in record.values())
    return sum(len(_LINE_END.findall(value)) for value in values)


def _header_fault(reader: "csv.DictReader[str]") -> Fault | None:
    """Why no record can be read with this header."""
    try:
        header = reader.fieldnames or []
    except csv.Error as error:
        return Fault("form.unreadable-file", f"has a header that is not CSV ({error})", cure=_CLOSE_QUOTES)
    if (name := first_doubled(header)) is None:
        return None
    return Fault(
        "form.unreadable-file",
        f"has two columns {name!r} in its header, so one of them would be lost",
        cure="Rename one of the two columns, or remove it.",
    )


def first_doubled(names: Iterable[str]) -> str | None:
    """The first name that occurs twice. Columns without a name hold nothing that can be used."""
    return next((name for name, count in Counter(names).items() if name and count > 1), None)


def _if_complete(record: dict[str | None, Any], header: list[str]) -> Record | Fault:
    # DictReader files values beyond the header under None, and gives None to columns without a value.
    if None in record or None in record.values():
        text = json.dumps(list(record.values()), ensure_ascii=False)
        return Fault(
            "form.unreadable",
            f"does not have the {len(header)} columns of the header",
            text,
            cure="Put values that contain a delimiter or a line end between quotation marks, or complete the line.",
        )
    if len(header) > 1 and list(record.values()) == header:
        text = json.dumps(header, ensure_ascii=False)
        return Fault("form.unreadable", "repeats the header", text, cure="Remove the headers between joined files.")
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
