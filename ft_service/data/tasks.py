"""The tasks of preparing data. They run in this process one after another, or in parallel on a cluster.

    check_shard   one shard     -> tokenised examples, facts and hits, in a folder on storage
    read_again    one shard     -> sketches of the records that may repeat each other
    pack          some shards   -> packed rows of the used records

A task reads its shard and the `TaskContext`, nothing else. In memory it keeps one batch of records, half a KiB of facts
for each record and, in `pack`, the examples of its shards.
"""

import dataclasses
import json
import tempfile
from collections import Counter
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
from ft_service.data.dataset import ROWS
from ft_service.data.encode import Encoder
from ft_service.data.files.shard import FileShard
from ft_service.data.gate import EvaluationSets, Gate, Hit, Record, SecondPass, Source, records_of
from ft_service.data.gate.gate import PartialResult
from ft_service.data.pack import pack_lengths
from ft_service.spec.schema import DataSource
from ft_service.storage.storage import Storage

Item = TypeVar("Item")
Result = TypeVar("Result")
RunTasks = Callable[[Callable[["TaskContext", Item], Result], "TaskContext", Sequence[Item]], Iterator[Result]]
"""Runs a task for each item, and yields the results in order."""

BATCH_RECORDS = 1000
_RESULT = "result"
_RESULT_FILE = "result.json"
"""The facts and hits of a shard, which the driver reads."""
_EXAMPLES = "examples"
_EXAMPLES_FILE = "examples.arrow"
"""The tokenised examples of a shard, which the packing tasks read."""

