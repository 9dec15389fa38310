"""Checks a training file as OpenAI's cookbook does, and as the trainer will: every error with line, field and reason.

The codes are those of the cookbook (`data_type`, `missing_messages_list`, ...), and some of our own for what it does
not check. A file without errors can be read by the trainer, whole.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ft_service.chat.format import ROLES, ChatFormat
from ft_service.data.convert import BadRecord, Conversation, convert
from ft_service.data.files.content import content_of
from ft_service.data.files.json_files import read_lines
from ft_service.data.files.shard import Fault, FileShard
from ft_service.data.turns import read_any_turns, read_functions, unread_fields
from ft_service.spec.schema import DataSource
from ft_service.text import counted

MOST_ERRORS = 100_000
"""So many are listed; the others are only counted."""
_CHAT = DataSource(path="training_file", format="chat")
_BATCH_BYTES = 2**20
"""Of examples whose tokens are counted at once, and one more example."""
MAX_LINE_BYTES = 8 * 2**20
"""An example has millions of tokens then. Parsing a longer line would stop all other threads for too long."""
_MESSAGE_NUMBER = re.compile(r"message (\d+)")
_CODES = {
    "form.encoding": "invalid_encoding",
    "form.tool-call": "invalid_tool_call",
    "form.image": "unsupported_image",
    "form.unknown-role": "unrecognized_role",
    "form.empty-input": "missing_content",
    "form.empty-output": "missing_content",
    "form.no-answer": "example_missing_assistant_message",
}
_FAULTS = (
    ("is a JSON ", "data_type"),
    ("has the key ", "duplicate_key"),
    ("is longer than ", "line_too_long"),
    ("is not UTF-8", "invalid_encoding"),
)
"""How the reasons of the reader begin."""
_DETAILS = 3
_MOST_SHOWN = 500


@dataclass(frozen=True)
class FileProblem:
    """One error. `line` is counted from 1; None means the whole file."""

    line: int | None
    field: str | None
    code: str
    message: str

    def __str__(self) -> str:
        place = ", ".join(part for part in (f"line {self.line}" if self.line else "", self.field or "") if part)
        return f"{place}: {self.message} ({self.code})" if place else f"{self.message} ({self.code})"


@dataclass(frozen=True)
class NamedTokenizer:
    """A chat format, and the bases that have its tokenizer."""

    bases: tuple[str, ...]
    chat: ChatFormat


@dataclass
class Counts:
    """Tokens by one tokenizer."""

    bases: tuple[str, ...]
    tokens: int = 0
    trained_tokens: int = 0
    longest_example: int = 0


@dataclass
class Checked:
    """What the check of a file has found."""

    examples: int = 0
    valid_examples: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """How many of each code."""
    listed: list[FileProblem] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    def add(self, line: int | None, where: str | None, code: str, message: str) -> None:
        problem = FileProblem(line, where and _shown(where), code, _shown(message))
        self.errors[problem.code] += 1
        if len(self.listed) < MOST_ERRORS:
            self.listed.append(problem)

    def details(self) -> str | None:
        """The first errors in one line; None without errors."""
        if not self.errors:
            return None
        first = "; ".join(map(str, self.listed[:_DETAILS]))
        rest = self.num_errors - _DETAILS
        return f"{counted(self.num_errors, 'error')}. {first}" + (f"; and {rest:,} more." if rest > 0 else ".")


def check_file(path: Path, digest: str, size: int, tokenizers: Sequence[NamedTokenizer], min_examples: int) -> Checked:
    """Check a file of JSON lines whose SHA-256 is `digest`, and count the tokens of its valid examples.

    In memory it keeps some examples and the errors. Raises `ShardChanged` if the file has other bytes.
    """
    checked = Checked(counts=[Counts(tokenizer.bases) for tokenizer in tokenizers])
    problem = _problem_of_file(path)
    if problem is not None:
        checked.add(None, None, *problem)
        return checked
    shard = FileShard(0, 0, str(path), "lines", 0, size, 1, digest)
    for batch in _batches(_conversations(read_lines(shard, None, MAX_LINE_BYTES), checked)):
        for tokenizer, counts in zip(tokenizers, checked.counts, strict=True):
            for example in tokenizer.chat.encode_batch(batch):
                counts.tokens += len(example.input_ids)
                counts.trained_tokens += example.num_loss_tokens
                counts.longest_example = max(counts.longest_example, len(example.input_ids))
    if checked.examples < min_examples:
        message = f"The file has {counted(checked.examples, 'example')}, and at least {min_examples} are needed."
        checked.add(None, None, "too_few_examples", message)
    return checked


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    size = 0
    for conversation in conversations:
        batch.append(conversation)
        size += sum(len(turn.content) for turn in conversation)
        if size >= _BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _problem_of_file(path: Path) -> tuple[str, str] | None:
    """Code and message of why no line of the file can be read."""
    if path.stat().st_size == 0:
        return "empty_file", "The file is empty."
    content = content_of(path)
    if content is None or (content.kind == "lines" and content.fault is None):
        return None
    reason = content.fault.reason if content.fault is not None else f"holds {content.kind}, not JSON lines"
    reason = reason.replace(str(path), "FILE").replace(path.name, "FILE")
    return "invalid_file_format", f"The file {reason}. Write one JSON object per line."


def _conversations(records: Iterator[tuple[int, dict[str, Any] | Fault]], checked: Checked) -> Iterator[Conversation]:
    """The valid examples; the errors of all others are added to `checked`."""
    for line, record in records:
        checked.examples += 1
        if isinstance(record, Fault):
            checked.add(line, None, _code_of_fault(record), f"The line {record.reason}.")
            continue
        conversation, problems = read_example(record)
        for where, code, message in problems:
            checked.add(line, where, code, message)
        if conversation is not None:
            checked.valid_examples += 1
            yield conversation


def _code_of_fault(fault: Fault) -> str:
    return next((code for start, code in _FAULTS if fault.reason.startswith(start)), "invalid_json")


Problem = tuple[str | None, str, str]
"""Field, code and message."""


def read_example(record: Mapping[str, Any]) -> tuple[Conversation | None, list[Problem]]:
    """The conversation of an example, or everything that is wrong with it."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        hint = (
            " Preference data (input, preferred_output) cannot be trained on." if "preferred_output" in record else ""
        )
        return None, [("messages", "missing_messages_list", f"The example has no list of messages.{hint}")]
    wrong = [list(_problems_of_message(f"messages[{at}]", message)) for at, message in enumerate(messages)]
    problems = [*chain.from_iterable(wrong), *_problems_of_tools(record)]
    if not any(isinstance(message, Mapping) and message.get("role") == "assistant" for message in messages):
        reason = "The example has no assistant message, which is what is trained."
        problems.append(("messages", "example_missing_assistant_message", reason))
    if not problems:
        try:
            conversation = convert(record, _CHAT)
            assert not isinstance(conversation, str)
            return conversation, []
        except BadRecord as error:
            problems.append(_of_bad_record(error))
    known = {(where, code) for where, code, _ in problems}
    for at, (message, own) in enumerate(zip(messages, wrong, strict=True)):
        if not own:  # what the trainer's reader would refuse once the other errors are corrected
            problems += [one for one in _refused_by_reader(at, message) if one[:2] not in known]
    return None, problems


