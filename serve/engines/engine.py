"""What an engine is: token ids and an adapter in, pieces of text out.

An engine is told everything by the request and keeps nothing between two of them, so one that batches, or one built on
vLLM, takes the place of another without a change to routes or wire types.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from ft_service.registry.registry import AdapterRecord

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. `adapter` None asks the base; the record names the exact weights otherwise."""

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
    """A piece of the answer: new text, possibly empty, of new tokens. The last one alone says why it ends."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """One base model that answers alone or through any adapter published for it."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    end_ids: frozenset[int]
    """Token ids that end a text of the base, by its generation config."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Stream the continuation; closing the generator stops the decoding.

        Loads the adapter if need be, and raises `ServingError` before the first chunk when its files are damaged or do
        not fit the base. It never answers with other weights than those asked for.
        """
        ...
