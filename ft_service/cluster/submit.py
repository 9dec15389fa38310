"""`ft submit`: a thin wrapper over the Ray Jobs API, which `ray job submit` uses as well."""

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ft_service.errors import ClusterError, UsageError
from ft_service.runs.code import COMMIT_VARIABLE, commit_of
from ft_service.runs.folder import new_run_id
from ft_service.spec.schema import RunSpec
from ft_service.text import first_line

_PROJECT_ROOT = Path(__file__).resolve().parents[2]


def submit_run(
    spec_path: Path, spec: RunSpec, overrides: Sequence[str], address: str, run_id: str | None, detach: bool
) -> int:
    """Submit jobs/train.py with the project as working directory. Returns the job's exit code, or 0 when detached.

    Raises `ClusterError`.
    """
    spec_path = spec_path.resolve()
    if not spec_path.is_relative_to(_PROJECT_ROOT):
        raise UsageError(
            f"SPEC = {spec_path}: is outside {_PROJECT_ROOT}, the folder that is uploaded. Move it there, "
            "for example to jobs/specs."
        )
    run_id = run_id or new_run_id(spec.name)
    return _submit([str(spec_path.relative_to(_PROJECT_ROOT)), "--run-id", run_id, *overrides], run_id, address, detach)


def submit_resume(run_id: str, storage: str, overrides: Sequence[str], address: str, detach: bool) -> int:
    """Submit jobs/train.py to resume a run; like `submit_run`."""
    return _submit(["--resume", run_id, "--storage", storage, *overrides], run_id, address, detach)


def _runtime_env() -> dict[str, object]:
    """The checkout as working directory, and the commit, which the copy on the cluster cannot tell."""
    commit = commit_of()
    variables = {"env_vars": {COMMIT_VARIABLE: commit}} if commit else {}
    return {"working_dir": str(_PROJECT_ROOT), **variables}


def _submit(arguments: list[str], run_id: str, address: str, detach: bool) -> int:
    """The submission id is the run id; later jobs of the same run add a random suffix.

    When two jobs of one run overlap, the run's lease makes the later one fail.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    command = shlex.join(["python", "jobs/train.py", *arguments])
    try:
        client = JobSubmissionClient(address)
        is_taken = any(job.submission_id == run_id for job in client.list_jobs())
        submission_id = f"{run_id}-{secrets.token_hex(3)}" if is_taken else run_id
        job = client.submit_job(entrypoint=command, submission_id=submission_id, runtime_env=_runtime_env())
    except Exception as error:  # RuntimeError, ConnectionError, and the client's own errors
        raise ClusterError(
            f"--address = {address}: the job was not accepted ({error}). Check that the cluster is up, that the "
            "address is that of its dashboard, and that RAY_AUTH_MODE and the token are those of its head node."
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


SubmissionState = Literal["unknown", "pending", "running", "stopped", "failed", "succeeded"]
_STATES: dict[str, SubmissionState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "STOPPED": "stopped",
    "FAILED": "failed",
    "SUCCEEDED": "succeeded",
}


_KILLED = {-9, 137}
"""Exit codes of a driver that got SIGKILL, also from the kernel when memory is short; 137 is a shell's."""
_LOST = {"JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE"}
"""Ray's error types of a job whose node is gone."""


@dataclass(frozen=True)
class Submission:
    """What Ray knows of a submitted job. `unknown`: nothing, as after the loss of a head."""

    state: SubmissionState
    message: str = ""
    was_killed: bool = False
    """It has failed, and did not end by itself: its driver was killed, or its node is gone."""

    @property
    def is_alive(self) -> bool:
        return self.state in ("pending", "running")


class Submissions:
    """Jobs that the caller names: Ray accepts each name once, so nothing is ever submitted twice.

    Every call raises `ClusterError` when Ray does not answer.
    """

    def __init__(self, address: str) -> None:
        """`address`: of the dashboard, as http://host:8265, or of the cluster, as host:6379."""
        self._address = address
        self._client: Any = None

    def submit(self, run_id: str, storage: str, submission_id: str) -> None:
        """Submit jobs/train.py for a run whose spec is in its folder. Does nothing if Ray has this name already."""
        command = shlex.join(["python", "jobs/train.py", "--resume", run_id, "--storage", storage])
        if self.find(submission_id).state != "unknown":
            return
        try:
            self._connected().submit_job(
                entrypoint=command, submission_id=submission_id, runtime_env={"working_dir": str(_PROJECT_ROOT)}
            )
        except Exception as error:
            if self.find(submission_id).state == "unknown":  # otherwise another call was first
                raise self._no_answer(error) from None

    def find(self, submission_id: str) -> Submission:
        try:
            details = self._connected().get_job_info(submission_id)
        except ClusterError:
            raise
        except Exception as error:
            if "does not exist" in str(error):
                return Submission("unknown")
            raise self._no_answer(error) from None
        was_killed = details.driver_exit_code in _KILLED or str(details.error_type) in _LOST
        state = _STATES[str(details.status.value)]
        return Submission(state, details.message or "", was_killed=was_killed and state == "failed")

    def stop(self, submission_id: str) -> None:
        """Ask a job to stop; its driver saves a checkpoint. Does nothing if it has ended."""
        try:
            self._connected().stop_job(submission_id)
        except ClusterError:
            raise
        except Exception as error:
            if "does not exist" not in str(error):
                raise self._no_answer(error) from None

    def _connected(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        if self._client is None:
            try:
                self._client = JobSubmissionClient(self._address)
            except Exception as error:  # RuntimeError, ConnectionError, and the client's own errors
                raise self._no_answer(error) from None
        return self._client

    def _no_answer(self, error: Exception) -> ClusterError:
        self._client = None  # a new head may have another address
        return ClusterError(
            f"ray_address = {self._address}: Ray's job server does not answer ({first_line(error)}). Check that the "
            "cluster is up, and that RAY_AUTH_MODE and the token are those of its head node."
        )
