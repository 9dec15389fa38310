"""Conversations with tools: every token as Llama 3.1's stock chat template gives it, from raw record to ids."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ft_service.chat.format import CHAT_TEMPLATE, ChatFormat, Message
from ft_service.data.convert import BadRecord, convert
from ft_service.data.gate.records import Record
from ft_service.data.gate.signal import check_rendering
from ft_service.spec.schema import DataSource

CHAT = DataSource(path="x", format="chat")
Messages = list[dict[str, Any]]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"name": "now", "description": "The time <now> & 'here'", "parameters": {}}
SYSTEM = {"role": "system", "content": " Be brief. \n"}
USER = {"role": "user", "content": "  Weather in 東京?\n"}
ANSWER = {"role": "assistant", "content": " 22 °C. "}


def call(name: str = "get_weather", arguments: object = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": {"city": "東京"} if arguments is None else arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "id": "1", "function": function}], **fields}


def result(content: object) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "1", "name": "get_weather"}


@pytest.fixture(scope="module")
def llama3_1() -> str:
    """The stock chat template of Llama 3.1, which TRL keeps among its own."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates/llama3_1.jinja").read_text(encoding="utf-8")


def stock_ids(tokenizer: PreTrainedTokenizerFast, template: str, messages: Messages, tools: Any, **more: Any) -> Any:
    encoded = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=True, **more)
    return encoded if more.get("return_assistant_tokens_mask") else encoded["input_ids"]


CONVERSATIONS: dict[str, tuple[Messages, Any]] = {
    "functions, a call, its result and an answer": ([USER, call(), result('{"celsius": 22}'), ANSWER], [WEATHER]),
    "a system turn": ([SYSTEM, USER, call(), result("22"), ANSWER], [WEATHER, TIME]),
    "functions that are not called": ([SYSTEM, USER, ANSWER], [TIME]),
    "a call without functions": ([USER, call(arguments={}), result({"celsius": [22, None, 0.5]}), ANSWER], None),
    "a system turn and a call without functions": ([SYSTEM, USER, call(), result(" 22 \n"), ANSWER], None),
    "a result that is a list": ([USER, call(), result([1, "two", {"three": True}]), ANSWER], [WEATHER]),
    "a result that is empty": ([USER, call(), result(""), ANSWER], [WEATHER]),
    "two calls, one after the other": ([USER, call(), result("a"), call("now", {}), result("b"), ANSWER], [WEATHER]),
    "a call at the end": ([SYSTEM, USER, ANSWER, USER, call()], [WEATHER]),
    "nested arguments": ([USER, call(arguments={"a": {"b": ["c", 1, None, "é\n\"'<&"]}})], [WEATHER]),
}


@pytest.mark.parametrize(("messages", "tools"), CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_a_conversation_with_tools_has_the_stock_templates_ids(
    llama3: PreTrainedTokenizerFast, llama3_1: str, messages: Messages, tools: Any
) -> None:
    chat = ChatFormat(llama3)
    conversation = convert({"messages": messages, "tools": tools}, CHAT)
    assert isinstance(conversation, tuple)
    example = chat.encode(conversation)
    assert example.input_ids == stock_ids(llama3, llama3_1, messages, tools)
    prompt = stock_ids(llama3, llama3_1, messages[:-1], tools, add_generation_prompt=True)
    if len(messages) > 2:
        assert chat.encode_prompt(conversation[:-1]) == prompt
    ours = stock_ids(llama3, CHAT_TEMPLATE, messages, tools, return_assistant_tokens_mask=True)
    assert ours["input_ids"] == example.input_ids
    assert [bool(trained) for trained in ours["assistant_masks"]] == example.loss_mask
    assert list(check_rendering(Record(0, 0, 1, conversation), chat)) == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=8), values, max_size=4)
