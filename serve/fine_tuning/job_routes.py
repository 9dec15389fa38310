"""The routes below /v1/fine_tuning/jobs: read a request, ask `Jobs`, answer in OpenAI's shapes."""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from serve.database.tables import FineTuningJobRow, JobCheckpointRow, JobEventRow, with_utc
from serve.fine_tuning.events import event_stream
from serve.fine_tuning.file_wire import ListPage, list_page
from serve.fine_tuning.job_records import Job
from serve.fine_tuning.jobs import Jobs, known_after
from serve.fine_tuning.waiting import status_details, waiting_reply
from serve.fine_tuning.wire import (
    FineTuningJob,
    FineTuningJobCheckpoint,
    FineTuningJobEvent,
    FineTuningJobRequest,
)
from serve.http.body import read_json
from serve.http.in_flight import InFlight
from serve.http.keys import client_of
from serve.http.openapi import reads
from serve.http.tenants import Tenant, tenant_of

BODIES: list[type[BaseModel]] = [FineTuningJobRequest]
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_PATH = "/v1/fine_tuning/jobs"
_MOST_MIB = 1.0
_METADATA = re.compile(r"metadata\[(.*)\]")
_DEFAULT_EVENTS = 20
_CHECKS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="check-job")
"""Checking files takes seconds. Threads of their own, so that other requests do not wait behind many jobs."""
T = TypeVar("T")
_DEFAULT_CHECKPOINTS = 10

Limit = Annotated[int, Query(ge=1, le=1000)]


def job_routes(jobs: Jobs, organization: str, in_flight: InFlight) -> APIRouter:
    """Create, list, retrieve, cancel, pause and resume jobs; their events and checkpoints."""
    api = APIRouter()

    def answer(job: Job) -> JSONResponse:
        return JSONResponse(reply(job).model_dump(mode="json"))

    def reply(job: Job) -> FineTuningJob:
        return job_reply(job, organization, jobs.records.clock())

    @api.post(_PATH, openapi_extra=reads(FineTuningJobRequest), response_model=FineTuningJob)
    async def create(http: Request) -> Response:
        """Accept a job; with the header `x-dry-run: true`, only estimate it."""
        request = await read_json(http, FineTuningJobRequest, _MOST_MIB)
        client_of(http).check_may_use(request.model)
        owner = tenant_of(client_of(http))
        if http.headers.get("x-dry-run", "").lower() == "true":
            return JSONResponse(await _checked(jobs.estimate, owner, request))
        return answer(await _checked(jobs.create, owner, request))

    @api.post(f"{_PATH}/estimate", openapi_extra=reads(FineTuningJobRequest))
    async def estimate(http: Request) -> dict[str, Any]:
        """What a job would take: tokens, memory, steps, hours, cost, its place in the queue. Writes nothing."""
        request = await read_json(http, FineTuningJobRequest, _MOST_MIB)
        client_of(http).check_may_use(request.model)
        return await _checked(jobs.estimate, tenant_of(client_of(http)), request)

    @api.get(_PATH)
    def list_jobs(http: Request, limit: Limit = 20, after: str | None = None) -> ListPage[FineTuningJob]:
        """Newest first; `metadata[key]=value` selects."""
        wanted = {
            match.group(1): value
            for name, value in http.query_params.multi_items()
            if (match := _METADATA.fullmatch(name))
        }
        found, has_more = jobs.list_jobs(tenant_of(client_of(http)).visible(FineTuningJobRow), limit, after, wanted)
        return list_page([reply(job) for job in found], has_more)

    @api.get(f"{_PATH}/{{job_id}}")
    def retrieve(http: Request, job_id: str) -> FineTuningJob:
        return reply(jobs.find(job_id, tenant_of(client_of(http))))

    @api.post(f"{_PATH}/{{job_id}}/cancel")
    def cancel(http: Request, job_id: str) -> FineTuningJob:
        return reply(jobs.cancel(job_id, tenant_of(client_of(http))))

    @api.post(f"{_PATH}/{{job_id}}/pause")
    def pause(http: Request, job_id: str) -> FineTuningJob:
        return reply(jobs.pause(job_id, tenant_of(client_of(http))))

    @api.post(f"{_PATH}/{{job_id}}/resume")
    def resume(http: Request, job_id: str) -> FineTuningJob:
        return reply(jobs.resume(job_id, tenant_of(client_of(http))))

    @api.get(f"{_PATH}/{{job_id}}/events", response_model=ListPage[FineTuningJobEvent])
    async def events(
        http: Request, job_id: str, limit: Limit = _DEFAULT_EVENTS, after: str | None = None, stream: bool = False
    ) -> Response | ListPage[FineTuningJobEvent]:
        """Newest first. With `stream=true` or `Accept: text/event-stream`: oldest first, and new ones as they come."""
        await asyncio.to_thread(jobs.find, job_id, tenant_of(client_of(http)))
        if stream or "text/event-stream" in http.headers.get("accept", ""):
            last = http.headers.get("last-event-id") or after
            await asyncio.to_thread(known_after, last, lambda: jobs.records.events_since(job_id, last, 1))
            lines = event_stream(jobs.records, job_id, last, _event_json, lambda: in_flight.is_stopping)
            return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS)
        rows, has_more = await asyncio.to_thread(
            known_after, after, lambda: jobs.records.list_events(job_id, limit, after)
        )
        return list_page([event_reply(row) for row in rows], has_more)

    @api.get(f"{_PATH}/{{job_id}}/checkpoints")
    def checkpoints(
        http: Request, job_id: str, limit: Limit = _DEFAULT_CHECKPOINTS, after: str | None = None
    ) -> ListPage[FineTuningJobCheckpoint]:
        """Newest first."""
        jobs.find(job_id, tenant_of(client_of(http)))
        rows, has_more = known_after(after, lambda: jobs.records.list_checkpoints(job_id, limit, after))
        return list_page([checkpoint_reply(row) for row in rows], has_more)

    return api


