"""The error for a loss or gradient that is not finite: it names the step and the rows that may have caused it."""

import math
from collections.abc import Callable, Sequence

from ft_service.errors import TrainingError
from ft_service.train.batches import Batches, Step, collate
from ft_service.train.protocol import Workers

_MAX_ROWS_LISTED = 20
_MAX_TEXTS_SHOWN = 5


def nonfinite_error(
    problem: str,
    step: Step,
    batches: Batches,
    parallel: Workers,
    text_of_row: Callable[[int], str],
) -> TrainingError:
    """The error to raise, the same on all ranks. Every rank must call it, before the weights change.

    `problem` says what is not finite, and in which step. Each row of the step goes through the model alone, because the
    loss of a micro-batch does not show which of its rows caused it.
    """
    with parallel.evaluation_mode():
        own_bad_rows = [
            row for row in step.rows if not math.isfinite(float(parallel.loss(collate([batches.rows[row]])).loss_sum))
        ]
    bad_rows = [(row, rank) for rank, rows in enumerate(parallel.all_gather_object(own_bad_rows)) for row in rows]
    if not bad_rows:
        rows = f"Each row of this step has a finite loss when it is evaluated alone: {_list(step.all_rows)}."
        return TrainingError(f"{problem} {rows} Lower train.learning_rate.")
    named = _list([f"{row} (worker {rank})" for row, rank in bad_rows])
    texts = [f" Row {row} begins {text!r}." for row, _ in bad_rows[:_MAX_TEXTS_SHOWN] if (text := text_of_row(row))]
    rows = f"Rows of the training data whose loss is not finite: {named}.{''.join(texts)}"
    # If every row is bad, the weights are at fault and not the data.
    fix = "Lower train.learning_rate" + (", or remove these rows." if len(bad_rows) < len(step.all_rows) else ".")
    return TrainingError(f"{problem} {rows} {fix}")


def _list(items: Sequence[object]) -> str:
    more = f" and {len(items) - _MAX_ROWS_LISTED} more" if len(items) > _MAX_ROWS_LISTED else ""
    return ", ".join(map(str, items[:_MAX_ROWS_LISTED])) + more
