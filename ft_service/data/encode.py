"""Records to training examples and their lengths in tokens."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import ChatFormat, Example, encode_texts
from ft_service.data.gate import Record, Tokens


class Encoder:
    """Encodes records, with their lengths before `max_seq_len` cuts them. Large batches use all cores.

    Without a tokenizer nothing is encoded. `chat` may be None if no record is a conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, chat: ChatFormat | None, max_seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._max_seq_len = max_seq_len

    def __call__(self, records: Sequence[Record]) -> Iterator[tuple[Tokens | None, list[Example]]]:
        if self._tokenizer is None:
            return ((None, []) for _ in records)
        conversations = [record.item for record in records if isinstance(record.item, tuple)]
        texts = [record.item for record in records if isinstance(record.item, str)]
        whole = iter(self._chat.encode_batch(conversations) if self._chat is not None else [])
        pieces = iter(encode_texts(self._tokenizer, texts, self._max_seq_len) if texts else [])
        return (self._examples_of(record, whole, pieces) for record in records)

    def _examples_of(
        self, record: Record, whole: Iterator[Example], pieces: Iterator[list[Example]]
    ) -> tuple[Tokens | None, list[Example]]:
        if isinstance(record.item, str):
            examples = next(pieces)
            total = sum(len(example.input_ids) for example in examples)
            loss = sum(example.num_loss_tokens for example in examples)
            return Tokens(total, loss, total, loss, ends=True), examples
        if record.item is None or self._chat is None:
            return None, []
        example = next(whole)
        tokens = _count(example, self._max_seq_len, self._chat.end_of_turn_ids)
        if len(example.input_ids) > self._max_seq_len:
            cut = slice(self._max_seq_len)
            example = Example(example.input_ids[cut], example.loss_mask[cut], truncated=True)
        return tokens, [example]


def _count(example: Example, max_seq_len: int, end_of_turn_ids: Sequence[int]) -> Tokens:
    """Lengths of a conversation that was encoded without a limit."""
    kept = example.input_ids[:max_seq_len]
    return Tokens(
        total=len(example.input_ids),
        loss=example.num_loss_tokens,
        kept=len(kept),
        kept_loss=sum(example.loss_mask[1:max_seq_len]),
        ends=example.loss_mask[len(kept) - 1] and kept[-1] in end_of_turn_ids and len(kept) == len(example.input_ids),
    )
