"""What the installed client's types say of the API: every field, and every value of a literal, as one fact each.

FineTuningJob.status              a field
FineTuningJob.status='queued'     a value that it may have
JobCreateParams.method.type       a field of a request
"""

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from openai.types import (
    FileCreateParams,
    FileDeleted,
    FileListParams,
    FileObject,
    Model,
    ModelDeleted,
    Upload,
    UploadCompleteParams,
    UploadCreateParams,
)
from openai.types.fine_tuning import (
    FineTuningJob,
    FineTuningJobEvent,
    JobCreateParams,
    JobListEventsParams,
    JobListParams,
)
from openai.types.fine_tuning.jobs import CheckpointListParams, FineTuningJobCheckpoint
from openai.types.uploads import PartCreateParams, UploadPart
from openai.types.webhooks import (
    FineTuningJobCancelledWebhookEvent,
    FineTuningJobFailedWebhookEvent,
    FineTuningJobSucceededWebhookEvent,
)
from pydantic import BaseModel
from typing_extensions import is_typeddict

REPLIES: tuple[type[BaseModel], ...] = (
    FileObject,
    FileDeleted,
    Upload,
    UploadPart,
    FineTuningJob,
    FineTuningJobEvent,
    FineTuningJobCheckpoint,
    Model,
    ModelDeleted,
    FineTuningJobSucceededWebhookEvent,
    FineTuningJobFailedWebhookEvent,
    FineTuningJobCancelledWebhookEvent,
)
REQUESTS = (
    FileCreateParams,
    FileListParams,
    UploadCreateParams,
    UploadCompleteParams,
    PartCreateParams,
    JobCreateParams,
    JobListParams,
    JobListEventsParams,
    CheckpointListParams,
)


def all_facts() -> frozenset[str]:
    """Of every type, by its name."""
    return frozenset(fact for kind in (*REPLIES, *REQUESTS) for fact in facts_of(kind, kind.__name__))


def facts_of(kind: Any, name: str) -> Iterator[str]:
    """Of one type, which may be nested in others: `name` is its path."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from _fields({field: info.annotation for field, info in kind.model_fields.items()}, name)
    elif is_typeddict(kind):
        yield from _fields(typing.get_type_hints(kind, include_extras=False), name)
    elif typing.get_origin(kind) is Literal:
        yield from (f"{name}={value!r}" for value in typing.get_args(kind))
    elif typing.get_origin(kind) in (Union, types.UnionType) or typing.get_args(kind):
        for part in typing.get_args(kind):
            yield from facts_of(part, name)


def _fields(fields: dict[str, Any], name: str) -> Iterator[str]:
    for field, kind in fields.items():
        path = f"{name}.{field.removesuffix('_')}"
        yield path
        yield from facts_of(kind, path)


def facts_in(value: object, name: str) -> Iterator[str]:
    """The facts that a JSON value shows. A null shows nothing, not even that the field exists."""
    if value is None:
        return
    if "." in name:
        yield name
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from facts_in(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from facts_in(inner, name)
    elif isinstance(value, (str, int, float)):
        yield f"{name}={value!r}"
