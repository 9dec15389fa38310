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
    if len(tools) == 1:
        return json.dumps(_call_schema(tools[0], "#"))
    return json.dumps({"anyOf": [_call_schema(tool, f"#/anyOf/{number}") for number, tool in enumerate(tools)]})


def _call_schema(tool: Tool, place: str) -> dict[str, object]:
    """`place` is the JSON pointer at which the schema is nested."""
    parameters = _moved(tool.function.parameters or {"type": "object"}, f"{place}/properties/parameters")
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "parameters": parameters,
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


_REFERENCES = ("$ref", "$dynamicRef")
_VALUES = frozenset({"const", "enum", "default", "example", "examples"})
"""Keywords of JSON Schema that hold values, which may look like schemas."""
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value is an object of schemas, by names that are no keywords."""


def _moved(schema: object, place: str) -> object:
    """The schema with its local references (``#/$defs/A``) as they read once it is nested at `place`."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict) or "$id" in schema:  # a schema with an id is the root of its own references
        return schema
    moved: dict[str, object] = {}
    for keyword, value in schema.items():
        if keyword in _REFERENCES and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[keyword] = place + value[1:]
        elif keyword in _NAMED_SCHEMAS and isinstance(value, dict):
            moved[keyword] = {name: _moved(item, place) for name, item in value.items()}
        else:
            moved[keyword] = value if keyword in _VALUES else _moved(value, place)
    return moved
