"""The shipped suites by the project's own code: they load, and their metrics judge the known answers as people did."""

import json
from pathlib import Path

import pytest

from ft_service.evaluate.metrics import is_yes_or_no, score
from ft_service.evaluate.suite import load_suite

ANSWERS = Path(__file__).with_name("shipped_answers.jsonl")
SUITES = ("general-en", "general-ja")


@pytest.mark.parametrize(("suite", "fewest"), [("general-en", 300), ("general-ja", 150)])
def test_a_shipped_suite_loads_by_its_name(suite, fewest):
    loaded = load_suite(suite)
    assert len(loaded.items) >= fewest
    assert len({item.skill for item in loaded.items}) == 8
    assert loaded.general_ids == {item.id for item in loaded.items}


def test_a_suite_of_ones_own_takes_a_shipped_one_as_its_general_items(tmp_path):
    (tmp_path / "suite.yaml").write_text("name: mine\ngeneral: [general-en, general-ja]\nheld_out: [{run: true}]\n")
    loaded = load_suite(str(tmp_path / "suite.yaml"))
    assert len(loaded.items) == sum(len(load_suite(suite).items) for suite in SUITES)


def test_known_answers_are_judged_as_people_judged_them():
    items = {item.id: item for suite in SUITES for item in load_suite(suite).items}
    known = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").split("\n") if line]
    assert {answer["id"] for answer in known} == set(items)
    wrong = []
    for answer in known:
        item = items[answer["id"]]
        for text in answer["good"]:
            wrong += [(item.id, text, found)] if (found := score(text, item)).value < 0.5 else []
        for text in answer["bad"]:
            found = score(text, item)
            if found.value >= (0.5 if is_yes_or_no(item.metric) else 1):
                wrong.append((item.id, text, found))
    assert wrong == []
