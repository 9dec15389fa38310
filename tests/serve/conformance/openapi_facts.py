"""What our OpenAPI page says, as the same facts as those of the client's types."""

from collections.abc import Iterator, Mapping
from typing import Any

NAMES: Mapping[str, str] = {
    "FileObject": "FileObject",
    "FileDeleted": "FileDeleted",
    "Upload": "Upload",
    "UploadPart": "UploadPart",
    "FineTuningJob": "FineTuningJob",
    "FineTuningJobEvent": "FineTuningJobEvent",
    "FineTuningJobCheckpoint": "FineTuningJobCheckpoint",
    "UploadCreateParams": "UploadRequest",
    "UploadCompleteParams": "CompleteRequest",
    "JobCreateParams": "FineTuningJobRequest",
}
"""The client's type -> our schema."""


def openapi_facts(page: Mapping[str, Any]) -> frozenset[str]:
    """Of every schema in `NAMES`."""
    schemas = page["components"]["schemas"]
    return frozenset(fact for name, ours in NAMES.items() for fact in _facts(schemas[ours], name, schemas))


def _facts(schema: Mapping[str, Any], path: str, schemas: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    for part in (*schema.get("anyOf", ()), *schema.get("allOf", ()), *schema.get("oneOf", ())):
        yield from _facts(part, path, schemas)
    if "items" in schema:
        yield from _facts(schema["items"], path, schemas)
    for value in schema.get("enum", [schema["const"]] if "const" in schema else []):
        yield f"{path}={value!r}"
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}"
        yield from _facts(field, f"{path}.{name}", schemas)
