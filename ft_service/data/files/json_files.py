"""Reads JSON lines and JSON arrays."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from ft_service.data.files.shard import (
    ENCODING_MARK_BYTES,
    MAX_LINE_BYTES,
    Fault,
    FileShard,
    IsWanted,
    Record,
    check_digest,
    other_encoding_fault,
    other_encoding_of,
)

MAX_ARRAY_BYTES = 256 * 2**20
"""Limit of a JSON array, which is read whole and then takes about five times as much memory."""


def read_lines(shard: FileShard, is_wanted: IsWanted | None) -> Iterator[tuple[int, Record | Fault]]:
    """The records of some lines, with their line numbers. Blank lines are no records."""
    digest = hashlib.sha256()
    with open(shard.path, "rb") as stream:
        if shard.start == 0 and (encoding := other_encoding_of(stream.read(ENCODING_MARK_BYTES))):
            yield 0, other_encoding_fault(encoding)
            return
        stream.seek(shard.start)
        remaining = shard.end - shard.start
        number = shard.first
        while remaining > 0:
            line = stream.readline(min(remaining, MAX_LINE_BYTES))
            if not line:
                break
            digest.update(line)
            remaining -= len(line)
            is_whole = True
            while remaining > 0 and not line.endswith(b"\n"):  # too long: skip the rest of the line
                is_whole = False
                line = stream.readline(min(remaining, MAX_LINE_BYTES))
                digest.update(line)
                remaining -= len(line)
                if not line:
                    break
            if is_wanted is None or is_wanted(number):
                if not is_whole:
                    yield number, Fault("form.unreadable", f"is longer than {MAX_LINE_BYTES // 2**20} MiB")
                elif line.strip():
                    yield number, _parsed(line, number)
            number += 1
    check_digest(shard, digest.hexdigest())


def _parsed(line: bytes, number: int) -> Record | Fault:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Fault("form.encoding", f"is not UTF-8 (byte {error.start}: {error.reason})", _as_text(line))
    except (ValueError, RecursionError) as error:
        return Fault("form.unreadable", f"is not JSON ({error})", _as_text(line))
    return _if_object(record)


def _as_text(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace").rstrip("\r\n")


def read_array(shard: FileShard) -> Iterator[tuple[int, Record | Fault]]:
    """The records of a JSON array, numbered from 1."""
    if shard.end > MAX_ARRAY_BYTES:
        limit = MAX_ARRAY_BYTES // 2**20
        reason = f"is a JSON array of more than {limit} MiB. Write one record per line (.jsonl)"
        yield 0, Fault("form.unreadable-file", reason)
        return
    content = Path(shard.path).read_bytes()
    check_digest(shard, hashlib.sha256(content).hexdigest())
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield content[: error.start].count(b"\n") + 1, Fault("form.unreadable-file", f"is not UTF-8 ({error.reason})")
        return
    except (ValueError, RecursionError) as error:
        yield 0, Fault("form.unreadable-file", f"is not a JSON array of records ({error})")
        return
    del content
    for number, record in enumerate(records, 1):
        yield number, _if_object(record)


def _if_object(record: object) -> Record | Fault:
    if isinstance(record, dict):
        return record
    text = json.dumps(record, ensure_ascii=False)
    return Fault("form.unreadable", f"is a JSON {type(record).__name__}, not an object with columns", text)
