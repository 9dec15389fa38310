"""What becomes of each exported job: the request that creates it again, or why it cannot be carried over."""

from collections.abc import Mapping as AnyMapping
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ft_service.errors import UsageError
from ft_service.migrate.exported import HYPERPARAMETERS, ExportedJob
from ft_service.migrate.mapping import Mapping
from ft_service.migrate.rows import RowReport, read_rows
from ft_service.text import counted

ORIGIN = "migrated_from"
"""Key of a created job's metadata with the id that the job had at OpenAI. A job that is there is not created twice."""
MAX_METADATA = 16
_SHOWN_LINES = 20

Outcome = Literal["ready", "skipped", "refused", "created", "exists", "failed"]

NEVER_CARRIED_OVER = (
    "The weights of models trained at OpenAI: OpenAI does not give them out, so every job trains again.",
    "Events, checkpoints and result files of the earlier jobs: the new jobs write their own.",
)


@dataclass
class MigrationJob:
    """One job, and what becomes of it."""

    source: ExportedJob
    model: str | None
    """The served model that is trained."""
    training: Path | None = None
    validation: Path | None = None
    request: dict[str, Any] = field(default_factory=dict)
    """Body of the request, without the files, which get new ids."""
    problems: list[str] = field(default_factory=list)
    """Why the job cannot be carried over; empty if it can."""
    notes: list[str] = field(default_factory=list)
    """What changes, or is left behind."""
    rows: dict[str, RowReport] = field(default_factory=dict)
    """By `training_file` and `validation_file`."""
    outcome: Outcome = "ready"
    job_id: str | None = None
    """On the server."""

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source.id,
            "source_model": self.source.model,
            "source_fine_tuned_model": self.source.fine_tuned_model,
            "model": self.model,
            "outcome": self.outcome,
            "job": self.job_id,
            "problems": self.problems,
            "notes": self.notes,
            "request": self.request,
            "files": {
                name: {
                    "path": str(self.training if name == "training_file" else self.validation),
                    "rows": report.rows,
                    "usable": report.usable,
                    "with_tools": report.with_tools,
                    "with_weights": report.with_weights,
                    "preference_rows": report.preference_rows,
                    "bad_lines": [{"line": bad.line, "reason": bad.reason} for bad in report.bad_lines],
                }
                for name, report in self.rows.items()
            },
        }


def plan_migration(
    jobs: Sequence[ExportedJob],
    mapping: Mapping,
    folder: Path | None = None,
    skip_bad_lines: bool = False,
    only: Sequence[str] = (),
) -> list[MigrationJob]:
    """What becomes of each job, the oldest first; asks no server.

    `folder` has the files under their ids, as ``<id>.jsonl`` or ``<id>``. Without `only`, jobs that did not succeed are
    skipped. Raises `UsageError` for a file that cannot be read, and for an unknown id in `only`.
    """
    if unknown := sorted(set(only) - {job.id for job in jobs}):
        raise UsageError(f"--job = {unknown[0]!r}: is not in the export.")
    read = cache(read_rows)
    trained = {job.fine_tuned_model: job.id for job in jobs if job.fine_tuned_model}
    planned = []
    for source in reversed(jobs):  # OpenAI lists the newest first
        if only and source.id not in only:
            continue
        job = MigrationJob(source, mapping.model(source.model))
        planned.append(job)
        if not only and source.status != "succeeded":
            job.outcome = "skipped"
            job.notes.append(f"It {_ENDED.get(source.status, f'is {source.status}')}. --job {source.id} creates it.")
            continue
        _check_method(job)
        _check_model(job, trained)
        _find_files(job, mapping, folder)
        for name, path in (("training_file", job.training), ("validation_file", job.validation)):
            if path is not None:
                job.rows[name] = read(path)
                _check_rows(job, name, path, skip_bad_lines)
        job.request = _request(job, mapping)
        if job.problems:
            job.outcome = "refused"
    return planned


_ENDED = {"failed": "failed at OpenAI", "cancelled": "was cancelled at OpenAI"}


def _check_method(job: MigrationJob) -> None:
    if job.source.method_type != "supervised":
        job.problems.append(f"method.type = {job.source.method_type!r}: only supervised jobs are carried over yet.")


def _check_model(job: MigrationJob, trained: AnyMapping[str, str]) -> None:
    if job.model is not None:
        return
    name = job.source.model
    if name.startswith("ft:"):
        earlier = f" (the model of {trained[name]})" if name in trained else ""
        job.problems.append(
            f"model = {name!r}: continues a fine-tuned model{earlier}. Carry that job over first, then name what it "
            f"becomes: --map '{name}=MODEL'."
        )
    else:
        job.problems.append(f"model = {name!r}: nothing takes its place. Name a served model: --map {name}=MODEL.")


