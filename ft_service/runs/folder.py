"""A run's folder on storage: its files, and the state of a run.

<storage>/runs/<run id>/   spec.yaml  gate.json  plan.json  dataset.json  status.json  events.jsonl
                           metrics.jsonl  data.html  data/{judgement.json,findings.jsonl,quarantine.jsonl}
                           lease.json  stop.json  move.json
                           weights/  epochs/  checkpoints/  stacks/  tracebacks/  outcome.json  epochs.json
                           samples.json  report.html

The driver writes the run's state; while it trains, the first worker does too. Meanwhile the driver holds a lease
(`ft_service.runs.lease`). A run whose driver is gone counts as failed, whatever its last recorded state.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field

from ft_service.errors import NotPublishedError, StorageError, UsageError
from ft_service.plan.facts import DatasetFacts
from ft_service.plan.plan import RunPlan
from ft_service.registry.registry import DatasetRef, Waiver
from ft_service.spec.load import dump_run_spec, parse_run_spec
from ft_service.spec.schema import RunSpec
from ft_service.storage.formats import StoredFile, renamed
from ft_service.storage.object_store import Version
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
"""queued: waits for workers and their base model; checkpointing: waits for the last checkpoint before workers leave
(other checkpoints are written while training continues); recovering: workers died, and new ones are about to start."""

Stored = TypeVar("Stored", bound=StoredFile)

ENDED: frozenset[State] = frozenset({"stopped", "succeeded", "failed"})

REPORT_FILE = "report.html"
EPOCHS_FOLDER = "epochs"

LEASE_SECONDS = 45.0
"""A driver that has not renewed its lease for this long is gone."""

NAMED_RUNS = 20
"""Existing runs that an error names."""

_WAIT_SECONDS = 1.0


class RunStatus(StoredFile):
    """The state of a run (status.json)."""

    run_id: str
    state: State
    time: datetime = Field(description="When the run entered this state.")
    message: str = ""
    published: str | None = Field(default=None, description="Id of the adapter or model it published.")


class LeaseHolder(StoredFile):
    """The driver that works on a run (lease.json), and when it last renewed the lease."""

    token: str
    host: str
    machine: str = Field(description="Boot and process namespace, within which `pid` is unique.")
    pid: int
    time: datetime

    def is_expired(self, seconds: float = LEASE_SECONDS) -> bool:
        """Whether the lease was not renewed for `seconds`, comparing the clocks of both machines."""
        return datetime.now(UTC) - self.time > timedelta(seconds=seconds)


class Request(StoredFile):
    """A request to a run's workers (stop.json, move.json): finish the step, save a checkpoint, and leave."""

    kind: Literal["stop", "move"] = Field(
        description="stop: end the run for now; move: continue at once on other workers."
    )
    reason: str
    now: bool = Field(default=False, description="Leave without finishing the step or saving a checkpoint.")


class Outcome(StoredFile):
    """The result of training (outcome.json). The weights it names are published."""

    weights: str = Field(description="Folder of the weights, below the run's folder.")
    steps: int = Field(description="Optimizer steps that produced those weights.")
    steps_run: int
    final_loss: float = Field(description="Training loss of the run's last step.")
    validation_loss: float | None = Field(description="Validation loss of exactly these weights.")
    stopped_early: bool
    base_fingerprint: str
    training_digest: str = Field(description="RunPlan.training_digest of that training.")

    @classmethod
    def upgraded(cls, data: dict[str, Any], written: int) -> dict[str, Any]:
        return renamed(data, {"course": "training_digest"})


class RunDataset(StoredFile):
    """What a run trains on (dataset.json)."""

    facts: DatasetFacts
    sources: list[DatasetRef]

    @classmethod
    def upgraded(cls, data: dict[str, Any], written: int) -> dict[str, Any]:
        """Format 1 kept the facts beside the sources."""
        sources = data.pop("sources")
        return {"facts": data, "sources": sources}


class EpochAdapter(BaseModel):
    """A published adapter of a run's last epochs."""

    step: int = Field(description="Optimizer steps that produced it.")
    adapter: str = Field(description="Its id.")


class EpochAdapters(StoredFile):
    """What a run has published of its last epochs (epochs.json), oldest first."""

    adapters: list[EpochAdapter]


class DataCheck(StoredFile):
    """The verdict of the data check, and the findings that the spec accepts (gate.json)."""

    verdict: str
    waivers: list[Waiver]


