"""What a run measures: the figures of each step with their units, where they are written, and what they warn of.

    runs/<run id>/metrics.jsonl   one line per step, without gaps or repeats, however often the run was resumed
    runs/<run id>/events.jsonl    one line per event: started, resumed, checkpoint, warning, ...
                                  (on an object store events/*.jsonl, an object per writer)

A sink is called with one `StepMetrics` per step, in one process of the run (rank 0). Needs neither torch nor ray.
"""

import math
import shutil
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Protocol, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_service.errors import Problem, SpecError, StorageError
from ft_service.storage.storage import Storage
from ft_service.text import format_count, format_duration

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
EVENTS_FOLDER = "events"
REMOTE_FLUSH_SECONDS = 30.0
LOG_LINE_SECONDS = 5.0
_TB_QUEUE = 1000
_LONG_AGO = datetime.min.replace(tzinfo=UTC)

# Overfitting: validation loss must have risen by all of the first three, and training loss fallen by the last.
MIN_RISE_NATS = 0.01
MIN_RISE_SHARE = 0.02
MIN_RISE_WIGGLES = 4.0
MIN_FALL_SHARE = 0.01


def _now() -> datetime:
    return datetime.now(UTC)


class StepMetrics(BaseModel):
    """The figures of one optimizer step, over all workers."""

    # A NaN becomes the text "NaN": valid JSON, and pydantic reads it back as a number.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    step: int = Field(ge=1, description="Completed optimizer updates, this one included.")
    epoch: float = Field(description="Passes over the training rows after this step, with fraction.")
    loss: float = Field(description="Training loss of this step's global batch, nats per loss token.")
    validation_loss: float | None = Field(default=None, description="Nats per loss token after this step, if measured.")
    learning_rate: float = Field(description="Rate of this step's update.")
    grad_norm: float = Field(description="Global L2 norm of the gradient, before clipping.")
    tokens: int = Field(description="Tokens of this step's global batch, padding left out.")
    loss_tokens: int = Field(description="Tokens of this step's global batch whose prediction is trained.")
    tokens_per_second: float = Field(description="`tokens` over this step's wall time, all workers together.")
    peak_memory_gib: float = Field(description="Highest memory of any one worker so far, GiB (GPU, or process on CPU).")
    time: datetime = Field(default_factory=_now, description="When the step was done, UTC.")


class Event(BaseModel):
    """One thing that happened to a run; may carry more fields than these."""

    model_config = ConfigDict(frozen=True, extra="allow")

    time: datetime | None = Field(description="UTC; none only for a damaged line.")
    type: str
    message: str


