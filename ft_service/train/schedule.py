"""The learning rate as a function of the step alone: a resumed run needs no scheduler state."""

import math
from typing import Literal


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
