"""Function calls in answers: Llama 3.1 writes ``{"name": ..., "parameters": {...}}`` as its whole answer."""

import json
import uuid
from collections.abc import Sequence

from serve.inference.wire import FunctionCall, NamedTool, Tool, ToolCall


def parse_call(text: str, tools: Sequence[Tool]) -> ToolCall | None:
    """The call that an answer is; None if it is text, or names a function that was not offered."""
    if not may_become_call(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("parameters", value.get("arguments"))
    offered = {tool.function.name for tool in tools}
    if not isinstance(arguments, dict) or value["name"] not in offered:
        return None
    arguments_text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(
        id=f"call_{uuid.uuid4().hex[:24]}", function=FunctionCall(name=value["name"], arguments=arguments_text)
    )


def may_become_call(text: str) -> bool:
    """Whether an answer that begins like this can still be a call; a stream holds it back as long as it can."""
    start = text.lstrip()
    return not start or start.startswith("{")


def forced_call_schema(tools: Sequence[Tool], choice: object) -> str | None:
    """The JSON schema of a call of the function that `tool_choice` names, or of any; None if the model may choose."""
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    elif choice != "required":
        return None
    calls = [_call_schema(tool) for tool in tools]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


def _call_schema(tool: Tool) -> dict[str, object]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "parameters": tool.function.parameters or {"type": "object"},
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