# -- files -------------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Where metrics go. `flush` before each checkpoint: the steps a resumed run builds on must be on storage."""

    def __call__(self, metrics: StepMetrics) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends to a run's metrics.jsonl: each step at once in a folder, at most every 30 s on an object store.

    Call `rewind` before the first step, with 0 for a new run. A step that cannot be written is kept for later: training
    does not wait for it. `flush` does, may come from another thread, and raises `StorageError` if nothing helps.
    """

    def __init__(self, storage: Storage, run_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._run_id = run_id
        self._path = _run_file(run_id, METRICS_FILE)
        self._clock = clock
        self._flushed_at = clock()
        self._failed = False
        self._pending: list[str] = []
        self._writing = threading.Lock()

    def rewind(self, step: int) -> int:
        """Cut the lines after `step` (and a torn last line), because the run goes on from there; returns how many."""
        self.flush()
        found = read_metrics(self._storage, self._run_id)
        kept = [metrics for metrics in found if metrics.step <= step]
        self._storage.write_bytes(self._path, "".join(_line(metrics) + "\n" for metrics in kept).encode())
        return len(found) - len(kept)

    def __call__(self, metrics: StepMetrics) -> None:
        self._pending.append(_line(metrics))
        is_quick = self._storage.is_local and not self._failed
        is_due = is_quick or self._clock() - self._flushed_at >= REMOTE_FLUSH_SECONDS
        if is_due and self._writing.acquire(blocking=False):  # otherwise a flush is under way
            try:
                self._write(self._storage.without_patience())
            except StorageError as error:
                if not self._failed:
                    print(f"Metrics are kept for later: {error}", file=sys.stderr, flush=True)
                self._failed, self._flushed_at = True, self._clock()
            finally:
                self._writing.release()

    def flush(self) -> None:
        with self._writing:
            self._write(self._storage)

    def _write(self, storage: Storage) -> None:
        if lines := list(self._pending):
            storage.append_line(self._path, "\n".join(lines))
            del self._pending[: len(lines)]
        self._failed, self._flushed_at = False, self._clock()

    def close(self) -> None:
        self.flush()


class TensorBoardSink:
    """Writes TensorBoard event files to a folder or URI; a resumed run names the `step` it goes on from.

    Raises `SpecError` if tensorboardX (part of ray[train]) is missing.
    """

    def __init__(self, folder: str | Path, step: int = 0) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            cure = "Run pip install tensorboardX, or set report.tensorboard: false."
            raise SpecError([Problem("report.tensorboard", True, "needs the package tensorboardX", cure)]) from None
        # File names hold whole seconds; without the suffix a quick resume would overwrite the file before it.
        suffix = f".from-step-{step}"
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, filename_suffix=suffix, max_queue=_TB_QUEUE)
        self._is_told = False

    def __call__(self, metrics: StepMetrics) -> None:
        for name, value in metrics.model_dump(exclude={"step", "time"}, exclude_none=True).items():
            if self._is_alive():
                self._writer.add_scalar(name, value, metrics.step, walltime=metrics.time.timestamp())

    def flush(self) -> None:
        if self._is_alive():
            self._writer.flush()

    def close(self) -> None:
        if self._is_alive():
            self._writer.close()

    def _is_alive(self) -> bool:
        # Its thread dies of the first write that fails; the queue to it then fills, and training would wait for ever.
        is_alive: bool = self._writer.file_writer.event_writer._worker.is_alive()
        if not is_alive and not self._is_told:
            self._is_told = True
            print(
                "TensorBoard's files cannot be written: no more of them until the run is started again.",
                file=sys.stderr,
                flush=True,
            )
        return is_alive


class EventLog:
    """A run's events. An event that cannot be written goes to stderr, and is written with the next one.

    In a folder all writers (driver, workers) append to events.jsonl. An object cannot be appended to, and two writers
    that rewrite the same one lose each other's lines: there each writes an object of its own, below events/.
    """

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage = storage
        own = f"{EVENTS_FOLDER}/{uuid.uuid4().hex}.jsonl"
        self._path = _run_file(run_id, EVENTS_FILE if storage.is_local else own)
        self._lines: list[str] = []
        self._num_written = 0
        self._writing = threading.Lock()

    def emit(self, type: str, message: str, **data: object) -> bool:
        """Add one event, now; `data` are further JSON values, such as ``step=40``. Returns whether it is written."""
        event = Event.model_validate({**data, "time": _now(), "type": type, "message": message})
        with self._writing:
            self._lines.append(_line(event))
            try:
                self._write()
                return True
            except StorageError as error:
                print(f"Event {type!r} is not written yet ({error}) {message}", file=sys.stderr, flush=True)
                return False

    def _write(self) -> None:
        if self._storage.is_local:
            self._storage.append_line(self._path, "\n".join(self._lines[self._num_written :]))
        else:
            self._storage.write_bytes(self._path, ("\n".join(self._lines) + "\n").encode())
        self._num_written = len(self._lines)


def read_metrics(storage: Storage, run_id: str) -> list[StepMetrics]:
    """The steps of a run, in order; empty before the first. A last line that a dying process tore is left out.

    Raises `StorageError`, with file and line, when any other line is damaged.
    """
    path = _run_file(run_id, METRICS_FILE)
    lines = list(_lines(storage, path))
    found = []
    for number, line in lines:
        try:
            found.append(StepMetrics.model_validate_json(line))
        except ValidationError as error:
            if number < lines[-1][0]:
                raise StorageError(f"{storage.uri(path)}:{number}: not the metrics of a step ({error}).") from None
    return found


def read_events(storage: Storage, run_id: str) -> list[Event]:
    """The events of a run, oldest first. A damaged line becomes an event that shows it."""
    folder = _run_file(run_id, EVENTS_FOLDER)
    apart = [event for name in storage.files(folder) for event in _events(storage, f"{folder}/{name}")]
    return _events(storage, _run_file(run_id, EVENTS_FILE)) + sorted(apart, key=lambda event: event.time or _LONG_AGO)


def _events(storage: Storage, path: str) -> list[Event]:
    events = []
    for number, line in _lines(storage, path):
        try:
            events.append(Event.model_validate_json(line))
        except ValidationError:
            text = line.decode(errors="replace")
            told = f"line {number} of {PurePosixPath(path).name}: {text}"
            events.append(Event(time=None, type="damaged", message=told))
    return events


def _run_file(run_id: str, name: str) -> str:
    return f"runs/{run_id}/{name}"


def _line(record: BaseModel) -> str:
    return record.model_dump_json(exclude_none=True)


def _lines(storage: Storage, path: str) -> Iterator[tuple[int, bytes]]:
    content = storage.read_bytes(path) if storage.exists(path) else b""
    return ((number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip())


# -- progress ----------------------------------------------------------------------------------------------------------


class LoadingLine:
    """How far this worker has come in reading its share of the weights: a line now and then, and one at the end.

    `doing` and `what` say it of other work on weights.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        doing: str = "Loading",
        what: str = "weights by this worker",
    ) -> None:
        self._doing, self._what = doing, what
        self._stream = stream or sys.stdout
        self._clock = clock
        self._began = self._shown_at = clock()

    def __call__(self, bytes_read: int, bytes_in_all: int) -> None:
        now = self._clock()
        if bytes_read < bytes_in_all and now - self._shown_at < LOG_LINE_SECONDS:
            return
        self._shown_at = now
        rate = bytes_read / max(now - self._began, 1e-3)
        print(
            f"{self._doing}: {bytes_read / 2**30:.2f} of {bytes_in_all / 2**30:.2f} GiB of {self._what}, "
            f"{rate / 2**30:.2f} GiB/s",
            file=self._stream,
            flush=True,
        )


