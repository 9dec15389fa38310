"""Function calls in answers: Llama 3.1 writes ``{"name": ..., "parameters": {...}}`` as its whole answer."""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from serve.inference.wire import ANY_OBJECT, FunctionCall, NamedTool, Tool, ToolCall


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


@dataclass(frozen=True)
class Constraint:
    """What an answer must be, as `GenerationRequest` has it."""

    json_schema: str
    text_allowed: bool
    from_tools: bool
    """Whether nothing but the tools asks for it."""


def answer_constraint(tools: Sequence[Tool], choice: object, response_schema: str | None) -> Constraint | None:
    """What tools, `tool_choice` and `response_format` ask for together; None if the answer is free.

    Where the model may choose, an answer that begins as a call is held to the schemas of strict functions; the others
    then have any parameters. Beside the schema of a response, an answer follows that schema or is a call.
    """
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    is_forced = choice == "required" or isinstance(choice, NamedTool)
    may_call = bool(tools) and response_schema != ANY_OBJECT  # which a call is, too
    if not is_forced and not (may_call and (response_schema or any(tool.function.strict for tool in tools))):
        return Constraint(response_schema, False, False) if response_schema else None
    if is_forced:
        response_schema = None
    makers: list[Callable[[str], object]] = []
    if response_schema is not None:
        makers.append(partial(_moved, json.loads(response_schema)))
    makers += [partial(_call_schema, tool, is_exact=bool(is_forced or tool.function.strict)) for tool in tools]
    text_allowed = not is_forced and response_schema is None
    if len(makers) == 1:
        return Constraint(json.dumps(makers[0]("#")), text_allowed, True)
    any_of = [make(f"#/anyOf/{number}") for number, make in enumerate(makers)]
    return Constraint(json.dumps({"anyOf": any_of}), text_allowed, response_schema is None)


def _call_schema(tool: Tool, place: str, is_exact: bool) -> dict[str, object]:
    """`place` is the JSON pointer at which the schema is nested. Not exact: parameters are any object."""
    given = tool.function.parameters if is_exact else None
    parameters = _moved(given or {"type": "object"}, f"{place}/properties/parameters")
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