async def _checked(act: Callable[[Tenant, FineTuningJobRequest], T], owner: Tenant, request: FineTuningJobRequest) -> T:
    return await asyncio.get_running_loop().run_in_executor(_CHECKS, act, owner, request)


# -- replies -----------------------------------------------------------------------------------------------------------


def job_reply(job: Job, organization: str, now: datetime) -> FineTuningJob:
    """A job in OpenAI's shape, and what it waits for."""
    request = job.request
    hyperparameters = _hyperparameters(job)
    return FineTuningJob.model_validate(
        {
            "id": job.id,
            "created_at": int(job.created.timestamp()),
            "error": job.error,
            "fine_tuned_model": job.alias if job.state == "succeeded" else None,
            "finished_at": None if job.finished is None else int(job.finished.timestamp()),
            "hyperparameters": hyperparameters,
            "model": job.model,
            "organization_id": job.organization or organization,
            "result_files": list(job.result_files) if job.state == "succeeded" else [],
            "seed": job.seed,
            "status": job.state,
            "trained_tokens": job.trained_tokens,
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            "estimated_finish": None if job.estimated_finish is None else int(job.estimated_finish.timestamp()),
            "integrations": request.get("integrations") or [],
            "metadata": request.get("metadata") or {},
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            "status_details": status_details(job, now),
            "waiting": waiting_reply(job),
        }
    )


def _hyperparameters(job: Job) -> dict[str, Any]:
    """As the run has them; before the files are checked, as they were asked for."""
    if job.resolved is not None:
        return dict(job.resolved["hyperparameters"])
    method = job.request.get("method") or {}
    asked = (method.get("supervised") or {}).get("hyperparameters") or job.request.get("hyperparameters") or {}
    return {name: asked.get(name, "auto") for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}


def event_reply(row: JobEventRow) -> FineTuningJobEvent:
    return FineTuningJobEvent.model_validate(
        {
            "id": row.id,
            "created_at": int(with_utc(row.time).timestamp()),
            "level": row.level,
            "message": row.message,
            "data": row.data or {},
            "type": row.type,
        }
    )


def _event_json(row: JobEventRow) -> dict[str, Any]:
    return event_reply(row).model_dump(mode="json")


def checkpoint_reply(row: JobCheckpointRow) -> FineTuningJobCheckpoint:
    return FineTuningJobCheckpoint.model_validate(
        {
            "id": row.id,
            "created_at": int(with_utc(row.time).timestamp()),
            "fine_tuned_model_checkpoint": row.alias,
            "fine_tuning_job_id": row.job,
            "metrics": row.metrics,
            "step_number": row.step,
        }
    )
