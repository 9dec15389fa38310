"""RunPlan: what was decided. A pure function of spec, dataset facts, the base's shape and the resources."""

from pydantic import BaseModel, ConfigDict, Field


class DatasetFacts(BaseModel):
    """What the plan and the report need to know of a prepared dataset. Counts are of the training split unless named."""

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
