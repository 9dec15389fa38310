"""Reads the turns of a conversation: OpenAI's layout (role, content) or ShareGPT's (from, value), or JSON text of one.

Function calls and their results become turns that Llama 3.1's chat template can write. What it cannot write is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from ft_service.chat.format import ROLES, Message, Role
from ft_service.chat.tools import call_text, to_json
from ft_service.data.bad_record import BadRecord, check_unicode

Conversation = tuple[Message, ...]

EMPTY = ("form.empty-input", "form.empty-output")
TOOL_CALL = "form.tool-call"
IMAGE = "form.image"

_OPENAI_FIELDS = frozenset({"role", "content", "weight", "tool_calls", "function_call", "tool_call_id"})
_SHAREGPT_FIELDS = frozenset({"from", "value", "weight"})
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_FUNCTION_NAME = re.compile(r"[^\x00-\x1f\"\\]+")
"""The template writes the name as it is, so it must need no escapes in JSON."""
_IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})
_IMAGE_MARKS = ("<image>", "<|image|>")


def read_turns(messages: object, functions: object = None) -> Conversation:
    """The turns of a conversation that offers `functions`: a list of JSON objects, or its JSON text, or nothing.

    Raises `BadRecord`, for a turn without content too.
    """
    conversation = read_any_turns(messages, functions)
    with_tools = any(turn.uses_tools for turn in conversation)
    for number, turn in enumerate(conversation, 1):
        if not turn.content.strip() and not (with_tools and turn.role == "tool"):  # a function may return nothing
            raise BadRecord(f"the content of message {number} is empty", EMPTY[turn.role == "assistant"])
    return conversation


def read_any_turns(messages: object, functions: object = None, *, allow_image_marks: bool = False) -> Conversation:
    """Like `read_turns`, but turns may be empty, and texts may have ``<image>`` in them. Raises `BadRecord`."""
    conversation = tuple(_message(number, message) for number, message in enumerate(_listed(messages), 1))
    if not allow_image_marks:
        for number, turn in enumerate(conversation, 1):
            check_images(turn.content, _content_of(number))
    return _with_functions(conversation, read_functions(functions))


def read_functions(functions: object) -> tuple[str, ...]:
    """The functions, each as the template writes it. Raises `BadRecord`."""
    functions = from_json_text(functions) if isinstance(functions, str) and functions.strip() else functions
    if not functions:
        return ()
    if not isinstance(functions, list) or not all(isinstance(function, Mapping) for function in functions):
        raise BadRecord("its tools are not a list of JSON objects, nor the JSON text of one", TOOL_CALL)
    texts = tuple(to_json(function, indent=4) for function in functions)
    for text in texts:
        check_unicode(text, "a tool")
    return texts


def has_system(conversation: Sequence[Message]) -> bool:
    """Whether the first turn is a system turn."""
    return bool(conversation) and conversation[0].role == "system"


def check_images(text: str, name: str) -> None:
    """Raises `BadRecord` for a mark where an image belongs. ``<image>`` with an end tag is XML."""
    if mark := next((mark for mark in _IMAGE_MARKS if mark in text), None):
        if mark == "<image>" and "</image>" in text:
            return
        raise BadRecord(f"{name} refers to an image ({mark!r}); images are not supported yet", IMAGE)


def unread_fields(message: Mapping[Any, Any]) -> frozenset[str]:
    """The fields of a message that are not read. (`name` and `tool_call_id` of a result only repeat its call.)"""
    unread = message.keys() - (_SHAREGPT_FIELDS if _is_sharegpt(message) else _OPENAI_FIELDS)
    return frozenset(unread - {"name"} if unread and message.get("role") == "tool" else unread)


def from_json_text(value: object) -> object:
    """The value of a text that is a JSON array or object; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _listed(messages: object) -> list[Any]:
    turns = from_json_text(messages)
    if isinstance(turns, list) and turns:
        return turns
    reason = "its messages are not a list of at least one message"
    if isinstance(turns, str) and turns.lstrip()[:1] == "[":
        reason += ", nor the JSON text of one. Write the column with json.dumps"
    raise BadRecord(reason)


def _with_functions(conversation: Conversation, functions: tuple[str, ...]) -> Conversation:
    if not functions:
        return conversation
    at = int(has_system(conversation))
    if at == len(conversation) or conversation[at].role != "user":
        raise BadRecord(
            "offers tools, but does not begin with a user turn, into which the chat template writes them", TOOL_CALL
        )
    return (*conversation[:at], replace(conversation[at], functions=functions), *conversation[at + 1 :])


