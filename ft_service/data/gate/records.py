"""Records as the gate checks them: one type, also for records that could not be read or converted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ft_service.data.convert import BadRecord, Conversation, columns_of, convert
from ft_service.data.files.shard import Fault, FileShard, IsWanted
from ft_service.data.gate.cures import record_cure
from ft_service.data.gate.text import fold
from ft_service.data.read import Scan, read_shard, scan
from ft_service.errors import DataError
from ft_service.spec.schema import OPTIONAL_COLUMNS, DataSource

Split = Literal["train", "validation"]

_SOURCE_BITS = 10
_FILE_BITS = 20
_LINE_BITS = 34


@dataclass(frozen=True)
class Source:
    """A source as the gate needs it: its settings, and its files in the order of their numbers in records."""

    path: str
    files: tuple[str, ...]
    format: Literal["alpaca", "chat", "text"] = "alpaca"
    source: str | None = None
    license: str | None = None
    foreign: tuple[str, ...] = ()
    """Files of the folder whose type is not read."""
    optional: tuple[str, ...] = ()
    """Columns that the spec names and a single record may lack. At least one record must have each."""
    used: frozenset[str] | None = None
    """Columns of the file that the format reads. None: unused fields are not looked for."""
    messages: str | None = None
    """The column of the conversations, in the chat format."""

    notes: tuple[tuple[str, str], ...] = ()
    """(file, how it is read) of the files whose content differs from what their names say."""
    texts: tuple[str, ...] = ()
    """Columns of the file that hold text; none in the chat format."""

    @classmethod
    def of(cls, source: DataSource, scan: Scan) -> "Source":
        """Made from a source of a spec."""
        optional = tuple(source.columns[name] for name in OPTIONAL_COLUMNS if name in source.columns)
        texts = {"alpaca": ("instruction", "input", "output", "system"), "chat": (), "text": ("text",)}[source.format]
        return cls(
            path=source.path,
            files=scan.files,
            format=source.format,
            source=source.source,
            license=source.license,
            foreign=scan.foreign,
            optional=optional,
            used=frozenset(columns_of(source).values()),
            messages=columns_of(source).get("messages"),
            notes=scan.notes,
            texts=tuple(source.columns.get(name, name) for name in texts),
        )


@dataclass(frozen=True)
class Tokens:
    """Lengths of a record in tokens, before (`total`, `loss`) and after (`kept`, `kept_loss`) max_seq_len cuts it."""

    total: int
    loss: int
    kept: int
    kept_loss: int
    ends: bool
    """Whether the end of the last turn (or of the text) is kept and trained on."""


@dataclass(frozen=True)
class Record:
    """One record: its place, and either its content or why it cannot be used."""

    source: int
    """Number of its source among the gate's."""
    file: int
    """Number of its file among the source's."""
    line: int
    """Line, row or record number from 1; 0 means the whole file."""
    item: Conversation | str | None = None
    fault: Fault | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    split: Split = "train"
    tokens: Tokens | None = None

    @property
    def key(self) -> int:
        """Its place as one number. Keys sort in the order of the data."""
        return place_key(self.source, self.file, self.line)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """All texts that are trained on."""
        if isinstance(self.item, str):
            return (self.item,)
        return tuple(message.content for message in self.item or () if message.is_trained)

    @cached_property
    def output(self) -> str:
        """The last of the texts that are trained on."""
        return self.outputs[-1] if self.outputs else ""

    @cached_property
    def prompt(self) -> str:
        """All text before the last answer; empty for a text."""
        if self.item is None or isinstance(self.item, str):
            return ""
        last = max((at for at, message in enumerate(self.item) if message.is_trained), default=len(self.item))
        return "\n\n".join(message.content for message in self.item[:last])

    @cached_property
    def question(self) -> str:
        """The last user turn before the last answer."""
        if self.item is None or isinstance(self.item, str):
            return ""
        last = max((at for at, message in enumerate(self.item) if message.is_trained), default=len(self.item))
        return next((message.content for message in reversed(self.item[:last]) if message.role == "user"), "")

    @cached_property
    def folded_prompt(self) -> str:
        """`prompt`, folded."""
        return fold(self.prompt)

    @cached_property
    def folded_output(self) -> str:
        """`output`, folded."""
        return fold(self.output)

    @cached_property
    def text(self) -> str:
        """All text of the record."""
        if isinstance(self.item, str):
            return self.item
        return "\n".join(text for message in self.item or () for text in (*message.functions, message.content))


def place_key(source: int, file: int, line: int) -> int:
    """Source, file and line, in this order, as one number of 64 bits."""
    if source >> _SOURCE_BITS or file >> _FILE_BITS or line >> _LINE_BITS:
        raise DataError(
            f"source {source}, file {file}, line {line}: too many for the gate "
            f"(at most {2**_SOURCE_BITS} sources of {2**_FILE_BITS} files). Join small files."
        )
    return (source << _FILE_BITS | file) << _LINE_BITS | line


def place_of(key: int) -> tuple[int, int, int]:
    """Source, file and line of a key."""
    line = key & (1 << _LINE_BITS) - 1
    rest = key >> _LINE_BITS
    return rest >> _FILE_BITS, rest & (1 << _FILE_BITS) - 1, line


# -- reading ---------------------------------------------------------------------------------------------------------


def records_of(
    shard: FileShard, source: DataSource, split: Split = "train", is_wanted: IsWanted | None = None
) -> Iterator[Record]:
    """Every record of a shard, in order, including those that cannot be used. Raises `ShardChanged`."""
    for number, raw in read_shard(shard, source, is_wanted):
        if isinstance(raw, Fault):
            yield Record(shard.source, shard.file, number, fault=raw, split=split)
        else:
            yield to_record(shard.source, shard.file, number, raw, source, split)


def read_source(number: int, source: DataSource, split: Split = "train") -> Iterator[Record]:
    """Every record of a source. Raises `DataError` where a file is missing."""
    for shard in scan(number, source).shards:
        yield from records_of(shard, source, split)


def read_questions(number: int, source: DataSource) -> Iterator[Record]:
    """Every record of an evaluation set; records need no answers. Raises `DataError` where a file is missing."""
    for shard in scan(number, source).shards:
        for line, raw in read_shard(shard, source):
            if isinstance(raw, Fault):
                yield Record(number, shard.file, line, fault=raw)
            else:
                yield to_record(number, shard.file, line, raw, source, needs_answer=False)


def to_record(
    number: int,
    file: int,
    line: int,
    raw: Mapping[str, Any],
    source: DataSource,
    split: Split = "train",
    needs_answer: bool = True,
) -> Record:
    """A raw record, converted; or the reason why it cannot be converted."""
    try:
        return Record(number, file, line, convert(raw, source, needs_answer), raw=raw, split=split)
    except BadRecord as error:
        fault = Fault(error.code, str(error), cure=record_cure(error.code, raw, source))
        return Record(number, file, line, fault=fault, raw=raw, split=split)
