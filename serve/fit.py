"""Whether bases fit the GPUs that serve them."""

from ft_service.catalog.models import ModelShape
from ft_service.plan.serving import GIB, Precision, ServingPlan, plan_serving
from serve.settings import BaseSettings

RANK = 16
CONTEXT = 8192


def plan_base(base: BaseSettings, shape: ModelShape, memory_gib: float) -> ServingPlan:
    """What each GPU of a replica holds, on GPUs of so much memory."""
    precision: Precision = "fp32" if base.dtype == "float32" else "bf16"
    if base.precision == "nf4":
        precision = "nf4"
    is_vllm = base.engine == "vllm"
    return plan_serving(
        shape,
        memory_gib,
        max(1, base.gpus or 1),
        precision,
        base.adapter_gib,
        lora_rank=base.max_lora_rank if is_vllm else RANK,
        max_slots=base.max_batch if is_vllm else None,
    )


def context_of(base: BaseSettings) -> int:
    """Tokens of the request that must have room."""
    return base.max_context or CONTEXT


def full_model_problem(base: BaseSettings, shape: ModelShape, memory_gib: float | None) -> str | None:
    """Why the model of a `full` job cannot be served as its parent `base` is; None if nothing is known against it."""
    if memory_gib is None or base.gpus == 0:
        return None
    plan = plan_base(base, shape, memory_gib)
    if plan.fits(context_of(base)):
        return None
    return (
        f"Its model becomes a base of this server, and has no room there: weights take {plan.weights / GIB:.1f} GiB on "
        f"each of the replica's GPUs ({plan.gpus} of {memory_gib:g} GiB), and a request of {context_of(base):,} tokens "
        f"must fit beside them. Give {base.model_name} more GPUs (gpus), precision: nf4, or a smaller adapter_gib or "
        "max_context; ft plan --serve shows what fits."
    )
