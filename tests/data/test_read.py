"""Reading: every kind of file gives the same records, and every fault is named by file and line."""

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ft_service.chat.format import Message
from ft_service.data import read as reading
from ft_service.data.convert import BadRecord, convert
from ft_service.data.files import json_files
from ft_service.data.files.shard import Fault, ShardChanged
from ft_service.data.read import check_sources, read_shard, read_source, scan
from ft_service.errors import DataError, SpecError
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import DataSource, RunSpec

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


FILE = "form.unreadable-file"
LINE = "form.unreadable"
CODING = "form.encoding"

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


def read(path: Path) -> list[dict[str, Any]]:
    records = [record for _, record in read_source(DataSource(path=str(path)))]
    assert not any(isinstance(record, Fault) for record in records)
    return records  # type: ignore[return-value]


def places(path: Path) -> list[str]:
    return [place for place, _ in read_source(DataSource(path=str(path)))]


def faults(path: Path) -> list[tuple[str, Fault]]:
    """(place, what is wrong) of what cannot be read."""
    return [(place, record) for place, record in read_source(DataSource(path=str(path))) if isinstance(record, Fault)]


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, RECORDS)
    assert read(tmp_path / name) == RECORDS


@pytest.mark.parametrize("name", ["data.jsonl", "array.json", "data.parquet", "saved"])
def test_nested_formats_keep_conversations(tmp_path: Path, name: str) -> None:
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


def test_blank_lines_are_not_records_but_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"text": "a"}\n\n   \n{"text": "b"}')
    assert places(path) == [f"{path}:2", f"{path}:5"]


def test_a_csv_with_an_unnamed_index_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(",instruction,output\n0,a,b\n1,c,d\n")
    assert [record["output"] for record in read(tmp_path / "data.csv")] == ["b", "d"]


def test_a_csv_field_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    write_csv(tmp_path / "data.csv", [{"text": "long " * 40_000}])
    assert read(tmp_path / "data.csv") == [{"text": "long " * 40_000}]


