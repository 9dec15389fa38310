"""Reads the rows of a training file of OpenAI, and reports each that cannot be trained on here, by its line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_service.data.bad_record import BadRecord
from ft_service.data.turns import read_turns, unread_fields
from ft_service.errors import UsageError

_READ = frozenset({"messages", "tools"})
_PREFERENCE = frozenset({"preferred_output", "non_preferred_output"})
_NOTHING: tuple[object, ...] = (None, "", [], {})

PREFERENCE_REASON = "is a preference row (DPO), which is not carried over yet"
COMPLETION_REASON = "is a row of prompt and completion; write it as messages"


@dataclass(frozen=True)
class BadLine:
    """A row that cannot be trained on, and why."""

    line: int
    reason: str


@dataclass
class RowReport:
    """The rows of one file."""

    rows: int = 0
    with_tools: int = 0
    with_weights: int = 0
    """Rows in which a message has a `weight`."""
    preference_rows: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)
    ignored_fields: set[str] = field(default_factory=set)
    """Fields that training does not read, such as `parallel_tool_calls`."""

    @property
    def usable(self) -> int:
        return self.rows - len(self.bad_lines)


def read_rows(file: Path) -> RowReport:
    """Read every row. Raises `UsageError` if the file cannot be read; a bad row is in the report."""
    report = RowReport()
    for number, line in _lines(file):
        report.rows += 1
        try:
            _read_row(_parse(line), report)
        except BadRecord as error:
            report.bad_lines.append(BadLine(number, str(error)))
    return report


def usable_lines(file: Path, report: RowReport) -> Iterator[bytes]:
    """The lines without those that the report names."""
    bad = {one.line for one in report.bad_lines}
    return (line.rstrip(b"\r\n") + b"\n" for number, line in _lines(file) if number not in bad)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}).") from None


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is not JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise BadRecord("is not a JSON object")
    return row


def _read_row(row: Mapping[str, Any], report: RowReport) -> None:
    if row.keys() & _PREFERENCE:
        report.preference_rows += 1
        raise BadRecord(PREFERENCE_REASON)
    if "messages" not in row:
        raise BadRecord(COMPLETION_REASON if "prompt" in row else "has no messages")
    if row.get("functions") not in _NOTHING:
        raise BadRecord('has `functions`, the older form of tools; write each as {"type": "function", "function": ...}')
    turns = read_turns(row["messages"], row.get("tools"))
    if not any(turn.is_trained for turn in turns):
        raise BadRecord("has no assistant message to train on (none, or all with weight 0)")
    report.with_tools += any(turn.uses_tools for turn in turns)
    report.with_weights += any(turn.weight is not None for turn in turns)
    report.ignored_fields |= {str(name) for name, value in row.items() if name not in _READ and value not in _NOTHING}
    for message in row["messages"]:
        names = (name for name in unread_fields(message) if message[name] not in _NOTHING)
        report.ignored_fields |= {f"messages.{name}" for name in names}
