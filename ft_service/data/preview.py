"""A preview of packed rows: which tokens are trained on, which are only read, and where documents begin."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import ChatFormat, encode_texts
from ft_service.data.convert import BadRecord, convert
from ft_service.data.files.shard import Fault
from ft_service.data.pack import pack_lengths
from ft_service.data.read import read_shard, scan
from ft_service.errors import DataError
from ft_service.spec.schema import DataSource, RunSpec

Kind = Literal["trained", "read"]


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one kind."""

    text: str
    kind: Kind
    is_special: bool


@dataclass(frozen=True)
class Document:
    """One example in a row."""

    place: str
    """``file:number``."""
    spans: tuple[Span, ...]
    tokens: int
    loss_tokens: int
    truncated: bool


@dataclass(frozen=True)
class PreviewRow:
    """One packed row."""

    documents: tuple[Document, ...]
    length: int
    """Capacity in tokens."""

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.documents)


def preview(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, records: int) -> list[PreviewRow]:
    """The first examples of each training source, `records` of them, packed by themselves.

    Unusable records are skipped. Raises `DataError` if no record can be used or a file is missing.
    """
    documents = [
        document
        for number, source in enumerate(spec.data.train)
        for document in islice(_documents(number, source, tokenizer, spec.data.max_seq_len), records)
    ]
    if not documents:
        raise DataError("data.train: has no usable record. Run `ft data check` to see why.")
    if not spec.data.packing:
        return [PreviewRow((document,), spec.data.max_seq_len) for document in documents]
    lengths = np.array([document.tokens for document in documents], dtype=np.int64)
    rows = pack_lengths(lengths, spec.data.max_seq_len)
    return [PreviewRow(tuple(documents[at] for at in sorted(row)), spec.data.max_seq_len) for row in rows]


def _documents(
    number: int, source: DataSource, tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> Iterator[Document]:
    chat = None if source.format == "text" else ChatFormat(tokenizer)
    for shard in scan(number, source).shards:
        for line, raw in read_shard(shard, source):
            if isinstance(raw, Fault):
                continue
            try:
                item = convert(raw, source)
            except BadRecord:
                continue
            place = f"{shard.path}:{line}"
            if isinstance(item, str):
                examples = encode_texts(tokenizer, [item], max_seq_len)[0]
            else:
                assert chat is not None
                examples = [chat.encode(item, max_seq_len)]
            for example in examples:
                mask = [False, *example.loss_mask[1:]]
                spans = tuple(_spans(tokenizer, example.input_ids, mask))
                yield Document(place, spans, len(mask), sum(mask), example.truncated)


def _spans(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> Iterator[Span]:
    """Spans of tokens that are decoded together, because a character may take several tokens."""
    special = frozenset(tokenizer.get_added_vocab().values())

    def kind_of(pair: tuple[int, bool]) -> tuple[bool, bool]:
        return pair[1], pair[0] in special

    for (trained, is_special), pairs in groupby(zip(ids, mask, strict=True), key=kind_of):
        text = str(tokenizer.decode([token for token, _ in pairs], skip_special_tokens=False))
        yield Span(text, "trained" if trained else "read", is_special)
