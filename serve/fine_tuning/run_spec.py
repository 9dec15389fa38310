"""From a job to a run spec: the template of its base, changed by the job's hyperparameters.

OpenAI counts a batch in examples; a run packs several examples into a row and counts rows. So the batch is converted by
the measured number of examples per row, and the job reports the conversion.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from ft_service.plan.facts import DatasetFacts
from ft_service.plan.make import DEFAULT_LEARNING_RATE
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import RunSpec

TARGET_EPOCHS = 3
MIN_EXAMPLES = 100
MAX_EXAMPLES = 25_000
MAX_EPOCHS = 25
"""The rule of OpenAI's cookbook: 3 epochs, changed such that examples times epochs is from 100 to 25,000."""
PUBLISHED_EPOCHS = 3
"""Adapters of so many last epochs are checkpoints of a job, unless the template says otherwise."""
STEPS_PER_EPOCH = 10
"""With an automatic batch size an epoch has so many steps, or more."""
WAIVE_PREFIX = "waive."
"""Of metadata: `waive.size.too-few` accepts that finding of the data check; the value is the reason."""
LICENSE = "license"
_MAX_NAME = 30
_MAX_OWNER = 64
_MAX_SEED = 2**32

Auto = Literal["auto"]


@dataclass(frozen=True)
class Hyperparameters:
    """As a job asks for them."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    """Examples per step."""
    learning_rate_multiplier: float | Auto = "auto"
    """Times the template's learning rate."""


@dataclass(frozen=True)
class JobSettings:
    """What a job says of its run."""

    name: str
    seed: int
    hyperparameters: Hyperparameters
    training: str
    """Path of the training data."""
    validation: str | None
    source: str
    """Where the data come from, for the adapter's record."""
    license: str
    waive: Mapping[str, str]
    wandb: Mapping[str, Any] | None
    """`project`, and perhaps `entity`, `name` and `tags`."""
    owner: str = ""
    """Whose run it is, for the quotas and the fair share of the queue."""


@dataclass(frozen=True)
class Resolved:
    """The spec of a job's run, with its hyperparameters in OpenAI's units."""

    spec: RunSpec
    hyperparameters: dict[str, int | float]
    notes: tuple[str, ...]
    """What was converted, in sentences."""


def run_name(suffix: str | None, model: str) -> str:
    """The name of a run: of lower-case letters, digits and dashes."""
    for text in (suffix or "", model, "job"):
        name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_MAX_NAME].rstrip("-")
        if name:
            return name
    raise AssertionError


def model_name(base: str, organization: str, suffix: str | None, job_hex: str) -> str:
    """`ft:<base>:<organization>:<suffix>:<8 hex>`, as OpenAI names fine-tuned models."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", suffix or "").strip("-")
    return f"ft:{base}:{organization}:{readable}:{job_hex[:8]}"


def unresolved_spec(template: Mapping[str, Any], job: JobSettings, storage: str, where: str) -> RunSpec:
    """The template with the job's data. Raises `SpecError` with everything that is wrong with it."""
    document = copy.deepcopy(dict(template))
    data = dict(document.get("data") or {})
    described = {"format": "chat", "source": job.source, "license": job.license}
    data["train"] = [{"path": job.training, **described}]
    if job.validation is not None:
        data["validation"] = [{"path": job.validation, **described}]
    data["waive"] = {**(data.get("waive") or {}), **job.waive}
    document["data"] = data
    document["train"] = {**(document.get("train") or {}), "seed": job.seed % _MAX_SEED}
    if job.wandb is not None:
        report = dict(document.get("report") or {})
        trackers = [name for name in report.get("trackers") or [] if name != "wandb"]
        document["report"] = {**report, "trackers": [*trackers, "wandb"], **_report_settings(job.wandb)}
    if (document.get("method") or {}).get("type") != "full":  # which publishes its final model only
        document["checkpoint"] = {"publish_epochs": PUBLISHED_EPOCHS, **(document.get("checkpoint") or {})}
    if owner := queue_owner(job.owner):
        document["queue"] = {**(document.get("queue") or {}), "owner": owner}
    document |= {"name": job.name, "storage": storage}
    return _parse(document, where)