class RunFolder:
    """Reads and writes one run's files."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.storage = storage
        self.run_id = run_id
        self.path = f"runs/{run_id}"
        self._lease_path = f"{self.path}/lease.json"

    def status(self) -> RunStatus | None:
        """The run's state; None before it began. It is `failed` if the driver is gone and the run has not ended."""
        status = self.recorded_status()
        if status is None or status.state in ENDED:
            return status
        holder = self.lease_holder()
        if holder is not None and not holder.is_expired():
            return status
        driver = "it has no driver"
        if holder is not None:
            last = f"{holder.time:%Y-%m-%d %H:%M:%S} UTC"
            driver = f"its driver, process {holder.pid} on {holder.host}, last renewed its lease at {last}"
        message = f"Ended while {status.state}: {driver}. Continue with: ft resume {self.run_id}"
        return status.model_copy(update={"state": "failed", "message": message})

    def recorded_status(self) -> RunStatus | None:
        """The status written last, whether or not the driver is still alive."""
        return self._read("status.json", RunStatus)

    def recorded_state(self) -> State | None:
        """The state of `recorded_status`."""
        status = self.recorded_status()
        return None if status is None else status.state

    def lease_holder(self) -> LeaseHolder | None:
        return self.lease()[0]

    def lease(self) -> tuple[LeaseHolder | None, Version | None]:
        """The driver that works on the run, with what `write_lease` needs to replace it."""
        found = self.storage.read_versioned(self._lease_path)
        if found is None:
            return None, None
        content, version = found
        return LeaseHolder.parse(content, self.storage.uri(self._lease_path)), version

    def write_lease(self, holder: LeaseHolder, version: Version | None) -> bool:
        """Write the lease unless it has changed since `lease` returned `version`; returns whether it was written.

        With None for `version` the run must have no lease. On a file system it is written in any case.
        """
        content = json.dumps(holder.model_dump(mode="json"), indent=2) + "\n"
        return self.storage.write_if(self._lease_path, content.encode(), version)

    def delete_lease(self) -> None:
        self.storage.delete(self._lease_path)

    def write_request(self, request: Request) -> None:
        """Ask the run's workers to leave. Stop and move are separate files, so that neither overwrites the other."""
        self._write(f"{request.kind}.json", request)

    def request(self) -> Request | None:
        """The pending request, if any; a stop takes precedence over a move."""
        return self._read("stop.json", Request) or self._read("move.json", Request)

    def delete_requests(self, *kinds: Literal["stop", "move"]) -> None:
        for kind in kinds:
            self.storage.delete(f"{self.path}/{kind}.json")

    def set_state(self, state: State, message: str = "", published: str | None = None) -> None:
        status = RunStatus(
            run_id=self.run_id, state=state, time=datetime.now(UTC), message=message, published=published
        )
        self.write_status(status)

    def write_status(self, status: RunStatus) -> None:
        self._write("status.json", status)

    def write_traceback(self, text: str) -> str:
        """Save the traceback of an error as the next file of tracebacks/; returns where."""
        number = len(self.storage.files(f"{self.path}/tracebacks")) + 1
        file = f"{self.path}/tracebacks/{number:03}.txt"
        self.storage.write_bytes(file, text.encode())
        return self.storage.uri(file)

    def has_spec(self) -> bool:
        return self.storage.exists(f"{self.path}/spec.yaml")

    def write_spec(self, spec: RunSpec) -> None:
        self.storage.write_bytes(f"{self.path}/spec.yaml", dump_run_spec(spec).encode())

    def write_plan(self, spec: RunSpec, plan: RunPlan, sources: list[DatasetRef]) -> None:
        self.write_spec(spec)
        self._write("plan.json", plan)
        self._write("dataset.json", RunDataset(facts=plan.dataset, sources=sources))

    def write_data_check(self, verdict: str, waivers: Sequence[Waiver]) -> None:
        """Save the verdict of the data check, and the findings that the spec accepts."""
        self._write("gate.json", DataCheck(verdict=verdict, waivers=list(waivers)))

    def data_check(self) -> tuple[str, list[Waiver]]:
        """Verdict and waivers of the data check; the verdict is "not judged" for a run prepared without it."""
        check = self._read("gate.json", DataCheck) or DataCheck(verdict="not judged", waivers=[])
        return check.verdict, check.waivers

    def has_plan(self) -> bool:
        return self.storage.exists(f"{self.path}/plan.json")

    def plan(self) -> RunPlan:
        return self._existing("plan.json", RunPlan)

    def sources(self) -> list[DatasetRef]:
        return self._existing("dataset.json", RunDataset).sources

    def write_outcome(self, outcome: Outcome) -> None:
        self._write("outcome.json", outcome)

    def outcome(self) -> Outcome:
        return self._existing("outcome.json", Outcome)

    def epoch_folder(self, step: int) -> str:
        """Where the adapter of an epoch that ends after `step` is written, below the run's folder."""
        return f"{EPOCHS_FOLDER}/step-{step}"

    def epoch_steps(self) -> list[int]:
        """Steps of the adapters of epochs that were written, in order."""
        names = self.storage.folders(f"{self.path}/{EPOCHS_FOLDER}")
        return sorted(int(name.removeprefix("step-")) for name in names)

    def write_epoch_adapters(self, adapters: list[EpochAdapter]) -> None:
        """Record what was published, and delete the written ones."""
        self._write("epochs.json", EpochAdapters(adapters=adapters))
        self.storage.delete(f"{self.path}/{EPOCHS_FOLDER}")

    def epoch_adapters(self) -> list[EpochAdapter]:
        """What was published of the last epochs, oldest first."""
        found = self._read("epochs.json", EpochAdapters)
        return [] if found is None else found.adapters

    def has_outcome(self) -> bool:
        """Whether a training of this run is complete, perhaps one with other settings."""
        return self.storage.exists(f"{self.path}/outcome.json")

    def is_trained(self, training_digest: str) -> bool:
        """Whether the training with this digest is complete, and its weights can be published."""
        outcome = self._read("outcome.json", Outcome)
        return outcome is not None and outcome.training_digest == training_digest

    def spec(self, overrides: Sequence[str] = ()) -> RunSpec:
        """The run's spec. Raises `StorageError` if the run ended before the spec was saved."""
        file = f"{self.path}/spec.yaml"
        return parse_run_spec(self.storage.read_bytes(file).decode(), overrides, where=self.storage.uri(file))

    def _write(self, name: str, content: StoredFile) -> None:
        self.storage.write_json(f"{self.path}/{name}", content.model_dump(mode="json"))

    def _read(self, name: str, kind: type[Stored]) -> Stored | None:
        """A file of the run; None if it does not exist."""
        try:
            return self._existing(name, kind)
        except StorageError:
            if self.storage.exists(f"{self.path}/{name}"):
                raise
            return None

    def _existing(self, name: str, kind: type[Stored]) -> Stored:
        path = f"{self.path}/{name}"
        return kind.parse(self.storage.read_json(path), self.storage.uri(path))


