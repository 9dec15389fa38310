"""What Llama 3.1's stock chat template writes for functions, calls and results. Pure text, no tokens.

Source: the chat template of meta-llama/Llama-3.1-8B-Instruct; the tests compare every token with it. Meta's reference
code (`llama_models`) differs: it writes `{"type": "function", ...}` calls, ends them with ``<|eom_id|>``, and does not
quote results.
"""

import json
from collections.abc import Sequence

_ENVIRONMENT = "Environment: ipython\n"
_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
"""The template's own default. Today's date would train another text every day."""
_OFFER = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def to_json(value: object, indent: int | None = None) -> str:
    """JSON as transformers' `tojson` filter writes it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def system_text(system: str, offers_functions: bool) -> str:
    """The system turn of a conversation with tools; it is written even if `system` is empty."""
    return (_ENVIRONMENT if offers_functions else "") + _DATES + system.strip()


def offer_text(functions: Sequence[str], question: str) -> str:
    """The user turn that offers functions, each given as JSON with an indent of 4."""
    return _OFFER + "".join(f"{function}\n\n" for function in functions) + question.strip()


def call_text(name: str, arguments: object) -> str:
    """The assistant turn that calls a function. `name` must need no escapes in JSON."""
    return f'{{"name": "{name}", "parameters": {to_json(arguments)}}}'


def _escaped(text: str) -> str:
    return text.replace("\n", "\\n")


WITH_TOOLS_TEMPLATE = (
    "{%- set has = namespace(tools=false) %}"
    "{%- for message in messages %}"
    "{%- if message['tool_calls'] or message['role'] == 'tool' and message['content'] is not string %}"
    "{%- set has.tools = true %}{%- endif %}"
    "{%- endfor %}"
    "{%- if tools or has.tools %}"
    "{%- set system = '' %}{%- set turns = messages %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] | trim %}{%- set turns = messages[1:] %}"
    "{%- endif %}"
    "{%- if tools and (turns | length == 0 or turns[0]['role'] != 'user') %}"
    "{{- raise_exception('Tools are offered in the first user message: begin with one.') }}"
    "{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{%- if tools %}{{- '" + _escaped(_ENVIRONMENT) + "' }}{%- endif %}"
    "{{- '" + _escaped(_DATES) + "' + system + '<|eot_id|>' }}"
    "{%- for message in turns %}"
    "{%- if message['tool_calls'] %}"
    "{%- if message['tool_calls'] | length != 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}"
    "{%- endif %}"
    "{%- set call = message['tool_calls'][0]['function'] %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% generation %}{{- '{\"name\": \"' + call['name'] + '\", \"parameters\": ' + call['arguments'] | tojson"
    " + '}<|eot_id|>' }}{% endgeneration %}"
    "{%- elif message['role'] == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message['content'] | tojson + '<|eot_id|>' }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{%- if tools and loop.first %}"
    "{{- '" + _escaped(_OFFER) + "' }}"
    "{%- for function in tools %}{{- function | tojson(indent=4) + '\\n\\n' }}{%- endfor %}"
    "{%- endif %}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- else %}"
)
"""The start of a Jinja template: conversations with tools, up to an open ``else`` for all others."""
