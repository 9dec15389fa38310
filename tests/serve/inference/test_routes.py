"""What the routes promise, over an engine that says what the test tells it; neither Ray nor a model is needed."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import _DIGESTS_WITHOUT_TOOLS, ChatFormat, Message
from ft_service.errors import ServingError
from ft_service.model.scratch import train_tokenizer
from ft_service.registry.registry import BaseModelRef, Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.engines.engine import GenerationChunk, GenerationRequest
from serve.inference.bases import ServedBase
from serve.inference.models import ServedModels
from serve.settings import ServeSettings

CONTEXT = 256
FINGERPRINT = "ab" * 32
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "tiny", "prompt": [5, 6, 7]}
Call = Callable[..., httpx.Response]


class ScriptedEngine:
    """Answers every request with the chunks given, or fails after them."""

    def __init__(self, *chunks: GenerationChunk, failure: Exception | None = None) -> None:
        self.chunks = chunks
        self.failure = failure
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.requests.append(request)
        for chunk in self.chunks:
            yield chunk
        if self.failure:
            raise self.failure


HELLO = (
    GenerationChunk("Hel", (5,)),
    GenerationChunk("", (6,)),
    GenerationChunk("lo", (7,)),
    GenerationChunk("", (1,), "stop"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> ServedBase:
    return served_base(tmp_path_factory.mktemp("base"), train_tokenizer(["hello world"], 280))


def served_base(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ServedBase:
    tokenizer.save_pretrained(folder)
    return ServedBase(
        ref=BaseModelRef(id="hub/Tiny", revision=None, short_name="tiny", fingerprint=FINGERPRINT),
        folder=folder,
        context_length=CONTEXT,
        vocab_size=len(tokenizer),
        end_ids=frozenset({1}),
        precision="bf16",
    )


@pytest.fixture
def call(base, tmp_path) -> Call:
    """Sends one request to an application over `engine`."""
    return partial(send, base=base, storage=tmp_path)


def send(
    engine: ScriptedEngine,
    path: str,
    body: object = None,
    *,
    base: ServedBase,
    storage: Path,
    api_key: str | None = None,
    headers: dict[str, str] | None = None,
    client: str = "127.0.0.1",
    raw: bytes | None = None,
    **settings: object,
) -> httpx.Response:
    models = ServedModels(Registry(Storage(str(storage))), [base])
    api = create_api(models, {"tiny": engine}, ServeSettings(storage=str(storage), api_key=api_key, **settings))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            if raw is not None:
                given = {"content-type": "application/json", **(headers or {})}
                return await http.post(path, content=raw, headers=given)
            method = "GET" if body is None else "POST"
            return await http.request(method, path, json=body, headers=headers)

    return asyncio.run(ask())


def events_of(response: httpx.Response) -> list[dict]:
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_chat_answer_has_every_field_the_stock_client_reads(call):
    engine = ScriptedEngine(*HELLO)
    reply = call(engine, "/v1/chat/completions", CHAT).json()
    prompt_ids = ChatFormat(engine.tokenizer).encode_prompt([Message(role="user", content="Hi")])
    assert engine.requests[0].prompt_ids == prompt_ids
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "tiny"
    assert reply["system_fingerprint"] == "base:abababab-adapter:none"
    assert reply["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
        }
    ]
    count = len(prompt_ids)
    assert reply["usage"] == {"prompt_tokens": count, "completion_tokens": 4, "total_tokens": count + 4}


def test_a_streamed_chat_has_role_reason_usage_and_done(call):
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    response = call(ScriptedEngine(*HELLO), "/v1/chat/completions", body)
    *events, last = events_of(response)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in [*events, last]}) == 1
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4


def test_a_stream_has_usage_only_on_request(call):
    response = call(ScriptedEngine(*HELLO), "/v1/completions", {**COMPLETION, "stream": True})
    assert all("usage" not in event for event in events_of(response))
    assert "".join(event["choices"][0]["text"] for event in events_of(response)) == "Hello"


@pytest.mark.parametrize("prompt", [["hello", "world", "hello world"], [[5, 6], [7], [8, 9, 10]]])
def test_every_prompt_of_a_list_gets_its_own_choice(call, prompt):
    engine = ScriptedEngine(*HELLO)
    reply = call(engine, "/v1/completions", {"model": "tiny", "prompt": prompt}).json()
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [(i, "Hello") for i in range(3)]
    assert reply["usage"]["prompt_tokens"] == sum(len(request.prompt_ids) for request in engine.requests)
    assert reply["usage"]["completion_tokens"] == 12


def test_parameters_reach_the_engine(call):
    engine = ScriptedEngine(*HELLO)
    parameters = {"temperature": 0.5, "top_p": 0.25, "seed": 7, "stop": ["a", "b"], "max_completion_tokens": 9}
    assert call(engine, "/v1/chat/completions", {**CHAT, **parameters}).status_code == 200
    request = engine.requests[0]
    assert (request.temperature, request.top_p, request.seed) == (0.5, 0.25, 7)
    assert (request.stop, request.max_tokens) == (("a", "b"), 9)


def test_temperature_zero_is_not_the_default(call):
    engine = ScriptedEngine(*HELLO)
    call(engine, "/v1/completions", {**COMPLETION, "temperature": 0, "top_p": 0})
    assert (engine.requests[0].temperature, engine.requests[0].top_p) == (0.0, 0.0)


def test_default_max_tokens_of_chat_and_completion(call):
    engine = ScriptedEngine(*HELLO)
    call(engine, "/v1/chat/completions", CHAT)
    call(engine, "/v1/completions", COMPLETION)
    chat, completion = engine.requests
    assert chat.max_tokens == CONTEXT - len(chat.prompt_ids)
    assert completion.max_tokens == 16


def test_null_means_the_default_as_clients_send_it(call):
    engine = ScriptedEngine(*HELLO)
    nulls = dict.fromkeys(["temperature", "top_p", "seed", "stop", "stream", "max_tokens", "n", "tools", "logprobs"])
    assert call(engine, "/v1/chat/completions", {**CHAT, **nulls}).status_code == 200


def test_a_printed_answer_may_be_sent_back(call):
    engine = ScriptedEngine(*HELLO)
    earlier = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    turns = [{"role": "developer", "content": "Be"}, parts, earlier, {"role": "user", "content": "Bye"}]
    assert call(engine, "/v1/chat/completions", {"model": "tiny", "messages": turns}).status_code == 200
    expected = [("system", "Be"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [Message(role=role, content=content) for role, content in expected]
    assert engine.requests[0].prompt_ids == ChatFormat(engine.tokenizer).encode_prompt(messages)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"top_k": 5}, "top_k", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"max_tokens": CONTEXT}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages", "context_length_exceeded"),
    ],
)
def test_unsupported_chat_parameters_are_rejected_by_name(call, changes, param, code):
    engine = ScriptedEngine(*HELLO)
    response = call(engine, "/v1/chat/completions", {**CHAT, **changes})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),  # asks for the chosen token's, unlike null
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [5, 100_000]}, "prompt"),
        ({"prompt": [5] * CONTEXT}, "prompt"),
    ],
)
def test_unsupported_completion_parameters_are_rejected_by_name(call, changes, param):
    response = call(ScriptedEngine(*HELLO), "/v1/completions", {**COMPLETION, **changes})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("model", ["gpt-4o", "Tiny", "../tiny", "a/b", "", "x" * 5000, "nul\0"])
def test_an_unknown_model_is_a_404_and_never_the_base(call, model):
    engine = ScriptedEngine(*HELLO)
    response = call(engine, "/v1/chat/completions", {**CHAT, "model": model})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert engine.requests == []


def test_a_base_without_chat_tokens_rejects_only_chat(call):
    engine = ScriptedEngine(*HELLO)
    engine.tokenizer = _without_chat_tokens(engine)
    response = call(engine, "/v1/chat/completions", CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "chat_not_supported")
    assert call(engine, "/v1/completions", COMPLETION).status_code == 200


@pytest.mark.parametrize(("earlier", "status"), [(True, 200), (False, 400)])
def test_an_adapter_of_an_earlier_template_chats_and_one_of_an_unknown_does_not(call, tmp_path, earlier, status):
    digest = next(iter(_DIGESTS_WITHOUT_TOOLS)) if earlier else "0" * 64
    base = {"id": "hub/Tiny", "revision": None, "short_name": "tiny", "fingerprint": FINGERPRINT}
    work = tmp_path / "work"
    work.mkdir()
    (work / "adapter_config.json").write_text("{}")
    draft = {
        **{"kind": "adapter", "run_id": "r-1", "run_name": "r", "plan_digest": "0" * 64, "base": base},
        **{"method": {"type": "lora"}, "datasets": [], "dataset_digest": "0" * 64, "data_verdict": "pass"},
        **{"waivers": [], "steps": 1, "final_loss": 1.0, "validation_loss": None, "packages": {}},
        **{"chat_template_digest": digest, "end_of_turn_ids": []},
    }
    record = Registry(Storage(str(tmp_path))).publish(work, draft, "tiny", "# {id}\n")
    response = call(ScriptedEngine(*HELLO), "/v1/chat/completions", {**CHAT, "model": record.id})
    assert response.status_code == status
    if not earlier:
        assert response.json()["error"]["code"] == "chat_template_mismatch"


def _without_chat_tokens(engine: ScriptedEngine):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{index}": index for index in range(20)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t0")), unk_token="t0")


@pytest.mark.parametrize(("path", "status"), [("/v1/nothing", 404), ("/", 404), ("/v1/chat/completions", 405)])
def test_routing_errors_have_openais_shape(call, path, status):
    response = call(ScriptedEngine(), path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_invalid_json_is_reported_with_its_position(call):
    response = call(ScriptedEngine(), "/v1/completions", raw=b'{"model": "tiny",')
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The body is not JSON (at character 17)."


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_sets_the_status(call, stream):
    engine = ScriptedEngine(failure=ServingError("adapter = 'a': adapter_model.safetensors is damaged."))
    response = call(engine, "/v1/completions", {**COMPLETION, "stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "adapter = 'a': adapter_model.safetensors is damaged."
    assert response.headers["x-should-retry"] == "false"


def test_a_failure_in_mid_stream_ends_without_done(call):
    engine = ScriptedEngine(HELLO[0], failure=RuntimeError("CUDA out of memory at 0xsecret"))
    response = call(engine, "/v1/completions", {**COMPLETION, "stream": True})
    assert events_of(response)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "[DONE]" not in response.text


# -- who may ask -------------------------------------------------------------------------------------------------------

ROUTES = [
    ("/v1/models", None),
    ("/v1/models/tiny", None),
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", COMPLETION),
    ("/v1/nothing", None),
    ("/v1/health/", None),
    ("/docs", None),
    ("/openapi.json", None),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer ", "sésame", "Basic s3cret", "s3cret"])
def test_without_the_key_no_route_but_health_answers(call, path, body, authorization):
    headers = {"authorization": authorization.encode("latin-1")} if authorization else None
    response = call(ScriptedEngine(*HELLO), path, body, api_key="s3cret", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "s3cret" not in response.text


def test_the_key_opens_every_route_and_health_needs_none(call):
    headers = {"authorization": "Bearer s3cret"}
    for path, body in ROUTES[:4]:
        assert call(ScriptedEngine(*HELLO), path, body, api_key="s3cret", headers=headers).status_code == 200
    assert call(ScriptedEngine(), "/v1/health", api_key="s3cret").json() == {"status": "ok", "model": "tiny"}


def test_a_server_without_a_key_answers_only_its_own_machine(call):
    for client, status in (("127.0.0.1", 200), ("::1", 200), ("192.0.2.7", 401)):
        assert call(ScriptedEngine(), "/v1/models", client=client).status_code == status
    assert call(ScriptedEngine(), "/v1/health", client="192.0.2.7").status_code == 200
