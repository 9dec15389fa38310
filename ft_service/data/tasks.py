"""The tasks of preparing data, each over a part of it: run here one after another, or on a cluster side by side.

    examine      a shard       -> tokenised examples, facts and findings, in a folder on storage
    look_again   a shard       -> what records that may repeat each other really say
    pack         some shards   -> packed rows, of the records that are used

A task reads its shard and what it is told, and nothing else; it keeps no more than a batch of records in memory, its
facts (half a KiB a record) and, for `pack`, the examples of its shards.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import ChatFormat, Example
from ft_service.data.encode import Encoder
from ft_service.data.gate import EvaluationSets, Hit, Judge, Looks, Record, Source, records_of
from ft_service.data.gate.judge import Seen
from ft_service.data.pack import pack_lengths
from ft_service.data.read import Shard
from ft_service.spec.schema import DataSource
from ft_service.storage.storage import Storage

Item = TypeVar("Item")
Result = TypeVar("Result")
Run = Callable[[Callable[["Work", Item], Result], "Work", Sequence[Item]], Iterator[Result]]
"""Runs a task for each item; gives the results in order."""

BATCH_RECORDS = 1000
_SEEN, _MARKER = "seen", "seen.json"
_EXAMPLES, _EXAMPLES_FILE = "examples", "examples.arrow"
"""What was seen of a shard goes to the driver, its examples to whoever packs them."""

EXAMPLES = pa.schema(
    [
        ("key", pa.uint64()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("truncated", pa.bool_()),
    ]
)
ROWS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("document_lengths", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Work:
    """What all tasks of a preparation know."""

    storage: Storage
    folder: str
    """On storage; what is wanted only until it is whole is `preparing` it, beside it."""
    inputs: tuple[DataSource, ...]
    """Training sources, then validation sources."""
    num_train: int
    """How many of them are for training."""
    sources: tuple[Source, ...]
    """The same, as the gate knows them."""
    tokenizer: PreTrainedTokenizerBase | None
    """None judges without counting tokens."""
    max_seq_len: int
    evaluation: EvaluationSets | None = None
    keep: frozenset[str] = frozenset()
    packing: bool = True
    writes_examples: bool = True

    def judge(self, **more: Any) -> Judge:
        """A judge of these sources; `more` are settings that only the last judgement needs."""
        return Judge(
            self.sources,
            max_seq_len=self.max_seq_len,
            evaluation=self.evaluation,
            chat=self.chat(),
            keep=self.keep,
            **more,
        )

    def chat(self) -> ChatFormat | None:
        """None where there is no tokenizer, or no conversation that would need the format."""
        if self.tokenizer is None or all(source.format == "text" for source in self.inputs):
            return None
        return ChatFormat(self.tokenizer)

    def records(self, shard: Shard, wants: Callable[[int], bool] | None = None) -> Iterator[Record]:
        """The records of a shard. Raises `ShardChanged`."""
        split = "train" if shard.source < self.num_train else "validation"
        return records_of(shard, self.inputs[shard.source], split, wants)  # type: ignore[arg-type]

    def place(self, number: int) -> str:
        """A shard's folder on storage."""
        return f"{preparing(self.folder)}/shard-{number:05}"


def preparing(folder: str) -> str:
    """Where the shards of a dataset lie until it is whole: beside it, so that who fetches it never fetches them."""
    return f"{folder}.preparing"


def here(task: Callable[[Work, Item], Result], work: Work, items: Sequence[Item]) -> Iterator[Result]:
    """One after another in this process (a `Run`)."""
    return (task(work, item) for item in items)


# -- examine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examined:
    """A shard that was examined; the rest of it lies on storage."""

    number: int
    records: int
    tokens: int


