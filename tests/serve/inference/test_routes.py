"""What the routes promise, over an engine that says what the test tells it; neither Ray nor a model is needed."""

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import httpx
import pytest
from sqlalchemy.orm import Session
from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import _DIGESTS_WITHOUT_TOOLS, CHAT_TEMPLATE, ChatFormat, Message
from ft_service.cleanup.needs import SERVED_AFTER_HIDING
from ft_service.errors import DatabaseError, ServingError, StorageError
from ft_service.model.base import load_tokenizer
from ft_service.model.scratch import train_tokenizer
from ft_service.registry.promotions import Promotions
from ft_service.registry.registry import AdapterRecord, BaseModelRef, Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.database.audit import audit_log
from serve.database.database import open_database
from serve.database.keys import ApiKey, create_key, revoke_key
from serve.database.tables import FineTuningJobRow
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest, RefusedRequestError, TokenLogprob
from serve.http.errors import ApiError
from serve.http.rates import Rates
from serve.inference import routes
from serve.inference.bases import ServedBase
from serve.inference.deletions import Deletions
from serve.inference.models import ServedModels
from serve.inference.replies import WAITING
from serve.inference.tokens import LONG_CHARACTERS
from serve.settings import Limits, ServeSettings

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
        self.unloaded: list[str] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.requests.append(request)
        for chunk in self.chunks:
            yield chunk
        if self.failure:
            raise self.failure

    async def unload(self, adapter_digest: str) -> None:
        self.unloaded.append(adapter_digest)

    async def all_stats(self) -> list[EngineStats]:
        return [EngineStats(len(self.requests), 0, 0.25, (), 0, {"steps": 3})]


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
    method: str | None = None,
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
            return await http.request(method or ("GET" if body is None else "POST"), path, json=body, headers=headers)

    return asyncio.run(ask())


def chat_ids(base: ServedBase, messages: list[Message]) -> tuple[int, ...]:
    return tuple(ChatFormat(load_tokenizer(base.folder)).encode_prompt(messages))


def events_of(response: httpx.Response) -> list[dict]:
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_chat_answer_has_every_field_the_stock_client_reads(call, base):
    engine = ScriptedEngine(*HELLO)
    reply = call(engine, "/v1/chat/completions", CHAT).json()
    prompt_ids = chat_ids(base, [Message(role="user", content="Hi")])
    assert engine.requests[0].prompt_ids == prompt_ids
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "tiny"
    assert reply["system_fingerprint"] == "base:abababab-adapter:none"
    assert reply["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None},
        }
    ]
    count = len(prompt_ids)
    assert reply["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": 4,
        "total_tokens": count + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


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
    parameters = {
        **{"temperature": 0.5, "top_p": 0.25, "seed": 7, "stop": ["a", "b"], "max_completion_tokens": 9},
        **{"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5},
        **{"frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"7": -3}},
    }
    assert call(engine, "/v1/chat/completions", {**CHAT, **parameters}).status_code == 200
    request = engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.25, 7)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty, dict(sampling.logit_bias)) == (0.5, -0.5, {7: -3})
    assert (request.stop, request.max_tokens) == (("a", "b"), 9)


def test_temperature_zero_is_not_the_default(call):
    engine = ScriptedEngine(*HELLO)
    call(engine, "/v1/completions", {**COMPLETION, "temperature": 0, "top_p": 0})
    assert (engine.requests[0].sampling.temperature, engine.requests[0].sampling.top_p) == (0.0, 0.0)


def test_default_max_tokens_of_chat_and_completion(call):
    engine = ScriptedEngine(*HELLO)
    call(engine, "/v1/chat/completions", CHAT)
    call(engine, "/v1/completions", COMPLETION)
    chat, completion = engine.requests
    assert chat.max_tokens is None  # as many as fit
    assert completion.max_tokens == 16


def test_null_means_the_default_as_clients_send_it(call):
    engine = ScriptedEngine(*HELLO)
    nulls = dict.fromkeys(["temperature", "top_p", "seed", "stop", "stream", "max_tokens", "n", "tools", "logprobs"])
    assert call(engine, "/v1/chat/completions", {**CHAT, **nulls}).status_code == 200


def test_a_printed_answer_may_be_sent_back(call, base):
    engine = ScriptedEngine(*HELLO)
    earlier = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    turns = [{"role": "developer", "content": "Be"}, parts, earlier, {"role": "user", "content": "Bye"}]
    assert call(engine, "/v1/chat/completions", {"model": "tiny", "messages": turns}).status_code == 200
    expected = [("system", "Be"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [Message(role=role, content=content) for role, content in expected]
    assert engine.requests[0].prompt_ids == chat_ids(base, messages)


_FUNCTION = {"name": "add", "parameters": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}}
_TOOL = {"type": "function", "function": _FUNCTION}
UNASKED = {
    "Open WebUI": {"stream": True, "user": {"name": "A", "role": "admin"}, "chat_id": "c", "session_id": "s"},
    "LangChain": {"tools": [_TOOL], "tool_choice": "auto", "parallel_tool_calls": False, "logprobs": False, "n": 1},
    "AI SDK": {"tools": [{**_TOOL, "function": {**_FUNCTION, "strict": True}}], "tool_choice": "auto"},
    "LiteLLM": {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "frequency_penalty": 0},
    "vLLM's defaults": {
        **{"top_k": -1, "min_p": 0, "repetition_penalty": 1, "length_penalty": 1.0, "ignore_eos": False, "best_of": 1},
        **{"skip_special_tokens": True, "include_stop_str_in_output": False, "detokenize": True, "min_tokens": 0},
        **{"return_token_ids": False, "include_reasoning": True, "cache_salt": "x", "stop_token_ids": []},
        **{"guided_json": None, "chat_template_kwargs": {}, "add_generation_prompt": True, "echo": False},
    },
}


@pytest.mark.parametrize("client", UNASKED)
def test_what_clients_send_unasked_is_accepted(base, client):
    assert roomy_call(ScriptedEngine(*HELLO), base, {**CHAT, **UNASKED[client]}).status_code == 200


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"stop_token_ids": [5]}, "stop_token_ids", "unsupported_parameter"),
        ({"ignore_eos": 0}, "ignore_eos", "unsupported_parameter"),  # 0 is not false
        ({"nonsense": 5}, "nonsense", "unknown_parameter"),
        ({"logit_bias": {"100000": 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"x": 5}}, "logit_bias", "invalid_value"),
        ({"stop": ["x"] * 40}, "stop", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "stranger", "content": "x"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "messages", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "invalid_value"),
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
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [5, "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
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


def test_a_base_without_chat_tokens_rejects_only_chat(tmp_path):
    base = served_base(tmp_path / "base", _without_chat_tokens())
    engine = ScriptedEngine(*HELLO)
    response = send(engine, "/v1/chat/completions", CHAT, base=base, storage=tmp_path)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "chat_not_supported")
    assert send(engine, "/v1/completions", COMPLETION, base=base, storage=tmp_path).status_code == 200


