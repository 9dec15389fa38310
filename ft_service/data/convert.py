"""Converts a record to what is trained on: a conversation or a text. Errors name what the record lacks."""

from collections.abc import Mapping
from typing import Any, cast

from ft_service.chat.format import ROLES, Message, Role
from ft_service.spec.schema import COLUMNS, DataSource

Conversation = tuple[Message, ...]

_REQUIRED = {"alpaca": ("instruction", "output"), "chat": ("messages",), "text": ("text",)}
_COLUMNS = {name: name for name in COLUMNS}
_EMPTY = ("form.empty-input", "form.empty-output")


class BadRecord(ValueError):
    """One record cannot be used. Carries the data gate's code; the caller adds the place."""

    def __init__(self, reason: str, code: str = "form.wrong-type") -> None:
        super().__init__(reason, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


def convert(record: Mapping[str, Any], source: DataSource, needs_answer: bool = True) -> Conversation | str:
    """The conversation (formats alpaca and chat) or the text (format text) of a record. Raises `BadRecord`.

    Without `needs_answer`, a question is enough, as in an evaluation set.
    """
    column = {**_COLUMNS, **source.columns}
    for name in _REQUIRED[source.format]:
        if column[name] not in record and (needs_answer or name != "output"):
            columns = ", ".join(map(str, record)) or "none"
            raise BadRecord(
                f"has no column {column[name]!r} (its columns: {columns}). Set columns: {{{name}: ...}} in the source",
                "form.missing-column",
            )
    if source.format == "text":
        return _string(record, column["text"], True)
    if source.format == "chat":
        return _chat(record[column["messages"]], needs_answer)
    return _alpaca(record, column, needs_answer)


def _alpaca(record: Mapping[str, Any], column: Mapping[str, str], needs_answer: bool) -> Conversation:
    instruction = _string(record, column["instruction"])
    read = _string if needs_answer else _optional_string
    output = read(record, column["output"], True)
    extra = _optional_string(record, column["input"])
    system = _optional_string(record, column["system"])
    question = f"{instruction}\n\n{extra}" if extra else instruction
    turns = (Message("user", question), *([Message("assistant", output)] if output else []))
    return (Message("system", system), *turns) if system else turns


def _chat(messages: object, needs_answer: bool) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise BadRecord("its messages are not a list of at least one message")
    turns = tuple(_message(number, message) for number, message in enumerate(messages, 1))
    if needs_answer and not any(turn.is_trained for turn in turns):
        raise BadRecord("has no assistant message to train on (none, or all with weight 0)", "form.no-answer")
    return turns


def _message(number: int, message: object) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise BadRecord(f"message {number} is not an object with role and content")
    role = message["role"]
    content = message["content"]
    weight = message.get("weight")
    if role not in ROLES:
        raise BadRecord(
            f"message {number} has the unknown role {role!r} (known: {', '.join(ROLES)})", "form.unknown-role"
        )
    if not isinstance(content, str):
        raise BadRecord(f"the content of message {number} is not text")
    if not content.strip():
        raise BadRecord(f"the content of message {number} is empty", _EMPTY[role == "assistant"])
    _check_unicode(content, f"the content of message {number}")
    if weight not in (None, 0, 1):
        raise BadRecord(f"message {number} has weight {weight!r} (allowed: 0 and 1)")
    return Message(cast(Role, role), content, weight)


def _string(record: Mapping[str, Any], column: str, is_output: bool = False) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise BadRecord(f"{column} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRecord(f"{column} is empty", _EMPTY[is_output])
    _check_unicode(value, column)
    return value


def _optional_string(record: Mapping[str, Any], column: str, is_output: bool = False) -> str:
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"{column} is {type(value).__name__}, not text")
    _check_unicode(value, column)
    return value.strip()


def _check_unicode(text: str, name: str) -> None:
    """JSON can escape half a character (``\\ud83d`` alone), which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{name} contains half a character, {text[error.start]!r}, at position {error.start}", "form.encoding"
        ) from None