def examine(work: Work, item: tuple[int, Shard]) -> Examined:
    """Read, judge and tokenise a shard, unless that was done before. Raises `ShardChanged`."""
    number, shard = item
    place = work.place(number)
    if work.storage.exists(f"{place}/{_SEEN}/{_MARKER}"):
        told = work.storage.read_json(f"{place}/{_SEEN}/{_MARKER}")
        return Examined(number, sum(told["read"].values()), told["tokens"])
    judge, encode = work.judge(), Encoder(work.tokenizer, work.chat(), work.max_seq_len)
    tokens = 0
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as files:
        folder, beside = Path(temporary, _SEEN), Path(temporary, _EXAMPLES)
        folder.mkdir()
        beside.mkdir()
        hits = files.enter_context((folder / "hits.jsonl").open("w", encoding="utf-8", errors="surrogatepass"))
        examples = files.enter_context(_Examples(beside / _EXAMPLES_FILE)) if work.writes_examples else None
        for batch in batched(work.records(shard), BATCH_RECORDS):
            encoded = encode(batch)
            used: list[tuple[int, list[Example]]] = []
            for record, (counted, made) in zip(batch, encoded, strict=True):
                found = judge.see(dataclasses.replace(record, tokens=counted))
                if found:
                    hits.write(_line_of(found))
                if made and judge.is_left_out(found) is None:
                    used.append((record.key, made))
                    tokens += sum(len(example.input_ids) for example in made)
            if examples is not None:
                examples.write(used)
        files.close()
        seen = judge.seen()
        np.save(folder / "facts.npy", seen.facts, allow_pickle=False)
        told = {"read": seen.read, "rendered": seen.rendered, "tokens": tokens, "columns": sorted(seen.columns)}
        (folder / _MARKER).write_text(json.dumps(told), encoding="utf-8")
        if examples is not None:
            work.storage.put_folder(beside, f"{place}/{_EXAMPLES}", marker=_EXAMPLES_FILE)
        work.storage.put_folder(folder, f"{place}/{_SEEN}", marker=_MARKER)
    return Examined(number, sum(seen.read.values()), tokens)


def tokens_of(work: Work, number: int) -> int:
    """Tokens of the examples of a shard that was examined."""
    return int(work.storage.read_json(f"{work.place(number)}/{_SEEN}/{_MARKER}")["tokens"])


def seen_of(work: Work, number: int, fetched: Path) -> tuple[Seen, Iterator[list[Hit]]]:
    """What was seen of a shard that was examined, and the hits of each record that has any.

    The files stay in use; from remote storage they are fetched below the folder `fetched`.
    """
    folder = work.storage.local_folder(f"{work.place(number)}/{_SEEN}", fetched)
    told = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    read = {int(source): records for source, records in told["read"].items()}
    facts = np.load(folder / "facts.npy", mmap_mode="r", allow_pickle=False)
    columns = frozenset((source, name) for source, name in told["columns"])
    return Seen(read, told["rendered"], facts, columns), hits_of(folder / "hits.jsonl")


def hits_of(file: Path) -> Iterator[list[Hit]]:
    """Hits as `examine` wrote them, a record at a time."""
    with file.open(encoding="utf-8", errors="surrogatepass") as stream:
        for line in stream:
            yield [Hit(*values) for values in json.loads(line)]


def _line_of(hits: Iterable[Hit]) -> str:
    values = [[hit.code, hit.key, hit.detail, hit.excerpt] for hit in hits]
    return json.dumps(values, ensure_ascii=False) + "\n"


class _Examples:
    """Writes examples to an Arrow file."""

    def __init__(self, file: Path) -> None:
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, EXAMPLES)

    def __enter__(self) -> "_Examples":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._sink.close()

    def write(self, used: Iterable[tuple[int, list[Example]]]) -> None:
        pairs = [(key, example) for key, examples in used for example in examples]
        ids = [example.input_ids for _, example in pairs]
        ends = np.cumsum([0, *map(len, ids)])
        tokens = int(ends[-1])
        mask = chain.from_iterable(example.loss_mask for _, example in pairs)
        columns = [
            _array(np.fromiter((key for key, _ in pairs), np.uint64, len(pairs))),
            _lists(ends, np.fromiter(chain.from_iterable(ids), np.int32, tokens)),
            _lists(ends, np.fromiter(mask, np.bool_, tokens)),
            _array(np.fromiter((example.truncated for _, example in pairs), np.bool_, len(pairs))),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=EXAMPLES))


# -- look again ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The records of a shard that are read a second time."""

    shard: Shard
    keys: np.ndarray
    """uint64, sorted."""
    lines: frozenset[int]


def look_again(work: Work, wanted: Wanted) -> Looks:
    """Read some records of a shard once more. Raises `ShardChanged`."""
    looks = Looks(wanted.keys.tolist())
    for record in work.records(wanted.shard, wanted.lines.__contains__):
        looks.see(record)
    return looks


