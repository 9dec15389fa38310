"""The interface of an engine: token ids and an adapter in, pieces of text out.

A request holds everything an engine needs, and an engine keeps no state between requests. So an engine that batches, or
one built on vLLM, can replace another one without a change to routes or wire types.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from ft_service.registry.registry import AdapterRecord

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue, by the base (`adapter` None) or by exactly the weights that the record names."""

    prompt_ids: list[int]
    adapter: AdapterRecord | None
    max_tokens: int
    end_ids: frozenset[int]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of the answer: the text, possibly empty, of new tokens. Only the last piece has a `finish_reason`."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """One base model that answers alone or with any adapter published for it."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    end_ids: frozenset[int]
    """Token ids that end a text, from the base's generation config."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Stream the continuation. Closing the generator stops decoding.

        Loads the adapter if needed. Raises `ServingError` before the first chunk when the adapter's files are damaged
        or do not fit the base. Never answers with other weights than the requested ones.
        """
        ...
