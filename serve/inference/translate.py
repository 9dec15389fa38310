"""From the wire to the engine: which model, which token ids, when to stop. All that is wrong is a 400 with its name."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ft_service.chat.format import ChatFormat, Message
from ft_service.data.bad_record import BadRecord
from ft_service.data.turns import read_any_turns
from ft_service.errors import ModelError
from serve.engines.engine import GenerationRequest, Sampling
from serve.http.errors import ApiError
from serve.inference.models import ServedModel, ServedModels
from serve.inference.tokens import BaseTokens
from serve.inference.tools import answer_constraint
from serve.inference.wire import ChatRequest, CompletionRequest, GenerationParameters, NamedTool, Tool
from serve.settings import Limits

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat may fill the context."""
_SEEDS = 2**63


@dataclass(frozen=True)
class Generation:
    """A translated request: the model, and one engine request for each choice, `n` for each prompt."""

    model: ServedModel
    tokens: BaseTokens
    requests: list[GenerationRequest]
    prompt_tokens: int
    """Of all prompts, each counted once."""
    choices_per_prompt: int = 1
    tools: tuple[Tool, ...] = ()
    """Functions that an answer may call."""
    schema_is_of_tools: bool = False
    """Whether the JSON schema of the requests comes from `tools`, and not from `response_format`."""
    echoed: tuple[str, ...] = ()
    """With `echo`, the text of each choice's prompt."""

    @property
    def most_tokens(self) -> int:
        """Tokens of prompts and answers, if every answer is as long as it may be."""
        context = self.model.base.context_length
        answers = (
            context - len(request.prompt_ids) if request.max_tokens is None else request.max_tokens
            for request in self.requests
        )
        return self.prompt_tokens + sum(answers)


