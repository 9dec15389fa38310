"""The check of a training file: every error with line, field and code; what passes can be trained on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ft_service.chat.format import ChatFormat
from ft_service.data.convert import convert
from ft_service.model.base import load_tokenizer
from ft_service.spec.schema import DataSource
from serve.fine_tuning import validation
from serve.fine_tuning.file_checks import tokenizers_of
from serve.fine_tuning.validation import Checked, NamedTokenizer, check_file, read_example
from tests.worlds import SMALL, made_up_texts, write_base

USER = {"role": "user", "content": "Which?"}
ANSWER = {"role": "assistant", "content": "This one."}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": '{"up": true}'}}]}
RESULT = {"role": "tool", "content": "", "tool_call_id": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, made_up_texts(20), 600, SMALL)
    return folder


def check(
    folder: Path, lines: list[Any] | bytes, min_examples: int = 1, tokenizers: tuple[NamedTokenizer, ...] = ()
) -> Checked:
    """Check a file of these lines: objects, or texts as they are."""
    texts = [] if isinstance(lines, bytes) else [one if isinstance(one, str) else json.dumps(one) for one in lines]
    content = lines if isinstance(lines, bytes) else "".join(f"{text}\n" for text in texts).encode()
    file = folder / hashlib.sha256(content).hexdigest()
    file.write_bytes(content)
    return check_file(file, file.name, len(content), tokenizers, min_examples)


def found(checked: Checked) -> list[tuple[int | None, str | None, str]]:
    return [(one.line, one.field, one.code) for one in checked.listed]


def example(*messages: object, **others: object) -> dict[str, Any]:
    return {"messages": list(messages), **others}


@pytest.mark.parametrize(
    ("record", "errors"),
    [
        (example(USER, ANSWER), []),
        (example({"role": "system", "content": "Be brief."}, USER, {**ANSWER, "weight": 0}, USER, ANSWER), []),
        (example(USER, CALL, RESULT, ANSWER, tools=[{"type": "function", "function": {"name": "look"}}]), []),
        (example(USER, {**ANSWER, "refusal": None, "name": "helper"}), []),
        (example({"role": "user", "content": [{"type": "text", "text": "Which?"}]}, ANSWER), []),
        ({}, [("messages", "missing_messages_list")]),
        (example(), [("messages", "missing_messages_list")]),
        ({"messages": "Hello"}, [("messages", "missing_messages_list")]),
        ({"prompt": "a", "completion": "b"}, [("messages", "missing_messages_list")]),
        (example("Hello", ANSWER), [("messages[0]", "data_type")]),
        (example({"content": "Which?"}, ANSWER), [("messages[0].role", "message_missing_key")]),
        (example({"role": "user"}, ANSWER), [("messages[0].content", "message_missing_key")]),
        (example({**USER, "colour": "red"}, ANSWER), [("messages[0].colour", "message_unrecognized_key")]),
        (example({**USER, "role": "human"}, ANSWER), [("messages[0].role", "unrecognized_role")]),
        (example({**USER, "role": ["user"]}, ANSWER), [("messages[0].role", "unrecognized_role")]),
        (example({**USER, "content": ""}, ANSWER), [("messages[0].content", "missing_content")]),
        (example(USER, {**ANSWER, "content": None}), [("messages[1].content", "missing_content")]),
        (example({**USER, "content": 7}, ANSWER), [("messages[0]", "invalid_message")]),
        (example(USER), [("messages", "example_missing_assistant_message")]),
        (example(USER, {**ANSWER, "weight": 0}), [("messages", "example_missing_assistant_message")]),
        (example(USER, {**ANSWER, "weight": 2}), [("messages[1].weight", "invalid_weight")]),
        (example(USER, {**ANSWER, "weight": True}), [("messages[1].weight", "invalid_weight")]),
        (example(USER, ANSWER, tools="none"), [("tools", "invalid_tools")]),
        (example(USER, {**CALL, "content": "Look."}), [("messages[1]", "invalid_tool_call")]),
        (example({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), [("messages[0]", "unsupported_image")]),
        (example({**USER, "content": "half \ud83d"}, ANSWER), [("messages[0]", "invalid_encoding")]),
        (
            example({"role": "boss"}, 7, {**ANSWER, "weight": -1}, {**CALL, "content": "Look."}),
            [
                ("messages[0].role", "unrecognized_role"),
                ("messages[0].content", "message_missing_key"),
                ("messages[1]", "data_type"),
                ("messages[2].weight", "invalid_weight"),
                ("messages[3]", "invalid_tool_call"),
            ],
        ),
    ],
)
def test_every_error_of_an_example_is_found(record, errors):
    conversation, problems = read_example(record)
    assert [(where, code) for where, code, _ in problems] == errors
    if conversation is not None:
        assert conversation == convert(record, DataSource(path="x", format="chat"))
    assert (conversation is None) == bool(errors)


def test_every_line_is_reported_and_valid_ones_are_counted(tmp_path):
    good = example(USER, ANSWER)
    lines = [good, "{broken", '["a list"]', "", good, '{"messages": 1, "messages": 2}', example(USER), good]
    checked = check(tmp_path, lines)
    assert (checked.examples, checked.valid_examples) == (7, 3)
    assert found(checked) == [
        (2, None, "invalid_json"),
        (3, None, "data_type"),
        (6, None, "duplicate_key"),
        (7, "messages", "example_missing_assistant_message"),
    ]
    details = str(checked.details())
    assert details.startswith("4 errors. line 2: The line is not JSON")
    assert details.endswith("and 1 more.")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"PAR1 and so on", "invalid_file_format"),
        (b"\x1f\x8b compressed", "invalid_file_format"),
        ('{"messages": []}\n'.encode("utf-16"), "invalid_file_format"),
        (b'[{"messages": []}]', "invalid_file_format"),
        (b"\n\n", "too_few_examples"),
        (json.dumps(example(USER, ANSWER)).encode() + b"\n\xff\xfe\xfd\n", "invalid_encoding"),
    ],
)
def test_a_file_of_another_kind_is_one_error(tmp_path, content, code):
    checked = check(tmp_path, content)
    assert [one.code for one in checked.listed] == [code]
    assert str(tmp_path) not in str(checked.details())


def test_a_line_of_many_megabytes_is_an_error_and_is_not_parsed(tmp_path):
    long = json.dumps(example(USER, {**ANSWER, "content": "x" * validation.MAX_LINE_BYTES}))
    checked = check(tmp_path, [example(USER, ANSWER), long, example(USER)])
    assert found(checked) == [(2, None, "line_too_long"), (3, "messages", "example_missing_assistant_message")]


def test_too_few_examples_are_an_error_of_the_file(tmp_path):
    assert found(check(tmp_path, [example(USER, ANSWER)] * 9, min_examples=10)) == [(None, None, "too_few_examples")]
    assert found(check(tmp_path, [example(USER, ANSWER)] * 10, min_examples=10)) == []


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path, line_end):
    lines = [json.dumps(example(USER, ANSWER)).encode(), json.dumps(example(USER)).encode()]
    checked = check(tmp_path, b"\xef\xbb\xbf" + line_end.join(lines))
    assert found(checked) == [(2, "messages", "example_missing_assistant_message")]


def test_tokens_are_those_that_are_trained_on_and_one_tokenizer_counts_once(tmp_path, base):
    chat = ChatFormat(load_tokenizer(base))
    tokenizers = tuple(tokenizers_of({"a": base, "b": base}))
    records = [example(USER, ANSWER), example(USER, {**ANSWER, "content": "A longer answer."}, USER, ANSWER)] * 4000
    (counts,) = check(tmp_path, records, tokenizers=tokenizers).counts
    source = DataSource(path="x", format="chat")
    encoded = chat.encode_batch([convert(record, source) for record in records])  # type: ignore[misc]
    assert counts.bases == ("a", "b")
    assert counts.tokens == sum(len(one.input_ids) for one in encoded)
    assert counts.trained_tokens == sum(one.num_loss_tokens for one in encoded)
    assert counts.longest_example == max(len(one.input_ids) for one in encoded)


def test_a_list_of_errors_is_bounded_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "MOST_ERRORS", 5)
    checked = check(tmp_path, ["{broken"] * 12)
    assert (len(checked.listed), checked.num_errors) == (5, 12)


def test_texts_of_errors_are_short_and_can_be_sent(tmp_path):
    key = "\0\ud83d" + "k" * 5000
    checked = check(tmp_path, [example({**USER, key: 1}, ANSWER), example({**USER, "role": "r" * 5000}, ANSWER)])
    assert checked.num_errors == 2
    for one in checked.listed:
        assert len(one.message) < 600 and one.message.isprintable()
        assert one.field is not None and one.field.isprintable() and one.field.encode()
