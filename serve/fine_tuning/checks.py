"""What is checked before a job spends anything: the rules of the spec, the data check and the plan."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ft_service.catalog.models import ModelShape
from ft_service.data.files.remote import delete_copies
from ft_service.data.gate import Judgement
from ft_service.data.gate.waivers import check_waivers, enforce
from ft_service.data.prepare import measure_dataset
from ft_service.data.read import check_sources
from ft_service.errors import DataError, FtError, ModelError, SpecError, StorageError
from ft_service.model.base import resolve_base
from ft_service.plan.facts import Resources
from ft_service.plan.make import make_plan
from ft_service.plan.plan import RunPlan
from ft_service.preflight import examine_base
from ft_service.runs.trackers import tracker_problems
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from serve.fine_tuning.run_spec import WAIVE_PREFIX, JobSettings, Resolved, resolved_spec, unresolved_spec

ServingProblem = Callable[[ModelShape], str | None]
"""Why a full model of this shape cannot be served; None if nothing is known against it."""
_ONE_AT_A_TIME = threading.Lock()
"""A check holds a tokenizer and a whole file's records."""


class JobRefusedError(FtError):
    """A job that cannot run, with all reasons."""

    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(code, message, param)
        self.code = code
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Checked:
    """A job that may run."""

    resolved: Resolved
    plan: RunPlan
    verdict: str
    """Of the data check."""
    warnings: tuple[str, ...] = field(default=())

    @property
    def spec(self) -> RunSpec:
        return self.plan.spec

    def summary(self) -> dict[str, Any]:
        """What is kept of it in the job's row."""
        plan = self.plan
        estimate = plan.estimate
        return {
            "hyperparameters": self.resolved.hyperparameters,
            "spec": self.resolved.spec.model_dump(mode="json", exclude_unset=True),
            "notes": list(self.resolved.notes),
            "warnings": list(self.warnings),
            "verdict": self.verdict,
            "steps": plan.num_steps,
            "epochs": plan.epochs,
            "examples": plan.dataset.conversations,
            "rows": plan.dataset.rows,
            "rows_per_step": plan.global_batch_size,
            "tokens": plan.tokens,
            "loss_tokens": plan.loss_tokens,
            "exact": plan.dataset.exact,
            "workers": plan.spec.parallel.max_workers,
            "fits": plan.fits,
            "memory_gib": plan.memory_gib.get("total"),
            "gpu_memory_gib": plan.gpu_capacity_gib,
            "seconds": None if estimate is None else estimate.seconds,
            "gpu_hours": None if estimate is None else estimate.gpu_hours,
            "cost_usd": None if estimate is None else estimate.cost_usd,
            "summary": list(plan.summary),
        }


def check_job(
    template: Mapping[str, Any],
    job: JobSettings,
    storage: str,
    resources: Resources,
    serving_problem: ServingProblem | None = None,
) -> Checked:
    """Spec, data and plan of a job; writes nothing. `serving_problem` judges the model of a `full` job.

    Raises `JobRefusedError`, and `StorageError` or `ModelError` where a later attempt may pass.
    """
    where = "fine-tuning job"
    with _ONE_AT_A_TIME:
        try:
            spec = unresolved_spec(template, job, storage, where)
            check_waivers(spec.data.waive)
            if problems := tracker_problems(spec.report, Storage(storage)):
                raise SpecError(problems, where)
            check_sources([*spec.data.train, *(spec.data.validation if isinstance(spec.data.validation, list) else [])])
            shape, tokenizer, base_facts = examine_base(
                spec, resolve_base(spec.model.base, spec.model.revision, weights=False)
            )
            judgements: list[Judgement] = []
            facts = measure_dataset(spec, tokenizer, lambda judgement, folder: judgements.append(judgement))
            enforce(judgements[0], spec.data.waive, "GET /v1/fine_tuning/jobs/{id}/events")
            resolved = resolved_spec(spec, job, facts, where)
            plan = make_plan(resolved.spec, facts, shape, resources, base_facts)
        except SpecError as error:
            raise JobRefusedError("invalid_hyperparameters", str(error), None) from None
        except DataError as error:
            raise _refused_data(str(error), job) from None
        except (StorageError, ModelError):
            raise
        finally:
            delete_copies()
        if plan.fits is False:
            reasons = " ".join([*plan.warnings[:1], *plan.advice])
            raise JobRefusedError("does_not_fit", f"The job does not fit the cluster's GPUs. {reasons}", "model")
        if serving_problem is not None and spec.method.type == "full" and (problem := serving_problem(shape)):
            raise JobRefusedError("cannot_be_served", problem, "model")
    return Checked(resolved, plan, judgements[0].verdict, tuple(plan.warnings))


def _refused_data(text: str, job: JobSettings) -> JobRefusedError:
    """A refusal of the data check, with the API's way to accept its findings."""
    findings, gate, _ = text.partition("\nFull report: ")
    if gate:
        findings += (
            f'\nTo accept a finding, send metadata {{"{WAIVE_PREFIX}CODE": "REASON"}} with the job; the record of its '
            "adapter keeps the reason."
        )
    is_validation = job.validation is not None and job.validation in findings and job.training not in findings
    param = "validation_file" if is_validation else "training_file"
    return JobRefusedError(f"invalid_{param}", _without_folders(findings, job), param)


def _without_folders(text: str, job: JobSettings) -> str:
    """A message about the data with the roles of the files instead of the server's folders."""
    text = text.replace(job.training, "training_file")
    return text if job.validation is None else text.replace(job.validation, "validation_file")
