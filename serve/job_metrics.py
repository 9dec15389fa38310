"""Prometheus metrics of jobs, set by the controller after each step. Ray exports them beside its own."""

from datetime import datetime
from typing import get_args

from ray.util.metrics import Gauge
from sqlalchemy import Engine, func, select

from serve.database.database import session
from serve.database.tables import FineTuningJobRow, with_utc
from serve.fine_tuning.job_states import State

WAITING: tuple[State, ...] = ("validating_files", "queued")

_jobs = Gauge("ft_jobs", "Fine-tuning jobs by state.", ("state",))
_waiting = Gauge(
    "ft_jobs_longest_wait_seconds", "How long the job that has been in this state longest waits in it.", ("state",)
)


def update_job_metrics(engine: Engine, now: datetime) -> None:
    """Set the gauges from the jobs in the database. Raises `DatabaseError`."""
    query = select(FineTuningJobRow.state, func.count(), func.min(FineTuningJobRow.since)).group_by(
        FineTuningJobRow.state
    )
    with session(engine) as opened:
        found = {state: (count, since) for state, count, since in opened.execute(query)}
    for state in get_args(State):
        count, since = found.get(state, (0, None))
        _jobs.set(count, {"state": state})
        if state in WAITING:
            _waiting.set(0 if since is None else (now - with_utc(since)).total_seconds(), {"state": state})
