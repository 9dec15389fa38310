"""Decides by its content how a file is read. Its name decides only what its content leaves open."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_service.data.files.encoding import conversion_fault, marked_encoding
from ft_service.data.files.shard import MAX_ARRAY_BYTES, MAX_LINE_BYTES, Fault, Kind
from ft_service.spec.schema import COLUMNS

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_NAMES: dict[Kind, str] = {"lines": "JSON lines", "array": "a JSON array", "csv": "CSV", "parquet": "Parquet"}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dk"),
    b"BZh": ("bzip2", "bzip2 -dk"),
    b"\xfd7zXZ": ("xz", "xz -dk"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_EXCEL_97 = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_BEGINNING_BYTES = 2**20
_MARK = b"\xef\xbb\xbf"
_QUOTED = re.compile(r'"[^"]*"')
_DELIMITERS = ",;\t"
_LINE_END = re.compile(rb"\r\n|\r|\n")
_OTHER_COLUMNS = ("conversations", "prompt", "completion", "question", "answer", "response", "history")
_OF_A_RECORD = frozenset({*COLUMNS, *_OTHER_COLUMNS})
"""An object with one of these keys is a record, not the wrapper of a list of records."""


@dataclass(frozen=True)
class Content:
    """How a file is read."""

    kind: Kind
    fault: Fault | None = None
    """Why no record of the file can be read."""
    note: str = ""
    """How the file is read, where its name says otherwise."""
    delimiter: str = ","


def is_named_as_data(file: Path) -> bool:
    """Whether the suffix is one of a data file."""
    return file.suffix.lower() in _KINDS


def content_of(file: Path) -> Content | None:
    """How the file is read; None if neither its content nor its name says. Raises `OSError`."""
    with file.open("rb") as stream:
        beginning = stream.read(_BEGINNING_BYTES)
    named = _KINDS.get(file.suffix.lower())
    fault = _foreign_fault(file, beginning)
    if fault is not None:
        return Content(named or "lines", fault)
    if beginning.startswith(b"PAR1"):
        return _noted(file, Content("parquet"))
    text = _without_marks(beginning)
    content = None
    if text.startswith(b"{"):
        content = _object_content(file, text)
    elif re.match(rb"\[\s*(?:\{|\Z)" if file.suffix.lower() != ".json" else rb"\[", text):
        is_lines = file.suffix.lower() != ".json" and _is_json_line_of_several(text)
        content = Content("lines" if is_lines else "array")
    elif named == "lines" and _looks_like_csv(text):
        content = Content("csv")
    if content is None:
        content = Content(named) if named is not None else None
    if content is not None and content.kind == "csv":
        content = Content("csv", content.fault, content.note, _delimiter(text))
    return _noted(file, content) if content is not None else None


def records_below(value: dict[str, Any]) -> str | None:
    """The key of the list of records that an object wraps; None if the object is a record itself."""
    lists = [name for name, inner in value.items() if isinstance(inner, list) and inner and _all_objects(inner)]
    if len(lists) != 1 or not _OF_A_RECORD.isdisjoint(value):
        return None
    first = value[lists[0]][0]
    is_turn = "content" in first or "value" in first
    return None if is_turn and ("role" in first or "from" in first) else lists[0]


def column_table_fault(value: dict[str, Any]) -> Fault | None:
    """The fault for a table that is stored column by column, as pandas writes it by default."""
    inner = list(value.values())
    by_index = bool(inner) and all(isinstance(column, dict) and "0" in column for column in inner)
    by_list = len(inner) > 1 and all(
        isinstance(column, list) and column and all(isinstance(cell, str | None) for cell in column) for column in inner
    )
    is_split = {"columns", "data"} <= set(value) <= {"columns", "index", "data"}
    if not (by_index or by_list or is_split):
        return None
    return Fault(
        "form.unreadable-file",
        "is a table stored by column, not a list of records",
        cure='Write one record per line; with pandas: to_json("data.jsonl", orient="records", lines=True).',
    )


def _foreign_fault(file: Path, beginning: bytes) -> Fault | None:
    """The fault for a file that holds no records that can be read as they are."""
    name = shlex.quote(str(file))
    if beginning.startswith(_EXCEL_97) or (beginning.startswith(b"PK\x03\x04") and b"[Content_Types].xml" in beginning):
        return _unreadable("is an Excel workbook", "In Excel, save it as CSV UTF-8.")
    for mark, (packer, command) in _COMPRESSED.items():
        if beginning.startswith(mark):
            return _unreadable(f"is compressed with {packer}. Unpack it: {command} {name}", "Unpack the file.")
    if encoding := marked_encoding(beginning):
        return conversion_fault(file, encoding)
    start = beginning[:200].removeprefix(_MARK).lstrip().lower()
    if start.startswith(b"version https://git-lfs.github.com"):
        return _unreadable(
            "is a pointer of Git LFS, not the data. Fetch the data: git lfs pull", "Fetch it: git lfs pull"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        return _unreadable("is a web page, not the data", "Download the file itself, by its raw link.")
    return None


def _unreadable(reason: str, cure: str) -> Fault:
    return Fault("form.unreadable-file", reason, cure=cure)


def _without_marks(beginning: bytes) -> bytes:
    text = beginning.lstrip()
    while text.startswith(_MARK):
        text = text.removeprefix(_MARK).lstrip()
    return text


def _object_content(file: Path, text: bytes) -> Content | None:
    """Of a file that begins with an object: one record per line, or one document of several lines."""
    parts = [part for part in _LINE_END.split(text[:_BEGINNING_BYTES], maxsplit=50) if part.strip()]
    first = parts[0]
    size = file.stat().st_size
    if len(parts) == 1 and size > len(text) + 100:
        return _long_line_content(file)
    value = _parsed(first)
    if value is not None:
        return Content("lines") if len(parts) > 1 else _document_content(value)
    if file.suffix.lower() in (".csv", ".tsv"):
        return None
    if len(parts) == 1 or (not re.match(rb'\s*["}\]]', parts[1]) and not first.rstrip().endswith((b"[", b"{"))):
        return Content("lines")
    if size > MAX_ARRAY_BYTES:
        return Content("array")  # its reader states the limit
    try:
        value, _ = json.JSONDecoder().raw_decode(_without_marks(file.read_bytes()).decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return Content("array")  # its reader names the fault once, not at every line
    return _document_content(value, is_one_line=False)


def _long_line_content(file: Path) -> Content:
    """Of a file whose first line is longer than what was read."""
    with file.open("rb") as stream:
        line = stream.readline(MAX_LINE_BYTES)
        if stream.read(_BEGINNING_BYTES).strip():
            return Content("lines")
    value = _parsed(_without_marks(line))
    return Content("lines") if value is None else _document_content(value)


def _document_content(value: Any, is_one_line: bool = True) -> Content:
    """Of a file that holds one object, or that begins with an object of several lines."""
    if isinstance(value, dict):
        if (fault := column_table_fault(value)) is not None:
            return Content("array", fault)
        if (name := records_below(value)) is not None:
            others = ", ".join(repr(key) for key in value if key != name)
            unused = f"; its other fields ({others}) are not used" if others else ""
            return Content("array", note=f"has its records in the list {name!r}{unused}")
    if is_one_line:
        return Content("lines")
    return Content("array", note="has records of several lines each")


def _is_json_line_of_several(text: bytes) -> bool:
    """Whether the first line is a JSON value by itself, and others follow."""
    parts = [part for part in _LINE_END.split(text, maxsplit=50) if part.strip()]
    return len(parts) > 1 and _parsed(parts[0]) is not None


def _looks_like_csv(text: bytes) -> bool:
    """Whether a file of another name is CSV: a header of two or more columns, and as many cells in the next line."""
    lines = [line.decode("utf-8", "replace") for line in _LINE_END.split(text[:_SAMPLE_BYTES]) if line.strip()][:2]
    if len(lines) < 2 or not re.match(r'"?\w', lines[0]):
        return False
    delimiter = _delimiter(text)
    header, row = (_QUOTED.sub("", line).count(delimiter) for line in lines)
    return header > 0 and header == row


_SAMPLE_BYTES = 2**16


def _delimiter(text: bytes) -> str:
    """The delimiter of the header. Excel writes semicolons where the comma is the decimal mark."""
    header = _QUOTED.sub("", _LINE_END.split(text[:_SAMPLE_BYTES], maxsplit=1)[0].decode("utf-8", "replace"))
    return max(_DELIMITERS, key=header.count)


def _noted(file: Path, content: Content) -> Content:
    suffix = file.suffix.lower()
    is_usual = _KINDS.get(suffix) == content.kind or (suffix == ".json" and content.kind == "array")
    if is_usual or content.note or content.fault is not None:
        return content
    return Content(content.kind, None, f"holds {_NAMES[content.kind]} and is read as such", content.delimiter)


def _parsed(line: bytes) -> Any:
    """The JSON value of a line; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _all_objects(items: list[Any]) -> bool:
    return all(isinstance(item, dict) for item in items)
