"""Creates the planned jobs on a server, by the same requests that OpenAI's client sends."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

from ft_service.errors import ServingError
from ft_service.migrate.migration import ORIGIN, MigrationJob
from ft_service.migrate.rows import RowReport, usable_lines

_ATTEMPTS = 4
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_TIMEOUT_SECONDS = 600.0
_LONGEST_WAIT_SECONDS = 30.0

Sleep = Callable[[float], object]


class RefusedError(ServingError):
    """The server refuses one request; others may be accepted."""


class FineTuningServer:
    """The routes of OpenAI's fine-tuning API that a migration needs, on a server."""

    def __init__(
        self, url: str, key: str | None, transport: httpx.BaseTransport | None = None, sleep: Sleep = time.sleep
    ) -> None:
        """`url` is the server's address; /v1 may be left out. Raises `ServingError` for an address that is none."""
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._sleep = sleep
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(
                base_url=self.url, headers=headers, timeout=_TIMEOUT_SECONDS, transport=transport
            )
        except httpx.InvalidURL:
            raise ServingError(f"--server = {url!r}: is no address. Use http://HOST:PORT.") from None

    def close(self) -> None:
        self._client.close()

    def find_job(self, source_id: str) -> str | None:
        """The id of the job that carries `source_id` in its metadata, and did not fail."""
        job = self.migrated_job(source_id)
        return None if job is None else str(job["id"])

    def migrated_job(self, source_id: str) -> dict[str, Any] | None:
        """The newest job that carries `source_id` in its metadata, and did not fail."""
        query = {f"metadata[{ORIGIN}]": source_id, "limit": "100"}
        jobs: list[dict[str, Any]] = self._send("GET", "/fine_tuning/jobs", params=query).get("data", [])
        for job in jobs:
            is_origin = (job.get("metadata") or {}).get(ORIGIN) == source_id  # a server may ignore the filter
            if is_origin and job.get("status") not in ("failed", "cancelled"):
                return job
        return None

    def upload(self, file: Path, report: RowReport) -> str:
        """Upload the usable lines of a file, and return its id."""
        with _content(file, report) as stream:
            reply = self._send(
                "POST",
                "/files",
                data={"purpose": "fine-tune"},
                files={"file": (file.name, stream, "application/jsonl")},
                rewind=stream,
            )
        return str(reply["id"])

    def create_job(self, request: dict[str, Any]) -> str:
        return str(self._send("POST", "/fine_tuning/jobs", json=request)["id"])

    def _send(self, method: str, path: str, rewind: IO[bytes] | None = None, **options: Any) -> dict[str, Any]:
        """Send a request, again where a retry may help. A server answers a repeated create with the same job."""
        for attempt in range(1, _ATTEMPTS + 1):
            if rewind is not None:
                rewind.seek(0)
            try:
                response = self._client.request(method, path, **options)
            except httpx.HTTPError as error:
                if attempt == _ATTEMPTS:
                    raise ServingError(
                        f"--server = {self.url!r}: does not answer ({type(error).__name__}). Is the server up?"
                    ) from None
                self._sleep(2.0 ** (attempt - 1))
                continue
            if response.is_success:
                return _json(response)
            may_retry = response.headers.get("x-should-retry") != "false"
            if response.status_code not in _RETRIED or not may_retry or attempt == _ATTEMPTS:
                break
            self._sleep(_seconds(response.headers.get("retry-after"), 2.0 ** (attempt - 1)))
        raise _error(response, self.url)


def create_jobs(server: FineTuningServer, jobs: Sequence[MigrationJob]) -> None:
    """Create each job that is ready, and note on it what became of it.

    A file that several jobs use is uploaded once. Raises `ServingError` if the server does not answer, or rejects the
    key. If it refuses one job, the reason is a problem of that job.
    """
    uploaded: dict[Path, str] = {}
    for job in jobs:
        if job.outcome != "ready":
            continue
        try:
            _create(server, job, uploaded)
        except RefusedError as error:
            job.outcome = "failed"
            job.problems.append(str(error))


def _create(server: FineTuningServer, job: MigrationJob, uploaded: dict[Path, str]) -> None:
    if existing := server.find_job(job.source.id):
        job.outcome = "exists"
        job.job_id = existing
        return
    request = dict(job.request)
    for name, path in (("training_file", job.training), ("validation_file", job.validation)):
        if path is None:
            continue
        if path not in uploaded:
            uploaded[path] = server.upload(path, job.rows[name])
        request[name] = uploaded[path]
    job.job_id = server.create_job(request)
    job.outcome = "created"


@contextmanager
def _content(file: Path, report: RowReport) -> Iterator[IO[bytes]]:
    """The file itself, or a temporary copy without its bad lines."""
    if not report.bad_lines:
        with open(file, "rb") as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as copy:
        copy.writelines(usable_lines(file, report))
        copy.seek(0)
        yield copy


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise ServingError(f"{response.url}: the reply is no JSON object, so this is no server of this API.")
    return content


def _error(response: httpx.Response, url: str) -> ServingError:
    try:
        reason = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        reason = f"answers {response.status_code}, and not in the form of OpenAI's API"
    if response.status_code in (401, 403):
        return ServingError(f"--server = {url!r}: {reason} The key is the environment's FT_API_KEY.")
    return RefusedError(f"the server refuses it ({response.status_code}): {reason}")


def _seconds(retry_after: str | None, otherwise: float) -> float:
    try:
        return min(float(retry_after or ""), _LONGEST_WAIT_SECONDS)
    except ValueError:
        return otherwise
