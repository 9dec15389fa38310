"""Token ids of ASCII text from a cache of words: the same ids as the tokenizer's, several times as fast.

Llama 3's tokenizer splits text into words and encodes each word by itself. Most of its time goes into splitting by
Unicode character classes. For ASCII text, Python's `re` makes the same split much faster, and most words repeat.
"""

import json
import re
import sys
import threading
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in the ``tokenizer.json`` of every Llama 3 model."""
_ASCII_SPLIT = re.compile(
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)
"""`LLAMA3_SPLIT` for ASCII text."""
MAX_CACHE_BYTES = 100 * 2**20
"""Memory of one tokenizer's cache; when it is full, the cache starts again from empty."""
_MAX_TEXT_CHARACTERS = 2**17
"""A longer text may be one single word, which is not worth caching."""
_ENTRY_BYTES = 150
"""Share of one entry in the dict's table, at its lowest load."""
_INT_BYTES = 32
_caches: "WeakKeyDictionary[PreTrainedTokenizerBase, WordCache | None]" = WeakKeyDictionary()


class WordCache:
    """The token ids of words that one tokenizer has encoded. Threads may share it."""

    def __init__(self, tokenizer: "Tokenizer", max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes
        # Readers take no lock. So an entry is never removed: a full dict is replaced by a new one.
        self._ids: dict[str, list[int]] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    @staticmethod
    def accepts(text: str) -> bool:
        """Whether `encode` can encode this text: ASCII, and not too long."""
        return text.isascii() and len(text) <= _MAX_TEXT_CHARACTERS

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. Special tokens in the text are encoded as plain text."""
        words_of = [_ASCII_SPLIT.findall(text) for text in texts]
        cached = self._ids
        ids_of = {word: cached.get(word) for word in set(chain.from_iterable(words_of))}
        if new := [word for word, ids in ids_of.items() if ids is None]:
            encoded = self._encode_words(new)
            ids_of |= encoded
            self._add(encoded)
        return [list(chain.from_iterable(map(ids_of.__getitem__, words))) for words in words_of]  # type: ignore[arg-type]

    def _encode_words(self, words: Sequence[str]) -> dict[str, list[int]]:
        # Another caller of the tokenizer may have left these set. They change only when they must: the tokenizer raises
        # where one thread changes it while another one encodes.
        if self._tokenizer.truncation is not None:
            self._tokenizer.no_truncation()
        if self._tokenizer.padding is not None:
            self._tokenizer.no_padding()
        encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        return {word: encoding.ids for word, encoding in zip(words, encodings, strict=True)}

    def _add(self, encoded: dict[str, list[int]]) -> None:
        num_bytes = _num_bytes(encoded.items())
        with self._lock:
            if self._num_bytes + num_bytes > self._max_bytes:
                self._ids = {}
                self._num_bytes = 0
            if num_bytes <= self._max_bytes:
                self._ids.update(encoded)
                self._num_bytes += num_bytes


def _num_bytes(entries: Iterable[tuple[str, list[int]]]) -> int:
    return sum(_ENTRY_BYTES + sys.getsizeof(word) + sys.getsizeof(ids) + _INT_BYTES * len(ids) for word, ids in entries)


def word_cache_for(tokenizer: "PreTrainedTokenizerBase") -> WordCache | None:
    """The cache of a tokenizer; None unless the tokenizer splits text as Llama 3's does."""
    if tokenizer not in _caches:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        cache = WordCache(backend) if backend is not None and _splits_like_llama3(backend) else None
        _caches.setdefault(tokenizer, cache)
    return _caches[tokenizer]


def _splits_like_llama3(tokenizer: "Tokenizer") -> bool:
    document = json.loads(tokenizer.to_str())
    steps = (document["pre_tokenizer"] or {}).get("pretokenizers", [])
    model = document["model"]
    return (
        document["normalizer"] is None
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["pattern"] == {"Regex": LLAMA3_SPLIT}
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        and (steps[1]["add_prefix_space"], steps[1]["use_regex"]) == (False, False)
        and model["type"] == "BPE"
        and not any(model[name] for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and all(token["special"] and _is_split(token["content"]) for token in document["added_tokens"])
    )


def _is_split(token: str) -> bool:
    """Whether a special token is split, so that no word equals it. Other added tokens are found before the split."""
    return token.isascii() and len(_ASCII_SPLIT.findall(token)) > 1
