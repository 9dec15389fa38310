"""Guesses the format and the columns of a record from its content."""

import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast

from ft_service.data.turns import from_json_text
from ft_service.spec.schema import FORMAT_COLUMNS

Format = Literal["alpaca", "chat", "text"]

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
_CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat")
_PREFERENCES = frozenset({"prompt", "completion", "chosen", "rejected"})
"""Columns of other tools that hold a part of a conversation, not a whole one."""
_QUESTIONS = (
    *("instruction", "prompt", "question", "query", "problem", "input", "user"),
    *("指示", "質問", "質問内容", "ご質問", "問題", "問い合わせ", "問い合わせ内容", "お問い合わせ", "お問い合わせ内容"),
)
_CONTEXTS = ("input", "context", "入力", "文脈")
_ANSWERS = (
    *("output", "completion", "response", "answer", "reply", "solution", "target", "assistant"),
    *("出力", "回答", "回答内容", "ご回答", "応答", "返答", "返信"),
)
_TEXTS = ("text", "content", "document", "body", "本文")


@dataclass(frozen=True)
class Guess:
    """A format, and the columns that have other names than ours."""

    format: Format
    columns: dict[str, str] = field(default_factory=dict)

    def as_setting(self, current: str | None = None) -> str:
        """As written in a source of a spec; the format only if it is not the `current` one."""
        parts = [] if self.format == current and self.columns else [f"format: {self.format}"]
        if self.columns:
            parts.append("columns: {" + ", ".join(f"{ours}: {name}" for ours, name in self.columns.items()) + "}")
        return " and ".join(parts)

    def as_options(self) -> str:
        """As options of `ft data`."""
        columns = [f"--column {shlex.quote(f'{ours}={name}')}" for ours, name in self.columns.items()]
        return " ".join([f"--format {self.format}", *columns])


def guess_of(
    record: Mapping[str, Any], formats: Collection[str] = tuple(FORMAT_COLUMNS), columns: Mapping[str, str] = NO_COLUMNS
) -> Guess | None:
    """One of the `formats`, with the `columns` that are known; None if nothing in the record looks like one."""
    is_alpaca = all(isinstance(record.get(name), str) for name in ("instruction", "output"))
    if "chat" in formats and not is_alpaca and (column := columns.get("messages") or _conversation_column(record)):
        return Guess("chat", {**_renamed(messages=column), **columns})
    question = columns.get("instruction") or _text_column(record, _QUESTIONS)
    answer = columns.get("output") or _text_column(record, _ANSWERS)
    if "alpaca" in formats and question and answer:
        context = columns.get("input") or _text_column(record, _CONTEXTS)
        context = None if context in (question, answer) else context
        return Guess("alpaca", {**_renamed(instruction=question, input=context, output=answer), **columns})
    if "text" in formats and (column := columns.get("text") or _text_column(record, _TEXTS)):
        return Guess("text", {**_renamed(text=column), **columns})
    return None


def merged(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One record with the fields of all: each with its first value that is not empty, if there is one."""
    whole: dict[str, Any] = {}
    for record in records:
        whole |= {name: value for name, value in record.items() if not whole.get(name)}
    return whole


def complete(record: Mapping[str, Any], format: Format | None, columns: Mapping[str, str]) -> Guess:
    """The given format and columns; what they leave open is guessed from a record."""
    fitting = [name for name, reads in FORMAT_COLUMNS.items() if set(columns) <= set(reads)]
    formats = [format] if format is not None else fitting
    if (guess := guess_of(record, formats, columns)) is not None:
        return guess
    named = [name for name, column in (("chat", "messages"), ("text", "text")) if column in record and name in formats]
    return Guess(cast(Format, [*named, *formats, "alpaca"][0]), dict(columns))


def _renamed(**columns: str | None) -> dict[str, str]:
    return {ours: name for ours, name in columns.items() if name is not None and name != ours}


def _conversation_column(record: Mapping[str, Any]) -> str | None:
    found = [name for name, value in record.items() if name not in _PREFERENCES and _is_conversation(value)]
    known = [name for name in _CONVERSATIONS if name in found]
    return known[0] if known else found[0] if len(found) == 1 else None


def _is_conversation(value: object) -> bool:
    turns = from_json_text(value)
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(
            isinstance(turn, Mapping) and ({"role"} <= turn.keys() or {"from", "value"} <= turn.keys())
            for turn in turns
        )
    )


def _text_column(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first column with one of these names, in this order, and a text. Upper and lower case are equal."""
    texts = {name.lower(): name for name, value in record.items() if isinstance(name, str) and isinstance(value, str)}
    return next((texts[name] for name in names if name in texts), None)
