"""The interface of an engine: token ids and an adapter in, pieces of text out. Knows no HTTP and no Ray.

A request holds everything that an engine needs, and an answer depends on its request alone: not on what else is in the
batch, nor on requests before it. So engines can be exchanged without a change to routes or wire types.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ft_service.errors import ServingError
from ft_service.registry.registry import AdapterRecord

FinishReason = Literal["stop", "length"]


class RefusedRequestError(ServingError):
    """The request itself cannot be answered by this engine; `param` names what to change."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits. Applied in the order of the fields.

    The defaults leave the model's own distribution as it is.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or answer, multiplies negative ones (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit, once for every time it is in the answer (OpenAI's definition)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that is in the answer (OpenAI's definition)."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Only the `top_k` most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least this probable relative to the most likely one."""
    seed: int | None = None
    """Same seed, same answer; None draws one."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue, by the base (`adapter` None) or by exactly the weights that the record names."""

    id: str
    """Of the HTTP request, for logs."""
    prompt_ids: tuple[int, ...]
    adapter: AdapterRecord | None
    max_tokens: int | None
    """None: as many as context and cache have room for. 0 only scores the prompt; see `prompt_logprobs`."""
    end_ids: frozenset[int]
    """Token ids that end the answer; they are not part of its text."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it."""
    logprobs: int | None = None
    """None: no log-probabilities. Otherwise those of the answer's tokens, each with that many most likely tokens."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens."""
    json_schema: str | None = None
    """The answer must be JSON of this schema; ``{}`` stands for any JSON object."""
    text_allowed: bool = False
    """Beside `json_schema`: the answer may also be text, which does not begin with ``{``."""
    whole: bool = False
    """Nobody reads the answer before its end: all that follows the first chunk may come as one."""
    traceparent: str = ""
    """W3C trace context that the engine's span continues; empty without tracing."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability under the model itself: before temperature, penalties and limits."""

    token_id: int
    text: bytes
    """What the token decodes to; may be part of a character."""
    logprob: float
    top: tuple["TokenLogprob", ...] = ()
    """The most likely tokens at this place, most likely first."""


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of the answer. Only the last one has a `finish_reason`."""

    text: str
    """Text that is final by now; empty while a character or a possible stop text is incomplete."""
    token_ids: tuple[int, ...]
    """Tokens generated since the last chunk, an end token included."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of `token_ids`, where asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """Of the prompt where asked for, in the first chunk. The first token has nothing before it: None."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were in the prefix cache; in the first chunk."""
    queued_seconds: float | None = None
    """From the request's arrival at the engine to its first step: it waits for its adapter, and for a place in the
    batch. In the first chunk; None where the engine does not know."""


@dataclass(frozen=True)
class EngineInfo:
    """Facts about a loaded base, which do not change."""

    engine: str
    """`transformers` or `vllm`, with its version."""
    base_fingerprint: str
    dtype: str
    """What the base computes in: `bfloat16`, `float32`, ..."""
    precision: str
    """How the base's weights are stored: `bf16`, `fp32`, `nf4`, ..."""
    context_length: int
    vocab_size: int
    end_ids: frozenset[int]
    """Token ids that end a text, from the base's generation config."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine does at this moment."""

    running: int
    """Requests in the batch."""
    waiting: int
    cache_used: float
    """Share of the key/value cache that requests hold, 0 to 1."""
    loaded_adapters: tuple[str, ...]
    """Digests, most recently used last."""
    adapter_bytes: int
    counters: Mapping[str, float]
    """Totals since the start: `prompt_tokens`, `cached_tokens`, `generated_tokens`, `steps`, `adapter_loads`,
    `adapter_load_seconds`, `preemptions`."""


class Engine(Protocol):
    """One base model that answers alone or with any adapter published for it."""

    info: EngineInfo

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Stream the continuation. Closing the generator removes the request from the batch at once.

        Loads the adapter if needed. Raises `ServingError` when the adapter's files are damaged, do not fit the base or
        contain values that are not finite, and when a logit is not finite; `StorageError` when the storage does not
        give them. Never answers with other weights than the requested ones. Raises `RefusedRequestError` for what it
        cannot do: a JSON schema that it cannot follow, a prompt that its cache can never hold.
        """
        ...

    async def unload(self, adapter_digest: str) -> None:
        """Drop an adapter's weights once the requests that use it have ended. One that is not loaded is no error."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """End the requests in flight and free the memory."""
        ...
