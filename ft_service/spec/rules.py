"""Settings that are valid alone and contradict each other. One rule for each contradiction."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ft_service.catalog.gpus import find_gpu, known_gpus
from ft_service.errors import Problem
from ft_service.spec.schema import RunSpec

_CREDENTIALS = re.compile(r"(\b(?!abfss?://[^/@:\s]+@)\w+://)[^/@\s]+@")
"""What is before the @ of an address, except a container of Azure (``abfss://CONTAINER@ACCOUNT...``)."""
_SIGNATURES = re.compile(
    r"([?&](?:X-Amz-Signature|X-Goog-Signature|sig|token|access_token|api_key)=)[^&\s*]+", re.IGNORECASE
)
"""In addresses that are signed for a time."""
_TOKENS = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,})\b")
"""Of Hugging Face, AWS, GitHub and OpenAI, which begin in their own way."""
_SET_ONLY_ONE = "Set only one. On a command line, train.max_steps=null or train.epochs=null unsets the one in the file."
_ADD_VALIDATION = "Add data.validation, for example {fraction: 0.05}."


def contradictions(spec: RunSpec) -> list[Problem]:
    """Every rule that the spec breaks, in the order of `RULES`; empty if it breaks none."""
    return [problem for rule in RULES for problem in rule(spec)]


# -- method ----------------------------------------------------------------------------------------------------------


def full_fine_tuning_has_no_adapter_settings(spec: RunSpec) -> Iterator[Problem]:
    if spec.method.type != "full":
        return
    for field in sorted(spec.method.model_fields_set - {"type"}):
        yield Problem(
            f"method.{field}",
            getattr(spec.method, field),
            "has no effect when method.type is 'full'",
            "Remove it, or set method.type to lora or qlora.",
        )


def full_fine_tuning_publishes_one_model(spec: RunSpec) -> Iterator[Problem]:
    if spec.method.type == "full" and spec.checkpoint.publish_epochs:
        yield Problem(
            "checkpoint.publish_epochs",
            spec.checkpoint.publish_epochs,
            "is for adapters, and method.type is 'full'",
            "Remove it, or set method.type to lora or qlora.",
        )


def qlora_cannot_change_its_base(spec: RunSpec) -> Iterator[Problem]:
    if spec.method.type == "qlora" and spec.method.changes_base:
        yield Problem(
            "method.init_lora_weights",
            spec.method.init_lora_weights,
            "changes the base weights, which qlora keeps in 4 bits",
            "Use method.type: lora, or init_lora_weights: true.",
        )


def qlora_on_a_gpu_trains_in_bf16(spec: RunSpec) -> Iterator[Problem]:
    if spec.method.type == "qlora" and spec.train.precision == "fp32" and spec.parallel.use_gpu:
        yield Problem(
            "train.precision",
            spec.train.precision,
            "doubles the memory that qlora is meant to save",
            "Use train.precision: bf16.",
        )


# -- batches and workers ---------------------------------------------------------------------------------------------


def epochs_and_max_steps_exclude_each_other(spec: RunSpec) -> Iterator[Problem]:
    if spec.train.epochs is not None and spec.train.max_steps is not None:
        yield Problem("train.max_steps", spec.train.max_steps, "conflicts with train.epochs", _SET_ONLY_ONE)


def min_workers_is_at_most_max_workers(spec: RunSpec) -> Iterator[Problem]:
    fewest = spec.parallel.min_workers
    most = spec.parallel.max_workers
    if fewest > most:
        yield Problem("parallel.num_workers.min", fewest, f"is greater than max = {most}", "Set min to at most max.")


def workers_divide_the_global_batch(spec: RunSpec) -> Iterator[Problem]:
    """In a range, the largest number must divide it too: otherwise Ray would reserve GPUs that are never used."""
    workers = spec.parallel.max_workers
    if spec.parallel.min_workers > workers or workers in spec.worker_counts():
        return
    rows = spec.train.micro_batch_size if isinstance(spec.train.micro_batch_size, int) else 1
    divisor = f"{rows} rows x {workers} workers" if rows > 1 else f"{workers} workers"
    yield Problem(
        "train.global_batch_size",
        spec.train.global_batch_size,
        f"is not a multiple of {divisor} (parallel.num_workers)",
        f"Use a multiple of {rows * workers}.",
    )


# -- offloading ------------------------------------------------------------------------------------------------------


def offloading_needs_zero(spec: RunSpec) -> Iterator[Problem]:
    if spec.parallel.offload in ("cpu", "nvme") and spec.parallel.zero_stage == 0:
        yield Problem(
            "parallel.offload",
            spec.parallel.offload,
            "needs ZeRO, but parallel.zero_stage is 0",
            "Use zero_stage: auto (or 1, 2, 3), or offload: none.",
        )


def offloading_to_nvme_needs_zero_3(spec: RunSpec) -> Iterator[Problem]:
    if spec.parallel.offload == "nvme" and spec.parallel.zero_stage in (1, 2):
        yield Problem(
            "parallel.offload",
            spec.parallel.offload,
            f"needs ZeRO-3, but parallel.zero_stage is {spec.parallel.zero_stage}",
            "Use zero_stage: 3 or auto, or offload: cpu.",
        )


def offloading_to_nvme_needs_a_path(spec: RunSpec) -> Iterator[Problem]:
    path = spec.parallel.nvme_path
    if spec.parallel.offload == "nvme" and not path:
        yield Problem("parallel.nvme_path", path, "is required by offload: nvme", "Set it to a folder on the drive.")