# -- pack ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Shards whose examples are packed together, and which of their records are used."""

    number: int
    shards: tuple[int, ...]
    keys: np.ndarray
    """uint64 [used records], sorted."""
    held_out: np.ndarray
    """bool [used records]: for validation."""


@dataclass(frozen=True)
class Packed:
    """What came of a group: of training, of validation."""

    rows: tuple[int, int]
    conversations: tuple[int, int]
    tokens: tuple[int, int]
    loss_tokens: tuple[int, int]
    truncated: tuple[int, int]


def pack(work: Work, group: Group) -> Packed:
    """Write the rows of a group, training and validation apart, into ``<folder>/rows-<number>/``."""
    with tempfile.TemporaryDirectory() as temporary:
        places = [f"{work.place(number)}/{_EXAMPLES}" for number in group.shards]
        folders = [work.storage.local_folder(place, Path(temporary, "fetched")) for place in places]
        examples = _Flat([folder / _EXAMPLES_FILE for folder in folders])
        at = np.minimum(np.searchsorted(group.keys, examples.keys), max(0, len(group.keys) - 1))
        is_used = group.keys[at] == examples.keys if len(group.keys) else np.zeros(len(examples.keys), dtype=bool)
        is_held_out = group.held_out[at] if len(group.keys) else is_used
        found = []
        folder = Path(temporary, "rows")
        folder.mkdir()
        for name, chosen in (("train", is_used & ~is_held_out), ("validation", is_used & is_held_out)):
            numbers = np.flatnonzero(chosen)
            lengths = examples.lengths[numbers]
            rows = (
                pack_lengths(lengths, work.max_seq_len) if work.packing else [[place] for place in range(len(numbers))]
            )
            if rows:
                examples.write_rows(folder / f"{name}.arrow", [numbers[row] for row in rows])
            found.append(
                (
                    len(rows),
                    len(numbers),
                    int(lengths.sum()),
                    int(examples.loss_tokens[numbers].sum()),
                    int(examples.truncated[numbers].sum()),
                )
            )
        (folder / "packed.json").write_text(json.dumps(found), encoding="utf-8")
        work.storage.put_folder(folder, f"{work.folder}/rows-{group.number:05}", marker="packed.json")
    return Packed(*zip(*found, strict=True))


class _Flat:
    """The examples of some files as flat arrays."""

    def __init__(self, files: Sequence[Path]) -> None:
        table = pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files])
        ids, mask = (table.column(name).combine_chunks() for name in ("input_ids", "loss_mask"))
        self.keys = table.column("key").to_numpy()
        self.truncated = table.column("truncated").to_numpy()
        self._starts = ids.offsets.to_numpy().astype(np.int64)
        self._ids = ids.values.to_numpy()
        self._mask = mask.values.to_numpy(zero_copy_only=False)
        self.lengths = np.diff(self._starts)
        trained = np.concatenate([[0], np.cumsum(self._mask, dtype=np.int64)])
        first = self._mask[np.minimum(self._starts[:-1], max(0, len(self._mask) - 1))] if len(self._mask) else 0
        # The first token of an example is never predicted.
        self.loss_tokens = trained[self._starts[1:]] - trained[self._starts[:-1]] - np.asarray(first, dtype=np.int64)

    def write_rows(self, file: Path, rows: Sequence[np.ndarray]) -> None:
        """Write rows, each of the examples of these numbers."""
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, ROWS) as writer:
            for some in batched(rows, BATCH_RECORDS):
                order = np.concatenate(some)
                lengths = self.lengths[order]
                tokens = _ranges(self._starts[order], lengths)
                documents = np.cumsum([0, *map(len, some)])
                ends = np.concatenate([[0], np.cumsum(lengths)])[documents]
                writer.write_batch(
                    pa.RecordBatch.from_arrays(
                        [
                            _lists(ends, self._ids[tokens]),
                            _lists(ends, self._mask[tokens]),
                            _lists(documents, lengths.astype(np.int32)),
                        ],
                        schema=ROWS,
                    )
                )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(_array(offsets.astype(np.int32)), _array(values))


def _array(values: np.ndarray) -> pa.Array:
    """As `pa.array` makes it, which would load pandas first: a third of a second in every worker."""
    bits = np.packbits(values, bitorder="little") if values.dtype == np.bool_ else values
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(bits)])


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many items, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
