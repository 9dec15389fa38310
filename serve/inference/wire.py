"""OpenAI's wire shapes of the inference API: what clients send, and what they get.

Nothing that changes the answer is ignored. A parameter that is not known, or has a value that is not supported, is
refused by name; what cannot change an answer, or asks for the default, is accepted.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializeAsAny,
    model_validator,
)

from serve.http.errors import ApiError

MAX_STOP_TEXTS = 32
MAX_TOP_LOGPROBS = 20
FinishReason = Literal["stop", "length", "tool_calls"]
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list that reports its first wrong item only. An error for each of a million items takes seconds, in which the whole
process stands still."""
MAX_BIASED_TOKENS = 1024
ANY_OBJECT = "{}"
"""The JSON schema that stands for any object, in `ResponseFormat.schema_text`."""
TokenIds = Items[Annotated[int, Field(ge=0)]]


def _few_tokens(bias: object) -> object:
    """Checked before the items: each wrong one is an error of its own (see `Items`)."""
    if isinstance(bias, dict) and len(bias) > MAX_BIASED_TOKENS:
        raise ValueError(f"has {len(bias)} tokens, and at most {MAX_BIASED_TOKENS} are allowed")
    return bias


class _FromClient(BaseModel):
    """What clients send. Any parameter that is not a field is rejected, unless it cannot change the answer.

    Parameters in `without_effect` may have any value; those in `neutral` only the values given there. Errors name an
    object within a body by its `parent`, the parameter that it belongs to.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    without_effect: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}
    parent: ClassVar[str | None] = None

    @model_validator(mode="after")
    def _reject_unsupported_parameters(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in self.without_effect or value is None:
                continue
            if name not in self.neutral:
                message = f"Unknown parameter: {name[:100]!r}{f' in {self.parent}' * bool(self.parent)}. Leave it out."
                raise ApiError(400, message, "unknown_parameter", self.parent or name[:100])
            if not any(value == default and type(value) is type(default) for default in self.neutral[name]):
                defaults = " or ".join(json.dumps(default) for default in self.neutral[name])
                path = f"{self.parent}.{name}" if self.parent else name
                message = f"{path} = {json.dumps(value)[:200]} is not supported. Leave it out, or send {defaults}."
                raise ApiError(400, message, "unsupported_parameter", self.parent or name)
        return self


class StreamOptions(_FromClient):
    parent = "stream_options"
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {"continuous_usage_stats": (False,)}

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(_FromClient):
    parent = "response_format"

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Either value is right: every answer follows the schema."""


class ResponseFormat(_FromClient):
    parent = "response_format"

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('a json_schema belongs to type "json_schema", and to no other')
        return self

    @property
    def schema_text(self) -> str | None:
        """None for text."""
        if self.type == "text":
            return None
        return json.dumps(self.json_schema.schema_) if self.json_schema else ANY_OBJECT


class GenerationParameters(_FromClient):
    """Parameters of both completion calls. `null` means the default everywhere."""

    without_effect = frozenset(
        {
            "user",
            "metadata",
            "store",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "service_tier",
            "chat_id",  # Open WebUI
            "session_id",
            "request_id",
            "priority",
            "cache_salt",  # vLLM's; here no cache is shared in a way that changes an answer
        }
    )
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "min_tokens": (0,),
        "ignore_eos": (False,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True, False),
        "include_stop_str_in_output": (False,),
        "truncate_prompt_tokens": (-1,),
        "typical_p": (1, 1.0),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "stop_token_ids": ([],),
        "bad_words": ([],),
        "detokenize": (True,),
        "return_token_ids": (False,),
        "include_reasoning": (True, False),
    }

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_tokens)
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(max_length=1024)] | Items[Annotated[str, Field(max_length=1024)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _few_stop_texts(self) -> Self:
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOP_TEXTS:
            message = f"stop has {len(self.stop)} texts. Send at most {MAX_STOP_TEXTS}."
            raise ApiError(400, message, "invalid_value", "stop")
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Function(_FromClient):
    parent = "tools"

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Whether a call follows `parameters` for certain, also where the model may choose to answer with text."""


class Tool(_FromClient):
    parent = "tools"
    without_effect = frozenset({"cache_control"})

    type: Literal["function"]
    function: Function
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_what_was_given(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        tool = read(data)
        tool._given = data
        return tool

    @property
    def given(self) -> dict[str, Any]:
        """As the client wrote it, with its order of fields: so it is shown to the model."""
        return self._given


class NamedFunction(_FromClient):
    parent = "tool_choice"

    name: str


class NamedTool(_FromClient):
    parent = "tool_choice"

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(GenerationParameters):
    """POST /v1/chat/completions. `messages` are read by `ft_service.data.turns`, as in training."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        **GenerationParameters.neutral,
        "best_of": (1,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "echo": (False,),
    }

    messages: Items[dict[str, Any]] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """Either value is right: Llama 3.1 calls one function in a turn."""

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs needs logprobs = true."
            raise ApiError(400, message, "invalid_value", "top_logprobs")
        return self


class CompletionRequest(GenerationParameters):
    """POST /v1/completions. `prompt` is a text, a list of token ids, or a list of either."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        **GenerationParameters.neutral,
        "suffix": ("",),
        "add_special_tokens": (True,),
    }

    prompt: str | TokenIds | Items[str] | Items[TokenIds]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            message = f"best_of = {self.best_of} is not supported. Leave it out, or send the value of n."
            raise ApiError(400, message, "unsupported_parameter", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens = 0 needs echo = true. Send at least 1.", "invalid_value", "max_tokens")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


# -- replies -----------------------------------------------------------------------------------------------------------


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Self:
        total = prompt_tokens + completion_tokens
        details = PromptDetails(cached_tokens=cached_tokens)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=total,
            prompt_tokens_details=details,
        )


class ChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenWithTop(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenWithTop]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Choice(BaseModel):
    index: int
    finish_reason: FinishReason | None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None


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
    """One entry of GET /v1/models. `digest` is the adapter's; a base has only its `base_fingerprint`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ft_service"] = "ft_service"
    root: str
    parent: str | None
    base_fingerprint: str
    base_precision: str
    max_model_len: int
    """Tokens of prompt and answer together (vLLM's name for it)."""
    digest: str | None
    record: dict[str, Any] | None
    note: str | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]
    has_more: Literal[False] = False


class DeletedModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


# -- tokens ------------------------------------------------------------------------------------------------------------


class TokenizeRequest(_FromClient):
    """POST /tokenize, in vLLM's shape: a text, or a conversation. `model` may be left out if there is one base."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
    }

    model: str | None = None
    prompt: str | None = None
    messages: Items[dict[str, Any]] | None = None
    tools: Items[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "Send either prompt or messages.", "invalid_value", "prompt")
        return self


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(_FromClient):
    """POST /detokenize, in vLLM's shape."""

    model: str | None = None
    tokens: TokenIds


class DetokenizeReply(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """GET /tokenizer_info, in vLLM's shape; lm-eval reads it."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None
