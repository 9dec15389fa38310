"""Types of requests and replies of files and uploads, in OpenAI's shapes. `validation` and file errors are our own."""

from typing import Annotated, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field

GivenPurpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
"""What a client may upload a file for. Only files for fine-tune are read; all others are kept as they are."""
Purpose = Literal[GivenPurpose, "assistants_output", "batch_output", "fine-tune-results"]
PURPOSES = frozenset({*get_args(GivenPurpose), "assistants_output", "batch_output", "fine-tune-results"})
FileStatus = Literal["uploaded", "processed", "error"]
UploadStatus = Literal["pending", "completed", "cancelled", "expired"]
FINE_TUNE: Purpose = "fine-tune"
RESULTS: Purpose = "fine-tune-results"
LEAST_SECONDS = 3600
MOST_SECONDS = 2_592_000
"""30 days."""
MOST_PARTS = 10_000


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ExpiresAfter(_Request):
    """When a file expires: so many seconds after it was created."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=LEAST_SECONDS, le=MOST_SECONDS)


class FileFields(_Request):
    """The fields of POST /v1/files beside the file itself."""

    purpose: GivenPurpose
    expires_after: ExpiresAfter | None = None


class UploadRequest(_Request):
    """POST /v1/uploads: a file that comes in parts."""

    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1, max_length=1000)
    mime_type: str = Field(min_length=1, max_length=200)
    purpose: GivenPurpose
    expires_after: ExpiresAfter | None = None


class CompleteRequest(_Request):
    """POST /v1/uploads/{id}/complete: the parts, in order."""

    part_ids: list[Annotated[str, Field(max_length=100)]] = Field(min_length=1, max_length=MOST_PARTS)
    md5: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{32}$")


class TokenCounts(BaseModel):
    """Tokens of all valid examples, by the tokenizer of some bases of this server."""

    bases: list[str]
    """They have the same tokenizer."""
    tokens: int
    trained_tokens: int
    """Of the answers, which are trained on."""
    longest_example: int


class FileValidation(BaseModel):
    """What the check of a training file found."""

    examples: int
    valid_examples: int
    errors: int
    """How many. GET /v1/files/{id}/errors lists them."""
    errors_by_code: dict[str, int]
    token_counts: list[TokenCounts]


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: FileStatus
    expires_at: int | None
    status_details: str | None
    validation: FileValidation | None = None
    """None for other files than training files, and before the check ends."""


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileError(BaseModel):
    """One thing that is wrong with a training file."""

    id: str
    """Its number in the list."""
    object: Literal["file.error"] = "file.error"
    line: int | None
    """From 1; None for the whole file."""
    field: str | None
    """Such as `messages[2].content`."""
    code: str
    message: str


class Upload(BaseModel):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: UploadStatus
    file: FileObject | None = None


class UploadPart(BaseModel):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


Item = TypeVar("Item", bound=BaseModel)


class ListPage(BaseModel, Generic[Item]):
    """A page of a list. The next one begins after `last_id`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def list_page(items: list[Item], has_more: bool) -> ListPage[Item]:
    """A page of items that have an `id`."""
    ids = [str(item.id) for item in items]  # type: ignore[attr-defined]
    return ListPage(data=items, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)
