"""What a plan is made from, beside spec and base: facts of the dataset, and the resources there are."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class DatasetFacts(BaseModel):
    """What plan and report need to know of a prepared dataset. Counts are of the training split unless named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(description="Digest of sources, tokenizer, format and packing; the dataset's folder name.")
    exact: bool = Field(default=True, description="False where the figures were scaled up from a sample.")
    conversations: int = Field(description="Usable training conversations (examples).")
    rows: int = Field(description="Packed training rows.")
    tokens: int
    loss_tokens: int = Field(description="Tokens whose prediction is trained.")
    truncated: int = Field(description="Examples cut at data.max_seq_len.")
    validation_conversations: int = 0
    validation_rows: int = 0
    validation_tokens: int = 0
    validation_loss_tokens: int = 0


@dataclass(frozen=True)
class Resources:
    """What a run may use. None means not known, and is not judged."""

    num_gpus: int | None = None
    num_cpus: int | None = None
    gpu_memory_gib: float | None = None
    gpu_type: str | None = None
    gpus_per_node: int | None = None
    num_nodes: int | None = None
    host_memory_gib_per_node: float | None = None
    price_per_gpu_hour: float | None = None
    """US dollars."""
