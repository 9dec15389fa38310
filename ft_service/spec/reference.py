"""The settings of a run spec, made from its schema: rows, JSON Schema, Markdown, and an annotated YAML."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_service.spec.schema import RunSpec

SCHEMA_FILE = "run-spec.schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema=../{SCHEMA_FILE}"
"""In the first comment of a spec in jobs/specs: editors with a YAML language server complete and check its settings."""
_SHIPPED_SCHEMA = Path(__file__).resolve().parents[2] / "jobs" / SCHEMA_FILE
REQUIRED = "required"


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted path (`[]` for each entry of a list), its type with bounds, its default, one sentence."""

    path: str
    type: str
    default: str
    description: str


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a run spec."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunSpec.model_json_schema()}


def settings() -> list[Setting]:
    """Every setting of a run spec, in the order of the schema."""
    schema = RunSpec.model_json_schema()
    return list(_settings(schema, schema["$defs"], ""))


def as_markdown() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings of a run spec",
        "",
        "Made from the schema by `ft spec --markdown`: change ft_service/spec/schema.py and not this page. `ft spec`",
        "prints a list, `ft spec --yaml` a file to start from, and `ft spec --json` JSON Schema for editors.",
        "",
        "Write a setting in the spec, or override it after the spec's path: `ft train SPEC train.max_steps=500`.",
        "",
        "Editors read the schema that the comment `# yaml-language-server: $schema=PATH` names, relative to the spec.",
        f"That of the shipped specs, `../{SCHEMA_FILE}`, fits `jobs/specs`; `ft spec --yaml` prints an absolute one.",
        "",
    ]
    section: str | None = None
    for setting in sorted(settings(), key=lambda setting: "." in setting.path):
        head = setting.path.split(".")[0] if "." in setting.path else "Top level"
        if head != section:
            section = head
            lines += [f"## {head}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        default = setting.default if setting.default == REQUIRED else f"`{setting.default}`"
        cells = (f"`{setting.path}`", setting.type, default, setting.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    return text.replace("|\n\n|", "|\n|")


def as_yaml() -> str:
    """A spec to start from: what must be written, and every other setting with its default, commented out."""
    schema = RunSpec.model_json_schema()
    return "\n".join([*_editor_lines(), *_yaml_lines(schema, schema["$defs"])]) + "\n"


def _editor_lines() -> list[str]:
    """Where editors find the schema, wherever the spec is saved: the checkout's file, or one beside the spec."""
    if _SHIPPED_SCHEMA.is_file():
        return [f"# yaml-language-server: $schema={_SHIPPED_SCHEMA}"]
    return [
        f"# For editors: ft spec --json > {SCHEMA_FILE}, in the folder of this file",
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
    ]


def _yaml_lines(schema: dict[str, Any], defs: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, field in schema["properties"].items():
        resolved = _resolved(field, defs)
        is_needed = name in schema.get("required", ()) or bool(resolved.get("required"))
        if "properties" in resolved:
            value = [f"{name}:", *(f"  {line}" for line in _yaml_lines(resolved, defs))]
        elif is_needed and resolved.get("type") == "array":
            entry = _yaml_lines(_resolved(resolved["items"], defs), defs)
            value = [f"{name}:", *(f"    {line}" for line in entry)]
            first = next(index for index, line in enumerate(value[1:], 1) if not line.lstrip().startswith("#"))
            value[first] = value[first].replace("    ", "  - ", 1)
        else:
            value = [f"{name}: {_EXAMPLES[name] if is_needed else _default(field)}"]
        lines.append(f"# {field.get('description') or resolved.get('description')}")
        # Without `# ` at the start of its lines, a section that is left out is one that says its defaults.
        lines += value if is_needed else [_commented(line, resolved) for line in value]
    return lines


def _commented(line: str, section: dict[str, Any]) -> str:
    name = line.strip().removeprefix("# ").partition(":")[0]
    if name in section.get("properties", ()):
        line = line.replace("# ", "", 1)
    return f"# {line}"


_EXAMPLES = {
    "name": "my-adapter",
    "base": "meta-llama/Llama-3.1-8B-Instruct",
    "path": "data/train.jsonl",
    "storage": "/mnt/ft/storage",
}


def _settings(schema: dict[str, Any], defs: dict[str, Any], prefix: str) -> Iterator[Setting]:
    required = set(schema.get("required", ()))
    for name, field in schema["properties"].items():
        path = f"{prefix}{name}"
        resolved = _resolved(field, defs)
        if "properties" in resolved:
            yield from _settings(resolved, defs, f"{path}.")
            continue
        default = REQUIRED if name in required else _default(field)
        yield Setting(path, _type(field, defs), default, field.get("description", ""))
        for part, step in _parts(field, defs):
            yield from _settings(part, defs, f"{path}{step}.")


def _parts(field: dict[str, Any], defs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The sections that a setting may hold, and how their paths begin. Sources are described once, under `train`."""
    for choice in field.get("anyOf", field.get("oneOf", [field])):
        resolved = _resolved(choice, defs)
        if "oneOf" in resolved:
            yield from _parts(resolved, defs)
        elif "properties" in resolved:
            yield resolved, ""
        elif resolved.get("type") == "array" and field.get("description", "").startswith("Training sources"):
            entry = _resolved(resolved["items"], defs)
            if "properties" in entry:
                yield entry, "[]"


def _resolved(field: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    reference = field.get("$ref")
    return defs[reference.rpartition("/")[2]] if reference else field


def _type(field: dict[str, Any], defs: dict[str, Any]) -> str:
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(choice, defs) for choice in choices))
    resolved = _resolved(field, defs)
    if "const" in resolved:
        return _text(resolved["const"])
    if "enum" in resolved:
        return ", ".join(_text(value) for value in resolved["enum"])
    if "properties" in resolved:
        return "{" + ", ".join(resolved["properties"]) + "}"
    kind = resolved.get("type", "")
    if kind == "array":
        return f"list of {_type(resolved['items'], defs)}"
    if kind == "object":
        return "names and texts"
    name = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false"}.get(kind, kind)
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {resolved[key]}" for key, sign in signs.items() if key in resolved]
    return f"{name} {' and '.join(bounds)}".strip()


def _default(field: dict[str, Any]) -> str:
    """Of lists and mappings the schema has no default: they are empty."""
    empty = {"array": "[]", "object": "{}"}.get(field.get("type", ""), "null")
    return _text(field["default"]) if "default" in field else empty


def _text(value: object) -> str:
    """As YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)
