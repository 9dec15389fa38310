"""Text as the checks see it: folded, cut into shingles and n-grams, told by script. Works without spaces."""

import re
import unicodedata
import zlib
from hashlib import blake2b
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
"""Operators are words: 3 + 4 is not 3 * 4, and C++ not C#."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_BRACKETS = re.compile(r"(?<=\w)'{0,2}[(\[{]|[(\[{](?=\w{1,20} ?[-+*/^=×÷])|[-+*/^=×÷] ?[(\[{]|(?<=\w)_(?=\w)")
"""Calls, indices and derivatives; brackets beside operators; names with underscores. Folding drops all of these."""
_PUNCTUATION = re.compile(r"""[\s.,!?;:'"“”‘’、。・…「」『』()\[\]{}_~〜—–]+""")

_ASCII_PUNCTUATION = {code: None for code in range(128) if _PUNCTUATION.match(chr(code))}

SHINGLE_LATIN, SHINGLE_CJK = 5, 3
"""Characters. Five are about a word (Broder 1997; the usual choice for English); a Japanese character says more than a
Latin one, and questions of 20 characters are common, so that five would let one changed character cost a quarter."""
LATIN_LETTERS_PER_CJK_CHARACTER = 3
"""A Japanese character stands for about as much as three Latin letters; so mixed text is told by the larger part."""
CHINESE_FROM = 20
"""So many Han characters without one kana are no Japanese sentence."""


def fold(text: str) -> str:
    """Letters, digits and operators alone: width, case, spaces and punctuation make no difference."""
    if text.isascii():  # the same by another way, ten times as fast
        return text.lower().translate(_ASCII_PUNCTUATION)
    return _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).casefold())


def hash64(text: str) -> int:
    """The same in every process, unlike `hash`."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hash32(text: str) -> int:
    """See `hash64`."""
    return hash64(text) & 0xFFFFFFFF


def numbers(text: str) -> str:
    """The numbers in a text and how its formulas are bracketed, in order: what differs in them is another problem."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    brackets = "".join(_BRACKETS.findall(plain)) if any(sign in plain for sign in "([{_") else ""
    return " ".join([*_NUMBER.findall(plain), brackets]).replace(",", "")


def has_cjk(text: str) -> bool:
    """Whether there is Han or kana in it."""
    return not text.isascii() and _CJK_CHARACTER.search(text) is not None


def is_cjk(text: str) -> bool:
    """Whether Han and kana are the larger part."""
    if text.isascii():
        return False
    cjk = len(_CJK_CHARACTER.findall(text))
    return cjk > 0 and cjk * LATIN_LETTERS_PER_CJK_CHARACTER >= len(_LATIN_LETTER.findall(text))


def language(text: str) -> Language:
    """The script family of the larger part of the letters; "none" where there are hardly any."""
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
    weights["other"] = max(0.0, sum(character.isalpha() for character in text) - known)
    best = max(weights, key=lambda name: weights[name])
    if best == "japanese" and not _KANA.search(text):
        return "none"  # a few Han characters may be either
    return best if weights[best] >= 2 / LATIN_LETTERS_PER_CJK_CHARACTER else "none"


def words(text: str) -> list[str]:
    """Words where there are spaces, characters where there are none; folded."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(folded: str) -> np.ndarray:
    """Sorted distinct hashes, uint64, of the character n-grams of a folded text."""
    return np.unique(all_shingles(folded))


def all_shingles(folded: str) -> np.ndarray:
    """Like `shingles`, as they stand in the text: for MinHash, to which order and repetition are nothing."""
    size = SHINGLE_CJK if is_cjk(folded) else SHINGLE_LATIN
    codes = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    return _rolled(codes, size)


def grams(text: str, size: int) -> np.ndarray:
    """Distinct hashes, uint64, of the n-grams of words (see `words`); of a shorter text, one hash of the whole."""
    codes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words(text)], dtype=np.uint64)
    return np.unique(_rolled(codes, size))


def _rolled(codes: np.ndarray, size: int) -> np.ndarray:
    """Hashes of all windows of `size` codes: a polynomial modulo 2**64, then mixed so that all bits are good."""
    size = min(size, len(codes))
    if size == 0:
        return np.empty(0, dtype=np.uint64)
    count = len(codes) - size + 1
    hashes = np.full(count, size, dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + count] + np.uint64(1)
    return mixed(hashes)


def mixed(hashes: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): numbers that differ little come out far apart."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def opening(text: str) -> str:
    """How a text begins: three words, or six characters where there are no spaces; numbers all alike."""
    start = words(text[:80])
    size = 6 if is_cjk("".join(start[:6])) else 3
    return " ".join("0" if word[0].isdigit() else word for word in start[:size])