# -- one turn --------------------------------------------------------------------------------------------------------


def _message(number: int, message: object) -> Message:
    if isinstance(message, Mapping) and _is_sharegpt(message):
        role, content, calls = _sharegpt(number, message)
    else:
        role, content, calls = _openai(number, message)
    assert isinstance(message, Mapping)
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise BadRecord(f"message {number} has weight {weight!r} (allowed: 0 and 1)")
    name = _content_of(number)
    is_json = False
    if calls:
        text = _call(number, role, content, calls)
        is_json = True
    elif role == "tool" and _is_json_result(content):
        text = to_json(content)
        is_json = True
    else:
        text = _text(content, name)
    check_unicode(text, name)
    return Message(role, text, weight, is_json)


def _content_of(number: int) -> str:
    return f"the content of message {number}"


def _is_sharegpt(message: Mapping[Any, Any]) -> bool:
    return "from" in message and "role" not in message


def _openai(number: int, message: object) -> tuple[Role, object, object]:
    """Role, content and calls of a message in OpenAI's layout."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise BadRecord(f"message {number} is not an object with role and content")
    calls = from_json_text(message.get("tool_calls"))
    if call := from_json_text(message.get("function_call")):
        calls = [*calls, call] if isinstance(calls, list) else [call]
    if "content" not in message and not calls:
        raise BadRecord(f"message {number} is not an object with role and content")
    role = message["role"]
    if role not in ROLES:
        raise BadRecord(
            f"message {number} has the unknown role {role!r} (known: {', '.join(ROLES)})", "form.unknown-role"
        )
    return cast(Role, role), message.get("content"), calls


def _sharegpt(number: int, message: Mapping[Any, Any]) -> tuple[Role, object, object]:
    """Role, content and calls of a message in ShareGPT's layout."""
    sender = message["from"]
    if "value" not in message:
        raise BadRecord(f"message {number} is not an object with from and value")
    if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise BadRecord(f"message {number} has the unknown role {sender!r} (known: {known})", "form.unknown-role")
    value = message["value"]
    if sender != "function_call":
        return _SHAREGPT_ROLES[sender], value, None
    calls = from_json_text(value)
    if not isinstance(calls, (list, Mapping)):
        raise BadRecord(f"message {number} is a function call, but its value is not JSON", TOOL_CALL)
    return "assistant", None, calls if isinstance(calls, list) else [calls]


def _text(content: object, name: str) -> str:
    """A text, or the joined texts of parts such as ``{"type": "text", "text": ...}``."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise BadRecord(f"{name} is not text")
    for part in content:
        if part.get("type") in _IMAGE_PARTS:
            raise BadRecord(f"{name} has an image; images are not supported yet", IMAGE)
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRecord(f"{name} has a part of type {part.get('type')!r}; only text parts can be trained on")
    return "".join(part["text"] for part in content)


def _is_json_result(content: object) -> bool:
    """Whether the result of a call is a JSON object or array, and not text or text parts."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, Mapping) and part.get("type") in {"text", *_IMAGE_PARTS}]
        return not parts
    return isinstance(content, Mapping)


def _call(number: int, role: Role, content: object, calls: object) -> str:
    """The text of the only call of a turn."""

    def refusal(reason: str) -> BadRecord:
        return BadRecord(f"message {number} {reason}", TOOL_CALL)

    if role != "assistant":
        raise refusal(f"calls a function in a {role} turn; only the assistant can")
    if not isinstance(calls, list):
        raise refusal("has tool_calls that are not a list")
    if len(calls) > 1:
        raise refusal(f"calls {len(calls)} functions; the chat template can write one call in a turn")
    if content is not None and _text(content, f"the content of message {number}").strip():
        raise refusal("has both text and a function call; the chat template can write one of them in a turn")
    function = calls[0].get("function", calls[0]) if isinstance(calls[0], Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise refusal("has a function call without a name")
    name = function["name"]
    if not _FUNCTION_NAME.fullmatch(name):
        raise refusal(f"calls a function whose name the chat template cannot write: {name!r}")
    arguments = from_json_text(function.get("arguments"))
    if not isinstance(arguments, Mapping):
        raise refusal(f"calls {name} with arguments that are neither a JSON object nor the JSON text of one")
    return call_text(name, arguments)