EXAMPLES = pa.schema(
    [
        ("key", pa.uint64()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("truncated", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class TaskContext:
    """The settings that all tasks of one preparation share."""

    storage: Storage
    folder: str
    """The dataset's folder on storage; the shards lie in its `shards_folder`."""
    inputs: tuple[DataSource, ...]
    """Training sources, then validation sources."""
    num_train: int
    """The number of training sources."""
    sources: tuple[Source, ...]
    """The same sources, as the gate needs them."""
    tokenizer: PreTrainedTokenizerBase | None
    """None checks the data without counting tokens."""
    max_seq_len: int
    evaluation: EvaluationSets | None = None
    keep: frozenset[str] = frozenset()
    packing: bool = True
    writes_examples: bool = True

    def gate(self, **settings: Any) -> Gate:
        """A gate for these sources; `settings` are those that only the whole judgement needs."""
        return Gate(
            self.sources,
            max_seq_len=self.max_seq_len,
            evaluation=self.evaluation,
            chat=self.chat(),
            keep=self.keep,
            **settings,
        )

    def chat(self) -> ChatFormat | None:
        """The chat format; None without a tokenizer, or if all sources are texts."""
        if self.tokenizer is None or all(source.format == "text" for source in self.inputs):
            return None
        return ChatFormat(self.tokenizer)

    def records(self, shard: FileShard, is_wanted: Callable[[int], bool] | None = None) -> Iterator[Record]:
        """The records of a shard. Raises `ShardChanged`."""
        split = "train" if shard.source < self.num_train else "validation"
        return records_of(shard, self.inputs[shard.source], split, is_wanted)  # type: ignore[arg-type]

    def place(self, number: int) -> str:
        """A shard's folder on storage."""
        return f"{shards_folder(self.folder)}/shard-{number:05}"


def shards_folder(folder: str) -> str:
    """The folder of the shards until the dataset is complete. Beside the dataset, so that workers never fetch it."""
    return f"{folder}.preparing"


def run_locally(
    task: Callable[[TaskContext, Item], Result], context: TaskContext, items: Sequence[Item]
) -> Iterator[Result]:
    """Run the tasks one after another in this process (a `RunTasks`)."""
    return (task(context, item) for item in items)


# -- checking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckedShard:
    """The counts of a checked shard. Its result and examples are on storage."""

    number: int
    records: int
    tokens: int


def check_shard(context: TaskContext, item: tuple[int, FileShard]) -> CheckedShard:
    """Read, check and tokenise a shard, unless its result is on storage already. Raises `ShardChanged`."""
    number, shard = item
    place = context.place(number)
    if context.storage.exists(f"{place}/{_RESULT}/{_RESULT_FILE}"):
        result = context.storage.read_json(f"{place}/{_RESULT}/{_RESULT_FILE}")
        return CheckedShard(number, sum(result["read"].values()), result["tokens"])
    gate = context.gate()
    encode = Encoder(context.tokenizer, context.chat(), context.max_seq_len)
    tokens = 0
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as files:
        result_folder = Path(temporary, _RESULT)
        examples_folder = Path(temporary, _EXAMPLES)
        result_folder.mkdir()
        examples_folder.mkdir()
        hits_file = files.enter_context(
            (result_folder / "hits.jsonl").open("w", encoding="utf-8", errors="surrogatepass")
        )
        examples = (
            files.enter_context(_ExampleWriter(examples_folder / _EXAMPLES_FILE)) if context.writes_examples else None
        )
        for batch in batched(context.records(shard), BATCH_RECORDS):
            encoded = encode(batch)
            used: list[tuple[int, list[Example]]] = []
            for record, (token_counts, record_examples) in zip(batch, encoded, strict=True):
                hits = gate.check(dataclasses.replace(record, tokens=token_counts))
                if hits:
                    hits_file.write(_line_of(hits))
                if record_examples and gate.reason_left_out(hits) is None:
                    used.append((record.key, record_examples))
                    tokens += sum(len(example.input_ids) for example in record_examples)
            if examples is not None:
                examples.write(used)
        files.close()
        partial = gate.partial_result()
        np.save(result_folder / "facts.npy", partial.facts, allow_pickle=False)
        result = {
            "read": partial.read,
            "rendered": partial.rendered,
            "tokens": tokens,
            "columns": sorted(partial.columns),
            "unused": [[source, name, count] for (source, name), count in sorted(partial.unused.items())],
        }
        (result_folder / _RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")
        if examples is not None:
            context.storage.put_folder(examples_folder, f"{place}/{_EXAMPLES}", marker=_EXAMPLES_FILE)
        context.storage.put_folder(result_folder, f"{place}/{_RESULT}", marker=_RESULT_FILE)
    return CheckedShard(number, sum(partial.read.values()), tokens)


def num_tokens_of(context: TaskContext, number: int) -> int:
    """Tokens of the examples of a checked shard."""
    return int(context.storage.read_json(f"{context.place(number)}/{_RESULT}/{_RESULT_FILE}")["tokens"])


def load_partial_result(context: TaskContext, number: int, fetched: Path) -> tuple[PartialResult, Iterator[list[Hit]]]:
    """The result of a checked shard, and the hits of each record that has any.

    The result reads its files while it is used; from remote storage they are fetched into the folder `fetched`.
    """
    folder = context.storage.local_folder(f"{context.place(number)}/{_RESULT}", fetched)
    result = json.loads((folder / _RESULT_FILE).read_text(encoding="utf-8"))
    read = {int(source): records for source, records in result["read"].items()}
    facts = np.load(folder / "facts.npy", mmap_mode="r", allow_pickle=False)
    columns = frozenset((source, name) for source, name in result["columns"])
    unused = Counter({(source, name): count for source, name, count in result["unused"]})
    return PartialResult(read, result["rendered"], facts, columns, unused), read_hits(folder / "hits.jsonl")


def read_hits(file: Path) -> Iterator[list[Hit]]:
    """The hits that `check_shard` wrote, one list for each record."""
    with file.open(encoding="utf-8", errors="surrogatepass") as stream:
        for line in stream:
            yield [Hit(*values) for values in json.loads(line)]


def _line_of(hits: Iterable[Hit]) -> str:
    values = [[hit.code, hit.key, hit.detail, hit.excerpt, hit.cure] for hit in hits]
    return json.dumps(values, ensure_ascii=False) + "\n"


class _ExampleWriter:
    """Writes examples to an Arrow file."""

    def __init__(self, file: Path) -> None:
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, EXAMPLES)

    def __enter__(self) -> "_ExampleWriter":
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


# -- second pass -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reread:
    """Records of a shard to read a second time."""

    shard: FileShard
    keys: np.ndarray
    """uint64, sorted."""
    lines: frozenset[int]


def read_again(context: TaskContext, reread: Reread) -> SecondPass:
    """Read some records of a shard a second time. Raises `ShardChanged`."""
    second_pass = SecondPass(reread.keys.tolist())
    for record in context.records(reread.shard, reread.lines.__contains__):
        second_pass.add(record)
    return second_pass


# -- packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardGroup:
    """Shards whose examples are packed together, and their used records."""

    number: int
    shards: tuple[int, ...]
    keys: np.ndarray
    """uint64 [used records], sorted."""
    held_out: np.ndarray
    """bool [used records]: for validation."""


@dataclass(frozen=True)
class PackedGroup:
    """The counts of a packed group: (training, validation)."""

    rows: tuple[int, int]
    conversations: tuple[int, int]
    tokens: tuple[int, int]
    loss_tokens: tuple[int, int]
    truncated: tuple[int, int]


def pack(context: TaskContext, group: ShardGroup) -> PackedGroup:
    """Write the training rows and the validation rows of a group into ``<folder>/rows-<number>/``."""
    with tempfile.TemporaryDirectory() as temporary:
        places = [f"{context.place(number)}/{_EXAMPLES}" for number in group.shards]
        folders = [context.storage.local_folder(place, Path(temporary, "fetched")) for place in places]
        examples = _ExampleTable([folder / _EXAMPLES_FILE for folder in folders])
        at = np.minimum(np.searchsorted(group.keys, examples.keys), max(0, len(group.keys) - 1))
        is_used = group.keys[at] == examples.keys if len(group.keys) else np.zeros(len(examples.keys), dtype=bool)
        is_held_out = group.held_out[at] if len(group.keys) else is_used
        counts = []
        folder = Path(temporary, "rows")
        folder.mkdir()
        for name, chosen in (("train", is_used & ~is_held_out), ("validation", is_used & is_held_out)):
            numbers = np.flatnonzero(chosen)
            lengths = examples.lengths[numbers]
            rows = (
                pack_lengths(lengths, context.max_seq_len)
                if context.packing
                else [[place] for place in range(len(numbers))]
            )
            if rows:
                examples.write_rows(folder / f"{name}.arrow", [numbers[row] for row in rows])
            counts.append(
                (
                    len(rows),
                    len(numbers),
                    int(lengths.sum()),
                    int(examples.loss_tokens[numbers].sum()),
                    int(examples.truncated[numbers].sum()),
                )
            )
        (folder / "packed.json").write_text(json.dumps(counts), encoding="utf-8")
        context.storage.put_folder(folder, f"{context.folder}/rows-{group.number:05}", marker="packed.json")
    return PackedGroup(*zip(*counts, strict=True))


class _ExampleTable:
    """The examples of some files, as flat arrays."""

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
        # The first token of an example is not predicted.
        self.loss_tokens = trained[self._starts[1:]] - trained[self._starts[:-1]] - np.asarray(first, dtype=np.int64)

    def write_rows(self, file: Path, rows: Sequence[np.ndarray]) -> None:
        """Write one row for each array of example numbers."""
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, ROWS) as writer:
            for batch in batched(rows, BATCH_RECORDS):
                order = np.concatenate(batch)
                lengths = self.lengths[order]
                tokens = _ranges(self._starts[order], lengths)
                documents = np.cumsum([0, *map(len, batch)])
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
    """The numbers start, start + 1, ... of all ranges, concatenated."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(_array(offsets.astype(np.int32)), _array(values))


def _array(values: np.ndarray) -> pa.Array:
    """The same as `pa.array`, which imports pandas: a third of a second in every worker."""
    bits = np.packbits(values, bitorder="little") if values.dtype == np.bool_ else values
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(bits)])


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last one may be shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
