"""Whether two questions differ only in their wording, or ask about different things, compared word by word.

The share of equal characters cannot tell: モニター and ヒーター, or fan and van, differ in as few characters of a long
sentence as a typo does. So the words that differ are compared: particles, endings, spelling variants and typos are
wording, and any other word makes another question.

A run of katakana, hiragana, Han characters or Hangul is a word, and so are letters with digits (A12). Runs of Han
characters are compared character by character, because Chinese has no spaces.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import lru_cache

import numpy as np

from ft_service.data.gate.text import mixed

MOVED_FROM = 3
"""So many words that move together are a clause. Fewer may be the point: from Oslo to Lima, from Lima to Oslo."""

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HIRAGANA = "\u3041-\u309f\u30fc"
_KATAKANA = "\u30a1-\u30fa\u30fd-\u30ff\u31f0-\u31ff"
_HANGUL = "\u1100-\u11ff\uac00-\ud7af"
_WORD = re.compile(
    f"(?P<han>[{_HAN}]+)|(?P<katakana>[{_KATAKANA}][{_KATAKANA}\u30fb\u30fc]*)|(?P<hiragana>[{_HIRAGANA}]+)"
    f"|(?P<hangul>[{_HANGUL}]+)|(?P<letters>[^\\W_{_HAN}{_HIRAGANA}{_KATAKANA}{_HANGUL}]+)"
    r"|(?P<sign>[+*/=<>^%#×÷−≠≤≥√]|(?<!\S)-(?=[\d\s]))"
)

_SPELLED = {
    "下さ": "くださ",
    "出来": "でき",
    "頂": "いただ",
    "教え": "おしえ",
    "分か": "わか",
    "良い": "よい",
    "宜し": "よろし",
    "致し": "いたし",
    "無い": "ない",
    "欲し": "ほし",
    "願い": "ねがい",
    "何故": "なぜ",
    "何": "なに",
    "場合": "とき",
    "時": "とき",
    "際": "とき",
    "事": "こと",
    "為": "ため",
    "方": "ほう",
}
"""Words of grammar that Japanese writes with Han characters or in kana, or that mean the same (時, とき, 際)."""
_SPELLING = re.compile(f"(?<![{_HAN}])(?:{'|'.join(_SPELLED)})(?![{_HAN}])")

_FUNCTION_WORDS = frozenset(
    b"a an the of in on at for to by and is are was were be been am do does did has have had can could would will "
    b"shall many much i me my we us our you your it its this that these those there so then also just please kindly "
    b"hi hello dear thanks thank s t d m re ve ll".decode().split()
)
"""Replaced or missing, these change the wording. From, before, without, not and more change the question."""
_HAN_FUNCTION = frozenset("的地得了着嗎吗呢吧啊呀哦请請问問您你把被将將是与與及之其也还還很麻烦煩")
"""As `_FUNCTION_WORDS`, in Chinese."""
_KANA_FUNCTION = re.compile(
    "(?:です|でし|でしょ|ます|まし|ましょ|ませ|くださ|ちょうだ|いただ|もら|くれ|よろし|という|とい|って|られ|こと|もの|とき"
    "|ため|よう|さい|ほう|ほし|おしえ|わか|ねが|でき|しま|いま|あり|おり|なり|ござ|たら|なら|たい|どの|どう|やっ|なん|なに"
    "|[はがをにでとものへやかねよなばてただしいうるれりけえんす])*"
)
"""As `_FUNCTION_WORDS`, in Japanese: particles, endings and auxiliary verbs."""
_KANA_CONTENT = re.compile("から|まで|より|ない|なく|なか")
"""From, until, than and not, in Japanese."""
_HANGUL_ENDING = re.compile(
    "(?<=.)(?:은|는|이|가|을|를|의|에|에서|에게|로|으로|와|과|도|만|요|나요|까요|어요|아요|세요|주세요|습니까|습니다|입니까|입니다)$"
)
_ENDINGS = frozenset(["", "s", "es", "e", "d", "ed", "ing", "ly", "'s"])
_SMALL_KANA = str.maketrans("ァィゥェォッャュョヮヵヶ", "アイウエオツヤユヨワカケ", "・")
_LONG_VOWELS_FROM = 5
"""A long vowel is a matter of spelling in words of this length (コンピュータ), and at the end: ビル is not ビール."""
_EDITED_FROM = 5
"""A missing, extra or transposed character in a word of this length is a typo."""
_SUBSTITUTED_FROM = 7
"""Another character in a word of this length is a typo; in shorter words it is another word: boats, coats."""


class Word(str):
    """A word, folded, and the kind of its script, a group of `_WORD`."""

    kind: str


@lru_cache(maxsize=4096)
def words_of(text: str) -> tuple[Word, ...]:
    """The words of a text."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    if not plain.isascii():
        plain = _SPELLING.sub(lambda match: _SPELLED[match[0]], plain)
    return tuple(_words(plain))


def _words(plain: str) -> Iterator[Word]:
    for match in _WORD.finditer(plain):
        word = Word(_spelled(match[0], str(match.lastgroup)))
        word.kind = str(match.lastgroup)
        yield word


def _spelled(word: str, kind: str) -> str:
    """The word without accents, small kana, and long vowels that are a matter of spelling."""
    if kind == "letters" and not word.isascii():
        return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    if kind != "katakana":
        return word
    plain = word.translate(_SMALL_KANA)
    return plain.replace("ー", "") if len(plain) >= _LONG_VOWELS_FROM else plain[:2] + plain[2:].removesuffix("ー")


