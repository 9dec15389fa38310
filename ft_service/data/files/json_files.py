"""Reads JSON lines and JSON arrays."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ft_service.data.files.content import column_table_fault, records_below
from ft_service.data.files.csv_files import first_doubled
from ft_service.data.files.shard import (
    MAX_ARRAY_BYTES,
    MAX_LINE_BYTES,
    Fault,
    FileShard,
    IsWanted,
    Record,
    check_digest,
)

_BLOCK_BYTES = 2**20
_MARK = "\ufeff"
_BETWEEN = re.compile("[ \t\r\n\ufeff]*")
"""White space between values, and the byte order marks of files that were joined."""
_AS_JSON = "Write each record as one line of JSON, with double quotes (in Python: json.dumps)."


def read_lines(
    shard: FileShard, is_wanted: IsWanted | None, max_line_bytes: int | None = None
) -> Iterator[tuple[int, Record | Fault]]:
    """The records of some lines, with their line numbers. Blank lines are no records."""
    max_line_bytes = MAX_LINE_BYTES if max_line_bytes is None else max_line_bytes
    digest = hashlib.sha256()
    with open(shard.path, "rb") as stream:
        stream.seek(shard.start)
        lines = _lines(stream, shard.end - shard.start, digest, max_line_bytes)
        for number, (line, is_whole) in enumerate(lines, start=shard.first):
            if is_wanted is None or is_wanted(number):
                if not is_whole:
                    reason = f"is longer than {max_line_bytes // 2**20} MiB"
                    yield number, Fault("form.unreadable", reason, cure="Split the record.")
                elif line.strip():
                    yield number, _parsed(line)
    check_digest(shard, digest.hexdigest())


def _lines(stream: BinaryIO, size: int, digest: "hashlib._Hash", max_line_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Each line of the next `size` bytes, and whether it is whole; a longer line than the limit is cut off.

    Lines end with LF, CRLF, or CR alone (Excel for Mac).
    """
    parts: list[bytes] = []
    length = 0
    while size > 0 and (block := stream.read(min(size, _BLOCK_BYTES))):
        while block.endswith(b"\r") and len(block) < size and (more := stream.read(1)):
            block += more  # the LF of a CRLF
        size -= len(block)
        digest.update(block)
        for piece in block.splitlines(keepends=True):
            if length <= max_line_bytes:
                parts.append(piece)
            length += len(piece)
            if piece.endswith((b"\n", b"\r")):
                yield b"".join(parts), length <= max_line_bytes
                parts = []
                length = 0
    if parts:
        yield b"".join(parts), length <= max_line_bytes


def _parsed(line: bytes) -> Record | Fault:
    try:
        record = _decoder.decode(line.decode().lstrip(_MARK))
    except UnicodeDecodeError as error:
        return Fault("form.encoding", f"is not UTF-8 (byte {error.start}: {error.reason})", _as_text(line))
    except _DoubledKey as error:
        return Fault("form.unreadable", str(error), _as_text(line), cure=_REMOVE_KEY)
    except (ValueError, RecursionError) as error:
        return Fault("form.unreadable", f"is not JSON ({error})", _as_text(line), cure=_AS_JSON)
    return _if_object(record)


class _DoubledKey(ValueError):
    """An object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        key = first_doubled(key for key, _ in pairs)
        raise _DoubledKey(f"has the key {key!r} twice, so one of the two values would be lost")
    return value


# NaN and the infinities are no JSON; Python writes NaN for a missing value.
_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda _: None)
_REMOVE_KEY = "Rename one of the two keys, or remove it."


def _as_text(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace").rstrip("\r\n")


def read_array(shard: FileShard) -> Iterator[tuple[int, Record | Fault]]:
    """The records of a JSON document, numbered from 1: an array, an object that wraps one, or objects in sequence."""
    if shard.end > MAX_ARRAY_BYTES:
        limit = MAX_ARRAY_BYTES // 2**20
        reason = f"is one JSON document of more than {limit} MiB. Write one record per line (.jsonl)"
        yield 0, Fault("form.unreadable-file", reason, cure="Write one record per line (.jsonl).")
        return
    content = Path(shard.path).read_bytes()
    check_digest(shard, hashlib.sha256(content).hexdigest())
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield content[: error.start].count(b"\n") + 1, Fault("form.unreadable-file", f"is not UTF-8 ({error.reason})")
        return
    del content
    try:
        records, fault = _records_of(text)
    except _DoubledKey as error:
        yield 0, Fault("form.unreadable-file", str(error), cure=_REMOVE_KEY)
        return
    except (ValueError, RecursionError) as error:
        is_array = _BETWEEN.sub("", text[:1000], count=1).startswith("[")
        what = "a JSON array of records" if is_array else "JSON"
        yield 0, Fault("form.unreadable-file", f"is not {what} ({error})", cure=_AS_JSON)
        return
    if fault is not None:
        yield 0, fault
        return
    for number, record in enumerate(records, 1):
        yield number, _if_object(record)


def _records_of(text: str) -> tuple[list[Any], Fault | None]:
    """The records of a document. Raises `ValueError`."""
    values = []
    at = _BETWEEN.match(text).end()  # type: ignore[union-attr]
    while at < len(text):
        value, end = _decoder.raw_decode(text, at)
        values.append(value)
        at = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]
    if len(values) == 1 and isinstance(values[0], dict):
        if (fault := column_table_fault(values[0])) is not None:
            return [], fault
        if (name := records_below(values[0])) is not None:
            return values[0][name], None
    return [record for value in values for record in (value if isinstance(value, list) else [value])], None


def _if_object(record: object) -> Record | Fault:
    if isinstance(record, dict):
        return record
    text = json.dumps(record, ensure_ascii=False)
    reason = f"is a JSON {type(record).__name__}, not an object with columns"
    return Fault("form.unreadable", reason, text, cure='Write it as an object with columns: {"instruction": ...}.')
