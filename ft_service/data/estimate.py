"""Estimates dataset facts from bytes, for plans without the base's tokenizer."""

import numpy as np

from ft_service.chat.format import written_turns
from ft_service.data.convert import BadRecord, Conversation, convert
from ft_service.data.files.shard import Fault
from ft_service.data.pack import pack_lengths
from ft_service.data.read import read_source
from ft_service.errors import DataError
from ft_service.plan.facts import DatasetFacts
from ft_service.spec.schema import DataSource, RunSpec, ValidationFraction

BYTES_PER_TOKEN = 3.94
"""Of UTF-8, in English, with the Llama 3 tokenizer (Dubey et al. 2024, arXiv:2407.21783, section 3.2: 3.94 characters).
Other scripts and program code have fewer."""
_TURN_TOKENS = 5
"""Added to every message: start and end of the header, the role, the empty line, the end of the turn."""


def estimate_dataset(spec: RunSpec) -> DatasetFacts:
    """The facts of the spec's data, with `exact` False; writes nothing.

    Unusable records are skipped. Raises `DataError` if a file is missing or has no usable record.
    """
    train: list[tuple[int, int]] = []
    validation: list[tuple[int, int]] = []
    for source in spec.data.train:
        train += _examples(source, spec.data.max_seq_len)
    for source in spec.data.validation if isinstance(spec.data.validation, list) else []:
        validation += _examples(source, spec.data.max_seq_len)
    if isinstance(spec.data.validation, ValidationFraction):
        fraction = spec.data.validation.fraction
        held_out = [int((number + 1) * fraction) > int(number * fraction) for number in range(len(train))]
        validation = [example for example, out in zip(train, held_out, strict=True) if out]
        train = [example for example, out in zip(train, held_out, strict=True) if not out]
    max_seq_len = spec.data.max_seq_len
    cut = [_cut(example, max_seq_len) for example in train]
    validation_cut = [_cut(example, max_seq_len) for example in validation]
    return DatasetFacts(
        digest="not prepared",
        exact=False,
        conversations=len(cut),
        rows=_rows(cut, spec),
        tokens=sum(tokens for tokens, _ in cut),
        loss_tokens=sum(loss_tokens for _, loss_tokens in cut),
        truncated=sum(tokens > max_seq_len for tokens, _ in train),
        validation_conversations=len(validation_cut),
        validation_rows=_rows(validation_cut, spec),
        validation_tokens=sum(tokens for tokens, _ in validation_cut),
        validation_loss_tokens=sum(loss_tokens for _, loss_tokens in validation_cut),
    )


def _examples(source: DataSource, max_seq_len: int) -> list[tuple[int, int]]:
    """Tokens and loss tokens of each example of a source."""
    examples: list[tuple[int, int]] = []
    fault = ""
    for place, record in read_source(source):
        try:
            if isinstance(record, Fault):
                raise BadRecord(record.reason, record.code)
            examples += _tokens(convert(record, source), max_seq_len)
        except BadRecord as error:
            fault = fault or f" ({place}: {error})"
    if not examples:
        raise DataError(f"{source.path}: has no usable record{fault}. Name a file that has usable records.")
    return examples


def _tokens(item: Conversation | str, max_seq_len: int) -> list[tuple[int, int]]:
    """Tokens and loss tokens of a conversation, or of each piece of a text that is longer than a row."""
    if isinstance(item, str):
        room = max_seq_len - 1  # each piece begins with one more token
        total = _of_text(item) + 1  # the last piece ends with one more token
        pieces = [min(room, total - start) for start in range(0, total, room)]
        return [(piece + 1, piece) for piece in pieces]
    turns = written_turns(item)
    trained = sum(_of_text(text) + 1 for message, text in turns if message.is_trained)
    return [(1 + sum(_of_text(text) + _TURN_TOKENS for _, text in turns), trained)]


def _of_text(text: str) -> int:
    return round(len(text.strip().encode()) / BYTES_PER_TOKEN)


def _cut(example: tuple[int, int], max_seq_len: int) -> tuple[int, int]:
    """Tokens and loss tokens within `max_seq_len`, as if the loss tokens came last."""
    tokens, loss_tokens = example
    return min(tokens, max_seq_len), max(1, loss_tokens - max(0, tokens - max_seq_len))


def _rows(examples: list[tuple[int, int]], spec: RunSpec) -> int:
    if not spec.data.packing:
        return len(examples)
    return len(pack_lengths(np.array([tokens for tokens, _ in examples], dtype=np.int64), spec.data.max_seq_len))
