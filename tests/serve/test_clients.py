"""Programs that people have, unmodified: OpenAI's client of today and of before, and lm-eval."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serve.local_server import local_server
from tests.serve.serving_world import PROMPT, SENTENCE, World, make_world

pytestmark = pytest.mark.multiprocess

EARLIER_CLIENT = Path(sys.prefix) / "openai-1"
"""openai 1.109.1 with all it needs; `make setup` installs it."""
CLIENT_SCRIPT = """
import json, sys, openai, pydantic
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=60)
model = client.models.list().data[0].id
asked = {"model": model, "temperature": 0, "seed": 1}
whole = client.completions.create(prompt=sys.argv[2], max_tokens=200, **asked)
pieces = client.completions.create(prompt=sys.argv[2], max_tokens=200, stream=True, **asked)
chat = [{"role": "user", "content": "Hi"}]
scored = client.chat.completions.create(messages=chat, max_tokens=3, logprobs=True, top_logprobs=2, n=2, **asked)
streamed = list(client.chat.completions.create(
    messages=chat, max_tokens=3, stream=True, stream_options={"include_usage": True}, **asked))
as_json = client.chat.completions.create(messages=chat, max_tokens=60, response_format={
    "type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
        "additionalProperties": False}}}, **asked)
tools = [{"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"up": {"type": "boolean"}}, "required": ["up"], "additionalProperties": False}}}]
called = client.chat.completions.create(messages=chat, max_tokens=60, tools=tools, tool_choice="required", **asked)
class Look(pydantic.BaseModel):
    up: bool
begin = client.post("/tokenize", body={"prompt": "{", "add_special_tokens": False}, cast_to=object)["tokens"]
chosen = client.chat.completions.parse(  # strict, and the model may choose: its wish to begin with { makes it a call
    messages=chat, max_tokens=60, tools=[openai.pydantic_function_tool(Look)], logit_bias={begin[0]: 100}, **asked)
errors = []
for wrong in ({"model": "other"}, {"temperature": 9}, {"extra_body": {"nonsense": 1}}):
    try:
        client.completions.create(prompt="x", **{**asked, **wrong})
    except openai.APIStatusError as error:
        errors.append([type(error).__name__, error.code, error.param])
print(json.dumps({
    "version": openai.__version__,
    "whole": whole.choices[0].text,
    "pieces": "".join(piece.choices[0].text for piece in pieces),
    "tokens": [[token.token, len(token.top_logprobs)] for token in scored.choices[1].logprobs.content],
    "choices": [choice.message.content for choice in scored.choices],
    "streamed": "".join(event.choices[0].delta.content or "" for event in streamed if event.choices),
    "usage": [streamed[-1].usage.completion_tokens, scored.usage.completion_tokens],
    "json": as_json.choices[0].message.content,
    "call": [called.choices[0].finish_reason, called.choices[0].message.tool_calls[0].function.name,
             called.choices[0].message.tool_calls[0].function.arguments],
    "chosen": chosen.choices[0].message.tool_calls[0].function.parsed_arguments.up,
    "errors": errors,
}))
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def url(world) -> Iterator[str]:
    with local_server(world) as address:
        yield address


@pytest.mark.parametrize("folder", [None, EARLIER_CLIENT], ids=["today", "1.109.1"])
def test_openais_client_gets_everything_it_asks_for(url, folder):
    environment = {"PYTHONPATH": str(folder)} if folder else {}
    command = [sys.executable, "-c", CLIENT_SCRIPT, url, PROMPT]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["version"] == ("1.109.1" if folder else openai.__version__)
    assert said["whole"] == said["pieces"] == SENTENCE
    assert said["choices"][0] == said["choices"][1] == said["streamed"]
    assert [top for _, top in said["tokens"]] == [2, 2, 2]
    assert said["usage"] == [3, 6]
    assert set(json.loads(said["json"])) == {"ok"}
    assert said["call"][:2] == ["tool_calls", "look"] and set(json.loads(said["call"][2])) == {"up"}
    assert said["chosen"] in (True, False)
    assert said["errors"] == [
        ["NotFoundError", "model_not_found", "model"],
        ["BadRequestError", "invalid_value", "temperature"],
        ["BadRequestError", "unknown_parameter", "nonsense"],
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A multiple-choice task (log-likelihoods) and one of free answers, of this test's own."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "items.jsonl"
    items = [
        {"question": PROMPT, "choices": [SENTENCE, "something else", "日本"], "gold": 0, "answer": SENTENCE},
        {"question": "the quick", "choices": [" brown fox", " fox the", " x"], "gold": 0, "answer": " brown fox"},
        {"question": "Tell me", "choices": [": ", "?", " the"], "gold": 1, "answer": ":"},
    ]
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    choice = "doc_to_choice: choices\ndoc_to_target: gold\n"
    free = (
        "doc_to_target: answer\ngeneration_kwargs: {until: ['\\n\\n', 'Q:', '。人', 'x', 'y'], max_gen_toks: 40}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (folder / "choice.yaml").write_text(TASK.format(name="ft_choice", data=data, kind="multiple_choice") + choice)
    (folder / "free.yaml").write_text(TASK.format(name="ft_free", data=data, kind="generate_until") + free)
    return folder


def evaluated(tasks: Path, model: str, arguments: dict[str, object]) -> dict[str, list]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["ft_choice", "ft_free"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return results["samples"]


@pytest.mark.slow
def test_lm_eval_measures_over_http_what_it_measures_on_the_weights(world, url, tasks):
    local = evaluated(tasks, "hf", {"pretrained": str(world.base), "device": "cpu", "dtype": "float32"})
    for tokenized in (True, False):
        arguments = {
            "model": "tiny-llama",
            "base_url": f"{url}/completions",
            "tokenizer": str(world.base),
            "tokenized_requests": tokenized,
            "num_concurrent": 4,
        }
        served = evaluated(tasks, "local-completions", arguments)
        for ours, theirs in zip(served["ft_choice"], local["ft_choice"], strict=True):
            for (our_logprob, our_greedy), (logprob, greedy) in zip(
                ours["filtered_resps"], theirs["filtered_resps"], strict=True
            ):
                assert float(our_logprob) == pytest.approx(float(logprob), abs=1e-3)
                assert our_greedy == greedy
        # Cut off within a character, transformers gives half of it, and the server none.
        texts = [one["filtered_resps"] for one in local["ft_free"]]
        expected = [[text.removesuffix("\N{REPLACEMENT CHARACTER}") for text in one] for one in texts]
        assert [one["filtered_resps"] for one in served["ft_free"]] == expected
