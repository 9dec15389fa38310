"""Masks private data in the values of a record, and lists what it masked, without the private data itself."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ft_service.data.gate.private import MASKS, find_private

Search = Callable[[str], Iterator[tuple[str, int, int]]]


@dataclass(frozen=True)
class Redaction:
    """One piece of private data that was replaced by its mask."""

    code: str
    column: str
    """Where in the record: ``output``, or ``messages[1].content``."""
    start: int
    """Position in the original value, in characters."""
    characters: int
    mask: str


def redact(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Redaction]]:
    """The record with private data in its text values replaced by masks such as ``[phone]``, and each replacement.

    All columns are searched, not only those that are trained on; names of columns stay.
    """
    redactions: list[Redaction] = []
    return {name: _redacted(value, name, redactions) for name, value in record.items()}, redactions


def redact_pieces(record: Mapping[str, Any], pieces: Mapping[str, str]) -> tuple[dict[str, Any], list[Redaction]]:
    """Like `redact`, for given private texts (text -> code): those that only the whole record shows to be private.

    "What is your card number?" in one column makes the figures in the next one a card number.
    """
    redactions: list[Redaction] = []

    def search(text: str) -> Iterator[tuple[str, int, int]]:
        return _occurrences(text, pieces)

    return {name: _redacted(value, name, redactions, search) for name, value in record.items()}, redactions


def _occurrences(text: str, pieces: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    for piece, code in pieces.items():
        for match in re.finditer(re.escape(piece), text):
            yield code, *match.span()


def redact_text(text: str, column: str = "") -> tuple[str, list[Redaction]]:
    """The text with private data replaced by masks, and each replacement."""
    redactions: list[Redaction] = []
    return _redacted_text(text, column, redactions), redactions


def _redacted(value: Any, place: str, redactions: list[Redaction], search: Search = find_private) -> Any:
    if isinstance(value, str):
        return _redacted_text(value, place, redactions, search)
    if isinstance(value, Mapping):
        return {name: _redacted(inner, f"{place}.{name}", redactions, search) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(inner, f"{place}[{at}]", redactions, search) for at, inner in enumerate(value)]
    return value


def _redacted_text(text: str, place: str, redactions: list[Redaction], search: Search = find_private) -> str:
    pieces = []
    at = 0
    for code, start, end in sorted(search(text), key=lambda span: span[1]):
        if start < at:
            continue
        pieces += [text[at:start], MASKS[code]]
        at = end
        redactions.append(Redaction(code, place, start, end - start, MASKS[code]))
    return "".join([*pieces, text[at:]]) if pieces else text
