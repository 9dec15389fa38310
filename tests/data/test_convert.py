"""Records as people have them: nothing in them is dropped without a message, and their format is recognised."""

import json
from pathlib import Path
from typing import Any

import pytest

from ft_service.chat.format import Message
from ft_service.data.convert import BadRecord, convert
from ft_service.data.gate import Judgement
from ft_service.data.guess import Guess, complete, guess_of, merged
from ft_service.data.prepare import check_dataset
from ft_service.errors import SpecError
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import DataSource
from tests.data.gate.gate_cases import clean_pairs

Record = dict[str, Any]

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
PLAIN = (Message("user", "u"), Message("assistant", "a"))


def chat(record: Record, **columns: str) -> Any:
    return convert(record, DataSource(path="x", format="chat", columns=columns))


def alpaca(record: Record, **columns: str) -> Any:
    return convert(record, DataSource(path="x", format="alpaca", columns=columns))


def check(folder: Path, records: list[Record], **source: Any) -> Judgement:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    train = {"path": str(file), "source": "made up", "license": "CC0-1.0", **source}
    document = {"name": "case", "model": {"base": "none"}, "data": {"train": [train]}, "storage": "none"}
    out = folder / "out"
    out.mkdir()
    return check_dataset(parse_run_spec(json.dumps(document)), None, out)


# -- system and history ----------------------------------------------------------------------------------------------


def test_a_system_column_becomes_the_first_turn() -> None:
    expected = (Message("system", "be kind"), *PLAIN)
    assert chat({"messages": [USER, ANSWER], "system": " be kind "}) == expected
    assert chat({"messages": [USER, ANSWER], "sys": "be kind"}, system="sys") == expected
    turn = {"role": "system", "content": "be kind"}
    assert chat({"messages": [turn, USER, ANSWER], "system": "be kind"}) == expected
    assert chat({"messages": [USER, ANSWER], "system": None}) == PLAIN


def test_two_different_system_prompts_are_refused() -> None:
    record = {"messages": [{"role": "system", "content": "be rude"}, USER, ANSWER], "system": "be kind"}
    with pytest.raises(BadRecord, match=r"another system prompt in the column 'system'\. Keep one") as refused:
        chat(record)
    assert refused.value.code == "form.two-systems"


