"""The plan in sentences, for the terminal, the log and the report."""

from ft_service.plan.plan import Estimate, Extension, RunPlan
from ft_service.text import counted, format_duration

_SHOWN_SHARE = 0.005
"""Smaller shares of a step are not listed."""


def plan_sentences(plan: RunPlan) -> list[str]:
    """The sentences of `plan.summary`, each of the form "Subject: ..."."""
    sentences = [
        _training(plan),
        _data(plan),
        _batch(plan),
        _length(plan),
        _learning_rate(plan),
        *_extensions(plan),
        _workers(plan),
    ]
    if plan.validate_every_steps:
        sentences.append(_validation(plan))
    if plan.memory_gib:
        sentences.append(_memory(plan))
    if plan.estimate:
        sentences += [_speed(plan.estimate), _time(plan.estimate), _cost(plan.estimate)]
    return sentences


def _training(plan: RunPlan) -> str:
    method = plan.spec.method
    trained = {
        "full": "all weights",
        "lora": f"LoRA of rank {method.lora_rank}",
        "qlora": f"LoRA of rank {method.lora_rank} on a 4-bit base",
    }[method.type]
    return (
        f"Train: {trained} of {plan.base_short_name}, {plan.trainable_parameters:,} of {plan.parameters:,} parameters."
    )


def _data(plan: RunPlan) -> str:
    data = plan.dataset
    about = "" if data.exact else "about "
    loss_share = data.loss_tokens / max(1, data.tokens)
    return (
        f"Data: {about}{data.conversations:,} examples in {about}{data.rows:,} rows of at most "
        f"{plan.spec.data.max_seq_len:,} tokens; {loss_share:.0%} of {data.tokens:,} tokens are loss tokens."
    )


def _batch(plan: RunPlan) -> str:
    return (
        f"Batch: {counted(plan.micro_batch_size, 'row')} x {counted(plan.spec.parallel.max_workers, 'worker')} x "
        f"{plan.gradient_accumulation_steps} accumulation = {counted(plan.global_batch_size, 'row')} per step."
    )


def _length(plan: RunPlan) -> str:
    about = "" if plan.dataset.exact else "about "
    return (
        f"Length: {counted(plan.num_steps, 'step')}, {about}{plan.epochs:.2f} passes over the data, "
        f"{plan.tokens:,} tokens ({plan.loss_tokens:,} loss tokens)."
    )


def _learning_rate(plan: RunPlan) -> str:
    schedule = plan.spec.train.schedule
    final = plan.learning_rate * plan.spec.train.min_learning_rate_ratio
    end = "" if schedule == "constant" else f" to {final:.1e}"
    warmup = counted(plan.warmup_steps, "step")
    return f"Learning rate: {warmup} of warmup to {plan.learning_rate:.2e}, then {schedule}{end}."


def _extensions(plan: RunPlan) -> list[str]:
    lengths = [*(extension.num_steps for extension in plan.extensions), plan.num_steps]
    return [_extension(plan, each, new) for each, new in zip(plan.extensions, lengths[1:], strict=True)]


def _extension(plan: RunPlan, extension: Extension, num_steps: int) -> str:
    subject = "Extended" if num_steps > extension.num_steps else "Shortened"
    old = counted(extension.num_steps, "step")
    new = counted(num_steps, "step")
    moving = counted(extension.moving_steps(num_steps, plan.warmup_steps), "step")
    end = ""
    if num_steps <= plan.warmup_steps:
        end = f" The {counted(plan.warmup_steps, 'step')} of warmup stay, so it still rises at the end."
    return (
        f"{subject}: at step {extension.step:,} from {old} to {new}. Earlier steps stay as they are; then, over "
        f"{moving}, the learning rate moves from the schedule of {old} to that of {new}.{end}"
    )


def _workers(plan: RunPlan) -> str:
    workers = plan.spec.parallel.max_workers
    if not plan.spec.parallel.use_gpu:
        placement = f"{workers} on CPU"
    else:
        gpu_type = plan.estimate.gpu_type if plan.estimate else plan.spec.parallel.accelerator_type or "GPU"
        per_node = f", {plan.workers_per_node} per node" if workers > plan.workers_per_node else ""
        placement = f"{workers} on {gpu_type}{per_node}"
    return (
        f"Workers: {placement}, ZeRO-{plan.zero_stage}{' with hpZ' if plan.hpz_partition_size > 1 else ''}, "
        f"offload {plan.offload}, {plan.spec.train.precision}, activation checkpointing "
        f"{_checkpointing(plan)}."
    )


def _checkpointing(plan: RunPlan) -> str:
    if not plan.activation_checkpointing:
        return "off"
    return f"on except for the last {counted(plan.kept_layers, 'layer')}" if plan.kept_layers else "on"


def _validation(plan: RunPlan) -> str:
    return (
        f"Validation: every {plan.validate_every_steps} steps on {plan.dataset.validation_conversations:,} examples; "
        "the weights with the lowest loss are published."
    )


def _memory(plan: RunPlan) -> str:
    if plan.activation_checkpointing:
        alternative = f"{plan.gpu_gib_without_checkpointing:.1f} without activation checkpointing"
    else:
        alternative = f"{plan.gpu_gib_with_checkpointing:.1f} with activation checkpointing"
    gpu = f"{plan.memory_gib['total']:.1f}" + _of(plan.gpu_capacity_gib, ".1f")
    node = f"{plan.host_memory_gib['total']:.0f}" + _of(plan.host_capacity_gib, ".0f")
    return f"Memory: about {gpu} GiB per GPU ({alternative}); {node} GiB of main memory per node."


def _of(capacity_gib: float | None, form: str) -> str:
    return "" if capacity_gib is None else f" of {capacity_gib:{form}}"


def _speed(estimate: Estimate) -> str:
    shares = (
        ("computation", estimate.compute_share),
        ("communication", estimate.communication_share),
        ("offloading", estimate.offload_share),
    )
    parts = ", ".join(f"{share:.0%} {name}" for name, share in shares if share >= _SHOWN_SHARE)
    return (
        f"Speed: about {estimate.tokens_per_second:,.0f} tokens/s, {estimate.tokens_per_second_per_gpu:,.0f} per GPU "
        f"({parts}). An estimate, at {estimate.mfu:.0%} of the peak rate of {estimate.gpu_type} "
        f"({estimate.mfu_source})."
    )


def _time(estimate: Estimate) -> str:
    return (
        f"Time: about {format_duration(estimate.seconds_per_epoch)} per epoch, {format_duration(estimate.seconds)} in "
        "total with validation, without loading."
    )


def _cost(estimate: Estimate) -> str:
    cost = "" if estimate.cost_usd is None else f", about ${estimate.cost_usd:,.2f}"
    return f"Cost: {estimate.gpu_hours:,.1f} GPU hours{cost}."
