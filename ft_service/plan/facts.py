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
