"""Metrics: the text of an answer and an item give a score from 0 to 1, with the reason.

    exact         the reference, or one of several, in normal form
    number        the last number of the answer, within `tolerance`
    choice        the letter of the right option, or its text
    f1            tokens shared with the reference (Japanese: characters)
    rouge_l       longest common subsequence of tokens, F measure (rouge-score)
    chrf          character n-grams (sacrebleu)
    regex         `pattern` is found, and `forbidden` is not
    json          JSON that fits `schema`; the share of `expected` values that are right
    rules         all of a list of checkable rules are kept, see `ft_service.evaluate.rules`
    unanswerable  `pattern` (it says that it cannot know) is found, and `forbidden` (an invented answer) is not

`problem_of` says whether an item can be scored at all, so that an item that does not fit fails when it is read.
"""

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ft_service.evaluate.rules import parse_json, parse_rules, problem_for_language
from ft_service.evaluate.text_forms import folded, normalised, tokens

MetricName = Literal["exact", "number", "choice", "f1", "rouge_l", "chrf", "regex", "json", "rules", "unanswerable"]


@dataclass(frozen=True)
class Score:
    """How good an answer is, and why."""

    value: float
    """From 0 (wrong) to 1 (right)."""
    reason: str


class Scored(Protocol):
    """What a metric reads of an item."""

    @property
    def language(self) -> str: ...
    @property
    def metric(self) -> MetricName: ...
    @property
    def reference(self) -> str | list[str] | None: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _NoOptions(_Options):
    pass


class _NumberOptions(_Options):
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class _ChoiceOptions(_Options):
    choices: dict[str, str] = Field(min_length=2)

    @field_validator("choices")
    @classmethod
    def _letters(cls, choices: dict[str, str]) -> dict[str, str]:
        if wrong := [letter for letter in choices if not re.fullmatch("[A-Z]", letter)]:
            raise ValueError(f"{wrong[0]!r} is not a capital letter")
        texts = [normalised(text) for text in choices.values()]
        if len(set(texts)) < len(texts) or not all(texts):
            raise ValueError("two options have the same text, or one has none")
        return choices


class _PatternOptions(_Options):
    pattern: str = Field(min_length=1)
    forbidden: str | None = None

    @field_validator("pattern", "forbidden")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        return pattern


class _JsonOptions(_Options):
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    expected: dict[str, Any] = Field(default_factory=dict)
    code_fence: bool = Field(default=True, description="Whether JSON within a code fence is accepted.")

    @field_validator("schema_")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        from jsonschema import Draft202012Validator, SchemaError

        try:
            Draft202012Validator.check_schema(schema or {})
        except SchemaError as error:
            raise ValueError(f"is no JSON Schema ({error.message})") from None
        if foreign := [ref for ref in re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema)) if not ref.startswith("#")]:
            raise ValueError(f"refers to {foreign[0]!r}; only references within the schema are read")
        return schema


class _RulesOptions(_Options):
    rules: list[dict[str, Any]]

    @field_validator("rules")
    @classmethod
    def _known(cls, rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parse_rules(rules)
        return rules


# -- the metrics -------------------------------------------------------------------------------------------------------


def _exact(answer: str, item: Scored, options: Any) -> Score:
    text = normalised(answer)
    right = any(text == normalised(reference) for reference in _references(item))
    return Score(float(right), "the reference" if right else f"not {_shown(item)}")


def _number(answer: str, item: Scored, options: _NumberOptions) -> Score:
    found = numbers(answer) or _kanji_number(answer)
    if not found:
        return Score(0.0, "no number")
    wanted = [numbers(reference)[-1] for reference in _references(item)]
    right = any(abs(found[-1] - number) <= Fraction(str(options.tolerance)) for number in wanted)
    return Score(float(right), f"last number {_as_text(found[-1])}{'' if right else f', not {_shown(item)}'}")


def _choice(answer: str, item: Scored, options: _ChoiceOptions) -> Score:
    chosen = chosen_letter(answer, options.choices)
    right = chosen in _references(item)
    return Score(
        float(right), f"chose {chosen or 'nothing that can be read'}{'' if right else f', not {_shown(item)}'}"
    )


def _f1(answer: str, item: Scored, options: Any) -> Score:
    value = max(token_f1(answer, reference) for reference in _references(item))
    return Score(value, f"token F1 {value:.2f}")


def _rouge_l(answer: str, item: Scored, options: Any) -> Score:
    scorer = _rouge_scorer()
    value = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in _references(item))
    return Score(float(value), f"ROUGE-L {value:.2f}")


