"""A run's folder on storage: what is written there, and when a run counts as complete.

<storage>/runs/<run id>/   spec.yaml  plan.json  dataset.json  status.json  events.jsonl  metrics.jsonl
                           weights/  checkpoints/  outcome.json  samples.json  report.html
"""

import secrets
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ft_service.errors import NotPublishedError
from ft_service.plan import RunPlan
from ft_service.registry import DatasetRef
from ft_service.spec import RunSpec, dump_run_spec
from ft_service.storage import Storage

State = Literal["preparing", "running", "recovering", "publishing", "succeeded", "failed"]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunStatus(_File):
    """Where a run stands (status.json)."""

    run_id: str
    state: State
    time: datetime = Field(description="When the run entered this state.")
    message: str = ""
    published: str | None = Field(default=None, description="Id of the adapter or model it published.")


class Outcome(_File):
    """What training ended with (outcome.json); the weights it names are what gets published."""

    weights: str = Field(description="Folder of the weights, below the run's.")
    steps: int = Field(description="Optimizer steps behind those weights.")
    steps_run: int
    final_loss: float = Field(description="Training loss of the run's last step.")
    validation_loss: float | None = Field(description="Validation loss of exactly these weights.")
    stopped_early: bool
    base_fingerprint: str


class RunFolder:
    """Reads and writes one run's files."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.storage = storage
        self.run_id = run_id
        self.path = f"runs/{run_id}"

    def status(self) -> RunStatus | None:
        """Where the run stands; None before it began."""
        file = f"{self.path}/status.json"
        return RunStatus.model_validate(self.storage.read_json(file)) if self.storage.exists(file) else None

    def enter(self, state: State, message: str = "", published: str | None = None) -> None:
        status = RunStatus(
            run_id=self.run_id, state=state, time=datetime.now(UTC), message=message, published=published
        )
        self.storage.write_json(f"{self.path}/status.json", status.model_dump(mode="json"))

    def write_plan(self, spec: RunSpec, plan: RunPlan, sources: list[DatasetRef]) -> None:
        self.storage.write_bytes(f"{self.path}/spec.yaml", dump_run_spec(spec).encode())
        self.storage.write_json(f"{self.path}/plan.json", plan.model_dump(mode="json"))
        facts = plan.dataset.model_dump(mode="json")
        self.storage.write_json(
            f"{self.path}/dataset.json", {**facts, "sources": [source.model_dump(mode="json") for source in sources]}
        )

    def plan(self) -> RunPlan:
        return RunPlan.model_validate(self.storage.read_json(f"{self.path}/plan.json"))

    def sources(self) -> list[DatasetRef]:
        dataset = self.storage.read_json(f"{self.path}/dataset.json")
        return [DatasetRef.model_validate(source) for source in dataset["sources"]]

    def write_outcome(self, outcome: Outcome) -> None:
        self.storage.write_json(f"{self.path}/outcome.json", outcome.model_dump(mode="json"))

    def outcome(self) -> Outcome:
        return Outcome.model_validate(self.storage.read_json(f"{self.path}/outcome.json"))


def new_run_id(name: str) -> str:
    """``<name>-<8 hex>``"""
    return f"{name}-{secrets.token_hex(4)}"


def find_run(storage: Storage, run_id: str) -> RunFolder:
    """The run of that id; raises `NotPublishedError` with the ids there are."""
    known = storage.folders("runs")
    if run_id not in known:
        raise NotPublishedError(
            f"run = {run_id!r}: not on {storage.root}. Runs there: {', '.join(known) or 'none yet'}."
        )
    return RunFolder(storage, run_id)
