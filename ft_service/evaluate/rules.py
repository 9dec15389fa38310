"""Rules of instruction following that a program can check: "at most 20 words", "three bullets", "in Japanese".

A rule is a mapping, ``{rule: words_at_most, count: 20}``. Names and parameters are checked when an item is read.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ft_service.evaluate.text_forms import JAPANESE_CHARACTER, KANA, LATIN_LETTER, folded, sentences

_BULLET = re.compile(r"^\s*[-*•・●]\s*\S")
_NUMBERED = re.compile(r"^\s*(\d+)[.)．）、]\s*\S")
_POLITE = re.compile(
    r"(です|ます|でした|ました|ません|ませんでした|でしょう|ましょう|ませ|ください)[かねよわ]*[。！？!?」』）)\s]*$"
)
_LATIN_SHARE = 0.9
_JAPANESE_SHARE = 0.5
"""Of all letters; a Japanese text may hold Latin names."""


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def problem(self, answer: str) -> str | None:
        """How the answer breaks the rule; None if it keeps it."""
        raise NotImplementedError


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


_MEASURES: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": lambda text: len("".join(text.strip().splitlines())),
    "sentences": lambda text: len(sentences(text)),
    "bullets": lambda text: sum(bool(_BULLET.match(line)) for line in text.splitlines()),
    "lines": lambda text: len(_lines(text)),
    "paragraphs": lambda text: len(_paragraphs(text)),
}


class CountRule(_Rule):
    """A number of words (between spaces), characters (without line breaks), sentences, bullets, lines or paragraphs."""

    rule: Literal[
        "words_at_most",
        "words_at_least",
        "words_exactly",
        "characters_at_most",
        "characters_at_least",
        "sentences_exactly",
        "sentences_at_most",
        "bullets_exactly",
        "lines_exactly",
        "paragraphs_exactly",
    ]
    count: int = Field(ge=1)

    @property
    def measure(self) -> str:
        return self.rule.partition("_")[0]

    def problem(self, answer: str) -> str | None:
        measure, _, bound = self.rule.partition("_")
        number = _MEASURES[measure](answer)
        kept = {"at_most": number <= self.count, "at_least": number >= self.count, "exactly": number == self.count}
        return None if kept[bound] else f"{number} {measure}, not {bound.replace('_', ' ')} {self.count}"


class NumberedRule(_Rule):
    """A list numbered from 1 to `count`."""

    rule: Literal["numbered"]
    count: int = Field(ge=1)

    def problem(self, answer: str) -> str | None:
        numbers = [int(match[1]) for line in answer.splitlines() if (match := _NUMBERED.match(line))]
        return None if numbers == [*range(1, self.count + 1)] else f"numbered {numbers or 'nothing'}"


class ContainsRule(_Rule):
    """A text that must occur, ignoring case; with `times`, exactly so often. A word is found as a whole word only."""

    rule: Literal["contains"]
    text: str = Field(min_length=1)
    times: int | None = Field(default=None, ge=1)

    def problem(self, answer: str) -> str | None:
        number = _occurrences(self.text, answer)
        if self.times is not None:
            return None if number == self.times else f"{self.text!r} occurs {number} times, not {self.times}"
        return None if number else f"{self.text!r} is missing"


class ForbidsRule(_Rule):
    """A text that must not occur, ignoring case. A word is found as a whole word only."""

    rule: Literal["forbids"]
    text: str = Field(min_length=1)

    def problem(self, answer: str) -> str | None:
        return f"{self.text!r} occurs" if _occurrences(self.text, answer) else None


class EdgeRule(_Rule):
    """How the answer, without surrounding spaces, must begin or end."""

    rule: Literal["starts_with", "ends_with"]
    text: str = Field(min_length=1)

    def problem(self, answer: str) -> str | None:
        text = unicodedata.normalize("NFKC", answer).strip()
        edge = unicodedata.normalize("NFKC", self.text)
        kept = text.startswith(edge) if self.rule == "starts_with" else text.endswith(edge)
        shown = text[:20] if self.rule == "starts_with" else text[-20:]
        return None if kept else f"{'starts' if self.rule == 'starts_with' else 'ends'} with {shown!r}"


class KeywordOrderRule(_Rule):
    """Texts that must all occur, in this order, ignoring case."""

    rule: Literal["keyword_order"]
    texts: list[str] = Field(min_length=2)

    def problem(self, answer: str) -> str | None:
        text = folded(answer)
        at = 0
        for keyword in self.texts:
            found = _pattern(keyword).search(text, at)
            if found is None:
                return f"{keyword!r} is missing, or comes before an earlier one"
            at = found.end()
        return None


class LanguageRule(_Rule):
    """The language of the answer, by its script. Japanese needs kana, so Chinese is not taken for it."""

    rule: Literal["language"]
    code: Literal["ja", "en"]

    def problem(self, answer: str) -> str | None:
        found = language_of(answer)
        return None if found == self.code else f"is in {found or 'no language'}, not in {self.code}"


class FormRule(_Rule):
    """A form of the whole answer, without parameters. `json` accepts no code fence."""

    rule: Literal["lowercase", "uppercase", "json", "no_commas", "polite", "title"]

    def problem(self, answer: str) -> str | None:
        return _FORMS[self.rule](answer)


Rule = Annotated[
    CountRule | NumberedRule | ContainsRule | ForbidsRule | EdgeRule | KeywordOrderRule | LanguageRule | FormRule,
    Field(discriminator="rule"),
]
_RULES: TypeAdapter[list[Any]] = TypeAdapter(Annotated[list[Rule], Field(min_length=1)])


def parse_rules(rules: object) -> Sequence[_Rule]:
    """Raises pydantic's `ValidationError` for an unknown rule, or one whose parameters do not fit."""
    return _RULES.validate_python(rules)