def _chrf(answer: str, item: Scored, options: Any) -> Score:
    from sacrebleu import CHRF

    value = CHRF().sentence_score(answer, list(_references(item))).score / 100
    return Score(min(1.0, value), f"chrF {value:.2f}")  # rounding gives a little more than 1


def _regex(answer: str, item: Scored, options: _PatternOptions) -> Score:
    if options.forbidden and (found := re.search(options.forbidden, answer)):
        return Score(0.0, f"has {found[0][:80]!r}, which is forbidden")
    right = re.search(options.pattern, answer) is not None
    return Score(float(right), "the pattern is found" if right else f"nothing fits {options.pattern!r}")


def _unanswerable(answer: str, item: Scored, options: _PatternOptions) -> Score:
    if options.forbidden and (found := re.search(options.forbidden, answer)):
        return Score(0.0, f"invents an answer: {found[0][:80]!r}")
    right = re.search(options.pattern, answer) is not None
    return Score(float(right), "says that it cannot know" if right else "does not say that it cannot know")


def _json(answer: str, item: Scored, options: _JsonOptions) -> Score:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    from referencing import Registry

    try:
        value = parse_json(answer, options.code_fence)
    except ValueError as error:
        return Score(0.0, f"is not JSON ({error})")
    validator = Draft202012Validator(options.schema_ or {}, registry=Registry())  # which fetches nothing
    if misfit := best_match(validator.iter_errors(value)):
        return Score(0.0, f"does not fit the schema ({misfit.message[:120]})")
    if not options.expected:
        return Score(1.0, "valid JSON")
    given = value if isinstance(value, dict) else {}
    wrong = [key for key, wanted in options.expected.items() if not (key in given and _is_value(given[key], wanted))]
    share = 1 - len(wrong) / len(options.expected)
    return Score(share, f"wrong: {', '.join(wrong)}" if wrong else "all expected values")


def _rules(answer: str, item: Scored, options: _RulesOptions) -> Score:
    problems = [problem for rule in parse_rules(options.rules) if (problem := rule.problem(answer))]
    return Score(float(not problems), "; ".join(problems) or "all rules kept")


@dataclass(frozen=True)
class _Metric:
    score: Callable[[str, Scored, Any], Score]
    options: type[_Options] = _NoOptions
    needs_reference: bool = True
    is_yes_or_no: bool = True


_METRICS: dict[MetricName, _Metric] = {
    "exact": _Metric(_exact),
    "number": _Metric(_number, _NumberOptions),
    "choice": _Metric(_choice, _ChoiceOptions),
    "f1": _Metric(_f1, is_yes_or_no=False),
    "rouge_l": _Metric(_rouge_l, is_yes_or_no=False),
    "chrf": _Metric(_chrf, is_yes_or_no=False),
    "regex": _Metric(_regex, _PatternOptions, needs_reference=False),
    "json": _Metric(_json, _JsonOptions, needs_reference=False, is_yes_or_no=False),
    "rules": _Metric(_rules, _RulesOptions, needs_reference=False),
    "unanswerable": _Metric(_unanswerable, _PatternOptions, needs_reference=False),
}


def score(answer: str, item: Scored) -> Score:
    """The score of an answer by its item's metric."""
    metric = _METRICS[item.metric]
    return metric.score(answer, item, metric.options.model_validate(item.options))


def is_yes_or_no(metric: MetricName) -> bool:
    """Whether the metric gives only 0 and 1."""
    return _METRICS[metric].is_yes_or_no


