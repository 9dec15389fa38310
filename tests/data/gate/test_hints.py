"""Slow patterns are tried only on text with a hint of what they find: whatever a pattern finds has such a hint."""

import re

from hypothesis import given
from hypothesis import strategies as st

from ft_service.data.gate import facts, form, private
from ft_service.data.gate.text import _PUNCTUATION, fold

AROUND = st.text(alphabet=st.sampled_from("a'_ .!?-Z9\n"), max_size=6)


def texts(pattern: re.Pattern[str]) -> st.SearchStrategy[str]:
    """Texts in which the pattern finds something, of ASCII as the hints are for."""
    flags = (pattern.flags & ~re.UNICODE) | re.ASCII
    ascii_alone = st.characters(max_codepoint=127)
    alone = st.from_regex(re.compile(pattern.pattern, flags), fullmatch=True, alphabet=ascii_alone)
    return st.builds("{}{}{}".format, AROUND, alone, AROUND).filter(lambda text: pattern.search(text) is not None)


def english(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """Without its Japanese alternatives, which no text of ASCII matches."""
    return re.compile("|".join(part for part in alternatives(pattern.pattern) if part.isascii()), pattern.flags)


def alternatives(pattern: str) -> list[str]:
    """The parts between the bars that stand in no parentheses."""
    parts = []
    depth = 0
    start = 0
    for at, character in enumerate(pattern):
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            parts.append(pattern[start:at])
            start = at + 1
    return [*parts, pattern[start:]]


@given(texts(english(form._REFUSAL)))
def test_every_refusal_has_a_hint(text: str) -> None:
    assert form._may_match(text, form._REFUSAL_HINTS)


@given(texts(english(form._BOILERPLATE)))
def test_every_stock_phrase_has_a_hint(text: str) -> None:
    assert form._may_match(text, form._BOILERPLATE_HINTS)


@given(AROUND, st.sampled_from(sorted(facts._CASUAL_WORDS)), AROUND)
def test_every_casual_text_has_a_hint(before: str, word: str, after: str) -> None:
    for said in (word, word.upper(), f"love {word}", "y'all", "ain't", "haha", "what!?", "ok :-)", "Sure ;d"):
        text = f"{before}{said}{after}"
        assert facts._may_be_casual(text) or not facts._CASUAL.search(text)


@given(texts(private._PHONE))
def test_every_phone_number_has_enough_digits(text: str) -> None:
    assert private._DIGITS.search(text) or not any(
        private._is_phone_number(found, True) for found in private._PHONE.finditer(text)
    )


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_fast_fold_of_ascii_equals_the_slow_one(text: str) -> None:
    assert fold(text) == _PUNCTUATION.sub("", text.casefold())
