"""Training signal: what of a record is trained on, in tokens, and whether the tokenizer keeps its text."""

from collections.abc import Iterator
from typing import Any

from ft_service.chat.format import ChatFormat, plain_ids
from ft_service.data.gate.form import Hit
from ft_service.data.gate.private import excerpt
from ft_service.data.gate.records import Record
from ft_service.data.gate.text import hash64

FEW_LOSS_TOKENS = 0.1
"""Share of loss tokens below which nine tenths of the computation only read. Right for labels, and worth knowing."""
_FIRST_LINES, _ONE_IN = 20, 200
"""Records whose rendering is tried: the first of each file, and one in 200, chosen by content."""


def check_signal(record: Record) -> Iterator[Hit]:
    """What max_seq_len takes away of a record whose tokens were counted."""
    tokens = record.tokens
    if tokens is None:
        return
    if tokens.kept_loss == 0:
        cut = f"; its question alone has {tokens.total - tokens.loss} tokens" if tokens.total > tokens.kept else ""
        yield Hit("signal.no-loss-tokens", record.key, f"has no loss token left{cut}", excerpt(record.text))
        return
    if tokens.total > tokens.kept:
        lost, loss = tokens.total - tokens.kept, tokens.loss - tokens.kept_loss
        detail = f"{tokens.total} tokens: {lost} are lost, {loss} of them loss tokens"
        yield Hit("signal.truncated", record.key, detail, excerpt(record.text))
    if not tokens.ends:
        yield Hit("signal.end-not-trained", record.key, "the end of its last turn is not trained", excerpt(record.text))


def is_rendered(record: Record) -> bool:
    """Whether this record is one of those whose rendering is tried."""
    return record.fault is None and (record.line <= _FIRST_LINES or hash64(record.text) % _ONE_IN == 0)


def check_rendering(record: Record, chat: ChatFormat) -> Iterator[Hit]:
    """Encode, decode and compare; and compare with what stock transformers makes of the same template."""
    texts = [record.item] if isinstance(record.item, str) else [m.content.strip() for m in record.item or ()]
    for text, ids in zip(texts, plain_ids(chat.tokenizer, texts), strict=True):
        if (back := chat.decode(ids)) != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
            )
            yield Hit("signal.round-trip", record.key, f"comes back changed from character {at} on", excerpt(text, at))
            return
    if isinstance(record.item, tuple) and "<|" not in record.text:
        messages = [{"role": message.role, "content": message.content} for message in record.item]
        stock: Any = chat.tokenizer.apply_chat_template(messages, chat_template=chat.template, return_dict=True)
        if list(stock["input_ids"]) != chat.encode(record.item).input_ids:
            yield Hit("signal.round-trip", record.key, "the template renders it otherwise", excerpt(record.text))