def _report_settings(wandb: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run spec's `report` for the fields of the `wandb` integration."""
    names = {"project": "project", "entity": "entity", "name": "run_name", "tags": "tags"}
    return {names[field]: value for field, value in wandb.items() if value}


def resolved_spec(spec: RunSpec, job: JobSettings, facts: DatasetFacts, where: str) -> Resolved:
    """`spec` with the job's hyperparameters, on data with these facts. Raises `SpecError`."""
    asked = job.hyperparameters
    document = spec.model_dump(mode="json", exclude_unset=True)
    train = dict(document.get("train") or {})
    notes = []
    epochs = None
    if asked.n_epochs != "auto":
        epochs = asked.n_epochs
    elif spec.train.epochs is None and spec.train.max_steps is None:
        epochs = auto_epochs(facts.conversations)
        notes.append(f"n_epochs auto: {epochs}, for {facts.conversations:,} examples.")
    if epochs is not None:
        train.pop("max_steps", None)
        train["epochs"] = float(epochs)
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else float(asked.learning_rate_multiplier)
    rate = spec.train.learning_rate or DEFAULT_LEARNING_RATE[spec.method.type]
    if multiplier != 1.0:
        train["learning_rate"] = rate * multiplier
        notes.append(
            f"learning_rate_multiplier {multiplier:g}: {rate:g} of the template becomes {rate * multiplier:g}."
        )
    per_row = facts.conversations / max(1, facts.rows)
    rows = batch_rows(spec, asked.batch_size, facts)
    train["global_batch_size"] = rows
    examples = max(1, round(rows * per_row))
    notes.append(
        f"batch_size {asked.batch_size}: {rows} packed rows a step. The file has {facts.conversations:,} examples in "
        f"{facts.rows:,} rows of {spec.data.max_seq_len:,} tokens, {per_row:.2f} a row, so a step has about {examples} "
        "examples."
    )
    document["train"] = train
    resolved = _parse(document, where)
    return Resolved(
        resolved,
        {
            "n_epochs": _whole_epochs(resolved, facts),
            "batch_size": examples if asked.batch_size == "auto" else asked.batch_size,
            "learning_rate_multiplier": multiplier,
        },
        tuple(notes),
    )


def auto_epochs(examples: int) -> int:
    """Epochs for a number of examples, by the rule of OpenAI's cookbook."""
    if examples * TARGET_EPOCHS < MIN_EXAMPLES:
        return max(1, min(MAX_EPOCHS, MIN_EXAMPLES // max(1, examples)))
    if examples * TARGET_EPOCHS > MAX_EXAMPLES:
        return max(1, MAX_EXAMPLES // examples)
    return TARGET_EPOCHS


def batch_rows(spec: RunSpec, batch_size: int | Auto, facts: DatasetFacts) -> int:
    """Packed rows per step for a batch of so many examples: at least one for each worker, and the same for each.

    `auto` is the template's batch, but no more than lets an epoch have `STEPS_PER_EPOCH` steps.
    """
    micro = spec.train.micro_batch_size if isinstance(spec.train.micro_batch_size, int) else 1
    unit = micro * spec.parallel.min_workers
    if batch_size == "auto":
        rows = min(spec.train.global_batch_size, max(1, facts.rows // STEPS_PER_EPOCH))
    else:
        rows = round(batch_size * facts.rows / max(1, facts.conversations))
    return max(unit, round(rows / unit) * unit)


def _whole_epochs(spec: RunSpec, facts: DatasetFacts) -> int:
    if spec.train.max_steps is not None:
        return max(1, round(spec.train.max_steps * spec.train.global_batch_size / max(1, facts.rows)))
    return max(1, round(spec.train.epochs or TARGET_EPOCHS))


def queue_owner(key_name: str) -> str:
    """The owner in the queue of what a key starts: its name, with other characters than the queue's as dashes."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "-", key_name).lstrip("._@+-")[:_MAX_OWNER]


def _parse(document: dict[str, Any], where: str) -> RunSpec:
    return parse_run_spec(yaml.safe_dump(document, allow_unicode=True), where=where)
