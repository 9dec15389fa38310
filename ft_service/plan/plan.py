"""RunPlan: what was decided. A pure function of spec, dataset facts, the base's shape and the resources.

Every derived number and every check across settings and facts lives here; training reads the plan and decides nothing.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS, GPUS_PER_NODE, Gpu, find_gpu
from ft_service.catalog.models import ModelShape
from ft_service.errors import Problem, SpecError
from ft_service.plan import speed
from ft_service.plan.explain import reasons, shortage, suggestions
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.memory import GIB, estimate_memory, trainable_parameters
from ft_service.plan.search import Choice, Machine, Question, ask, best, judge, judge_all
from ft_service.spec.rules import contradictions
from ft_service.spec.schema import RunSpec

DEFAULT_EPOCHS = 3.0
DEFAULT_LEARNING_RATE = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-5}
VALIDATIONS_PER_RUN = 10
CPU_MICRO_BATCH_TOKENS = 4096
"""Rows are flattened, so on a CPU a few thousand tokens already fill the matrix units."""


class Estimate(BaseModel):
    """What a run will take, from datasheets and a stated MFU: to budget with, not a measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu_type: str
    mfu: float = Field(description="Assumed share of the peak rate, of all FLOPs executed.")
    mfu_source: str
    tokens_per_second: float = Field(description="Over all workers, on rows as full as the data's.")
    tokens_per_second_per_gpu: float
    seconds_per_step: float
    compute_share: float = Field(description="Of a step; the rest is communication and offloading that is not hidden.")
    communication_share: float
    offload_share: float
    seconds_per_epoch: float
    seconds: float = Field(description="The whole run with its validations, without loading and without waiting.")
    gpu_hours: float
    cost_usd: float | None


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
    offload: Literal["none", "cpu", "nvme"] = "none"
    hpz_partition_size: int = Field(default=1, description="Workers that share a second copy of the weights; 1: none.")
    workers_per_node: int = 1
    validate_every_steps: int | None
    tokens: int = Field(description="Tokens seen over the whole run.")
    loss_tokens: int = Field(description="Loss tokens over the whole run.")
    memory_gib: dict[str, float] = Field(description="GiB of one GPU by component, and their total; empty on CPU.")
    host_memory_gib: dict[str, float] = Field(
        default_factory=dict, description="GiB of one node's main memory by component, and their total; empty on CPU."
    )
    gpu_capacity_gib: float | None = Field(default=None, description="GiB that one GPU has; None: not known.")
    host_capacity_gib: float | None = Field(default=None, description="GiB that one node has; None: not known.")
    gpu_gib_with_checkpointing: float | None = Field(
        default=None, description="GiB of one GPU with activation checkpointing."
    )
    gpu_gib_without_checkpointing: float | None = Field(
        default=None, description="GiB of one GPU without activation checkpointing."
    )
    fits: bool | None = Field(default=None, description="None: not known.")
    estimate: Estimate | None = Field(
        default=None, description="Time and cost; None on a CPU, on unknown GPUs, and for what does not fit."
    )
    summary: list[str] = Field(description="The plan in sentences.")
    reasons: list[str] = Field(default_factory=list, description="Why, for each setting the spec left open.")
    advice: list[str] = Field(default_factory=list, description="What would fit, where this does not.")
    warnings: list[str]
    remarks: list[str]

    @property
    def training_digest(self) -> str:
        """SHA-256 of what decides the course of the training: not where, on how many workers or how cut it runs."""
        layout = {"micro_batch_size", "activation_checkpointing"}
        decides = {
            "model": self.spec.model.model_dump(mode="json"),
            "method": self.spec.method.model_dump(mode="json"),
            "train": self.spec.train.model_dump(mode="json", exclude=layout),
            "dataset": self.dataset.digest,
            "steps": [self.num_steps, self.warmup_steps, self.learning_rate, self.validate_every_steps],
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def make_plan(spec: RunSpec, dataset: DatasetFacts, shape: ModelShape, resources: Resources) -> RunPlan:
    """Decide everything the spec leaves open; of a range of workers, the most that the resources allow.

    Raises `SpecError` with every contradiction between spec, data, base and resources, together.
    """
    asked, spec = spec, _with_workers_there_are(spec, resources)
    problems = [
        *contradictions(spec),
        *_unmet_resources(spec, resources),
        *_unmet_hpz(spec, resources),
        *_unusable_data(spec, dataset),
    ]
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

    workers_per_node = _workers_per_node(spec, resources)
    machine = _machine(spec, resources)
    decision = _decide(spec, shape, machine, workers_per_node)
    layout, accumulation = decision.choice.layout, decision.choice.accumulation
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

    facts = models.find(spec.model.base)
    seen = num_steps * batch / dataset.rows
    draft = {
        "spec": spec,
        "dataset": dataset,
        "base_short_name": models.short_name(spec.model.base),
        "parameters": shape.num_parameters,
        "trainable_parameters": trainable_parameters(shape, layout),
        "zero_stage": layout.zero_stage,
        "micro_batch_size": layout.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": batch,
        "num_steps": num_steps,
        "epochs": epochs,
        "warmup_steps": warmup,
        "learning_rate": spec.train.learning_rate or DEFAULT_LEARNING_RATE[spec.method.type],
        "activation_checkpointing": layout.activation_checkpointing,
        "offload": layout.offload,
        "hpz_partition_size": layout.workers_per_node if layout.hpz else 1,
        "workers_per_node": layout.workers_per_node,
        "validate_every_steps": validate_every,
        "tokens": round(dataset.tokens * seen),
        "loss_tokens": round(dataset.loss_tokens * seen),
        **_memory(spec, shape, decision.choice, machine),
        "estimate": None
        if decision.fits is False
        else _estimate(spec, dataset, shape, resources, decision.choice, num_steps, validate_every),
        "reasons": decision.reasons,
        "advice": [] if decision.fits is not False else suggestions(shape, spec, workers_per_node, machine),
        "fits": decision.fits,
        "remarks": models.remarks(facts, {source.format for source in spec.data.train}) if facts else [],
        "warnings": [
            *_warnings(spec, dataset, decision, machine, num_steps, steps_per_epoch),
            *_warnings_of_fewer(asked, spec, shape, machine, resources),
        ],
        "summary": [],
    }
    return RunPlan.model_validate({**draft, "summary": _sentences(RunPlan.model_validate(draft))})


# -- decisions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decision:
    choice: Choice
    reasons: list[str]
    fits: bool | None


def _workers_per_node(spec: RunSpec, resources: Resources) -> int:
    workers = spec.parallel.most_workers
    if not spec.parallel.use_gpu:
        return workers
    if resources.gpus_per_node is not None:
        return min(workers, resources.gpus_per_node)
    if resources.num_nodes is not None:
        return math.ceil(workers / resources.num_nodes)
    return min(workers, GPUS_PER_NODE)


def _gpu(spec: RunSpec, resources: Resources) -> Gpu | None:
    """The type that workers will run on: the one that the spec asks for, else the only one there."""
    return find_gpu(spec.parallel.accelerator_type or resources.gpu_type)


def _machine(spec: RunSpec, resources: Resources) -> Machine:
    gpu, asked = _gpu(spec, resources), spec.parallel.accelerator_type
    elsewhere = asked is not None and resources.gpu_type not in (None, asked)
    memory = None if elsewhere else resources.gpu_memory_gib
    if memory is None and gpu is not None:
        memory = gpu.memory_gib
    # Settings are compared on a type that stands for all, where theirs is not known: only ratios matter for that.
    return Machine(gpu or GPUS["H100"], memory, resources.host_memory_gib_per_node)


def _decide(spec: RunSpec, shape: ModelShape, machine: Machine, workers_per_node: int) -> _Decision:
    question = ask(spec, workers_per_node)
    if not spec.parallel.use_gpu:
        return _Decision(_judge_on_cpu(spec, shape, question, machine), [], None)
    if machine.gpu_gib is None:
        choice = judge_all(shape, _safest(question), machine)[0]
        return _Decision(choice, _UNKNOWN_MEMORY, None)
    choices = judge_all(shape, question, machine)
    choice = best(choices)
    return _Decision(choice, reasons(question, choice, choices), choice.fits)


_UNKNOWN_MEMORY = [
    "The memory of the GPUs is not known, so what needs least of it was taken: ZeRO-3 for several workers, one row a "
    "pass, activation checkpointing. Set parallel.accelerator_type (in `ft plan`: --gpu-type) to have it judged."
]


def _safest(question: Question) -> Question:
    """Every open setting to what needs least GPU memory, short of offloading."""
    auto: Literal["auto"] = "auto"
    several = question.layout.num_workers > 1
    offload = "none" if question.offload == auto else question.offload
    lowest = 3 if several or offload == "nvme" else 2 if offload == "cpu" else 1
    return with_changes(
        question,
        zero_stage=lowest if question.zero_stage == auto else question.zero_stage,
        micro_batch_size=1 if question.micro_batch_size == auto else question.micro_batch_size,
        activation_checkpointing=question.activation_checkpointing in (True, auto),
        offload=offload,
        hpz=question.hpz is True,
    )


def _judge_on_cpu(spec: RunSpec, shape: ModelShape, question: Question, machine: Machine) -> Choice:
    """On a CPU memory is not modelled: the lowest stage, and as many rows a pass as fill its matrix units."""
    offload = "none" if question.offload == "auto" else question.offload
    lowest = 3 if offload == "nvme" else 2 if spec.parallel.most_workers > 1 or offload == "cpu" else 1
    rows = question.rows_per_worker
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    filling = max((size for size in divisors if size * spec.data.max_seq_len <= CPU_MICRO_BATCH_TOKENS), default=1)
    layout = with_changes(
        question.layout,
        zero_stage=lowest if question.zero_stage == "auto" else question.zero_stage,
        micro_batch_size=filling if question.micro_batch_size == "auto" else question.micro_batch_size,
        activation_checkpointing=question.activation_checkpointing is True,
        offload=offload,
    )
    return judge(shape, layout, rows, machine)


def _memory(spec: RunSpec, shape: ModelShape, choice: Choice, machine: Machine) -> dict[str, object]:
    if not spec.parallel.use_gpu:
        return {"memory_gib": {}}
    memory = choice.memory

    def gib_if(checkpointing: bool) -> float:
        layout = with_changes(choice.layout, activation_checkpointing=checkpointing)
        return estimate_memory(shape, layout).gpu_bytes / GIB

    return {
        "memory_gib": {**{name: size / GIB for name, size in memory.gpu.items()}, "total": memory.gpu_bytes / GIB},
        "host_memory_gib": {
            **{name: size / GIB for name, size in memory.host.items()},
            "total": memory.host_bytes / GIB,
        },
        "gpu_capacity_gib": machine.gpu_gib,
        "host_capacity_gib": machine.host_gib,
        "gpu_gib_with_checkpointing": gib_if(True),
        "gpu_gib_without_checkpointing": gib_if(False),
    }


def _estimate(
    spec: RunSpec,
    dataset: DatasetFacts,
    shape: ModelShape,
    resources: Resources,
    choice: Choice,
    num_steps: int,
    validate_every: int | None,
) -> Estimate | None:
    gpu = _gpu(spec, resources)
    if not spec.parallel.use_gpu or gpu is None:
        return None
    # Rows are flattened, so what they leave empty costs nothing.
    row_tokens = max(1, min(spec.data.max_seq_len, round(dataset.tokens / dataset.rows)))
    layout = with_changes(choice.layout, max_seq_len=row_tokens)
    time = speed.step_time(shape, layout, choice.accumulation, gpu)
    workers = spec.parallel.most_workers
    rate = spec.train.global_batch_size * row_tokens / time.seconds
    seconds = num_steps * time.seconds
    if validate_every:
        forward = speed.forward_share(shape, layout)
        seconds += num_steps // validate_every * forward * dataset.validation_tokens / rate
    gpu_hours = workers * seconds / 3600
    price = resources.price_per_gpu_hour
    return Estimate(
        gpu_type=gpu.name,
        mfu=speed.MFU,
        mfu_source=speed.MFU_SOURCE,
        tokens_per_second=rate,
        tokens_per_second_per_gpu=rate / workers,
        seconds_per_step=time.seconds,
        compute_share=time.compute / time.seconds,
        communication_share=time.communication / time.seconds,
        offload_share=time.offload / time.seconds,
        seconds_per_epoch=dataset.tokens / rate,
        seconds=seconds,
        gpu_hours=gpu_hours,
        cost_usd=None if price is None else gpu_hours * price,
    )


# -- checks ----------------------------------------------------------------------------------------------------------


def _unmet_resources(spec: RunSpec, resources: Resources) -> list[Problem]:
    workers, gpus, cpus = spec.parallel.most_workers, resources.num_gpus, resources.num_cpus
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


def _unmet_hpz(spec: RunSpec, resources: Resources) -> list[Problem]:
    workers, per_node = spec.parallel.most_workers, _workers_per_node(spec, resources)
    if spec.parallel.hpz is not True or (workers > per_node > 1 and workers % per_node == 0):
        return []
    problem = f"needs several nodes with equally many workers, and {workers} workers run {per_node} a node"
    return [Problem("parallel.hpz", True, problem, "Use hpz: auto, or whole nodes.")]


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
    decision: _Decision,
    machine: Machine,
    num_steps: int,
    steps_per_epoch: float,
) -> list[str]:
    warnings = []
    if decision.fits is False:
        warnings.append(shortage(decision.choice, machine))
    if spec.parallel.use_gpu and spec.train.precision == "bf16" and not machine.gpu.has_bf16:
        warnings.append(f"{machine.gpu.name} has no bf16: it will be emulated, slowly. Use an Ampere GPU or newer.")
    if steps_per_epoch < 1:
        warnings.append(
            f"The {dataset.rows} packed rows fill less than one batch of {spec.train.global_batch_size}: a step sees "
            "rows more than once. Lower train.global_batch_size."
        )
    if spec.checkpoint.every_steps is None:
        warnings.append("checkpoint.every_steps is null: if workers die, all steps are repeated.")
    if num_steps < 20:
        warnings.append(f"{num_steps} steps are few to learn from. Lower train.global_batch_size or add epochs.")
    if dataset.truncated:
        warnings.append(
            f"{dataset.truncated} of {dataset.conversations} examples are cut at data.max_seq_len = "
            f"{spec.data.max_seq_len}."
        )
    if spec.data.validation is None:
        warnings.append("No data.validation: overfitting will not be seen, and the last weights are published.")
    return warnings