@pytest.mark.parametrize("as_text", [False, True])
def test_history_becomes_earlier_turns(as_text: bool) -> None:
    history: Any = [["q1", "a1"], ["q2", "a2"]]
    record = {"instruction": "u", "output": "a", "system": "s", "history": json.dumps(history) if as_text else history}
    earlier = [Message(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    assert alpaca(record) == (Message("system", "s"), *earlier, *PLAIN)
    assert alpaca({"instruction": "u", "output": "a", "past": history}, history="past") == (*earlier, *PLAIN)


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_an_empty_history_counts_as_absent(nothing: object) -> None:
    assert alpaca({"instruction": "u", "output": "a", "history": nothing}) == PLAIN


@pytest.mark.parametrize(
    ("history", "code"),
    [
        ("we talked", "form.wrong-type"),
        (["q", "a"], "form.wrong-type"),
        ([["q"]], "form.wrong-type"),
        ([["q", 1]], "form.wrong-type"),
        ([["", "a"]], "form.empty-input"),
        ([["q", " "]], "form.empty-output"),
        ([["q\ud83d", "a"]], "form.encoding"),
    ],
)
def test_a_history_of_another_shape_is_refused(history: object, code: str) -> None:
    with pytest.raises(BadRecord, match="history") as refused:
        alpaca({"instruction": "u", "output": "a", "history": history})
    assert refused.value.code == code


# -- images ------------------------------------------------------------------------------------------------------------

IMAGE_PART = {"type": "image_url", "image_url": {"url": "a.png"}}
WITH_IMAGES = {
    "a column": ("chat", {"messages": [USER, ANSWER], "images": ["a.png"]}),
    "a column of Alpaca": ("alpaca", {"instruction": "u", "output": "a", "image": "a.png"}),
    "a column beside a text": ("text", {"text": "t", "image": {"bytes": "..."}}),
    "a mark": ("chat", {"messages": [{**USER, "content": "<image>\nWhat is this?"}, ANSWER]}),
    "Llama's mark": ("chat", {"messages": [{**USER, "content": "<|image|>What is this?"}, ANSWER]}),
    "a mark of Alpaca": ("alpaca", {"instruction": "u", "input": "<image>", "output": "a"}),
    "a mark in the history": ("alpaca", {"instruction": "u", "output": "a", "history": [["<image>?", "a"]]}),
    "a mark in the system column": ("chat", {"messages": [USER, ANSWER], "system": "<image>"}),
    "a part": ("chat", {"messages": [{**USER, "content": [{"type": "text", "text": "?"}, IMAGE_PART]}, ANSWER]}),
}


@pytest.mark.parametrize(("format_", "record"), WITH_IMAGES.values(), ids=WITH_IMAGES.keys())
def test_images_are_refused_with_their_own_code(format_: Any, record: Record) -> None:
    with pytest.raises(BadRecord, match="image") as refused:
        convert(record, DataSource(path="x", format=format_))
    assert refused.value.code == "form.image"


def test_no_image_is_not_refused() -> None:
    assert chat({"messages": [USER, ANSWER], "images": [], "image": None}) == PLAIN
    assert chat({"messages": [{**USER, "content": "Read <image><url>x</url></image>"}, ANSWER]})
    assert convert({"text": "<image>"}, DataSource(path="x", format="text")) == "<image>"


# -- columns that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"columns": {"context": "input"}}, r"'context' is not a known column.*\{input: context\}"),
        ({"columns": {"query": "q"}}, r"'query' is not a known column: instruction, input, output"),
        (
            {"format": "chat", "columns": {"input": "context"}},
            r"'input', which the chat format does not read.*messages",
        ),
        ({"columns": {"messages": "turns"}}, r"'messages', which the alpaca format does not read.*instruction"),
        (
            {"format": "text", "columns": {"system": "s"}},
            r"'system', which the text format does not read. It reads text",
        ),
    ],
)
def test_a_key_of_columns_that_cannot_be_used_is_refused(source: Record, why: str) -> None:
    data = {"train": [{"path": "a.jsonl", **source}]}
    document = {"name": "case", "model": {"base": "none"}, "data": data, "storage": "none"}
    with pytest.raises(SpecError, match=why) as refused:
        parse_run_spec(json.dumps(document))
    assert "data.train" in str(refused.value)


@pytest.mark.parametrize("name", ["history", "tools"])
def test_a_named_column_that_no_record_has_is_reported(tmp_path: Path, name: str) -> None:
    records: dict[str, list[Record]] = {
        "history": [{"instruction": question, "output": answer} for question, answer in clean_pairs(20)],
        "tools": [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in clean_pairs(20)
        ],
    }
    format_ = {"history": "alpaca", "tools": "chat"}[name]
    finding = check(tmp_path, records[name], format=format_, columns={name: "past"}).finding("form.absent-column")
    assert finding is not None and "'past'" in finding.places[0].detail


def test_a_column_is_read_under_one_name_only() -> None:
    assert alpaca({"input": "u", "output": "a"}, instruction="input") == PLAIN
    assert alpaca({"instruction": "u", "system": "a"}, output="system") == PLAIN


# -- fields that nothing reads ---------------------------------------------------------------------------------------


def unused(judgement: Judgement) -> dict[str, str]:
    """Field -> share, as the places of the finding say."""
    finding = judgement.finding("form.unused-field")
    if finding is None:
        return {}
    assert finding.severity == "warn" and finding.count == len(finding.places)
    for place in finding.places:
        name = place.detail.split("'")[1]
        share = place.detail.split()[-4]
        assert f"{name} ({share} of the records)" in finding.message
    return {place.detail.split("'")[1]: place.detail.split()[-4] for place in finding.places}


def test_a_finding_lists_every_unused_field_with_its_share(tmp_path: Path) -> None:
    records: list[Record] = [{"instruction": q, "output": a, "id": n} for n, (q, a) in enumerate(clean_pairs(40), 1)]
    for at in range(10):
        records[at]["context"] = "what matters"
    records[0] |= {"note": "once", "empty": "", "nothing": None, "input": "read"}
    assert unused(check(tmp_path, records)) == {"id": "100.0%", "context": "25.0%", "note": "2.5%"}


