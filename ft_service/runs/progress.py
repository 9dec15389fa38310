"""Progress on a person's terminal or in a log: of training, and of work on weights."""

import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from ft_service.runs.metrics import StepMetrics
from ft_service.text import format_count, format_duration

Log = Callable[[str], None]
"""Shows one line to a person: `print`, or the `append` of a list in tests."""

LOG_LINE_SECONDS = 5.0


class LoadingLine:
    """Progress of this worker reading its share of the weights: a line every few seconds, and one at the end.

    `doing` and `what` describe other work on weights.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        doing: str = "Loading",
        what: str = "weights by this worker",
    ) -> None:
        self._doing = doing
        self._what = what
        self._stream = stream or sys.stdout
        self._clock = clock
        self._started_at = clock()
        self._shown_at = self._started_at
        self._shown_bytes = -1

    def __call__(self, bytes_read: int, total_bytes: int) -> None:
        now = self._clock()
        if bytes_read < total_bytes and now - self._shown_at < LOG_LINE_SECONDS:
            return
        if bytes_read == self._shown_bytes:
            return  # the last weights may have no bytes of this worker
        self._shown_bytes = bytes_read
        self._shown_at = now
        rate = bytes_read / max(now - self._started_at, 1e-3)
        print(
            f"{self._doing}: {bytes_read / 2**30:.2f} of {total_bytes / 2**30:.2f} GiB of {self._what}, "
            f"{rate / 2**30:.2f} GiB/s",
            file=self._stream,
            flush=True,
        )


class ProgressLine:
    """One line about the newest step. A terminal shows it in place; a log gets a new line every `LOG_LINE_SECONDS`.

    A log also gets the first step, the last step, and each validation.
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
        self._first = self._first or (metrics.step, now)
        first_step, first_time = self._first
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

    def close(self, complete: bool = True) -> None:
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
        self._is_shown = True
        self._shown_at = now


def format_progress(
    metrics: StepMetrics, num_steps: int, validation_loss: float | None, seconds_left: float | None
) -> str:
    """One step as one line; `validation_loss` is the newest, measured at this step or an earlier one."""
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
