"""Resuming a run with a spec: which changes its checkpoints allow. Checked before anything is written.

Settings of where and how a run trains may change, and so may its number of steps, to any that the checkpoints have not
reached. Everything else that affects the result may not: the checkpoints would continue another training.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ft_service.errors import NewerFormatError, Problem, SpecError, StorageError
from ft_service.plan.make import extended, num_steps_of
from ft_service.plan.plan import LAYOUT_SETTINGS, RunPlan
from ft_service.runs.folder import RunFolder
from ft_service.spec.schema import RunSpec
from ft_service.text import counted
from ft_service.train.checkpoints.manifest import Checkpoints

_LENGTH = frozenset({"epochs", "max_steps"})
_NOT_SET = "not set"


def check_settings(spec: RunSpec, run: RunFolder) -> None:
    """Raise `SpecError` with every setting of `spec` that the run cannot continue with. Reads only.

    A run without checkpoints starts from step 0, with any settings. A complete run has no more checkpoints.
    """
    if not run.has_plan():
        return
    plan = run.plan()
    published = _published(run)
    newest_step = Checkpoints(run).newest_step()
    if published is None and newest_step == 0:
        return
    problems = list(_changed_settings(plan.spec, spec, run.run_id))
    wanted = num_steps_of(spec, plan.dataset.rows)
    length = _length_setting(spec)
    if published is not None and (problems or wanted != plan.num_steps):
        message = f"run {run.run_id} is complete after {plan.num_steps} steps and has published {published}"
        fix = "Its checkpoints are deleted, so it cannot go on. Train a new run (another --run-id)."
        problems = problems or [Problem(f"train.{length}", getattr(spec.train, length), message, fix)]
    elif _is_trained_already(wanted, plan, newest_step):
        problems.append(_trained_already(spec, wanted, newest_step))
    if problems:
        raise SpecError(problems, f"run {run.run_id}")


def check_data(run: RunFolder, digest: str, sources: Mapping[str, str]) -> None:
    """Raise `SpecError` if the data differ from those of the run's checkpoints, naming the changed sources.

    `digest` is that of the prepared dataset, `sources` has the digest of each path. Reads only.
    """
    if not run.has_plan() or Checkpoints(run).newest_step() == 0 or run.plan().dataset.digest == digest:
        return
    cure = "Restore them, or train on them in a new run (another --run-id)."
    changed = [
        source.path for source in run.sources() if source.path in sources and sources[source.path] != source.digest
    ]
    if changed:
        names = ", ".join(changed)
        raise SpecError([Problem("data", names, "has changed since this run began", cure)], f"run {run.run_id}")
    message = "is prepared differently than when this run began: the base's tokenizer, data.waive or ft-service changed"
    raise SpecError([Problem("data", digest[:8], message, cure)], f"run {run.run_id}")


def continued_plan(plan: RunPlan, run: RunFolder) -> RunPlan:
    """`plan`, as a continuation of the run's checkpoints if it has any. Reads only.

    Raises `SpecError` if the checkpoints belong to another training, and `NewerFormatError` if a newer version wrote
    them. Workers check the one that they load once more.
    """
    checkpoints = Checkpoints(run)
    newest_step = checkpoints.newest_step()
    if newest_step == 0 or not run.has_plan():
        return plan
    earlier = run.plan()
    if _is_trained_already(plan.num_steps, earlier, newest_step):
        raise SpecError([_trained_already(plan.spec, plan.num_steps, newest_step)], f"run {run.run_id}")
    continued = extended(plan, earlier, newest_step)
    for entry in reversed(checkpoints.entries()):
        try:
            manifest = checkpoints.manifest(entry)
        except NewerFormatError:
            raise
        except (StorageError, ValueError):
            continue  # damaged: the workers use the one before
        if not continued.continues(manifest.training_digest, manifest.step):
            raise SpecError(list(_differences(earlier, continued, run.run_id)), f"run {run.run_id}")
        break
    return continued


def _published(run: RunFolder) -> str | None:
    status = run.status()
    return None if status is None else status.published


def _length_setting(spec: RunSpec) -> str:
    return "epochs" if spec.train.max_steps is None else "max_steps"


def _is_trained_already(wanted: int, earlier: RunPlan, newest_step: int) -> bool:
    """Whether another number of steps than planned would leave nothing to train."""
    return wanted != earlier.num_steps and wanted <= newest_step


def _trained_already(spec: RunSpec, wanted: int, newest_step: int) -> Problem:
    setting = _length_setting(spec)
    message = f"makes {counted(wanted, 'step')}, and {newest_step} are trained already"
    fix = f"Ask for {newest_step + 1} steps or more, or train a new run (another --run-id)."
    return Problem(f"train.{setting}", getattr(spec.train, setting), message, fix)


def _differences(earlier: RunPlan, plan: RunPlan, run_id: str) -> Iterator[Problem]:
    changed = list(_changed_settings(earlier.spec, plan.spec, run_id))
    yield from changed
    if not changed:
        message = "belong to another training than this plan, for a reason other than its settings"
        fix = "Resume with the version of ft-service that began the run, or train a new run (another --run-id)."
        yield Problem("checkpoints", run_id, message, fix)


def _changed_settings(earlier: RunSpec, spec: RunSpec, run_id: str) -> Iterator[Problem]:
    """A problem for each setting that affects the result and differs, with both values."""
    before = _determining(earlier)
    after = _determining(spec)
    for setting in dict.fromkeys([*before, *after]):
        old = before.get(setting, _NOT_SET)
        new = after.get(setting, _NOT_SET)
        if old != new:
            message = f"is {old!r} in run {run_id}, and its checkpoints can only continue with that"
            yield Problem(setting, new, message, f"Set it to {old!r}, or train a new run (another --run-id).")


def _determining(spec: RunSpec) -> dict[str, object]:
    """The settings that determine the result, by dotted name. The number of steps is compared on its own."""
    train = spec.train.model_dump(mode="json", exclude={*LAYOUT_SETTINGS, *_LENGTH})
    # What data.waive keeps is part of the dataset's digest.
    data = spec.data.model_dump(mode="json", exclude={"waive"})
    sections = {"model": spec.model.model_dump(mode="json"), "method": spec.method.model_dump(mode="json")}
    return dict(_flat({**sections, "data": data, "train": train}))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        yield name, value
        return
    for key, inner in items:
        yield from _flat(inner, f"{name}.{key}" if name else str(key))