class Translator:
    """Translates requests for all models of a server."""

    def __init__(self, models: ServedModels, limits: Limits) -> None:
        self._limits = limits
        self._tokens = {base.name: BaseTokens(base) for base in models.bases}

    def tokens(self, model: ServedModel) -> BaseTokens:
        """Those of a full model are its parent's: training does not change a tokenizer."""
        return self._tokens[model.base.parent or model.base.name]

    def chat(self, request: ChatRequest, model: ServedModel, request_id: str) -> Generation:
        tokens = self.tokens(model)
        tools = _offered_tools(request)
        messages = read_messages(request.messages, tools)
        chat = chat_format(model, tokens, with_tools=any(message.uses_tools for message in messages))
        _check_length([text for message in messages for text in message.functions], tokens, "tools")
        texts = [text for message in messages for text in (message.content, *message.functions)]
        _check_length(texts, tokens, "messages")
        prompt_ids = tokens.chat_ids(messages)
        end_ids = frozenset(model.adapter.end_of_turn_ids if model.adapter else chat.end_of_turn_ids)
        generation = self._generation(
            model,
            prompt_ids,
            request.max_completion_tokens or request.max_tokens,
            end_ids,
            request,
            "messages",
            request_id,
        )
        if request.logprobs:
            generation = replace(generation, logprobs=request.top_logprobs or 0)
        constraint = answer_constraint(tools, request.tool_choice, generation.json_schema)
        if constraint is not None:
            generation = replace(generation, json_schema=constraint.json_schema, text_allowed=constraint.text_allowed)
        requests = self._choices([generation], request)
        return Generation(
            model,
            tokens,
            requests,
            len(prompt_ids),
            request.n or 1,
            tools=tuple(tools),
            schema_is_of_tools=constraint is not None and constraint.from_tools,
        )

    def completion(self, request: CompletionRequest, model: ServedModel, request_id: str) -> Generation:
        tokens = self.tokens(model)
        end_ids = frozenset(model.adapter.end_of_turn_ids if model.adapter else ())
        max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        if not request.prompts:
            raise ApiError(400, "prompt is an empty list. Send a text or token ids.", "invalid_value", "prompt")
        self._check_choices(len(request.prompts), request)
        generations = []
        for prompt in request.prompts:
            ids = self._prompt_ids(prompt, tokens)
            one = self._generation(model, ids, max_tokens, end_ids, request, "prompt", request_id)
            if request.logprobs is not None:
                one = replace(
                    one, logprobs=request.logprobs, prompt_logprobs=request.logprobs if request.echo else None
                )
            generations.append(one)
        echoed = [
            prompt if isinstance(prompt, str) else tokens.text(prompt)
            for prompt in (request.prompts if request.echo else [])
            for _ in range(request.n or 1)
        ]
        num_prompt_tokens = sum(len(generation.prompt_ids) for generation in generations)
        requests = self._choices(generations, request)
        return Generation(model, tokens, requests, num_prompt_tokens, request.n or 1, echoed=tuple(echoed))

    def _choices(
        self, generations: Sequence[GenerationRequest], request: GenerationParameters
    ) -> list[GenerationRequest]:
        """`n` requests for each prompt; each choice has a seed of its own, the first one that of the request."""
        self._check_choices(len(generations), request)
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
        return [
            replace(generation, sampling=replace(generation.sampling, seed=(seed + number) % _SEEDS))
            for generation in generations
            for number in range(request.n or 1)
        ]

    def _check_choices(self, prompts: int, request: GenerationParameters) -> None:
        choices = prompts * (request.n or 1)
        if choices > self._limits.max_choices:
            message = (
                f"The request asks for {choices} answers ({prompts} prompts, n = {request.n or 1}); this server gives "
                f"at most {self._limits.max_choices} at once. Send several requests."
            )
            raise ApiError(400, message, "invalid_value", "n" if prompts == 1 else "prompt")

    def _prompt_ids(self, prompt: str | list[int], tokens: BaseTokens) -> list[int]:
        if isinstance(prompt, str):
            _check_length([prompt], tokens, "prompt")
            return tokens.prompt_ids(prompt)
        _check_ids(prompt, tokens, "prompt")
        return prompt

    def _generation(
        self,
        model: ServedModel,
        prompt_ids: list[int],
        max_tokens: int | None,
        end_ids: frozenset[int],
        request: GenerationParameters,
        param: str,
        request_id: str,
    ) -> GenerationRequest:
        context = model.base.context_length
        if not prompt_ids:
            raise ApiError(400, f"{param} is empty. Send at least one token.", "invalid_value", param)
        needed = 1 if max_tokens is None else max_tokens
        if len(prompt_ids) + needed > context:
            raise _too_long(f"has {len(prompt_ids)} in the {param} and {needed} to generate", context, param)
        tokens = self.tokens(model)
        if request.logit_bias:
            _check_ids(list(request.logit_bias), tokens, "logit_bias")
        return GenerationRequest(
            id=request_id,
            prompt_ids=tuple(prompt_ids),
            adapter=model.adapter,
            max_tokens=max_tokens,
            end_ids=end_ids | model.base.end_ids | tokens.special_tokens(request.stop_texts),
            sampling=_sampling(request),
            stop=request.stop_texts,
            json_schema=request.response_format.schema_text if request.response_format else None,
            whole=not request.stream,
        )


def read_messages(messages: list[dict[str, object]], tools: Sequence[Tool]) -> tuple[Message, ...]:
    """The conversation as training reads it. Raises `ApiError` for what the chat template cannot write."""
    turns = [{**message, "role": "system"} if message.get("role") == "developer" else message for message in messages]
    if unread := sorted({name for message in turns for name in message} - _MESSAGE_FIELDS):
        message = f"messages have the unknown field {unread[0][:100]!r}. Leave it out."
        raise ApiError(400, message, "unknown_parameter", "messages")
    try:
        return read_any_turns(
            [_answer_fields_removed(turn) for turn in turns],
            [tool.given for tool in tools],
            allow_image_marks=True,  # a question about HTML or a prompt format is text
        )
    except BadRecord as error:
        raise ApiError(400, f"messages: {error}.", "invalid_value", "messages") from None


_MESSAGE_FIELDS = frozenset(
    {"role", "content", "tool_calls", "function_call", "tool_call_id", "name"}
    | {"refusal", "annotations", "audio", "reasoning", "reasoning_content"}
)
"""Of a turn; the second line has those that clients copy from an earlier answer."""


