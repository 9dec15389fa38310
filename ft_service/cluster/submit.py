"""`ft submit`: a thin wrapper over the Ray Jobs API, which `ray job submit` speaks too."""

import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path

from ft_service.errors import ClusterError, UsageError
from ft_service.runs.folder import new_run_id
from ft_service.spec.schema import RunSpec

_PROJECT_ROOT = Path(__file__).resolve().parents[2]


def submit_run(
    spec_path: Path, spec: RunSpec, overrides: Sequence[str], address: str, run_id: str | None, detach: bool
) -> int:
    """Submit jobs/train.py with the project as working directory; returns the exit code of the job, 0 when detached.

    Raises `ClusterError`.
    """
    spec_path = spec_path.resolve()
    if not spec_path.is_relative_to(_PROJECT_ROOT):
        raise UsageError(
            f"SPEC = {spec_path}: lies outside {_PROJECT_ROOT}, which is what travels. Move it below, e.g. to "
            "jobs/specs."
        )
    run_id = run_id or new_run_id(spec.name)
    return _submit([str(spec_path.relative_to(_PROJECT_ROOT)), "--run-id", run_id, *overrides], run_id, address, detach)


def submit_resume(run_id: str, storage: str, overrides: Sequence[str], address: str, detach: bool) -> int:
    """Submit jobs/train.py to go on with a run; like `submit_run`."""
    return _submit(["--resume", run_id, "--storage", storage, *overrides], run_id, address, detach)


def _submit(arguments: list[str], run_id: str, address: str, detach: bool) -> int:
    """The submission id is the run id, with something added from the second job of a run on.

    Two jobs of one run at the same time are told apart by its lease: the later one is refused.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    command = shlex.join(["python", "jobs/train.py", *arguments])
    try:
        client = JobSubmissionClient(address)
        is_taken = any(job.submission_id == run_id for job in client.list_jobs())
        submission_id = f"{run_id}-{secrets.token_hex(3)}" if is_taken else run_id
        job = client.submit_job(
            entrypoint=command, submission_id=submission_id, runtime_env={"working_dir": str(_PROJECT_ROOT)}
        )
    except (
        Exception
    ) as error:  # the client raises RuntimeError, ConnectionError and its own, all with a text for people
        raise ClusterError(
            f"--address = {address}: the job was not accepted ({error}). Check that the cluster is up, that the "
            "address is that of its dashboard, and that RAY_AUTH_MODE and the token are those of its head."
        ) from None
    print(job, flush=True)
    if detach:
        return 0
    import asyncio

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(follow())
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    print(f"job {job}: {info.status} {info.message or ''}", flush=True)
    return info.driver_exit_code or 1
