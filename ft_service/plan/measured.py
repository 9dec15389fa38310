"""How well a run uses its GPUs, from its measured speed."""

from dataclasses import replace

from ft_service.catalog.gpus import GPUS
from ft_service.catalog.models import ModelShape
from ft_service.plan.plan import RunPlan
from ft_service.plan.search import search_space
from ft_service.plan.speed import flops_per_token


def measured_mfu(plan: RunPlan, shape: ModelShape, tokens_per_second: float) -> float | None:
    """Fraction of the GPUs' peak bf16 rate, of all executed FLOPs, recomputation included, as `Estimate.mfu`.

    `tokens_per_second` is that of all workers together. None on CPU and on unknown GPUs.
    """
    if plan.estimate is None or plan.estimate.gpu_type not in GPUS:
        return None
    layout = replace(
        search_space(plan.spec, plan.workers_per_node).layout,
        max_seq_len=max(1, min(plan.spec.data.max_seq_len, round(plan.dataset.tokens / plan.dataset.rows))),
        activation_checkpointing=plan.activation_checkpointing,
        kept_layers=plan.kept_layers,
    )
    peak = plan.spec.parallel.max_workers * GPUS[plan.estimate.gpu_type].bf16_tflops * 1e12
    return tokens_per_second * flops_per_token(shape, layout) / peak
