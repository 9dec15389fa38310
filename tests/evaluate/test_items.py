"""Item files and suites: what is read, and what is refused, all problems at once."""

import json
from pathlib import Path

import pytest

from ft_service.errors import SpecError
from ft_service.evaluate.items import read_items
from ft_service.evaluate.suite import SHIPPED, draw, load_suite

GOOD = {"id": "a", "skill": "reading", "prompt": "Which city?", "metric": "exact", "reference": "Paris"}


def write_lines(file: Path, *items: object) -> Path:
    file.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return file


def write_suite(folder: Path, text: str, *items: object) -> str:
    write_lines(folder / "items.jsonl", *items)
    (folder / "suite.yaml").write_text(text)
    return str(folder / "suite.yaml")


def test_an_item_without_a_cluster_is_its_own(tmp_path):
    first, second = read_items(write_lines(tmp_path / "i.jsonl", GOOD, {**GOOD, "id": "b", "cluster": "passage"}))
    assert (first.cluster, second.cluster) == ("a", "passage")
    assert first.language == "en"


def test_a_line_may_hold_characters_that_python_takes_for_line_ends(tmp_path):
    item = {**GOOD, "prompt": "one\u2028two\x85three"}
    file = tmp_path / "i.jsonl"
    file.write_text(json.dumps(item, ensure_ascii=False), encoding="utf-8")
    assert read_items(file)[0].prompt == item["prompt"]


def test_every_bad_line_is_named_at_once(tmp_path):
    file = write_lines(
        tmp_path / "i.jsonl",
        GOOD,
        "{not json",
        {**GOOD, "id": "b", "metric": "number"},
        {**GOOD, "id": "c", "metrics": "exact"},
        {**GOOD, "id": "d", "metric": "bleu"},
        {**GOOD, "id": "e", "prompt": "  "},
        [1],
        GOOD,
    )
    with pytest.raises(SpecError) as raised:
        read_items(file)
    text = str(raised.value)
    for expected in (
        "line 2 = '{not json': is not JSON",
        "line 3 (b): metric = 'number': the reference 'Paris' has no number",
        "line 4 (c): metrics = 'exact'",
        "line 5 (d): metric = 'bleu'",
        "line 6 (e)",
        "its prompt is empty",
        "line 7 (no object)",
        "id = 'a': is the id of 2 items",
    ):
        assert expected in text
    assert len(raised.value.problems) == 7


def test_a_suite_reads_its_items_and_has_a_digest_of_them(tmp_path):
    suite = write_suite(tmp_path, "name: mine\nitems: ['*.jsonl']\n", GOOD)
    loaded = load_suite(suite)
    assert [item.id for item in loaded.items] == ["a"]
    assert loaded.general_ids == {"a"}
    assert loaded.texts == ("Which city?",)
    again = load_suite(suite)
    assert again.digest == loaded.digest
    write_lines(tmp_path / "items.jsonl", {**GOOD, "reference": "Rome"})
    assert load_suite(suite).digest != loaded.digest


def test_general_items_are_apart_from_the_others(tmp_path):
    write_lines(tmp_path / "general.jsonl", {**GOOD, "id": "g"})
    suite = write_suite(tmp_path, "name: mine\nitems: [items.jsonl]\ngeneral: [general.jsonl]\n", GOOD)
    loaded = load_suite(suite)
    assert [item.id for item in loaded.items] == ["a", "g"]
    assert loaded.general_ids == {"g"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: mine\n", "asks nothing"),
        ("name: mine\nitems: [none.jsonl]\n", "items = 'none.jsonl': matches no file"),
        ("name: mine\nitem: [items.jsonl]\n", "item = ['items.jsonl']: is not a setting. Known settings: name"),
        ("name: mine\nheld_out: [{run: true, path: x.jsonl}]\n", "needs either path, or run: true"),
        ("name: mine\nheld_out: [{path: x, metrics: [bleu]}]\n", "held_out.0.metrics.0 = 'bleu'"),
        ("name: mine\nheld_out: [{path: x, metrics: [f1, f1]}]\n", "names a metric twice"),
        ("name: mine\nstability: {temperatures: [0]}\n", "seeds differ only above 0"),
        ("name: mine\nthresholds: {max_forgetting: 5}\n", "thresholds.max_forgetting = 5"),
        ("name: Mine!\n", "name = 'Mine!'"),
        ("- a list\n", "is not a mapping of settings"),
        ("name: [\n", "cannot be read"),
        ("name: mine\nitems: [items.jsonl]\ntexts: none.txt\n", "texts = 'none.txt': cannot be read"),
    ],
)
def test_a_bad_suite_is_refused_with_setting_value_and_cure(tmp_path, text, expected):
    suite = write_suite(tmp_path, text, GOOD)
    with pytest.raises(SpecError) as raised:
        load_suite(suite)
    assert expected in str(raised.value)


def test_a_bad_item_of_a_suite_is_named_with_its_file(tmp_path):
    suite = write_suite(tmp_path, "name: mine\nitems: [items.jsonl]\n", {**GOOD, "metric": "number"})
    with pytest.raises(SpecError, match=r"items.jsonl: line 1 \(a\): metric"):
        load_suite(suite)


def test_an_unknown_suite_names_the_shipped_ones():
    with pytest.raises(SpecError) as raised:
        load_suite("no-such-suite")
    for shipped in SHIPPED.glob("*.yaml"):
        assert shipped.stem in str(raised.value)


def test_a_draw_is_repeatable_and_keeps_the_order():
    drawn = draw(range(100), 10, seed=3)
    assert drawn == draw(range(100), 10, seed=3) == sorted(drawn)
    assert drawn != draw(range(100), 10, seed=4)
    assert draw([1, 2], 10, seed=0) == [1, 2]
