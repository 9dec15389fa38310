"""Decodes token ids piece by piece: whole characters only, no stop strings, and the same text as decoding at once."""

import codecs
import json
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of a growing answer. The pieces from `push` and `finish`, joined, are the answer up to the stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        tokens = TokenBytes.of(tokenizer)
        self._decoder: _Decoder = _ByteDecoder(tokens) if tokens.is_byte_level else _WindowDecoder(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that is now final. Sets `stopped` once a stop string is complete."""
        text = self._decoder.push(token_id)
        return self._release(text) if text else ""

    def finish(self) -> str:
        """The text held back so far, at the end of the answer, without an incomplete last character."""
        text = self._release(self._decoder.finish())
        return text if self.stopped else text + self._held

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        ends = [text.find(stop) for stop in self._stop if stop in text]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class TokenBytes:
    """The bytes of each token of a tokenizer. Reads the vocabulary only, so it is safe under threads."""

    _known: ClassVar["WeakKeyDictionary[PreTrainedTokenizerBase, TokenBytes]"] = WeakKeyDictionary()

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend else None
        self.is_byte_level = decoder is not None and decoder["type"] == "ByteLevel"
        """Whether the text of several tokens is their bytes, joined: true of every Llama 3."""
        self._tokens: list[str | None] = [None] * len(tokenizer)
        for token, token_id in tokenizer.get_vocab().items():
            if token_id < len(self._tokens):
                self._tokens[token_id] = token
        self._special_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenBytes":
        """Those of `tokenizer`, read once."""
        if tokenizer not in cls._known:
            cls._known[tokenizer] = cls(tokenizer)
        return cls._known[tokenizer]

    def text(self, token_id: int) -> bytes:
        """What the token adds to a text: nothing if it is a special one."""
        return b"" if token_id in self._special_ids else self.name(token_id)

    def name(self, token_id: int) -> bytes:
        """The same, with special tokens written out. An id beyond the vocabulary has none."""
        token = self._tokens[token_id] if token_id < len(self._tokens) else None
        if token is None:
            return b""
        if not self.is_byte_level:
            return token.encode()
        try:
            return bytes(map(_byte_of_character().__getitem__, token))
        except KeyError:  # an added token, which is stored as it is
            return token.encode()


class _Decoder(Protocol):
    def push(self, token_id: int) -> str:
        """Characters that are complete now."""
        ...

    def finish(self) -> str:
        """Characters at the end of the text that were not sure to be complete."""
        ...


class _ByteDecoder:
    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token_id: int) -> str:
        text = self._held + self._characters.decode(self._tokens.text(token_id))
        self._held = _REPLACEMENT if text.endswith(_REPLACEMENT) else ""
        return text.removesuffix(_REPLACEMENT)

    def finish(self) -> str:
        incomplete, _ = self._characters.getstate()
        return self._held if incomplete else ""


class _WindowDecoder:
    """For tokenizers that decode a token differently at the start of a text: decodes it with the ones before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_read = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._unread_text()
        if text.endswith(_REPLACEMENT):  # the first bytes of a character that spans tokens
            return ""
        del self._ids[: self._num_read]
        self._num_read = len(self._ids)
        return text

    def finish(self) -> str:
        return self._unread_text().removesuffix(_REPLACEMENT)

    def _unread_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_read])) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@cache
def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as: printable ones as themselves, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
