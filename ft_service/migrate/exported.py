"""Reads an export of fine-tuning jobs: what `client.fine_tuning.jobs.list()` returned, as JSON or JSON lines."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ft_service.errors import UsageError
from ft_service.text import first_line

Hyperparameter = int | float | Literal["auto"] | None
HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")


class _Exported(BaseModel):
    """Fields that a later version of OpenAI's API adds are no error."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Hyperparameters(_Exported):
    n_epochs: Hyperparameter = None
    batch_size: Hyperparameter = None
    learning_rate_multiplier: Hyperparameter = None


class MethodSettings(_Exported):
    hyperparameters: Hyperparameters | None = None


class Method(_Exported):
    type: str = "supervised"
    supervised: MethodSettings | None = None


class ExportedJob(_Exported):
    """One job as OpenAI's API describes it. Only the fields that a migration reads."""

    id: str
    model: str
    training_file: str
    validation_file: str | None = None
    status: str = "succeeded"
    fine_tuned_model: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    integrations: tuple[dict[str, Any], ...] | None = None

    @property
    def method_type(self) -> str:
        return self.method.type if self.method is not None else "supervised"

    @property
    def settings(self) -> Hyperparameters:
        """Those of `method`, or the older ones at the top of a job."""
        supervised = self.method.supervised if self.method is not None else None
        nested = supervised.hyperparameters if supervised is not None else None
        return nested or self.hyperparameters or Hyperparameters()

    @property
    def suffix(self) -> str | None:
        """The suffix is only in the name of the model: ``ft:<base>:<organization>:<suffix>:<id>``."""
        parts = (self.fine_tuned_model or "").split(":")
        return parts[3] or None if len(parts) == 5 and parts[0] == "ft" else None


def read_jobs(file: Path) -> list[ExportedJob]:
    """The jobs of an export: a JSON array, a page with `data`, one job, or JSON lines. Raises `UsageError`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read as UTF-8 text ({first_line(error)}).") from None
    jobs = []
    for place, value in _values(text, file):
        try:
            jobs.append(ExportedJob.model_validate(value))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the entry"
            raise UsageError(
                f"{file}: {place} is no fine-tuning job ({field}: {first['msg']}). "
                "Write each job of client.fine_tuning.jobs.list() with job.to_dict()."
            ) from None
    return jobs


def _values(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Each job with its place in the file."""
    try:
        content = json.loads(text)
    except ValueError:
        yield from _lines(text, file)
        return
    if isinstance(content, Mapping) and isinstance(content.get("data"), list):
        content = content["data"]
    for number, value in enumerate(content if isinstance(content, list) else [content], 1):
        yield f"entry {number}", value


def _lines(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise UsageError(
                f"{file}: line {number} is not JSON ({error}). Write a JSON array, or one job in each line."
            ) from None
