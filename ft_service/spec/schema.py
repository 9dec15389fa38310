"""RunSpec: the settings of a training run. Each field is a type, a bound and one sentence.

`rules.py` checks settings against each other; `load.py` reads a spec from YAML.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

RUN_NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$"

PositiveInt = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Section):
    """The base model to fine-tune."""

    base: str = Field(
        min_length=1,
        description="Hub id, or a Llama-architecture checkpoint (safetensors): a folder, or a URI (s3://, gs://, az://).",
    )
    revision: str | None = Field(default=None, description="Hub revision: a branch, tag or commit. Only for hub ids.")


class MethodSpec(_Section):
    """How the base is trained. `lora_rank` and the fields below it are passed to `peft.LoraConfig` unchanged."""

    type: Literal["full", "lora", "qlora"] = Field(
        default="lora", description="full: all weights; lora: an adapter; qlora: an adapter on a 4-bit base."
    )
    lora_rank: PositiveInt = Field(default=16, description="Rank of the update: the width of the matrices A and B.")
    lora_alpha: PositiveInt = Field(default=32, description="The update is scaled by alpha / rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability on the input of A.")
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="'all-linear' (every linear layer except the head), module names, or a regular expression.",
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (rank-stabilised LoRA).")
    use_dora: bool = Field(default=False, description="Decompose the update into magnitude and direction (DoRA).")
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^(gaussian|olora|pissa(_niter_\d+)?)$")] = Field(
        default=True,
        description="Initial values of A and B: true (B = 0), 'gaussian', 'pissa', 'pissa_niter_16' or 'olora'.",
    )

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation moves part of the base weights into the adapter."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))


COLUMNS = ("instruction", "input", "output", "system", "messages", "text", "history", "tools")
OPTIONAL_COLUMNS = ("input", "system", "history", "tools")
FORMAT_COLUMNS = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "chat": ("messages", "system", "tools"),
    "text": ("text",),
}
"""The columns that each format reads."""


class DataSource(_Section):
    """A file or folder of records, with its origin and license."""

    path: str = Field(
        min_length=1,
        description="A .jsonl, .json, .csv or .parquet file, also at a URI (s3://, gs://, az://); a folder of them; or "
        "hub:NAME:SPLIT (hub:NAME:CONFIGURATION:SPLIT).",
    )
    format: Literal["alpaca", "chat", "text"] = Field(default="alpaca", description="Layout of a record.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Expected name -> name in the file. alpaca reads instruction, input, output, system, history; "
        "chat reads messages, system, tools; text reads text.",
    )
    source: str | None = Field(default=None, description="Where the data comes from; saved in the adapter's record.")
    license: str | None = Field(default=None, description="SPDX id of the license; saved in the adapter's record.")

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name, in_file in columns.items():
            if name not in COLUMNS:
                hint = f" Write the expected name first: {{{in_file}: {name}}}." if in_file in COLUMNS else ""
                raise ValueError(f"{name!r} is not a known column: {', '.join(COLUMNS)}.{hint}")
        return columns

    @model_validator(mode="after")
    def _format_reads_columns(self) -> Self:
        reads = FORMAT_COLUMNS[self.format]
        if unread := next((name for name in self.columns if name not in reads), None):
            raise ValueError(
                f"columns has {unread!r}, which the {self.format} format does not read. It reads {', '.join(reads)}."
            )
        return self


class ValidationFraction(_Section):
    """Hold out part of the training conversations."""

    fraction: float = Field(gt=0, lt=1, description="Share of the training conversations held out.")


def _validation_kind(value: object) -> str:
    return "sources" if isinstance(value, list) else "fraction"


ValidationData = Annotated[
    Annotated[ValidationFraction, Tag("fraction")] | Annotated[list[DataSource], Tag("sources")],
    Discriminator(_validation_kind),
]


class DataSpec(_Section):
    """The training, validation and evaluation data."""

    train: list[DataSource] = Field(min_length=1, description="Training sources, in order.")
    validation: ValidationData | None = Field(
        default=None, description="{fraction: 0.05}, or a list of sources. Without it no validation loss is measured."
    )
    evaluation: list[DataSource] = Field(
        default_factory=list,
        description="Evaluation sets. The data check reports training records that contain their questions.",
    )
    waive: dict[str, str] = Field(
        default_factory=dict,
        description="Code of a data-check finding -> why you accept it; saved in the adapter's record.",
    )
    max_seq_len: int = Field(default=2048, ge=8, le=131_072, description="Length of a packed row, in tokens.")
    packing: bool = Field(
        default=True, description="Pack several short examples into one row; they do not attend to each other."
    )


class EarlyStoppingSpec(_Section):
    """Stop when the validation loss no longer improves."""

    patience: PositiveInt = Field(description="Stop after this many validations in a row without improvement.")
    min_delta: float = Field(
        default=0.0, ge=0, description="Smallest decrease of the loss that counts as an improvement."
    )


class TrainSpec(_Section):
    """The optimizer, its schedule and its batches."""

    epochs: float | None = Field(default=None, gt=0, le=1000, description="Passes over the rows (default 3).")
    max_steps: PositiveInt | None = Field(default=None, description="Number of optimizer steps, instead of epochs.")
    global_batch_size: PositiveInt = Field(default=64, description="Packed rows per optimizer step, over all workers.")
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        default="auto", description="Packed rows per forward pass of one worker."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=1, description="Peak learning rate (default 2e-4 for LoRA and QLoRA, 1e-5 for full)."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Learning-rate schedule after the warmup."
    )
    min_learning_rate_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Final learning rate of cosine and linear, as a fraction of the peak."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, description="Fraction of the steps used for warmup.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's weight decay, on matrices only.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first decay rate.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's second decay rate.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Clip the global gradient norm to this; 0 disables clipping."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of row order, adapter initialisation and dropout.")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="Number format of weights and activations.")
    activation_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Recompute activations in the backward pass (auto: of all, some or no layers, what is fastest).",
    )
    validate_every_steps: PositiveInt | None = Field(
        default=None, description="Steps between validations (default: ten validations per run)."
    )
    early_stopping: EarlyStoppingSpec | None = Field(default=None, description="Stop when the validation loss stalls.")


class WorkerRange(_Section):
    """As many workers as the cluster has room for, within two bounds."""

    min: PositiveInt = Field(description="The run continues with as few as this many workers.")
    max: PositiveInt = Field(description="The run uses at most this many workers.")


def _workers_kind(value: object) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "count"


Workers = Annotated[
    Annotated[WorkerRange, Tag("range")] | Annotated[PositiveInt, Tag("count")], Discriminator(_workers_kind)
]


class ParallelSpec(_Section):
    """How the run is distributed over the cluster."""

    num_workers: Workers = Field(
        default=1,
        description="Training processes, one GPU each; with {min: 4, max: 8} a run survives the loss of a node.",
    )
    use_gpu: bool = Field(default=True, description="False trains on CPU, for small models and tests.")
    cpus_per_worker: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="CPUs to reserve and threads to use, per worker (auto: 1; with offloading, one CPU and as many "
        "threads as the node has cores for each of its workers).",
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        default="auto", description="DeepSpeed ZeRO stage: 1 shards the optimizer, 2 also gradients, 3 also weights."
    )
    offload: Literal["auto", "none", "cpu", "nvme"] = Field(
        default="auto",
        description="Where to keep the optimizer and, with ZeRO-3, the weights (auto: nvme only with nvme_path).",
    )
    hpz: Literal["auto"] | bool = Field(
        default="auto",
        description="Keep a second copy of the weights within each node (ZeRO++ hpZ; ZeRO-3 on several nodes).",
    )
    nvme_path: str | None = Field(default=None, description="Folder on a local NVMe drive; required by offload: nvme.")
    accelerator_type: str | None = Field(default=None, description="GPU type to request, by Ray's name, such as H100.")
    max_failures: int = Field(
        default=3, ge=0, description="How often failed workers are restarted from the newest checkpoint."
    )
    hang_timeout_seconds: PositiveInt = Field(
        default=600,
        description="A worker without progress for this many seconds saves its Python stacks and exits. Must exceed "
        "the slowest micro-step, validation batch, checkpoint or weight load, including the wait for slower workers.",
    )

    @property
    def reserved_cpus(self) -> int:
        """CPUs that Ray reserves for each worker."""
        return 1 if self.cpus_per_worker == "auto" else self.cpus_per_worker

    @property
    def max_workers(self) -> int:
        """The most workers that the run may use."""
        return self.num_workers.max if isinstance(self.num_workers, WorkerRange) else self.num_workers

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run may continue with."""
        return self.num_workers.min if isinstance(self.num_workers, WorkerRange) else self.num_workers


