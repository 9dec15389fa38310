"""Reading a RunSpec from YAML: overrides, validation, and every problem reported at once."""

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ft_service.errors import Problem, SpecError
from ft_service.spec.rules import contradictions
from ft_service.spec.schema import MethodSpec, RunSpec


def load_run_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a run spec from YAML, apply dotted overrides such as ``train.max_steps=10``, and validate it.

    Raises `SpecError` with every problem found: unreadable YAML, unknown keys, wrong types, values out of range, and
    contradictions between settings.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            [Problem("SPEC", str(path), f"cannot be read ({error})", "Pass the path of a YAML file.")]
        ) from None
    return parse_run_spec(text, overrides, where=str(path))


def parse_run_spec(text: str, overrides: Sequence[str] = (), where: str = "run spec") -> RunSpec:
    """Like `load_run_spec`, from YAML text; `where` names it in errors."""
    try:
        document = yaml.load(text, Loader=_SpecLoader)
    except yaml.YAMLError as error:
        problem = Problem("SPEC", where, f"is not valid YAML ({' '.join(str(error).split())})", "Fix that line.")
        raise SpecError([problem], where) from None
    if not isinstance(document, dict):
        problem = Problem("SPEC", where, "is not a mapping of settings", "Start from jobs/specs/lora.yaml.")
        raise SpecError([problem], where)
    _leave_adapter_settings_to_overrides(document, overrides)
    override_problems = [_apply_override(document, override) for override in overrides]
    problems = [problem for problem in override_problems if problem is not None]
    try:
        spec = RunSpec.model_validate(document)
    except ValidationError as error:
        problems += problems_of(error, document)
        # Contradictions among the valid settings are reported too, so that one round of fixes is enough.
        try:
            spec = RunSpec.model_validate(_without(document, error))
        except ValidationError:
            raise SpecError(problems, where) from None
    problems += contradictions(spec)
    if problems:
        raise InvalidSpecError(problems, where, spec)
    return spec