def test_a_csv_record_of_several_lines_is_numbered_by_its_first(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\r\n"one\r\ntwo\nthree",x\r\n1,2\r\n"","y\n"\r\n3\r\n4,"5\r6"\r\n')
    assert places(path) == [f"{path}:{line}" for line in (2, 5, 6, 8, 9)]
    assert [place for place, _ in faults(path)] == [f"{path}:8"]


YEAR_10000 = 2_932_897  # days after 1970-01-01


def dated_rows() -> pa.Table:
    """A column of dates of which the second is later than Python's last."""
    days = pa.array([0, YEAR_10000, None], pa.int32()).cast(pa.date32())
    return pa.table({"text": ["a", "b", "c"], "day": days})


@pytest.mark.parametrize("unit", ["date32", "timestamp[s]", "duration"])
def test_parquet_dates_beyond_year_9999_keep_the_other_columns(tmp_path: Path, unit: str) -> None:
    seconds = pa.array([0, YEAR_10000 * 86_400, None], pa.int64())
    durations = pa.array([0, 2**62, None], pa.int64()).cast(pa.duration("s"))
    column = {"date32": dated_rows()["day"], "timestamp[s]": seconds.cast(pa.timestamp("s")), "duration": durations}
    pyarrow.parquet.write_table(dated_rows().set_column(1, "day", column[unit]), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row["text"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["day"] is not None and rows[2]["day"] is None
    if unit != "duration":
        assert str(rows[0]["day"]).startswith("1970-01-01") and str(rows[1]["day"]).startswith("10000-01-01")


def test_a_saved_date_beyond_year_9999_faults_only_its_record(tmp_path: Path) -> None:
    datasets.Dataset(dated_rows()).save_to_disk(str(tmp_path / "saved"))
    records = list(read_source(DataSource(path=str(tmp_path / "saved"))))
    ((place, fault),) = faults(tmp_path / "saved")
    assert place == f"{tmp_path / 'saved'}:2" and fault.code == "form.wrong-type"
    assert [record["text"] for _, record in records if not isinstance(record, Fault)] == ["a", "c"]


def test_the_digest_depends_on_the_suffix(tmp_path: Path) -> None:
    """The suffix decides where the content leaves it open: text that is no JSON is CSV, or bad lines of .jsonl."""
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text('[{"text": "a"}]')
    lines, array = (scan(0, DataSource(path=str(tmp_path / name))).digest for name in ("a.jsonl", "a.json"))
    assert lines != array


def test_the_digest_depends_on_bytes_not_on_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    write_jsonl(tmp_path / "b.jsonl", RECORDS)
    write_jsonl(tmp_path / "c.jsonl", [*RECORDS[:-1], {**RECORDS[-1], "output": "<|eot_id|"}])
    a, b, c = (scan(0, DataSource(path=str(tmp_path / f"{name}.jsonl"))).digest for name in "abc")
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
def test_an_empty_input_or_system_counts_as_absent(nothing: str | None) -> None:
    record = {"instruction": "do", "output": "done", "input": nothing, "system": nothing}
    assert alpaca(record) == alpaca({"instruction": "do", "output": "done"})


def test_columns_are_read_by_the_names_in_the_file() -> None:
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


USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}

BAD_RECORDS = [
    (
        "alpaca",
        {"question": "q", "answer": "a"},
        r"has no column 'instruction' \(its columns: question, answer\). Set columns",
    ),
    ("alpaca", {"instruction": "q", "answer": "a"}, r"has no column 'output' \(its columns: instruction, answer\)"),
    ("alpaca", {}, r"has no column 'instruction' \(its columns: none\)"),
    ("alpaca", {"instruction": "q", "output": ""}, "output is empty"),
    ("alpaca", {"instruction": "q", "output": " \n"}, "output is empty"),
    ("alpaca", {"instruction": "", "output": "a"}, "instruction is empty"),
    ("alpaca", {"instruction": "q", "output": 7}, "output is int, not text"),
    ("alpaca", {"instruction": None, "output": "a"}, "instruction is NoneType, not text"),
    ("alpaca", {"instruction": "q", "output": "a", "input": ["x"]}, "input is list, not text"),
    ("alpaca", {"instruction": "q", "output": "a\ud83d"}, r"contains half a character, '\\ud83d', at position 1"),
    ("text", {"body": "b"}, r"has no column 'text' \(its columns: body\)"),
    ("text", {"text": {"a": 1}}, "text is dict, not text"),
    ("chat", {"conversations": []}, r"has no column 'messages' \(its columns: conversations\)"),
    ("chat", {"messages": "hi"}, "messages are not a list"),
    ("chat", chat_record(), "at least one message"),
    ("chat", chat_record("hi"), "message 1 is not an object with role and content"),
    ("chat", chat_record(USER, {"role": "assistant"}), "message 2 is not an object with role and content"),
    (
        "chat",
        chat_record({"role": "robot", "content": "x"}),
        r"message 1 has the unknown role 'robot' \(known: system, user",
    ),
    ("chat", chat_record(USER, {**ANSWER, "content": None}), "the content of message 2 is not text"),
    ("chat", chat_record(USER, {**ANSWER, "content": " "}), "the content of message 2 is empty"),
    ("chat", chat_record(USER, {**ANSWER, "content": "\udc00"}), "content of message 2 contains half a character"),
    ("chat", chat_record(USER, {**ANSWER, "weight": 0.5}), r"message 2 has weight 0.5 \(allowed: 0 and 1\)"),
    ("chat", chat_record(USER), "no assistant message to train on"),
    ("chat", chat_record(USER, {**ANSWER, "weight": 0}), "no assistant message to train on"),
]


@pytest.mark.parametrize(("format_", "record", "why"), BAD_RECORDS)
def test_an_unusable_record_says_what_it_lacks(format_: Any, record: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        convert(record, DataSource(path="x", format=format_))


# -- specs -------------------------------------------------------------------------------------------------------------


def spec_with(columns: dict[str, str], *overrides: str) -> RunSpec:
    data = {"train": [{"path": "a.jsonl", "columns": columns}]}
    document = {"name": "case", "model": {"base": "none"}, "data": data, "storage": "none"}
    return parse_run_spec(json.dumps(document), list(overrides))


def test_an_unknown_key_of_columns_is_refused() -> None:
    assert spec_with({"input": "context"}).data.train[0].columns == {"input": "context"}
    with pytest.raises(SpecError, match=r"'answer'.*instruction, input, output, system, messages, text"):
        spec_with({"answer": "output"})


def test_an_override_waives_a_code_with_dots() -> None:
    waive = spec_with({}, "data.waive.form.unreadable=two lines are known").data.waive
    assert waive == {"form.unreadable": "two lines are known"}


# -- what a parser would decide in silence -----------------------------------------------------------------------------

JAPANESE = "質問,回答\n営業時間は？,九時から六時までです。\n配送はいつですか,三日ほどかかります\n"
PAIR = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]


def only_fault(path: Path, content: bytes) -> Fault:
    """The fault of a file that is not read at all."""
    path.write_bytes(content)
    ((place, fault),) = read_source(DataSource(path=str(path)))
    assert isinstance(fault, Fault) and (place, fault.code) == (str(path), FILE)
    return fault


def read_bytes(path: Path, content: bytes) -> list[dict[str, Any]]:
    path.write_bytes(content)
    return read(path)


def test_a_doubled_csv_column_is_refused(tmp_path: Path) -> None:
    fault = only_fault(tmp_path / "a.csv", b"instruction,output,output\nq,first,second\n")
    assert "two columns 'output'" in fault.reason and "Rename" in fault.cure


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    assert read_bytes(tmp_path / "a.csv", b"a,b,,\n1,2,,\n") == [{"a": "1", "b": "2", "": ""}]


def test_a_doubled_parquet_column_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["x"]), pa.array(["y"])]
    pyarrow.parquet.write_table(pa.Table.from_arrays(columns, ["text", "text"]), tmp_path / "a.parquet")
    ((_, fault),) = faults(tmp_path / "a.parquet")
    assert fault.code == FILE and "two columns 'text'" in fault.reason


