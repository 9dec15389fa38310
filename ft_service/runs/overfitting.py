"""Overfitting: validation loss rises while training loss keeps falling."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ft_service.runs.metrics import StepMetrics

# Validation loss must have risen by more than each of the first three, and training loss fallen by the last.
MIN_RISE_NATS = 0.01
MIN_RISE_SHARE = 0.02
MIN_RISE_WIGGLES = 4.0
MIN_FALL_SHARE = 0.01


@dataclass(frozen=True)
class Overfitting:
    """Validation loss turned up while training loss kept falling. Losses are in nats per loss token."""

    best_step: int
    best_validation_loss: float
    last_step: int
    last_validation_loss: float
    training_loss_at_best: float
    """Mean over the steps up to the best one; as many as half the steps from there to the last validation."""
    training_loss_at_last: float
    """Mean over the same number of steps up to the last validation."""

    @property
    def message(self) -> str:
        rise = self.last_validation_loss / self.best_validation_loss - 1
        return (
            f"Validation loss was lowest at step {self.best_step} ({self.best_validation_loss:.4f}) and rose to "
            f"{self.last_validation_loss:.4f} (+{rise:.1%}) by step {self.last_step}, while training loss kept "
            f"falling, from {self.training_loss_at_best:.4f} to {self.training_loss_at_last:.4f}: the model memorizes "
            f"its examples. Publish the weights of step {self.best_step}. Next time stop there (train.early_stopping, "
            "or fewer train.epochs), train on more or more varied data, or reduce the adapter's capacity (a lower "
            "method.lora_rank, some method.lora_dropout)."
        )


def validations(metrics: Sequence[StepMetrics]) -> list[tuple[int, float]]:
    """Step and validation loss of each validation with a finite loss."""
    measured = ((m.step, m.validation_loss) for m in metrics if m.validation_loss is not None)
    return [(step, loss) for step, loss in measured if math.isfinite(loss)]


def find_overfitting(metrics: Sequence[StepMetrics]) -> Overfitting | None:
    """Overfitting, if the last two validations are clearly above the lowest one while training loss fell; else None.

    Clearly means by 2 %, by 0.01 nats, and by four times the curve's wiggle. The wiggle is its mean back-and-forth
    movement, ``(sum |v[i+1] - v[i]| - (v[0] - v_min) - (v[-1] - v_min)) / moves``: zero for a curve that only falls and
    then only rises, and about 1.1 sigma for noise around a constant. Needs two validations after the lowest one.
    """
    measured = validations(metrics)
    if len(measured) < 3:
        return None
    steps, losses = zip(*measured, strict=True)
    lowest = min(losses)
    best = losses.index(lowest)
    if best > len(losses) - 3:
        return None
    total_movement = sum(abs(after - before) for before, after in pairwise(losses))
    wiggle = (total_movement - (losses[0] - lowest) - (losses[-1] - lowest)) / (len(losses) - 1)
    rise = min(losses[-2:]) - lowest
    if rise <= max(MIN_RISE_NATS, MIN_RISE_SHARE * lowest, MIN_RISE_WIGGLES * wiggle):
        return None

    window = (steps[-1] - steps[best]) // 2

    def training_loss_at(end: int) -> float:
        return statistics.fmean(m.loss for m in metrics if end - window < m.step <= end)

    at_best = training_loss_at(steps[best])
    at_last = training_loss_at(steps[-1])
    if not at_last < at_best * (1 - MIN_FALL_SHARE):
        return None
    return Overfitting(steps[best], lowest, steps[-1], losses[-1], at_best, at_last)
