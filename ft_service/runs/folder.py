"""A run's folder on storage: what is written there, and when a run counts as complete.

<storage>/runs/<run id>/   spec.yaml  gate.json  plan.json  dataset.json  status.json  events.jsonl
                           metrics.jsonl  data.html  data/{judgement.json,findings.jsonl,quarantine.jsonl}
                           lease.json  stop.json  move.json
                           weights/  checkpoints/  stacks/  outcome.json  samples.json  report.html

The driver and, while it trains, the first worker say where the run stands. The driver holds a lease meanwhile
(`ft_service.runs.lease`): a run whose driver is gone is told as failed, whatever it said last.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ft_service.errors import NotPublishedError, StorageError, UsageError
from ft_service.plan.plan import RunPlan
from ft_service.registry.registry import DatasetRef, Waiver
from ft_service.spec.schema import RunSpec, dump_run_spec, parse_run_spec
from ft_service.storage.storage import Storage

State = Literal[
    "preparing",
    "queued",
    "running",
    "checkpointing",
    "recovering",
    "stopping",
    "publishing",
    "stopped",
    "succeeded",
    "failed",
]
"""queued: waits for its workers and their base model; checkpointing: waits for the checkpoint that it leaves with
(other checkpoints are written beside training); recovering: workers died, others are about to go on."""

ENDED: frozenset[State] = frozenset({"stopped", "succeeded", "failed"})

LEASE_SECONDS = 45.0
"""A driver that was not heard of for so long is gone."""

_WAIT_SECONDS = 1.0


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunStatus(_File):
    """Where a run stands (status.json)."""

    run_id: str
    state: State
    time: datetime = Field(description="When the run entered this state.")
    message: str = ""
    published: str | None = Field(default=None, description="Id of the adapter or model it published.")


class Holder(_File):
    """The driver that works on a run (lease.json), and when it was last heard of."""

    token: str
    host: str
    machine: str = Field(description="Where its process id means something: boot and process namespace.")
    pid: int
    time: datetime

    def is_silent(self, seconds: float = LEASE_SECONDS) -> bool:
        """By the clocks of both machines."""
        return datetime.now(UTC) - self.time > timedelta(seconds=seconds)


class Request(_File):
    """What a run's workers are asked to do (stop.json, move.json): finish the step, save a checkpoint, and leave."""

    kind: Literal["stop", "move"] = Field(description="End the run for now, or go on at once on other workers.")
    reason: str
    now: bool = Field(default=False, description="Do not wait for the step or the checkpoint.")


class Outcome(_File):
    """What training ended with (outcome.json); the weights it names are what gets published."""

    weights: str = Field(description="Folder of the weights, below the run's.")
    steps: int = Field(description="Optimizer steps behind those weights.")
    steps_run: int
    final_loss: float = Field(description="Training loss of the run's last step.")
    validation_loss: float | None = Field(description="Validation loss of exactly these weights.")
    stopped_early: bool
    base_fingerprint: str
    training_digest: str = Field(description="RunPlan.training_digest of the training that ended so.")