@pytest.mark.parametrize(
    "line", [b'{"a": 1, "b": 2, "a": 3}', b'{"m": [{"role": "user", "content": "x", "content": "y"}]}']
)
def test_a_doubled_json_key_is_refused_at_any_depth(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"c": 1}\n' + line)
    ((place, fault),) = faults(tmp_path / "a.jsonl")
    assert place.endswith(":2") and fault.code == LINE and "twice" in fault.reason and "Rename" in fault.cure
    assert "twice" in only_fault(tmp_path / "a.json", b"[" + line + b"]").reason


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null"])
def test_a_number_that_is_no_json_is_null(tmp_path: Path, name: str, value: str) -> None:
    line = f'{{"a": {value}, "b": [{value}]}}'
    content = f"[{line}]" if name == "a.json" else line
    assert read_bytes(tmp_path / name, content.encode()) == [{"a": None, "b": [None]}]


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_nan_in_a_column_of_numbers_is_null(tmp_path: Path, name: str) -> None:
    WRITERS["data.parquet" if name == "a.parquet" else "saved"](
        tmp_path / name, [{"text": "x", "input": float("nan")}, {"text": "y", "input": 1.5}]
    )
    assert [record["input"] for record in read(tmp_path / name)] == [None, 1.5]


@pytest.mark.parametrize("name", ["data.jsonl", "array.json", "data.csv"])
def test_joined_files_keep_no_byte_order_mark(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, PAIR)
    part = b"\xef\xbb\xbf" + (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(part + b"\n" + part)
    records = [record for _, record in read_source(DataSource(path=str(tmp_path / name)))]
    assert [record for record in records if not isinstance(record, Fault)] == PAIR * 2
    repeated = [record.reason for record in records if isinstance(record, Fault)]
    assert repeated == (["repeats the header"] if name == "data.csv" else [])


@pytest.mark.parametrize("name", ["data.jsonl", "array.json", "data.csv"])
def test_lines_may_end_with_a_carriage_return_alone(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, PAIR)
    content = (tmp_path / name).read_bytes().replace(b"\r\n", b"\r").replace(b"\n", b"\r")
    assert read_bytes(tmp_path / name, content) == PAIR
    if name == "data.jsonl":
        assert [place.rpartition(":")[2] for place in places(tmp_path / name)] == ["1", "2"]


@pytest.mark.parametrize("shard_bytes", [1, 30, 1 << 20])
def test_lines_with_all_three_ends_are_numbered_as_an_editor_does(tmp_path: Path, shard_bytes: int) -> None:
    ends = (b"\r", b"\r\n", b"\n")
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"a": %d}%s' % (n, ends[n % 3]) for n in range(9)))
    source = DataSource(path=str(tmp_path / "a.jsonl"))
    numbered = [pair for shard in scan(0, source, shard_bytes).shards for pair in read_shard(shard, source)]
    assert numbered == [(n + 1, {"a": n}) for n in range(9)]


