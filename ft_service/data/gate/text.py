"""Text for the checks: folding, shingles, n-grams and script detection. Works for languages without spaces."""

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Literal

import numpy as np

Language = Literal["none", "latin", "japanese", "chinese", "korean", "cyrillic", "other"]
LANGUAGES: tuple[Language, ...] = ("none", "latin", "japanese", "chinese", "korean", "cyrillic", "other")

_CJK = "\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_KANA = re.compile("[\u3041-\u30fe]")
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_TWO_LETTERS = re.compile("[A-Za-z][^A-Za-z]*[A-Za-z]")
_LATIN_LETTER = re.compile("[A-Za-z\u00c0-\u024f]")
_HANGUL = re.compile("[\u1100-\u11ff\uac00-\ud7af]")
_CYRILLIC = re.compile("[\u0400-\u052f]")
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+|[+*/=<>^%#×÷−≠≤≥√]|(?<!\\S)-(?=[\\d\\s])")
"""Operators are words: 3 + 4 differs from 3 * 4, and C++ from C#."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_BRACKETS = re.compile(r"(?<=\w)'{0,2}[(\[{]|[(\[{](?=\w{1,20} ?[-+*/^=×÷])|[-+*/^=×÷] ?[(\[{]|(?<=\w)_(?=\w)")
"""Calls, indices and derivatives; brackets beside operators; names with underscores. Folding drops all of them."""
_BRACKET_SIGN = re.compile(r"[(\[{_]")
_BRACKET_BEFORE = 3
_BRACKET_AFTER = 25
"""Characters before and after a bracket that `_BRACKETS` looks at, at most."""
_PUNCTUATION = re.compile(r"""[\s.,!?;:'"“”‘’、。・…「」『』()\[\]{}_~〜—–]+""")

_FIGURES = bytes(code if chr(code) in "0123456789.," else 32 for code in range(256))
"""Keeps the characters of numbers in bytes of ASCII."""

_ASCII_PUNCTUATION = {code: None for code in range(128) if _PUNCTUATION.match(chr(code))}

SHINGLE_LATIN = 5
SHINGLE_CJK = 3
"""In characters. Five are about a word (Broder 1997; the usual choice for English). Japanese needs fewer characters:
questions of 20 are common, and with five, one changed character would change a quarter of the shingles."""
LATIN_LETTERS_PER_CJK_CHARACTER = 3
"""A Japanese character has about the weight of three Latin letters when the larger part of mixed text is sought."""
CHINESE_FROM = 20
"""Text with this many Han characters and no kana is not Japanese."""


def fold(text: str) -> str:
    """Only the letters, digits and operators: width, case, spaces and punctuation are removed."""
    if text.isascii():  # the same result, ten times as fast
        return text.lower().translate(_ASCII_PUNCTUATION)
    return _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).casefold())


def hash64(text: str) -> int:
    """A 64-bit hash, the same in every process, unlike `hash`."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hash32(text: str) -> int:
    """The low 32 bits of `hash64`."""
    return hash64(text) & 0xFFFFFFFF


def numbers(text: str) -> str:
    """The numbers of a text, in order, and the brackets of its formulas. Problems that differ in them are different."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    brackets = "".join(_brackets(plain))
    # The same result from a shorter text:
    figures = " ".join(plain.encode().translate(_FIGURES).decode().split()) if plain.isascii() else plain
    return " ".join([*_NUMBER.findall(figures), brackets]).replace(",", "")


def _brackets(text: str) -> Iterator[str]:
    """The matches of `_BRACKETS`, searched only around brackets and underscores."""
    end = 0
    spans: list[list[int]] = []
    for sign in _BRACKET_SIGN.finditer(text):
        at = sign.start()
        if at < end:
            spans[-1][1] = at + _BRACKET_AFTER
        else:
            spans.append([max(end, at - _BRACKET_BEFORE), at + _BRACKET_AFTER])
        end = at + _BRACKET_AFTER
    for start, end in spans:
        for match in _BRACKETS.finditer(text, start, end):  # look-behind sees what is before `start`
            yield match[0]


def has_cjk(text: str) -> bool:
    """Whether the text has Han characters or kana."""
    return not text.isascii() and _CJK_CHARACTER.search(text) is not None


def is_cjk(text: str) -> bool:
    """Whether Han characters and kana are the larger part of the text."""
    if text.isascii():
        return False
    cjk = len(_CJK_CHARACTER.findall(text))
    return cjk > 0 and cjk * LATIN_LETTERS_PER_CJK_CHARACTER >= len(_LATIN_LETTER.findall(text))


