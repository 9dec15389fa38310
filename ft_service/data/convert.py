"""Converts a record to what is trained on: a conversation or a text. Errors name what the record lacks."""

from collections.abc import Iterator, Mapping
from typing import Any

from ft_service.chat.format import Message
from ft_service.data.bad_record import BadRecord, check_unicode
from ft_service.data.guess import guess_of
from ft_service.data.turns import (
    EMPTY,
    IMAGE,
    Conversation,
    check_images,
    from_json_text,
    has_system,
    read_turns,
    unread_fields,
)
from ft_service.spec.schema import FORMAT_COLUMNS, DataSource

__all__ = ["BadRecord", "Conversation", "columns_of", "convert", "unused_fields"]

_REQUIRED = {"alpaca": ("instruction", "output"), "chat": ("messages",), "text": ("text",)}
_MISSING = "form.missing-column"
_JOIN = (
    "Join them: jq -c '{messages: (.prompt + .completion)} + del(.prompt, .completion)' FILE > JOINED. "
    "Set format: chat in the source"
)
_IMAGE_COLUMNS = ("image", "images")
_NOTHING: tuple[object, ...] = (None, "", [], {})


def convert(record: Mapping[str, Any], source: DataSource, needs_answer: bool = True) -> Conversation | str:
    """The conversation (formats alpaca and chat) or the text (format text) of a record. Raises `BadRecord`.

    Without `needs_answer`, a question is enough, as in an evaluation set.
    """
    column = columns_of(source)
    for name in _REQUIRED[source.format]:
        if column.get(name) not in record and (needs_answer or name != "output"):
            if all(isinstance(record.get(half), list) for half in ("prompt", "completion")):
                raise BadRecord(f"has its conversation in two columns, prompt and completion. {_JOIN}", _MISSING)
            columns = ", ".join(map(str, record)) or "none"
            guess = guess_of(record)
            setting = guess.as_setting(source.format) if guess is not None else f"columns: {{{name}: ...}}"
            raise BadRecord(
                f"has no column {column.get(name, name)!r} (its columns: {columns}). Set {setting} in the source",
                _MISSING,
            )
    for name in _IMAGE_COLUMNS:
        if name not in source.columns.values() and record.get(name) not in _NOTHING:
            raise BadRecord(f"has a column {name!r}; images are not supported yet", IMAGE)
    if source.format == "text":
        return _string(record, column["text"], True)
    if source.format == "chat":
        return _chat(record, column, needs_answer)
    return _alpaca(record, column, needs_answer)


def columns_of(source: DataSource) -> dict[str, str]:
    """Expected name -> name in the file, of the columns that the source's format reads.

    A column of the file that has another use is not read by its own name as well.
    """
    taken = source.columns.values()
    own = {name: name for name in FORMAT_COLUMNS[source.format] if name not in taken}
    return {**own, **source.columns}


def unused_fields(record: Mapping[str, Any], used: frozenset[str], messages: str | None) -> Iterator[str]:
    """The fields of a record with a value that no format reads; with `messages`, also the fields of its turns."""
    for name, value in record.items():
        if name not in used and value not in _NOTHING:
            yield str(name)
    turns = from_json_text(record.get(messages)) if messages is not None else None
    if isinstance(turns, list):
        names = {
            str(name)
            for turn in turns
            if isinstance(turn, Mapping)
            for name in unread_fields(turn)
            if turn[name] not in _NOTHING
        }
        yield from (f"{messages}.{name}" for name in sorted(names))


def _alpaca(record: Mapping[str, Any], column: Mapping[str, str], needs_answer: bool) -> Conversation:
    instruction = _string(record, column["instruction"])
    if needs_answer:
        output = _string(record, column["output"], True)
    else:
        output = _optional_string(record, column.get("output"), True)
    extra = _optional_string(record, column.get("input"))
    system = _optional_string(record, column.get("system"))
    question = f"{instruction}\n\n{extra}" if extra else instruction
    turns = (
        *([Message("system", system)] if system else []),
        *(_history(record.get(column["history"]), column["history"]) if "history" in column else ()),
        Message("user", question),
        *([Message("assistant", output)] if output else []),
    )
    for turn in turns:
        check_images(turn.content, f"a {turn.role} turn")
    return turns


def _history(history: object, column: str) -> Iterator[Message]:
    """The earlier turns: a list of [question, answer], or its JSON text."""
    history = from_json_text(history)
    if history in _NOTHING:
        return
    pairs = history if isinstance(history, list) else [None]
    for number, pair in enumerate(pairs, 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRecord(f"{column} is not a list of [question, answer] pairs of text")
        for text, role in zip(pair, ("user", "assistant"), strict=True):
            name = f"the {role} turn of pair {number} of {column}"
            if not text.strip():
                raise BadRecord(f"{name} is empty", EMPTY[role == "assistant"])
            check_unicode(text, name)
            yield Message(role, text)  # type: ignore[arg-type]


def _chat(record: Mapping[str, Any], column: Mapping[str, str], needs_answer: bool) -> Conversation:
    functions = record.get(column["tools"]) if "tools" in column else None
    turns = read_turns(record[column["messages"]], functions)
    if system := _optional_string(record, column.get("system")):
        check_images(system, column["system"])
        if has_system(turns) and turns[0].content.strip() != system:
            raise BadRecord(
                f"has a system turn and another system prompt in the column {column['system']!r}. Keep one of them",
                "form.two-systems",
            )
        turns = (Message("system", system), *turns[has_system(turns) :])
    if needs_answer and not any(turn.is_trained for turn in turns):
        raise BadRecord("has no assistant message to train on (none, or all with weight 0)", "form.no-answer")
    return turns


def _string(record: Mapping[str, Any], column: str, is_output: bool = False) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise BadRecord(f"{column} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRecord(f"{column} is empty", EMPTY[is_output])
    check_unicode(value, column)
    return value


def _optional_string(record: Mapping[str, Any], column: str | None, is_output: bool = False) -> str:
    value = record.get(column) if column is not None else None
    if value is None or column is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"{column} is {type(value).__name__}, not text")
    check_unicode(value, column)
    return value.strip()
