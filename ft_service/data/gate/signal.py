"""Training signal: how many tokens of a record are trained on, and whether the tokenizer keeps its text."""

import json
from collections.abc import Iterator
from typing import Any

from ft_service.chat.format import ChatFormat, Message, plain_ids
from ft_service.data.gate.form import Hit
from ft_service.data.gate.private import excerpt
from ft_service.data.gate.records import Record
from ft_service.data.gate.text import hash64
from ft_service.text import counted

FEW_LOSS_TOKENS = 0.1
"""Below this share of loss tokens, nine tenths of the computation only reads. Normal for labels, but worth knowing."""
_FIRST_LINES = 20
_ONE_IN = 200
"""The rendering is checked of the first records of each file, and of one record in 200, chosen by content."""


def check_signal(record: Record) -> Iterator[Hit]:
    """What max_seq_len cuts off a record whose tokens are counted."""
    tokens = record.tokens
    if tokens is None:
        return
    if tokens.kept_loss == 0:
        cut = (
            f": the question alone has {counted(tokens.total - tokens.loss, 'token')}"
            if tokens.total > tokens.kept
            else ""
        )
        yield Hit("signal.no-loss-tokens", record.key, f"no loss token is left{cut}", excerpt(record.text))
        return
    if tokens.total > tokens.kept:
        lost = tokens.total - tokens.kept
        lost_loss = tokens.loss - tokens.kept_loss
        detail = f"loses {lost:,} of {counted(tokens.total, 'token')}, {counted(lost_loss, 'loss token')} among them"
        yield Hit("signal.truncated", record.key, detail, excerpt(record.text))
    if not tokens.ends:
        yield Hit(
            "signal.end-not-trained", record.key, "the end of its last turn is not trained on", excerpt(record.text)
        )


def is_rendering_sample(record: Record) -> bool:
    """Whether the rendering of this record is checked."""
    return record.fault is None and (record.line <= _FIRST_LINES or hash64(record.text) % _ONE_IN == 0)


def check_rendering(record: Record, chat: ChatFormat) -> Iterator[Hit]:
    """Encode and decode each text, and compare; and compare the tokens with those of stock transformers."""
    texts = [record.item] if isinstance(record.item, str) else [m.content.strip() for m in record.item or ()]
    for text, ids in zip(texts, plain_ids(chat.tokenizer, texts), strict=True):
        if (back := chat.decode(ids)) != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
            )
            yield Hit("signal.round-trip", record.key, f"decoding changes it from character {at} on", excerpt(text, at))
            return
    if isinstance(record.item, tuple) and "<|" not in record.text:
        functions = [json.loads(function) for message in record.item for function in message.functions]
        stock: Any = chat.tokenizer.apply_chat_template(
            [_stock_message(message) for message in record.item],
            tools=functions or None,
            chat_template=chat.template,
            return_dict=True,
        )
        if list(stock["input_ids"]) != chat.encode(record.item).input_ids:
            yield Hit(
                "signal.round-trip",
                record.key,
                "the chat template of stock transformers gives other tokens",
                excerpt(record.text),
            )


def _stock_message(message: Message) -> dict[str, Any]:
    """A turn as stock transformers takes it."""
    if not message.is_json:
        return {"role": message.role, "content": message.content}
    value = json.loads(message.content)
    if message.role == "tool":
        return {"role": "tool", "content": value}
    call = {"name": value["name"], "arguments": value["parameters"]}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