def new_run_id(name: str) -> str:
    """``<name>-<8 hex>``"""
    return f"{name}-{secrets.token_hex(4)}"


def find_run(storage: Storage, run_id: str) -> RunFolder:
    """The run of that id. Raises `NotPublishedError`, which names those with a similar id, or some of the others."""
    is_name = run_id not in ("", ".", "..") and "/" not in run_id
    if not is_name or not storage.exists(f"runs/{run_id}"):
        known = storage.folders("runs")
        close = get_close_matches(run_id, known, n=3) or known[:NAMED_RUNS]
        more = f", and {len(known) - len(close)} more (ft runs)" if len(known) > len(close) else ""
        raise NotPublishedError(
            f"run = {run_id!r}: does not exist on {storage.root}. Existing runs: {', '.join(close) or 'none'}{more}."
        )
    return RunFolder(storage, run_id)


def resumed_spec(run_id: str, storage_root: str, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of the run of that id, with overrides. Raises `NotPublishedError` or `SpecError`.

    A new length replaces the run's own, whichever of `train.max_steps` and `train.epochs` each of them uses.
    """
    spec = find_run(Storage(storage_root), run_id).spec([*_unset_length(overrides), *overrides])
    return spec.model_copy(update={"storage": storage_root})


def _unset_length(overrides: Sequence[str]) -> list[str]:
    """An override that unsets the run's own length, if `overrides` set the other of its two settings."""
    overridden = {override.partition("=")[0] for override in overrides} & {"train.max_steps", "train.epochs"}
    other = {"train.max_steps": "train.epochs", "train.epochs": "train.max_steps"}
    return [f"{other[setting]}=null" for setting in overridden] if len(overridden) == 1 else []


def stop_run(storage: Storage, run_id: str, now: bool, wait: bool, log: Callable[[str], None]) -> None:
    """Ask a run to stop, and wait until it has, if `wait`.

    Raises `NotPublishedError` for an unknown run, and `UsageError` for a run that is not active.
    """
    run = find_run(storage, run_id)
    status = run.status()
    if status is None or status.state in ENDED:
        raise UsageError(f"RUN = {run_id!r}: is not active ({status.state if status else 'not started'}).")
    run.write_request(Request(kind="stop", reason="ft stop", now=now))
    log(f"Asked {run_id} to stop {'at once' if now else 'after the current step, with a checkpoint'}.")
    while wait and status is not None and status.state not in ENDED:
        time.sleep(_WAIT_SECONDS)
        status = run.status()
    if wait and status is not None:
        log(f"{status.state}: {status.message}")
