"""Cures that follow the cause of a finding, in the words of the interface that is used."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import yaml

from ft_service.data.gate.findings import Finding, Judgement
from ft_service.spec.schema import COLUMNS, DataSource

CONVERT_TO_CHAT = (
    'Convert the text to the chat format: one {"role", "content"} message for each turn, without the template tokens. '
    "Removing the tokens alone would run the turns together."
)
_ROLES = {
    "human": "user",
    "question": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "developer": "system",
}
_REQUIRED = {"alpaca": ("instruction", "output"), "chat": ("messages",), "text": ("text",)}
_PLAIN_NAME = re.compile(r"[^\W\d][\w.-]*")


def record_cure(code: str, raw: Mapping[str, Any], source: DataSource) -> str:
    """What to do about a record that cannot be converted; empty where the cure of the code fits."""
    if code == "form.missing-column":
        return _column_cure(raw, source)
    if code == "form.wrong-type":
        return _chat_cure(raw, source) if source.format == "chat" else _value_cure(raw, source)
    if code == "form.unknown-role":
        return _role_cure(raw, source)
    if code == "form.encoding":
        return "Export the text again: it was cut in the middle of a character."
    return ""


def order_cure(roles: Sequence[str]) -> str:
    """What to do about turns in this order."""
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns:
        return "Add a user turn and an assistant turn."
    if "system" in turns:
        return "Keep one system turn, and put it first."
    if any(earlier == later != "tool" for earlier, later in pairwise(turns)):
        return "Join neighbouring turns of one role."
    if turns[0] != "user":
        return "Begin with a user turn: add it, or remove the turns before the first one."
    if turns[-1] != "assistant":
        return "End with an assistant turn: add the answer, or remove the turns after the last one."
    return ""


def _column_cure(raw: Mapping[str, Any], source: DataSource) -> str:
    """A column whose name differs in case or spaces only is named."""
    names = {str(name).strip().casefold(): str(name) for name in raw}
    found = {}
    for name in _REQUIRED[source.format]:
        column = source.columns.get(name, name)
        other = names.get(column.strip().casefold())
        if column not in raw and other is not None:
            found[name] = other
    if not found:
        return ""
    pairs = ", ".join(f"{name}: {_yaml_name(other)}" for name, other in found.items())
    return f"Set columns: {{{pairs}}} in the source."


def _yaml_name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _value_cure(raw: Mapping[str, Any], source: DataSource) -> str:
    """For a value that is no text, in the formats alpaca and text."""
    columns = [source.columns.get(name, name) for name in COLUMNS if name != "messages"]
    values = {name: raw[name] for name in columns if name in raw and not isinstance(raw[name], str)}
    for name, value in values.items():
        if value is None and name in (source.columns.get("input", "input"), source.columns.get("system", "system")):
            continue
        if value is None:
            return f"Fill {name!r} where it is null, or remove these records."
        if isinstance(value, list) and value and all(isinstance(item, Mapping) and "role" in item for item in value):
            return f"Set format: chat, columns: {{messages: {_yaml_name(name)}}} in the source."
        if isinstance(value, list | Mapping):
            return f"Write {name!r} as one text: join its parts."
        return f"Write {name!r} as text, in quotation marks."
    return ""


def _chat_cure(raw: Mapping[str, Any], source: DataSource) -> str:
    """For messages that are no list of messages with text."""
    name = source.columns.get("messages", "messages")
    messages = raw.get(name)
    if isinstance(messages, str):
        return f"Set format: text, columns: {{text: {_yaml_name(name)}}} in the source, if it is plain text."
    if not isinstance(messages, list) or not messages:
        return f'Write {name!r} as a list of {{"role": ..., "content": ...}} objects.'
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            return 'Write each message as {"role": ..., "content": ...}.'
        if message["content"] is None:
            return "Write the content where it is null, or remove the turn."
        if not isinstance(message["content"], str):
            return "Write the content of each message as one text."
        if message.get("weight") not in (None, 0, 1):
            return "Set the weight of a message to 1 (trained on) or 0 (only read)."
    return ""


def _role_cure(raw: Mapping[str, Any], source: DataSource) -> str:
    messages = raw.get(source.columns.get("messages", "messages"))
    roles = [message.get("role") for message in messages or () if isinstance(message, Mapping)]
    renamed = {role: _ROLES[role.casefold()] for role in roles if isinstance(role, str) and role.casefold() in _ROLES}
    if not renamed:
        return ""
    return f"Rename roles: {', '.join(f'{old!r} to {new!r}' for old, new in renamed.items())}."


# -- words of the command line -----------------------------------------------------------------------------------------

_SETTING = re.compile(r"[Ss]et ((?:format|columns|source|license): .+?) in the source")
_PHRASES = (
    ("Set `source` in the data source:", "Add --source:"),
    ("Set `license` to its SPDX id", "Add --license with its SPDX id"),
    ("in the source's `columns`", "with --column"),
    ("Set its format and columns as for a training source", "Set its format and columns in a spec"),
)


def for_command_line(judgement: Judgement) -> Judgement:
    """The judgement of a data file: its cures name the options of ``ft data``, not the settings of a spec."""
    findings = [_for_command_line(finding) for finding in judgement.findings]
    return judgement.model_copy(update={"findings": findings})


def _for_command_line(finding: Finding) -> Finding:
    places = [place.model_copy(update={"detail": as_options(place.detail)}) for place in finding.places]
    cure = as_options(finding.cure)
    return finding.model_copy(update={"cure": cure, "message": as_options(finding.message), "places": places})


def as_options(text: str) -> str:
    """A sentence that names settings of a source, with the options that do the same."""
    for setting, option in _PHRASES:
        text = text.replace(setting, option)
    return _SETTING.sub(_options, text)


def _options(match: re.Match[str]) -> str:
    try:
        settings = yaml.safe_load(f"{{{match[1]}}}")
    except yaml.YAMLError:
        return match[0]
    options = [f"--{name} {shlex.quote(str(value))}" for name, value in settings.items() if name != "columns"]
    options += [f"--column {shlex.quote(f'{ours}={theirs}')}" for ours, theirs in settings.get("columns", {}).items()]
    return f"Add {' '.join(options)}"