def nvme_path_is_for_offloading_to_nvme(spec: RunSpec) -> Iterator[Problem]:
    path = spec.parallel.nvme_path
    if path and spec.parallel.offload in ("none", "cpu"):
        message = f"has no effect when parallel.offload is {spec.parallel.offload}"
        yield Problem("parallel.nvme_path", path, message, "Remove it, or use offload: nvme or auto.")


# -- hpZ and GPUs ----------------------------------------------------------------------------------------------------


def hpz_needs_zero_3(spec: RunSpec) -> Iterator[Problem]:
    if spec.parallel.hpz is True and spec.parallel.zero_stage in (0, 1, 2):
        yield Problem(
            "parallel.hpz",
            True,
            f"copies sharded weights, but parallel.zero_stage is {spec.parallel.zero_stage}",
            "Use zero_stage: 3 or auto, or hpz: false.",
        )


def hpz_and_offloading_exclude_each_other(spec: RunSpec) -> Iterator[Problem]:
    if spec.parallel.hpz is True and spec.parallel.offload in ("cpu", "nvme"):
        yield Problem(
            "parallel.hpz",
            True,
            f"keeps a copy of the weights on the GPUs, but parallel.offload is {spec.parallel.offload}",
            "Use offload: none, or hpz: false.",
        )


def hpz_needs_gpus(spec: RunSpec) -> Iterator[Problem]:
    if spec.parallel.hpz is True and not spec.parallel.use_gpu:
        yield Problem("parallel.hpz", True, "needs GPUs on several nodes", "Use hpz: false.")


def accelerator_type_needs_gpus(spec: RunSpec) -> Iterator[Problem]:
    if spec.parallel.accelerator_type and not spec.parallel.use_gpu:
        yield Problem(
            "parallel.accelerator_type",
            spec.parallel.accelerator_type,
            "requests a GPU, but parallel.use_gpu is false",
            "Remove it, or set use_gpu: true.",
        )


def accelerator_type_is_known(spec: RunSpec) -> Iterator[Problem]:
    """Ray would wait forever for a node with a misspelt type."""
    name = spec.parallel.accelerator_type
    if name and find_gpu(name) is None:
        fix = f"{known_gpus(name)} Without this setting, any GPU of the cluster is used."
        yield Problem("parallel.accelerator_type", name, "is not a known GPU type", fix)


# -- validation ------------------------------------------------------------------------------------------------------


def early_stopping_needs_validation_data(spec: RunSpec) -> Iterator[Problem]:
    if spec.train.early_stopping and spec.data.validation is None:
        yield Problem(
            "train.early_stopping",
            spec.train.early_stopping.model_dump(),
            "needs a validation loss, but data.validation is not set",
            _ADD_VALIDATION,
        )


def validating_needs_validation_data(spec: RunSpec) -> Iterator[Problem]:
    steps = spec.train.validate_every_steps
    if steps and spec.data.validation is None:
        yield Problem("train.validate_every_steps", steps, "has no effect without data.validation", _ADD_VALIDATION)


# -- places ----------------------------------------------------------------------------------------------------------


def settings_contain_no_secrets(spec: RunSpec) -> Iterator[Problem]:
    """The spec is stored with the run, printed, and shown in its report: a secret in it would be public."""
    for setting, text in _texts(spec.model_dump(), ""):
        hidden = _CREDENTIALS.sub(r"\1***@", text)
        hidden = _TOKENS.sub("***", _SIGNATURES.sub(r"\1***", hidden))
        if hidden != text:
            yield Problem(
                setting,
                hidden,
                "contains credentials, which would appear in records and logs",
                "Pass them in the environment (AWS_ACCESS_KEY_ID, HF_TOKEN, ...) or use the machine's role.",
            )


def _texts(node: object, path: str) -> Iterator[tuple[str, str]]:
    """Every string of a dumped spec with the name of its setting."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _texts(value, f"{path}.{index}")


def a_revision_is_for_hub_ids(spec: RunSpec) -> Iterator[Problem]:
    revision = spec.model.revision
    if not revision:
        return
    if "://" in spec.model.base:
        yield Problem("model.revision", revision, "has no effect on object storage", "Remove it.")
    if Path(spec.model.base).expanduser().is_dir():
        yield Problem("model.revision", revision, "has no effect on a folder", "Remove it.")


RULES: tuple[Callable[[RunSpec], Iterator[Problem]], ...] = (
    full_fine_tuning_has_no_adapter_settings,
    full_fine_tuning_publishes_one_model,
    qlora_cannot_change_its_base,
    qlora_on_a_gpu_trains_in_bf16,
    epochs_and_max_steps_exclude_each_other,
    min_workers_is_at_most_max_workers,
    workers_divide_the_global_batch,
    offloading_needs_zero,
    offloading_to_nvme_needs_zero_3,
    offloading_to_nvme_needs_a_path,
    nvme_path_is_for_offloading_to_nvme,
    hpz_needs_zero_3,
    hpz_and_offloading_exclude_each_other,
    hpz_needs_gpus,
    accelerator_type_needs_gpus,
    accelerator_type_is_known,
    early_stopping_needs_validation_data,
    validating_needs_validation_data,
    settings_contain_no_secrets,
    a_revision_is_for_hub_ids,
)
