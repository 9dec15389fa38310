"""An evaluation in a terminal: a table, and what it means in sentences."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rich.table import Table

from ft_service.cli.common import console, new_table, print_item, print_text
from ft_service.evaluate.comparison import Comparison
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.summary import sentences
from ft_service.text import counted

_SHOWN_LOST = 3
_SHOWN_FAILURES = 5
_SHOWN_CHARACTERS = 200
_LINE_SECONDS = 5.0
_COLOURS = {"better": "green", "worse": "red", "not settled": "default"}


class ProgressLine:
    """Answers of a stage. A terminal shows one line in place; a log gets a line every few seconds, and the last."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._shown_at = float("-inf")
        self._shown = ("", -1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        is_due = self._in_place or done in (0, total) or now - self._shown_at >= _LINE_SECONDS
        if not is_due or (stage, done) == self._shown:
            return
        self._shown_at = now
        self._shown = (stage, done)
        end = "\n" if done == total or not self._in_place else ""
        start = "\r" if self._in_place else ""
        print(f"{start}Answers on storage, {stage}: {done:,} of {total:,}", end=end, file=self._stream, flush=True)


def show_evaluation(evaluation: Evaluation, place: str) -> None:
    """Print the result; `place` is where it lies."""
    print_item(
        f"{evaluation.adapter.id} against {evaluation.base.id}",
        f"suite {evaluation.suite.name} ({evaluation.suite.digest[:8]}), {counted(evaluation.items, 'question')}",
        place,
    )
    console.print()
    overall = evaluation.comparison.overall
    rows = [*evaluation.comparison.skills, *([overall] if overall else []), *evaluation.other_tasks]
    if rows:
        console.print(comparison_table(rows, "base" if evaluation.base.digest is None else "other"))
        console.print()
    for line in sentences(evaluation):
        print_text(line)
    for lost in evaluation.forgetting.lost[:_SHOWN_LOST]:
        console.print()
        print_item(
            f"Lost: {lost.id}",
            f"asked: {_short(lost.prompt)}",
            f"base: {_short(lost.base_answer)}",
            f"adapter: {_short(lost.adapter_answer)} ({lost.reason})",
        )
    if evaluation.num_failures:
        console.print()
        print_text(f"{counted(evaluation.num_failures, 'question')} without an answer; the same command asks again:")
        for failure in evaluation.failures[:_SHOWN_FAILURES]:
            print_text(f"{failure.item} ({failure.model}): {failure.reason}", indent=4)


def comparison_table(rows: Sequence[Comparison], first: str, second: str = "adapter") -> Table:
    """One row a comparison: both scores, the difference with its interval, and the verdict."""
    table = new_table("skill", "items", first, second, "difference (95 %)", "verdict")
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.name,
            f"{row.items:,}",
            f"{100 * row.base:.1f}",
            f"{100 * row.adapter:.1f}",
            f"{_points(row.difference)} ({_points(row.low)} to {_points(row.high)})",
            f"[{_COLOURS[row.verdict]}]{row.verdict}[/]",
        )
    return table


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} ..."
