"""Leakage: an evaluation item inside any training record is found; a similar topic is no leak."""

import pytest

from ft_service.data.gate import EvaluationSets, Record
from tests.data.gate.gate_cases import check_all, clean_pairs, clean_records, lines, record, text


def held_out(pairs: list[tuple[str, str]]) -> EvaluationSets:
    return EvaluationSets([("held-out", [record(*pair, line) for line, pair in enumerate(pairs, 1)])])


def leaks(training: list[Record], held: EvaluationSets) -> list[int]:
    return [one.line for one in training if list(held.check(one))]


@pytest.mark.parametrize("language", ["en", "ja"])
def test_clean_records_do_not_leak(language: str) -> None:
    assert leaks(clean_records(300, language), held_out(clean_pairs(300, language, seed=1))) == []


@pytest.mark.parametrize("language", ["en", "ja"])
def test_an_item_leaks_inside_any_other_text(language: str) -> None:
    pairs = clean_pairs(50, language, seed=1)
    question = pairs[17][0]
    around = {
        "en": ("Please answer: {} Thank you.", "near", "at"),
        "ja": ("次に答えてください。{}お願いします。", "教えて", "述べて"),
    }[language]
    training = [
        record(question, "Nobody knows.", 1),
        record(around[0].format(question), "x", 2),
        text(f"{pairs[3][1]} {question} {pairs[4][1]}", 3),
        record("Write a question.", question, 4),
        record(question.upper().replace(around[1], around[2]), "x", 5),
        record(pairs[17][0][: len(question) // 3], "only its first third", 6),
    ]
    assert leaks(training, held_out(pairs)) == [1, 2, 3, 4, 5]


def test_a_short_item_leaks_only_as_a_whole() -> None:
    held = held_out([("Who built it?", "Ann"), ("空はなぜ青い？", "光のため")])
    training = [
        record("Who built it?", "Bob", 1),
        record("空はなぜ青い", "海のため", 2),
        record("Who built the bridge?", "Eve", 3),
    ]
    assert leaks(training, held) == [1, 2]


def test_the_template_of_items_is_not_a_leak() -> None:
    template = "Read the following text with care and answer the question below in one word only: "
    held = held_out([(template + question, answer) for question, answer in clean_pairs(100, seed=1)])
    training = [
        record(template + question, answer, line) for line, (question, answer) in enumerate(clean_pairs(100), 1)
    ]
    assert leaks(training, held) == []
    assert leaks([record(template + clean_pairs(100, seed=1)[5][0], "x")], held) == [1]


def test_a_leak_names_its_item_and_fails_from_one_percent_on() -> None:
    pairs = clean_pairs(30, seed=1)
    records = [*clean_records(150), record(pairs[4][0], "x", 151)]
    judgement, hits = check_all(records, evaluation=held_out(pairs))
    assert lines(hits, "leak.evaluation") == [151]
    finding = judgement.finding("leak.evaluation")
    assert finding is not None and "item 5 of held-out" in finding.places[0].detail and finding.severity == "warn"
    judgement, _ = check_all([*records, record(pairs[5][0], "x", 152)], evaluation=held_out(pairs))
    assert judgement.verdict == "fail"


def test_a_record_of_several_sets_is_reported_once() -> None:
    pairs = clean_pairs(30, seed=1)
    items = [record(*pair, line) for line, pair in enumerate(pairs, 1)]
    held = EvaluationSets([("dev", items), ("test", items)])
    judgement, hits = check_all([*clean_records(150), record(*pairs[4], 151), record(*pairs[4], 152)], evaluation=held)
    assert lines(hits, "leak.evaluation") == [151, 152]
    finding = judgement.finding("leak.evaluation")
    assert finding is not None and finding.count == 2 and "100% of item 5 of" in finding.places[0].detail


def test_short_questions_that_differ_in_one_word_are_different() -> None:
    held = held_out(
        [("How many people live in the city of Paris?", "2 million"), ("次の文を英語に訳して：空が青い", "x")]
    )
    training = [
        record("How many people live in the city of Rome?", "3 million", 1),
        record("次の文を英語に訳して：海が広い", "x", 2),
        record("Tell me: how many people live in the city of Paris?", "2 million", 3),
    ]
    assert leaks(training, held) == [3]


def test_an_empty_evaluation_set_reports_no_leak() -> None:
    assert leaks(clean_records(3), held_out([])) == []