def variants(first: Sequence[Word], second: Sequence[Word]) -> list[tuple[str, str]] | None:
    """The words that differ in an ending or a typo alone; None if other words differ, so the questions do too."""
    found = []
    others: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for left, right in _differences(first, second):
        pairs = _variants(left, right)
        if pairs is not None:
            found += pairs
        elif (left and right) or len(left or right) < MOVED_FROM:
            return None
        else:
            others[not left]["".join(left or right)] += 1
    return found if others[0] == others[1] else None


def _differences(first: Sequence[Word], second: Sequence[Word]) -> Iterator[tuple[Sequence[Word], Sequence[Word]]]:
    """The words at each place where two texts differ."""
    start = _equal_at_start(first, second)
    end = _equal_at_start(first[start:][::-1], second[start:][::-1])
    left = first[start : len(first) - end]
    right = second[start : len(second) - end]
    if not (left and right):
        if left or right:
            yield left, right
        return
    for kind, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind != "equal":
            yield left[a:b], right[c:d]


def _equal_at_start(first: Sequence[object], second: Sequence[object]) -> int:
    unequal = (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(unequal, min(len(first), len(second)))


def _variants(left: Sequence[Word], right: Sequence[Word]) -> list[tuple[str, str]] | None:
    """`variants` at one place."""
    if "".join(left) == "".join(right):
        return []  # spaces and hyphens
    if not _same_kana(*("".join(word for word in words if _is_kana(word)) for words in (left, right))):
        return None
    contents = [[word for word in words if not _is_function(word)] for words in (left, right)]
    if "".join(contents[0]) == "".join(contents[1]):
        return []
    if len(contents[0]) != len(contents[1]):
        return None
    pairs = [(a, b) for a, b in zip(*contents, strict=True) if a != b]
    return [(a, b) for a, b in pairs if a.kind != "han"] if all(is_variant(a, b) for a, b in pairs) else None


def _is_kana(word: Word) -> bool:
    """Whether the word is of hiragana, and more than one particle of one character."""
    return word.kind == "hiragana" and len(word) > 1


def _is_function(word: Word) -> bool:
    if word.kind == "han":
        return _HAN_FUNCTION.issuperset(word)
    return word.kind == "hiragana" or word in _FUNCTION_WORDS


def is_variant(first: Word, second: Word) -> bool:
    """Whether two words are one word with another ending, or with a typo."""
    if first.kind != second.kind or first.kind == "sign":
        return False
    if first.kind == "han":
        return all(_HAN_FUNCTION.issuperset(left + right) for left, right in _character_differences(first, second))
    if first.kind == "hangul" and _HANGUL_ENDING.sub("", first) == _HANGUL_ENDING.sub("", second):
        return True
    start = _equal_at_start(first, second)
    if first.kind == "letters" and start >= 3 and _ENDINGS.issuperset((first[start:], second[start:])):
        return not (first + second)[-1].isdigit()
    return _is_typo(first, second)


def _character_differences(first: str, second: str) -> Iterator[tuple[str, str]]:
    for kind, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if kind != "equal":
            yield first[a:b], second[c:d]


def _is_typo(first: str, second: str) -> bool:
    """Whether the words differ by one character too few or many, transposed, or replaced."""
    size = min(len(first), len(second))
    if size < _EDITED_FROM or any(c.isdigit() for c in first + second):
        return False
    start = _equal_at_start(first, second)
    left = first[start:]
    right = second[start:]
    if left[1:] == right or left == right[1:]:
        return True
    if left[:2] == right[1::-1] and left[2:] == right[2:]:
        return True
    return size >= _SUBSTITUTED_FROM and start > 0 and left[1:] == right[1:]


def _same_kana(first: str, second: str) -> bool:
    """Whether two runs of hiragana differ in particles, endings and auxiliary verbs alone."""
    start = _equal_at_start(first, second)
    end = _equal_at_start(first[start:][::-1], second[start:][::-1])
    left = first[start : len(first) - end]
    right = second[start : len(second) - end]
    if _KANA_CONTENT.search(left) or _KANA_CONTENT.search(right):
        return False
    if min(len(left), len(right)) < 2:
        return True  # inserted, or one character
    return bool(_KANA_FUNCTION.fullmatch(left) and _KANA_FUNCTION.fullmatch(right))


# -- templates -------------------------------------------------------------------------------------------------------


class Slots:
    """Where the words of a template change: places with at least three different words between equal ones.

    "Translate the word cat" and "Translate the word cats" are two questions if a third one asks for a dog.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(set(texts))
        frames = [_frames(words_of(text)) for text in self._texts]
        counts = [len(frame) for frame in frames]
        of_all = np.concatenate([*frames, np.empty(0, dtype=np.uint64)])
        order = np.argsort(of_all, kind="stable")
        self._frames = of_all[order]
        self._owners = np.repeat(np.arange(len(frames)), counts)[order]

    def fills(self, first: str, second: str) -> bool:
        """Whether two of the texts are one template, filled with two words."""
        one = words_of(first)
        other = words_of(second)
        at = _equal_at_start(one, other)
        if len(one) != len(other) or at == len(one) or one[at + 1 :] != other[at + 1 :]:
            return False
        frame = _frames(one)[at]
        start, end = np.searchsorted(self._frames, frame, "left"), np.searchsorted(self._frames, frame, "right")
        fillings = (words_of(self._texts[owner])[at] for owner in self._owners[start:end].tolist())
        return any(
            word not in (one[at], other[at]) and not is_variant(word, one[at]) and not is_variant(word, other[at])
            for word in fillings
        )


def _frames(words: Sequence[Word]) -> np.ndarray:
    """For each word a hash, uint64, of all the others and of its place."""
    hashes = mixed(np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64))
    places = mixed(np.arange(1, len(words) + 1, dtype=np.uint64))
    terms = mixed(hashes ^ places)
    return mixed(terms.sum(dtype=np.uint64) - terms + places)
