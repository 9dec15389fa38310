"""Making the plan: a pure function of spec, dataset facts, the base's shape and the resources.

Settings left at "auto" are searched (`search.py`); everything else follows by arithmetic.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS, Gpu, find_gpu
from ft_service.catalog.models import ModelShape
from ft_service.errors import SpecError
from ft_service.plan import speed
from ft_service.plan.base_checks import base_problems, base_remarks, base_warnings
from ft_service.plan.checks import find_problems, find_warnings, hpz_problems, min_workers_warning
from ft_service.plan.explain import reasons, suggestions, why_it_does_not_fit
from ft_service.plan.facts import BaseFacts, DatasetFacts, Resources
from ft_service.plan.memory import (
    GIB,
    MIN_STAGING_BYTES,
    Layout,
    checkpoint_bytes,
    estimate_memory,
    trainable_parameters,
)
from ft_service.plan.plan import Estimate, Extension, RunPlan
from ft_service.plan.search import (
    Candidate,
    Machine,
    SearchSpace,
    best_candidate,
    evaluate_layout,
    evaluate_layouts,
    search_space,
)
from ft_service.plan.sentences import plan_sentences
from ft_service.spec.schema import RunSpec

DEFAULT_EPOCHS = 3.0
DEFAULT_LEARNING_RATE = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-5}
VALIDATIONS_PER_RUN = 10
CPU_MICRO_BATCH_TOKENS = 4096
"""Rows are flattened, so on a CPU a few thousand tokens already fill the matrix units."""


def make_plan(
    spec: RunSpec,
    dataset: DatasetFacts,
    shape: ModelShape,
    resources: Resources,
    base_facts: BaseFacts | None = None,
) -> RunPlan:
    """Resolve everything that the spec leaves open. A range of workers becomes the most that the resources allow.

    Without `base_facts` the spec is compared with the base's shape only. Raises `SpecError` with every contradiction
    between spec, data, base and resources.
    """
    requested = spec
    spec = _with_available_workers(spec, resources)
    base_facts = base_facts or BaseFacts()
    if problems := [*find_problems(spec, dataset, resources), *base_problems(spec, shape, base_facts)]:
        raise SpecError(problems)

    workers_per_node = _workers_per_node(spec, resources)
    machine = _machine(spec, resources)
    decision = _decide(spec, shape, machine, workers_per_node)
    candidate = decision.candidate
    layout = candidate.layout
    schedule = _schedule(spec, dataset)
    known = models.find(spec.model.base)
    on_gpu = spec.parallel.use_gpu

    host = dict(candidate.memory.host)
    staging = _checkpoint_staging(shape, candidate, machine) if on_gpu else MIN_STAGING_BYTES
    host["checkpoint"] = staging * layout.workers_per_node

    warnings = find_warnings(spec, dataset, schedule.num_steps)
    if decision.fits is False:
        warnings.insert(0, why_it_does_not_fit(candidate, machine))
    warnings += _warnings_of_min_workers(requested, spec, shape, machine, resources)
    warnings += base_warnings(spec, base_facts)

    plan = RunPlan(
        spec=spec,
        dataset=dataset,
        base_short_name=models.short_name(spec.model.base),
        base_facts=base_facts,
        parameters=shape.num_parameters,
        trainable_parameters=trainable_parameters(shape, layout),
        zero_stage=layout.zero_stage,
        micro_batch_size=layout.micro_batch_size,
        gradient_accumulation_steps=candidate.accumulation,
        global_batch_size=spec.train.global_batch_size,
        num_steps=schedule.num_steps,
        epochs=schedule.epochs,
        warmup_steps=schedule.warmup_steps,
        learning_rate=spec.train.learning_rate or DEFAULT_LEARNING_RATE[spec.method.type],
        activation_checkpointing=layout.activation_checkpointing,
        kept_layers=layout.kept_layers,
        offload=layout.offload,
        hpz_partition_size=layout.workers_per_node if layout.hpz else 1,
        workers_per_node=layout.workers_per_node,
        validate_every_steps=schedule.validate_every_steps,
        tokens=round(dataset.tokens * schedule.epochs),
        loss_tokens=round(dataset.loss_tokens * schedule.epochs),
        memory_gib=_gib_by_component(candidate.memory.gpu) if on_gpu else {},
        host_memory_gib=_gib_by_component(host) if on_gpu else {},
        checkpoint_staging_bytes=staging,
        gpu_capacity_gib=machine.gpu_gib if on_gpu else None,
        host_capacity_gib=machine.host_gib if on_gpu else None,
        gpu_gib_with_checkpointing=_gpu_gib(shape, layout, checkpointing=True) if on_gpu else None,
        gpu_gib_without_checkpointing=_gpu_gib(shape, layout, checkpointing=False) if on_gpu else None,
        fits=decision.fits,
        estimate=None if decision.fits is False else _estimate(spec, dataset, shape, resources, candidate, schedule),
        summary=[],
        reasons=decision.reasons,
        advice=suggestions(shape, spec, workers_per_node, machine) if decision.fits is False else [],
        warnings=warnings,
        remarks=[
            *(models.remarks(known, {source.format for source in spec.data.train}) if known else []),
            *base_remarks(spec, base_facts),
        ],
    )
    return plan.model_copy(update={"summary": plan_sentences(plan)})


# -- workers and machines --------------------------------------------------------------------------------------------


def _with_available_workers(spec: RunSpec, resources: Resources) -> RunSpec:
    parallel = spec.parallel
    counts = spec.worker_counts()
    if parallel.min_workers == parallel.max_workers or not counts:
        return spec
    available = resources.num_gpus if parallel.use_gpu else resources.num_cpus
    per_worker = 1 if parallel.use_gpu else parallel.reserved_cpus
    room = counts[0] if available is None else available // per_worker
    return spec.with_workers(next((count for count in counts if count <= room), counts[-1]))


def _workers_per_node(spec: RunSpec, resources: Resources) -> int:
    return resources.workers_per_node(spec.parallel.max_workers, spec.parallel.use_gpu)


def _gpu(spec: RunSpec, resources: Resources) -> Gpu | None:
    """The GPU type of the workers: the one that the spec requests, otherwise the one of the cluster."""
    return find_gpu(spec.parallel.accelerator_type or resources.gpu_type)


def _machine(spec: RunSpec, resources: Resources) -> Machine:
    gpu = _gpu(spec, resources)
    requested = spec.parallel.accelerator_type
    other_type = requested is not None and resources.gpu_type not in (None, requested)
    memory = None if other_type else resources.gpu_memory_gib
    if memory is None and gpu is not None:
        memory = gpu.memory_gib
    # For an unknown GPU, layouts are compared on an H100: only the ratios of their speeds matter then.
    return Machine(gpu or GPUS["H100"], memory, resources.host_memory_gib_per_node)


# -- layout ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decision:
    candidate: Candidate
    reasons: list[str]
    fits: bool | None
    """None: unknown."""


_UNKNOWN_MEMORY = [
    "The GPU memory is unknown, so the layout that needs least memory is used: ZeRO-3 for several workers, one row per "
    "forward pass, activation checkpointing. Set parallel.accelerator_type (in `ft plan`: --gpu-type) to search."
]


def _decide(spec: RunSpec, shape: ModelShape, machine: Machine, workers_per_node: int) -> _Decision:
    space = search_space(spec, workers_per_node)
    if not spec.parallel.use_gpu:
        layout = _cpu_layout(space)
        return _Decision(evaluate_layout(shape, layout, space.rows_per_worker, machine), [], None)
    if machine.gpu_gib is None:
        return _Decision(evaluate_layouts(shape, _least_memory(space), machine)[0], _UNKNOWN_MEMORY, None)
    candidates = evaluate_layouts(shape, space, machine)
    chosen = best_candidate(candidates)
    return _Decision(chosen, reasons(space, chosen, candidates), chosen.fits)


def _least_memory(space: SearchSpace) -> SearchSpace:
    """Every open setting set to the value that needs least GPU memory, without offloading."""
    auto: Literal["auto"] = "auto"
    offload = "none" if space.offload == auto else space.offload
    lowest_stage = 3 if space.layout.num_workers > 1 or offload == "nvme" else 2 if offload == "cpu" else 1
    return replace(
        space,
        zero_stage=lowest_stage if space.zero_stage == auto else space.zero_stage,
        micro_batch_size=1 if space.micro_batch_size == auto else space.micro_batch_size,
        activation_checkpointing=space.activation_checkpointing in (True, auto),
        offload=offload,
        hpz=space.hpz is True,
    )


def _cpu_layout(space: SearchSpace) -> Layout:
    """Memory is not modelled on a CPU: the lowest stage, and as many rows per pass as fill its matrix units."""
    layout = space.layout
    offload = "none" if space.offload == "auto" else space.offload
    lowest_stage = 3 if offload == "nvme" else 2 if layout.num_workers > 1 or offload == "cpu" else 1
    rows = space.rows_per_worker
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    filling = max((size for size in divisors if size * layout.max_seq_len <= CPU_MICRO_BATCH_TOKENS), default=1)
    return replace(
        layout,
        zero_stage=lowest_stage if space.zero_stage == "auto" else space.zero_stage,
        micro_batch_size=filling if space.micro_batch_size == "auto" else space.micro_batch_size,
        activation_checkpointing=space.activation_checkpointing is True,
        offload=offload,
    )


def _warnings_of_min_workers(
    requested: RunSpec, spec: RunSpec, shape: ModelShape, machine: Machine, resources: Resources
) -> list[str]:
    """Problems that appear only when nodes are lost and the run continues with its fewest workers."""
    fewest = requested.worker_counts()[-1]
    if fewest >= spec.parallel.max_workers:
        return []
    smallest = requested.with_workers(fewest)
    if problems := hpz_problems(smallest, resources):
        return [f"With parallel.num_workers.min = {fewest}: {problem}" for problem in problems]
    decision = _decide(smallest, shape, machine, _workers_per_node(smallest, resources))
    return [min_workers_warning(fewest, decision.candidate, machine)] if decision.fits is False else []


# -- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Schedule:
    num_steps: int
    epochs: float
    """Passes over the rows that the whole number of steps makes."""
    warmup_steps: int
    validate_every_steps: int | None


def num_steps_of(spec: RunSpec, num_rows: int) -> int:
    """Optimizer steps that the spec asks for on that many packed rows: whole steps, at least one."""
    if spec.train.max_steps is not None:
        return spec.train.max_steps
    epochs = spec.train.epochs or DEFAULT_EPOCHS
    return max(1, math.ceil(epochs * num_rows / spec.train.global_batch_size))


def extended(plan: RunPlan, earlier: RunPlan, step: int) -> RunPlan:
    """`plan` as the continuation of `earlier`, from a checkpoint of `step`: same warmup, validations and past.

    If `plan` has another number of steps, that is one more of its extensions.
    """
    extensions = earlier.extensions
    if plan.num_steps != earlier.num_steps:
        added = Extension(step=step, num_steps=earlier.num_steps, training_digest=earlier.training_digest)
        extensions = [*extensions, added]
    if not extensions:
        return plan
    continued = plan.model_copy(
        update={
            "extensions": extensions,
            "warmup_steps": earlier.warmup_steps,
            "validate_every_steps": earlier.validate_every_steps,
        }
    )
    return continued.model_copy(update={"summary": plan_sentences(continued)})


def _schedule(spec: RunSpec, dataset: DatasetFacts) -> _Schedule:
    batch = spec.train.global_batch_size
    num_steps = num_steps_of(spec, dataset.rows)
    validate_every = None
    if spec.data.validation is not None:
        validate_every = spec.train.validate_every_steps or max(1, num_steps // VALIDATIONS_PER_RUN)
    return _Schedule(
        num_steps=num_steps,
        epochs=num_steps * batch / dataset.rows,
        warmup_steps=math.ceil(spec.train.warmup_ratio * num_steps),
        validate_every_steps=validate_every,
    )


# -- memory, time and cost -------------------------------------------------------------------------------------------


def _gib_by_component(components: dict[str, int]) -> dict[str, float]:
    return {name: size / GIB for name, size in components.items()} | {"total": sum(components.values()) / GIB}


def _gpu_gib(shape: ModelShape, layout: Layout, checkpointing: bool) -> float:
    return estimate_memory(shape, replace(layout, activation_checkpointing=checkpointing)).gpu_bytes / GIB


def _checkpoint_staging(shape: ModelShape, candidate: Candidate, machine: Machine) -> int:
    """Bytes of main memory in which a worker may hold copies of a checkpoint while it writes them.

    The whole state, so that training hardly waits for storage, if half of the main memory that is left has room for it.
    """
    layout = candidate.layout
    whole = checkpoint_bytes(shape, layout)
    free = 0 if machine.host_gib is None else round(machine.host_gib * GIB) - candidate.memory.host_bytes
    return min(whole, max(MIN_STAGING_BYTES, free // 2 // layout.workers_per_node))


def _estimate(
    spec: RunSpec,
    dataset: DatasetFacts,
    shape: ModelShape,
    resources: Resources,
    candidate: Candidate,
    schedule: _Schedule,
) -> Estimate | None:
    gpu = _gpu(spec, resources)
    if not spec.parallel.use_gpu or gpu is None:
        return None
    # Rows are flattened, so the empty part of a row costs nothing.
    row_tokens = max(1, min(spec.data.max_seq_len, round(dataset.tokens / dataset.rows)))
    layout = replace(candidate.layout, max_seq_len=row_tokens)
    time = speed.step_time(shape, layout, candidate.accumulation, gpu)
    workers = spec.parallel.max_workers
    rate = spec.train.global_batch_size * row_tokens / time.seconds
    seconds = schedule.num_steps * time.seconds
    if schedule.validate_every_steps:
        validations = schedule.num_steps // schedule.validate_every_steps
        seconds += validations * speed.forward_share(shape, layout) * dataset.validation_tokens / rate
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
