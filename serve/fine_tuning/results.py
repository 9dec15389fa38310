"""The figures of a job: events of its steps, and the CSV that scripts download as its result file."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from ft_service.runs.metrics import StepMetrics
from serve.fine_tuning.job_records import NewEvent

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""Of the result file, as OpenAI writes it. An accuracy is the share of trained tokens that are predicted."""


def results_csv(metrics: Sequence[StepMetrics]) -> bytes:
    """One line per step; figures that were not measured are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step in metrics:
        figures = (step.loss, step.accuracy, step.validation_loss, step.validation_accuracy)
        writer.writerow([step.step, *map(_number, figures)])
    return text.getvalue().encode()


def metrics_event(metrics: StepMetrics, num_steps: int) -> NewEvent:
    """The event of a step, in OpenAI's words."""
    validation = metrics.validation_loss
    tail = "" if validation is None else f", validation loss={validation:.4f}"
    return NewEvent(
        f"Step {metrics.step}/{num_steps}: training loss={metrics.loss:.4f}{tail}",
        type="metrics",
        data={**checkpoint_metrics(metrics), "total_steps": num_steps, "learning_rate": metrics.learning_rate},
    )


def checkpoint_metrics(metrics: StepMetrics) -> Mapping[str, Any]:
    """The figures of a step by OpenAI's names. Validations are of the whole validation set."""
    validation = _finite(metrics.validation_loss)
    accuracy = _finite(metrics.validation_accuracy)
    return {
        "step": metrics.step,
        "train_loss": _finite(metrics.loss),
        "train_mean_token_accuracy": _finite(metrics.accuracy),
        "valid_loss": validation,
        "valid_mean_token_accuracy": accuracy,
        "full_valid_loss": validation,
        "full_valid_mean_token_accuracy": accuracy,
    }


def estimated_finish(metrics: Sequence[StepMetrics], num_steps: int, last: int = 20) -> datetime | None:
    """When the last step is done, at the pace of the `last` steps; None before the second."""
    recent = metrics[-last:]
    if len(recent) < 2 or recent[-1].step == recent[0].step:
        return None
    pace = (recent[-1].time - recent[0].time) / (recent[-1].step - recent[0].step)
    return recent[-1].time + max(timedelta(), pace * (num_steps - recent[-1].step))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