def problem_for_language(rules: Sequence[_Rule], language: str) -> str | None:
    """Why a rule cannot be applied to answers in a language; None if all can. A `language` rule names another one."""
    language = next((rule.code for rule in rules if isinstance(rule, LanguageRule)), language)
    for rule in rules:
        if language == "ja" and isinstance(rule, CountRule) and rule.measure == "words":
            return f"{rule.rule} counts words between spaces, which Japanese does not have; use characters_at_most"
        if language != "ja" and isinstance(rule, FormRule) and rule.rule == "polite":
            return "polite checks Japanese です and ます; set language: ja, or use another rule"
    return None


def language_of(text: str) -> Literal["ja", "en"] | None:
    """``ja`` with kana and at least half Japanese letters, ``en`` with at least 90 % Latin letters, otherwise None."""
    japanese = len(JAPANESE_CHARACTER.findall(text))
    latin = len(LATIN_LETTER.findall(text))
    letters = sum(character.isalpha() for character in text)
    if not letters:
        return None
    if KANA.search(text) and japanese / letters >= _JAPANESE_SHARE:
        return "ja"
    return "en" if latin / letters >= _LATIN_SHARE else None


def _occurrences(text: str, answer: str) -> int:
    return len(_pattern(text).findall(folded(answer)))


def _pattern(text: str) -> re.Pattern[str]:
    """Finds `text` in folded text; at an end that is a Latin letter or digit, only where a word ends."""
    text = folded(text) or text
    before = r"(?<![a-z0-9])" if re.match("[a-z0-9]", text) else ""
    after = r"(?![a-z0-9])" if re.search("[a-z0-9]$", text) else ""
    return re.compile(before + re.escape(text) + after)


def _lowercase(answer: str) -> str | None:
    return None if answer == answer.lower() and answer != answer.upper() else "is not all in lower case"


def _uppercase(answer: str) -> str | None:
    return None if answer == answer.upper() and answer != answer.lower() else "is not all in upper case"


def _json(answer: str) -> str | None:
    try:
        _loads(answer)
    except ValueError as error:
        return f"is not JSON ({error})"
    return None


def _no_commas(answer: str) -> str | None:
    found = re.search("[,、，]", answer)
    return f"has the comma {found[0]!r}" if found else None


def _polite(answer: str) -> str | None:
    spoken = [sentence for sentence in sentences(answer) if KANA.search(sentence)]
    if not spoken:
        return "has no Japanese sentence"
    plain = next((sentence for sentence in spoken if not _POLITE.search(sentence)), None)
    return f"{plain[-20:]!r} does not end in です or ます" if plain else None


def _title(answer: str) -> str | None:
    lines = _lines(answer)
    return None if lines and re.fullmatch(r"\s*<<[^<>\n]+>>\s*", lines[0]) else "has no <<title>> as its first line"


_FORMS: Mapping[str, Callable[[str], str | None]] = {
    "lowercase": _lowercase,
    "uppercase": _uppercase,
    "json": _json,
    "no_commas": _no_commas,
    "polite": _polite,
    "title": _title,
}

_FENCE = re.compile(r"\A\s*```(?:json|JSON)?\s*\n(.*?)\n\s*```\s*\Z", re.DOTALL)


def parse_json(answer: str, code_fence: bool = True) -> Any:
    """The JSON of an answer that is nothing but JSON; with `code_fence` one around it is accepted.

    Raises `ValueError`.
    """
    fenced = _FENCE.match(answer) if code_fence else None
    return _loads(fenced[1] if fenced else answer)


def _loads(text: str) -> Any:
    """Raises `ValueError`, also for NaN and infinity, which are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a value of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("too deeply nested") from None