def publish(storage: Path, chat_template_digest: str = "0" * 64) -> AdapterRecord:
    base = {"id": "hub/Tiny", "revision": None, "short_name": "tiny", "fingerprint": FINGERPRINT}
    work = storage / "work"
    work.mkdir()
    (work / "adapter_config.json").write_text("{}")
    draft = {
        **{"kind": "adapter", "run_id": "r-1", "run_name": "r", "plan_digest": "0" * 64, "base": base},
        **{"method": {"type": "lora"}, "datasets": [], "dataset_digest": "0" * 64, "data_verdict": "pass"},
        **{"waivers": [], "steps": 1, "final_loss": 1.0, "validation_loss": None, "packages": {}},
        **{"chat_template_digest": chat_template_digest, "end_of_turn_ids": []},
    }
    return Registry(Storage(str(storage))).publish(work, draft, "tiny", "# {id}\n")


@pytest.mark.parametrize(("earlier", "status"), [(True, 200), (False, 400)])
def test_an_adapter_of_an_earlier_template_chats_and_one_of_an_unknown_does_not(call, tmp_path, earlier, status):
    record = publish(tmp_path, next(iter(_DIGESTS_WITHOUT_TOOLS)) if earlier else "0" * 64)
    response = call(ScriptedEngine(*HELLO), "/v1/chat/completions", {**CHAT, "model": record.id})
    assert response.status_code == status
    if not earlier:
        assert response.json()["error"]["code"] == "chat_template_mismatch"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"prompt": "hello"}, 200),
        ("/v1/completions", {"prompt": "hello", "stream": True}, 200),
        ("/v1/completions", {"prompt": [10**6]}, 400),
        ("/v1/chat/completions", {"messages": CHAT["messages"]}, 400),  # of another chat template
        ("/tokenize", {"prompt": "hello"}, 200),
        ("/detokenize", {"tokens": [5]}, 200),
        ("/detokenize", {"tokens": [10**6]}, 400),
    ],
)
def test_every_reply_about_a_model_names_its_weights_errors_too(call, tmp_path, path, body, status):
    record = publish(tmp_path)
    response = call(ScriptedEngine(*HELLO), path, {"model": record.id, **body})
    assert response.status_code == status
    names = [response.headers[name] for name in ("x-adapter-digest", "x-base-fingerprint")]
    assert names == [record.digest, FINGERPRINT]


def test_a_model_can_be_asked_for_by_head(call, tmp_path):
    record = publish(tmp_path)
    response = call(ScriptedEngine(), f"/v1/models/{record.id}", method="HEAD")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["x-adapter-digest"] == record.digest
    assert call(ScriptedEngine(), "/v1/models/other", method="HEAD").status_code == 404


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})])
def test_the_registry_is_never_read_on_the_event_loop(call, tmp_path, monkeypatch, path, body):
    record = publish(tmp_path)
    find = Registry.find
    in_loop = []

    def noted(registry: Registry, name: str) -> AdapterRecord | None:
        in_loop.append(asyncio._get_running_loop() is not None)
        return find(registry, name)

    monkeypatch.setattr(Registry, "find", noted)
    assert call(ScriptedEngine(), path, {"model": record.id, **body}).status_code == 200
    assert in_loop and not any(in_loop)


def test_only_small_requests_for_what_is_at_hand_are_encoded_on_the_event_loop(call, tmp_path, monkeypatch):
    in_threads = []
    monkeypatch.setattr(routes, "executor_for", lambda characters: in_threads.append(characters))  # the loop's own
    for path, body, takes_a_thread in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, False),
        ("/v1/completions", {"prompt": "Hi"}, False),
        ("/v1/completions", {"prompt": "a" * routes.SMALL_BODY_BYTES}, True),
        ("/v1/completions", {"prompt": "Hi", "model": publish(tmp_path).id}, True),
    ):
        in_threads.clear()
        call(ScriptedEngine(), path, {"model": "tiny", **body})
        assert bool(in_threads) == takes_a_thread


@pytest.mark.parametrize("mark", ["<image>", "<|image|>"])
def test_a_chat_about_image_marks_is_text(call, base, mark):
    engine = ScriptedEngine(*HELLO)
    text = f"What is {mark}?"
    body = {**CHAT, "messages": [{"role": "user", "content": text}]}
    assert call(engine, "/v1/chat/completions", body).status_code == 200
    assert engine.requests[0].prompt_ids == chat_ids(base, [Message(role="user", content=text)])


def _without_chat_tokens() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{index}": index for index in range(20)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t0")), unk_token="t0")