def test_a_field_of_several_sources_is_named_once(tmp_path: Path) -> None:
    pairs = clean_pairs(40)
    for name, part in (("a", pairs[:30]), ("b", pairs[30:])):
        records = [{"instruction": q, "output": a, "ticket": n} for n, (q, a) in enumerate(part, 1)]
        records[0].pop("ticket")
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    document = {"name": "case", "model": {"base": "none"}, "data": {"train": data}, "storage": "none"}
    (tmp_path / "out").mkdir()
    finding = check_dataset(parse_run_spec(json.dumps(document)), None, tmp_path / "out").finding("form.unused-field")
    assert finding is not None and finding.message == "Not used: ticket (95.0% of the records)."
    assert [place.detail for place in finding.places] == [
        "'ticket', in 96.7% of its records",
        "'ticket', in 90.0% of its records",
    ]


def test_a_mapped_column_is_used_and_the_one_it_replaces_is_not(tmp_path: Path) -> None:
    records: list[Record] = [{"q": q, "output": a, "instruction": "x", "context": "c"} for q, a in clean_pairs(20)]
    judgement = check(tmp_path, records, columns={"instruction": "q", "input": "context"})
    assert unused(judgement) == {"instruction": "100.0%"}


def test_fields_of_messages_are_listed_too(tmp_path: Path) -> None:
    records: list[Record] = [
        {
            "messages": [
                {"role": "user", "content": question, "name": "taro", "tool_calls": None},
                {"role": "assistant", "content": answer, "reasoning_content": "hm", "weight": 1},
            ],
            "system": "s",
            "tools": [],
        }
        for question, answer in clean_pairs(20)
    ]
    shares = dict.fromkeys(("messages.name", "messages.reasoning_content"), "100.0%")
    assert unused(check(tmp_path, records, format="chat")) == shares


def test_records_without_unused_fields_have_no_such_finding(tmp_path: Path) -> None:
    records = [{"instruction": question, "input": "", "output": answer} for question, answer in clean_pairs(20)]
    assert unused(check(tmp_path, records)) == {}


# -- formats that people have ----------------------------------------------------------------------------------------


def test_sharegpt_is_read() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    expected = (Message("system", "s"), *PLAIN)
    assert chat({"conversations": turns}, messages="conversations") == expected
    assert chat({"conversations": turns[1:], "system": "s"}, messages="conversations") == expected
    weighted = [turns[1], {**turns[2], "weight": 0}, turns[1], turns[2]]
    assert [turn.weight for turn in chat({"messages": weighted})] == [None, 0, None, None]


