"""RunPlan: the resolved numbers of a run. Training reads the plan and decides nothing itself."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ft_service.plan.facts import BaseFacts, DatasetFacts
from ft_service.plan.memory import MIN_STAGING_BYTES
from ft_service.spec.schema import RunSpec
from ft_service.storage.formats import StoredFile, renamed

LAYOUT_SETTINGS = {"micro_batch_size", "activation_checkpointing"}
"""Settings of the section `train` that do not affect the result."""


class Estimate(BaseModel):
    """Time and cost of a run, from datasheets and an assumed MFU: for budgeting, not a measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu_type: str
    mfu: float = Field(description="Assumed fraction of the peak rate, of all executed FLOPs.")
    mfu_source: str
    tokens_per_second: float = Field(description="Over all workers, on rows of the data's average length.")
    tokens_per_second_per_gpu: float
    seconds_per_step: float
    compute_share: float = Field(
        description="Share of a step; the rest is communication and offloading that does not overlap with it."
    )
    communication_share: float
    offload_share: float
    seconds_per_epoch: float
    seconds: float = Field(description="The whole run with its validations, without loading and waiting.")
    gpu_hours: float
    cost_usd: float | None


class Extension(BaseModel):
    """Another number of steps than planned before, from a step on: more, or fewer.

    The steps up to it keep their learning rates and batches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = Field(description="Step of the checkpoint that the training continues from.")
    num_steps: int = Field(description="Steps that were planned before.")
    training_digest: str = Field(description="RunPlan.training_digest of the plan before.")

    def moving_steps(self, num_steps: int, warmup_steps: int) -> int:
        """Over how many steps the learning rate moves to the schedule of `num_steps`: as many as the warmup has."""
        return max(1, min(warmup_steps, num_steps - self.step))


_NAMES_IN_FORMAT_1 = {
    "said": "summary",
    "gpu_has_gib": "gpu_capacity_gib",
    "host_has_gib": "host_capacity_gib",
    "checkpointed_gib": "gpu_gib_with_checkpointing",
    "uncheckpointed_gib": "gpu_gib_without_checkpointing",
}


class RunPlan(StoredFile):
    """The numbers of a run (plan.json). `spec` is the request; the other fields hold the resolved values."""

    format: int = Field(default=3, description="Version of this file's layout.")
    spec: RunSpec
    dataset: DatasetFacts
    base_short_name: str
    base_facts: BaseFacts = Field(default_factory=BaseFacts, description="What the files of the base say.")
    parameters: int = Field(description="Number of parameters of the base.")
    trainable_parameters: int
    zero_stage: int
    micro_batch_size: int = Field(description="Packed rows per forward pass of one worker.")
    gradient_accumulation_steps: int
    global_batch_size: int
    num_steps: int = Field(description="Optimizer steps.")
    extensions: list[Extension] = Field(
        default_factory=list, description="How a resumed run was given more or fewer steps, oldest first."
    )
    epochs: float = Field(description="Passes over the training rows that the steps make.")
    warmup_steps: int
    learning_rate: float = Field(description="Peak learning rate.")
    activation_checkpointing: bool
    kept_layers: int = Field(
        default=0,
        description="With activation checkpointing: the last layers, which keep their activations all the same.",
    )
    offload: Literal["none", "cpu", "nvme"] = "none"
    hpz_partition_size: int = Field(
        default=1, description="Workers that share a second copy of the weights; 1: no copy."
    )
    workers_per_node: int = 1
    validate_every_steps: int | None
    tokens: int = Field(description="Training tokens of the whole run.")
    loss_tokens: int = Field(description="Loss tokens of the whole run.")
    memory_gib: dict[str, float] = Field(description="GiB on one GPU by component, with total; empty on CPU.")
    host_memory_gib: dict[str, float] = Field(
        default_factory=dict, description="GiB of main memory of one node by component, with total; empty on CPU."
    )
    checkpoint_staging_bytes: int = Field(
        default=MIN_STAGING_BYTES, description="Main memory of one worker for copies of a checkpoint, at most."
    )
    gpu_capacity_gib: float | None = Field(default=None, description="GiB of one GPU; None: unknown.")
    host_capacity_gib: float | None = Field(default=None, description="GiB of main memory of one node; None: unknown.")
    gpu_gib_with_checkpointing: float | None = Field(
        default=None, description="Needed GiB per GPU with activation checkpointing."
    )
    gpu_gib_without_checkpointing: float | None = Field(
        default=None, description="Needed GiB per GPU without activation checkpointing."
    )
    fits: bool | None = Field(default=None, description="None: unknown.")
    estimate: Estimate | None = Field(
        default=None, description="Time and cost; None on CPU, on unknown GPUs, and if the run does not fit."
    )
    summary: list[str] = Field(description="The plan in sentences.")
    reasons: list[str] = Field(default_factory=list, description="Why, for each setting that the spec leaves at auto.")
    advice: list[str] = Field(default_factory=list, description="What would fit, if this does not.")
    warnings: list[str]
    remarks: list[str]

    @classmethod
    def upgraded(cls, data: dict[str, Any], written: int) -> dict[str, Any]:
        # Format 3 added kept_layers and checkpoint_staging_bytes, whose defaults are what format 2 did.
        return renamed(data, _NAMES_IN_FORMAT_1) if written == 1 else data

    @property
    def training_digest(self) -> str:
        """SHA-256 of what determines the result: not the hardware, the number of workers, or the layout on them."""
        determining: dict[str, object] = {
            "model": self.spec.model.model_dump(mode="json"),
            "method": self.spec.method.model_dump(mode="json"),
            "train": self.spec.train.model_dump(mode="json", exclude=LAYOUT_SETTINGS),
            "dataset": self.dataset.digest,
            "steps": [self.num_steps, self.warmup_steps, self.learning_rate, self.validate_every_steps],
        }
        if self.extensions:
            determining["extensions"] = [[extension.step, extension.num_steps] for extension in self.extensions]
        return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()

    def continues(self, training_digest: str, step: int) -> bool:
        """Whether training by this plan continues a checkpoint of `step` that was saved under `training_digest`."""
        return training_digest == self.training_digest or any(
            training_digest == extension.training_digest and step <= extension.step for extension in self.extensions
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
