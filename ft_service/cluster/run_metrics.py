"""Prometheus metrics of a run. Its driver reads them from storage; Ray exports them on the driver's node.

All are gauges: they disappear with the driver, so the label `run` has as many values as runs are on. The queue needs no
metrics of its own: it is the runs that wait, and those that hold workers.
"""

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType

from ray.util.metrics import Gauge

from ft_service.catalog.models import ModelShape
from ft_service.errors import StorageError
from ft_service.plan.measured import measured_mfu
from ft_service.plan.plan import RunPlan
from ft_service.runs.events import read_events
from ft_service.runs.folder import RunFolder, State
from ft_service.runs.history import Attempt, attempts, wasted_steps
from ft_service.runs.lease import Lease
from ft_service.runs.metrics import StepMetrics, read_last_metrics, seconds_left
from ft_service.runs.progress import Log
from ft_service.spec.schema import RunSpec

EXPORT_SECONDS = 5.0
"""Ray drops a gauge that was not set for 20 seconds, whatever its value."""
REMOTE_SECONDS = 30.0
"""Between two reads of a run on an object store; in a folder it is read before each export."""
_GIB = 2**30
_RUN = ("run",)

run_state = Gauge("ft_run_state", "1 for the state of the run, 0 for earlier ones.", (*_RUN, "state", "priority"))
run_since = Gauge("ft_run_state_since_timestamp_seconds", "When the driver saw this state first.", _RUN)
run_lease = Gauge("ft_run_lease_renewed_timestamp_seconds", "When the driver last renewed its lease.", _RUN)
run_attempts = Gauge("ft_run_attempts", "Groups of workers that have begun to train.", _RUN)
run_wasted = Gauge("ft_run_wasted_steps", "Steps that were trained again after a worker was lost.", _RUN)
run_workers = Gauge("ft_run_workers", "Workers of the newest attempt.", _RUN)
run_progress = Gauge(
    "ft_run_last_progress_timestamp_seconds", "When the last step was done, or the attempt began to train.", _RUN
)
run_step = Gauge("ft_run_step", "Completed steps.", _RUN)
run_planned = Gauge("ft_run_planned_steps", "Steps of the plan.", _RUN)
run_left = Gauge("ft_run_seconds_left", "What the remaining steps take at the present pace.", _RUN)
run_loss = Gauge("ft_run_loss", "Training loss of the last step, nats per loss token.", _RUN)
run_validation = Gauge("ft_run_validation_loss", "Newest validation loss, nats per loss token.", _RUN)
run_norm = Gauge("ft_run_grad_norm", "Norm of the last step's gradient, before clipping.", _RUN)
run_speed = Gauge("ft_run_tokens_per_second", "Tokens of the last step per second, all workers together.", _RUN)
run_mfu = Gauge(
    "ft_run_mfu", "Share of the GPUs' peak rate, of all executed FLOPs; absent on CPU and on unknown GPUs.", _RUN
)
run_memory = Gauge("ft_run_peak_memory_bytes", "The most that any one worker has allocated.", _RUN)


class RunMetrics:
    """Exports what is known of a run while the block lasts. Storage that does not answer does not disturb the run."""

    def __init__(
        self,
        run: RunFolder,
        spec: RunSpec,
        lease: Lease,
        log: Log,
        *,
        seconds: float = EXPORT_SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Call it with a lease that is held. `seconds` lie between two exports."""
        self.shape: ModelShape | None = None
        """Of the base, once it is known. The MFU needs it."""
        self._run = RunFolder(run.storage.without_retries(), run.run_id)
        self._tags = {"run": run.run_id}
        self._priority = spec.queue.priority
        self._lease = lease
        self._log = log
        self._seconds = seconds
        self._read_seconds = seconds if run.storage.is_local else REMOTE_SECONDS
        self._now = now
        self._state: State | None = None
        self._values: dict[Gauge, float] = {}
        self._states: dict[State, int] = {}
        self._ended = threading.Event()
        # Two threads: a read may wait for minutes, and meanwhile the age of the lease must be seen.
        self._exporting = threading.Thread(target=self._export_often, name="export-metrics", daemon=True)
        self._reading = threading.Thread(target=self._read_often, name="read-metrics", daemon=True)
        self._has_logged = False

    def __enter__(self) -> "RunMetrics":
        self._exporting.start()
        self._reading.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._exporting.join()
        self._reading.join(self._seconds)

    def export(self) -> None:
        """Set all gauges again, to what was read last."""
        run_lease.set(self._lease.renewed_at, self._tags)
        for state, is_now in dict(self._states).items():
            run_state.set(is_now, {**self._tags, "state": state, "priority": self._priority})
        for gauge, value in dict(self._values).items():
            gauge.set(value, self._tags)

    def read(self) -> None:
        """Read the run's folder. Raises `StorageError`."""
        if (state := self._run.recorded_state()) is not None and state != self._state:
            self._enter(state)
        tries = attempts(read_events(self._run.storage, self._run.run_id))
        steps = read_last_metrics(self._run.storage, self._run.run_id)
        self._set(run_attempts, len(tries))
        self._set(run_wasted, wasted_steps(tries))
        plan = self._run.plan() if self._run.has_plan() else None
        if plan is not None:
            self._set(run_planned, plan.num_steps)
        if tries:
            self._set(run_workers, tries[-1].workers)
            self._set(run_progress, _last_progress(tries[-1], steps))
        if steps:
            self._set_steps(steps, plan)

    def _enter(self, state: State) -> None:
        self._state = state
        self._states = {**dict.fromkeys(self._states, 0), state: 1}
        self._set(run_since, self._now())

    def _set_steps(self, steps: list[StepMetrics], plan: RunPlan | None) -> None:
        last = steps[-1]
        self._set(run_step, last.step)
        self._set(run_loss, last.loss)
        self._set(run_norm, last.grad_norm)
        self._set(run_speed, last.tokens_per_second)
        self._set(run_memory, last.peak_memory_gib * _GIB)
        validations = [metrics.validation_loss for metrics in steps if metrics.validation_loss is not None]
        if validations:
            self._set(run_validation, validations[-1])
        if plan is None:
            return
        if (left := seconds_left(steps, plan.num_steps)) is not None:
            self._set(run_left, left)
        if self.shape is not None:
            mfu = measured_mfu(plan, self.shape, last.tokens_per_second)
            if mfu is not None:
                self._set(run_mfu, mfu)

    def _set(self, gauge: Gauge, value: float) -> None:
        self._values[gauge] = value

    def _export_often(self) -> None:
        while not self._ended.wait(self._seconds):
            self.export()

    def _read_often(self) -> None:
        while True:
            try:
                self.read()
            except (StorageError, OSError, ValueError) as error:
                if not self._has_logged:
                    self._log(f"The metrics of the run are not up to date: {error}")
                self._has_logged = True
            if self._ended.wait(self._read_seconds):
                return


def _last_progress(attempt: Attempt, steps: list[StepMetrics]) -> float:
    began = attempt.time.timestamp() if attempt.time else -math.inf
    return max(began, steps[-1].time.timestamp() if steps else began)