def _answer_fields_removed(turn: dict[str, object]) -> dict[str, object]:
    for name in ("refusal", "audio", "reasoning", "reasoning_content"):
        if turn.get(name):
            message = f"messages: {name} is not supported. Leave it out, or send null."
            raise ApiError(400, message, "unsupported_parameter", "messages")
    kept = {name: value for name, value in turn.items() if name in ("role", "content", "tool_call_id")}
    for name in ("tool_calls", "function_call"):
        if turn.get(name):
            kept[name] = turn[name]
    if turn.get("content") is None and "tool_calls" not in kept and "function_call" not in kept:
        role = turn.get("role")
        raise ApiError(400, f"messages: a {role} turn has no content. Send a text.", "invalid_value", "messages")
    return kept


def chat_format(model: ServedModel, tokens: BaseTokens, with_tools: bool) -> ChatFormat:
    """The chat format, if it is the one that the model was trained with. Raises `ApiError`."""
    try:
        chat = tokens.chat
    except ModelError as error:
        message = f"{model.base.name} has no chat format: {error} Use /v1/completions."
        raise ApiError(400, message, "chat_not_supported", "model") from None
    if model.adapter is None or model.adapter.chat_template_digest == chat.template_digest:
        return chat
    trained_with = model.adapter.chat_template_digest
    if with_tools or not chat.agrees_without_tools(trained_with):
        message = (
            f"{model.id} was trained with the chat template {trained_with[:8]}, and this server has "
            f"{chat.template_digest[:8]}. Use /v1/completions, or the server's version that trained it."
        )
        raise ApiError(400, message, "chat_template_mismatch", "model")
    return chat


def _offered_tools(request: ChatRequest) -> list[Tool]:
    tools = request.tools or []
    is_forced = isinstance(request.tool_choice, NamedTool) or request.tool_choice == "required"
    if is_forced:
        named = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
        if not tools or (named and named not in {tool.function.name for tool in tools}):
            missing = f"the function {named!r}" if named else "at least one function"
            message = f"tool_choice needs {missing} in tools."
            raise ApiError(400, message, "invalid_value", "tool_choice")
    format_type = request.response_format.type if request.response_format else "text"
    if is_forced and format_type != "text":
        message = "tool_choice asks for a call and response_format for another answer. Leave one of them out."
        raise ApiError(400, message, "invalid_value", "tool_choice")
    if request.tool_choice != "none" and format_type == "json_object" and any(tool.function.strict for tool in tools):
        message = (
            "tools: strict = true cannot be kept beside response_format json_object, which allows any call. Send a "
            "json_schema, or strict = false."
        )
        raise ApiError(400, message, "unsupported_parameter", "tools")
    return [] if request.tool_choice == "none" else tools


def _sampling(request: GenerationParameters) -> Sampling:
    default = Sampling()

    def given(name: str) -> float:
        value = getattr(request, name)
        return getattr(default, name) if value is None else value

    return Sampling(
        logit_bias=request.logit_bias or {},
        repetition_penalty=given("repetition_penalty"),
        frequency_penalty=given("frequency_penalty"),
        presence_penalty=given("presence_penalty"),
        temperature=given("temperature"),
        top_k=max(0, request.top_k or 0),  # -1 is another word for all
        top_p=given("top_p"),
        min_p=given("min_p"),
    )


def _check_length(texts: Sequence[str], tokens: BaseTokens, param: str) -> None:
    """Refuse before encoding what cannot fit, however well it is encoded."""
    context = tokens.base.context_length
    if tokens.exceeds(texts, context):
        characters = sum(len(text) for text in texts)
        raise _too_long(f"has {characters} characters in the {param}, which are more tokens", context, param)


def _too_long(what: str, context: int, param: str) -> ApiError:
    message = (
        f"This model's context length is {context} tokens; the request {what}. Shorten the {param} or lower max_tokens."
    )
    return ApiError(400, message, "context_length_exceeded", param)


def _check_ids(ids: Sequence[int], tokens: BaseTokens, param: str) -> None:
    size = tokens.base.vocab_size
    if (largest := max(ids, default=0)) >= size:
        message = f"{param} contains the token id {largest}; this model has ids 0 to {size - 1}."
        raise ApiError(400, message, "invalid_value", param)