def _problems_of_message(where: str, message: object) -> Iterator[Problem]:
    if not isinstance(message, Mapping):
        yield where, "data_type", f"{where} is {_kind(message)}, not an object."
        return
    calls = message.get("tool_calls") or message.get("function_call")
    if "role" not in message:
        yield f"{where}.role", "message_missing_key", f"{where} has no role."
    elif message["role"] not in ROLES:
        known = ", ".join(ROLES)
        shown = repr(message["role"])[:100]
        yield f"{where}.role", "unrecognized_role", f"{where} has the role {shown}; known roles are {known}."
    if "content" not in message and not calls:
        yield f"{where}.content", "message_missing_key", f"{where} has no content."
    elif not calls and message.get("role") != "tool" and _is_empty(message.get("content")):
        yield f"{where}.content", "missing_content", f"{where} has no content."
    weight = message.get("weight")
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        yield f"{where}.weight", "invalid_weight", f"{where} has the weight {repr(weight)[:100]}; 0 and 1 are allowed."
    for name in sorted(unread_fields(message) - {"name"}):
        if message[name] is not None:
            shown = name[:100]
            yield f"{where}.{shown}", "message_unrecognized_key", f"{where} has the unknown key {shown!r}."


def _problems_of_tools(record: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        read_functions(record.get("tools"))
    except BadRecord:
        yield "tools", "invalid_tools", "tools is not a list of JSON objects."


def _refused_by_reader(at: int, message: object) -> Iterator[Problem]:
    try:
        read_any_turns([message])
    except BadRecord as error:
        reason = _MESSAGE_NUMBER.sub(f"message {at + 1}", str(error), count=1)
        yield _of_bad_record(BadRecord(reason, error.code))


def _of_bad_record(error: BadRecord) -> Problem:
    found = _MESSAGE_NUMBER.search(str(error))
    where = f"messages[{int(found.group(1)) - 1}]" if found else "messages"
    reason = _MESSAGE_NUMBER.sub(where, str(error), count=1)
    return where, _CODES.get(error.code, "invalid_message"), f"{reason[0].upper()}{reason[1:]}."


def _shown(text: str) -> str:
    """A text that JSON and every database can hold, and not too long."""
    whole = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in whole)


def _is_empty(content: object) -> bool:
    return content is None or content == [] or (isinstance(content, str) and not content.strip())


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