def settings_in(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a spec as they are written, with the overrides, valid or not; {} if the file cannot be read."""
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_SpecLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(document, dict):
        return {}
    for override in overrides:
        _apply_override(document, override)
    return document


class InvalidSpecError(SpecError):
    """A spec whose valid settings can be looked at all the same, so that one round of fixes is enough."""

    def __init__(self, problems: Sequence[Problem], where: str, valid: RunSpec) -> None:
        super().__init__(problems, where)
        self.args = (problems, where, valid)
        self.valid = valid


def dump_run_spec(spec: RunSpec) -> str:
    """The spec as YAML, with only the settings that its author set."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)


class _SpecLoader(yaml.SafeLoader):
    """Reads ``2e-4`` as a number, which YAML 1.1 reads as text, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        duplicates = {key for key in keys if keys.count(key) > 1}
        if duplicates:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate keys: {', '.join(sorted(duplicates))}", node.start_mark
            )
        return super().construct_mapping(node, deep)


_SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


_WAIVE = "data.waive."  # the keys of this section contain dots


def _apply_override(document: dict[str, Any], override: str) -> Problem | None:
    setting, equals, text = override.partition("=")
    if not equals or not setting:
        return Problem(
            setting or "override", override, "is not of the form setting=value", "Write for example train.max_steps=10."
        )
    try:
        value = _override_value(text)
    except yaml.YAMLError:
        return Problem(setting, text, "is not a valid YAML value", "Quote it.")
    *parents, last = setting.split(".", 2 if setting.startswith(_WAIVE) else -1)
    node: Any = document
    for depth, parent in enumerate(parents):
        node = _child(node, parent)
        if not isinstance(node, dict | list):
            return Problem(
                setting, text, f"cannot be set: {'.'.join(parents[: depth + 1])!r} is not a section", "Check the name."
            )
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return Problem(setting, text, "is not an item of the list", f"Use a number from 0 to {len(node) - 1}.")
        node[int(last)] = value
    elif value is None and last in node and not _may_be_null(parents, last):
        del node[last]
    elif value is None and _is_setting(parents, last) and not _may_be_null(parents, last):
        pass  # it is at its default already
    else:
        node[last] = value
    return None


def _field_at(parents: Sequence[str], last: str) -> FieldInfo | None:
    section, _ = _field_of([int(key) if key.isdigit() else key for key in parents])
    return section.model_fields.get(last) if section else None


def _is_setting(parents: Sequence[str], last: str) -> bool:
    return _field_at(parents, last) is not None


def _may_be_null(parents: Sequence[str], last: str) -> bool:
    """Whether null is a value of this setting: ``checkpoint.every_steps: null`` is not the same as its default."""
    field = _field_at(parents, last)
    return field is not None and type(None) in get_args(field.annotation)


def _override_value(text: str) -> Any:
    """The value after ``setting=``. YAML would end it at `` #``, but nobody writes comments on a command line."""
    node = yaml.compose(text, Loader=_SpecLoader)
    if node is None and text.strip():
        return text.strip()  # nothing but a "comment"
    if node is not None and text[node.end_mark.index :].strip():
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            return text.strip()
        raise yaml.YAMLError("text after the value")
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and " #" in text:
        raise yaml.YAMLError("a comment, or part of the value")
    return yaml.load(text, Loader=_SpecLoader)


def _leave_adapter_settings_to_overrides(document: dict[str, Any], overrides: Sequence[str]) -> None:
    """With the override ``method.type=full``, drop the file's adapter settings, which have no meaning then.

    Adapter settings among the overrides themselves stay, and are refused.
    """
    method = document.get("method")
    if "method.type=full" in overrides and isinstance(method, dict):
        document["method"] = {name: value for name, value in method.items() if name not in MethodSpec.model_fields}


def _child(node: Any, key: str) -> Any:
    if isinstance(node, list):
        return node[int(key)] if key.isdigit() and int(key) < len(node) else None
    if node.get(key) is None:
        node[key] = {}
    return node[key]


_MESSAGES = {
    "missing": "is missing",
    "extra_forbidden": "is not a setting",
}


def _setting_path(item: Any, document: Any) -> tuple[list[str | int], Any]:
    """The keys that lead to an error, and the value there. Pydantic's own path also contains union members."""
    keys: list[str | int] = []
    node = document
    for index, key in enumerate(location := item["loc"]):
        if (isinstance(node, dict) and key in node) or (
            isinstance(node, list) and isinstance(key, int) and key < len(node)
        ):
            node = node[key]
        elif item["type"] == "missing" and index == len(location) - 1:
            node = None
        else:
            continue
        keys.append(key)
    return keys, node


def _field_of(keys: Sequence[str | int]) -> tuple[type[BaseModel] | None, str]:
    """The section that contains the setting, and the setting's description in the schema ('' if it has none)."""
    section: type[BaseModel] | None = RunSpec
    description = ""
    for key in keys:
        if isinstance(key, int):
            continue
        field = section.model_fields.get(key) if section else None
        if field is None:
            return section, ""
        description = field.description or ""
        section = _section_in(field.annotation)
    return section, description


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (section := _section_in(inner)) is not None:
            return section
    return None


def problems_of(error: ValidationError, document: dict[str, Any]) -> list[Problem]:
    """Pydantic's errors as problems, one for each setting."""
    by_setting: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        keys, value = _setting_path(item, document)
        setting = ".".join(str(key) for key in keys) or "SPEC"
        message = item["msg"].removeprefix("Value error, ")
        message = _MESSAGES.get(item["type"], message[:1].lower() + message[1:])
        if item["type"] == "extra_forbidden":
            section, _ = _field_of(keys[:-1])
            known = list(section.model_fields) if section else []
            close = difflib.get_close_matches(str(keys[-1]), known, n=1)
            fix = f"Did you mean {close[0]}?" if close else f"Known settings: {', '.join(known)}."
        else:
            _, description = _field_of(keys)
            fix = description or "Fix or remove it."
        if setting in by_setting:  # every member of a union reports an error: keep one line per setting
            earlier = by_setting[setting]
            message = f"{earlier.message}; or {message}"
            fix = earlier.fix
        by_setting[setting] = Problem(setting, value, message, fix)
    return list(by_setting.values())


def _without(document: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """A copy of the document without the settings that `error` names, and with placeholders for required ones."""
    pruned = copy.deepcopy(document)
    for item in error.errors(include_url=False):
        keys, _ = _setting_path(item, pruned)
        node: Any = pruned
        for key in keys[:-1]:
            node = node[key]
        if keys and isinstance(node, dict):
            node.pop(keys[-1], None)
    return {"name": "unnamed", "storage": "unnamed", **pruned}
