"""Inputs of a plan other than spec and base: dataset statistics and available resources."""

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ft_service.catalog.gpus import GPUS_PER_NODE


class DatasetFacts(BaseModel):
    """Statistics of a prepared dataset, for plan and report. Counts are of the training split unless named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(description="Digest of sources, tokenizer, format and packing; the dataset's folder name.")
    exact: bool = Field(default=True, description="False if the counts are scaled up from a sample.")
    conversations: int = Field(description="Usable training conversations (examples).")
    rows: int = Field(description="Packed training rows.")
    tokens: int
    loss_tokens: int = Field(description="Tokens that the loss is computed on.")
    truncated: int = Field(description="Examples truncated at data.max_seq_len.")
    validation_conversations: int = 0
    validation_rows: int = 0
    validation_tokens: int = 0
    validation_loss_tokens: int = 0


class BaseFacts(BaseModel):
    """What the files of the base say, for checks of the spec. None: unknown; `unchecked` says why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_positions: int | None = Field(default=None, description="Longest sequence of the base, in tokens.")
    quantization: str | None = Field(
        default=None, description="Format of a checkpoint that is already quantised, such as gptq; None: it is not."
    )
    embedding_rows: int | None = Field(default=None, description="Token ids from 0 on that have an embedding.")
    tokens_beyond_embedding: dict[str, int] = Field(
        default_factory=dict, description="Token -> id, of the tokenizer's tokens without an embedding."
    )
    untrained_chat_tokens: tuple[str, ...] = Field(
        default=(), description="Tokens of the chat format whose rows look as if no training has changed them."
    )
    own_turns: str | None = Field(
        default=None, description="`SAMPLE_CONVERSATION` as the base's own chat template writes it."
    )
    unchecked: tuple[str, ...] = Field(default=(), description="What could not be read, and so is not checked.")


SAMPLE_CONVERSATION = ({"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"})
"""A base's own chat template is compared with the trained format on these turns."""


@dataclass(frozen=True)
class Resources:
    """What a run may use. None: unknown, and not checked."""

    num_gpus: int | None = None
    num_cpus: int | None = None
    gpu_memory_gib: float | None = None
    gpu_type: str | None = None
    gpus_per_node: int | None = None
    num_nodes: int | None = None
    host_memory_gib_per_node: float | None = None
    price_per_gpu_hour: float | None = None
    """US dollars."""

    def workers_per_node(self, num_workers: int, use_gpu: bool) -> int:
        """How many of the workers run on one node, one GPU each; on CPUs all of them."""
        if not use_gpu:
            return num_workers
        if self.gpus_per_node is not None:
            return min(num_workers, self.gpus_per_node)
        if self.num_nodes is not None:
            return math.ceil(num_workers / self.num_nodes)
        return min(num_workers, GPUS_PER_NODE)
