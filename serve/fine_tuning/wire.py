"""Types of the fine-tuning API's requests and replies."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.fine_tuning.job_states import State

Auto = Literal["auto"]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RequestedHyperparameters(_Request):
    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto | None = None
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0)] | Auto | None = None


class RequestedSupervised(_Request):
    hyperparameters: RequestedHyperparameters | None = None


class RequestedMethod(_Request):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: RequestedSupervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class RequestedWandb(_Request):
    project: str = Field(min_length=1)
    entity: str | None = Field(default=None, min_length=1, max_length=200)
    name: str | None = Field(default=None, min_length=1, max_length=200)
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] | None = Field(default=None, max_length=50)


class RequestedIntegration(_Request):
    type: Literal["wandb"]
    wandb: RequestedWandb


class FineTuningJobRequest(_Request):
    model: str = Field(min_length=1, max_length=500)
    training_file: str = Field(min_length=1, max_length=500)
    validation_file: str | None = Field(default=None, max_length=500)
    suffix: str | None = Field(default=None, min_length=1, max_length=64)
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    metadata: Metadata | None = Field(default=None, max_length=16)
    integrations: list[RequestedIntegration] | None = None
    method: RequestedMethod | None = None
    hyperparameters: RequestedHyperparameters | None = None

    @model_validator(mode="after")
    def _one_place_of_hyperparameters(self) -> "FineTuningJobRequest":
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("hyperparameters conflicts with method. Send only method.supervised.hyperparameters")
        return self


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class Hyperparameters(BaseModel):
    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


class SupervisedMethod(BaseModel):
    hyperparameters: Hyperparameters


class Method(BaseModel):
    type: Literal["supervised"]
    supervised: SupervisedMethod


class Wandb(BaseModel):
    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(BaseModel):
    type: Literal["wandb"]
    wandb: Wandb


class Waiting(BaseModel):
    """What a job waits for. Not of OpenAI's API; its clients pass it on."""

    place: int | None = Field(default=None, description="Among the waiting runs of the cluster, from 1.")
    waits_for: str
    since: int
    estimated_start: int | None = None


class FineTuningJob(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: Hyperparameters
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: State
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Integration]
    metadata: dict[str, str]
    method: Method
    status_details: str | None = Field(default=None, description="In sentences, what a job waits for and how long.")
    waiting: Waiting | None = None


class FineTuningJobEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any]
    type: Literal["message", "metrics"]


class CheckpointMetrics(BaseModel):
    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class FineTuningJobCheckpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int
