"""RunPlan: what was decided. A pure function of spec, dataset facts, the base's shape and the resources.

Every derived number and every check across settings and facts lives here; training reads the plan and decides nothing.
"""

import hashlib
import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ft_service import catalog
from ft_service.catalog import ModelShape
from ft_service.errors import Problem, SpecError
from ft_service.memory import GIB, Layout, MemoryEstimate, estimate_memory, trainable_parameters
from ft_service.spec import RunSpec

DEFAULT_EPOCHS = 3.0
DEFAULT_LEARNING_RATE = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-5}
VALIDATIONS_PER_RUN = 10
CPU_MICRO_BATCH_TOKENS = 4096
"""Rows are flattened, so on a CPU a few thousand tokens already fill the matrix units."""


class DatasetFacts(BaseModel):
    """What plan and report need to know of a prepared dataset. Counts are of the training split unless named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(description="Digest of sources, tokenizer, format and packing; the dataset's folder name.")
    exact: bool = Field(default=True, description="False where the figures were scaled up from a sample.")
    conversations: int = Field(description="Usable training conversations (examples).")
    rows: int = Field(description="Packed training rows.")
    tokens: int
    loss_tokens: int = Field(description="Tokens whose prediction is trained.")
    truncated: int = Field(description="Examples cut at data.max_seq_len.")
    validation_conversations: int = 0
    validation_rows: int = 0
    validation_tokens: int = 0
    validation_loss_tokens: int = 0


@dataclass(frozen=True)
class Resources:
    """What a run may use. None means not known, and is not judged."""

    num_gpus: int | None = None
    num_cpus: int | None = None
    gpu_memory_gib: float | None = None
    gpu_type: str | None = None


class RunPlan(BaseModel):
    """The numbers of a run. `spec` is what was asked; a field here is what was decided where the spec left it open."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: RunSpec
    dataset: DatasetFacts
    base_short_name: str
    parameters: int = Field(description="Parameters of the base.")
    trainable_parameters: int
    zero_stage: int
    micro_batch_size: int = Field(description="Packed rows per forward pass of one worker.")
    gradient_accumulation_steps: int
    global_batch_size: int
    num_steps: int = Field(description="Optimizer steps.")
    epochs: float
    warmup_steps: int
    learning_rate: float = Field(description="Peak.")
    activation_checkpointing: bool
    validate_every_steps: int | None
    tokens: int = Field(description="Tokens seen over the whole run.")
    loss_tokens: int = Field(description="Loss tokens over the whole run.")
    memory_gib: dict[str, float] = Field(description="GiB of one GPU by component, and their total; empty on CPU.")
    said: list[str] = Field(description="The plan in sentences.")
    warnings: list[str]
    remarks: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def make_plan(spec: RunSpec, dataset: DatasetFacts, shape: ModelShape, resources: Resources) -> RunPlan:
    """Decide everything the spec leaves open.

    Raises `SpecError` with every contradiction between spec, data, base and resources, together.
    """
    problems = [*spec.contradictions(), *_unmet_resources(spec, resources), *_unusable_data(spec, dataset)]
    if not _targets_are_trainable(spec):
        problems.append(
            Problem(
                "method.target_modules",
                spec.method.target_modules,
                "adapts the head or the embeddings, which servers refuse and tied models cannot keep apart",
                "Use all-linear, or names such as q_proj, v_proj.",
            )
        )
    if problems:
        raise SpecError(problems)

    workers = spec.parallel.num_workers
    checkpointing = spec.train.activation_checkpointing
    checkpointing = spec.parallel.use_gpu if checkpointing == "auto" else checkpointing
    zero_stage = _zero_stage(spec, shape, resources, checkpointing)
    rows_per_worker = spec.train.global_batch_size // workers
    micro = spec.train.micro_batch_size
    if micro == "auto":
        micro = _micro_batch_size(spec, shape, resources, zero_stage, checkpointing, rows_per_worker)
    accumulation = rows_per_worker // micro
    batch = spec.train.global_batch_size

    steps_per_epoch = dataset.rows / batch
    if spec.train.max_steps is not None:
        num_steps, epochs = spec.train.max_steps, spec.train.max_steps / steps_per_epoch
    else:
        epochs = spec.train.epochs or DEFAULT_EPOCHS
        num_steps = max(1, math.ceil(epochs * steps_per_epoch))
    warmup = math.ceil(spec.train.warmup_ratio * num_steps)
    validate_every = None
    if spec.data.validation is not None:
        validate_every = spec.train.validate_every_steps or max(1, num_steps // VALIDATIONS_PER_RUN)

    layout = _layout(spec, zero_stage, micro, checkpointing)
    memory = estimate_memory(shape, layout) if spec.parallel.use_gpu else None
    facts = catalog.find(spec.model.base)
    seen = num_steps * batch / dataset.rows
    draft = {
        "spec": spec,
        "dataset": dataset,
        "base_short_name": catalog.short_name(spec.model.base),
        "parameters": shape.num_parameters,
        "trainable_parameters": trainable_parameters(shape, layout),
        "zero_stage": zero_stage,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": batch,
        "num_steps": num_steps,
        "epochs": epochs,
        "warmup_steps": warmup,
        "learning_rate": spec.train.learning_rate or DEFAULT_LEARNING_RATE[spec.method.type],
        "activation_checkpointing": checkpointing,
        "validate_every_steps": validate_every,
        "tokens": round(dataset.tokens * seen),
        "loss_tokens": round(dataset.loss_tokens * seen),
        "memory_gib": _gib(memory) if memory else {},
        "remarks": catalog.remarks(facts, {source.format for source in spec.data.train}) if facts else [],
        "warnings": _warnings(spec, dataset, resources, memory, num_steps, steps_per_epoch),
        "said": [],
    }
    return RunPlan.model_validate({**draft, "said": _sentences(RunPlan.model_validate(draft))})


# -- decisions -------------------------------------------------------------------------------------------------------


def _layout(spec: RunSpec, stage: int, micro: int, checkpointing: bool) -> Layout:
    targets = spec.method.target_modules
    return Layout(
        method=spec.method.type,
        num_workers=spec.parallel.num_workers,
        zero_stage=stage,
        offload=spec.parallel.offload,
        micro_batch_size=micro,
        max_seq_len=spec.data.max_seq_len,
        activation_checkpointing=checkpointing,
        precision=spec.train.precision,
        lora_rank=spec.method.lora_rank,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=spec.method.use_dora,
    )


def _gib(memory: MemoryEstimate) -> dict[str, float]:
    return {**{name: size / GIB for name, size in memory.gpu.items()}, "total": memory.gpu_bytes / GIB}


def _fits(shape: ModelShape, layout: Layout, limit_gib: float) -> bool:
    return estimate_memory(shape, layout).gpu_bytes <= limit_gib * GIB


def _zero_stage(spec: RunSpec, shape: ModelShape, resources: Resources, checkpointing: bool) -> int:
    """The lowest stage that fits: each higher one trades traffic for memory."""
    asked = spec.parallel.zero_stage
    if asked != "auto":
        return asked
    if spec.parallel.offload == "nvme":
        return 3
    # Alone there is nothing to shard, but unlike stage 0 stage 1 sums micro-steps in fp32.
    lowest = 2 if spec.parallel.num_workers > 1 or spec.parallel.offload == "cpu" else 1
    limit = resources.gpu_memory_gib
    if not spec.parallel.use_gpu or limit is None or spec.parallel.num_workers == 1:
        return lowest
    return lowest if _fits(shape, _layout(spec, lowest, 1, checkpointing), limit) else 3


def _micro_batch_size(
    spec: RunSpec, shape: ModelShape, resources: Resources, stage: int, checkpointing: bool, rows_per_worker: int
) -> int:
    """The largest divisor of a worker's rows that fits."""
    divisors = [size for size in range(1, rows_per_worker + 1) if rows_per_worker % size == 0]

    def fits(size: int) -> bool:
        if not spec.parallel.use_gpu:
            return size * spec.data.max_seq_len <= CPU_MICRO_BATCH_TOKENS
        limit = resources.gpu_memory_gib
        return limit is not None and _fits(shape, _layout(spec, stage, size, checkpointing), limit)

    return max((size for size in divisors if fits(size)), default=1)


# -- checks ----------------------------------------------------------------------------------------------------------


def _unmet_resources(spec: RunSpec, resources: Resources) -> list[Problem]:
    workers, gpus, cpus = spec.parallel.num_workers, resources.num_gpus, resources.num_cpus
    if spec.parallel.use_gpu and gpus == 0:
        return [
            Problem(
                "parallel.use_gpu",
                True,
                "needs GPUs, and the cluster has none",
                "Add GPU nodes, or set use_gpu: false.",
            )
        ]
    if spec.parallel.use_gpu and gpus is not None and workers > gpus:
        return [
            Problem("parallel.num_workers", workers, f"needs a GPU each, and there are {gpus}", f"Use at most {gpus}.")
        ]
    if not spec.parallel.use_gpu and cpus is not None and workers * spec.parallel.cpus_per_worker > cpus:
        return [
            Problem(
                "parallel.num_workers",
                workers,
                f"needs {spec.parallel.cpus_per_worker} CPUs each, and the cluster has {cpus} in all",
                "Use fewer workers or fewer cpus_per_worker.",
            )
        ]
    return []


def _unusable_data(spec: RunSpec, dataset: DatasetFacts) -> list[Problem]:
    if dataset.rows == 0 or dataset.loss_tokens == 0:
        return [Problem("data.train", dataset.conversations, "holds nothing to train on", "Check format and columns.")]
    if spec.data.validation is not None and dataset.validation_loss_tokens == 0:
        return [
            Problem(
                "data.validation", dataset.validation_rows, "holds nothing to measure", "Hold out a larger fraction."
            )
        ]
    return []


def _targets_are_trainable(spec: RunSpec) -> bool:
    targets = spec.method.target_modules
    names = [targets] if isinstance(targets, str) else targets
    return not any("lm_head" in name or "embed_tokens" in name for name in names)


def _warnings(
    spec: RunSpec,
    dataset: DatasetFacts,
    resources: Resources,
    memory: MemoryEstimate | None,
    num_steps: int,
    steps_per_epoch: float,
) -> list[str]:
    warnings = []
    limit = resources.gpu_memory_gib
    if memory and limit is not None and memory.gpu_bytes > limit * GIB:
        warnings.append(
            f"Needs about {memory.gpu_bytes / GIB:.0f} GiB per GPU, and one has {limit:.0f} GiB. Use more workers with "
            "ZeRO-3, qlora, a shorter data.max_seq_len, or parallel.offload: cpu."
        )
    if steps_per_epoch < 1:
        warnings.append(
            f"The {dataset.rows} packed rows fill less than one batch of {spec.train.global_batch_size}: a step sees "
            "rows more than once. Lower train.global_batch_size."
        )
    if num_steps < 20:
        warnings.append(f"{num_steps} steps are few to learn from. Lower train.global_batch_size or add epochs.")
    if dataset.truncated:
        warnings.append(
            f"{dataset.truncated} of {dataset.conversations} examples are cut at data.max_seq_len = "
            f"{spec.data.max_seq_len}."
        )
    if spec.checkpoint.every_steps is not None:
        warnings.append("checkpoint.every_steps: the best weights are kept, but resuming is not there yet.")
    if spec.data.validation is None:
        warnings.append("No data.validation: overfitting will not be seen, and the last weights are published.")
    return warnings


# -- said aloud ------------------------------------------------------------------------------------------------------


def _sentences(plan: RunPlan) -> list[str]:
    spec, data = plan.spec, plan.dataset
    method = {
        "full": "all weights",
        "lora": f"LoRA of rank {spec.method.lora_rank}",
        "qlora": f"LoRA of rank {spec.method.lora_rank} on a 4-bit base",
    }[spec.method.type]
    about = "" if data.exact else "about "
    sentences = [
        f"Train {method} of {plan.base_short_name}: {plan.trainable_parameters:,} of {plan.parameters:,} parameters.",
        f"Data: {about}{data.conversations:,} examples in {about}{data.rows:,} rows of at most "
        f"{spec.data.max_seq_len:,} tokens; {data.loss_tokens / max(1, data.tokens):.0%} of {data.tokens:,} tokens are "
        "trained on.",
        f"Batch: {plan.micro_batch_size} rows x {spec.parallel.num_workers} workers x "
        f"{plan.gradient_accumulation_steps} accumulation = {plan.global_batch_size} rows a step.",
        f"Length: {plan.num_steps:,} steps, {plan.epochs:.2f} epochs, {plan.tokens:,} tokens "
        f"({plan.loss_tokens:,} loss tokens).",
        f"Learning rate: {plan.warmup_steps} steps up to {plan.learning_rate:.2e}, then {spec.train.schedule}"
        + (
            "."
            if spec.train.schedule == "constant"
            else f" to {plan.learning_rate * spec.train.min_learning_rate_ratio:.1e}."
        ),
        f"Workers: {spec.parallel.num_workers} on {'GPU' if spec.parallel.use_gpu else 'CPU'}, ZeRO-{plan.zero_stage}, "
        f"offload {spec.parallel.offload}, {spec.train.precision}, activation checkpointing "
        f"{'on' if plan.activation_checkpointing else 'off'}.",
    ]
    if plan.validate_every_steps:
        sentences.append(
            f"Validation: every {plan.validate_every_steps} steps on {data.validation_conversations:,} examples; "
            "the weights with the lowest loss are published."
        )
    if plan.memory_gib:
        sentences.append(f"Memory: about {plan.memory_gib['total']:.1f} GiB per GPU.")
    return sentences
