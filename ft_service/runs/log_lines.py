"""A run's log: its events and steps in the order of time, for `ft logs`; as text or as JSON with the run's id."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ft_service.runs.events import read_events
from ft_service.runs.folder import ENDED, RunFolder
from ft_service.runs.metrics import read_metrics
from ft_service.runs.progress import format_progress

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class _Entry:
    time: datetime
    text: str
    fields: dict[str, Any]


def log_lines(run: RunFolder) -> list[str]:
    """One line per event and step, oldest first. Steps that a resumed run repeats are listed once."""
    return [
        f"{entry.time:%Y-%m-%d %H:%M:%S}  {entry.text}" if entry.time != _LONG_AGO else entry.text
        for entry in _entries(run)
    ]


def json_lines(run: RunFolder) -> list[str]:
    """The same as JSON objects. All have `run`, `type` and, unless the line was damaged, `time`.

    A step has the type `step`, and the figures of `metrics.jsonl`.
    """
    return [json.dumps({"run": run.run_id, **entry.fields}, ensure_ascii=False) for entry in _entries(run)]


def follow(
    run: RunFolder, wait: Callable[[], None], lines: Callable[[RunFolder], list[str]] = log_lines
) -> Iterator[str]:
    """The lines of a run as they come, until it has ended. `wait` is called between two looks."""
    shown: set[str] = set()
    while True:
        status = run.status()
        has_ended = status is not None and status.state in ENDED  # looked up first: the last lines come before it
        for line in lines(run):
            if line not in shown:
                shown.add(line)
                yield line
        if has_ended:
            return
        wait()


def _entries(run: RunFolder) -> list[_Entry]:
    num_steps = run.plan().num_steps if run.has_plan() else 0
    entries = []
    for event in read_events(run.storage, run.run_id):
        text = f"{event.type}: {' '.join(event.message.split())}"
        entries.append(_Entry(event.time or _LONG_AGO, text, event.model_dump(mode="json", exclude_none=True)))
    validation_loss = None
    for metrics in read_metrics(run.storage, run.run_id):
        validation_loss = validation_loss if metrics.validation_loss is None else metrics.validation_loss
        text = format_progress(metrics, num_steps, validation_loss, None)
        figures = json.loads(metrics.model_dump_json(exclude_none=True))  # with NaN as metrics.jsonl has it
        entries.append(_Entry(metrics.time, text, {"type": "step", **figures}))
    return sorted(entries, key=lambda entry: entry.time)
