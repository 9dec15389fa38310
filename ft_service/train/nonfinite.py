"""What to say when a loss or a gradient is not a finite number: the step, and the rows that may be to blame."""

import math
from collections.abc import Callable, Sequence

from ft_service.errors import TrainingError
from ft_service.train.batches import Batches, Step, collate
from ft_service.train.protocol import Workers

_MOST_NUMBERS, _MOST_TEXTS = 20, 5


def refusal(
    problem: str,
    step: Step,
    batches: Batches,
    parallel: Workers,
    text_of_row: Callable[[int], str],
) -> TrainingError:
    """The error that ends the run, the same on all workers; every worker must call it, before the weights change.

    `problem` says what is not finite, and in which step. Each row of the step is put through the model by itself, since
    the loss of a micro-batch does not tell its rows apart.
    """
    with parallel.evaluating():
        mine = [row for row in step.rows if not math.isfinite(float(parallel.loss(collate([batches.rows[row]]))))]
    found = [(row, worker) for worker, rows in enumerate(parallel.all_gather_object(mine)) for row in rows]
    if not found:
        what = f"By itself, each of its rows of the training data has a finite loss: {_list(step.all_rows)}."
        return TrainingError(f"{problem} {what} Lower train.learning_rate.")
    named = _list([f"{row} (worker {worker})" for row, worker in found])
    texts = [f" Row {row} begins {text!r}." for row, _ in found[:_MOST_TEXTS] if (text := text_of_row(row))]
    what = f"Rows of the training data whose loss is not finite: {named}.{''.join(texts)}"
    # When every row is bad, the weights are.
    cure = "Lower train.learning_rate" + (", or remove these rows." if len(found) < len(step.all_rows) else ".")
    return TrainingError(f"{problem} {what} {cure}")


def _list(items: Sequence[object]) -> str:
    more = f" and {len(items) - _MOST_NUMBERS} more" if len(items) > _MOST_NUMBERS else ""
    return ", ".join(map(str, items[:_MOST_NUMBERS])) + more
