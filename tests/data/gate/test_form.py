"""Checks of single records: form, leftovers, stock phrases. Each kind is found; text that resembles it passes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ft_service.data.gate import CODES, Gate, Record, SecondPass, Source, read_source
from ft_service.data.gate.form import check_record
from ft_service.spec.schema import DataSource
from tests.data.gate.gate_cases import chat, clean_records, record, text


def codes(one: Record) -> set[str]:
    return {hit.code for hit in check_record(one)}


def answer(content: str) -> Record:
    return record("What came of it?", content)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_clean_records_have_no_findings(language: str) -> None:
    assert [code for one in clean_records(100, language) for code in codes(one)] == []


# -- what cannot be used ---------------------------------------------------------------------------------------------


def read(tmp_path: Path, content: bytes, **source: Any) -> list[Record]:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    return list(read_source(0, DataSource(path=str(file), **source)))


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"messages": [', "form.unreadable"),
        (b"[1, 2]", "form.unreadable"),
        ('{"messages": "日本"}'.encode("cp932"), "form.encoding"),
        (b'{"message": []}', "form.missing-column"),
        (b'{"messages": "x"}', "form.wrong-type"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "form.wrong-type"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "form.no-answer"),
        (b'{"messages": [{"role": "human", "content": "x"}]}', "form.unknown-role"),
        ('{"messages": [{"role": "assistant", "content": "\u3000 "}]}'.encode(), "form.empty-output"),
        (b'{"messages": [{"role": "user", "content": ""}]}', "form.empty-input"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "form.encoding"),
    ],
)
def test_an_unusable_record_has_a_code_a_reason_and_a_place(tmp_path: Path, line: bytes, code: str) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}).encode()
    records = read(tmp_path, b"\n".join([good, line, good]), format="chat")
    assert [(one.line, one.fault and one.fault.code) for one in records] == [(1, None), (2, code), (3, None)]
    (hit,) = check_record(records[1])
    assert hit.code == code and hit.detail
    assert CODES[code].leaves_out


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ({"instruction": "q"}, "form.missing-column"),
        ({"instruction": "q", "output": " \n"}, "form.empty-output"),
        ({"instruction": "", "output": "a"}, "form.empty-input"),
        ({"instruction": "q", "output": None}, "form.wrong-type"),
    ],
)
def test_alpaca_records_have_the_same_codes(tmp_path: Path, raw: dict[str, Any], code: str) -> None:
    (one,) = read(tmp_path, json.dumps(raw).encode())
    assert one.fault is not None and one.fault.code == code


def test_the_file_after_a_damaged_one_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "1.parquet").write_bytes(b"PAR1 and nothing more")
    (tmp_path / "2.jsonl").write_text('{"text": "whole"}')
    broken, whole = read_source(0, DataSource(path=str(tmp_path), format="text"))
    assert broken.fault is not None and (broken.fault.code, broken.file, broken.line) == ("form.unreadable-file", 0, 0)
    assert (whole.item, whole.file, whole.line) == ("whole", 1, 1)


# -- absent columns --------------------------------------------------------------------------------------------------

SOURCES = [
    Source("a.jsonl", ("a.jsonl",), optional=("context", "sys")),
    Source("b.jsonl", ("b.jsonl",), optional=("sys",)),
]


def with_columns(line: int, *columns: str, source: int = 0) -> Record:
    return replace(record("q", "a", line, raw=dict.fromkeys(columns, "x")), source=source)


def absent(gate: Gate) -> list[str]:
    """Columns that the gate reports absent."""
    finding = gate.judgement(SecondPass()).finding("form.absent-column")
    return [] if finding is None else [place.detail.split("'")[1] for place in finding.places]


def test_a_named_column_that_no_record_has_fails() -> None:
    gate = Gate(SOURCES)
    gate.check(with_columns(1, "instruction", "output", "context"))
    gate.check(with_columns(1, "sys", source=1))  # another source's column
    finding = gate.judgement(SecondPass()).finding("form.absent-column")
    assert finding is not None and (finding.severity, finding.count) == ("fail", 1)
    assert absent(gate) == ["sys"] and finding.places[0].file == "a.jsonl"


def test_one_record_with_a_named_column_is_enough() -> None:
    gate = Gate(SOURCES)
    for one in (with_columns(1, "context"), with_columns(2), with_columns(3, "sys")):
        gate.check(one)
    assert absent(gate) == []


def test_a_column_that_only_another_shard_has_is_not_absent() -> None:
    gates = [Gate(SOURCES), Gate(SOURCES)]
    hits = [gates[1].check(with_columns(2, "sys"))]
    gates[0].check(with_columns(1, "context"))
    assert absent(gates[0]) == ["sys"] and absent(gates[1]) == ["context"]
    gates[0].merge(gates[1].partial_result(), hits)
    assert absent(gates[0]) == []


def test_an_empty_source_has_no_absent_columns() -> None:
    assert absent(Gate(SOURCES)) == []


# -- order of turns --------------------------------------------------------------------------------------------------

U = ("user", "q")
A = ("assistant", "a")
S = ("system", "s")
T = ("tool", "t")


@pytest.mark.parametrize("turns", [(U, A), (S, U, A), (U, A, U, A), (U, A, T, A), (U, A, T, T, A)])
def test_turns_in_order_pass(turns: tuple[tuple[str, str], ...]) -> None:
    assert codes(chat(*turns)) == set()


@pytest.mark.parametrize("turns", [(A, U, A), (U, U, A), (U, A, A), (U, A, U), (U, S, A), (S, A), (T, A), (A,)])
def test_turns_out_of_order_are_reported(turns: tuple[tuple[str, str], ...]) -> None:
    assert codes(chat(*turns)) == {"form.role-order"}


# -- characters and leftovers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("It’s the café of the town.".encode().decode("cp1252"), "form.mojibake"),
        ("これは日本語の文章です。".encode().decode("cp1252", "ignore"), "form.mojibake"),
        ("これは日本語の文章です。".encode().decode("cp932", "ignore"), "form.mojibake"),
        ("これは日本語の文章です。".encode("euc_jp").decode("latin-1"), "form.mojibake"),
        ("the caf\ufffd of the town", "form.encoding"),
        ("これは日\ufffd語です。", "form.encoding"),
        ("a bell\x07 rings", "form.control-characters"),
        ("幅のない\u200b空白", "form.control-characters"),
        ("It ends here.<|eot_id|>", "form.special-tokens"),
        ("ここで終わり。<|im_end|>", "form.special-tokens"),
        ("### Response:\nIt is so.", "form.special-tokens"),
        ("### 応答：\nそうです。", "form.special-tokens"),
        ("Yes.\nHuman: and then?", "form.special-tokens"),
        ("It is so.</s> And then it ends.", "form.special-tokens"),
        ("<p>It is so.</p>", "form.html"),
        ("東京&nbsp;タワー", "form.html"),
        ('見て<span class="x">ください', "form.html"),
    ],
)
def test_leftovers_are_found(content: str, code: str) -> None:
    assert codes(answer(content)) == {code}
    assert codes(text(content)) == {code}


@pytest.mark.parametrize(
    "content",
    [
        "naïve café, “quoted” — 5 × 3 ≥ 15 €",
        "ﾊﾝｶｸ カタカナと全角ＡＢＣ、絵文字👨‍👩‍👧も。",
        "繧繝という文様がある。",
        "一本の縺れた糸。",
        "if a < b and c > d then a <= d",
        "x <- c(1, 2); y |> print()",
        "Ratio 3:4. Note: see Human rights.",
        "Write ```\n<p>code</p>\n``` and `<br>` in HTML.",
        "tab\tand\r\nline ends",
        "AT&T and R&D",
        "It was <s>good</s> better.",
    ],
)
def test_text_that_resembles_a_leftover_passes(content: str) -> None:
    assert codes(answer(content)) == set()


@pytest.mark.parametrize("question", ["Write a React component.", "Use react.js here.", "What does this PHP print?"])
def test_a_question_about_react_or_php_is_about_markup(question: str) -> None:
    assert codes(record(question, "<p>It is so.</p>")) == set()


@pytest.mark.parametrize(
    "question", ["How do acids react?", "Name a reactor.", "What is glyphp?", "The morphphp of it"]
)
def test_a_word_that_holds_react_or_php_is_not_about_markup(question: str) -> None:
    assert codes(record(question, "<p>It is so.</p>")) == {"form.html"}


def test_an_answer_about_markup_may_contain_markup() -> None:
    assert codes(record("Write a heading in HTML.", "<h1>Title</h1>")) == set()
    assert codes(record("改行のタグを書いて。", "<br>")) == set()
    assert codes(record("Write a heading.", "<h1>Title</h1>")) == {"form.html"}


# -- what answers say ------------------------------------------------------------------------------------------------


def test_an_answer_that_repeats_its_question_is_reported() -> None:
    question = "Why does the river of Oslo carry so many boats in the spring?"
    assert codes(record(question, f"{question.upper()} Because of the snow.")) == {"quality.copied-instruction"}
    assert codes(record(f"{question}\n\nContext: it snows.", f"{question} Snow.")) == {"quality.copied-instruction"}
    assert codes(record(question, "Because of the snow, the river of Oslo carries boats.")) == set()
    question = "オスロの川には春になるとなぜ船が多いのですか。"
    assert codes(record(question, f"{question}雪どけのためです。")) == {"quality.copied-instruction"}
    assert codes(record(question, "オスロの川は雪どけで水が増えるからです。")) == set()
    assert codes(record("What is it?", "What is it? A boat.")) == set(), "a short question occurs by chance"


@pytest.mark.parametrize(
    "content",
    [
        "I'm sorry, but I can't help with that.",
        "I'm not able to help with that.",
        "I’m sorry, but as an AI language model I cannot do so.",
        "As a large language model, I have no opinion.",
        "申し訳ありませんが、その質問にはお答えできません。",
        "AI言語モデルとして、意見を持っていません。",
    ],
)
def test_refusals_are_found(content: str) -> None:
    assert codes(answer(content)) == {"quality.refusal"}


@pytest.mark.parametrize(
    "content",
    [
        "Certainly! Here it is.",
        "It is blue.\nI hope this helps!",
        "It is blue. Let me know if you have more questions.",
        "もちろんです。青いです。",
        "青いです。ご不明な点がございましたら、お気軽にお尋ねください。",
    ],
)
def test_boilerplate_is_found(content: str) -> None:
    assert codes(answer(content)) == {"quality.boilerplate"}


@pytest.mark.parametrize(
    "content",
    [
        "He said he was sorry that he could not come.",
        "She is certainly right; of course it is blue.",
        "お待たせして申し訳ありません。すぐにお送りします。",
        "彼はもちろんですが、私も行きます。",
        "Language models predict the next token.",
    ],
)
def test_ordinary_sentences_are_not_stock_phrases(content: str) -> None:
    assert codes(answer(content)) == set()


def test_only_trained_turns_are_checked_for_stock_phrases() -> None:
    assert codes(record("I'm sorry, I can't do this. I hope this helps you to help me.", "Then do that.")) == set()
