"""API keys with their limits and quotas, and what each has used: jobs, bytes of files, GPU-hours."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, func, select

from ft_service.cluster.queue.usage import read_limits, used_hours
from ft_service.storage.storage import Storage
from serve.database.database import session
from serve.database.keys import ApiKey, list_keys
from serve.database.tables import FileRow, FineTuningJobRow
from serve.fine_tuning.job_states import ENDED
from serve.fine_tuning.run_spec import queue_owner
from serve.settings import FineTuningSettings


def usage_of_keys(
    engine: Engine, storage: Storage, tuning: FineTuningSettings, own: ApiKey | None
) -> list[dict[str, Any]]:
    """Of the client's own key; of all keys for an admin, and on a server without keys.

    Raises `DatabaseError` and `StorageError`.
    """
    stored = list_keys(engine)
    if own is None or own.is_admin:
        known = {key.id for key in stored}
        keys = [*([own] if own is not None and own.id not in known else []), *stored]
    else:
        keys = [key for key in stored if key.id == own.id]
    jobs = _jobs(engine)
    files = _files(engine)
    limits = read_limits(storage)
    hours = used_hours(storage, datetime.now(UTC), limits.window_hours)
    rows = []
    for key in keys:
        owner = queue_owner(key.name)
        quota = limits.owners.get(owner, limits.default)
        rows.append(
            {
                **_row(key, jobs.get(key.id, (0, 0)), files.get(key.id, (0, 0))),
                "max_file_bytes": int(tuning.files.key_gib * 2**30),
                "max_running_jobs": quota.max_runs,
                "gpu_hours": round(hours.get(owner, 0.0), 3),
                "max_gpu_hours": quota.max_gpu_hours,
                "window_hours": limits.window_hours,
            }
        )
    return rows


def _row(key: ApiKey, jobs: tuple[int, int], files: tuple[int, int]) -> dict[str, Any]:
    is_valid = key.is_valid(datetime.now(UTC))
    return {
        "object": "fine_tuning.key",
        "name": key.name,
        "status": "valid" if is_valid else "revoked" if key.revoked else "expired",
        "is_admin": key.is_admin,
        "organization": key.organization,
        "models": None if key.models is None else list(key.models),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "active_jobs": jobs[0],
        "jobs": jobs[1],
        "files": files[0],
        "file_bytes": files[1],
    }


def _jobs(engine: Engine) -> Mapping[str, tuple[int, int]]:
    """Key id -> jobs that have not ended, and all jobs."""
    active = func.count().filter(FineTuningJobRow.state.not_in(ENDED))
    query = select(FineTuningJobRow.key, active, func.count()).group_by(FineTuningJobRow.key)
    with session(engine) as opened:
        return {key: (running, count) for key, running, count in opened.execute(query)}


def _files(engine: Engine) -> Mapping[str, tuple[int, int]]:
    """Key id -> files, and their bytes."""
    query = select(FileRow.key, func.count(), func.sum(FileRow.size)).group_by(FileRow.key)
    with session(engine) as opened:
        return {key: (count, int(size)) for key, count, size in opened.execute(query)}
