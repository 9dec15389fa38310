"""Checks of a spec against the data and the resources: problems stop the run, warnings do not."""

from ft_service.catalog.gpus import find_gpu
from ft_service.errors import Problem
from ft_service.plan.explain import why_it_does_not_fit
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.search import Candidate, Machine
from ft_service.spec.rules import contradictions
from ft_service.spec.schema import RunSpec

_FEW_STEPS = 20


# -- problems --------------------------------------------------------------------------------------------------------


def find_problems(spec: RunSpec, dataset: DatasetFacts, resources: Resources) -> list[Problem]:
    """Everything that prevents the run, including contradictions within the spec."""
    return [
        *contradictions(spec),
        *_missing_resources(spec, resources),
        *_missing_bf16(spec, resources),
        *hpz_problems(spec, resources),
        *_unusable_data(spec, dataset),
    ]


def _missing_resources(spec: RunSpec, resources: Resources) -> list[Problem]:
    workers = spec.parallel.max_workers
    gpus = resources.num_gpus
    cpus = resources.num_cpus
    if spec.parallel.use_gpu and gpus == 0:
        message = "needs GPUs, but the cluster has none"
        return [Problem("parallel.use_gpu", True, message, "Add GPU nodes, or set use_gpu: false.")]
    if spec.parallel.use_gpu and gpus is not None and workers > gpus:
        message = f"needs one GPU per worker, but only {gpus} are available"
        return [Problem("parallel.num_workers", workers, message, f"Use at most {gpus}.")]
    if not spec.parallel.use_gpu and cpus is not None and workers * spec.parallel.reserved_cpus > cpus:
        message = f"needs {spec.parallel.reserved_cpus} CPUs per worker, but the cluster has {cpus} in total"
        return [Problem("parallel.num_workers", workers, message, "Use fewer workers or fewer cpus_per_worker.")]
    return []


def _missing_bf16(spec: RunSpec, resources: Resources) -> list[Problem]:
    gpu = find_gpu(spec.parallel.accelerator_type or resources.gpu_type)
    if not spec.parallel.use_gpu or spec.train.precision != "bf16" or gpu is None or gpu.has_bf16:
        return []
    message = f"{gpu.name} cannot compute in bf16"
    return [Problem("train.precision", "bf16", message, "Use an Ampere GPU or newer, or precision: fp32.")]


def hpz_problems(spec: RunSpec, resources: Resources) -> list[Problem]:
    """A problem if the spec requires hpZ and the workers do not fill several nodes."""
    workers = spec.parallel.max_workers
    per_node = resources.workers_per_node(workers, spec.parallel.use_gpu)
    if spec.parallel.hpz is not True or (workers > per_node > 1 and workers % per_node == 0):
        return []
    message = f"needs several nodes with equally many workers, but {workers} workers run {per_node} per node"
    return [Problem("parallel.hpz", True, message, "Use hpz: auto, or fill whole nodes.")]


def _unusable_data(spec: RunSpec, dataset: DatasetFacts) -> list[Problem]:
    if dataset.rows == 0 or dataset.loss_tokens == 0:
        message = "contains nothing to train on"
        return [Problem("data.train", dataset.conversations, message, "Check format and columns.")]
    if spec.data.validation is not None and dataset.validation_loss_tokens == 0:
        message = "contains nothing to validate on"
        return [Problem("data.validation", dataset.validation_rows, message, "Hold out a larger fraction.")]
    return []


# -- warnings --------------------------------------------------------------------------------------------------------


def find_warnings(spec: RunSpec, dataset: DatasetFacts, num_steps: int) -> list[str]:
    """What works but is probably not intended."""
    warnings = []
    if dataset.rows < spec.train.global_batch_size:
        warnings.append(
            f"The {dataset.rows} packed rows are fewer than one batch of {spec.train.global_batch_size}, so a step "
            "repeats rows. Lower train.global_batch_size."
        )
    if spec.checkpoint.every_steps is None:
        warnings.append("checkpoint.every_steps is null: if workers fail, the run restarts from step 0.")
    if num_steps < _FEW_STEPS:
        warnings.append(f"{num_steps} steps is very few. Lower train.global_batch_size or train more epochs.")
    if dataset.truncated:
        warnings.append(
            f"{dataset.truncated} of {dataset.conversations} examples are truncated at data.max_seq_len = "
            f"{spec.data.max_seq_len}."
        )
    if spec.data.validation is None:
        warnings.append("Without data.validation, overfitting goes unnoticed and the last weights are published.")
    return warnings


def min_workers_warning(fewest: int, misfit: Candidate, machine: Machine) -> str:
    """The warning that the run does not fit after it has lost nodes, down to its fewest workers."""
    return (
        f"With parallel.num_workers.min = {fewest}: {why_it_does_not_fit(misfit, machine)} Raise min, or set "
        "offload: auto."
    )