def test_sharegpt_calls_are_read_as_openais() -> None:
    function = {"name": "f", "arguments": {"x": 1}}
    sharegpt = [
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": json.dumps(function)},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a"},
    ]
    openai = [
        USER,
        {"role": "assistant", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    tools = [{"name": "f", "parameters": {}}]
    assert chat({"messages": sharegpt, "tools": json.dumps(tools)}) == chat({"messages": openai, "tools": tools})


@pytest.mark.parametrize(
    ("turn", "why", "code"),
    [
        ({"from": "robot", "value": "x"}, "unknown role 'robot' .known: system, human", "form.unknown-role"),
        ({"from": "human"}, "not an object with from and value", "form.wrong-type"),
        ({"from": "human", "value": ""}, "is empty", "form.empty-input"),
        ({"from": "human", "value": 1}, "is not text", "form.wrong-type"),
        ({"from": "function_call", "value": "f(1)"}, "its value is not JSON", "form.tool-call"),
    ],
)
def test_an_unusable_sharegpt_turn_says_why(turn: Record, why: str, code: str) -> None:
    with pytest.raises(BadRecord, match=why) as refused:
        chat({"messages": [turn, {"from": "gpt", "value": "a"}]})
    assert refused.value.code == code


def test_messages_as_json_text_are_read() -> None:
    assert chat({"messages": json.dumps([USER, ANSWER])}) == PLAIN
    with pytest.raises(BadRecord, match=r"messages are not a list.*json\.dumps"):
        chat({"messages": str([USER, ANSWER])})


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image_url": None}]
    assert chat({"messages": [{**USER, "content": parts}, ANSWER]})[0].content == "one two"
    with pytest.raises(BadRecord, match="part of type 'input_audio'; only text parts"):
        chat({"messages": [{**USER, "content": [{"type": "input_audio"}]}, ANSWER]})


SHAREGPT = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
GUESSES: dict[str, tuple[Record, Guess]] = {
    "ours": ({"instruction": "u", "input": "", "output": "a"}, Guess("alpaca")),
    "messages": ({"id": "1", "messages": [USER, ANSWER]}, Guess("chat")),
    "messages as JSON text": ({"messages": json.dumps([USER, ANSWER])}, Guess("chat")),
    "ShareGPT": ({"conversations": SHAREGPT, "text": "x"}, Guess("chat", {"messages": "conversations"})),
    "a conversation of any name": ({"log": [USER, ANSWER], "note": "x"}, Guess("chat", {"messages": "log"})),
    "prompt and completion": (
        {"prompt": "u", "completion": "a"},
        Guess("alpaca", {"instruction": "prompt", "output": "completion"}),
    ),
    "question and answer": (
        {"question": "u", "answer": "a", "context": "c"},
        Guess("alpaca", {"instruction": "question", "input": "context", "output": "answer"}),
    ),
    "Dolly": (
        {"instruction": "u", "context": "", "response": "a", "category": "x"},
        Guess("alpaca", {"input": "context", "output": "response"}),
    ),
    "capital letters": (
        {"Question": "u", "Answer": "a"},
        Guess("alpaca", {"instruction": "Question", "output": "Answer"}),
    ),
    "Japanese names": ({"質問": "u", "回答": "a"}, Guess("alpaca", {"instruction": "質問", "output": "回答"})),
    "input and output": ({"input": "u", "output": "a"}, Guess("alpaca", {"instruction": "input"})),
    "text": ({"text": "t", "meta": {}}, Guess("text")),
    "content": ({"content": "t"}, Guess("text", {"text": "content"})),
}


@pytest.mark.parametrize(("record", "guess"), GUESSES.values(), ids=GUESSES.keys())
def test_a_format_is_guessed_from_the_content_and_the_guess_works(record: Record, guess: Guess) -> None:
    assert guess_of(record) == guess == complete(record, None, {})
    item = convert(record, DataSource(path="x", format=guess.format, columns=guess.columns))
    assert item in ("t", PLAIN, (Message("user", "u\n\nc"), Message("assistant", "a")))


def test_a_field_that_is_empty_at_first_is_guessed_from_later_records() -> None:
    records: list[Record] = [{"question": "u", "context": None, "answer": "a"}, {"question": "v", "context": "c"}]
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    assert guess_of(merged(records)) == Guess("alpaca", columns)


def test_what_is_given_is_not_guessed() -> None:
    record = {"question": "u", "answer": "a", "text": "t", "messages": [USER, ANSWER]}
    assert complete(record, "text", {}) == Guess("text")
    assert complete(record, "alpaca", {}) == Guess("alpaca", {"instruction": "question", "output": "answer"})
    assert complete(record, None, {"output": "text"}) == Guess("alpaca", {"instruction": "question", "output": "text"})
    assert complete({"number": 1}, None, {}) == Guess("alpaca")


@pytest.mark.parametrize(
    ("format_", "record", "setting"),
    [
        ("alpaca", {"prompt": "u", "completion": "a"}, "columns: {instruction: prompt, output: completion} in"),
        ("alpaca", {"messages": [USER, ANSWER]}, "format: chat in the source"),
        ("alpaca", {"conversations": SHAREGPT}, "format: chat and columns: {messages: conversations} in"),
        ("chat", {"conversations": SHAREGPT}, "Set columns: {messages: conversations} in"),
        ("text", {"content": "t"}, "Set columns: {text: content} in"),
    ],
)
def test_a_record_of_another_format_says_what_to_write(format_: Any, record: Record, setting: str) -> None:
    with pytest.raises(BadRecord) as refused:
        convert(record, DataSource(path="x", format=format_))
    assert setting in str(refused.value) and refused.value.code == "form.missing-column"


@pytest.mark.parametrize("format", ["alpaca", "chat"])
def test_a_conversation_in_two_columns_says_how_to_join_them(format: Any) -> None:
    turns = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    with pytest.raises(BadRecord, match=r"two columns.*jq -c '\{messages: \(\.prompt \+ \.completion\)\}"):
        convert(turns, DataSource(path="x", format=format))
