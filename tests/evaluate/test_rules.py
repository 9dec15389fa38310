"""The rules of instruction following, each with an answer that keeps it and one that breaks it."""

import pytest

from ft_service.evaluate.rules import language_of, parse_rules


def problem(answer: str, **rule: object) -> str | None:
    return parse_rules([rule])[0].problem(answer)


KEPT_AND_BROKEN: list[tuple[dict[str, object], str, str]] = [
    ({"rule": "words_at_most", "count": 3}, "one two three", "one two three four"),
    ({"rule": "words_at_least", "count": 3}, "one two three", "one two"),
    ({"rule": "words_exactly", "count": 2}, "one two", "one"),
    ({"rule": "characters_at_most", "count": 5}, "東京です。", "東京都です。"),
    ({"rule": "characters_at_least", "count": 5}, "東京です。", "東京。"),
    ({"rule": "sentences_exactly", "count": 2}, "It is 3.5 km. Go!", "It is 3.5 km. Go! Now."),
    ({"rule": "sentences_exactly", "count": 2}, "東京です。人口は多いです。", "東京です。"),
    ({"rule": "sentences_at_most", "count": 1}, 'He said "go."', "He went. She stayed."),
    ({"rule": "bullets_exactly", "count": 2}, "- one\n* two", "- one\n- two\n- three"),
    ({"rule": "bullets_exactly", "count": 2}, "・一\n・二", "一\n二"),
    ({"rule": "lines_exactly", "count": 2}, "one\n\ntwo\n", "one"),
    ({"rule": "paragraphs_exactly", "count": 2}, "one\nline\n\ntwo", "one\ntwo"),
    ({"rule": "numbered", "count": 2}, "1. one\n2) two", "1. one\n3. three"),
    ({"rule": "contains", "text": "Cat"}, "the CAT sat", "concatenate"),
    ({"rule": "contains", "text": "cat", "times": 2}, "cat and cat", "cat, cat and cat"),
    ({"rule": "contains", "text": "東京"}, "東京都です", "京都です"),
    ({"rule": "forbids", "text": "the"}, "other things", "The thing"),
    ({"rule": "forbids", "text": "!"}, "no", "no!"),
    ({"rule": "starts_with", "text": "Dear"}, " Dear Tom", "dear Tom"),
    ({"rule": "ends_with", "text": "P.S."}, "Bye. P.S.\n", "P.S. Bye"),
    ({"rule": "keyword_order", "texts": ["salt", "egg"]}, "Salt, then the egg", "egg, then salt"),
    ({"rule": "language", "code": "ja"}, "これはTOKYOの地図です", "这是一张地图"),
    ({"rule": "language", "code": "en"}, "This is a map.", "これは地図です"),
    ({"rule": "lowercase"}, "all small, 3 words", "Not all"),
    ({"rule": "uppercase"}, "ALL LARGE 3", "ALMOST ALL LARGe"),
    ({"rule": "uppercase"}, "A", "123"),
    ({"rule": "json"}, '{"a": 1}', '```json\n{"a": 1}\n```'),
    ({"rule": "no_commas"}, "one and two", "one、two"),
    ({"rule": "polite"}, "東京です。行きましょうか？", "東京です。行こう。"),
    ({"rule": "polite"}, "お知らせくださいませ。", "知らせろ。"),
    ({"rule": "title"}, "<<The sea>>\nIt is blue.", "It is <<blue>>."),
]


@pytest.mark.parametrize(("rule", "kept", "broken"), KEPT_AND_BROKEN, ids=lambda value: str(value)[:40])
def test_a_rule_is_kept_or_broken(rule, kept, broken):
    assert problem(kept, **rule) is None
    assert problem(broken, **rule)


@pytest.mark.parametrize("rule", [rule for rule, _, _ in KEPT_AND_BROKEN], ids=lambda rule: str(rule)[:40])
def test_an_empty_answer_keeps_only_rules_that_forbid(rule):
    allowed = rule["rule"] in {"words_at_most", "characters_at_most", "sentences_at_most", "forbids", "no_commas"}
    assert (problem("", **rule) is None) == allowed


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "rhymes"},
        {"rule": "words_at_most"},
        {"rule": "words_at_most", "count": 0},
        {"rule": "contains", "text": ""},
        {"rule": "lowercase", "count": 1},
        {"rule": "language", "code": "fr"},
        {"count": 1},
        "lowercase",
    ],
    ids=str,
)
def test_an_unknown_rule_or_parameter_is_refused(rule):
    with pytest.raises(ValueError, match="validation error"):
        parse_rules([rule])


def test_the_language_of_a_text_is_read_from_its_script():
    assert language_of("東京です") == "ja"
    assert language_of("Tokyo is large, café") == "en"
    assert language_of("Москва") is None
    assert language_of("東京") is None  # without kana it may be Chinese
    assert language_of("123") is None
