"""Cures follow the cause, in the words of the interface that is used."""

import json
from pathlib import Path
from typing import Any

import pytest

from ft_service.data.gate import Gate, SecondPass, Source
from ft_service.data.gate.cures import as_options, for_command_line
from ft_service.data.gate.findings import Finding, Judgement
from ft_service.data.gate.records import records_of
from ft_service.data.read import scan
from ft_service.spec.schema import DataSource


def judged(path: Path, content: str, **settings: Any) -> Judgement:
    path.write_text(content, encoding="utf-8")
    source = DataSource(path=str(path), **settings)
    scanned = scan(0, source)
    gate = Gate([Source.of(source, scanned)])
    for shard in scanned.shards:
        for record in records_of(shard, source):
            gate.check(record)
    return gate.judgement(SecondPass())


def finding(judgement: Judgement, code: str) -> Finding:
    found = judgement.finding(code)
    assert found is not None
    return found


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("code", "format", "record", "cure"),
    [
        ("form.wrong-type", "alpaca", {"instruction": "q", "output": 7}, "Write 'output' as text, in quotation marks."),
        ("form.wrong-type", "alpaca", {"instruction": "q", "output": None}, "Fill 'output' where it is null"),
        ("form.wrong-type", "alpaca", {"instruction": "q", "output": ["a"]}, "Write 'output' as one text"),
        ("form.wrong-type", "text", {"text": chat(("user", "u"))["messages"]}, "Set format: chat"),
        ("form.wrong-type", "chat", {"messages": [{"role": "user"}]}, "Write each message as"),
        ("form.missing-column", "alpaca", {"Instruction": "q", " output": "a"}, 'output: " output"} in the source'),
        ("form.role-order", "chat", chat(("user", "u"), ("assistant", "a"), ("user", "u")), "End with an assistant"),
        ("form.role-order", "chat", chat(("user", "u"), ("user", "v"), ("assistant", "a")), "Join neighbouring"),
        ("form.role-order", "chat", chat(("assistant", "a"), ("user", "u"), ("assistant", "b")), "Begin with a user"),
        (
            "form.special-tokens",
            "text",
            {"text": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"},
            "Convert the text to the chat format",
        ),
        ("form.special-tokens", "text", {"text": "Hi, all is well.<|eot_id|>"}, "Remove it where it ends a message"),
    ],
)
def test_the_cure_follows_the_cause(tmp_path: Path, code: str, format: str, record: dict[str, Any], cure: str) -> None:
    found = finding(judged(tmp_path / "a.jsonl", json.dumps(record), format=format), code)
    assert cure in found.cure


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        ("{'a': 1}\n", "in Python: json.dumps"),
        ('{"a": 1, "a": 2}\n', "Rename one of the two keys"),
        ("[1, 2]\n", "Write it as an object with columns"),
    ],
)
def test_an_unreadable_line_has_the_cure_of_its_cause(tmp_path: Path, content: str, cure: str) -> None:
    assert cure in finding(judged(tmp_path / "a.jsonl", content), "form.unreadable").cure


def test_the_cures_of_several_causes_are_all_given(tmp_path: Path) -> None:
    cure = finding(judged(tmp_path / "a.jsonl", "{'a': 1}\n[1, 2]\n"), "form.unreadable").cure
    assert "json.dumps" in cure and "as an object" in cure


def test_a_file_read_by_its_content_is_one_finding(tmp_path: Path) -> None:
    records = [{"text": f"Sentence number {number}."} for number in range(54)]
    judgement = judged(tmp_path / "a.jsonl", json.dumps(records, indent=1), format="text")
    found = finding(judgement, "form.other-layout")
    assert (judgement.read, found.count, found.severity) == (54, 1, "info")
    assert "JSON array" in found.places[0].detail


@pytest.mark.parametrize(("word", "format"), [("nan", "alpaca"), ("None", "alpaca"), (" NULL ", "chat")])
def test_a_word_for_a_missing_value_is_reported(tmp_path: Path, word: str, format: str) -> None:
    record = {"instruction": "q", "input": word, "output": "a"}
    content = json.dumps(record if format == "alpaca" else chat(("user", "q"), ("assistant", word)))
    found = finding(judged(tmp_path / "a.jsonl", content, format=format), "form.null-text")
    assert (found.count, found.severity) == (1, "fail") and repr(word.strip()) in found.places[0].detail


def test_a_sentence_with_such_a_word_or_an_unused_column_is_not(tmp_path: Path) -> None:
    record = {"instruction": "Is it None?", "output": "It is null.", "comment": "nan"}
    assert judged(tmp_path / "a.jsonl", json.dumps(record)).finding("form.null-text") is None


@pytest.mark.parametrize(
    ("setting", "option"),
    [
        ("Set columns: {instruction: question} in the source.", "Add --column instruction=question."),
        ('Set columns: {output: " answer"} in the source.', "--column 'output= answer'."),
        ("Set format: chat, columns: {messages: turns} in the source.", "Add --format chat --column messages=turns."),
        ("Correct the name in the source's `columns`, or remove it there.", "Correct the name with --column"),
        ("Set `source` in the data source: a URL.", "Add --source: a URL."),
    ],
)
def test_settings_become_options(setting: str, option: str) -> None:
    assert option in as_options(setting)


def test_a_judgement_of_a_file_names_options_only(tmp_path: Path) -> None:
    judgement = for_command_line(judged(tmp_path / "a.jsonl", '{"Instruction": "q", "output": "a"}'))
    assert "--column instruction=Instruction" in finding(judgement, "form.missing-column").cure
    assert "--source" in finding(judgement, "rights.no-source").cure
    assert "--license" in finding(judgement, "rights.no-license").cure