@pytest.mark.parametrize(
    ("encoding", "name", "text"),
    [
        ("cp932", "CP932", JAPANESE),
        ("euc_jp", "EUC-JP", JAPANESE),
        ("gb18030", "GB18030", "问题,回答\n你们几点开门？,我们早上九点开门。\n你们在哪里？,在北京。\n"),
        ("cp949", "CP949", "질문,답변\n몇 시에 열어요?,아홉 시에 엽니다.\n어디에 있어요?,서울에 있습니다.\n"),
        ("cp1251", "CP1251", "вопрос,ответ\nКогда вы открыты?,С девяти до шести.\n"),
        ("cp1252", "CP1252", "question,réponse\nOù est le café ?,À côté de l'hôtel.\nÇa va ?,Très bien.\n"),
        ("utf-16-le", "UTF-16LE", "question,answer\nWhere is it?,Over there.\n"),
        ("utf-16-be", "UTF-16BE", "question,answer\nWhere is it?,Over there.\n"),
    ],
)
def test_a_file_in_another_encoding_is_one_fault_with_the_command(
    tmp_path: Path, encoding: str, name: str, text: str
) -> None:
    path = tmp_path / "my data.csv"
    fault = only_fault(path, (text + text.partition("\n")[2] * 20).encode(encoding))
    target = tmp_path / "my data.utf8.csv"
    assert f"iconv -f {name} -t UTF-8 '{path}' > '{target}'" in fault.reason


@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv")
def test_the_command_that_is_given_works(tmp_path: Path) -> None:
    fault = only_fault(tmp_path / "a.csv", JAPANESE.encode("cp932"))
    command = fault.reason.split("UTF-8: ")[1]
    subprocess.run(command, shell=True, check=True)
    assert [record["回答"] for record in read(tmp_path / "a.utf8.csv")] == [
        "九時から六時までです。",
        "三日ほどかかります",
    ]


def test_the_fault_shows_how_the_text_reads_in_the_encoding(tmp_path: Path) -> None:
    fault = only_fault(
        tmp_path / "a.jsonl", b"".join(b'{"text": "%s"}\n' % "東京は晴れです".encode("cp932") for _ in range(54))
    )
    assert fault.reason.startswith("is not UTF-8 but probably CP932, in which it reads “")
    assert "東京は晴れです" in fault.reason


def test_a_few_damaged_lines_of_a_utf8_file_are_faults_of_their_own(tmp_path: Path) -> None:
    lines = [f'{{"text": "東京は晴れ {n}"}}'.encode("cp932" if n in (3, 7) else "utf-8") for n in range(60)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert [place.rpartition(":")[2] for place, _ in faults(tmp_path / "a.jsonl")] == ["4", "8"]


# -- what a file holds, whatever its name ------------------------------------------------------------------------------


def notes(path: Path) -> list[str]:
    return [note for _, note in scan(0, DataSource(path=str(path))).notes]


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.jsonl", b'[{"a": 1},\n {"a": 2}]', "holds a JSON array"),
        ("a.jsonl", b'[{"a": 1}, {"a": 2}]', "holds a JSON array"),
        (
            "a.json",
            b'{"version": 1, "data": [{"a": 1}, {"a": 2}]}',
            "'data'; its other fields ('version') are",
        ),
        ("a.jsonl", b'{"data": [\n{"a": 1},\n{"a": 2}]}', "in the list 'data'"),
        ("a.json", b'{\n "a": 1\n}\n{\n "a": 2\n}\n', "has records of several lines each"),
        ("a.csv", b'{"a": 1}\n{"a": 2}\n', "holds JSON lines"),
        ("a.parquet", b'{"a": 1}\n{"a": 2}\n', "holds JSON lines"),
        ("a.txt", b'{"a": 1}\n{"a": 2}\n', "holds JSON lines"),
        ("data", b'[{"a": 1}, {"a": 2}]', "holds a JSON array"),
    ],
)
def test_the_content_decides_how_a_file_is_read(tmp_path: Path, name: str, content: bytes, note: str) -> None:
    assert read_bytes(tmp_path / name, content) == [{"a": 1}, {"a": 2}]
    (found,) = notes(tmp_path / name)
    assert note in found


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_that_of_the_header(tmp_path: Path, name: str, delimiter: str) -> None:
    content = "\n".join(delimiter.join(row) for row in (("q", "a"), ("one", '"two, three; four"')))
    assert read_bytes(tmp_path / name, content.encode()) == [{"q": "one", "a": "two, three; four"}]


