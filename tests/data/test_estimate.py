"""Estimates for plans without the base's tokenizer."""

import importlib.util
import json
from pathlib import Path

import jinja2
import pytest

from ft_service.data.estimate import BYTES_PER_TOKEN, estimate_dataset
from ft_service.spec.load import parse_run_spec

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather. " * 40, "parameters": {}}}
CALL = {"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": {"city": "Tokyo"}}}
MESSAGES = [
    {"role": "user", "content": "What is the weather in Tokyo?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "22 degrees, sunny. " * 20, "tool_call_id": "1"},
    {"role": "assistant", "content": "It is 22 degrees and sunny."},
]


def stock_text() -> str:
    """The conversation as Llama 3.1's stock template writes it; TRL keeps that among its own."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    template = (Path(spec.origin).parent / "chat_templates/llama3_1.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    rendered = environment.from_string(template)
    return rendered.render(messages=MESSAGES, tools=[TOOL], bos_token="", add_generation_prompt=False)


def test_an_estimate_counts_what_a_conversation_with_tools_writes(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES, "tools": [TOOL]}) + "\n")
    spec = parse_run_spec(
        f"{{name: t, model: {{base: b}}, data: {{train: [{{path: {file}, format: chat}}]}}, storage: {tmp_path}}}"
    )
    facts = estimate_dataset(spec)
    # The control tokens are longer in the text than the tokens that stand for them.
    assert facts.tokens == pytest.approx(len(stock_text().encode()) / BYTES_PER_TOKEN, rel=0.15)