def language(text: str) -> Language:
    """The script family of most of the letters; "none" if there are hardly any."""
    if text.isascii():
        return "latin" if _TWO_LETTERS.search(text) else "none"
    weights: dict[Language, float] = {
        "latin": len(_LATIN_LETTER.findall(text)) / LATIN_LETTERS_PER_CJK_CHARACTER,
        "korean": len(_HANGUL.findall(text)),
        "cyrillic": len(_CYRILLIC.findall(text)) / LATIN_LETTERS_PER_CJK_CHARACTER,
    }
    cjk = len(_CJK_CHARACTER.findall(text))
    chinese = cjk >= CHINESE_FROM and not _KANA.search(text)
    weights["chinese" if chinese else "japanese"] = cjk
    known = cjk + weights["korean"] + LATIN_LETTERS_PER_CJK_CHARACTER * (weights["latin"] + weights["cyrillic"])
    weights["other"] = max(0.0, sum(map(str.isalpha, text)) - known)
    best = max(weights, key=lambda name: weights[name])
    if best == "japanese" and not _KANA.search(text):
        return "none"  # a few Han characters may be Japanese or Chinese
    return best if weights[best] >= 2 / LATIN_LETTERS_PER_CJK_CHARACTER else "none"


def words(text: str) -> list[str]:
    """Folded words; single characters where text has no spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(folded: str) -> np.ndarray:
    """Sorted distinct hashes, uint64, of the character n-grams of a folded text."""
    return distinct(all_shingles(folded))


def distinct(values: np.ndarray) -> np.ndarray:
    """`np.unique`; for a few hundred numbers two to three times as fast."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def all_shingles(folded: str) -> np.ndarray:
    """Like `shingles`, unsorted and with repetitions, which MinHash ignores."""
    return _rolled(_codes(folded), shingle_size(folded))


def shingle_size(folded: str) -> int:
    """The size of the shingles of a folded text, in characters."""
    return SHINGLE_CJK if is_cjk(folded) else SHINGLE_LATIN


def shingles_of_parts(parts: Sequence[tuple[str, str]]) -> Iterator[np.ndarray]:
    """`all_shingles` of `start` and of `start + end` for each (start, end), in this order.

    One pass over all texts: five times as fast as text by text, most of which is the overhead of short arrays.
    """
    sizes = [(shingle_size(start), shingle_size(start + end)) for start, end in parts]
    lengths = [len(start) + len(end) for start, end in parts]
    offsets = np.cumsum([0, *lengths]).tolist()
    codes = _codes("".join(text for part in parts for text in part))
    of_all = {size: _rolled(codes, size) for size in {size for pair in sizes for size in pair}}
    for (start, _), (start_size, size), at, length in zip(parts, sizes, offsets, lengths, strict=False):
        for own_size, own_length in ((start_size, len(start)), (size, length)):
            if own_length < own_size:
                yield _rolled(codes[at : at + own_length], own_size)
            else:  # windows that reach into the next text are not taken
                yield of_all[own_size][at : at + own_length - own_size + 1]


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)


def grams(text: str, size: int) -> np.ndarray:
    """Distinct hashes, uint64, of the n-grams of `words`; a shorter text gives one hash of all of it."""
    codes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words(text)], dtype=np.uint64)
    return distinct(_rolled(codes, size))


def _rolled(codes: np.ndarray, size: int) -> np.ndarray:
    """Hashes of all windows of `size` codes: a polynomial modulo 2**64, then mixed so that all bits are uniform."""
    size = min(size, len(codes))
    if size == 0:
        return np.empty(0, dtype=np.uint64)
    count = len(codes) - size + 1
    codes = codes + np.uint64(1)
    hashes = np.full(count, size, dtype=np.uint64)
    for offset in range(size):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += codes[offset : offset + count]
    return mixed(hashes)


def mixed(hashes: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): similar inputs give unrelated outputs."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def opening(text: str) -> str:
    """The first three words of a text, or six characters where it has no spaces; all numbers are equal."""
    beginning = text[:80]
    plain = beginning.lower() if beginning.isascii() else unicodedata.normalize("NFKC", beginning).casefold()
    start = [match[0] for match in islice(_WORD.finditer(plain), 6)]
    size = 6 if is_cjk("".join(start)) else 3
    return " ".join("0" if word[0].isdigit() else word for word in start[:size])
