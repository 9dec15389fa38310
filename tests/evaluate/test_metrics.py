"""Metrics against independent references: SQuAD's F1, rouge-score's own tokens, nltk's chrF, and cases by hand."""

import random
import re
from fractions import Fraction

import pytest

from ft_service.evaluate.items import Item
from ft_service.evaluate.metrics import chosen_letter, numbers, problem_of, score, token_f1

WORDS = ("river", "stone", "green", "one", "two", "three", "walks", "over", "bridge", "Tom")
CHOICES = {"A": "red", "B": "blue", "C": "dark blue", "D": "green"}


def item(metric: str, reference: object = None, language: str = "en", **options: object) -> Item:
    fields = {"id": "x", "skill": "test", "prompt": "?", "language": language}
    return Item.model_validate({**fields, "metric": metric, "reference": reference, "options": options})


def value(answer: str, metric: str, reference: object = None, language: str = "en", **options: object) -> float:
    return score(answer, item(metric, reference, language, **options)).value


def sentence_pairs(count: int) -> list[tuple[str, str]]:
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9))) + rng.choice(["", ".", "!"])

    return [(sentence(), sentence()) for _ in range(count)]


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("Paris", True),
        (" paris. ", True),
        ("“Paris”", True),
        ("ＰＡＲＩＳ", True),
        ("the Paris", False),  # articles stay
        ("Paris, France", False),
        ("Lutetia", True),
        ("", False),
    ],
)
def test_exact_compares_in_normal_form(answer, is_right):
    assert value(answer, "exact", ["Paris", "Lutetia"]) == is_right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 1,234.5 apples.", [Fraction("1234.5")]),
        ("x=-5", [-5]),
        ("10-5", [10, 5]),
        ("1,2,3", [1, 2, 3]),
        ("- 5 apples", [5]),
        ("3億5千万円", [350_000_000]),
        ("1万2000", [12_000]),
        ("2百", [200]),
        ("3/4 cup", [Fraction(3, 4)]),
        ("2026/11/28", [2026, 11, 28]),
        ("１２個", [12]),
        ("1/0", []),
        ("GPT-4 costs $.50", [4, Fraction(1, 2)]),
        ("−7 or -7 or –7", [-7, -7, -7]),
        ("10–5", [10, 5]),
        ("The path covers 82 m².", [82]),
        ("82 m^2, 82 cm2, 82㎡ or $82 \\text{ m}^{2}$", [82, 82, 82, 82]),
        ("ten cubed is 10³", [10, 3]),  # and not 103
        ("1\u202f234\u00a0567 people", [1_234_567]),
        ("1 200", [1, 200]),
        ("2½ or 2 1/2", [Fraction(5, 2), Fraction(5, 2)]),
        ("in 2024 3/4 of them", [2024, Fraction(3, 4)]),
        ("３つ、10時30分、1,200円", [3, 10, 30, 1200]),
        ("none", []),
    ],
)
def test_numbers_of_a_text(text, expected):
    assert numbers(text) == expected


def test_the_last_number_counts_within_the_tolerance():
    assert value("6 times 7 is 42.", "number", "42") == 1
    assert value("42, because 6 times 7", "number", "42") == 0
    assert value("It is about 3.14", "number", "3.1416", tolerance=0.01) == 1
    assert value("It is about 3.1", "number", "3.1416", tolerance=0.01) == 0
    assert value("0.1 + 0.2 = 0.3", "number", "0.3") == 1  # exact, without binary fractions
    assert value("no idea", "number", "42") == 0
    assert value("The path has an area of 82 m².", "number", "82") == 1


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("十一", "11"),
        ("十一時間です。", "11"),
        ("答えは二百五円です", "205"),
        ("一九六八年", "1968"),
        ("七万二百円", "70200"),
        ("三億五千万", "350000000"),
        ("二〇二五", "2025"),
        ("百", "100"),
    ],
)
def test_an_answer_that_is_a_kanji_numeral_is_read(answer, number):
    assert value(answer, "number", number) == 1


@pytest.mark.parametrize("answer", ["一番よいのは三宅さんです。", "わかりません", "一人ずつ三回に分けて運ぶ"])
def test_kanji_within_words_are_no_numbers(answer):
    assert value(answer, "number", "3") == 0 and value(answer, "number", "1") == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B. blue", "B"),
        ("blue", "B"),
        ("The answer is B", "B"),
        ("The answer is: **C**", "C"),
        ("It is dark blue.", "C"),  # and not blue, which is part of it
        ("A dog is blue", "B"),
        ("A is correct", "A"),
        ("I think D", "D"),
        ("答えはCです。", "C"),
        ("正解：B", "B"),
        ("B\nbecause of the sky", "B"),
        ("Not A, but the answer is B", "B"),
        ("red or blue", None),
        ("Either A or B", None),
        ("The answer is a dog", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_chooses(answer, letter):
    assert chosen_letter(answer, CHOICES) == letter


def test_choice_scores_the_letter():
    assert value("I choose (C).", "choice", "C", choices=CHOICES) == 1
    assert value("blue", "choice", "C", choices=CHOICES) == 0


def test_f1_is_that_of_squad():
    from transformers.data.metrics.squad_metrics import compute_f1

    for answer, reference in sentence_pairs(300):
        assert token_f1(answer, reference) == pytest.approx(compute_f1(reference, answer))


def test_f1_of_japanese_counts_characters():
    # 東京都 and 東京: two of three, and two of two.
    assert token_f1("東京都", "東京") == pytest.approx(2 * 2 / 5)
    assert value("東京都です", "f1", ["京都", "東京都です"], "ja") == 1


def test_rouge_l_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    for answer, reference in sentence_pairs(300):
        expected = scorer.score(reference, answer)["rougeL"].fmeasure
        assert value(answer, "rouge_l", reference) == pytest.approx(expected)


def test_rouge_l_of_japanese_counts_characters():
    from rouge_score.rouge_scorer import RougeScorer

    # The longest common subsequence of both is 東京です, 4 characters of 6 and of 4.
    answer, reference = "東京都内です", "東京です"
    assert RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure == 0
    assert value(answer, "rouge_l", reference, "ja") == pytest.approx(2 * 4 / (6 + 4))


def test_chrf_by_hand():
    """Three characters have one, two and three-grams; F with beta = 2 is the same for equal precision and recall."""
    assert value("abc", "chrf", "abc") == pytest.approx(1)
    # abd: 2 of 3 characters, 1 of 2 pairs and 0 of 1 triple agree; longer n-grams do not exist.
    assert value("abd", "chrf", "abc") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3, abs=1e-6)
    assert value("日本語", "chrf", "日本酒", "ja") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3, abs=1e-6)
    assert value("xyz", "chrf", ["abc", "xyz"]) == pytest.approx(1)