class CheckpointSpec(_Section):
    """Saving what a run needs in order to resume."""

    every_steps: PositiveInt | None = Field(default=50, description="Steps between checkpoints; null disables them.")
    keep: PositiveInt = Field(default=2, description="How many of the newest checkpoints to keep.")
    publish_epochs: int = Field(
        default=0, ge=0, le=100, description="Of the last epochs, publish so many adapters beside the best one."
    )
    on_failure: Literal["continue", "stop"] = Field(
        default="continue", description="What to do when a checkpoint or the best weights cannot be written."
    )


class ReportSpec(_Section):
    """What shows the run beside its metrics.jsonl."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list,
        description="Copy the metrics to tensorboard, wandb (Weights & Biases) or mlflow, while the run trains. "
        "Each needs its package.",
    )
    project: str = Field(default="ft-service", min_length=1, description="W&B's project, MLflow's experiment.")
    entity: str | None = Field(
        default=None, min_length=1, description="W&B's user or team (default: that of the API key)."
    )
    run_name: str | None = Field(
        default=None, min_length=1, description="Name of the run in W&B and MLflow (default: the run's id)."
    )
    tags: list[str] = Field(default_factory=list, description="Tags of the run in W&B and MLflow.")
    samples: int = Field(
        default=4, ge=0, le=64, description="Number of validation prompts to answer with base and adapter."
    )
    sample_max_tokens: PositiveInt = Field(default=128, description="Longest answer to a sample prompt, in tokens.")

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, data: object) -> object:
        # Specs and plans of version 0.1.0 have `tensorboard: true` or `false`.
        if not isinstance(data, dict) or not isinstance(data.get("tensorboard"), bool):
            return data
        others = {name: value for name, value in data.items() if name != "tensorboard"}
        return {"trackers": ["tensorboard"], **others} if data["tensorboard"] else others


Priority = Literal["low", "normal", "high"]


class QueueSpec(_Section):
    """The run's place in the queue of its cluster."""

    priority: Priority = Field(default="normal", description="Runs of a higher priority start first.")
    owner: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$",
        description="Whose run it is, for quotas and for a fair share (default: the user name of its driver).",
    )
    preemptible: bool = Field(
        default=False,
        description="A waiting run of higher priority may take this run's workers: it saves a checkpoint, waits, and "
        "continues.",
    )