def _with_workers_there_are(spec: RunSpec, resources: Resources) -> RunSpec:
    parallel, counts = spec.parallel, spec.worker_counts()
    there_are = resources.num_gpus if parallel.use_gpu else resources.num_cpus
    if parallel.fewest_workers == parallel.most_workers or not counts:
        return spec
    room = counts[0] if there_are is None else there_are // (1 if parallel.use_gpu else parallel.cpus_per_worker)
    return spec.with_workers(next((count for count in counts if count <= room), counts[-1]))


def _warnings_of_fewer(
    asked: RunSpec, spec: RunSpec, shape: ModelShape, machine: Machine, resources: Resources
) -> list[str]:
    """What would go wrong only once nodes are lost."""
    counts = asked.worker_counts()
    fewest = asked.with_workers(counts[-1])
    if counts[-1] >= spec.parallel.most_workers:
        return []
    decision = _decide(fewest, shape, machine, _workers_per_node(fewest, resources))
    if decision.fits is not False:
        return []
    return [
        f"With parallel.num_workers.min = {counts[-1]} it would not fit. {shortage(decision.choice, machine)} "
        "Raise min, or set offload: auto."
    ]


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
        f"Batch: {plan.micro_batch_size} rows x {spec.parallel.most_workers} workers x "
        f"{plan.gradient_accumulation_steps} accumulation = {plan.global_batch_size} rows a step.",
        f"Length: {plan.num_steps:,} steps, {plan.epochs:.2f} epochs, {plan.tokens:,} tokens "
        f"({plan.loss_tokens:,} loss tokens).",
        f"Learning rate: {plan.warmup_steps} steps up to {plan.learning_rate:.2e}, then {spec.train.schedule}"
        + (
            "."
            if spec.train.schedule == "constant"
            else f" to {plan.learning_rate * spec.train.min_learning_rate_ratio:.1e}."
        ),
        f"Workers: {_workers_said(plan)}, ZeRO-{plan.zero_stage}{' with hpZ' if plan.hpz_partition_size > 1 else ''}, "
        f"offload {plan.offload}, {spec.train.precision}, activation checkpointing "
        f"{'on' if plan.activation_checkpointing else 'off'}.",
    ]
    if plan.validate_every_steps:
        sentences.append(
            f"Validation: every {plan.validate_every_steps} steps on {data.validation_conversations:,} examples; "
            "the weights with the lowest loss are published."
        )
    if plan.memory_gib:
        sentences.append(_memory_said(plan))
    if plan.estimate:
        sentences += _estimate_said(plan.estimate)
    return sentences


