"""A run's log: its events and steps in the order of time, for `ft logs`."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from ft_service.runs.events import read_events
from ft_service.runs.folder import ENDED, RunFolder
from ft_service.runs.metrics import read_metrics
from ft_service.runs.progress import format_progress

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


def log_lines(run: RunFolder) -> list[str]:
    """One line per event and step, oldest first. Steps that a resumed run repeats are listed once."""
    num_steps = run.plan().num_steps if run.has_plan() else 0
    entries: list[tuple[datetime, str]] = []
    for event in read_events(run.storage, run.run_id):
        entries.append((event.time or _LONG_AGO, f"{event.type}: {' '.join(event.message.split())}"))
    validation_loss = None
    for metrics in read_metrics(run.storage, run.run_id):
        validation_loss = validation_loss if metrics.validation_loss is None else metrics.validation_loss
        entries.append((metrics.time, format_progress(metrics, num_steps, validation_loss, None)))
    entries.sort(key=lambda entry: entry[0])
    return [f"{time:%Y-%m-%d %H:%M:%S}  {text}" if time != _LONG_AGO else text for time, text in entries]


def follow(run: RunFolder, wait: Callable[[], None]) -> Iterator[str]:
    """The lines of a run as they come, until it has ended. `wait` is called between two looks."""
    shown: set[str] = set()
    while True:
        status = run.status()
        has_ended = status is not None and status.state in ENDED  # looked up first: the last lines come before it
        for line in log_lines(run):
            if line not in shown:
                shown.add(line)
                yield line
        if has_ended:
            return
        wait()
