"""Metrics: the figures of each step with their units, and the sinks that record them.

    runs/<run id>/metrics.jsonl   one line per step, without gaps or repeats, however often the run resumes

A sink is called with one `StepMetrics` per step, in one process of the run (rank 0).
"""

import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_service.errors import StorageError
from ft_service.runs.jsonl import numbered_lines, run_file, to_line
from ft_service.storage.storage import Storage

METRICS_FILE = "metrics.jsonl"
REMOTE_FLUSH_SECONDS = 30.0
_TAIL_BYTES = 16 * 1024
"""The last few dozen steps."""


def _now() -> datetime:
    return datetime.now(UTC)


class StepMetrics(BaseModel):
    """The figures of one optimizer step, over all workers."""

    # A NaN becomes the text "NaN": valid JSON, and pydantic reads it back as a number.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    step: int = Field(ge=1, description="Completed optimizer updates, this one included.")
    epoch: float = Field(description="Passes over the training rows after this step, with fraction.")
    loss: float = Field(description="Training loss of this step's global batch, nats per loss token.")
    accuracy: float | None = Field(
        default=None,
        description="Share of this step's loss tokens whose most likely prediction is right, before its update; null "
        "in runs of 0.1.0.",
    )
    validation_loss: float | None = Field(default=None, description="Nats per loss token after this step, if measured.")
    validation_accuracy: float | None = Field(
        default=None, description="Share of the validation data's loss tokens predicted after this step, if measured."
    )
    learning_rate: float = Field(description="Rate of this step's update.")
    grad_norm: float = Field(description="Global L2 norm of the gradient, before clipping.")
    tokens: int = Field(description="Tokens of this step's global batch, padding left out.")
    loss_tokens: int = Field(description="Tokens of this step's global batch whose prediction is trained.")
    tokens_per_second: float = Field(description="`tokens` over this step's wall time, all workers together.")
    peak_memory_gib: float = Field(
        description="Highest memory that any one worker allocated before this step's update, GiB (on CPU: resident)."
    )
    peak_reserved_gib: float | None = Field(
        default=None,
        description="Highest memory that any one worker's torch held on its GPU, cached blocks included, GiB (on CPU: "
        "`peak_memory_gib`); null in runs of 0.1.0.",
    )
    time: datetime = Field(default_factory=_now, description="When the step was done, UTC.")


class Sink(Protocol):
    """Where metrics go. `flush` before each checkpoint: a resumed run needs the metrics of its earlier steps."""

    def __call__(self, metrics: StepMetrics) -> None: ...

    def flush(self) -> None: ...

    def close(self, complete: bool = True) -> None:
        """`complete`: the run has trained all its steps."""


class JsonlSink:
    """Appends to a run's metrics.jsonl: each step at once in a folder, every 30 s on an object store.

    Call `rewind` before the first step, with 0 for a new run. A step that cannot be written is kept and written later;
    training does not wait. `flush` waits, is safe to call from another thread, and raises `StorageError` when it gives
    up.
    """

    def __init__(self, storage: Storage, run_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._run_id = run_id
        self._path = run_file(run_id, METRICS_FILE)
        self._clock = clock
        self._flushed_at = clock()
        self._failed = False
        self._pending: list[str] = []
        self._writing = threading.Lock()

    def rewind(self, step: int) -> int:
        """Delete the lines after `step` and an incomplete last line. Returns how many steps were deleted."""
        self.flush()
        earlier = read_metrics(self._storage, self._run_id)
        kept = [metrics for metrics in earlier if metrics.step <= step]
        self._storage.write_bytes(self._path, "".join(to_line(metrics) + "\n" for metrics in kept).encode())
        return len(earlier) - len(kept)

    def __call__(self, metrics: StepMetrics) -> None:
        self._pending.append(to_line(metrics))
        is_quick = self._storage.is_local and not self._failed
        is_due = is_quick or self._clock() - self._flushed_at >= REMOTE_FLUSH_SECONDS
        if is_due and self._writing.acquire(blocking=False):  # otherwise another thread is flushing
            try:
                self._write(self._storage.without_retries())
            except StorageError as error:
                if not self._failed:
                    print(f"Metrics will be written later: {error}", file=sys.stderr, flush=True)
                self._failed = True
                self._flushed_at = self._clock()
            finally:
                self._writing.release()

    def flush(self) -> None:
        with self._writing:
            self._write(self._storage)

    def _write(self, storage: Storage) -> None:
        if lines := list(self._pending):
            storage.append_line(self._path, "\n".join(lines))
            del self._pending[: len(lines)]
        self._failed = False
        self._flushed_at = self._clock()

    def close(self, complete: bool = True) -> None:
        self.flush()


def read_metrics(storage: Storage, run_id: str) -> list[StepMetrics]:
    """The steps of a run, in order; empty before the first.

    An incomplete last line, left by a process that died, is skipped. Raises `StorageError`, with file and line, when
    any other line is damaged.
    """
    path = run_file(run_id, METRICS_FILE)
    lines = list(numbered_lines(storage, path))
    steps = []
    for number, line in lines:
        try:
            steps.append(StepMetrics.model_validate_json(line))
        except ValidationError as error:
            if number < lines[-1][0]:
                raise StorageError(f"{storage.uri(path)}:{number}: not the metrics of a step ({error}).") from None
    return steps


def read_last_metrics(storage: Storage, run_id: str) -> list[StepMetrics]:
    """The last few dozen steps of a run, in order: reads only the end of the file."""
    path = run_file(run_id, METRICS_FILE)
    size = storage.size(path) or 0
    tail = storage.read_range(path, max(0, size - _TAIL_BYTES), min(size, _TAIL_BYTES)) if size else b""
    steps = []
    for line in tail.split(b"\n")[1 if size > _TAIL_BYTES else 0 :]:
        with suppress(ValidationError):  # an incomplete last line
            steps.append(StepMetrics.model_validate_json(line))
    return steps


def seconds_left(steps: Sequence[StepMetrics], num_steps: int) -> float | None:
    """What the remaining steps take at the pace of `steps`, the last ones; None if those are fewer than two.

    Steps of an earlier attempt do not count where a pause lies between them: the median of the times between two steps
    ignores it.
    """
    paces = [
        (after.time - before.time).total_seconds() / (after.step - before.step)
        for before, after in itertools.pairwise(steps)
        if after.step > before.step
    ]
    return statistics.median(paces) * max(num_steps - steps[-1].step, 0) if paces else None