def test_regex_and_unanswerable():
    assert value("Call 555-1234", "regex", pattern=r"\d{3}-\d{4}") == 1
    assert value("Call 555-1234 or 9", "regex", pattern=r"\d{3}-\d{4}", forbidden="or") == 0
    options = {"pattern": r"(?i)does not say|cannot know", "forbidden": r"\b19\d\d\b"}
    assert value("The text does not say when.", "unanswerable", **options) == 1
    assert value("The text does not say, but it was 1987.", "unanswerable", **options) == 0
    assert value("In spring.", "unanswerable", **options) == 0


SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "Tom", "age": 7}', 1),
        ('```json\n{"name": "tom.", "age": 7}\n```', 1),
        ('{"name": "Tom", "age": 8}', 0.5),
        ('{"name": "Tom", "age": true}', 0.5),
        ('{"name": "Thomas", "age": 7}', 1),
        ('{"name": 5, "age": 7}', 0),
        ('Here it is: {"name": "Tom"}', 0),
        ('{"name": "Tom", "age": NaN}', 0),
        ("[" * 100_000, 0),
        ("[1]", 0),
        ("", 0),
    ],
)
def test_json_is_checked_by_schema_and_values(answer, expected):
    wanted = {"name": ["Tom", "Thomas"], "age": 7}
    assert value(answer, "json", schema=SCHEMA, expected=wanted) == expected


def test_a_code_fence_around_json_may_be_forbidden():
    assert value('```json\n{"name": "Tom"}\n```', "json") == 1
    assert value('```json\n{"name": "Tom"}\n```', "json", code_fence=False) == 0
    assert value('{"name": "Tom"}', "json", code_fence=False) == 1


def test_rules_are_kept_all_or_the_score_is_0():
    rules = [{"rule": "words_at_most", "count": 3}, {"rule": "contains", "text": "sea"}]
    assert value("By the sea", "rules", rules=rules) == 1
    found = score("We walked along the sea", item("rules", rules=rules))
    assert found.value == 0
    assert "5 words" in found.reason


@pytest.mark.parametrize(
    ("metric", "reference", "options", "reason"),
    [
        ("exact", None, {}, "needs a reference"),
        ("exact", "...", {}, "a reference is empty"),
        ("exact", "x", {"tolerance": 1}, "options.tolerance"),
        ("number", "many", {}, "'many' has no number"),
        ("number", "5", {"tolerance": -1}, "options.tolerance"),
        ("choice", "E", {"choices": CHOICES}, "'E' is none of the choices A, B, C, D"),
        ("choice", "A", {}, "options.choices"),
        ("choice", "A", {"choices": {"A": "x", "B": "X"}}, "two options have the same text"),
        ("regex", None, {}, "options.pattern"),
        ("regex", None, {"pattern": "("}, "is not a regular expression"),
        ("json", None, {"schema": {"type": "nothing"}}, "is no JSON Schema"),
        ("json", None, {"schema": {"$ref": "http://127.0.0.1:9/s.json"}}, "only references within the schema"),
        ("rules", None, {"rules": []}, "options.rules"),
        ("rules", None, {"rules": [{"rule": "rhymes"}]}, "options.rules"),
        ("rules", None, {"rules": [{"rule": "numbered"}]}, "options.rules"),
        ("unanswerable", None, {"pattern": ""}, "options.pattern"),
    ],
)
def test_an_item_whose_metric_does_not_fit_is_refused(metric, reference, options, reason):
    fields = {"id": "x", "skill": "test", "prompt": "?", "language": "en"}
    unchecked = Item.model_construct(None, **fields, metric=metric, reference=reference, options=options)
    assert reason in (problem_of(unchecked) or "")
    with pytest.raises(ValueError, match=re.escape(reason)):
        Item.model_validate({**fields, "metric": metric, "reference": reference, "options": options})


def test_rules_that_a_language_does_not_have_are_refused():
    words = {"rules": [{"rule": "words_at_most", "count": 5}]}
    with pytest.raises(ValueError, match="use characters_at_most"):
        item("rules", None, "ja", **words)
    item("rules", None, "ja", rules=[*words["rules"], {"rule": "language", "code": "en"}])
    with pytest.raises(ValueError, match="checks Japanese"):
        item("rules", None, "en", rules=[{"rule": "polite"}])
