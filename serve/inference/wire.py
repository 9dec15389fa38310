"""Wire types: OpenAI's request and response shapes, independent of models and engines."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from serve.engines.engine import FinishReason
from serve.http.errors import ApiError


class _FromClient(BaseModel):
    """What clients send. Any parameter that is not a field is rejected, unless it cannot change the answer.

    Parameters in `without_effect` may have any value; those in `neutral` only the value given there, OpenAI's default.
    """

    model_config = ConfigDict(extra="allow")
    without_effect: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[dict[str, object]] = {}

    @model_validator(mode="after")
    def _reject_unsupported_parameters(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in self.without_effect:
                continue
            if name not in self.neutral:
                raise ApiError(400, f"Unknown parameter: {name!r}. Leave it out.", "unknown_parameter", name)
            if value is not None and value != self.neutral[name]:
                default = json.dumps(self.neutral[name])
                message = f"{name} = {json.dumps(value)} is not supported. Leave it out, or send {default}."
                raise ApiError(400, message, "unsupported_parameter", name)
        return self


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationParameters(_FromClient):
    """Parameters of both completion calls. `null` means the default everywhere."""

    without_effect = frozenset(
        {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"}
    )

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(string for string in strings if string)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(_FromClient):
    type: Literal["text"]
    text: str


class ChatMessage(_FromClient):
    """One turn. Fields that clients copy from an earlier answer are accepted when they are empty."""

    without_effect = frozenset({"name", "annotations"})
    neutral: ClassVar[dict[str, object]] = {"refusal": None, "tool_calls": [], "function_call": None, "audio": None}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationParameters):
    """POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, object]] = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "functions": [],
        "function_call": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "audio": None,
        "prediction": None,
        "reasoning_effort": "none",
        "verbosity": "medium",
        "web_search_options": None,
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(GenerationParameters):
    """POST /v1/completions. `prompt` is a text, a list of token ids, or a list of either."""

    neutral: ClassVar[dict[str, object]] = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "suffix": None,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
    }

    prompt: str | list[int] | list[str] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Self:
        total = prompt_tokens + completion_tokens
        return cls(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)


class Choice(BaseModel):
    index: int
    finish_reason: FinishReason | None
    logprobs: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Choice):
    message: AssistantMessage


class ChatChunkChoice(Choice):
    delta: dict[str, str]


class CompletionChoice(Choice):
    text: str


class Reply(BaseModel):
    """A complete answer, or one event of a streamed answer; `object` is the kind."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: Sequence[SerializeAsAny[Choice]]
    usage: Usage | None = None


class ModelEntry(BaseModel):
    """One entry of GET /v1/models. `digest` is the adapter's; the base has only its `base_fingerprint`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ft_service"] = "ft_service"
    root: str
    parent: str | None
    base_fingerprint: str
    digest: str | None
    record: dict[str, Any] | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]
    has_more: Literal[False] = False
