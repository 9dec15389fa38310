"""Events and warnings about saves. Only rank 0 reports."""

import sys
import time

from ft_service.runs.events import (
    CheckpointFailed,
    CheckpointSaved,
    CheckpointsKeepFailing,
    Event,
    EventLog,
    OldCheckpointsLeft,
)
from ft_service.spec.schema import CheckpointSpec
from ft_service.text import counted, format_duration

ALARMING_FAILURES = 3
"""A warning says how many steps are at risk after so many failed saves in a row, and whenever their number doubles."""


class SaveReport:
    """Reports each save as an event, and warns when saves keep failing."""

    def __init__(self, events: EventLog, settings: CheckpointSpec, newest_step: int) -> None:
        """`newest_step` is that of the newest checkpoint on storage, 0 if there is none."""
        self._events = events
        self._settings = settings
        self._newest_step = newest_step
        self._newest_at = time.monotonic()
        self._failures_in_a_row = 0

    def saved(self, step: int) -> None:
        failures = self._failures_in_a_row
        before = f", after {counted(failures, 'failed save')}" if failures else ""
        self._newest_step = step
        self._newest_at = time.monotonic()
        self._failures_in_a_row = 0
        self._events.emit(CheckpointSaved(message=f"Saved the checkpoint of step {step}{before}.", step=step))

    def failed(self, step: int, problem: str, ranks: list[int]) -> None:
        self._failures_in_a_row += 1
        newest = (
            f"The newest checkpoint is that of step {self._newest_step}." if self._newest_step else "There is none."
        )
        continues = self._settings.on_failure == "continue"
        outlook = " Training continues, and the next save tries again." if continues else ""
        message = f"{problem} {newest}{outlook}"
        self._emit(CheckpointFailed(message=message, step=step, workers=ranks, newest_step=self._newest_step))
        times, rest = divmod(self._failures_in_a_row, ALARMING_FAILURES)
        if rest == 0 and times & (times - 1) == 0:  # at 3, 6, 12, ...
            alarm = (
                f"NO CHECKPOINT for {format_duration(time.monotonic() - self._newest_at)}: {self._failures_in_a_row} "
                f"saves in a row failed. {newest} If a worker dies now, {step - self._newest_step} steps are lost. "
                "Fix the storage while the run is training: the next save then works again."
            )
            self._emit(
                CheckpointsKeepFailing(
                    message=alarm,
                    step=step,
                    workers=ranks,
                    newest_step=self._newest_step,
                    failures=self._failures_in_a_row,
                )
            )

    def not_deleted(self, error: Exception) -> None:
        message = f"Old checkpoints could not be deleted: {error} The next save tries again."
        self._emit(OldCheckpointsLeft(message=message, step=self._newest_step))

    def _emit(self, event: Event) -> None:
        if self._events.emit(event):  # an event that cannot be written is printed by `emit` itself
            print(event.message, file=sys.stderr, flush=True)
