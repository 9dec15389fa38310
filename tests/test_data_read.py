"""Reading: every kind of file gives the same records, and whatever is wrong with one is named by file and line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from ft_service.chat import Message
from ft_service.data.convert import BadRecord, convert
from ft_service.data.read import Faults, read_records, source_digest
from ft_service.errors import DataError
from ft_service.spec import DataSource

RECORDS = [
    {"instruction": "Translate, please", "input": 'a "quoted"\nline', "output": "zwei, drei"},
    {"instruction": "東京\u2028は？", "input": "", "output": "はい 🎉"},
    {"instruction": "x", "input": "  ", "output": "<|eot_id|>"},
]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)


def write_saved(path: Path, records: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(records).save_to_disk(str(path))


def write_folder(path: Path, records: list[dict[str, Any]]) -> None:
    path.mkdir()
    write_jsonl(path / "1.jsonl", records[:1])
    write_parquet(path / "2.parquet", records[1:2])
    write_csv(path / "3.csv", records[2:])
    (path / "README.md").write_text("not data")


Writer = Callable[[Path, list[dict[str, Any]]], None]
WRITERS: dict[str, Writer] = {
    "data.jsonl": write_jsonl,
    "lines.json": write_jsonl,
    "array.json": write_json,
    "data.csv": write_csv,
    "data.parquet": write_parquet,
    "saved": write_saved,
    "folder": write_folder,
}


def read(path: Path, **source: Any) -> list[dict[str, Any]]:
    faults = Faults()
    records = [record for record, _ in read_records(DataSource(path=str(path), **source), faults)]
    faults.raise_if_any()
    return records


def places(path: Path) -> list[str]:
    return [place for _, place in read_records(DataSource(path=str(path)), Faults())]


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, RECORDS)
    assert read(tmp_path / name) == RECORDS


@pytest.mark.parametrize("name", ["data.jsonl", "array.json", "data.parquet", "saved"])
def test_conversations_survive_every_nested_format(tmp_path: Path, name: str) -> None:
    messages = [
        {"role": "system", "content": "s", "weight": None},
        {"role": "user", "content": "u", "weight": None},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 1},
    ]
    WRITERS[name](tmp_path / name, [{"messages": messages}])
    (record,) = read(tmp_path / name)
    expected = (
        Message("system", "s"),
        Message("user", "u"),
        Message("assistant", "a", 0),
        Message("assistant", "b", 1),
    )
    assert convert(record, DataSource(path="x", format="chat")) == expected


@pytest.mark.parametrize("name", ["data.jsonl", "array.json", "data.csv"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path, name: str) -> None:
    records = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    WRITERS[name](tmp_path / name, records)
    text = (tmp_path / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
    assert read(tmp_path / name) == records


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"text": "a"}\n\n   \n{"text": "b"}')
    assert places(path) == [f"{path}:2", f"{path}:5"]


def test_a_csv_from_pandas_with_an_unnamed_index_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(",instruction,output\n0,a,b\n1,c,d\n")
    assert [record["output"] for record in read(tmp_path / "data.csv")] == ["b", "d"]


def test_a_csv_field_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    write_csv(tmp_path / "data.csv", [{"text": "long " * 40_000}])
    assert read(tmp_path / "data.csv") == [{"text": "long " * 40_000}]


def test_the_digest_is_of_the_bytes_and_not_of_the_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    write_jsonl(tmp_path / "b.jsonl", RECORDS)
    write_jsonl(tmp_path / "c.jsonl", [*RECORDS[:-1], {**RECORDS[-1], "output": "<|eot_id|"}])
    a, b, c = (source_digest(DataSource(path=str(tmp_path / f"{name}.jsonl"))) for name in "abc")
    assert a == b != c


# -- what a record means -----------------------------------------------------------------------------------------------


def alpaca(record: dict[str, Any], **columns: str) -> Any:
    return convert(record, DataSource(path="x", format="alpaca", columns=columns))


def test_alpaca_is_an_instruction_with_its_input_and_an_answer() -> None:
    assert alpaca({"instruction": "do", "output": "done"}) == (Message("user", "do"), Message("assistant", "done"))
    assert alpaca({"instruction": "do", "input": " this ", "output": "done", "system": "be kind"}) == (
        Message("system", "be kind"),
        Message("user", "do\n\nthis"),
        Message("assistant", "done"),
    )


@pytest.mark.parametrize("nothing", ["", "  ", None])
def test_an_input_or_system_without_content_is_as_if_absent(nothing: str | None) -> None:
    record = {"instruction": "do", "output": "done", "input": nothing, "system": nothing}
    assert alpaca(record) == alpaca({"instruction": "do", "output": "done"})


def test_columns_are_read_under_the_files_names() -> None:
    record = {"q": "do", "a": "done", "context": "this", "instruction": "not me", "output": "nor me", "sys": "s"}
    assert alpaca(record, instruction="q", output="a", input="context", system="sys") == (
        Message("system", "s"),
        Message("user", "do\n\nthis"),
        Message("assistant", "done"),
    )
    assert convert({"body": " a "}, DataSource(path="x", format="text", columns={"text": "body"})) == " a "
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    chat = DataSource(path="x", format="chat", columns={"messages": "turns"})
    assert convert({"turns": turns}, chat) == (Message("user", "u"), Message("assistant", "a"))


def chat_record(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}

BAD_RECORDS = [
    (
        "alpaca",
        {"question": "q", "answer": "a"},
        r"has no column 'instruction' \(there: question, answer\). Set columns",
    ),
    ("alpaca", {"instruction": "q", "answer": "a"}, r"has no column 'output' \(there: instruction, answer\)"),
    ("alpaca", {}, r"has no column 'instruction' \(there: none\)"),
    ("alpaca", {"instruction": "q", "output": ""}, "output is empty"),
    ("alpaca", {"instruction": "q", "output": " \n"}, "output is empty"),
    ("alpaca", {"instruction": "", "output": "a"}, "instruction is empty"),
    ("alpaca", {"instruction": "q", "output": 7}, "output is int, not text"),
    ("alpaca", {"instruction": None, "output": "a"}, "instruction is NoneType, not text"),
    ("alpaca", {"instruction": "q", "output": "a", "input": ["x"]}, "input is list, not text"),
    ("alpaca", {"instruction": "q", "output": "a\ud83d"}, r"output holds half a character, '\\ud83d', at 1"),
    ("text", {"body": "b"}, r"has no column 'text' \(there: body\)"),
    ("text", {"text": {"a": 1}}, "text is dict, not text"),
    ("chat", {"conversations": []}, r"has no column 'messages' \(there: conversations\)"),
    ("chat", {"messages": "hi"}, "messages are not a list"),
    ("chat", chat_record(), "at least one message"),
    ("chat", chat_record("hi"), "message 1 is not {role, content}"),
    ("chat", chat_record(USER, {"role": "assistant"}), "message 2 is not {role, content}"),
    ("chat", chat_record({"role": "robot", "content": "x"}), "message 1 has role 'robot'; known are system, user"),
    ("chat", chat_record(USER, {**ANSWER, "content": None}), "message 2 has no text as content"),
    ("chat", chat_record(USER, {**ANSWER, "content": " "}), "message 2 has no text as content"),
    ("chat", chat_record(USER, {**ANSWER, "content": "\udc00"}), "content of message 2 holds half a character"),
    ("chat", chat_record(USER, {**ANSWER, "weight": 0.5}), "message 2 has weight 0.5; 0 and 1 are known"),
    ("chat", chat_record(USER), "no assistant message to train on"),
    ("chat", chat_record(USER, {**ANSWER, "weight": 0}), "no assistant message to train on"),
]


@pytest.mark.parametrize(("format_", "record", "why"), BAD_RECORDS)
def test_a_record_that_cannot_be_used_says_what_it_lacks(format_: Any, record: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        convert(record, DataSource(path="x", format=format_))


# -- files that cannot be read -----------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "place", "why"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ":2", "is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', ":2", "is a JSON list, not an object with columns"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff\xfe"}\n', ":3", "is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, ":1", "is not JSON"),
        ("a.json", b'[{"a": 1}, "b"]', ": record 2", "is a JSON str, not an object"),
        ("a.json", b'[{"a": 1},\n {"a": }]', "", "is not a JSON array of records (Expecting value: line 2"),
        ("a.json", b'[{"a": 1},\n {"a": "\xff"}]', ":2", "is not UTF-8"),
        ("a.json", b'{"a": 1}\n{"a": \n', ":2", "is not JSON"),
        ("a.csv", b"a,b\n1,2\n3\n", ":3", "has not the 2 columns of the header"),
        ("a.csv", b"a,b\n1,2\n3,4,5\n", ":3", "has not the 2 columns of the header"),
        ("a.csv", b'a,b\n1,2\n3,"open\n5,6\n', ":3", "is not CSV"),
        ("a.csv", b"a,b\n1,\xe9\n", ":2", "is not UTF-8"),
        ("a.parquet", b"PAR1 not really", "", "cannot be read as Parquet"),
        ("a.parquet", b"", "", "cannot be read as Parquet"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, place: str, why: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(path)
    assert f"{path}{place}: {why}" in message


def test_a_parquet_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_parquet(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: cannot be read as Parquet" in refused(path) and "it may be cut off" in refused(path)


def test_a_saved_dataset_that_is_cut_off_is_named(tmp_path: Path) -> None:
    write_saved(tmp_path / "saved", RECORDS)
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"{tmp_path / 'saved'}: cannot be loaded as a saved dataset" in refused(tmp_path / "saved")


def test_a_folder_of_splits_asks_for_one_of_them(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "both"))
    assert "holds the splits train, test. Name the folder of one of them" in refused(tmp_path / "both")
    assert read(tmp_path / "both" / "train") == RECORDS


@pytest.mark.parametrize("operation", [read, lambda path: source_digest(DataSource(path=str(path)))])
def test_a_source_that_is_no_data_file_names_the_cure(tmp_path: Path, operation: Callable[[Path], Any]) -> None:
    (tmp_path / "data.xlsx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "data.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file\. Mend the path"):
        operation(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"data\.xlsx: files of this kind are not read\. Use one of \.jsonl, \.json"):
        operation(tmp_path / "data.xlsx")
    with pytest.raises(DataError, match=r"empty: a folder without \.jsonl, \.json, \.csv, \.parquet files"):
        operation(tmp_path / "empty")
    with pytest.raises(DataError, match=r"dangling/data\.jsonl: cannot be read \(No such file"):
        operation(tmp_path / "dangling")


def test_a_hub_dataset_that_cannot_be_fetched_names_the_way_to_write_it() -> None:
    with pytest.raises(DataError, match=r"'hub:nobody/nothing': cannot be fetched .*Write hub:OWNER/NAME"):
        list(read_records(DataSource(path="hub:nobody/nothing"), Faults()))


def test_many_bad_records_make_one_error_with_their_number_and_the_first_ten(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join('{"a": 1}\n' if line % 2 else "oops\n" for line in range(50)))
    message = refused(path)
    assert message.startswith("25 records cannot be used. Mend or remove them")
    assert [f"{path}:{line}:" in message for line in (1, 3, 19, 21)] == [True, True, True, False]
    assert message.count("is not JSON") == 10
    assert message.endswith("... and 15 more")
