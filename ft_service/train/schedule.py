"""The learning rate as a function of the step alone: a resumed run needs no scheduler state."""

import math
from functools import partial
from typing import Literal

from ft_service.plan.plan import RunPlan


def planned_learning_rate(plan: RunPlan, step: int) -> float:
    """Learning rate of the update that follows `step` completed updates of the plan.

    Where a resumed run was given more or fewer steps, the rate moves linearly from the schedule of the earlier length
    to that of the new length, over as many steps as the warmup has, or as are left. Steps before that keep their rates.
    """
    rate_for = partial(
        learning_rate,
        step,
        peak=plan.learning_rate,
        warmup_steps=plan.warmup_steps,
        schedule=plan.spec.train.schedule,
        min_ratio=plan.spec.train.min_learning_rate_ratio,
    )
    lengths = [*(extension.num_steps for extension in plan.extensions), plan.num_steps]
    rate = rate_for(num_steps=lengths[0])
    for extension, num_steps in zip(plan.extensions, lengths[1:], strict=True):
        if step >= extension.step:
            moved = (step - extension.step + 1) / extension.moving_steps(num_steps, plan.warmup_steps)
            rate += min(1.0, moved) * (rate_for(num_steps=num_steps) - rate)
    return rate


def learning_rate(
    step: int,
    *,
    peak: float,
    num_steps: int,
    warmup_steps: int,
    schedule: Literal["cosine", "linear", "constant"],
    min_ratio: float = 0.0,
) -> float:
    """Learning rate of the update that follows `step` completed updates.

    Rises linearly over `warmup_steps` (the first update uses peak / warmup_steps, not 0), then falls to `min_ratio` x
    peak at the last step: cosine as in Loshchilov & Hutter 2017 (arXiv:1608.03983), without restarts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    falling = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) if schedule == "cosine" else 1 - min(progress, 1.0)
    return peak * (min_ratio + (1 - min_ratio) * falling)