def test_parquet_is_known_by_its_content(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.jsonl", RECORDS)
    assert read(tmp_path / "a.jsonl") == RECORDS and notes(tmp_path / "a.jsonl") == [
        "holds Parquet and is read as such"
    ]


def test_one_conversation_is_no_wrapper(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    for content in (json.dumps(record), json.dumps({"turns": record["messages"]})):
        assert read_bytes(tmp_path / "a.jsonl", content.encode()) == [json.loads(content)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_what_its_name_says_has_no_note(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, RECORDS)
    assert notes(tmp_path / name) == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", b"\x1f\x8b\x08rest", "is compressed with gzip. Unpack it: gzip -dk"),
        ("a.csv", b"PK\x03\x04 [Content_Types].xml xl/", "is an Excel workbook"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an Excel workbook"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.json", b"<!DOCTYPE html>\n<html>", "is a web page"),
        ("a.json", b'{"text": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}', "is a table stored by column"),
        ("a.json", b'{"text": ["a", "b"], "other": ["c", "d"]}', "is a table stored by column"),
        ("a.json", b'{"data": [\n {"a": 1},\n {"a": \n]}', "is not JSON"),
    ],
)
def test_a_file_that_holds_no_records_is_one_fault_with_its_cure(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    fault = only_fault(tmp_path / name, content)
    assert why in fault.reason and fault.cure


def test_a_file_of_another_name_that_cannot_be_read_names_its_cure(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04 [Content_Types].xml")
    with pytest.raises(DataError, match=r"a\.xlsx: is an Excel workbook\. In Excel, save it as CSV UTF-8"):
        read(tmp_path / "a.xlsx")


# -- files that cannot be read -----------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "place", "code", "why"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}', ":2", LINE, "is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n{"a": 2}', ":2", LINE, "is a JSON list, not an object with columns"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff\xfe"}\n{"a": 2}', ":3", CODING, "is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\0"}\n{"a": 2}', ":2", LINE, "is not JSON"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"a": 2}', ":2", LINE, "is not JSON"),
        ("a.json", b'[{"a": 1}, "b", {"a": 2}]', ":2", LINE, "is a JSON str, not an object"),
        ("a.json", b'{"a": 1}\n{"a": \n{"a": 2}', ":2", LINE, "is not JSON"),
        ("a.csv", b"a,b\n1,2\n3\n5,6\n", ":3", LINE, "does not have the 2 columns of the header"),
        ("a.csv", b"a,b\n1,2\n3,4,5\n5,6\n", ":3", LINE, "does not have the 2 columns of the header"),
        ("a.csv", b"a,b\n1,2\n3,\xe9\n5,6\n", ":3", CODING, "is not UTF-8"),
    ],
)
def test_a_damaged_record_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, place: str, code: str, why: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    ((where, fault),) = faults(path)
    assert (where, fault.code) == (f"{path}{place}", code) and why in fault.reason
    assert len(places(path)) == 3


@pytest.mark.parametrize(
    ("name", "content", "place", "why"),
    [
        ("a.json", b'[{"a": 1},\n {"a": }]', "", "is not a JSON array of records (Expecting value: line 2"),
        ("a.json", b'[{"a": 1},\n {"a": "\xff"}]', ":2", "is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "", "is UTF-16. Convert it to UTF-8: iconv -f UTF-16"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "", "is UTF-16. Convert it to UTF-8: iconv -f UTF-16"),
        ("a.jsonl", b"\xff\xfe\0\0" + '{"a": 1}\n'.encode("utf-32-le"), "", "is UTF-32. Convert it to UTF-8"),
        ("a.jsonl", b"\0\0\xfe\xff" + '{"a": 1}\n'.encode("utf-32-be"), "", "is UTF-32. Convert it to UTF-8"),
        ("a.csv", b"\xff\xfe\0\0" + "a,b\n1,2\n".encode("utf-32-le"), "", "is UTF-32. Convert it to UTF-8"),
        ("a.parquet", b"PAR1 not really", "", "cannot be read as Parquet"),
        ("a.parquet", b"", "", "cannot be read as Parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, place: str, why: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    ((where, fault),) = faults(path)
    assert (where, fault.code) == (f"{path}{place}", FILE) and why in fault.reason


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_of_another_encoding_is_one_shard(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(('{"a": 1}\n' * 100).encode(encoding))
    assert len(scan(0, DataSource(path=str(path)), shard_bytes=50).shards) == 1


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", b'{"a": "b",\n', '{"a": "b",'),
        ("a.jsonl", b'{"a": "\xff"}\r\n', '{"a": "\\xff"}'),
        ("a.jsonl", '["東京", 1]\n'.encode(), '["東京", 1]'),
        ("a.csv", b"a,b\nalone\n", '["alone", null]'),
        ("a.csv", b"a,b\n1,2,three\n", '["1", "2", ["three"]]'),
        ("a.csv", b"a,b\n1,caf\xe9\n", '["1", "caf\\udce9"]'),
    ],
)
def test_an_unreadable_record_keeps_its_text(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    ((_, fault),) = faults(path)
    assert fault.text == text


def test_an_open_quotation_mark_is_named_where_it_opens(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n3,"open\n5,6\n')
    ((place, fault),) = faults(path)
    assert place == f"{path}:3" and "is not CSV" in fault.reason


def test_a_cut_off_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_parquet(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-20])
    ((place, fault),) = faults(path)
    assert (place, fault.code) == (str(path), FILE) and "It may be cut off" in fault.reason


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("shard_bytes", [1, 40, 1 << 20])
def test_shards_have_every_record_once_in_order(tmp_path: Path, name: str, shard_bytes: int) -> None:
    records = [{"instruction": f"{number} \u2028 é", "output": "x" * (number % 50)} for number in range(200)]
    WRITERS[name](tmp_path / name, records)
    source = DataSource(path=str(tmp_path / name))
    whole = scan(0, source)
    cut = scan(0, source, shard_bytes)
    assert cut.digest == whole.digest and cut.files == whole.files
    assert [record for shard in cut.shards for _, record in read_shard(shard, source)] == records
    numbered = [(s.file, number) for s in cut.shards for number, _ in read_shard(s, source)]
    assert numbered == [(s.file, number) for s in whole.shards for number, _ in read_shard(s, source)]
    if name.endswith("jsonl"):
        assert len(cut.shards) == {1: 200, 40: len(cut.shards), 1 << 20: 1}[shard_bytes] > shard_bytes // (1 << 20) - 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 64), st.sampled_from([3, 7, 1 << 20]))
@example(b"{\n\x80", 1, 3)  # a document that cannot be read is one fault
def test_any_bytes_give_the_same_lines_in_any_shards(content: bytes, shard_bytes: int, block: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK_BYTES", block)
        path = Path(folder, "a.jsonl")
        path.write_bytes(content.replace(b"{}", b"\n"))
        source = DataSource(path=str(path))

        def records_in_shards_of(size: int) -> list[tuple[int, object]]:
            return [pair for shard in scan(0, source, size).shards for pair in read_shard(shard, source)]

        assert records_in_shards_of(shard_bytes) == records_in_shards_of(1 << 30)
        lines = re.split(rb"\r\n|\r|\n", path.read_bytes())
        numbered = records_in_shards_of(shard_bytes)
        if [getattr(record, "code", "") for _, record in numbered] != [FILE]:
            assert [number for number, _ in numbered] == [n for n, line in enumerate(lines, 1) if line.strip()]


def test_records_that_are_not_wanted_are_skipped(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    source = DataSource(path=str(tmp_path / "a.jsonl"))
    (shard,) = scan(0, source).shards
    assert list(read_shard(shard, source, {2}.__contains__)) == [(2, RECORDS[1])]


@pytest.mark.parametrize("name", ["data.jsonl", "array.json", "data.csv", "data.parquet"])
def test_a_file_that_changes_after_its_scan_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, RECORDS)
    source = DataSource(path=str(path))
    (shard,) = scan(0, source).shards
    WRITERS[name](path, [{**record, "output": "another"} for record in RECORDS])
    with pytest.raises(ShardChanged, match="has changed"):
        list(read_shard(shard, source))
    path.unlink()
    with pytest.raises(ShardChanged, match="cannot be read"):
        list(read_shard(shard, source))


def test_the_line_after_a_too_long_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "%s"}\n{"a": 1}\n' % (b"x" * 5000))
    (first, fault), (second, record) = read_source(DataSource(path=str(path)))
    assert (first, second, record) == (f"{path}:1", f"{path}:2", {"a": 1})
    assert isinstance(fault, Fault) and fault.code == LINE and "is longer than" in fault.reason


def test_a_line_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 2_000_000}))
    assert len(read(path)[0]["text"]) == 10_000_000


def test_a_too_large_json_array_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_ARRAY_BYTES", 100)
    write_json(tmp_path / "a.json", RECORDS * 10)
    ((_, fault),) = faults(tmp_path / "a.json")
    assert fault.code == FILE and "Write one record per line" in fault.reason


@pytest.mark.multiprocess
def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"instruction": "q" * 500, "output": "a" * 500}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(300):
            file.write(line * 1000)
    code = (
        "import resource, sys; from ft_service.data.read import *; before = resource.getrusage(0).ru_maxrss\n"
        f"n = sum(1 for _ in read_source(DataSource(path={str(path)!r})))\n"
        "print(n, resource.getrusage(0).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    records, kib = map(int, done.stdout.split())
    assert records == 300_000 and kib < 64 * 1024 < path.stat().st_size // 1024 / 4


def test_a_cut_off_saved_dataset_is_named(tmp_path: Path) -> None:
    write_saved(tmp_path / "saved", RECORDS)
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"{tmp_path / 'saved'}: cannot be loaded as a saved dataset" in refused(tmp_path / "saved")


def test_a_folder_of_splits_asks_for_one_of_them(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "both"))
    assert "has the splits train, test. Name the folder of one of them" in refused(tmp_path / "both")
    assert read(tmp_path / "both" / "train") == RECORDS


def test_a_source_that_is_not_a_data_file_names_the_cure(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "data.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file\. Fix the path"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(
        DataError, match=r"data\.xlsx: files of this type are not supported\. Use one of \.jsonl, \.json"
    ):
        read(tmp_path / "data.xlsx")
    with pytest.raises(DataError, match=r"empty: a folder without \.jsonl, \.json, \.csv, \.parquet files"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match=r"dangling/data\.jsonl: cannot be read \(No such file"):
        read(tmp_path / "dangling")


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("hub:org/set", ("org/set", None, "train")),
        ("hub:org/set:test", ("org/set", None, "test")),
        ("hub:openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
        ("hub:openai/gsm8k:main:", ("openai/gsm8k", "main", "train")),
        ("hub:org/set::test[:10]", ("org/set", None, "test[:10]")),
    ],
)
def test_a_hub_dataset_is_named_with_configuration_and_split(
    path: str, asked: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        seen.append((name, configuration, split))
        return datasets.Dataset.from_list([{"instruction": "What is 2 + 2?", "output": "4"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    records = list(read_source(DataSource(path=path)))
    assert len(records) == 1 and set(seen) == {asked}


def test_a_missing_hub_dataset_names_the_right_form() -> None:
    with pytest.raises(DataError, match=r"'hub:nobody/nothing': cannot be downloaded .*Write hub:OWNER/NAME"):
        scan(0, DataSource(path="hub:nobody/nothing"))


def test_files_that_are_not_read_are_listed(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", RECORDS)
    (tmp_path / "folder" / "loop").symlink_to(tmp_path / "folder")
    scanned = scan(0, DataSource(path=str(tmp_path / "folder")))
    assert [Path(name).name for name in scanned.files] == ["1.jsonl", "2.parquet", "3.csv"]
    assert [Path(name).name for name in scanned.foreign] == ["README.md", "loop"]


def test_what_the_product_wrote_is_not_reported_as_not_read(tmp_path: Path) -> None:
    for folder in ("decisions", "validation", "other"):
        write_folder(tmp_path / folder, RECORDS)
    with pytest.raises(DataError, match=r"Name .*/other or .*/validation\.$"):
        scan(0, DataSource(path=str(tmp_path)))
    write_jsonl(tmp_path / "0-a.jsonl", RECORDS)
    foreign = scan(0, DataSource(path=str(tmp_path))).foreign
    assert [Path(name).name for name in foreign] == ["decisions", "other", "validation"]
    (tmp_path / "decisions" / "left_out.jsonl").touch()
    assert [Path(name).name for name in scan(0, DataSource(path=str(tmp_path))).foreign] == ["other"]


def test_all_missing_files_are_reported_at_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    sources = [DataSource(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl", "b.jsonl")]
    with pytest.raises(DataError, match=r"^\S+b\.jsonl: no such file\..*\n\S+c\.jsonl: no such file\..*$"):
        check_sources(sources)


def test_a_link_to_itself_is_an_error_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: (no such file|cannot be read)"):
        read(tmp_path / "a.jsonl")
