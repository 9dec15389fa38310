"""Events: what happens to a run, one JSON line each.

    runs/<run id>/events.jsonl       in a folder: all writers (driver, workers) append to it
    runs/<run id>/events/*.jsonl     on an object store: one object per writer

`AnyEvent` lists the types that this version writes. A line of another type is read as a plain `Event`.
"""

import sys
import threading
import uuid
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ft_service.errors import StorageError
from ft_service.runs.jsonl import numbered_lines, run_file, to_line
from ft_service.storage.storage import Storage

EVENTS_FILE = "events.jsonl"
EVENTS_FOLDER = "events"
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


class Event(BaseModel):
    """One thing that happened to a run; may have more fields than these."""

    model_config = ConfigDict(frozen=True, extra="allow")

    time: datetime | None = Field(default=None, description="UTC, set by `EventLog.emit`; None for a damaged line.")
    type: str
    message: str

    @property
    def data(self) -> dict[str, Any]:
        """All further fields, as JSON values."""
        return self.model_dump(mode="json", exclude={"time", "type", "message"}, exclude_none=True)


class Notice(Event):
    """An event without further data."""

    type: Literal["preparing", "leaving", "stopping", "moving", "samples", "succeeded", "stopped", "failed", "refused"]


class WorkerPlace(BaseModel):
    """Where a worker runs."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    node: str = Field(default="", description="Ray's id of the node; empty without Ray.")


class TrainingStarted(Event):
    """An attempt began to train."""

    type: Literal["training"] = "training"
    step: int = Field(description="Completed steps that it continues from.")
    repeated: int = Field(default=0, description="Steps of the previous attempt that this one repeats.")
    workers: list[WorkerPlace] = Field(description="By rank.")


class Hang(Event):
    """A worker made no progress for `parallel.hang_timeout_seconds`; emitted by the first worker that notices."""

    type: Literal["hang"] = "hang"
    rank: int
    step: int = Field(description="The step under way; 0 before the first.")
    doing: str
    stacks: str = Field(description="Folder of the stacks, below the storage root; its last part is the attempt.")

    @property
    def attempt(self) -> str:
        """Name of the attempt that hung."""
        return PurePosixPath(self.stacks).name


class Queued(Event):
    """The run waits in the queue of its cluster, and what it waits for has changed."""

    type: Literal["queued"] = "queued"
    place: int | None = Field(description="Among the waiting runs, from 1.")
    waits_for: str
    estimated_start: datetime | None = None
    waited_seconds: float = Field(description="Since it entered the queue, or returned to it.")


class Recovering(Event):
    """Workers died, and the run starts again."""

    type: Literal["recovering"] = "recovering"
    step: int = Field(description="Step of the checkpoint that it continues from.")
    failures: int = Field(description="Attempts of this driver that died, this one included.")


class CheckpointSaved(Event):
    """A checkpoint is complete."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int


class CheckpointFailed(Event):
    """A checkpoint could not be written."""

    type: Literal["checkpoint_failed"] = "checkpoint_failed"
    step: int
    workers: list[int] = Field(description="Ranks that failed.")
    newest_step: int = Field(description="Step of the newest checkpoint; 0 if there is none.")


class CheckpointsKeepFailing(Event):
    """Several checkpoints in a row could not be written."""

    type: Literal["no_checkpoint"] = "no_checkpoint"
    step: int
    workers: list[int]
    newest_step: int
    failures: int = Field(description="In a row.")


class OldCheckpointsLeft(Event):
    """Old checkpoints could not be deleted."""

    type: Literal["checkpoints_left"] = "checkpoints_left"
    step: int = Field(description="Of the newest checkpoint.")


class CheckpointDamaged(Event):
    """A checkpoint, or the index of checkpoints, is damaged and not used."""

    type: Literal["checkpoint_damaged"] = "checkpoint_damaged"
    step: int


class BestWeightsFailed(Event):
    """The best weights so far could not be written."""

    type: Literal["weights_failed"] = "weights_failed"
    step: int


class Published(Event):
    """The run published an adapter or a model."""

    type: Literal["published"] = "published"
    digest: str


AnyEvent = (
    Notice
    | TrainingStarted
    | Hang
    | Queued
    | Recovering
    | CheckpointSaved
    | CheckpointFailed
    | CheckpointsKeepFailing
    | OldCheckpointsLeft
    | CheckpointDamaged
    | BestWeightsFailed
    | Published
)
_ANY_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="type")])


class EventLog:
    """A run's events. An event that cannot be written goes to stderr, and is written with the next one.

    An object cannot be appended to, and two writers that rewrite the same object lose each other's lines. So on an
    object store each writer has an object of its own.
    """

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage = storage
        own_file = f"{EVENTS_FOLDER}/{uuid.uuid4().hex}.jsonl"
        self._path = run_file(run_id, EVENTS_FILE if storage.is_local else own_file)
        self._lines: list[str] = []
        self._num_written = 0
        self._writing = threading.Lock()

    def emit(self, event: Event) -> bool:
        """Add one event, with the time of now. Returns whether it is written."""
        stamped = event.model_copy(update={"time": datetime.now(UTC)})
        with self._writing:
            self._lines.append(to_line(stamped))
            try:
                self._write()
                return True
            except StorageError as error:
                print(f"Event {event.type!r} is not written yet ({error}) {event.message}", file=sys.stderr, flush=True)
                return False

    def _write(self) -> None:
        if self._storage.is_local:
            self._storage.append_line(self._path, "\n".join(self._lines[self._num_written :]))
        else:
            self._storage.write_bytes(self._path, ("\n".join(self._lines) + "\n").encode())
        self._num_written = len(self._lines)


def read_events(storage: Storage, run_id: str) -> list[Event]:
    """The events of a run, oldest first. A damaged line becomes an event of type `damaged` that shows it."""
    folder = run_file(run_id, EVENTS_FOLDER)
    per_writer = [event for name in storage.files(folder) for event in _read_file(storage, f"{folder}/{name}")]
    shared = _read_file(storage, run_file(run_id, EVENTS_FILE))
    return shared + sorted(per_writer, key=lambda event: event.time or _LONG_AGO)


def parse_event(line: str | bytes) -> Event:
    """One line as the class of its type, or as a plain `Event`. Raises `ValidationError` if the line is damaged."""
    try:
        return _ANY_EVENT.validate_json(line)
    except ValidationError as error:
        if error.errors()[0]["type"] != "union_tag_invalid":
            raise
        return Event.model_validate_json(line)


def _read_file(storage: Storage, path: str) -> list[Event]:
    events = []
    for number, line in numbered_lines(storage, path):
        try:
            events.append(parse_event(line))
        except ValidationError:
            text = line.decode(errors="replace")
            message = f"line {number} of {PurePosixPath(path).name}: {text}"
            events.append(Event(type="damaged", message=message))
    return events