def _workers_said(plan: RunPlan) -> str:
    workers, per_node = plan.spec.parallel.most_workers, plan.workers_per_node
    if not plan.spec.parallel.use_gpu:
        return f"{workers} on CPU"
    kind = plan.estimate.gpu_type if plan.estimate else plan.spec.parallel.accelerator_type or "GPU"
    return f"{workers} on {kind}" + (f", {per_node} a node" if workers > per_node else "")


def _memory_said(plan: RunPlan) -> str:
    total, has, other = plan.memory_gib["total"], plan.gpu_capacity_gib, plan.gpu_gib_without_checkpointing
    opposite = "without activation checkpointing"
    if not plan.activation_checkpointing:
        other, opposite = plan.gpu_gib_with_checkpointing, "with activation checkpointing"
    of = "" if has is None else f" of {has:.1f}"
    host = plan.host_memory_gib["total"]
    node = "" if plan.host_capacity_gib is None else f" of {plan.host_capacity_gib:.0f}"
    return f"Memory: about {total:.1f}{of} GiB per GPU ({other:.1f} {opposite}); {host:.0f}{node} GiB per node."


def _estimate_said(estimate: Estimate) -> list[str]:
    parts = [
        f"{share:.0%} {name}"
        for name, share in (
            ("computation", estimate.compute_share),
            ("communication", estimate.communication_share),
            ("offloading", estimate.offload_share),
        )
        if share >= 0.005
    ]
    sentences = [
        f"Speed: about {estimate.tokens_per_second:,.0f} tokens/s, {estimate.tokens_per_second_per_gpu:,.0f} per GPU "
        f"({', '.join(parts)}). An estimate, at {estimate.mfu:.0%} of the peak rate of {estimate.gpu_type} "
        f"({estimate.mfu_source}).",
        f"Time: about {duration(estimate.seconds_per_epoch)} per epoch, {duration(estimate.seconds)} in all with "
        "validations, and loading before it.",
    ]
    cost = f"Cost: {estimate.gpu_hours:,.1f} GPU hours"
    sentences.append(f"{cost}." if estimate.cost_usd is None else f"{cost}, about ${estimate.cost_usd:,.2f}.")
    return sentences


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min, 5.2 h, 3.1 days."""
    for unit, name, form in ((86_400 * 2, "days", ".1f"), (3600, "h", ".1f"), (60, "min", ".0f")):
        if seconds >= unit:
            return f"{seconds / (86_400 if name == 'days' else unit):{form}} {name}"
    return f"{seconds:.0f} s"
