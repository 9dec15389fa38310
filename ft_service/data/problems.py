"""Problems of the sources in a spec that show without judging the data, also where the spec has other problems.

So one round of fixes is enough for misspelt settings, missing files and wrong columns.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ft_service.data.convert import BadRecord, convert
from ft_service.data.files.datasets_library import HUB_PREFIX, is_saved_dataset
from ft_service.data.files.remote import is_remote
from ft_service.data.files.shard import Fault
from ft_service.data.read import files_of, read_shard, scan, source_error
from ft_service.errors import Problem
from ft_service.spec.schema import DataSource

_FIRST_RECORDS = 20
_SMALL_BYTES = 64 * 2**20
"""Of larger files the records are not looked at: finding them reads the whole file."""


def source_problems(document: Mapping[str, Any], with_columns: bool = True) -> list[Problem]:
    """Problems of the training, validation and evaluation sources in a spec as it was written, valid or not.

    Files that are missing or of a type that is not read; with `with_columns`, also columns that none of the first
    records has, which a check of the data reports by itself.
    """
    data = document.get("data")
    return [
        problem
        for section in ("train", "validation", "evaluation")
        for problem in _problems(section, data.get(section) if isinstance(data, Mapping) else None, with_columns)
    ]


def _problems(section: str, sources: object, with_columns: bool) -> Iterator[Problem]:
    for number, entry in enumerate(sources if isinstance(sources, list) else []):
        setting = f"data.{section}.{number}"
        if (source := _source(entry)) is None:
            continue
        if (error := source_error(source)) is not None:
            path = source.path if is_remote(source.path) else str(Path(source.path).expanduser())
            message, _, fix = str(error).removeprefix(f"{path}: ").partition(". ")
            yield Problem(f"{setting}.path", source.path, message, fix)
        elif with_columns and _is_valid(entry) and _is_small(source):
            yield from _column_problems(setting, source, needs_answer=section != "evaluation")


def _source(entry: object) -> DataSource | None:
    """A source; without its other settings, if one of them is invalid; None without a path."""
    if not isinstance(entry, Mapping):
        return None
    if _is_valid(entry):
        return DataSource.model_validate(entry)
    path = entry.get("path")
    return DataSource(path=path) if isinstance(path, str) and path else None


def _is_valid(entry: object) -> bool:
    try:
        DataSource.model_validate(entry)
    except ValidationError:
        return False
    return True


def _is_small(source: DataSource) -> bool:
    if source.path.startswith(HUB_PREFIX) or is_remote(source.path) or is_saved_dataset(Path(source.path).expanduser()):
        return False
    try:
        return sum(file.stat().st_size for file in files_of(source)[0]) <= _SMALL_BYTES
    except OSError:
        return False


def _column_problems(setting: str, source: DataSource, needs_answer: bool) -> Iterator[Problem]:
    """A problem if the first records lack a column that the source needs."""
    raw = (record for shard in scan(0, source).shards for _, record in read_shard(shard, source))
    missing = ""
    for record in islice((record for record in raw if not isinstance(record, Fault)), _FIRST_RECORDS):
        try:
            convert(record, source, needs_answer)
        except BadRecord as error:
            if error.code == "form.missing-column":
                missing = missing or str(error)
                continue
        return
    if missing:
        message, _, fix = missing.partition(". ")
        yield Problem(setting, source.path, f"its first record {message}", f"{fix}.")