class RunSpec(_Section):
    """One training run, as its author requested it."""

    name: str = Field(
        pattern=RUN_NAME_PATTERN, description="Lower-case letters, digits and dashes; at most 48 characters."
    )
    model: ModelSpec
    method: MethodSpec = Field(default_factory=MethodSpec)
    data: DataSpec
    train: TrainSpec = Field(default_factory=TrainSpec)
    parallel: ParallelSpec = Field(default_factory=ParallelSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    report: ReportSpec = Field(default_factory=ReportSpec)
    queue: QueueSpec = Field(default_factory=QueueSpec)
    storage: str = Field(min_length=1, description="A folder that all machines share, or a URI (s3://, gs://, az://).")

    @field_validator("name", mode="before")
    @classmethod
    def _name_is_text(cls, name: object) -> object:
        return str(name) if isinstance(name, int) else name

    def worker_counts(self) -> list[int]:
        """The allowed numbers of workers, largest first: those that divide the global batch evenly."""
        rows = self.train.micro_batch_size if isinstance(self.train.micro_batch_size, int) else 1
        counts = range(self.parallel.max_workers, self.parallel.min_workers - 1, -1)
        return [count for count in counts if self.train.global_batch_size % (rows * count) == 0]

    def with_workers(self, count: int) -> "RunSpec":
        """The same run on exactly `count` workers."""
        return self.model_copy(update={"parallel": self.parallel.model_copy(update={"num_workers": count})})