texts = st.text(max_size=40).filter(lambda text: text.strip() != "")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(system=st.none() | texts, user=texts, arguments=objects, content=st.text(max_size=20) | objects, tool=objects)
def test_any_call_and_result_have_the_stock_templates_ids(
    llama3: PreTrainedTokenizerFast,
    llama3_1: str,
    system: str | None,
    user: str,
    arguments: dict[str, Any],
    content: object,
    tool: dict[str, Any],
) -> None:
    turns = [{"role": "user", "content": user}, call(arguments=arguments), result(content), ANSWER]
    messages = [*([] if system is None else [{"role": "system", "content": system}]), *turns]
    if "<|" in json.dumps([messages, tool]):
        return
    try:
        conversation = convert({"messages": messages, "tools": [tool]}, CHAT)
    except BadRecord as error:
        assert error.code in ("form.image", "form.encoding")
        return
    assert isinstance(conversation, tuple)
    assert ChatFormat(llama3).encode(conversation).input_ids == stock_ids(llama3, llama3_1, messages, [tool])


def trained(llama3: PreTrainedTokenizerFast, messages: Messages) -> list[str]:
    conversation = convert({"messages": messages, "tools": [WEATHER]}, CHAT)
    assert isinstance(conversation, tuple)
    example = ChatFormat(llama3).encode(conversation)
    ids = [token if used else -1 for token, used in zip(example.input_ids, example.loss_mask, strict=True)]
    runs = " ".join(map(str, ids)).replace("-1 ", "|").split("|")
    return [llama3.decode([int(token) for token in run.split()]) for run in runs if run.strip()]


def test_calls_and_answers_are_trained_and_results_are_not(llama3: PreTrainedTokenizerFast) -> None:
    turn = '{"name": "get_weather", "parameters": {"city": "東京"}}<|eot_id|>'
    assert trained(llama3, [USER, call(), result("x"), ANSWER]) == [turn, "22 °C.<|eot_id|>"]
    assert trained(llama3, [USER, call(weight=0), result("x"), ANSWER]) == ["22 °C.<|eot_id|>"]


def test_json_text_stands_for_arguments_calls_and_functions() -> None:
    plain = convert({"messages": [USER, call(), result("x"), ANSWER], "tools": [WEATHER]}, CHAT)
    text_call = call(arguments='{"city": "東京"}')
    in_text = {**text_call, "tool_calls": json.dumps(text_call["tool_calls"])}
    old = {"role": "assistant", "content": None, "function_call": text_call["tool_calls"][0]["function"]}
    for one in (text_call, in_text, old):
        assert convert({"messages": [USER, one, result("x"), ANSWER], "tools": json.dumps([WEATHER])}, CHAT) == plain


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_empty_fields_for_tools_change_nothing(nothing: object) -> None:
    record = {"messages": [{**USER, "tool_calls": nothing}, {**ANSWER, "tool_calls": nothing}], "tools": nothing}
    assert convert(record, CHAT) == (Message("user", USER["content"]), Message("assistant", ANSWER["content"]))


REFUSED = {
    "calls 2 functions": [USER, {**call(), "tool_calls": call()["tool_calls"] * 2}],
    "both text and a function call": [USER, call(content="Let me see.")],
    "calls a function in a user turn": [{**call(), "role": "user"}, ANSWER],
    "tool_calls that are not a list": [USER, {**call(), "tool_calls": "get_weather"}],
    "without a name": [USER, {**call(), "tool_calls": [{"id": "1"}]}],
    "whose name the chat template cannot write": [USER, call('a"b')],
    "arguments that are neither": [USER, call(arguments="city=東京")],
    "does not begin with a user turn": [SYSTEM, ANSWER, USER, ANSWER],
}


@pytest.mark.parametrize(("why", "messages"), REFUSED.items(), ids=REFUSED.keys())
def test_what_the_template_cannot_write_is_refused_by_name(why: str, messages: Messages) -> None:
    with pytest.raises(BadRecord, match=why) as refused:
        convert({"messages": messages, "tools": [WEATHER]}, CHAT)
    assert refused.value.code == "form.tool-call"


def test_functions_that_are_no_json_objects_are_refused() -> None:
    for tools in ("get_weather", ["get_weather"], {"name": "x"}):
        with pytest.raises(BadRecord, match="tools are not a list of JSON objects"):
            convert({"messages": [USER, ANSWER], "tools": tools}, CHAT)


def test_a_template_without_tools_serves_conversations_without_tools(llama3: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(llama3)
    assert chat.agrees_without_tools(chat.template_digest)
    assert chat.agrees_without_tools("0890d77499ecacee8b428e6cb5e2738a7fb241f9f09003051d4776b607ebcf25")
    assert not chat.agrees_without_tools("0" * 64)
