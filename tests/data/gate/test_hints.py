"""Slow patterns are tried only on text with a hint of what they find: whatever a pattern finds has such a hint."""

import re

import ftfy.badness
from hypothesis import given
from hypothesis import strategies as st

from ft_service.data.gate import facts, form, private
from ft_service.data.gate.text import (
    _BRACKETS,
    _NUMBER,
    _PUNCTUATION,
    _brackets,
    all_shingles,
    fold,
    numbers,
    shingles_of_parts,
)

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
    assert form._may_match(text, form._BOILERPLATE_HINTS, form._BOILERPLATE_STARTS)


@given(AROUND, st.sampled_from(sorted(facts._CASUAL_WORDS)), AROUND)
def test_every_casual_text_has_a_hint(before: str, word: str, after: str) -> None:
    for said in (word, word.upper(), f"love {word}", "y'all", "ain't", "haha", "what!?", "ok :-)", "Sure ;d"):
        text = f"{before}{said}{after}"
        assert facts._may_be_casual(text) or not facts._CASUAL.search(text)


@given(texts(private._PHONE))
def test_every_phone_number_has_enough_digits(text: str) -> None:
    regions = private._regions_of_figures(text.encode())
    for found in private._PHONE.finditer(text):
        if private._phone_number(found, True):
            assert any(start <= found.start() and found.end() < end for start, end in regions)


@given(st.one_of(texts(english(form._SPECIAL)), st.builds("{}</s>{}".format, AROUND, AROUND)))
def test_every_template_text_has_a_hint(text: str) -> None:
    assert form._may_hold_template(text)


@given(texts(form._HTML))
def test_every_tag_has_a_hint(text: str) -> None:
    assert form._HTML_START.search(text)


@given(st.text(alphabet=st.characters(max_codepoint=0x2070)))
def test_every_control_character_has_a_hint(text: str) -> None:
    assert form._may_hold_controls(text) or not form._CONTROL.search(text)


MOJIBAKE = "aZ .Ãâ€™“”œÂ\xa0°ž√±ВГРСΒΞ€й²×¿éØÙ├\u30fe漢"


@given(st.text(alphabet=st.sampled_from(MOJIBAKE), max_size=40), st.text(max_size=10))
def test_mojibake_is_found_around_characters_beyond_ascii(text: str, other: str) -> None:
    for one in (text, f"{text} and {other}", "plain words " + text[:3] + " and more plain words " + text[3:]):
        assert (form._badness(one) is None) == (ftfy.badness.BADNESS_RE.search(one) is None)


@given(AROUND, st.sampled_from(["gonna", "lol", "what?!", "ok :)", "\U0001f602", "\U0001f923"]), AROUND)
def test_every_casual_text_beyond_ascii_has_a_hint(before: str, word: str, after: str) -> None:
    text = f"é’ {before}{word}{after} —"
    assert facts._may_be_casual(text) or not facts._CASUAL.search(text)


@given(texts(private._PASSWORD))
def test_every_password_has_a_hint(text: str) -> None:
    assert private._may_hold_password(text)


@given(st.text(alphabet=st.sampled_from("aé1,._'([{=-+ 7\n"), max_size=60))
def test_fast_searches_for_figures_find_the_same(text: str) -> None:
    assert list(_brackets(text)) == _BRACKETS.findall(text)
    slow = " ".join([*_NUMBER.findall(text), "".join(_BRACKETS.findall(text))]).replace(",", "")
    assert numbers(text) == slow


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=5))
def test_shingles_of_many_texts_are_those_of_each(parts: list[tuple[str, str]]) -> None:
    expected = [all_shingles(text) for start, end in parts for text in (start, start + end)]
    assert [found.tolist() for found in shingles_of_parts(parts)] == [one.tolist() for one in expected]


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_fast_fold_of_ascii_equals_the_slow_one(text: str) -> None:
    assert fold(text) == _PUNCTUATION.sub("", text.casefold())