def problem_of(item: Scored) -> str | None:
    """Why an item's metric cannot score its answers, with the cure; None if it can."""
    metric = _METRICS[item.metric]
    try:
        options = metric.options.model_validate(item.options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])).replace("schema_", "schema")
        known = ", ".join(field.alias or name for name, field in metric.options.model_fields.items()) or "none"
        reason = first["msg"].removeprefix("Value error, ")
        return f"options.{name}: {reason}. Options of the metric {item.metric}: {known}"
    references = _references(item)
    if metric.needs_reference and not references:
        return f"the metric {item.metric} needs a reference"
    if any(not normalised(reference) and item.metric not in ("chrf", "regex") for reference in references):
        return "a reference is empty"
    if item.metric == "number" and (wrong := [text for text in references if not numbers(text)]):
        return f"the reference {wrong[0]!r} has no number; use exact, or write one"
    if isinstance(options, _ChoiceOptions) and (wrong := [text for text in references if text not in options.choices]):
        return f"the reference {wrong[0]!r} is none of the choices {', '.join(options.choices)}; write a letter"
    if isinstance(options, _RulesOptions):
        return problem_for_language(parse_rules(options.rules), item.language)
    return None


# -- what they compute -------------------------------------------------------------------------------------------------

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])[-−–+])?"
    rf"(?:(?<![\d/])(?:(?P<whole>\d{{1,3}}) )?(?P<over>\d+)/(?P<under>\d+)(?![\d/])"
    rf"|(?P<units>(?:{_DIGITS}[百千万億兆]+)+(?:{_DIGITS})?)|(?P<plain>{_DIGITS}|\.\d+))"
)
_UNIT_PART = re.compile(rf"({_DIGITS})?([十百千万億兆])?")
_SMALL_UNITS = {"十": 10, "百": 100, "千": 1000}
_LARGE_UNITS = {"万": 10**4, "億": 10**8, "兆": 10**12}
_POWER_OF_UNIT = re.compile(r"(?<=[A-Za-z}])\^\{?\d+\}?|(?<![A-Za-z])([kcdm]?m|ft|in|yd)[23](?!\w)")
"""The 2 of ``m²``, ``cm^2`` and ``km2``, which is no number of its own."""
_SUPERSCRIPTS = str.maketrans(
    {"²": "^2", "³": "^3", "㎡": "m^2", "㎢": "km^2", "㎠": "cm^2", "㎥": "m^3", "㎤": "cm^3"}
)
_GROUPED = re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))")
"""The space within a number. Only one that keeps a line together: two numbers may have a plain space between them."""
_VULGAR_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text, in order: ``1,234.5``, ``-3``, ``2 1/2``, ``1万2千``. Kanji digits are not read.

    The exponent of a unit (``82 m²``) does not count.
    """
    text = _VULGAR_FRACTION.sub(" ", _GROUPED.sub("", text.translate(_SUPERSCRIPTS)))
    text = _POWER_OF_UNIT.sub(r"\1", unicodedata.normalize("NFKC", text).replace("⁄", "/"))
    found = []
    for match in _NUMBER.finditer(text):
        if match["over"] and int(match["under"]) == 0:
            continue
        value = (
            int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"]))
            if match["over"]
            else _with_units(match["units"])
            if match["units"]
            else Fraction(match["plain"].replace(",", ""))
        )
        found.append(-value if match["sign"] in ("-", "−", "–") else value)
    return found


_KANJI_DIGITS = {digit: value for value, digit in enumerate("〇一二三四五六七八九")} | {"零": 0}
_KANJI_ANSWER = re.compile(
    r"(?:答えは|約)?([〇零一二三四五六七八九十百千万億兆]+)[^\s〇零一二三四五六七八九十百千万億兆]{0,8}"
)


def _kanji_number(answer: str) -> list[Fraction]:
    """The number of an answer that is nothing but a kanji numeral with its unit: ``十一時間です。``. Otherwise empty.

    Trap: within a sentence, 一 and 三 are parts of words such as 一番 and 三宅.
    """
    match = _KANJI_ANSWER.fullmatch(normalised(answer))
    if match is None:
        return []
    if all(character in _KANJI_DIGITS for character in match[1]):  # 一九六八
        return [Fraction("".join(str(_KANJI_DIGITS[digit]) for digit in match[1]))]
    digits = "".join(str(_KANJI_DIGITS.get(character, character)) for character in match[1])
    return [_with_units(digits)]


def _with_units(text: str) -> Fraction:
    """3億5千万 = 3 * 10^8 + (5 * 10^3) * 10^4"""
    total = Fraction(0)
    below_ten_thousand = Fraction(0)
    for digits, unit in _UNIT_PART.findall(text):
        number = Fraction(digits.replace(",", "")) if digits else Fraction(0)
        if unit in _SMALL_UNITS:
            below_ten_thousand += (number or 1) * _SMALL_UNITS[unit]
        elif unit in _LARGE_UNITS:
            total += (below_ten_thousand + number) * _LARGE_UNITS[unit]
            below_ten_thousand = Fraction(0)
        else:
            below_ten_thousand += number
    return total + below_ten_thousand


_STATED = re.compile(
    r"(?:answer|choice|option|correct)\b[^A-Za-z\n]{0,12}(?:is\b)?[^A-Za-z\n]{0,12}\(?([A-Z])(?![A-Za-z])"
)
_STATED_JAPANESE = re.compile(r"(?:答え|正解|解答|回答)(?:は|:)?[^A-Za-z\n]{0,8}([A-Z])(?![A-Za-z])")
_LEADING = re.compile(r"^\W*([A-Z])(?:\W*$|[).:、。]|\W*\n)")


def chosen_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    """The option that an answer chooses; None if that cannot be read, or if it names several.

    In this order: nothing but a letter or an option's text; a letter at the start (``B)``, ``B.``); the last statement
    (``the answer is B``, ``答えはB``); the only option whose text occurs; the only letter that stands alone.
    """
    text = unicodedata.normalize("NFKC", answer).strip()
    plain = normalised(text)
    for letter, option in choices.items():
        if plain in (letter.casefold(), normalised(option), normalised(f"{letter}. {option}")):
            return letter
    if (leading := _LEADING.match(text)) and leading[1] in choices:
        return leading[1]
    for pattern in (_STATED, _STATED_JAPANESE):
        if stated := [letter for letter in pattern.findall(text) if letter in choices]:
            return str(stated[-1])
    return _only_text(folded(text), choices) or _only_letter(text, choices)


def _only_text(text: str, choices: Mapping[str, str]) -> str | None:
    """The only option whose text occurs; one that is part of another option is looked for in what is left."""
    named = []
    for letter, option in sorted(choices.items(), key=lambda choice: -len(choice[1])):
        wanted = normalised(option)
        pattern = rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9])"
        if re.search(pattern, text):
            named.append(letter)
            text = re.sub(pattern, " ", text)
    return named[0] if len(named) == 1 else None


def _only_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """Trap: the article in ``A dog is`` is no letter of an option, and neither is ``I am``."""
    alone = re.findall(r"(?<![A-Za-z0-9'])(?:[B-HJ-Z]|[AI](?!\s+(?!or\b|and\b|is\b)[a-z]))(?![A-Za-z0-9'])", text)
    letters = {letter for letter in alone if letter in choices}
    return letters.pop() if len(letters) == 1 else None


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the tokens of both, as bags."""
    given = Counter(tokens(answer))
    wanted = Counter(tokens(reference))
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0


class _Tokens:
    """Our tokens for rouge-score, whose own ones drop everything but ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokens())


def _is_value(given: Any, wanted: Any) -> bool:
    """`wanted` is a value, or a list of accepted ones. Texts are compared in normal form; true is not 1."""
    if _same(given, wanted):
        return True
    return isinstance(wanted, list) and any(_same(given, one) for one in wanted)


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(given, str) and isinstance(wanted, str):
        return given == wanted or normalised(given) == normalised(wanted) != ""
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    return isinstance(given, bool) == isinstance(wanted, bool) and bool(given == wanted)


def _references(item: Scored) -> list[str]:
    if item.reference is None:
        return []
    return [item.reference] if isinstance(item.reference, str) else list(item.reference)


def _shown(item: Scored) -> str:
    return " or ".join(repr(reference[:60]) for reference in _references(item)[:3])


def _as_text(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else f"{float(number):g}"
