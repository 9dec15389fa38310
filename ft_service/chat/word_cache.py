"""Token ids of ASCII text out of a memory of words: the tokenizer's own ids, several times as fast.

Llama 3's tokenizer cuts text into words, and encodes each by itself. Cutting by Unicode's classes of letters is what
takes its time; of ASCII text Python's `re` makes the same cut in a fraction of it, and words come again and again.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in the ``tokenizer.json`` of every Llama 3."""
_ASCII_SPLIT = re.compile(
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)
"""The same of ASCII text."""
_MOST_WORDS = 2**18  # some 100 MiB
_LONGEST_TEXT = 2**17  # characters; a longer one may be a single word, which is no use to remember
_known: "WeakKeyDictionary[PreTrainedTokenizerBase, WordIds | None]" = WeakKeyDictionary()


class WordIds:
    """The ids of the words that one tokenizer has met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    @staticmethod
    def takes(text: str) -> bool:
        """Whether this text may be encoded here."""
        return text.isascii() and len(text) <= _LONGEST_TEXT

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in which nothing is special."""
        cut = [_ASCII_SPLIT.findall(text) for text in texts]
        if new := [word for word in set(chain.from_iterable(cut)) if word not in self._ids]:
            self._tokenizer.no_truncation()  # the last caller's wish, perhaps
            self._tokenizer.no_padding()
            found = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
            self._ids.update((word, encoding.ids) for word, encoding in zip(new, found, strict=True))
        ids = [list(chain.from_iterable(map(self._ids.__getitem__, words))) for words in cut]
        if len(self._ids) > _MOST_WORDS:
            self._ids.clear()
        return ids


def word_ids(tokenizer: PreTrainedTokenizerBase) -> WordIds | None:
    """The memory of a tokenizer; None if it is none that cuts text as Llama 3's does."""
    if tokenizer not in _known:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        _known[tokenizer] = WordIds(backend) if backend is not None and _cuts_like_llama3(backend) else None
    return _known[tokenizer]


def _cuts_like_llama3(tokenizer: Tokenizer) -> bool:
    told = json.loads(tokenizer.to_str())
    steps = (told["pre_tokenizer"] or {}).get("pretokenizers", [])
    model = told["model"]
    return (
        told["normalizer"] is None
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["pattern"] == {"Regex": LLAMA3_SPLIT}
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        and (steps[1]["add_prefix_space"], steps[1]["use_regex"]) == (False, False)
        and model["type"] == "BPE"
        and not any(model[name] for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and all(token["special"] and _is_cut(token["content"]) for token in told["added_tokens"])
    )


def _is_cut(token: str) -> bool:
    """Then it is never a word, nor a part of one; tokens that are not special are taken out before words are cut."""
    return token.isascii() and len(_ASCII_SPLIT.findall(token)) > 1