class RunFolder:
    """Reads and writes one run's files."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.storage = storage
        self.run_id = run_id
        self.path = f"runs/{run_id}"

    def status(self) -> RunStatus | None:
        """Where the run stands; None before it began. One whose driver is gone is failed."""
        found = self._read("status.json")
        if found is None:
            return None
        status = RunStatus.model_validate(found)
        if status.state in ENDED:
            return status
        holder = self.holder()
        if holder is not None and not holder.is_silent():
            return status
        driver = "its driver is gone"
        if holder is not None:
            last = f"{holder.time:%Y-%m-%d %H:%M:%S} UTC"
            driver = f"its driver, process {holder.pid} on {holder.host}, was last heard of at {last}"
        message = f"Ended while {status.state}: {driver}. `ft resume {self.run_id}` goes on."
        return status.model_copy(update={"state": "failed", "message": message})

    def recorded_state(self) -> State | None:
        """What driver or worker said last, whether or not the driver has been heard of since."""
        found = self._read("status.json")
        return None if found is None else RunStatus.model_validate(found).state

    def holder(self) -> Holder | None:
        found = self._read("lease.json")
        return None if found is None else Holder.model_validate(found)

    def ask(self, request: Request) -> None:
        """Ask the run's workers to leave. A stop and a move are apart, so that neither takes the other's place."""
        self.storage.write_json(f"{self.path}/{request.kind}.json", request.model_dump(mode="json"))

    def request(self) -> Request | None:
        """What is asked of them; a stop comes before a move."""
        found = self._read("stop.json") or self._read("move.json")
        return None if found is None else Request.model_validate(found)

    def forget_requests(self, *kinds: Literal["stop", "move"]) -> None:
        for kind in kinds:
            self.storage.delete(f"{self.path}/{kind}.json")

    def enter(self, state: State, message: str = "", published: str | None = None) -> None:
        status = RunStatus(
            run_id=self.run_id, state=state, time=datetime.now(UTC), message=message, published=published
        )
        self.storage.write_json(f"{self.path}/status.json", status.model_dump(mode="json"))

    def write_first_spec(self, spec: RunSpec) -> None:
        """What was asked for, if nothing was before: from now on the run can be resumed."""
        if not self.storage.exists(f"{self.path}/spec.yaml"):
            self.storage.write_bytes(f"{self.path}/spec.yaml", dump_run_spec(spec).encode())

    def write_plan(self, spec: RunSpec, plan: RunPlan, sources: list[DatasetRef]) -> None:
        self.storage.write_bytes(f"{self.path}/spec.yaml", dump_run_spec(spec).encode())
        self.storage.write_json(f"{self.path}/plan.json", plan.model_dump(mode="json"))
        facts = plan.dataset.model_dump(mode="json")
        self.storage.write_json(
            f"{self.path}/dataset.json", {**facts, "sources": [source.model_dump(mode="json") for source in sources]}
        )

    def write_gate(self, verdict: str, waivers: Sequence[Waiver]) -> None:
        """What the data gate said, and what of it the spec accepts."""
        told = [waiver.model_dump(mode="json") for waiver in waivers]
        self.storage.write_json(f"{self.path}/gate.json", {"verdict": verdict, "waivers": told})

    def gate(self) -> tuple[str, list[Waiver]]:
        """What the data gate said; "not judged" where a run was prepared without it."""
        told = self._read("gate.json") or {"verdict": "not judged", "waivers": []}
        return told["verdict"], [Waiver.model_validate(waiver) for waiver in told["waivers"]]

    def plan(self) -> RunPlan:
        return RunPlan.model_validate(self.storage.read_json(f"{self.path}/plan.json"))

    def sources(self) -> list[DatasetRef]:
        dataset = self.storage.read_json(f"{self.path}/dataset.json")
        return [DatasetRef.model_validate(source) for source in dataset["sources"]]

    def write_outcome(self, outcome: Outcome) -> None:
        self.storage.write_json(f"{self.path}/outcome.json", outcome.model_dump(mode="json"))

    def outcome(self) -> Outcome:
        return Outcome.model_validate(self.storage.read_json(f"{self.path}/outcome.json"))

    def is_trained(self, training_digest: str) -> bool:
        """Whether training of this course has ended, and its weights can be published."""
        found = self._read("outcome.json")
        return found is not None and found.get("training_digest") == training_digest

    def spec(self, overrides: Sequence[str] = ()) -> RunSpec:
        """What was asked for. Raises `StorageError` if the run ended before that was written down."""
        file = f"{self.path}/spec.yaml"
        return parse_run_spec(self.storage.read_bytes(file).decode(), overrides, where=self.storage.uri(file))

    def _read(self, name: str) -> Any:
        """A JSON file of the run; None if it is not there, or no longer."""
        try:
            return self.storage.read_json(f"{self.path}/{name}")
        except StorageError:
            if self.storage.exists(f"{self.path}/{name}"):
                raise
            return None


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


def resumed_spec(run_id: str, storage_root: str, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of the run of that id, on the storage where it lies. Raises `NotPublishedError`, `SpecError`."""
    spec = find_run(Storage(storage_root), run_id).spec(overrides)
    return spec.model_copy(update={"storage": storage_root})


def stop_run(storage: Storage, run_id: str, now: bool, wait: bool, say: Callable[[str], None]) -> None:
    """Ask a run to stop, and wait until it has, if `wait`.

    Raises `NotPublishedError` for an unknown run, and `UsageError` for one that is not at work.
    """
    run = find_run(storage, run_id)
    status = run.status()
    if status is None or status.state in ENDED:
        raise UsageError(f"RUN = {run_id!r}: is not at work ({status.state if status else 'not begun'}).")
    run.ask(Request(kind="stop", reason="ft stop", now=now))
    say(f"Asked {run_id} to stop{' at once' if now else ' after the step under way, with a checkpoint'}.")
    while wait and status is not None and status.state not in ENDED:
        time.sleep(_WAIT_SECONDS)
        status = run.status()
    if wait and status is not None:
        say(f"{status.state}: {status.message}")
