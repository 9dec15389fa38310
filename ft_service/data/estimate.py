"""Dataset facts without a tokenizer: tokens guessed from bytes, for a plan where the base's tokenizer cannot be had."""

import numpy as np

from ft_service.chat.format import Message
from ft_service.data.convert import BadRecord, Conversation, convert
from ft_service.data.pack import pack_lengths
from ft_service.data.read import Fault, read_source
from ft_service.errors import DataError
from ft_service.plan.facts import DatasetFacts
from ft_service.spec.schema import DataSource, RunSpec, ValidationFraction

BYTES_PER_TOKEN = 3.94
"""Of UTF-8, in English, with the Llama 3 tokenizer (Dubey et al. 2024, arXiv:2407.21783, section 3.2: 3.94 characters).
Other scripts and program text come to less."""
_TURN_TOKENS = 5
"""Around every message: start and end of the header, the role, the empty line, the end of the turn."""


def estimate_dataset(spec: RunSpec) -> DatasetFacts:
    """The facts of the spec's data, with `exact` False; writes nothing.

    Records that cannot be used are passed over. Raises `DataError` where a file is missing or holds none that can.
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
    longest = spec.data.max_seq_len
    cut, held = [_cut(example, longest) for example in train], [_cut(example, longest) for example in validation]
    return DatasetFacts(
        digest="not prepared",
        exact=False,
        conversations=len(cut),
        rows=_rows(cut, spec),
        tokens=sum(tokens for tokens, _ in cut),
        loss_tokens=sum(loss_tokens for _, loss_tokens in cut),
        truncated=sum(tokens > longest for tokens, _ in train),
        validation_conversations=len(held),
        validation_rows=_rows(held, spec),
        validation_tokens=sum(tokens for tokens, _ in held),
        validation_loss_tokens=sum(loss_tokens for _, loss_tokens in held),
    )


def _examples(source: DataSource, max_seq_len: int) -> list[tuple[int, int]]:
    """Tokens and loss tokens of each example of a source."""
    found: list[tuple[int, int]] = []
    fault = ""
    for place, record in read_source(source):
        try:
            if isinstance(record, Fault):
                raise BadRecord(record.reason, record.code)
            found += _tokens(convert(record, source), max_seq_len)
        except BadRecord as error:
            fault = fault or f" ({place}: {error})"
    if not found:
        raise DataError(f"{source.path}: holds no records that can be used{fault}. Name a file that has some.")
    return found


def _tokens(item: Conversation | str, max_seq_len: int) -> list[tuple[int, int]]:
    """Tokens and loss tokens of a conversation, or of the pieces of a text, which goes on where a row ends."""
    if isinstance(item, str):
        room, left = max_seq_len - 1, _of_text(item) + 1  # each piece begins with one token, the last ends with one
        pieces = [min(room, left - start) for start in range(0, left, room)]
        return [(piece + 1, piece) for piece in pieces]
    trained = sum(_of_text(message.content) + 1 for message in item if message.is_trained)
    return [(1 + sum(_of_message(message) for message in item), trained)]


def _of_message(message: Message) -> int:
    return _of_text(message.content) + _TURN_TOKENS


def _of_text(text: str) -> int:
    return round(len(text.strip().encode()) / BYTES_PER_TOKEN)


def _cut(example: tuple[int, int], longest: int) -> tuple[int, int]:
    """What is left of an example; its loss tokens are taken to lie at its end."""
    tokens, loss_tokens = example
    return min(tokens, longest), max(1, loss_tokens - max(0, tokens - longest))


def _rows(examples: list[tuple[int, int]], spec: RunSpec) -> int:
    if not spec.data.packing:
        return len(examples)
    return len(pack_lengths(np.array([tokens for tokens, _ in examples], dtype=np.int64), spec.data.max_seq_len))