@pytest.mark.parametrize(("path", "status"), [("/v1/nothing", 404), ("/v1/chat/completions", 405)])
def test_routing_errors_have_openais_shape(call, path, status):
    response = call(ScriptedEngine(), path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b'{"model": "tiny",', "EOF while parsing a value at line 1 column 17"),
        (b'{"model": "tiny", "prompt": "\xff"}', "UTF-8"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "hex escape"),
        (b'{"model": "tiny", "temperature": NaN, "prompt": "x"}', "temperature"),
        (b"[1, 2]", "not a JSON object"),
        (b"", "EOF"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_body_that_is_not_json_is_a_400_that_says_why(call, raw, part):
    response = call(ScriptedEngine(), "/v1/completions", raw=raw)
    assert response.status_code == 400
    assert part in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-encoding": "gzip"},
    ],
)
def test_other_content_types_and_encodings_are_a_415_that_says_what_to_send(call, headers):
    response = call(ScriptedEngine(), "/v1/completions", raw=b'{"model": "tiny", "prompt": "x"}', headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_a_body_over_the_limit_is_refused_before_it_is_read(call):
    raw = b'{"model": "tiny", "prompt": "' + b"x" * 2**20 + b'"}'
    response = call(ScriptedEngine(), "/v1/completions", raw=raw, limits={"max_body_mib": 0.5})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert len(response.content) < 500


def test_a_parameter_of_several_types_is_explained_by_the_type_that_was_meant(call):
    response = call(ScriptedEngine(), "/v1/completions", {**COMPLETION, "stop": ["x" * 2000]})
    assert response.json()["error"]["message"] == "stop: string should have at most 1024 characters."
    response = call(ScriptedEngine(), "/v1/completions", {**COMPLETION, "stop": 5})
    assert (
        "valid string" in response.json()["error"]["message"] and "valid array" in response.json()["error"]["message"]
    )
    response = call(ScriptedEngine(), "/v1/completions", {"model": "tiny"})
    assert response.json()["error"]["message"] == "prompt is missing. Send it."


def test_a_refusal_never_repeats_a_long_value(call):
    for changes in ({"nonsense" * 500: 1}, {"audio": "x" * 10_000}, {"model": "x" * 10_000}, {"stop": {"x" * 9000: 1}}):
        response = call(ScriptedEngine(), "/v1/completions", {**COMPLETION, **changes})
        assert response.status_code in (400, 404) and len(response.content) < 1500


def test_a_stop_text_that_is_a_special_token_ends_the_answer_at_that_token(call, base):
    special = load_tokenizer(base.folder).convert_tokens_to_ids("<|eot_id|>")
    engine = ScriptedEngine(*HELLO)
    assert call(engine, "/v1/completions", {**COMPLETION, "stop": ["<|eot_id|>", "eot"]}).status_code == 200
    assert call(engine, "/v1/completions", COMPLETION).status_code == 200
    with_stop, without = engine.requests
    assert with_stop.end_ids - without.end_ids == {special}


def test_a_failure_that_nobody_expects_has_the_headers_of_every_reply(call, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(routes, "CompletionShape", fail)
    given = {"x-request-id": "an-id"}
    for headers in ({}, given):
        response = call(ScriptedEngine(*HELLO), "/v1/completions", COMPLETION, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in response.text
        assert response.headers["x-should-retry"] == "false"
        assert response.headers["x-base-fingerprint"] == FINGERPRINT
        assert headers or response.headers["x-request-id"]


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


class StuckEngine(ScriptedEngine):
    """After its chunks it never ends."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        async for chunk in super().generate(request):
            yield chunk
        await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_too_long_in_the_queue_is_a_429_to_try_again(call, stream):
    limits = {"queue_seconds": 0.05}
    response = call(StuckEngine(), "/v1/completions", {**COMPLETION, "stream": stream}, limits=limits)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_timeout")
    assert int(response.headers["retry-after"]) > 0


def test_a_stream_that_waits_for_a_place_sends_its_headers_and_a_comment_at_once(call):
    failing = ScriptedEngine(WAITING, failure=ServingError("adapter = 'a': adapter_model.safetensors is damaged."))
    response = call(failing, "/v1/completions", {**COMPLETION, "stream": True})
    comment, error, _ = response.text.split("\n\n")
    assert response.status_code == 200 and comment == ": waiting"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "serving_error"
    response = call(ScriptedEngine(WAITING, *HELLO), "/v1/completions", {**COMPLETION, "stream": True})
    assert response.text.startswith(": waiting\n\ndata: ") and response.text.endswith("data: [DONE]\n\n")
    limits = {"queue_seconds": 0.05}  # it has not begun
    response = call(StuckEngine(WAITING), "/v1/completions", {**COMPLETION, "stream": True}, limits=limits)
    assert response.text.startswith(": waiting\n\n") and "queue_timeout" in response.text


def test_an_answer_that_takes_too_long_is_a_504_and_a_stream_ends_in_an_error(call):
    limits = {"request_seconds": 0.05}
    response = call(StuckEngine(HELLO[0]), "/v1/completions", COMPLETION, limits=limits)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    response = call(StuckEngine(HELLO[0]), "/v1/completions", {**COMPLETION, "stream": True}, limits=limits)
    assert response.status_code == 200
    assert events_of(response)[-1]["error"]["code"] == "request_timeout" and "[DONE]" not in response.text


def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(call):
    raw = b'{"model": "tiny", "prompt": [' + b"5," * 2**20 + b"5]}"
    response = call(ScriptedEngine(), "/v1/completions", raw=raw)
    assert response.status_code == 413 and "1,048,576 values" in response.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_server_is_ready_once_no_base_is_missing_and_asking_needs_no_key(base, tmp_path, method):
    missing: list[str] = ["tiny"]

    async def asked() -> list[str]:
        return missing

    models = ServedModels(Registry(Storage(str(tmp_path))), [base])
    settings = ServeSettings(storage=str(tmp_path), api_key="a key")
    api = create_api(models, {"tiny": ScriptedEngine()}, settings, asked)

    async def ready() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as http:
            return await http.request(method, "/v1/ready")

    response = asyncio.run(ready())
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    assert method == "HEAD" or "tiny" in response.json()["error"]["message"]
    missing.clear()
    assert asyncio.run(ready()).status_code == 200


# -- what an answer may have -------------------------------------------------------------------------------------------


def scored(token_id: int, text: bytes, logprob: float, top: dict[bytes, float]) -> TokenLogprob:
    others = tuple(TokenLogprob(100 + index, *item) for index, item in enumerate(top.items()))
    return TokenLogprob(token_id, text, logprob, others)


SCORED = GenerationChunk(
    "Hé", (5, 6), "length", (scored(5, b"H", -0.5, {b"H": -0.5}), scored(6, b"\xc3", -2.0, {b"a": -1.0}))
)


def test_n_choices_of_every_prompt_are_asked_with_seeds_of_their_own(call):
    engine = ScriptedEngine(*HELLO)
    body = {"model": "tiny", "prompt": [[5], [6, 7]], "n": 2, "seed": 40}
    reply = call(engine, "/v1/completions", body).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [(request.prompt_ids, request.sampling.seed) for request in engine.requests] == [
        ((5,), 40),
        ((5,), 41),
        ((6, 7), 40),
        ((6, 7), 41),
    ]
    assert reply["usage"]["prompt_tokens"] == 3 and reply["usage"]["completion_tokens"] == 16


def test_without_a_seed_every_request_draws_one(call):
    engine = ScriptedEngine(*HELLO)
    for _ in range(2):
        call(engine, "/v1/completions", COMPLETION)
    assert len({request.sampling.seed for request in engine.requests}) == 2


def test_chat_logprobs_have_tokens_bytes_and_the_most_likely_ones(call):
    engine = ScriptedEngine(SCORED)
    reply = call(engine, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1}).json()
    assert engine.requests[0].logprobs == 1
    first, second = reply["choices"][0]["logprobs"]["content"]
    assert first == {
        **{"token": "H", "bytes": [72], "logprob": -0.5},
        "top_logprobs": [{"token": "H", "bytes": [72], "logprob": -0.5}],
    }
    assert second["bytes"] == [0xC3] and second["token"] == r"\xc3"  # as OpenAI names a part of a character


def test_echo_with_logprobs_has_the_prompt_first_as_lm_eval_reads_it(call):
    prompt = (None, scored(6, b"b", -1.5, {b"x": -0.1}), scored(7, b"c", -0.2, {b"c": -0.2}))
    engine = ScriptedEngine(GenerationChunk("d", (8,), "length", (scored(8, b"d", -0.3, {b"d": -0.3}),), prompt))
    body = {"model": "tiny", "prompt": [[5, 6, 7]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    choice = call(engine, "/v1/completions", body).json()["choices"][0]
    assert (engine.requests[0].logprobs, engine.requests[0].prompt_logprobs) == (1, 1)
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.5, -0.2, -0.3]
    assert logprobs["top_logprobs"][0] is None
    assert [max(top.values()) for top in logprobs["top_logprobs"][1:]] == [-0.1, -0.2, -0.3]
    assert logprobs["top_logprobs"][1] == {"x": -0.1, "b": -1.5}
    assert choice["text"].endswith("d") and len(choice["text"]) > 1
    streamed = events_of(call(engine, "/v1/completions", {**body, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]
    assert [value for event in streamed for value in event["choices"][0]["logprobs"]["token_logprobs"]] == [
        None,
        *[-1.5, -0.2, -0.3],
    ]


def test_every_token_of_an_echo_has_its_name_and_its_place_in_the_text(call, base):
    tokenizer = load_tokenizer(base.folder)
    ids = tokenizer("日 a", add_special_tokens=False)["input_ids"]
    texts = ["日"[:1].encode()[at : at + 1] for at in range(3)] + [b" ", b"a"]
    assert len(ids) == len(texts)  # this small vocabulary has a token for each byte of the character
    prompt = (None, *(scored(one, text, -1.0, {text: -1.0}) for one, text in zip(ids[1:], texts[1:], strict=True)))
    answer = (
        scored(20, b"\xe6", -0.5, {b"\xe6": -0.5, b"\xe7": -0.7}),
        *[scored(21, b"\x9c\xac", -0.5, {}), scored(22, b"!", -0.5, {})],
    )
    engine = ScriptedEngine(
        GenerationChunk("", (20,), None, answer[:1], prompt), GenerationChunk("本!", (21, 22), "length", answer[1:])
    )
    body = {"model": "tiny", "max_tokens": 3, "logprobs": 2, "echo": True}
    choice = call(engine, "/v1/completions", {**body, "prompt": ids}).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "日 a本!"
    assert logprobs["tokens"] == [
        *[r"bytes:\xe6", r"bytes:\x97", r"bytes:\xa5", " ", "a"],
        *[r"bytes:\xe6", r"bytes:\x9c\xac", "!"],
    ]
    assert logprobs["text_offset"] == [0, 0, 0, 1, 2, 3, 3, 4]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][5] == {r"bytes:\xe6": -0.5, r"bytes:\xe7": -0.7}
    streamed = events_of(call(engine, "/v1/completions", {**body, "prompt": ids, "stream": True}))
    parts = [event["choices"][0]["logprobs"] for event in streamed]
    for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        assert [value for part in parts for value in part[name]] == logprobs[name]


def test_a_begin_of_text_token_that_is_not_in_the_echoed_text_takes_no_place_in_it(call, base):
    tokenizer = load_tokenizer(base.folder)
    begin, *ids = tokenizer(tokenizer.bos_token + "hello", add_special_tokens=False)["input_ids"]
    prompt = (None, *(scored(one, tokenizer.decode([one]).encode(), -1.0, {}) for one in ids))
    engine = ScriptedEngine(GenerationChunk("", (1,), "stop", (scored(1, b"", -1.0, {}),), prompt))
    body = {"model": "tiny", "max_tokens": 1, "logprobs": 0, "echo": True}
    for given, starts in (("hello", [0, 0]), ([begin, *ids], [0, len(tokenizer.bos_token)])):
        choice = call(engine, "/v1/completions", {**body, "prompt": given}).json()["choices"][0]
        assert engine.requests[-1].prompt_ids == (begin, *ids)
        assert choice["logprobs"]["tokens"][0] == tokenizer.bos_token
        assert choice["logprobs"]["text_offset"][:2] == starts
        assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])


def test_text_that_begins_with_begin_of_text_gets_no_second_one(call, base):
    tokenizer = load_tokenizer(base.folder)
    engine = ScriptedEngine(*HELLO)
    for prompt in ("hello", tokenizer.bos_token + "hello"):
        call(engine, "/v1/completions", {**COMPLETION, "prompt": prompt})
    plain, rendered = engine.requests
    assert plain.prompt_ids == rendered.prompt_ids
    assert plain.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_special_tokens_are_text_in_a_chat_and_tokens_in_a_completion_whatever_runs_beside(call, base):
    tokenizer = load_tokenizer(base.folder)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    engine = ScriptedEngine(*HELLO)
    chat = {**CHAT, "messages": [{"role": "user", "content": "a<|eot_id|>b"}]}
    calls = [("/v1/chat/completions", chat), ("/v1/completions", {**COMPLETION, "prompt": "a<|eot_id|>b"})] * 20
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda one: call(engine, *one), calls))
    counts = Counter((request.prompt_ids.count(end), len(request.prompt_ids)) for request in engine.requests)
    assert sorted(counts.values()) == [20, 20]
    assert {ends for ends, _ in counts} == {1}  # the chat's own end of turn; the completion's token


# -- tools -------------------------------------------------------------------------------------------------------------

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
ADDING = (
    GenerationChunk('{"name": "add", ', (5,)),
    GenerationChunk('"parameters": {"a": 1, "b": 2}}', (6,)),
    GenerationChunk("", (1,), "stop"),
)


def test_offered_tools_are_written_as_the_stock_template_writes_them(call, base):
    engine = ScriptedEngine(*ADDING)
    function = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    big = {"messages": turns, "model": "tiny", "tools": [ADD], "max_tokens": 1}
    roomy = dataclasses.replace(base, context_length=4096)
    assert send(engine, "/v1/chat/completions", big, base=roomy, storage=base.folder).status_code == 200
    tokenizer = load_tokenizer(base.folder)
    template_turns = json.loads(json.dumps(turns))
    template_turns[2]["tool_calls"][0]["function"]["arguments"] = {"a": 1, "b": 2}
    expected = tokenizer.apply_chat_template(
        template_turns, chat_template=CHAT_TEMPLATE, tools=[ADD], add_generation_prompt=True, return_dict=False
    )
    assert list(engine.requests[0].prompt_ids) == expected


def roomy_call(engine: ScriptedEngine, base: ServedBase, body: dict) -> httpx.Response:
    roomy = dataclasses.replace(base, context_length=4096)
    return send(engine, "/v1/chat/completions", body, base=roomy, storage=base.folder)


def test_a_call_is_parsed_and_ends_with_tool_calls(base):
    body = {**CHAT, "tools": [ADD]}
    choice = roomy_call(ScriptedEngine(*ADDING), base, body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (called,) = choice["message"]["tool_calls"]
    assert called["function"] == {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    streamed = events_of(roomy_call(ScriptedEngine(*ADDING), base, {**body, "stream": True}))
    assert [event["choices"][0]["delta"].get("content") for event in streamed] == ["", None]
    last = streamed[-1]["choices"][0]
    assert last["finish_reason"] == "tool_calls"
    assert last["delta"]["tool_calls"][0]["function"]["name"] == "add"
    assert last["delta"]["tool_calls"][0]["index"] == 0


def test_a_call_that_begins_with_a_token_without_text_is_streamed_as_a_call(base):
    engine = ScriptedEngine(GenerationChunk("", (9,)), *ADDING)  # <|python_tag|> is no text
    streamed = events_of(roomy_call(engine, base, {**CHAT, "tools": [ADD], "stream": True}))
    last = streamed[-1]["choices"][0]
    assert last["finish_reason"] == "tool_calls"
    assert last["delta"]["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    "text", ["Hello", '{"name": "rm", "parameters": {}}', '{"name": "add"', '{"name": "add", "parameters": 5}', "{}"]
)
def test_an_answer_that_is_no_offered_call_is_text_whole_and_streamed(base, text):
    chunks = [GenerationChunk(letter, (5,)) for letter in text] + [GenerationChunk("", (1,), "stop")]
    body = {**CHAT, "tools": [ADD]}
    choice = roomy_call(ScriptedEngine(*chunks), base, body).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", text)
    streamed = events_of(roomy_call(ScriptedEngine(*chunks), base, {**body, "stream": True}))
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in streamed) == text


def test_tool_choice_forces_a_call_by_its_schema_and_none_offers_nothing(base):
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        engine = ScriptedEngine(*ADDING)
        roomy_call(engine, base, {**CHAT, "tools": [ADD], "tool_choice": choice})
        schema = json.loads(engine.requests[0].json_schema)
        assert schema["properties"]["name"] == {"const": "add"}
        assert schema["properties"]["parameters"] == ADD["function"]["parameters"]
    engine = ScriptedEngine(*HELLO)
    roomy_call(engine, base, {**CHAT, "tools": [ADD], "tool_choice": "none"})
    assert engine.requests[0].prompt_ids == chat_ids(base, [Message(role="user", content="Hi")])


STRICT = {**ADD, "function": {**ADD["function"], "name": "add-strictly", "strict": True}}
PERSON = {"type": "object", "$defs": {"Name": {"type": "string"}}, "properties": {"name": {"$ref": "#/$defs/Name"}}}


def constraint_of(base: ServedBase, **body: object) -> tuple[dict | None, bool]:
    engine = ScriptedEngine(*HELLO)
    assert roomy_call(engine, base, {**CHAT, **body}).status_code == 200
    request = engine.requests[0]
    return json.loads(request.json_schema) if request.json_schema else None, request.text_allowed


def test_where_the_model_may_choose_a_call_is_held_to_the_schema_of_strict_functions(base):
    assert constraint_of(base, tools=[ADD]) == (None, False)
    schema, text_allowed = constraint_of(base, tools=[STRICT], tool_choice="auto")
    assert text_allowed and schema["properties"]["parameters"] == ADD["function"]["parameters"]
    schema, text_allowed = constraint_of(base, tools=[ADD, STRICT])
    assert text_allowed
    assert [one["properties"]["name"]["const"] for one in schema["anyOf"]] == ["add", "add-strictly"]
    loose, strict = (one["properties"]["parameters"] for one in schema["anyOf"])
    assert (loose, strict) == ({"type": "object"}, ADD["function"]["parameters"])


def test_beside_the_schema_of_an_answer_the_model_may_still_call(base):
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON}}
    for tool in (ADD, STRICT):
        schema, text_allowed = constraint_of(base, tools=[tool], response_format=response_format)
        person, call = schema["anyOf"]
        assert not text_allowed
        assert at_pointer(schema, person["properties"]["name"]["$ref"]) == PERSON["$defs"]["Name"]
        assert call["properties"]["name"]["const"] == tool["function"]["name"]
    assert constraint_of(base, tools=[ADD], response_format={"type": "json_object"}) == ({}, False)
    assert constraint_of(base, tools=[ADD], tool_choice="none", response_format=response_format) == (PERSON, False)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_forced_call_beside_a_response_format_is_refused(base, choice, kind):
    response_format = {"type": kind, **({"json_schema": {"schema": PERSON}} if kind == "json_schema" else {})}
    body = {**CHAT, "tools": [ADD], "tool_choice": choice, "response_format": response_format}
    error = roomy_call(ScriptedEngine(*HELLO), base, body).json()["error"]
    assert (error["param"], error["code"]) == ("tool_choice", "invalid_value")


NESTED = {
    "type": "object",
    "$defs": {"Place": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Place"}}}},
    "properties": {
        "place": {"$ref": "#/$defs/Place"},
        "$ref": {"type": "string"},
        "fixed": {"const": {"$ref": "#/$defs/Place"}},
    },
    "required": ["place"],
    "additionalProperties": False,
}


def at_pointer(schema: dict, pointer: str) -> dict:
    value: object = schema
    for part in pointer.removeprefix("#/").split("/"):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


@pytest.mark.parametrize("others", [[], [ADD]])
def test_references_in_parameters_lead_to_their_definitions(base, others):
    engine = ScriptedEngine(*ADDING)
    go = {"type": "function", "function": {"name": "go", "parameters": NESTED}}
    roomy_call(engine, base, {**CHAT, "tools": [*others, go], "tool_choice": "required"})
    schema = json.loads(engine.requests[0].json_schema)
    nested = (schema["anyOf"][-1] if others else schema)["properties"]["parameters"]
    for reference in (nested["properties"]["place"], nested["$defs"]["Place"]["properties"]["next"]):
        assert at_pointer(schema, reference["$ref"]) == nested["$defs"]["Place"]
    assert nested["properties"]["$ref"] == {"type": "string"}
    assert nested["properties"]["fixed"] == NESTED["properties"]["fixed"]  # a value, not a schema


def test_a_schema_that_cannot_be_followed_is_an_error_of_tools_if_it_is_a_tools(base):
    failure = RefusedRequestError("response_format: the JSON schema cannot be followed (x).", "response_format")
    body = {**CHAT, "tools": [ADD], "tool_choice": "required"}
    error = roomy_call(ScriptedEngine(failure=failure), base, body).json()["error"]
    assert error["param"] == "tools" and error["message"].startswith("tools: the JSON schema")
    body = {**CHAT, "response_format": {"type": "json_object"}}
    error = roomy_call(ScriptedEngine(failure=failure), base, body).json()["error"]
    assert error["param"] == "response_format"


def test_tools_and_calls_count_towards_the_length(base, monkeypatch):
    encoded_at: list[int] = []
    monkeypatch.setattr(routes, "executor_for", lambda characters: encoded_at.append(characters))
    long = "y" * 40_000
    described = {"type": "function", "function": {**ADD["function"], "description": long}}
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": long})}}
    asked = CHAT["messages"][0]
    bodies = [
        ({**CHAT, "tools": [described]}, "tools"),
        ({**CHAT, "messages": [asked, {"role": "assistant", "content": None, "tool_calls": [called]}]}, "messages"),
    ]
    for body, param in bodies:
        refused = roomy_call(ScriptedEngine(*HELLO), base, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert refused.json()["error"]["param"] == param
        assert "40" in refused.json()["error"]["message"]  # characters: it was refused before it was encoded
        assert encoded_at.pop() > LONG_CHARACTERS


def with_function(**changes: object) -> dict[str, object]:
    return {"tools": [{**ADD, "function": {**ADD["function"], **changes}}]}


@pytest.mark.parametrize(
    ("changes", "param", "name"),
    [
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options", "continuous_usage_stats"),
        ({"stream_options": {"mood": 1}}, "stream_options", "mood"),
        ({"response_format": {"type": "text", "grammar": "x"}}, "response_format", "grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "mode": "x"}}},
            "response_format",
            "mode",
        ),
        ({"tools": [{**ADD, "mood": 1}]}, "tools", "mood"),
        (with_function(examples=["x"]), "tools", "examples"),
        ({**with_function(strict=True), "response_format": {"type": "json_object"}}, "tools", "strict"),
    ],
)
def test_what_is_within_a_parameter_is_not_ignored_either(base, changes, param, name):
    response = roomy_call(ScriptedEngine(*HELLO), base, {**CHAT, "stream": True, **changes})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and name in error["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"stream_options": {"continuous_usage_stats": False, "include_obfuscation": False, "other": None}},
        with_function(strict=False),
        with_function(strict=None),
        with_function(strict=True),
        {**with_function(strict=True), "tool_choice": "auto"},
        {**with_function(strict=True), "tool_choice": "required"},
        {**with_function(strict=True), "tool_choice": {"type": "function", "function": {"name": "add"}}},
        {**with_function(strict=True), "tool_choice": "none"},
    ],
)
def test_neutral_values_within_a_parameter_are_accepted(base, changes):
    assert roomy_call(ScriptedEngine(*HELLO), base, {**CHAT, **changes}).status_code == 200


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
def test_response_format_reaches_the_engine_as_a_schema(call, response_format, schema):
    engine = ScriptedEngine(*HELLO)
    call(engine, "/v1/chat/completions", {**CHAT, "response_format": response_format})
    text = engine.requests[0].json_schema
    assert (None if text is None else json.loads(text)) == schema


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_text_and_chats_become_the_ids_that_are_generated_from(call, base):
    engine = ScriptedEngine(*HELLO)
    call(engine, "/v1/completions", {**COMPLETION, "prompt": "hello world"})
    call(engine, "/v1/chat/completions", CHAT)
    text = call(engine, "/tokenize", {"prompt": "hello world"}).json()
    chat = call(engine, "/v1/tokenize", {"model": "tiny", "messages": CHAT["messages"]}).json()
    assert [tuple(text["tokens"]), tuple(chat["tokens"])] == [request.prompt_ids for request in engine.requests]
    assert (text["count"], text["max_model_len"]) == (len(text["tokens"]), CONTEXT)
    assert call(engine, "/detokenize", {"tokens": text["tokens"][1:]}).json() == {"prompt": "hello world"}
    assert call(engine, "/detokenize", {"tokens": [10**6]}).status_code == 400


def test_tools_count_towards_what_is_tokenized_at_once(call):
    tool = {**ADD, "function": {**ADD["function"], "description": "y" * 2**20}}
    response = call(ScriptedEngine(), "/tokenize", {"messages": CHAT["messages"], "tools": [tool]})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_tokenizer_info_has_what_lm_eval_reads(call, base):
    info = call(ScriptedEngine(), "/tokenizer_info").json()
    assert info["eos_token"] == load_tokenizer(base.folder).eos_token
    assert info["vocab_size"] == base.vocab_size


def test_the_openapi_page_has_a_schema_for_every_body(call):
    page = call(ScriptedEngine(), "/openapi.json").json()
    for path, kind in [("/v1/chat/completions", "ChatRequest"), ("/v1/completions", "CompletionRequest")]:
        schema = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{kind}"}
        assert "temperature" in page["components"]["schemas"][kind]["properties"]


def test_prompts_answers_and_keys_are_in_the_log_only_if_asked_for(call, caplog):
    headers = {"authorization": "Bearer s3cret", "x-request-id": "abc-1"}
    body = {"model": "tiny", "prompt": "hello world"}
    with caplog.at_level("INFO"):
        call(ScriptedEngine(*HELLO), "/v1/completions", body, api_key="s3cret", headers=headers)
    assert "request=abc-1" in caplog.text and "generated_tokens=4" in caplog.text
    assert "hello" not in caplog.text and "Hello" not in caplog.text and "s3cret" not in caplog.text
    with caplog.at_level("INFO"):
        call(ScriptedEngine(*HELLO), "/v1/completions", body, api_key="s3cret", headers=headers, log_prompts=True)
    assert "hello world" in caplog.text and "Hello" in caplog.text and "s3cret" not in caplog.text


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
    assert call(ScriptedEngine(), "/v1/health", api_key="s3cret").json() == {"status": "ok", "models": ["tiny"]}


def test_a_server_without_a_key_answers_only_its_own_machine(call):
    for client, status in (("127.0.0.1", 200), ("::1", 200), ("192.0.2.7", 401)):
        assert call(ScriptedEngine(), "/v1/models", client=client).status_code == status
    assert call(ScriptedEngine(), "/v1/health", client="192.0.2.7").status_code == 200


def test_a_server_without_a_key_answers_only_under_a_loopback_name(call):
    for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 403)):
        assert call(ScriptedEngine(), "/v1/models", headers={"host": host}).status_code == status
    headers = {"host": "evil.example", "authorization": "Bearer s3cret"}
    assert call(ScriptedEngine(), "/v1/models", api_key="s3cret", headers=headers).status_code == 200


def test_a_key_that_ends_in_a_newline_still_opens(call):
    headers = {"authorization": "Bearer s3cret"}
    assert call(ScriptedEngine(), "/v1/models", api_key="s3cret\n", headers=headers).status_code == 200


@pytest.fixture
def database(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/service.db"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_of_the_database_open_until_they_are_revoked(call, database):
    engine = open_database(database)
    key, _ = create_key(engine, "ci")
    assert call(ScriptedEngine(), "/v1/models", database=database, headers=bearer(key)).status_code == 200
    assert call(ScriptedEngine(), "/v1/models", database=database).status_code == 401
    assert call(ScriptedEngine(), "/v1/models", database=database, headers=bearer(key + "x")).status_code == 401
    revoke_key(engine, "ci")
    assert call(ScriptedEngine(), "/v1/models", database=database, headers=bearer(key)).status_code == 401


def test_a_key_uses_and_sees_only_its_models(call, database):
    key, _ = create_key(open_database(database), "ci", models=("other-*",))
    options = {"database": database, "headers": bearer(key)}
    assert call(ScriptedEngine(), "/v1/models", **options).json()["data"] == []
    for path, body in [("/v1/models/tiny", None), ("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]:
        response = call(ScriptedEngine(*HELLO), path, body, **options)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "model_not_allowed")


def test_a_keys_models_cover_the_tokenizer_and_the_statistics(call, database):
    engine = open_database(database)
    limited, _ = create_key(engine, "limited", models=("other",))
    admin, _ = create_key(engine, "boss", models=("other",), is_admin=True)
    text = {"prompt": "hello"}
    calls = [
        *[("/v1/tokenize", text), ("/v1/tokenize", {**text, "model": "tiny"}), ("/tokenize", text)],
        *[("/v1/detokenize", {"tokens": [5]}), ("/v1/tokenizer_info", None), ("/tokenizer_info?model=tiny", None)],
        ("/v1/stats", None),
    ]
    for path, body in calls:
        response = call(ScriptedEngine(), path, body, database=database, headers=bearer(limited))
        assert response.status_code == 403, path
    assert call(ScriptedEngine(), "/v1/stats", database=database, headers=bearer(admin)).status_code == 200


def test_only_an_admin_key_deletes(call, database):
    engine = open_database(database)
    key, _ = create_key(engine, "ci")
    admin, _ = create_key(engine, "boss", is_admin=True)
    model = "/v1/models/tiny"
    assert call(ScriptedEngine(), model, method="DELETE", database=database, headers=bearer(key)).status_code == 403
    response = call(ScriptedEngine(), model, method="DELETE", database=database, headers=bearer(admin))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "not_deletable")  # it is a base


def test_a_jobs_model_is_seen_used_and_deleted_by_its_own_key_and_organisation_only(call, tmp_path, database):
    engine = open_database(database)
    record = publish(tmp_path)
    anna, key = create_key(engine, "anna", organization="acme")
    colleague, _ = create_key(engine, "carl", organization="acme")
    other, _ = create_key(engine, "bert")
    admin, _ = create_key(engine, "boss", is_admin=True)
    name = "ft:tiny:ft:desk:0a1b2c3d"
    now = datetime.now(UTC)
    with Session(engine) as opened:
        row = {
            **{"id": "ftjob-1", "created": now, "since": now, "key": key.id, "organization": "acme", "model": "tiny"},
            **{"request": {}, "training_file": "f", "seed": 1, "run_id": "r", "alias": name, "state": "succeeded"},
            **{"attempt": 1, "adapter": record.id, "result_files": [], "last_step": 1},
        }
        opened.add(FineTuningJobRow(**row))
        opened.commit()

    def listed(key: str) -> set[str]:
        answer = call(ScriptedEngine(), "/v1/models", database=database, headers=bearer(key))
        return {model["id"] for model in answer.json()["data"]}

    for key_text in (anna, colleague, admin):
        assert listed(key_text) == {"tiny", record.id, name}
    assert listed(other) == {"tiny"}
    for model in (name, record.id):
        body = {**COMPLETION, "model": model}
        options = {"database": database, "headers": bearer(other)}
        assert call(ScriptedEngine(*HELLO), "/v1/completions", body, **options).status_code == 404
        assert call(ScriptedEngine(), f"/v1/models/{model}", **options).status_code == 404
        options = {"database": database, "headers": bearer(colleague)}
        answer = call(ScriptedEngine(*HELLO), "/v1/completions", body, **options)
        assert (answer.status_code, answer.json()["model"]) == (200, model)
    delete = {"method": "DELETE", "database": database}
    assert call(ScriptedEngine(), f"/v1/models/{name}", headers=bearer(other), **delete).status_code == 404
    assert call(ScriptedEngine(), f"/v1/models/{record.id}", headers=bearer(anna), **delete).status_code == 403
    assert call(ScriptedEngine(), f"/v1/models/{name}", headers=bearer(anna), **delete).json()["deleted"]
    assert listed(admin) == {"tiny"}


def test_a_deletion_is_in_the_audit_log_before_it_happens_and_so_is_its_failure(call, tmp_path, database, monkeypatch):
    engine = open_database(database)
    admin, _ = create_key(engine, "boss", is_admin=True)
    record = publish(tmp_path)
    options = {"method": "DELETE", "database": database, "headers": bearer(admin)}
    before: list[str] = []

    def fails(storage: Storage, adapter_id: str) -> None:
        before.append(audit_log(engine)[-1].action)
        raise StorageError(f"{adapter_id}: the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr("serve.inference.models.hide_adapter", fails)
        backend = ScriptedEngine()
        assert call(backend, f"/v1/models/{record.id}", **options).status_code == 503
    assert before == ["models.delete"]
    assert backend.unloaded == [record.digest]
    last = audit_log(engine)[-1]
    assert (last.key, last.action, last.target) == ("boss", "models.delete.failed", record.id)
    assert last.details == {"error": "StorageError"}

    response = call(ScriptedEngine(), f"/v1/models/{record.id}", **options)
    assert response.json() == {"id": record.id, "object": "model", "deleted": True}
    last = audit_log(engine)[-1]
    assert (last.action, last.details) == ("models.delete", {"digest": record.digest})
    assert call(ScriptedEngine(), f"/v1/models/{record.id}", **{**options, "method": "GET"}).status_code == 404


def test_a_promoted_or_pinned_adapter_is_not_deleted(call, tmp_path):
    record = publish(tmp_path)
    promotions = Promotions(Registry(Storage(str(tmp_path))))
    alias = promotions.promote(record).alias
    for name in (record.id, alias):
        response = call(ScriptedEngine(), f"/v1/models/{name}", method="DELETE")
        assert response.status_code == 400 and alias in response.json()["error"]["message"]
    promotions.demote(alias)
    pins = [{"base": "hub/Tiny", "pinned": [record.id]}]
    response = call(ScriptedEngine(), f"/v1/models/{record.id}", method="DELETE", bases=pins)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "not_deletable")
    assert "pinned" in response.json()["error"]["message"]
    assert call(ScriptedEngine(), f"/v1/models/{record.id}").status_code == 200


def test_the_files_of_a_deleted_adapter_go_later_and_the_audit_log_has_both(call, tmp_path, database):
    admin, _ = create_key(open_database(database), "boss", is_admin=True)
    record = publish(tmp_path)
    options = {"method": "DELETE", "database": database, "headers": bearer(admin)}
    assert call(ScriptedEngine(), f"/v1/models/{record.id}", **options).json()["deleted"]
    storage = Storage(str(tmp_path))
    folder = f"adapters/{record.id}"
    now = datetime.now(UTC)
    gateways = [Deletions(Storage(str(tmp_path)), {FINGERPRINT}, database) for _ in range(2)]
    Deletions(storage, {"of another base"}, database).complete(now + timedelta(hours=1))
    gateways[0].complete(now)
    assert storage.exists(folder)  # a request that was accepted before may still wait
    for gateway in gateways:
        gateway.complete(now + timedelta(minutes=16))
    assert not storage.exists(folder)
    entries = [(entry.key, entry.action) for entry in audit_log(open_database(database)) if entry.target == record.id]
    assert entries == [("boss", "models.delete"), ("server", "models.delete.files")]


def test_the_files_of_a_deleted_adapter_outlast_the_longest_wait_in_a_queue():
    longest = next(rule.le for rule in Limits.model_fields["queue_seconds"].metadata if hasattr(rule, "le"))
    assert timedelta(seconds=longest) < SERVED_AFTER_HIDING


def test_nothing_is_deleted_if_the_audit_log_cannot_be_written(call, tmp_path, database, monkeypatch):
    admin, _ = create_key(open_database(database), "boss", is_admin=True)
    record = publish(tmp_path)
    options = {"database": database, "headers": bearer(admin)}

    def fails(*_: object) -> None:
        raise DatabaseError("the database is read-only.")

    with monkeypatch.context() as patch:
        patch.setattr(routes, "audit", fails)
        assert call(ScriptedEngine(), f"/v1/models/{record.id}", method="DELETE", **options).status_code == 503
    assert call(ScriptedEngine(), f"/v1/models/{record.id}", **options).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"origin": "http://localhost"}, 200),  # the server's own page
        ({"origin": "http://localhost", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://allowed.example", "sec-fetch-site": "cross-site"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://localhost:3000", "sec-fetch-site": "same-site"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_a_server_without_a_key_answers_no_page_of_another_address(call, headers, status):
    engine = ScriptedEngine(*HELLO)
    options = {"headers": headers, "allowed_origins": ["https://allowed.example"]}
    assert call(engine, "/v1/completions", COMPLETION, **options).status_code == status
    assert len(engine.requests) == (status == 200)
    key = {"authorization": "Bearer s3cret"}
    with_key = {**options, "headers": {**headers, **key}, "api_key": "s3cret"}
    assert call(engine, "/v1/completions", COMPLETION, **with_key).status_code == 200


def test_an_allowed_page_may_use_openais_client_and_read_what_replies_name(call):
    origin = {"origin": "https://allowed.example"}
    options = {"allowed_origins": ["https://allowed.example"]}
    wanted = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
    asked = {**origin, "access-control-request-method": "POST", "access-control-request-headers": wanted}
    preflight = call(ScriptedEngine(), "/v1/completions", method="OPTIONS", headers=asked, **options)
    assert preflight.status_code == 200
    allowed = {name.strip() for name in preflight.headers["access-control-allow-headers"].split(",")}
    assert allowed >= set(wanted.split(","))
    reply = call(ScriptedEngine(*HELLO), "/v1/completions", COMPLETION, headers=origin, **options)
    exposed = {name.strip() for name in reply.headers["access-control-expose-headers"].split(",")}
    assert exposed == {"x-request-id", "x-adapter-digest", "x-base-fingerprint", "retry-after"}


def test_a_key_may_ask_as_often_as_it_may():
    rates = Rates()
    key = ApiKey("x", "ci", datetime.now(UTC), requests_per_minute=2, tokens_per_minute=100)
    rates.check_request(key)
    rates.check_request(key)
    with pytest.raises(ApiError) as refused:
        rates.check_request(key)
    assert refused.value.status == 429 and 1 <= refused.value.retry_after <= 30
    other = ApiKey("y", "other", datetime.now(UTC), tokens_per_minute=100)
    rates.check_request(other)
    rates.reserve_tokens(other, 150)
    with pytest.raises(ApiError, match="tokens a minute"):
        rates.check_request(other)
    rates.settle_tokens(other, 150, 20)
    rates.check_request(other)


def test_requests_at_once_do_not_exceed_the_tokens_of_their_key(base, tmp_path, database):
    key, _ = create_key(open_database(database), "ci", tokens_per_minute=30)
    models = ServedModels(Registry(Storage(str(tmp_path))), [base])
    engine = WaitingEngine(*HELLO)
    api = create_api(models, {"tiny": engine}, ServeSettings(storage=str(tmp_path), database=database))
    body = {**COMPLETION, "max_tokens": 27}  # with its prompt, all that the key has

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as http:
            first = asyncio.create_task(http.post("/v1/completions", json=body, headers=bearer(key)))
            await engine.asked.wait()
            second = await http.post("/v1/completions", json=body, headers=bearer(key))
            assert int(second.headers["retry-after"]) > 0
            engine.released.set()
            third = (await first, await http.post("/v1/completions", json=body, headers=bearer(key)))
            return [response.status_code for response in (third[0], second, third[1])]

    assert asyncio.run(ask()) == [200, 429, 200]  # four of 27 tokens came, so the rest was given back


class WaitingEngine(ScriptedEngine):
    """Answers once it is released."""

    def __init__(self, *chunks: GenerationChunk) -> None:
        super().__init__(*chunks)
        self.asked = asyncio.Event()
        self.released = asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.asked.set()
        await self.released.wait()
        async for chunk in super().generate(request):
            yield chunk
