"""Sources to a prepared dataset on storage: tokenised, masked and packed once, before any worker starts.

    <storage>/datasets/<digest>/   train.arrow  validation.arrow  manifest.json

The digest covers everything the result depends on, so the same data is prepared once and a changed file never meets an
old cache.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ft_service.chat import CHAT_TEMPLATE, ChatFormat, Example, encode_texts
from ft_service.data.convert import BadRecord, Conversation, convert
from ft_service.data.pack import pack_lengths
from ft_service.data.read import Faults, read_records, source_digest
from ft_service.errors import DataError
from ft_service.plan import DatasetFacts
from ft_service.registry import DatasetRef
from ft_service.spec import DataSource, RunSpec, ValidationFraction
from ft_service.storage import Storage

Say = Callable[[str], None]

_FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_BATCH_RECORDS = 2000
MEASURED_RECORDS = 20_000
"""`measure_dataset` tokenises at most this many of each source, and scales up."""

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("document_lengths", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Row:
    """One packed sequence: ids int32 [T], loss mask bool [T], and the lengths int32 [D] of its documents (sum T)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    document_lengths: np.ndarray


class RowTable:
    """Packed rows in an Arrow file, memory-mapped: opening costs nothing, and processes of a node share the pages."""

    def __init__(self, file: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Row:
        ids, mask, lengths = (
            self._table.column(name)[index].values.to_numpy(zero_copy_only=False) for name in _SCHEMA.names
        )
        return Row(ids, mask, lengths)


@dataclass(frozen=True)
class PreparedDataset:
    """A dataset as workers read it."""

    digest: str
    facts: DatasetFacts
    sources: list[DatasetRef]
    train: RowTable
    validation: RowTable | None


def prepare_dataset(
    spec: RunSpec, tokenizer: PreTrainedTokenizerBase, storage: Storage, progress: Say = lambda text: None
) -> PreparedDataset:
    """Prepare the spec's data, or open it if that was done before.

    Raises `DataError` with every record that cannot be used; nothing is written then.
    """
    digests = {index: source_digest(source) for index, source in enumerate(_all_sources(spec))}
    digest = _dataset_digest(spec, tokenizer, digests)
    if storage.exists(f"datasets/{digest}/{_MANIFEST}"):
        progress(f"Data: prepared before, {storage.uri(f'datasets/{digest}')}")
        return open_dataset(storage, digest)
    progress("Data: reading, tokenising and packing")
    splits = _read_splits(spec, tokenizer, progress)
    train_rows = _pack(splits.train, spec)
    validation_rows = _pack(splits.validation, spec)
    facts = _facts(digest, splits, len(train_rows), len(validation_rows))
    sources = [
        DatasetRef(path=s.path, source=s.source, license=s.license, records=splits.records[i], digest=digests[i])
        for i, s in enumerate(_all_sources(spec))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "dataset")
        folder.mkdir()
        _write_rows(folder / "train.arrow", splits.train, train_rows)
        if validation_rows:
            _write_rows(folder / "validation.arrow", splits.validation, validation_rows)
        manifest = {
            "format_version": _FORMAT_VERSION,
            "facts": facts.model_dump(mode="json"),
            "sources": [source.model_dump(mode="json") for source in sources],
        }
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        storage.put_folder(folder, f"datasets/{digest}", marker=_MANIFEST)
    return open_dataset(storage, digest)


def open_dataset(storage: Storage, digest: str) -> PreparedDataset:
    """A dataset that was prepared before; raises `StorageError` if it is not there."""
    manifest = storage.read_json(f"datasets/{digest}/{_MANIFEST}")
    folder = storage.local_folder(f"datasets/{digest}")
    validation = folder / "validation.arrow"
    return PreparedDataset(
        digest=digest,
        facts=DatasetFacts.model_validate(manifest["facts"]),
        sources=[DatasetRef.model_validate(source) for source in manifest["sources"]],
        train=RowTable(folder / "train.arrow"),
        validation=RowTable(validation) if validation.is_file() else None,
    )


def measure_dataset(spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> DatasetFacts:
    """The facts of the spec's data, without writing anything; large data is sampled and scaled, and `exact` False."""
    splits = _read_splits(spec, tokenizer, lambda text: None, limit=MEASURED_RECORDS)
    facts = _facts("not prepared", splits, len(_pack(splits.train, spec)), len(_pack(splits.validation, spec)))
    if splits.records == splits.converted:
        return facts
    num_train = len(spec.data.train)
    train_scale = sum(splits.records[:num_train]) / sum(splits.converted[:num_train])
    validation_scale = train_scale
    if isinstance(spec.data.validation, list):
        validation_scale = sum(splits.records[num_train:]) / max(1, sum(splits.converted[num_train:]))
    counts = {
        name: round(value * (validation_scale if name.startswith("validation_") else train_scale))
        for name, value in facts.model_dump(exclude={"digest", "exact"}).items()
    }
    return facts.model_copy(update={**counts, "exact": False})


# -- reading and encoding --------------------------------------------------------------------------------------------


@dataclass
class _Splits:
    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    """Records read of each source."""
    converted: list[int] = field(default_factory=list)
    """Of these, the ones that were used and not only counted."""


def _all_sources(spec: RunSpec) -> list[DataSource]:
    validation = spec.data.validation
    return [*spec.data.train, *(validation if isinstance(validation, list) else [])]


def _read_splits(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, progress: Say, limit: int | None = None) -> _Splits:
    splits, faults = _Splits(), Faults()
    encode = _Encoder(tokenizer, spec.data.max_seq_len, faults)
    keyed: list[tuple[float, list[Example]]] = []
    for index, source in enumerate(_all_sources(spec)):
        splits.records.append(0)
        splits.converted.append(0)
        held_out = index >= len(spec.data.train)
        for batch in _batches(_items(source, faults, splits, limit), _BATCH_RECORDS):
            for (item, _), examples in zip(batch, encode(source, batch), strict=True):
                if held_out:
                    splits.validation += examples
                else:
                    keyed.append((_share(item, spec.train.seed), examples))
            progress(f"Data: {sum(splits.records):,} records read")
        if splits.records[index] == 0 and not faults.count:
            raise DataError(f"{source.path}: holds no records. Name a file that has some.")
    faults.raise_if_any()
    validation = spec.data.validation
    fraction = validation.fraction if isinstance(validation, ValidationFraction) else 0.0
    threshold = _threshold([share for share, _ in keyed], fraction)
    for share, examples in keyed:
        (splits.validation if share < threshold else splits.train).extend(examples)
    return splits


def _items(
    source: DataSource, faults: Faults, splits: _Splits, limit: int | None
) -> Iterator[tuple[Conversation | str, str]]:
    """Converted records and their places; beyond `limit` records are only counted."""
    for record, place in read_records(source, faults):
        splits.records[-1] += 1
        if limit is not None and splits.records[-1] > limit:
            continue
        splits.converted[-1] += 1
        try:
            yield convert(record, source), place
        except BadRecord as error:
            faults.add(place, str(error))


class _Encoder:
    """Converted records to examples, many at a time: the tokenizer then uses all cores."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, faults: Faults) -> None:
        self._tokenizer, self._max_seq_len, self._faults = tokenizer, max_seq_len, faults
        self._chat: ChatFormat | None = None

    def __call__(self, source: DataSource, batch: Sequence[tuple[Any, str]]) -> list[list[Example]]:
        if source.format == "text":
            return encode_texts(self._tokenizer, [text for text, _ in batch], self._max_seq_len)
        self._chat = self._chat or ChatFormat(self._tokenizer)
        examples = self._chat.encode_batch([messages for messages, _ in batch], self._max_seq_len)
        for example, (_, place) in zip(examples, batch, strict=True):
            if example.num_loss_tokens == 0:
                reason = f"has no loss token left within data.max_seq_len = {self._max_seq_len} tokens"
                self._faults.add(place, reason if example.truncated else "has no loss token")
        return [[example] for example in examples]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _share(item: Conversation | str, seed: int) -> float:
    """A number in [0, 1) that depends on seed and content alone: equal records never land on both sides of a split.

    Weights, and whitespace that the chat format strips, make no difference: what the model reads is the same.
    """
    content = item if isinstance(item, str) else [(message.role, message.content.strip()) for message in item]
    digest = hashlib.sha256(json.dumps([seed, content]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _threshold(shares: Sequence[float], fraction: float) -> float:
    """What lies below is held out: about `fraction`, and of two or more distinct records at least one on a side."""
    distinct = sorted(set(shares))
    if fraction == 0 or len(distinct) < 2:
        return 0.0
    return min(max(fraction, distinct[1]), distinct[-1])


# -- packing and writing ---------------------------------------------------------------------------------------------


def _pack(examples: Sequence[Example], spec: RunSpec) -> list[list[int]]:
    if not spec.data.packing:
        return [[number] for number in range(len(examples))]
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    return pack_lengths(lengths, spec.data.max_seq_len)


def _write_rows(file: Path, examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for start in range(0, len(rows), _BATCH_RECORDS):
            chosen = [[examples[number] for number in row] for row in rows[start : start + _BATCH_RECORDS]]
            columns = {
                "input_ids": [[token for example in row for token in example.input_ids] for row in chosen],
                "loss_mask": [[trained for example in row for trained in example.loss_mask] for row in chosen],
                "document_lengths": [[len(example.input_ids) for example in row] for row in chosen],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))


def _facts(digest: str, splits: _Splits, train_rows: int, validation_rows: int) -> DatasetFacts:
    def tokens(examples: Sequence[Example]) -> int:
        return sum(len(example.input_ids) for example in examples)

    def loss_tokens(examples: Sequence[Example]) -> int:
        return sum(example.num_loss_tokens for example in examples)

    return DatasetFacts(
        digest=digest,
        conversations=len(splits.train),
        rows=train_rows,
        tokens=tokens(splits.train),
        loss_tokens=loss_tokens(splits.train),
        truncated=sum(example.truncated for example in splits.train),
        validation_conversations=len(splits.validation),
        validation_rows=validation_rows,
        validation_tokens=tokens(splits.validation),
        validation_loss_tokens=loss_tokens(splits.validation),
    )


def _dataset_digest(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, digests: dict[int, str]) -> str:
    validation = spec.data.validation
    identity = {
        "version": _FORMAT_VERSION,
        "sources": [
            {"digest": digests[i], "format": s.format, "columns": s.columns, "source": s.source, "license": s.license}
            for i, s in enumerate(_all_sources(spec))
        ],
        "train_sources": len(spec.data.train),
        "fraction": validation.fraction if isinstance(validation, ValidationFraction) else None,
        "seed": spec.train.seed,
        "max_seq_len": spec.data.max_seq_len,
        "packing": spec.data.packing,
        "template": CHAT_TEMPLATE,
        "tokenizer": _tokenizer_digest(tokenizer),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any]
    if backend is None:
        content = tokenizer.get_vocab()
    else:  # without what the last call asked for, which is no part of the tokenizer
        content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
