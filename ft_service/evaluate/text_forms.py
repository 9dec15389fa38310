"""How answers are compared as text: one normal form, one division into tokens, for English and Japanese."""

import re
import unicodedata

_OUTER = re.compile(r"^[\W_]+|[\W_]+$")
_JAPANESE = "ぁ-ゖゝ-ゟァ-ヺー-ヿ㐀-䶿一-鿿豈-﫿々〆"
"""Hiragana, katakana (with its long mark) and kanji."""
_TOKEN = re.compile(rf"[{_JAPANESE}]|[^\W_{_JAPANESE}]+")
JAPANESE_CHARACTER = re.compile(f"[{_JAPANESE}]")
KANA = re.compile("[ぁ-ゖァ-ヺー]")
LATIN_LETTER = re.compile("[A-Za-zÀ-ÖØ-öø-ÿ]")


def folded(text: str) -> str:
    """NFKC (full-width forms become ASCII), lower case, and single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalised(text: str) -> str:
    """`folded`, without punctuation at both ends. Articles stay."""
    return _OUTER.sub("", folded(text))


def tokens(text: str) -> list[str]:
    """Words of `folded` text; each Japanese character is a token of its own, because Japanese has no spaces."""
    return _TOKEN.findall(folded(text))


def sentences(text: str) -> list[str]:
    """Sentences, which end with 。！？ or with .!? before a space or a line's end. An abbreviation ends one, too."""
    parts = re.split(r"(?<=[。！？])|(?<=[.!?])(?=[\"'”’)\]]?(?:\s|$))|\n+", text)
    return [part.strip() for part in parts if re.search(r"\w", part)]
