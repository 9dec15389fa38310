"""What the training loop needs from outside, and what it reports: without DeepSpeed or Ray.

Drivers import this module for the state in a checkpoint's manifest, so it does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ft_service.runs.metrics import StepMetrics

if TYPE_CHECKING:
    import torch

    from ft_service.train.batches import MicroBatch


@dataclass(frozen=True)
class BatchLoss:
    """Figures of a micro-batch, or their sums over those of a step: scalars on the device."""

    loss_sum: torch.Tensor
    """Nats, over the loss tokens; differentiable unless gradients are off."""
    correct: torch.Tensor
    """Loss tokens whose most likely prediction is right."""


@dataclass(frozen=True)
class Update:
    """What a step's last micro-step reports, over all ranks. Unless loss and norm are finite, no weight has changed."""

    loss_sum: float
    """Nats, over the loss tokens of the step."""
    correct: float
    """Loss tokens of the step whose most likely prediction is right."""
    num_leaving: float
    """Ranks that were asked to leave."""
    peak_memory_gib: float
    """The most that any rank has allocated so far, before this update."""
    peak_reserved_gib: float
    """The most that any rank's allocator has held so far."""
    grad_norm: float
    """Global gradient norm before clipping."""


class Workers(Protocol):
    """What the loop needs from parallelism. `ft_service.train.parallel.Parallel` implements it with DeepSpeed."""

    world_size: int

    def loss(self, batch: MicroBatch) -> BatchLoss: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def micro_step(self) -> None: ...
    def update(self, learning_rate: float, sums: BatchLoss, leaving: bool) -> Update: ...
    def evaluation_mode(self) -> AbstractContextManager[None]: ...
    def sum_over_ranks(self, *values: torch.Tensor | float) -> list[float]: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...


@dataclass
class TrainingState:
    """What the loop carries from step to step. With weights and optimizer state it is enough to resume."""

    step: int = 0
    """Completed updates."""
    best_step: int | None = None
    best_validation_loss: float = math.inf
    stalled_validations: int = 0
    stopped_early: bool = False
    loss: float = math.nan
    """Training loss of the last step, in nats per loss token."""


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop. Every rank calls each of them at the same step."""

    on_step: Callable[[StepMetrics], None]
    on_best: Callable[[TrainingState], None]
    """The validation loss is the lowest so far: save these weights."""
    on_checkpoint: Callable[[TrainingState], None]
    leave_requested: Callable[[], bool] = lambda: False
    """Whether this rank was asked to leave. If any was, all finish the step, save a checkpoint and return."""
    on_progress: Callable[[str, int], None] = lambda doing, step: None
    """What comes next, and in which step. Called often, so that silence means that the loop hangs."""
    text_of_row: Callable[[int], str] = lambda row: ""
    """The first words of a row of the training data."""