class ProgressLine:
    """One dense line about the newest step: rewritten in place on a terminal, and now and then a new line in a log.

    A log gets the first step, the last one, each validation, and otherwise one line every `LOG_LINE_SECONDS`.
    """

    def __init__(
        self, num_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_steps = num_steps
        self._stream = stream or sys.stdout
        self._clock = clock
        self._in_place = self._stream.isatty()
        self._first: tuple[int, float] | None = None
        self._validation_loss: float | None = None
        self._line = ""
        self._is_shown = True
        self._shown_at = -math.inf

    def __call__(self, metrics: StepMetrics) -> None:
        now = self._clock()
        first_step, first_time = self._first = self._first or (metrics.step, now)
        seconds_per_step = (now - first_time) / (metrics.step - first_step) if metrics.step > first_step else None
        seconds_left = None if seconds_per_step is None else seconds_per_step * (self._num_steps - metrics.step)
        validated = metrics.validation_loss is not None
        self._validation_loss = metrics.validation_loss if validated else self._validation_loss
        self._line = format_progress(metrics, self._num_steps, self._validation_loss, seconds_left)
        self._is_shown = False
        is_due = now - self._shown_at >= LOG_LINE_SECONDS or validated or metrics.step >= self._num_steps
        if self._in_place or is_due:
            self._show(now)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        if not self._is_shown:
            self._show(self._clock())
        if self._in_place and self._line:
            self._stream.write("\n")
        self._stream.flush()

    def _show(self, now: float) -> None:
        if self._in_place:
            # A line that wraps cannot be rewritten by a carriage return.
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{self._line[:width]}\x1b[K")
        else:
            self._stream.write(self._line + "\n")
        self._stream.flush()
        self._is_shown, self._shown_at = True, now


def format_progress(
    metrics: StepMetrics, num_steps: int, validation_loss: float | None, seconds_left: float | None
) -> str:
    """One step as one line; `validation_loss` is the newest one, measured at this step or an earlier one."""
    parts = [
        f"step {metrics.step:>{len(str(num_steps))}}/{num_steps}",
        f"loss {metrics.loss:.4f}",
        "" if validation_loss is None else f"val {validation_loss:.4f}",
        f"lr {metrics.learning_rate:.1e}",
        f"gnorm {metrics.grad_norm:.2f}",
        f"{format_count(metrics.tokens_per_second)} tok/s",
        f"{metrics.peak_memory_gib:.1f} GiB",
        "" if seconds_left is None else f"eta {format_duration(seconds_left)}",
    ]
    return "  ".join(part for part in parts if part)


# -- overfitting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overfitting:
    """Validation loss turned up while training loss went on falling. Losses are nats per loss token."""

    best_step: int
    best_validation_loss: float
    last_step: int
    last_validation_loss: float
    training_loss_at_best: float
    """Mean over the steps up to the best one, as many as lie in half the way from there to the last validation."""
    training_loss_at_last: float
    """Mean over as many steps up to the last validation."""

    @property
    def message(self) -> str:
        rise = self.last_validation_loss / self.best_validation_loss - 1
        return (
            f"Validation loss was lowest at step {self.best_step} ({self.best_validation_loss:.4f}) and rose to "
            f"{self.last_validation_loss:.4f} (+{rise:.1%}) by step {self.last_step}, while training loss kept "
            f"falling, from {self.training_loss_at_best:.4f} to {self.training_loss_at_last:.4f}: the model learns its "
            f"examples by heart. The weights of step {self.best_step} are the ones to publish. Next time stop there "
            "(train.early_stopping, or fewer train.epochs), train on more or more varied data, or give the adapter "
            "less room (a lower method.lora_rank, some method.lora_dropout)."
        )


def validations(metrics: Sequence[StepMetrics]) -> list[tuple[int, float]]:
    """Step and validation loss, where one was measured and is a finite number."""
    found = ((m.step, m.validation_loss) for m in metrics if m.validation_loss is not None)
    return [(step, loss) for step, loss in found if math.isfinite(loss)]


def find_overfitting(metrics: Sequence[StepMetrics]) -> Overfitting | None:
    """Whether the last two validations stand clearly above the lowest one while training loss fell; none if not.

    Clearly means by 2 %, by 0.01 nats, and by four times the curve's wiggle: the movement that leads nowhere,
    ``(sum |v[i+1] - v[i]| - (v[0] - v_min) - (v[-1] - v_min)) / moves``, which is zero for a curve that only falls and
    then only rises, and about 1.1 sigma for noise around a level. Needs two validations after the lowest one.
    """
    measured = validations(metrics)
    if len(measured) < 3:
        return None
    steps, losses = zip(*measured, strict=True)
    lowest = min(losses)
    best = losses.index(lowest)
    if best > len(losses) - 3:
        return None
    travelled = sum(abs(after - before) for before, after in pairwise(losses))
    wiggle = (travelled - (losses[0] - lowest) - (losses[-1] - lowest)) / (len(losses) - 1)
    rise = min(losses[-2:]) - lowest
    if rise <= max(MIN_RISE_NATS, MIN_RISE_SHARE * lowest, MIN_RISE_WIGGLES * wiggle):
        return None

    window = (steps[-1] - steps[best]) // 2

    def training_loss_at(end: int) -> float:
        return statistics.fmean(m.loss for m in metrics if end - window < m.step <= end)

    at_best, at_last = training_loss_at(steps[best]), training_loss_at(steps[-1])
    if not at_last < at_best * (1 - MIN_FALL_SHARE):
        return None
    return Overfitting(steps[best], lowest, steps[-1], losses[-1], at_best, at_last)
