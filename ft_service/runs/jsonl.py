"""JSON-lines files of a run: one record per line."""

from collections.abc import Iterator

from pydantic import BaseModel

from ft_service.storage.storage import Storage


def run_file(run_id: str, name: str) -> str:
    return f"runs/{run_id}/{name}"


def to_line(record: BaseModel) -> str:
    """The record as one line of JSON, without fields that are None."""
    return record.model_dump_json(exclude_none=True)


def numbered_lines(storage: Storage, path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, from 1; blank lines are skipped, and a missing file has none."""
    content = storage.read_bytes(path) if storage.exists(path) else b""
    return ((number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip())