def _find_files(job: MigrationJob, mapping: Mapping, folder: Path | None) -> None:
    job.training = _find(job, "training_file", job.source.training_file, mapping, folder)
    if job.source.validation_file is not None:
        job.validation = _find(job, "validation_file", job.source.validation_file, mapping, folder)


def _find(job: MigrationJob, name: str, file_id: str, mapping: Mapping, folder: Path | None) -> Path | None:
    candidates = [mapping.files[file_id]] if file_id in mapping.files else []
    if folder is not None:
        candidates += [folder / f"{file_id}.jsonl", folder / file_id]
    for path in candidates:
        if path.is_file():
            return path
    tried = f" (tried: {', '.join(map(str, candidates))})" if candidates else ""
    job.problems.append(
        f"{name} = {file_id!r}: its content is not here{tried}. Download it with client.files.content({file_id!r}) "
        "and name its folder: --files FOLDER."
    )
    return None


def _check_rows(job: MigrationJob, name: str, path: Path, skip_bad_lines: bool) -> None:
    report = job.rows[name]
    if not report.usable:
        reason = "all rows are preference rows (DPO)" if report.preference_rows else "no row can be trained on"
        job.problems.append(f"{name} {path}: {reason}.{_lines_text(report)}")
    elif report.bad_lines:
        text = f"{name} {path}: {counted(len(report.bad_lines), 'row')} of {report.rows:,} cannot be carried over."
        if skip_bad_lines:
            job.notes.append(f"{text} They are left out.{_lines_text(report)}")
        else:
            job.problems.append(f"{text} --skip-bad-lines leaves them out.{_lines_text(report)}")
    if report.ignored_fields:
        job.notes.append(f"{name} {path}: training ignores {', '.join(sorted(report.ignored_fields))}.")


def _lines_text(report: RowReport) -> str:
    shown = "".join(f"\n  line {bad.line} {bad.reason}" for bad in report.bad_lines[:_SHOWN_LINES])
    more = len(report.bad_lines) - _SHOWN_LINES
    return f"{shown}\n  and {counted(more, 'more line')}" if more > 0 else shown


def _request(job: MigrationJob, mapping: Mapping) -> dict[str, Any]:
    source = job.source
    request: dict[str, Any] = {"model": job.model, "metadata": _metadata(job)}
    if source.suffix is not None:
        request["suffix"] = source.suffix
    if source.seed is not None:
        request["seed"] = source.seed
    if hyperparameters := _hyperparameters(job, mapping):
        request["method"] = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    if integrations := _integrations(job):
        request["integrations"] = integrations
    return request


def _hyperparameters(job: MigrationJob, mapping: Mapping) -> dict[str, int | float | str]:
    values: dict[str, int | float | str] = {}
    for name in HYPERPARAMETERS:
        own = getattr(job.source.settings, name)
        given = getattr(mapping.hyperparameters, name)
        value = own if given is None else given
        if value is not None:
            values[name] = value
        if given is not None and own is not None and own != given:
            job.notes.append(f"{name} is {given} instead of {own}, as the mapping says.")
    if isinstance(values.get("learning_rate_multiplier"), (int, float)):
        job.notes.append(
            f"learning_rate_multiplier {values['learning_rate_multiplier']} multiplies the learning rate of the served "
            "model's template here, which is not OpenAI's. auto takes the template's own."
        )
    return values


def _metadata(job: MigrationJob) -> dict[str, str]:
    metadata = dict(job.source.metadata or {})
    if len(metadata) >= MAX_METADATA and ORIGIN not in metadata:
        job.problems.append(
            f"metadata: has {len(metadata)} entries, and {ORIGIN} needs one of the {MAX_METADATA}. Remove one."
        )
    return {**metadata, ORIGIN: job.source.id}


def _integrations(job: MigrationJob) -> list[dict[str, Any]]:
    """Only what a request may have: the answer has more fields, all null or set by OpenAI."""
    carried = []
    for integration in job.source.integrations or ():
        if integration.get("type") != "wandb":
            job.notes.append(f"integrations: {integration.get('type')} is left out; only wandb is known.")
            continue
        wandb = integration.get("wandb") or {}
        names = ("project", "name", "entity", "tags")
        carried.append({"type": "wandb", "wandb": {key: wandb[key] for key in names if wandb.get(key) is not None}})
    return carried
